//! Changes of several rows of the registry in one transaction, for any engine.

use crate::{
    Error, RegistryChange,
    mutations::{expect_one, insert_unless_taken},
    registry::PlaceChange,
    rows,
    session::Session,
    statements::Statements,
    tables::Table,
};
use keybroker_core::{
    call::{CallId, Timestamp},
    key::ID_BYTES,
    key::RecordId,
};

use super::{End, Engine, EngineStore, approval_use, destruction};

impl<E: Engine> EngineStore<E> {
    /// Writes the change and the mark of the call. If a row or the used approval does not have the expected MAC, or if a row needs the key that no
    /// row may need, the transaction is rolled back.
    pub(super) async fn write_registry(
        &self,
        change: &RegistryChange,
        call: CallId,
        at: Timestamp,
    ) -> Result<(), Error> {
        let change = change.clone();
        self.transaction(End::CommitMarked(call), move |session, sql| {
            let change = change.clone();
            Box::pin(async move {
                // The mark of a registry change has an empty record id, because the change affects
                // no record.
                let none = RecordId::from_bytes([0; ID_BYTES]);
                let mark = rows::new_change(call, none, at);
                expect_one(session.execute(sql.insert_change, mark).await?)?;
                for update in &change.updates {
                    let mut values = rows::registry_values(&update.row);
                    values.extend([update.row.id.into(), (&update.expected).into()]);
                    match session.execute(sql.update_registry, values).await? {
                        1 => {}
                        _ => return Err(Error::Conflict),
                    }
                }
                for place in &change.places {
                    write_place(session, sql, place).await?;
                }
                if let Some(destruction) = &change.destruction {
                    destruction::write(session, sql, destruction).await?;
                }
                if let Some(used) = &change.approval {
                    approval_use::change(session, sql, used).await?;
                }
                if let Some(key) = change.unneeded {
                    let found = session
                        .rows(sql.rewrap.uses, rows::values_of_uses(key))
                        .await?;
                    let uses = rows::key_uses(found.first().ok_or(Error::NotFound)?)?;
                    if uses.total() > 0 {
                        return Err(Error::Conflict);
                    }
                }
                let Some(row) = &change.insert else {
                    return Ok(());
                };
                let insert = sql.of(Table::WrappingKeys).insert;
                if insert_unless_taken(session, insert, rows::new_registry(row)).await? {
                    Ok(())
                } else {
                    Err(Error::Exists)
                }
            })
        })
        .await
    }
}

/// Adds or replaces the row of a further token, in the transaction of a change of the registry.
async fn write_place(
    session: &mut impl Session,
    sql: &'static Statements,
    change: &PlaceChange,
) -> Result<(), Error> {
    let row = &change.row;
    let Some(expected) = &change.expected else {
        let insert = sql.of(Table::Places).insert;
        let is_new = insert_unless_taken(session, insert, rows::new_place(row)).await?;
        return if is_new { Ok(()) } else { Err(Error::Conflict) };
    };
    let mut values = rows::place_values(row);
    values.extend([row.key.into(), row.token.as_str().into(), expected.into()]);
    match session.execute(sql.update_place, values).await? {
        1 => Ok(()),
        _ => Err(Error::Conflict),
    }
}
