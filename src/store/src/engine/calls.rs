//! The calls of [`Store`], for any engine.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use async_trait::async_trait;

use crate::{
    CHANGES_MAX, ClientRow, DamagedClient, DamagedRecord, Error, Evidence, KnownLog, ListQuery,
    NewRevision, PlaceRow, Position, REQUEST_KEPT_US, Record, RecordInfo, RegistryChange,
    RegistryRow, RequestRecord, RequestScope, Stamp, Store, StoreId, StoredRevision,
    mutations::{self, Change},
    rows,
    session::{Columns as _, Session as _, Value},
    tables::Table,
};
use keybroker_core::{
    call::{CallId, Timestamp},
    envelope::Mac,
    key::{ClientId, KeyAddress, RecordId, Revision, Tenant, UserId},
};

use super::{End, Engine, EngineStore, Purpose, clients::ClientChange};

/// Time limit of a probe. If the database does not answer within this time, it counts as
/// unavailable. The limit is below one second, so that a caller that probes once a second receives
/// the result in time.
const PROBE_TIMEOUT: Duration = Duration::from_millis(900);

/// Highest number of request ids that one statement removes.
const FORGOTTEN_AT_ONCE: u64 = 500;

impl<E: Engine> EngineStore<E> {
    async fn mutate(&self, change: Change, stamp: Stamp) -> Result<RecordInfo, Error> {
        self.transaction(End::CommitMarked(stamp.call), move |session, sql| {
            let (change, stamp) = (change.clone(), stamp.clone());
            Box::pin(async move { mutations::apply(session, sql, &change, &stamp).await })
        })
        .await
    }
}

#[async_trait]
impl<E: Engine> Store for EngineStore<E> {
    async fn ping(&self) -> Result<(), Error> {
        let begun = Instant::now();
        let writing = self.transaction_unprobed(End::Rollback, |session, sql| {
            Box::pin(async move {
                // The statement changes no row, because the id of a call is never empty.
                let nothing = vec![Value::Bytes(Vec::new())];
                Ok(session.execute(sql.probe, nothing).await.map(drop)?)
            })
        });
        let reading = self.query_unprobed(E::sql().probe_read, Vec::new());
        let (written, read) = tokio::join!(in_time(writing), in_time(reading));
        let written = self.lender.probe.record(Purpose::Write, begun, written);
        let read = self.lender.probe.record(Purpose::Read, begun, read);
        // Reads are sufficient to release keys, but a store that accepts no writes is not healthy.
        written.and(read)
    }

    async fn record(&self, address: &KeyAddress) -> Result<Option<Record>, Error> {
        let values = vec![
            address.tenant.as_str().into(),
            address.user.as_str().into(),
            address.name.as_str().into(),
        ];
        let found = self.query(E::sql().record, values).await?;
        let decode = |row| rows::record(row, address.clone());
        found.first().map(decode).transpose()
    }

    async fn revision(
        &self,
        record: RecordId,
        revision: Revision,
    ) -> Result<Option<StoredRevision>, Error> {
        let values = vec![record.into(), revision.into()];
        let found = self.query(E::sql().revision, values).await?;
        let decode = |row| rows::stored_revision(row, revision);
        found.first().map(decode).transpose()
    }

    async fn create(&self, new: NewRevision, stamp: Stamp) -> Result<RecordInfo, Error> {
        self.mutate(Change::Create(new), stamp).await
    }

    async fn create_many(&self, new: Vec<NewRevision>, at: Timestamp) -> Result<(), Error> {
        let new: Arc<[NewRevision]> = new.into();
        self.transaction(End::Commit, move |session, sql| {
            let new = Arc::clone(&new);
            Box::pin(async move { mutations::create_many(session, sql, &new, at).await })
        })
        .await
    }

    async fn supersede(&self, new: NewRevision, stamp: Stamp) -> Result<RecordInfo, Error> {
        self.mutate(Change::Supersede(new), stamp).await
    }

    async fn delete(
        &self,
        record: RecordId,
        expected: Revision,
        stamp: Stamp,
    ) -> Result<RecordInfo, Error> {
        self.mutate(Change::Delete(record, expected), stamp).await
    }

    async fn undelete(&self, record: RecordId, stamp: Stamp) -> Result<RecordInfo, Error> {
        self.mutate(Change::Undelete(record), stamp).await
    }

