//! API clients, for any engine.

use std::collections::BTreeMap;

use crate::{
    ClientRow, DamagedClient, Error, Position,
    mutations::{expect_one, insert_unless_taken},
    rows,
    session::{Session as _, Value},
    statements::CLIENT_USES_AT_ONCE,
};
use keybroker_core::{
    call::{CallId, Timestamp},
    key::ClientId,
};

use super::{End, Engine, EngineStore, calls::check_skipped, uses::filled};

/// What is done to a client.
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
        check_skipped(from.skip)?;
        // No id is empty, so the empty one comes before all.
        let after = from.after.map_or(Value::Bytes(Vec::new()), Value::from);
        let values = vec![after, limit.into(), from.skip.into()];
        let found = self.query(E::TABLES.clients.page, values).await?;
        Ok(found.iter().map(rows::listed_client).collect())
    }

    /// The mark of the call and the change, or nothing.
    pub(super) async fn change_client(
        &self,
        change: ClientChange,
        row: &ClientRow,
        call: Option<CallId>,
    ) -> Result<(), Error> {
        let row = row.clone();
        let end = call.map_or(End::Commit, End::CommitMarked);
        self.transaction(end, move |session, sql| {
            let row = row.clone();
            Box::pin(async move {
                if let Some(call) = call {
                    let mark = vec![call.into(), row.id.into(), row.updated.into()];
                    expect_one(session.execute(sql.insert_change, mark).await?)?;
                }
                match change {
                    ClientChange::Insert => {
                        let insert = E::TABLES.clients.insert;
                        if insert_unless_taken(session, insert, all_columns(&row)).await? {
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
        // The latest of each secret, and all in one order, so that two brokers that write at once do not wait for each other.
        let mut latest = BTreeMap::new();
        for (client, secret, at) in uses {
            let known = latest.entry((*client.as_bytes(), *secret)).or_insert(*at);
            *known = (*known).max(*at);
        }
        let latest: Vec<_> = latest.into_iter().collect();
        let portions: Vec<Vec<Value>> = latest
            .chunks(CLIENT_USES_AT_ONCE)
            .map(|portion| {
                filled(portion, CLIENT_USES_AT_ONCE)
                    .flat_map(|((client, secret), at)| {
                        [client.as_slice().into(), (*secret).into(), (*at).into()]
                    })
                    .collect()
            })
            .collect();
        self.transaction(End::Commit, move |session, _| {
            let portions = portions.clone();
            Box::pin(async move {
                for values in portions {
                    session.execute(E::TABLES.note_client_uses, values).await?;
                }
                Ok(())
            })
        })
        .await
    }
}

/// In the order of the table.
fn all_columns(row: &ClientRow) -> Vec<Value> {
    vec![
        row.id.into(),
        row.revision.into(),
        row.document.as_slice().into(),
        (&row.mac).into(),
        row.key.into(),
        row.created.into(),
        row.updated.into(),
    ]
}
