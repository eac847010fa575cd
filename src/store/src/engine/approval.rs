//! The calls of [`Approvals`], for any engine.

use async_trait::async_trait;

use crate::{
    ApprovalChange, ApprovalCounts, ApprovalFilter, ApprovalRow, Approvals, ApprovedClient,
    ClientRow, DamagedApproval, Error, RemovedApproval,
    approval::APPROVALS_LISTED_MAX,
    mutations::{expect_one, insert_unless_taken},
    rows,
    session::{Columns as _, Session},
    statements::Statements,
    tables::Table,
};
use keybroker_core::{
    call::{CallId, Timestamp},
    envelope::Mac,
    key::{ApprovalId, ID_BYTES, RecordId},
};

use super::{End, Engine, EngineStore, approval_use, clients::ClientChange};

/// Highest number of requests that one statement removes, so that no call waits long for the locks of the statement.
const FORGOTTEN_AT_ONCE: u64 = 100;

/// Inserts the mark of a call that changes no record.
async fn mark(
    session: &mut impl Session,
    sql: &'static Statements,
    call: CallId,
    at: Timestamp,
) -> Result<(), Error> {
    let none = RecordId::from_bytes([0; ID_BYTES]);
    let mark = rows::new_change(call, none, at);
    expect_one(session.execute(sql.insert_change, mark).await?)
}

#[async_trait]
impl<E: Engine> Approvals for EngineStore<E> {
    async fn approvals(
        &self,
        wanted: ApprovalFilter,
    ) -> Result<Vec<Result<ApprovalRow, DamagedApproval>>, Error> {
        let sql = E::sql();
        let (sql, values) = match wanted {
            ApprovalFilter::OpenAt(now) => (
                sql.open_approvals,
                vec![now.into(), APPROVALS_LISTED_MAX.into()],
            ),
            ApprovalFilter::All => (sql.approvals, vec![APPROVALS_LISTED_MAX.into()]),
            ApprovalFilter::One(id) => (sql.approval, vec![id.into()]),
        };
        let found = self.query(sql, values).await?;
        Ok(found.iter().map(rows::listed_approval).collect())
    }

    async fn approval(&self, id: ApprovalId) -> Result<Option<ApprovalRow>, Error> {
        let found = self.query(E::sql().approval, vec![id.into()]).await?;
        found.first().map(rows::approval).transpose()
    }

    async fn approval_of(&self, digest: &[u8; 32]) -> Result<Option<ApprovalRow>, Error> {
        let values = vec![digest.as_slice().into()];
        let found = self.query(E::sql().approval_of, values).await?;
        found.first().map(rows::approval).transpose()
    }

    async fn count_approvals(&self, person: &str, now: Timestamp) -> Result<ApprovalCounts, Error> {
        let values = vec![person.into(), now.into()];
        let found = self.query(E::sql().count_approvals, values).await?;
        let counts = found.first().ok_or(Error::NotFound)?;
        let count = |name| Ok::<_, Error>(u64::try_from(counts.integer(name)?).unwrap_or(0));
        Ok(ApprovalCounts {
            open: count("open_total")?,
            unexpired: count("total")?,
        })
    }

    async fn request_approval(
        &self,
        row: &ApprovalRow,
        replaces: Option<&Mac>,
        call: CallId,
    ) -> Result<(), Error> {
        let (row, replaces) = (row.clone(), replaces.copied());
        self.transaction(End::CommitMarked(call), move |session, sql| {
            let row = row.clone();
            Box::pin(async move {
                mark(session, sql, call, row.requested).await?;
                if let Some(mac) = replaces {
                    let values = vec![row.digest.as_slice().into(), (&mac).into()];
                    match session.execute(sql.replace_approval, values).await? {
                        1 => {}
                        _ => return Err(Error::Conflict),
                    }
                }
                let insert = sql.of(Table::Approvals).insert;
                if insert_unless_taken(session, insert, rows::new_approval(&row)).await? {
                    Ok(())
                } else {
                    Err(Error::Exists)
                }
            })
        })
        .await
    }

    async fn decide_approval(
        &self,
        decided: &ApprovalChange,
        call: CallId,
        at: Timestamp,
    ) -> Result<(), Error> {
        let decided = decided.clone();
        self.transaction(End::CommitMarked(call), move |session, sql| {
            let decided = decided.clone();
            Box::pin(async move {
                mark(session, sql, call, at).await?;
                approval_use::change(session, sql, &decided).await
            })
        })
        .await
    }

    async fn remove_approval(
        &self,
        removed: &RemovedApproval,
        call: CallId,
        at: Timestamp,
    ) -> Result<(), Error> {
        let removed = removed.clone();
        self.transaction(End::CommitMarked(call), move |session, sql| {
            let (statement, values, not_there) = match &removed {
                RemovedApproval::AsRead(row) => (
                    sql.remove_approval,
                    vec![row.id.into(), row.state.as_str().into(), (&row.mac).into()],
                    Error::Conflict,
                ),
                RemovedApproval::Unreadable(id) => (
                    sql.remove_unreadable_approval,
                    vec![(*id).into()],
                    Error::NotFound,
                ),
            };
            Box::pin(async move {
                mark(session, sql, call, at).await?;
                match session.execute(statement, values).await? {
                    1 => Ok(()),
                    _ => Err(not_there),
                }
            })
        })
        .await
    }

    async fn change_approved_client(
        &self,
        kind: ApprovedClient,
        row: &ClientRow,
        approval: &ApprovalChange,
        call: CallId,
    ) -> Result<(), Error> {
        let kind = match kind {
            ApprovedClient::New => ClientChange::Insert,
            ApprovedClient::Changed => ClientChange::Update,
        };
        self.change_client(kind, row, Some(call), Some(approval))
            .await
    }

    async fn forget_approvals(&self, before: Timestamp) -> Result<u64, Error> {
        let mut forgotten = 0;
        loop {
            let values = vec![before.into(), FORGOTTEN_AT_ONCE.into()];
            let portion = self.execute(E::sql().forget_approvals, values).await?;
            forgotten += portion;
            if portion < FORGOTTEN_AT_ONCE {
                return Ok(forgotten);
            }
        }
    }

    async fn old_approvals(&self, before: Timestamp) -> Result<u64, Error> {
        let found = self
            .query(E::sql().old_approvals, vec![before.into()])
            .await?;
        let total = found.first().ok_or(Error::NotFound)?.integer("total")?;
        Ok(u64::try_from(total).unwrap_or(0))
    }
}
