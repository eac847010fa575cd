//! Replaces a batch of rows with their re-wrapped form, between a durable intent and a durable
//! outcome.

use std::{collections::BTreeSet, time::Duration};

use aws_lc_rs::digest;

use keybroker_core::{
    call::{CallId, Deadline, Timestamp},
    envelope::{Mac, mac::MacMessage},
    error::Error,
    key::{KeyUse, WrappingKeyId},
    metrics,
};
use keybroker_hsm as hsm;
use keybroker_store as store;

use crate::{Broker, commit::Settled, digests::hex_of, journal::Draft};

use super::{progress::FailedRow, run::Stop};

/// Time limit for one job of a run. The queue reserves a share of the token's time for background work, even if many
/// calls wait.
const JOB_TIMEOUT: Duration = Duration::from_secs(30);

/// Returns the caller for the jobs of a run.
pub(crate) fn background() -> hsm::Caller {
    hsm::Caller::background(Deadline::after(JOB_TIMEOUT))
}

/// The id of a row in a batch: the id of the record or API client, and its revision.
pub(super) type RowId = ([u8; 16], u64);

/// The numbers of moved, changed and failed rows of a page.
#[derive(Default)]
pub(super) struct Swapped {
    pub(super) moved: u64,
    pub(super) changed_meanwhile: u64,
    pub(super) failed: Vec<FailedRow>,
}

impl Swapped {
    pub(super) fn of(swapped: &[bool]) -> Self {
        let number = |wanted: bool| {
            let count = swapped.iter().filter(|moved| **moved == wanted).count();
            u64::try_from(count).unwrap_or(u64::MAX)
        };
        Self {
            moved: number(true),
            changed_meanwhile: number(false),
            failed: Vec::new(),
        }
    }
}

impl Broker {
    /// Runs `swap` for rows under the wrapping keys `from`, if these rows may still be moved to the wrapping key `to`. `source` is
    /// the use of the keys `from`.
    pub(super) async fn swap_rows(
        &self,
        (from, to): (BTreeSet<WrappingKeyId>, WrappingKeyId),
        source: KeyUse,
        rows: &[RowId],
        call: CallId,
        swap: impl Future<Output = Result<Vec<bool>, store::Error>> + Send,
    ) -> Result<Swapped, Stop> {
        self.check_move(from.iter().copied(), to, source)?;
        match self.swap_batch(to, rows, call, swap).await {
            Ok(swapped) => Ok(Swapped::of(&swapped)),
            Err(error) => Err(self.why_not_swapped(error, from, to, source).await),
        }
    }

    /// Verifies a MAC with the integrity key of one wrapping key. Then computes the MAC of the same message with the integrity key of
    /// another wrapping key.
    pub(super) async fn new_mac(
        &self,
        message: &MacMessage,
        (signer, mac): (WrappingKeyId, &Mac),
        to: WrappingKeyId,
    ) -> Result<Mac, hsm::Error> {
        self.token
            .verify_mac(signer, message, mac, &background())
            .await?;
        self.token.mac(to, message, &background()).await
    }

    /// Runs `swap`, which replaces a batch of rows in the database. The intent contains the digest
    /// of the rows in the batch. The outcome contains the digest of the rows that were moved.
    /// `swap` must store the mark of the call. Returns whether each row was moved.
    async fn swap_batch(
        &self,
        to: WrappingKeyId,
        rows: &[RowId],
        call: CallId,
        swap: impl Future<Output = Result<Vec<bool>, store::Error>> + Send,
    ) -> Result<Vec<bool>, Error> {
        if rows.is_empty() {
            return Ok(Vec::new());
        }
        let mut draft = Draft::rewrapped(call, to, rows.len(), digest_of(rows));
        let Settled { intent, result } = self
            .commit_with_intent(&draft, Timestamp::now(), swap)
            .await?;
        if let Ok(moved) = &result {
            let moved = rows.iter().zip(moved).filter(|(_, moved)| **moved);
            let moved: Vec<RowId> = moved.map(|(row, _)| *row).collect();
            let count = u64::try_from(moved.len()).unwrap_or(u64::MAX);
            metrics::REWRAP_ROWS.with(["moved"]).increment(count);
            draft.rows(moved.len(), digest_of(&moved));
        }
        self.close_intent(intent, &draft, result.map_err(Error::from))
            .await
    }
}

/// Returns the hexadecimal SHA-256 of the ids and revisions of the rows, in the order of the rows. An id has 16 bytes,
/// and a revision is a big-endian integer of 8 bytes.
fn digest_of(rows: &[RowId]) -> String {
    let mut context = digest::Context::new(&digest::SHA256);
    for (id, revision) in rows {
        context.update(id);
        context.update(&revision.to_be_bytes());
    }
    hex_of(context.finish())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The expected values come from another implementation: `printf '…' | xxd -r -p | sha256sum`.
    #[test]
    fn the_digest_covers_ids_and_revisions_in_order() {
        assert_eq!(
            digest_of(&[]),
            "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
        );
        let rows = [([1; 16], 1), ([2; 16], 258)];
        let digest = digest_of(&rows);
        assert_eq!(
            digest,
            "82a5b63fceeda1006d3feb4d7b8f784cf0ba8df59ecd58cca4c7513e4bd0d640"
        );
        assert_ne!(digest, digest_of(&[rows[1], rows[0]]));
    }
}
