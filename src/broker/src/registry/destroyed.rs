//! The row of a key that was marked as destroyed while this broker ran.

use keybroker_core::{call::Deadline, error::Error, key::WrappingKeyId};
use keybroker_store::RegistryRow;

use crate::Broker;

use super::{Entry, RefusedChange, Registry, Standing, altered, check_successor};

impl Broker {
    /// Examines the row of a destroyed key that replaces another row. Another key authenticates the row, even while the objects of the
    /// destroyed key are still on the token. Returns the reason why the row before it stays in use, if the new row does not verify.
    pub(super) async fn destroyed_row(
        &self,
        before: &Entry,
        row: RegistryRow,
        known: &Registry,
        deadline: Deadline,
    ) -> Result<Result<Entry, RefusedChange>, Error> {
        let was_verified = before.standing == Standing::Verified;
        if was_verified && let Err(why) = check_successor(&before.row, &row) {
            return Ok(Err(why));
        }
        let signers = known.entries.iter().rev().filter(|entry| {
            entry.standing == Standing::Verified && !entry.is_tombstone() && entry.row.id != row.id
        });
        let signers: Vec<WrappingKeyId> = signers.map(|entry| entry.row.id).collect();
        if self.is_authentic(&row, &signers, deadline).await? {
            let standing = Standing::Verified;
            return Ok(Ok(Entry { row, standing }));
        }
        let what = "the key is marked as destroyed, but no key authenticates that";
        let standing = altered(&row, what);
        match standing {
            Standing::Altered(why) if was_verified => Ok(Err(RefusedChange::Standing(why))),
            standing => Ok(Ok(Entry { row, standing })),
        }
    }
}