    async fn list(
        &self,
        query: &ListQuery,
    ) -> Result<Vec<Result<RecordInfo, DamagedRecord>>, Error> {
        query.from.check_skipped()?;
        let skip: Value = query.from.skip.into();
        let deleted = i64::from(query.deleted);
        let limit = i64::from(query.limit);
        // Empty values come before all rows, because users and key names are never empty.
        let (user, name) = match &query.from.after {
            Some((user, name)) => (user.as_str(), name.as_str()),
            None => ("", ""),
        };
        let tenant: Value = query.tenant.as_str().into();
        let found = match &query.user {
            None => {
                let values = vec![
                    tenant,
                    user.into(),
                    user.into(),
                    name.into(),
                    deleted.into(),
                    limit.into(),
                    skip,
                ];
                self.query(E::sql().page, values).await?
            }
            Some(wanted) => {
                let (name, skip) = match user.cmp(wanted.as_str()) {
                    std::cmp::Ordering::Less if query.from.after.is_some() => ("", 0_u32.into()),
                    std::cmp::Ordering::Less => ("", skip),
                    std::cmp::Ordering::Equal => (name, skip),
                    std::cmp::Ordering::Greater => return Ok(Vec::new()),
                };
                let values = vec![
                    tenant,
                    wanted.as_str().into(),
                    name.into(),
                    deleted.into(),
                    limit.into(),
                    skip,
                ];
                self.query(E::sql().page_of_user, values).await?
            }
        };
        Ok(found.iter().map(rows::listed_record).collect())
    }

    async fn request(&self, scope: &RequestScope) -> Result<Option<RequestRecord>, Error> {
        let mut values = rows::request_key(scope);
        values.push((Timestamp::now().micros() - REQUEST_KEPT_US).into());
        let found = self.query(E::sql().request, values).await?;
        let decode = |row| rows::request(row).map(|(_, request)| request);
        found.first().map(decode).transpose()
    }

    async fn committed_by(&self, call: CallId) -> Result<bool, Error> {
        self.transaction(End::Rollback, move |session, sql| {
            Box::pin(mutations::is_committed(session, sql, call))
        })
        .await
    }

    async fn evidence(&self, calls: &[CallId]) -> Result<Evidence, Error> {
        let calls = calls.iter().take(CHANGES_MAX);
        let mut values: Vec<Value> = calls.map(|call| (*call).into()).collect();
        // Empty values match no row, because the id of a call is never empty.
        values.resize(CHANGES_MAX, Value::Bytes(Vec::new()));
        let found = self.query(E::sql().evidence, values).await?;
        let Some(row) = found.first() else {
            return Ok(Evidence {
                store: None,
                marks: 0,
            });
        };
        Ok(Evidence {
            store: StoreId::from_slice(row.bytes("store_id")?),
            marks: usize::try_from(row.integer("marks")?).unwrap_or(0),
        })
    }

    async fn count_keys(&self, tenant: &Tenant, user: &UserId, most: u32) -> Result<u32, Error> {
        let values = vec![tenant.as_str().into(), user.as_str().into(), most.into()];
        self.count_up_to(E::sql().count_keys, values).await
    }

    async fn count_revisions(&self, record: RecordId, most: u32) -> Result<u32, Error> {
        let values = vec![record.into(), most.into()];
        self.count_up_to(E::sql().count_revisions, values).await
    }

    async fn audit_log(&self, instance: &str, log_id: &str) -> Result<KnownLog, Error> {
        let values = vec![log_id.into(), instance.into()];
        let found = self.query(E::sql().audit_logs, values).await?;
        rows::known_log(found.first().ok_or(Error::NotFound)?)
    }

    async fn add_audit_log(
        &self,
        instance: &str,
        log_id: &str,
        at: Timestamp,
    ) -> Result<(), Error> {
        let values: Vec<Value> = vec![instance.into(), log_id.into(), at.into()];
        self.transaction(End::Commit, move |session, sql| {
            let values = values.clone();
            Box::pin(mutations::insert_unless_taken(
                session,
                sql.insert_audit_log,
                values,
            ))
        })
        .await
        .map(drop)
    }

    async fn forget_requests(&self, before: Timestamp) -> Result<u64, Error> {
        // Each statement removes only a few rows, so that no statement takes long and no call waits long for the locks
        // of a statement.
        let mut forgotten = 0;
        loop {
            let values = vec![before.into(), FORGOTTEN_AT_ONCE.into()];
            let portion = self.execute(E::sql().forget_requests, values).await?;
            forgotten += portion;
            if portion < FORGOTTEN_AT_ONCE {
                return Ok(forgotten);
            }
        }
    }

