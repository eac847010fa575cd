//! The calls of [`Rewraps`], for any engine.

use std::collections::BTreeMap;

use async_trait::async_trait;

use crate::{
    Error,
    mutations::{expect_one, insert_unless_taken},
    rewrap::{
        ClientMove, KeyUses, RevisionMove, RevisionPlace, Rewraps, RowUnder, RunId, RunRow,
        RunState,
    },
    rows,
    session::{Columns as _, Session, Value},
    statements::Statements,
};
use keybroker_core::{
    call::{CallId, Timestamp},
    key::{KeyUse, WrappingKeyId, WrappingKeyState},
};

use super::{End, Engine, EngineStore};

/// Limit of a plausible lease, as a multiple of the length of a new lease. If a lease lasts longer,
/// the clock was wrong when the lease was taken.
const IMPLAUSIBLE_LEASES: i64 = 6;

/// The time from which on a stored lease is implausible, for a new lease from `now` until `until`.
pub(super) fn implausible_lease(now: Timestamp, until: Timestamp) -> Timestamp {
    let lease_us = until.micros().saturating_sub(now.micros());
    let implausible = lease_us.saturating_mul(IMPLAUSIBLE_LEASES);
    Timestamp::from_micros(now.micros().saturating_add(implausible))
}

impl<E: Engine> EngineStore<E> {
    /// Runs one statement for each list of values and stores the mark of the call, in one
    /// transaction. `first` is the id of the first row. For each list of values, returns whether
    /// the statement changed a row. Returns [`Error::State`] if the state of a key forbids its use.
    pub(super) async fn swap(
        &self,
        statement: &'static str,
        first: Option<Value>,
        keys: BTreeMap<WrappingKeyId, KeyUse>,
        swaps: Vec<Vec<Value>>,
        call: CallId,
    ) -> Result<Vec<bool>, Error> {
        let Some(first) = first else {
            return Ok(Vec::new());
        };
        let at = Timestamp::now();
        self.transaction(End::CommitMarked(call), move |session, sql| {
            let (first, swaps, keys) = (first.clone(), swaps.clone(), keys.clone());
            Box::pin(async move {
                let mark = rows::new_change(call, first, at);
                expect_one(session.execute(sql.insert_change, mark).await?)?;
                check_states(session, sql, &keys).await?;
                let mut changed = Vec::with_capacity(swaps.len());
                for values in swaps {
                    changed.push(session.execute(statement, values).await? == 1);
                }
                Ok(changed)
            })
        })
        .await
    }
}

/// The keys of a swap, each with its use. `source` is the use of the old wrapping keys.
pub(super) fn keys_of(
    pairs: impl Iterator<Item = (WrappingKeyId, WrappingKeyId)>,
    source: KeyUse,
) -> BTreeMap<WrappingKeyId, KeyUse> {
    pairs
        .flat_map(|(from, to)| [(from, source), (to, KeyUse::Wrap)])
        .collect()
}

/// Locks the registry rows of the keys of a swap, and checks their states. A change of a state that was committed before is noticed, and
/// a later one waits until the swap is committed. The caller has verified the registry before, so this check only has to find a change.
async fn check_states(
    session: &mut impl Session,
    sql: &'static Statements,
    keys: &BTreeMap<WrappingKeyId, KeyUse>,
) -> Result<(), Error> {
    for (key, key_use) in keys {
        let found = session
            .rows(sql.rewrap.key_state, vec![(*key).into()])
            .await?;
        let Some(row) = found.first() else {
            continue;
        };
        let state = WrappingKeyState::parse(row.text("state")?);
        if !state.is_some_and(|state| state.allows(*key_use)) {
            return Err(Error::State);
        }
    }
    Ok(())
}

#[async_trait]
impl<E: Engine> Rewraps for EngineStore<E> {
    async fn key_uses(&self, key: WrappingKeyId) -> Result<KeyUses, Error> {
        let found = self
            .query(E::sql().rewrap.uses, rows::values_of_uses(key))
            .await?;
        rows::key_uses(found.first().ok_or(Error::NotFound)?)
    }

    async fn unregistered_uses(&self) -> Result<KeyUses, Error> {
        let found = self
            .query(E::sql().rewrap.unregistered_uses, Vec::new())
            .await?;
        rows::key_uses(found.first().ok_or(Error::NotFound)?)
    }

