//! When records were last released, for any engine.

use std::collections::HashMap;

use crate::{
    Error, rows,
    session::{Session as _, Value},
    statements::RECORDS_AT_ONCE,
};
use keybroker_core::{call::Timestamp, key::RecordId};

use super::{End, Engine, EngineStore};

impl<E: Engine> EngineStore<E> {
    pub(super) async fn write_uses(&self, uses: &[(RecordId, Timestamp)]) -> Result<(), Error> {
        // Few statements: on the way to a server each costs as long as the way.
        let portions: Vec<Vec<Value>> = uses
            .chunks(RECORDS_AT_ONCE)
            .map(|portion| {
                let pairs = filled(portion, RECORDS_AT_ONCE)
                    .map(|(record, at)| [(*record).into(), (*at).into()]);
                pairs.flatten().collect()
            })
            .collect();
        self.transaction(End::Commit, move |session, _| {
            let portions = portions.clone();
            Box::pin(async move {
                for values in portions {
                    session.execute(E::TABLES.note_uses, values).await?;
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
            let values: Vec<Value> = filled(portion, RECORDS_AT_ONCE)
                .map(|record| (*record).into())
                .collect();
            let found = self.query(E::TABLES.uses, values).await?;
            uses.extend(rows::readable("last_uses", &found, rows::last_use));
        }
        Ok(uses)
    }
}

/// A statement has a fixed number of places: the last of a portion fills those that are left.
pub(super) fn filled<T>(portion: &[T], places: usize) -> impl Iterator<Item = &T> {
    let fill = portion.last().into_iter().cycle();
    portion.iter().chain(fill).take(places)
}