    async fn note_uses(&self, uses: &[(RecordId, Timestamp)]) -> Result<(), Error> {
        self.write_uses(uses).await
    }

    async fn last_uses(&self, records: &[RecordId]) -> Result<HashMap<RecordId, Timestamp>, Error> {
        self.read_uses(records).await
    }

    async fn registry(&self) -> Result<Vec<RegistryRow>, Error> {
        let found = self.query(E::sql().registry, Vec::new()).await?;
        found.iter().map(rows::registry).collect()
    }

    async fn register(&self, row: &RegistryRow) -> Result<(), Error> {
        let values = rows::new_registry(row);
        let inserted = self
            .transaction(End::Commit, move |session, sql| {
                let values = values.clone();
                Box::pin(mutations::insert_unless_taken(
                    session,
                    sql.of(Table::WrappingKeys).insert,
                    values,
                ))
            })
            .await?;
        if inserted { Ok(()) } else { Err(Error::Exists) }
    }

    async fn change_registry(
        &self,
        change: &RegistryChange,
        call: CallId,
        at: Timestamp,
    ) -> Result<(), Error> {
        self.write_registry(change, call, at).await
    }

    async fn update_registry(&self, row: &RegistryRow, expected: &Mac) -> Result<(), Error> {
        let mut values = rows::registry_values(row);
        values.extend([row.id.into(), expected.into()]);
        match self.execute(E::sql().update_registry, values).await? {
            1 => Ok(()),
            _ => Err(Error::Conflict),
        }
    }

    async fn places(&self) -> Result<Vec<PlaceRow>, Error> {
        let found = self.query(E::sql().places, Vec::new()).await?;
        found.iter().map(rows::place).collect()
    }

    async fn readable_places(&self) -> Result<(Vec<PlaceRow>, Vec<String>), Error> {
        let found = self.query(E::sql().places, Vec::new()).await?;
        let (mut places, mut damaged) = (Vec::new(), Vec::new());
        for row in &found {
            match rows::place(row) {
                Ok(place) => places.push(place),
                Err(error) => damaged.push(error.damage()),
            }
        }
        Ok((places, damaged))
    }

    async fn add_place(&self, row: &PlaceRow) -> Result<(), Error> {
        let values = rows::new_place(row);
        let inserted = self
            .transaction(End::Commit, move |session, sql| {
                let values = values.clone();
                Box::pin(mutations::insert_unless_taken(
                    session,
                    sql.of(Table::Places).insert,
                    values,
                ))
            })
            .await?;
        if inserted { Ok(()) } else { Err(Error::Exists) }
    }

    async fn update_place(&self, row: &PlaceRow, expected: &Mac) -> Result<(), Error> {
        let mut values = rows::place_values(row);
        values.extend([row.key.into(), row.token.as_str().into(), expected.into()]);
        match self.execute(E::sql().update_place, values).await? {
            1 => Ok(()),
            _ => Err(Error::Conflict),
        }
    }

    async fn client(&self, id: ClientId) -> Result<Option<ClientRow>, Error> {
        let found = self.query(E::sql().client, vec![id.into()]).await?;
        found.first().map(rows::client).transpose()
    }

    async fn clients(
        &self,
        from: &Position<ClientId>,
        limit: u32,
    ) -> Result<Vec<Result<ClientRow, DamagedClient>>, Error> {
        self.page_of_clients(from, limit).await
    }

    async fn insert_client(&self, row: &ClientRow, call: CallId) -> Result<(), Error> {
        self.change_client(ClientChange::Insert, row, Some(call), None)
            .await
    }

    async fn update_client(&self, row: &ClientRow, call: Option<CallId>) -> Result<(), Error> {
        self.change_client(ClientChange::Update, row, call, None)
            .await
    }

    async fn note_client_uses(&self, uses: &[(ClientId, u32, Timestamp)]) -> Result<(), Error> {
        self.write_client_uses(uses).await
    }

    async fn client_uses(&self, id: ClientId) -> Result<Vec<(u32, Timestamp)>, Error> {
        let found = self.query(E::sql().uses_of_client, vec![id.into()]).await?;
        Ok(rows::readable(Table::ClientUses, &found, rows::client_use))
    }

    async fn close(&self) {
        self.tasks.close();
        self.tasks.wait().await;
        self.lender.connections.close();
        self.lender.engine.close().await;
    }
}

async fn in_time<T>(probe: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    match tokio::time::timeout(PROBE_TIMEOUT, probe).await {
        Ok(result) => result,
        Err(_) => Err(Error::Down("the database does not answer".into())),
    }
}
