//! Permanent removal of superseded revisions, deleted records and marks of mutations that are older than the retention time.
//!
//! A purge reads the database once, in batches of short transactions. A purge can be stopped at any time and run again, and
//! brokers may run at the same time.

use std::{collections::HashSet, sync::Arc};

use keybroker_core::{
    call::{CallId, Timestamp},
    key::{RecordId, Revision},
};

use super::{
    Error, rows,
    scan::{Scan, Superseded},
    tables::{Cursor, Head, PAGE_ROWS, Table, Tables},
};

/// Approximate number of rows that are purged in one transaction.
const PURGED_AT_ONCE: usize = 100;

/// A purge in progress.
#[derive(Debug)]
pub struct Purge {
    store: Arc<dyn Tables>,
    scan: Scan,
    before: Timestamp,
}

/// One batch of a purge. The records of a batch are purged in one transaction, and the revisions of
/// the batch in another transaction.
#[derive(Clone, Debug, Default)]
pub struct Portion {
    /// Deleted records.
    pub records: Vec<Head>,
    /// Superseded revisions of records that are not in this batch.
    pub revisions: Vec<Superseded>,
    /// The number of rows that were examined for this batch.
    pub seen: u64,
}

impl Purge {
    /// Begins a purge of all records that were deleted, and all revisions that were superseded,
    /// before the time `before`.
    pub fn new(store: Arc<dyn Tables>, before: Timestamp) -> Self {
        Self {
            scan: Scan::new(Arc::clone(&store)),
            store,
            before,
        }
    }

    /// Returns the next batch, or `None` at the end. If a batch has no rows to purge, it contains
    /// only the number of examined rows. Rows that cannot be decoded are not changed.
    pub async fn next(&mut self) -> Result<Option<Portion>, Error> {
        let mut portion = Portion::default();
        let (mut seen, mut chosen) = (0, 0);
        while seen < PAGE_ROWS && chosen < PURGED_AT_ONCE {
            let Some(found) = self.scan.next().await? else {
                break;
            };
            seen += 1;
            match found.good_head() {
                Some(head) if head.is_deleted_since(self.before) => {
                    if found.is_first {
                        portion.records.push(head.clone());
                    }
                    chosen += 1;
                }
                _ => {
                    let superseded = found.superseded_before(self.before);
                    chosen += usize::from(superseded.is_some());
                    portion.revisions.extend(superseded);
                }
            }
        }
        portion.seen = u64::try_from(seen).unwrap_or(u64::MAX);
        Ok((seen > 0).then_some(portion))
    }

    /// Purges the revisions of a batch, and returns the removed revisions.
    pub async fn revisions(
        &self,
        portion: &Portion,
    ) -> Result<HashSet<(RecordId, Revision)>, Error> {
        if portion.revisions.is_empty() {
            return Ok(HashSet::new());
        }
        let chosen = portion.revisions.iter();
        let chosen: Vec<_> = chosen.map(|old| (old.record, old.revision)).collect();
        Ok(self
            .store
            .purge_revisions(&chosen)
            .await?
            .into_iter()
            .collect())
    }

    /// Purges the records of a batch, and returns the removed records. A record that was undeleted after the batch was read is
    /// not removed.
    pub async fn records(&self, portion: &Portion) -> Result<HashSet<RecordId>, Error> {
        if portion.records.is_empty() {
            return Ok(HashSet::new());
        }
        let ids: Vec<RecordId> = portion.records.iter().map(|head| head.id).collect();
        let gone = self.store.purge_records(&ids, self.before).await?;
        Ok(gone.into_iter().collect())
    }
}

/// Removes the marks of mutations that were committed before the time `before`. If `dry_run` is
/// true, the function only counts the marks. Marks are stored in chronological order, so the
/// function ends at the first page without an old mark. A mark that cannot be decoded is not
/// changed and raises an alert.
pub async fn forget_changes(
    store: &dyn Tables,
    before: Timestamp,
    dry_run: bool,
) -> Result<u64, Error> {
    let mut cursor = Cursor::new(Table::Changes);
    let mut forgotten = 0;
    loop {
        let mut old: Vec<CallId> = Vec::new();
        let mut has_damaged = false;
        for _ in 0..PAGE_ROWS {
            let Some(row) = cursor.take(store).await? else {
                break;
            };
            match &rows::readable(Table::Changes, &[row], rows::change)[..] {
                [(call, at)] if *at < before => old.push(*call),
                [_, ..] => {}
                [] => has_damaged = true,
            }
        }
        if old.is_empty() && has_damaged {
            // Even if all marks of a page are damaged, the next page may contain old marks.
            continue;
        }
        if old.is_empty() {
            return Ok(forgotten);
        }
        forgotten += if dry_run {
            u64::try_from(old.len()).unwrap_or(u64::MAX)
        } else {
            store.forget_changes(&old).await?
        };
    }
}
