//! When records were last released, for any engine.

use std::collections::HashMap;

use crate::{
    call::Timestamp,
    key::RecordId,
    store::{
        Error, rows,
        session::{Session as _, Value},
        statements::RECORDS_AT_ONCE,
    },
};

use super::{End, Engine, EngineStore};

impl<E: Engine> EngineStore<E> {
    pub(super) async fn write_uses(&self, uses: &[(RecordId, Timestamp)]) -> Result<(), Error> {
        let uses = uses.to_vec();
        self.transaction(End::Commit, move |session, _| {
            let uses = uses.clone();
            Box::pin(async move {
                for (record, at) in uses {
                    let values = vec![record.into(), at.into()];
                    session.execute(E::TABLES.note_use, values).await?;
                }
                Ok(())
            })
        })
        .await
    }

    pub(super) async fn read_uses(
        &self,
        records: &[RecordId],
    ) -> Result<HashMap<RecordId, Timestamp>, Error> {
        let mut uses = HashMap::new();
        for portion in records.chunks(RECORDS_AT_ONCE) {
            // The statement has a fixed number of places: the last record fills those that are left.
            let fill = portion.last().into_iter().cycle();
            let ids = portion.iter().chain(fill).take(RECORDS_AT_ONCE);
            let values: Vec<Value> = ids.map(|record| (*record).into()).collect();
            for row in &self.query(E::TABLES.uses, values).await? {
                let (record, at) = rows::last_use(row)?;
                uses.insert(record, at);
            }
        }
        Ok(uses)
    }
}
