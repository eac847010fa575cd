//! How many requests may be approved without a person within an hour. Each permitted approval has a *slot*: a row in the table of the
//! pins, under the same MAC, with the time of its last use. Several services share the slots, and a restart does not reset them.
//!
//! Not protected: slots that were removed from the database.

use keybroker_core::{call::Timestamp, organization::Guid};
use keybroker_store as store;
use keybroker_store::MemberKeyRow;

use crate::cli::exit::Failure;

use super::{key::sha256, pending::NO_MEMBER, pins::Pins};

const HOUR_US: i64 = 3_600 * 1_000_000;
/// Highest number of attempts to take a slot while other services take slots at the same moment.
const ATTEMPTS_MAX: usize = 20;

impl Pins<'_> {
    /// Takes the slot after the one that was used last, if its own last use is more than an hour ago. Returns whether a slot was taken. A
    /// row that cannot be read or verified permits no approval.
    pub(super) async fn take_slot(&self, slots: u32) -> Result<bool, Failure> {
        for _ in 0..ATTEMPTS_MAX {
            match self.try_slot(slots).await {
                Err(store::Error::Exists | store::Error::Conflict) => {}
                Err(store::Error::Corrupt(_)) => return Ok(false),
                taken => return taken?,
            }
        }
        Ok(false)
    }

    /// The outer error is one of the database, which another service may have caused.
    async fn try_slot(&self, slots: u32) -> Result<Result<bool, Failure>, store::Error> {
        let used = self.store.member_keys(self.organization, NO_MEMBER).await?;
        let last = used.first().map(|row| row.digest);
        let last = (0..slots).find(|slot| last == Some(digest_of(*slot)));
        let slot = last.map_or(0, |last| (last + 1) % slots);
        let row = match self.signed(slot_row(self.organization, slot)) {
            Ok(row) => row,
            Err(failure) => return Ok(Err(failure)),
        };
        let before = self.store.member_key(self.organization, &row.digest);
        let Some(before) = before.await? else {
            self.store.add_member_key(&row).await?;
            return Ok(Ok(true));
        };
        let is_free = row.pinned.micros().saturating_sub(before.pinned.micros()) > HOUR_US;
        match self.verifies(&before) {
            Ok(true) if is_free => self.store.update_member_key(&row, &before.mac).await?,
            Ok(_) => return Ok(Ok(false)),
            Err(failure) => return Ok(Err(failure)),
        }
        Ok(Ok(true))
    }
}

/// What a slot has in place of the digest of a wrapped key.
fn digest_of(slot: u32) -> [u8; 32] {
    let text = [
        b"keybroker/automatic-approval/v1".as_slice(),
        &slot.to_be_bytes(),
    ];
    sha256(&text.concat())
}

fn slot_row(organization: Guid, slot: u32) -> MemberKeyRow {
    MemberKeyRow {
        organization,
        digest: digest_of(slot),
        member: NO_MEMBER,
        email: [0; 32],
        pinned: Timestamp::now(),
        mac: [0; 32],
    }
}
