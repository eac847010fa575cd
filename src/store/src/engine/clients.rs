//! API clients, for any engine.

use std::collections::BTreeMap;

use crate::{
    ApprovalChange, ClientRow, DamagedClient, Error, Position,
    mutations::{expect_one, insert_unless_taken},
    rows,
    session::{Session as _, Value},
    statements::CLIENT_USES_AT_ONCE,
    tables::Table,
};
use keybroker_core::{
    call::{CallId, Timestamp},
    key::ClientId,
};

use super::{End, Engine, EngineStore, approval_use};

/// The kind of a change: a new or an existing API client.
#[derive(Clone, Copy, Debug)]
pub(super) enum ClientChange {
    Insert,
    Update,
}

impl<E: Engine> EngineStore<E> {
    pub(super) async fn page_of_clients(
        &self,
        from: &Position<ClientId>,
        limit: u32,
    ) -> Result<Vec<Result<ClientRow, DamagedClient>>, Error> {
        from.check_skipped()?;
        // An empty id comes before all rows, because the id of an API client is never empty.
        let after = from.after.map_or(Value::Bytes(Vec::new()), Value::from);
        let values = vec![after, limit.into(), from.skip.into()];
        let found = self.query(E::sql().of(Table::Clients).page, values).await?;
        Ok(found.iter().map(rows::listed_client).collect())
    }

    /// Writes the change, the use of its approval and, if `call` is present, a row with the id of the
    /// call in one transaction.
    pub(super) async fn change_client(
        &self,
        change: ClientChange,
        row: &ClientRow,
        call: Option<CallId>,
        approval: Option<&ApprovalChange>,
    ) -> Result<(), Error> {
        let (row, approval) = (row.clone(), approval.cloned());
        let end = call.map_or(End::Commit, End::CommitMarked);
        self.transaction(end, move |session, sql| {
            let (row, approval) = (row.clone(), approval.clone());
            Box::pin(async move {
                if let Some(call) = call {
                    let mark = rows::new_change(call, row.id, row.updated);
                    expect_one(session.execute(sql.insert_change, mark).await?)?;
                }
                if let Some(used) = &approval {
                    approval_use::change(session, sql, used).await?;
                }
                match change {
                    ClientChange::Insert => {
                        let insert = sql.of(Table::Clients).insert;
                        let values = rows::new_client(&row);
                        if insert_unless_taken(session, insert, values).await? {
                            return Ok(());
                        }
                        Err(Error::Exists)
                    }
                    ClientChange::Update => {
                        let before = row.revision.checked_sub(1).ok_or(Error::Conflict)?;
                        let values = vec![
                            row.revision.into(),
                            row.document.as_slice().into(),
                            (&row.mac).into(),
                            row.key.into(),
                            row.updated.into(),
                            row.id.into(),
                            before.into(),
                        ];
                        match session.execute(sql.update_client, values).await? {
                            1 => Ok(()),
                            _ => Err(Error::Conflict),
                        }
                    }
                }
            })
        })
        .await
    }

    pub(super) async fn write_client_uses(
        &self,
        uses: &[(ClientId, u32, Timestamp)],
    ) -> Result<(), Error> {
        // Keep only the latest use of each secret. Sort the rows, so that two brokers that write at
        // the same time cannot deadlock.
        let mut latest = BTreeMap::new();
        for (client, secret, at) in uses {
            let known = latest.entry((*client.as_bytes(), *secret)).or_insert(*at);
            *known = (*known).max(*at);
        }
        let rows: Vec<_> = latest
            .into_iter()
            .map(|((client, secret), at)| {
                rows::new_client_use(ClientId::from_bytes(client), secret, at)
            })
            .collect();
        self.note_latest(E::sql().note_client_uses, CLIENT_USES_AT_ONCE, &rows)
            .await
    }
}
