//! Key pins: which wrapped key belongs to which member, as it was first seen, under a MAC by the organisation's integrity key. A
//! hostile server could answer a thief's request with the wrapped key of another member. Then the pins show that the key belongs
//! to the other member.
//!
//! Not protected: a wrapped key that is not pinned for its member yet, and a pin that was removed from the database.

use std::{
    cell::Cell,
    fmt,
    time::{Duration, Instant},
};

use crate::{cli::exit::Failure, config::bitwarden::Settings};
use keybroker_core::{call::Timestamp, organization::Guid};
use keybroker_hsm::admin::Admin;
use keybroker_store as store;
use keybroker_store::{MemberKeyRow, tables::Tables};

use super::{key::sha256, pending::Pending};

/// What the pins say about a member's wrapped key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum KeyState {
    /// Neither the member nor the key has a pin yet.
    FirstSeen,
    /// The key is the newest of this member.
    Known {
        /// When the key was pinned.
        since: Timestamp,
    },
    /// The member has another key, or had a newer one. A rotation of the user key changes the wrapped key.
    Changed,
    /// The key belongs to this other member.
    OfAnotherMember(Guid),
    /// The key was pinned with another e-mail address of the member.
    OtherAddress,
    /// A pin was altered, or was made with an earlier key of the organisation.
    Unverified,
}

impl KeyState {
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::FirstSeen => "first-seen",
            Self::Known { .. } => "known",
            Self::Changed => "changed",
            Self::OfAnotherMember(_) => "of-another-member",
            Self::OtherAddress => "other-address",
            Self::Unverified => "unverified",
        }
    }

    /// Whether a policy may decide. In the other cases, only a person may, who names the digest of the key.
    pub(super) const fn is_for_policy(self) -> bool {
        matches!(self, Self::FirstSeen | Self::Known { .. })
    }
}

impl fmt::Display for KeyState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::FirstSeen => f.write_str("the member's key is seen for the first time"),
            Self::Known { .. } => f.write_str("the member's key is known"),
            Self::Changed => f.write_str(
                "the member's key has changed: this is expected only if the member rotated the key of the account",
            ),
            Self::OfAnotherMember(member) => write!(
                f,
                "the key belongs to another member ({member}): the server may try to give that member's key to this device"
            ),
            Self::OtherAddress => f.write_str(
                "the key was pinned with another e-mail address: the server may show another member's address for this member, unless \
                 the address has changed",
            ),
            Self::Unverified => f.write_str(
                "the key pin of the member does not verify: it was altered, or was made with an earlier key of the organisation",
            ),
        }
    }
}

/// What a request says about a member, and what a pin binds together.
#[derive(Clone, Copy, Debug)]
pub(super) struct MemberKey {
    member: Guid,
    /// SHA-256 of the wrapped key.
    digest: [u8; 32],
    /// SHA-256 of the e-mail address in lower case.
    email: [u8; 32],
}

impl MemberKey {
    /// The e-mail address is part of the pin, because a person and a policy recognise the member by it: a hostile server could
    /// otherwise show the thief's address with the victim's key.
    pub(super) fn new(pending: &Pending, digest: [u8; 32]) -> Self {
        Self {
            member: pending.member,
            digest,
            email: sha256(pending.email.to_lowercase().as_bytes()),
        }
    }
}

const HOUR: Duration = Duration::from_hours(1);
/// Lowest limit of new pins within an hour.
const NEW_PINS_MIN: u32 = 100;
/// New pins within an hour for each request that may be approved without a person in this time.
const NEW_PINS_FACTOR: u32 = 10;

/// The number of keys that this process pins within an hour. Without a limit, a server that invents members could fill the database.
#[derive(Debug)]
pub(super) struct NewPins {
    per_hour: u32,
    /// The beginning of the hour, and the number of pins since then.
    made: Cell<(Instant, u32)>,
}

impl NewPins {
    pub(super) fn of(settings: &Settings) -> Self {
        let per_hour = settings.automatic_per_hour.saturating_mul(NEW_PINS_FACTOR);
        Self {
            per_hour: per_hour.max(NEW_PINS_MIN),
            made: Cell::new((Instant::now(), 0)),
        }
    }

    /// Counts a pin. Returns whether the limit permits it.
    fn take(&self, now: Instant) -> bool {
        let (begun, made) = match self.made.get() {
            (begun, _) if now.saturating_duration_since(begun) >= HOUR => (now, 0),
            hour => hour,
        };
        let is_permitted = made < self.per_hour;
        self.made.set((begun, made + u32::from(is_permitted)));
        is_permitted
    }
}

