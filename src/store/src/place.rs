//! The place of a wrapping key on a further token, as a row.

use keybroker_core::{
    call::Timestamp,
    envelope::{
        Mac,
        mac::{MacMessage, PlaceFields},
    },
    key::{ObjectId, ObjectIds, WrappingKeyId},
};

/// States that a token holds a wrapping key, in addition to the token in the registry row of the key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlaceRow {
    /// The wrapping key.
    pub key: WrappingKeyId,
    /// The configured name of the token.
    pub token: String,
    /// Serial number of the token.
    pub token_serial: String,
    /// Where the objects of the wrapping key are on this token.
    pub objects: ObjectIds,
    /// When the key was registered for this token.
    pub registered: Timestamp,
    /// When a backup of this token was confirmed.
    pub backup_confirmed: Option<Timestamp>,
    /// A MAC over all fields above by the integrity key of the wrapping key. Each token that truly holds the wrapping key
    /// verifies it.
    pub mac: Mac,
}

impl PlaceRow {
    /// `CKA_ID` of the RSA private key on this token.
    pub fn private_object(&self) -> ObjectId {
        self.objects.private_object(self.key)
    }

    /// The message that the row's MAC must cover.
    pub fn mac_message(&self) -> MacMessage {
        MacMessage::place(&PlaceFields {
            key: self.key,
            token: &self.token,
            token_serial: &self.token_serial,
            objects: &self.objects,
            registered_us: self.registered.micros(),
            backup_confirmed_us: self.backup_confirmed.map(Timestamp::micros),
        })
    }
}
