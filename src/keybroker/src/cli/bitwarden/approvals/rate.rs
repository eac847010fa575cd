//! How many requests may be approved without a person within an hour. Each permitted approval has a *slot*: a row in the table of the
//! pins, under the same MAC, with the time of its last use and its request. Several services share the slots, and a
//! restart does not reset them. A request takes only one slot within an hour, also if each process makes only one pass.
//!
//! Not protected: slots that were removed from the database, and more than one slot for a request if at least
//! [`MEMBER_KEYS_LISTED_MAX`](store::MEMBER_KEYS_LISTED_MAX) other slots were taken meanwhile.

use keybroker_core::{call::Timestamp, organization::Guid};
use keybroker_store as store;
use keybroker_store::MemberKeyRow;

use crate::cli::exit::Failure;

use super::{key::sha256, pending::NO_MEMBER, pins::Pins};

const HOUR_US: i64 = 3_600 * 1_000_000;
/// Highest number of attempts to take a slot while other services take slots at the same moment.
const ATTEMPTS_MAX: usize = 20;

/// The result of taking a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Slot {
    Taken,
    /// The same request took a slot within the last hour.
    TakenBefore,
    /// No slot is free, or a row cannot be read or verified.
    NotFree,
}

impl Pins<'_> {
    /// Takes the slot after the one that was used last, if its own last use is more than an hour ago. A row that cannot be read or verified
    /// permits no approval.
    pub(super) async fn take_slot(&self, slots: u32, request: Guid) -> Result<Slot, Failure> {
        for _ in 0..ATTEMPTS_MAX {
            match self.try_slot(slots, request).await {
                Err(store::Error::Exists | store::Error::Conflict) => {}
                Err(store::Error::Corrupt(_)) => return Ok(Slot::NotFree),
                taken => return taken?,
            }
        }
        Ok(Slot::NotFree)
    }

    /// The outer error is one of the database, which another service may have caused.
    async fn try_slot(
        &self,
        slots: u32,
        request: Guid,
    ) -> Result<Result<Slot, Failure>, store::Error> {
        let used = self.store.member_keys(self.organization, NO_MEMBER).await?;
        // If two services take a slot for one request at the same moment, both try the same slot. The second has a
        // conflict, and finds the request when it tries again.
        if is_used_for(&used, request, Timestamp::now()) {
            return Ok(Ok(Slot::TakenBefore));
        }
        let last = used.first().map(|row| row.digest);
        let last = (0..slots).find(|slot| last == Some(digest_of(*slot)));
        let slot = last.map_or(0, |last| (last + 1) % slots);
        let row = match self.signed(slot_row(self.organization, slot, request)) {
            Ok(row) => row,
            Err(failure) => return Ok(Err(failure)),
        };
        let before = self.store.member_key(self.organization, &row.digest);
        let Some(before) = before.await? else {
            self.store.add_member_key(&row).await?;
            return Ok(Ok(Slot::Taken));
        };
        let is_free = row.pinned.micros().saturating_sub(before.pinned.micros()) > HOUR_US;
        match self.verifies(&before) {
            Ok(true) if is_free => self.store.update_member_key(&row, &before.mac).await?,
            Ok(_) => return Ok(Ok(Slot::NotFree)),
            Err(failure) => return Ok(Err(failure)),
        }
        Ok(Ok(Slot::Taken))
    }
}

/// Whether a request took a slot within the hour before `now`. The MAC is not verified: a person who can write to the
/// database can prevent an approval in any case.
fn is_used_for(slots: &[MemberKeyRow], request: Guid, now: Timestamp) -> bool {
    let digest = digest_of_request(request);
    slots.iter().any(|slot| {
        let age_us = now.micros().saturating_sub(slot.pinned.micros());
        slot.email == digest && age_us <= HOUR_US
    })
}

/// What a slot has in place of the digest of a wrapped key.
fn digest_of(slot: u32) -> [u8; 32] {
    let text = [
        b"keybroker/automatic-approval/v1".as_slice(),
        &slot.to_be_bytes(),
    ];
    sha256(&text.concat())
}

/// What a slot has in place of the digest of an e-mail address. A slot that an earlier version took has zeros, and names
/// no request.
fn digest_of_request(request: Guid) -> [u8; 32] {
    let text = [
        b"keybroker/automatic-approval-request/v1".as_slice(),
        request.as_bytes(),
    ];
    sha256(&text.concat())
}

fn slot_row(organization: Guid, slot: u32, request: Guid) -> MemberKeyRow {
    MemberKeyRow {
        organization,
        digest: digest_of(slot),
        member: NO_MEMBER,
        email: digest_of_request(request),
        pinned: Timestamp::now(),
        mac: [0; 32],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn id(number: u8) -> Guid {
        Guid::from_bytes([number; 16])
    }

    #[test]
    fn a_request_takes_one_slot_within_an_hour() {
        let slot = slot_row(id(1), 0, id(2));
        let old = MemberKeyRow {
            email: [0; 32],
            ..slot.clone()
        };
        let begun = slot.pinned.micros();
        let slots = [old, slot];
        for (request, later_us, is_used) in [
            (2, 0, true),
            (2, HOUR_US, true),
            (2, HOUR_US + 1, false),
            (3, 0, false),
            (0, 0, false),
        ] {
            let now = Timestamp::from_micros(begun + later_us);
            assert_eq!(
                is_used_for(&slots, id(request), now),
                is_used,
                "request {request} after {later_us} us"
            );
        }
        assert!(!is_used_for(&[], id(2), Timestamp::from_micros(begun)));
    }
}