    async fn revisions_under(
        &self,
        key: WrappingKeyId,
        after: &RevisionPlace,
        limit: u32,
    ) -> Result<Vec<RowUnder>, Error> {
        let record: Value = after.record.as_slice().into();
        let values = vec![
            key.into(),
            record.clone(),
            record,
            after.revision.into(),
            limit.into(),
        ];
        let found = self.query(E::sql().rewrap.page, values).await?;
        found.iter().map(rows::row_under).collect()
    }

    async fn move_revisions(
        &self,
        moves: Vec<RevisionMove>,
        source: KeyUse,
        call: CallId,
    ) -> Result<Vec<bool>, Error> {
        let first = moves.first().map(|one| one.record.into());
        let values = |one: RevisionMove| {
            vec![
                Value::Bytes(one.new),
                one.to.into(),
                one.record.into(),
                one.revision.into(),
                one.from.into(),
                Value::Bytes(one.old),
            ]
        };
        let keys = keys_of(moves.iter().map(|one| (one.from, one.to)), source);
        let swaps = moves.into_iter().map(values).collect();
        let statement = E::sql().rewrap.move_revision;
        self.swap(statement, first, keys, swaps, call).await
    }

    async fn move_clients(&self, moves: Vec<ClientMove>, call: CallId) -> Result<Vec<bool>, Error> {
        let first = moves.first().map(|one| one.id.into());
        let values = |one: ClientMove| {
            vec![
                (&one.new).into(),
                one.to.into(),
                one.id.into(),
                one.revision.into(),
                one.from.into(),
                (&one.old).into(),
            ]
        };
        let keys = keys_of(
            moves.iter().map(|one| (one.from, one.to)),
            KeyUse::RewrapFrom,
        );
        let swaps = moves.into_iter().map(values).collect();
        let statement = E::sql().rewrap.move_client;
        self.swap(statement, first, keys, swaps, call).await
    }

    async fn rewrap_run(&self) -> Result<Option<RunRow>, Error> {
        let found = self.query(E::sql().rewrap.run, Vec::new()).await?;
        found.first().map(rows::run).transpose()
    }

    async fn start_rewrap(&self, run: &RunRow, call: CallId) -> Result<(), Error> {
        let (values, id, at) = (rows::run_values(run), run.id, run.started);
        self.transaction(End::CommitMarked(call), move |session, sql| {
            let values = values.clone();
            Box::pin(async move {
                let mark = rows::new_change(call, id.as_bytes().as_slice(), at);
                expect_one(session.execute(sql.insert_change, mark).await?)?;
                let replaced = session.execute(sql.rewrap.replace, values.clone()).await?;
                if replaced == 1 || insert_unless_taken(session, sql.rewrap.insert, values).await? {
                    Ok(())
                } else {
                    Err(Error::Conflict)
                }
            })
        })
        .await
    }

    async fn change_rewrap(
        &self,
        run: RunId,
        from: RunState,
        to: RunState,
        rate: Option<u32>,
        call: CallId,
    ) -> Result<(), Error> {
        let mut values: Vec<Value> = vec![to.as_str().into()];
        values.extend(rate.map(Value::from));
        values.push(run.as_bytes().as_slice().into());
        values.push(from.as_str().into());
        self.transaction(End::CommitMarked(call), move |session, sql| {
            let values = values.clone();
            Box::pin(async move {
                let mark = rows::new_change(call, run.as_bytes().as_slice(), Timestamp::now());
                expect_one(session.execute(sql.insert_change, mark).await?)?;
                let statement = match rate {
                    Some(_) => sql.rewrap.set_state_and_rate,
                    None => sql.rewrap.set_state,
                };
                match session.execute(statement, values).await? {
                    1 => Ok(()),
                    _ => Err(Error::Conflict),
                }
            })
        })
        .await
    }

    async fn hold_rewrap(
        &self,
        run: RunId,
        holder: &str,
        now: Timestamp,
        until: Timestamp,
    ) -> Result<bool, Error> {
        let values = vec![
            holder.into(),
            until.into(),
            run.as_bytes().as_slice().into(),
            holder.into(),
            now.into(),
            implausible_lease(now, until).into(),
        ];
        Ok(self.execute(E::sql().rewrap.hold, values).await? == 1)
    }

    async fn note_rewrap(
        &self,
        run: RunId,
        holder: &str,
        document: &[u8],
        is_done: bool,
    ) -> Result<bool, Error> {
        let values = vec![
            document.into(),
            run.as_bytes().as_slice().into(),
            holder.into(),
        ];
        let sql = &E::sql().rewrap;
        let statement = if is_done { sql.end } else { sql.note };
        Ok(self.execute(statement, values).await? == 1)
    }
}
