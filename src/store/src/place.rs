//! The database row for a wrapping key on a further token.

use keybroker_core::{
    call::Timestamp,
    envelope::{
        Mac,
        mac::{MacMessage, PlaceFields},
    },
    key::{ObjectId, ObjectIds, WrappingKeyId},
};

/// States that a further token contains a wrapping key: a row of the table `wrapping_key_places`.
/// The registry row of the key names the first token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlaceRow {
    /// The wrapping key.
    pub key: WrappingKeyId,
    /// The configured name of the token.
    pub token: String,
    /// Serial number of the token.
    pub token_serial: String,
    /// The location of the objects of the wrapping key on this token.
    pub objects: ObjectIds,
    /// The time at which the key was registered for this token.
    pub registered: Timestamp,
    /// The time at which an administrator confirmed a backup of this token.
    pub backup_confirmed: Option<Timestamp>,
    /// A MAC over all preceding fields, made with the integrity key of the wrapping key. A token
    /// can verify this MAC only if the token really contains the wrapping key.
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
