//! The calls of [`Destructions`], for any engine.

use async_trait::async_trait;

use crate::{
    DestructionChange, DestructionRow, Destructions, Error, FoundDestructions,
    UnreadableDestruction, mutations::expect_one, rows, session::Session, statements::Statements,
    tables::Table,
};
use keybroker_core::call::Timestamp;

use super::{Engine, EngineStore, rewrap::implausible_lease};

/// Adds or removes the row of a destruction, in the transaction of a change of the registry.
pub(super) async fn write(
    session: &mut impl Session,
    sql: &'static Statements,
    change: &DestructionChange,
) -> Result<(), Error> {
    let key = match change {
        DestructionChange::Schedule(row) => row.key,
        DestructionChange::Remove(key) => *key,
    };
    session
        .execute(sql.delete_destruction, vec![key.into()])
        .await?;
    if let DestructionChange::Schedule(row) = change {
        let insert = sql.of(Table::Destructions).insert;
        expect_one(session.execute(insert, rows::new_destruction(row)).await?)?;
    }
    Ok(())
}

#[async_trait]
impl<E: Engine> Destructions for EngineStore<E> {
    async fn destructions(&self) -> Result<FoundDestructions, Error> {
        let mut found = FoundDestructions::default();
        for row in &self.query(E::sql().destructions, Vec::new()).await? {
            match rows::destruction(row) {
                Ok(row) => found.rows.push(row),
                Err(error) => found.unreadable.push(UnreadableDestruction {
                    key: rows::key_of_destruction(row),
                    cause: error.damage(),
                }),
            }
        }
        Ok(found)
    }

    async fn hold_destruction(
        &self,
        row: &DestructionRow,
        holder: &str,
        now: Timestamp,
        until: Timestamp,
    ) -> Result<bool, Error> {
        let values = vec![
            holder.into(),
            until.into(),
            row.key.into(),
            (&row.mac).into(),
            holder.into(),
            now.into(),
            implausible_lease(now, until).into(),
        ];
        Ok(self.execute(E::sql().hold_destruction, values).await? == 1)
    }

    async fn end_destruction(&self, row: &DestructionRow) -> Result<bool, Error> {
        let values = vec![row.key.into(), (&row.mac).into()];
        Ok(self.execute(E::sql().end_destruction, values).await? == 1)
    }
}
