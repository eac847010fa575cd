//! The times when records and secrets were last used, for any engine.

use std::collections::HashMap;

use crate::{
    Error, rows,
    session::{Session as _, Value},
    statements::RECORDS_AT_ONCE,
    tables::Table,
};
use keybroker_core::{call::Timestamp, key::RecordId};

use super::{End, Engine, EngineStore};

impl<E: Engine> EngineStore<E> {
    pub(super) async fn write_uses(&self, uses: &[(RecordId, Timestamp)]) -> Result<(), Error> {
        let rows: Vec<_> = uses.iter().map(rows::new_last_use).collect();
        self.note_latest(E::sql().note_uses, RECORDS_AT_ONCE, &rows)
            .await
    }

    pub(super) async fn read_uses(
        &self,
        records: &[RecordId],
    ) -> Result<HashMap<RecordId, Timestamp>, Error> {
        let mut uses = HashMap::new();
        for portion in records.chunks(RECORDS_AT_ONCE) {
            let values: Vec<Value> = filled(portion, RECORDS_AT_ONCE)
                .map(|record| (*record).into())
                .collect();
            let found = self.query(E::sql().uses, values).await?;
            uses.extend(rows::readable(Table::LastUses, &found, rows::last_use));
        }
        Ok(uses)
    }

    /// Runs a statement of [`Dialect::note_latest`](crate::dialect::Dialect::note_latest) for any number of rows, in one
    /// transaction.
    pub(super) async fn note_latest(
        &self,
        statement: &'static str,
        rows_at_once: usize,
        rows: &[Vec<Value>],
    ) -> Result<(), Error> {
        // Use few statements, because each statement takes a round trip to the server.
        let portions: Vec<Vec<Value>> = rows
            .chunks(rows_at_once)
            .map(|portion| filled(portion, rows_at_once).flatten().cloned().collect())
            .collect();
        self.transaction(End::Commit, move |session, _| {
            let portions = portions.clone();
            Box::pin(async move {
                for values in portions {
                    session.execute(statement, values).await?;
                }
                Ok(())
            })
        })
        .await
    }
}

/// Repeats the last row of a portion until the portion has `places` rows, because the statement has
/// a fixed number of rows.
pub(super) fn filled<T>(portion: &[T], places: usize) -> impl Iterator<Item = &T> {
    let fill = portion.last().into_iter().cycle();
    portion.iter().chain(fill).take(places)
}
