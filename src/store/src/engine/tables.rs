//! The calls of [`Tables`], for any engine.

use async_trait::async_trait;

use crate::{
    Error, RecordInfo, StoreId,
    columns::Kind,
    mutations::{self, insert_unless_taken},
    rows,
    session::{Columns as _, Session as _, Value},
    tables::{PAGE_ROWS, Row, Table, Tables},
};
use keybroker_core::{
    call::{CallId, Timestamp},
    key::{RecordId, Revision},
};

use super::{End, Engine, EngineStore};

/// A value that comes before every key.
fn least(kind: Kind) -> Value {
    match kind {
        Kind::Bytes => Value::Bytes(Vec::new()),
        Kind::Text => Value::Text(String::new()),
        Kind::Integer | Kind::OptionalInteger => Value::Integer(i64::MIN),
    }
}

fn key_after(table: Table, after: Option<&Row>) -> Result<Vec<Value>, Error> {
    match after {
        None => Ok(table
            .key()
            .iter()
            .map(|column| least(column.kind))
            .collect()),
        Some(row) => {
            let key: Option<Vec<Value>> = row.key().iter().cloned().collect();
            key.ok_or_else(|| {
                Error::Corrupt(format!("the key of a row of {}", table.name()).into())
            })
        }
    }
}

impl<E: Engine> EngineStore<E> {
    /// Runs a query that counts rows.
    async fn total(&self, statement: &'static str) -> Result<u64, Error> {
        let found = self.query(statement, Vec::new()).await?;
        let total = found.first().map_or(Ok(0), |row| row.integer("total"))?;
        Ok(u64::try_from(total).unwrap_or(0))
    }
}

#[async_trait]
impl<E: Engine> Tables for EngineStore<E> {
    async fn clock(&self) -> Result<Option<Timestamp>, Error> {
        let Some(statement) = E::sql().clock else {
            return Ok(None);
        };
        let found = self.query(statement, Vec::new()).await?;
        let micros = found.first().map(|row| row.integer("now_us")).transpose()?;
        Ok(micros.map(Timestamp::from_micros))
    }

    async fn count(&self, table: Table) -> Result<u64, Error> {
        self.total(E::sql().of(table).count).await
    }

    async fn keyless_rows(&self) -> Result<u64, Error> {
        let mut total = 0;
        for table in Table::ALL {
            total += self.total(E::sql().of(table).keyless).await?;
        }
        Ok(total)
    }

    async fn page(&self, table: Table, after: Option<&Row>, skip: u64) -> Result<Vec<Row>, Error> {
        let mut values = key_after(table, after)?;
        if let [first, _, ..] = &values[..] {
            // For a comparison of several columns, some engines do not use an index. For a
            // comparison of only the first column, all engines use an index.
            values.insert(0, first.clone());
        }
        values.push(u64::try_from(PAGE_ROWS).unwrap_or(u64::MAX).into());
        values.push(skip.into());
        let found = self.query(E::sql().of(table).page, values).await?;
        Ok(found.iter().map(|row| Row::read(table, row)).collect())
    }

    async fn insert(&self, table: Table, rows: &[Row]) -> Result<(), Error> {
        let statement = E::sql().of(table).insert;
        let rows: Result<Vec<_>, _> = rows.iter().map(Row::to_values).collect();
        let rows = rows?;
        self.transaction(End::Commit, move |session, _| {
            let rows = rows.clone();
            Box::pin(async move {
                for values in rows {
                    if !insert_unless_taken(session, statement, values).await? {
                        return Err(Error::Exists);
                    }
                }
                Ok(())
            })
        })
        .await
    }

    async fn record_by_id(&self, record: RecordId) -> Result<Option<RecordInfo>, Error> {
        let found = self
            .query(E::sql().record_by_id, vec![record.into()])
            .await?;
        found.first().map(rows::info).transpose()
    }

    async fn purge_revisions(
        &self,
        revisions: &[(RecordId, Revision)],
    ) -> Result<Vec<(RecordId, Revision)>, Error> {
        let revisions = revisions.to_vec();
        self.transaction(End::Commit, move |session, sql| {
            let revisions = revisions.clone();
            Box::pin(async move {
                let mut purged = Vec::new();
                for (record, revision) in revisions {
                    let values = vec![record.into(), revision.into()];
                    if session.execute(sql.delete_superseded, values).await? > 0 {
                        purged.push((record, revision));
                    }
                }
                Ok(purged)
            })
        })
        .await
    }

    async fn purge_records(
        &self,
        records: &[RecordId],
        deleted_before: Timestamp,
    ) -> Result<Vec<RecordId>, Error> {
        let records = records.to_vec();
        self.transaction(End::Commit, move |session, sql| {
            let records = records.clone();
            Box::pin(async move {
                let mut purged = Vec::new();
                for record in records {
                    if mutations::purge(session, sql, record, deleted_before).await? {
                        purged.push(record);
                    }
                }
                Ok(purged)
            })
        })
        .await
    }

    async fn adopt_identity(&self, id: StoreId) -> Result<(), Error> {
        self.execute(E::sql().update_identity, vec![id.into()])
            .await
            .map(drop)
    }

    async fn forget_changes(&self, calls: &[CallId]) -> Result<u64, Error> {
        let calls = calls.to_vec();
        self.transaction(End::Commit, move |session, sql| {
            let calls = calls.clone();
            Box::pin(async move {
                let mut forgotten = 0;
                for call in calls {
                    forgotten += session
                        .execute(sql.delete_change, vec![call.into()])
                        .await?;
                }
                Ok(forgotten)
            })
        })
        .await
    }
}
