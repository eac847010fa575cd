//! An API client as a row: its document, which the store does not interpret, and what proves it.

use keybroker_core::{
    call::Timestamp,
    client_credential::digest_of,
    envelope::{Mac, mac::MacMessage},
    key::{ClientId, WrappingKeyId},
};

/// An API client as SQL knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientRow {
    /// The id that it sends with its secret.
    pub id: ClientId,
    /// Grows with each change, from 1.
    pub revision: u64,
    /// As bytes not yet parsed.
    pub document: Vec<u8>,
    /// By an integrity key over all of the above, so that a writer of the database cannot give a client another
    /// secret or another role.
    pub mac: Mac,
    /// The wrapping key whose integrity key made the MAC.
    pub key: WrappingKeyId,
    /// When it was created.
    pub created: Timestamp,
    /// When it last changed.
    pub updated: Timestamp,
}

impl ClientRow {
    /// What the row's MAC must be over.
    pub fn mac_message(&self) -> MacMessage {
        MacMessage::client_credential(self.id, self.revision, &digest_of(&self.document))
    }
}
