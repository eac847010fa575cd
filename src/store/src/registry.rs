//! The registry row of a wrapping key.

use keybroker_core::{
    call::Timestamp,
    envelope::{
        Mac,
        mac::{MacMessage, RegistryFields},
    },
    key::{Fingerprint, ObjectId, ObjectIds, Purpose, WrappingKeyId, WrappingKeyState},
};

use super::{approval::ApprovalChange, destruction::DestructionChange, place::PlaceRow};

/// In a row whose MAC is not verified, a number that is not below this limit does not count, because only a forged row has such a
/// large number.
pub const SEQUENCE_LIMIT: u64 = 1 << 62;

/// The stored form of one wrapping key. The registry does not contain public keys, because the
/// broker always reads public keys from the token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegistryRow {
    /// The id of the wrapping key.
    pub id: WrappingKeyId,
    /// The location of the objects of the wrapping key.
    pub objects: ObjectIds,
    /// The fingerprint of the public key.
    pub fingerprint: Fingerprint,
    /// The purpose of the wrapping key.
    pub purpose: Purpose,
    /// SP 800-57 state.
    pub state: WrappingKeyState,
    /// Serial number of the token that contains the key.
    pub token_serial: String,
    /// A number that increases with each change of a state in the registry. The active wrapping key
    /// with the highest number wraps new user keys.
    pub sequence: u64,
    /// The time at which the wrapping key was registered.
    pub registered: Timestamp,
    /// The time at which an administrator confirmed a backup of the token.
    pub backup_confirmed: Option<Timestamp>,
    /// A MAC over all preceding fields, made with the integrity key of this wrapping key. Because
    /// of the MAC, a person who can write to the database cannot change `compromised` back to
    /// `active`.
    pub mac: Mac,
}

/// Rows of the registry that change together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RegistryChange {
    /// The row of a new key.
    pub insert: Option<RegistryRow>,
    /// The changed rows of registered keys.
    pub updates: Vec<RegistryUpdate>,
    /// The rows of further tokens that have a wrapping key.
    pub places: Vec<PlaceChange>,
    /// A change of a scheduled destruction.
    pub destruction: Option<DestructionChange>,
    /// The use of an approval that permits this change.
    pub approval: Option<ApprovalChange>,
    /// A wrapping key that no revision, API client or answer to a request id may need. The transaction checks it.
    pub unneeded: Option<WrappingKeyId>,
}

/// The new content of a registry row, and the MAC of the row that it replaces.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegistryUpdate {
    /// The new row.
    pub row: RegistryRow,
    /// The MAC of the stored row. A different MAC shows that the stored row was changed after it
    /// was read.
    pub expected: Mac,
}

/// A new or changed row for a wrapping key on a further token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlaceChange {
    /// The new row.
    pub row: PlaceRow,
    /// The MAC of the stored row that the new row replaces; `None` to add a row.
    pub expected: Option<Mac>,
}

impl RegistryRow {
    /// `CKA_ID` of the RSA private key.
    pub fn private_object(&self) -> ObjectId {
        self.objects.private_object(self.id)
    }

    /// `CKA_ID` of the integrity key; absent if the integrity key is in the memory of the workers.
    pub fn integrity_object(&self) -> Option<ObjectId> {
        self.objects.integrity_object(self.id)
    }

    /// The message that the row's MAC must cover.
    pub fn mac_message(&self) -> MacMessage {
        MacMessage::registry(&self.fields())
    }

    /// The message that the MAC of a destroyed key's row must cover. The integrity key of another wrapping key makes the MAC.
    pub fn tombstone_message(&self) -> MacMessage {
        MacMessage::tombstone(&self.fields())
    }

    /// The message that the MAC of a destroyed key's row must cover until the objects of the key are removed from the tokens.
    pub fn unremoved_message(&self) -> MacMessage {
        MacMessage::unremoved_tombstone(&self.fields())
    }

    fn fields(&self) -> RegistryFields<'_> {
        RegistryFields {
            id: self.id,
            objects: &self.objects,
            fingerprint: self.fingerprint,
            purpose: self.purpose,
            state: self.state,
            token_serial: &self.token_serial,
            sequence: self.sequence,
            registered_us: self.registered.micros(),
            backup_confirmed_us: self.backup_confirmed.map(Timestamp::micros),
        }
    }
}
