//! A row of the table of API clients, with the client's document, which the store does not
//! interpret, and its MAC.

use keybroker_core::{
    call::Timestamp,
    client_credential::digest_of,
    envelope::{Mac, mac::MacMessage},
    key::{ClientId, WrappingKeyId},
};

/// The stored form of an API client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientRow {
    /// The id that the client sends with its secret.
    pub id: ClientId,
    /// The revision of the document, which starts at 1 and increases by 1 with each change.
    pub revision: u64,
    /// The document as bytes that are not parsed yet.
    pub document: Vec<u8>,
    /// A MAC with an integrity key over the id, the revision and the document. Because of the MAC,
    /// a person who can write to the database cannot give a client another secret or another role.
    pub mac: Mac,
    /// The wrapping key whose integrity key made the MAC.
    pub key: WrappingKeyId,
    /// The time at which the API client was created.
    pub created: Timestamp,
    /// The time of the last change of the API client.
    pub updated: Timestamp,
}

impl ClientRow {
    /// The message that the row's MAC must cover.
    pub fn mac_message(&self) -> MacMessage {
        MacMessage::client_credential(self.id, self.revision, &digest_of(&self.document))
    }
}
