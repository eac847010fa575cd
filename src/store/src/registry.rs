//! A wrapping key as a row of the registry.

use keybroker_core::{
    call::Timestamp,
    envelope::{
        Mac,
        mac::{MacMessage, RegistryFields},
    },
    key::{
        Fingerprint, IntegrityPlace, ObjectId, ObjectIds, Purpose, WrappingKeyId, WrappingKeyState,
    },
};

/// One wrapping key as SQL knows it. The public key is not here: it always comes from the token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegistryRow {
    /// Its id.
    pub id: WrappingKeyId,
    /// Where its objects are.
    pub objects: ObjectIds,
    /// Of the public key.
    pub fingerprint: Fingerprint,
    /// What the key is for.
    pub purpose: Purpose,
    /// SP 800-57 state.
    pub state: WrappingKeyState,
    /// Serial number of the token that holds it.
    pub token_serial: String,
    /// Grows with each change of a state in the registry; the active key with the highest wraps.
    pub sequence: u64,
    /// When it was registered.
    pub registered: Timestamp,
    /// When a backup of its token was confirmed.
    pub backup_confirmed: Option<Timestamp>,
    /// By the key's own integrity key over all of the above, so that a writer of the database cannot turn
    /// `compromised` back into `active`.
    pub mac: Mac,
}

impl RegistryRow {
    /// `CKA_ID` of the RSA private key.
    pub fn private_object(&self) -> ObjectId {
        let own = &self.objects.private;
        own.clone().unwrap_or_else(|| self.id.into())
    }

    /// `CKA_ID` of the integrity key; absent for one that is in the memory of the workers.
    pub fn integrity_object(&self) -> Option<ObjectId> {
        match &self.objects.integrity {
            IntegrityPlace::Token => Some(self.private_object()),
            IntegrityPlace::Object(id) => Some(id.clone()),
            IntegrityPlace::Worker => None,
        }
    }

    /// What the row's MAC must be over.
    pub fn mac_message(&self) -> MacMessage {
        MacMessage::registry(&RegistryFields {
            id: self.id,
            objects: &self.objects,
            fingerprint: self.fingerprint,
            purpose: self.purpose,
            state: self.state,
            token_serial: &self.token_serial,
            sequence: self.sequence,
            registered_us: self.registered.micros(),
            backup_confirmed_us: self.backup_confirmed.map(Timestamp::micros),
        })
    }
}
