//! The pins of the wrapped keys of a Bitwarden organisation's members. The store does not interpret the digests.

use async_trait::async_trait;

use keybroker_core::{
    call::Timestamp,
    envelope::{
        Mac,
        mac::{MacMessage, MemberKeyFields},
    },
    organization::Guid,
};

use super::error::Error;

/// Highest number of pins of one member that a query returns, newest first.
pub const MEMBER_KEYS_LISTED_MAX: u32 = 100;

/// A wrapped key that belongs to a member. A member has several rows if the user key of the account was rotated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemberKeyRow {
    /// The organisation.
    pub organization: Guid,
    /// SHA-256 of the wrapped key. An organisation has only one row with this digest.
    pub digest: [u8; 32],
    /// The member.
    pub member: Guid,
    /// SHA-256 of the member's e-mail address in lower case.
    pub email: [u8; 32],
    /// When the wrapped key was first seen, or last accepted by a person.
    pub pinned: Timestamp,
    /// A MAC over all fields above by the integrity key of the organisation's key.
    pub mac: Mac,
}

impl MemberKeyRow {
    /// The message that the row's MAC must cover.
    pub fn mac_message(&self) -> MacMessage {
        MacMessage::member_key(&MemberKeyFields {
            organization: self.organization,
            member: self.member,
            digest: &self.digest,
            email: &self.email,
            pinned_us: self.pinned.micros(),
        })
    }
}

/// The operations of a store for the wrapped keys of members.
#[async_trait]
pub trait MemberKeys: Send + Sync {
    /// Returns the newest pins of a member, at most [`MEMBER_KEYS_LISTED_MAX`], newest first.
    async fn member_keys(
        &self,
        organization: Guid,
        member: Guid,
    ) -> Result<Vec<MemberKeyRow>, Error>;

    /// Returns the pin of a wrapped key, for any member.
    async fn member_key(
        &self,
        organization: Guid,
        digest: &[u8; 32],
    ) -> Result<Option<MemberKeyRow>, Error>;

    /// Adds a pin. Returns [`Error::Exists`] if the organisation has a pin with this digest.
    async fn add_member_key(&self, row: &MemberKeyRow) -> Result<(), Error>;

    /// Replaces a pin if its MAC is still `expected`. Returns [`Error::Conflict`] if the MAC is different.
    async fn update_member_key(&self, row: &MemberKeyRow, expected: &Mac) -> Result<(), Error>;
}