/// The pins of one organisation.
#[derive(Clone, Copy)]
pub(super) struct Pins<'a> {
    pub(super) store: &'a dyn Tables,
    pub(super) admin: &'a Admin,
    pub(super) organization: Guid,
    pub(super) new: &'a NewPins,
}

impl Pins<'_> {
    /// Compares a member's wrapped key with the pins.
    pub(super) async fn state(&self, key: &MemberKey) -> Result<KeyState, Failure> {
        let (of_key, of_member) = match self.read(key.member, &key.digest).await {
            Err(store::Error::Corrupt(_)) => return Ok(KeyState::Unverified),
            read => read?,
        };
        for row in of_key.iter().chain(of_member.first()) {
            if !self.verifies(row)? {
                return Ok(KeyState::Unverified);
            }
        }
        Ok(match (of_key, of_member.first()) {
            (Some(row), _) if row.member != key.member => KeyState::OfAnotherMember(row.member),
            (Some(row), _) if row.email != key.email => KeyState::OtherAddress,
            (_, Some(newest)) if newest.email != key.email => KeyState::OtherAddress,
            (Some(row), Some(newest)) if newest.digest == key.digest => {
                KeyState::Known { since: row.pinned }
            }
            (None, None) => KeyState::FirstSeen,
            _ => KeyState::Changed,
        })
    }

    async fn read(
        &self,
        member: Guid,
        digest: &[u8; 32],
    ) -> Result<(Option<MemberKeyRow>, Vec<MemberKeyRow>), store::Error> {
        let of_key = self.store.member_key(self.organization, digest).await?;
        let of_member = self.store.member_keys(self.organization, member).await?;
        Ok((of_key, of_member))
    }

    pub(super) fn verifies(&self, row: &MemberKeyRow) -> Result<bool, Failure> {
        let key = self.organization.key_id();
        Ok(self.admin.verify(key, &row.mac_message(), &row.mac)?)
    }

    /// Compares a wrapped key with the pins, and pins a key that is seen for the first time. Returns `None` if this process has pinned too
    /// many keys within an hour to pin this key.
    pub(super) async fn state_and_pin(&self, key: &MemberKey) -> Result<Option<KeyState>, Failure> {
        let state = self.state(key).await?;
        if state != KeyState::FirstSeen {
            return Ok(Some(state));
        }
        if !self.new.take(Instant::now()) {
            return Ok(None);
        }
        match self.store.add_member_key(&self.row(key)?).await {
            Ok(()) => Ok(Some(KeyState::FirstSeen)),
            // Another process pinned this key at the same moment, perhaps for another member.
            Err(store::Error::Exists) => self.state(key).await.map(Some),
            Err(error) => Err(error.into()),
        }
    }

    /// Pins a key that a person accepted. The key of another member is not pinned, so a person must accept it each time.
    pub(super) async fn accept(&self, key: &MemberKey) -> Result<(), Failure> {
        let row = self.row(key)?;
        match self
            .store
            .member_key(self.organization, &key.digest)
            .await?
        {
            None => self.store.add_member_key(&row).await?,
            Some(old) if old.member == key.member || !self.verifies(&old)? => {
                self.store.update_member_key(&row, &old.mac).await?;
            }
            Some(_) => {}
        }
        Ok(())
    }

    fn row(&self, key: &MemberKey) -> Result<MemberKeyRow, Failure> {
        self.signed(MemberKeyRow {
            organization: self.organization,
            digest: key.digest,
            member: key.member,
            email: key.email,
            pinned: Timestamp::now(),
            mac: [0; 32],
        })
    }

    /// The row with its MAC.
    pub(super) fn signed(&self, mut row: MemberKeyRow) -> Result<MemberKeyRow, Failure> {
        row.mac = self
            .admin
            .mac(self.organization.key_id(), &row.mac_message())?;
        Ok(row)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn new_pins_are_limited_until_the_hour_ends() {
        let begun = Instant::now();
        let new = NewPins {
            per_hour: 2,
            made: Cell::new((begun, 0)),
        };
        for (seconds, is_permitted) in [
            (0, true),
            (1, true),
            (2, false),
            (3_599, false),
            (3_600, true),
            (7_000, true),
            (7_199, false),
            (7_200, true),
        ] {
            let now = begun + Duration::from_secs(seconds);
            assert_eq!(new.take(now), is_permitted, "after {seconds} s");
        }
    }
}
