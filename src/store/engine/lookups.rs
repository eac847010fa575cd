//! Records by their addresses, several at once: calls that ask while others are being answered share the next question, as
//! entries of the audit log share a sync. One caller alone waits for nobody.
//!
//! Every question costs a hand-over to a thread and back, which is several times what the lookup itself costs.

use std::{
    iter, mem,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::oneshot;

use crate::{
    key::KeyAddress,
    store::{
        Error, Record, rows,
        session::{Columns, Value},
    },
};

use super::{Engine, EngineStore, Purpose, query};

/// Addresses in one question; the statement of an engine has as many.
const TOGETHER: usize = 16;
/// Questions at once: one more than none would wait for the slower of two.
const QUESTIONS_MAX: usize = 2;
/// Column after those of a record: which of the addresses it answers.
const POSITION: usize = 8;

#[derive(Debug, Default)]
pub(super) struct Lookups(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    waiting: Vec<Lookup>,
    questions: usize,
}

#[derive(Debug)]
struct Lookup {
    address: KeyAddress,
    done: oneshot::Sender<Result<Option<Record>, Error>>,
}

impl Lookup {
    fn answer(self, found: Result<Option<Record>, Error>) {
        // Whoever has gone away meanwhile needs no answer.
        self.done.send(found).ok();
    }
}

impl Lookups {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A place among those who ask, given back however that ends.
struct Asking {
    lookups: Arc<Lookups>,
    ended: bool,
}

impl Asking {
    /// What the next question is about. None is the end: it is decided under the lock under which others join, so that
    /// whoever joins either is asked for here or asks.
    fn next(&mut self) -> Option<Vec<Lookup>> {
        let mut state = self.lookups.state();
        // Whoever has gone away is not asked for.
        state.waiting.retain(|lookup| !lookup.done.is_closed());
        if state.waiting.is_empty() {
            state.questions -= 1;
            self.ended = true;
            return None;
        }
        let count = state.waiting.len().min(TOGETHER);
        let rest = state.waiting.split_off(count);
        Some(mem::replace(&mut state.waiting, rest))
    }
}

impl Drop for Asking {
    fn drop(&mut self) {
        if self.ended {
            return;
        }
        // A task that died. Nobody may wait for it: those who do are told by their channels.
        let mut state = self.lookups.state();
        state.questions -= 1;
        state.waiting.clear();
    }
}

impl<E: Engine> EngineStore<E> {
    /// The record at an address. The question goes on when its caller goes away; others may wait for it.
    pub(super) async fn look_up(&self, address: &KeyAddress) -> Result<Option<Record>, Error> {
        let Some(statement) = E::SQL.records else {
            let rows = self.query(E::SQL.record, key(address).into()).await?;
            return rows.first().map(|row| record(row, address)).transpose();
        };
        self.probe.check(Purpose::Read)?;
        let (done, answer) = oneshot::channel();
        let asking = {
            let mut state = self.lookups.state();
            let address = address.clone();
            state.waiting.push(Lookup { address, done });
            (state.questions < QUESTIONS_MAX).then(|| {
                state.questions += 1;
                Asking {
                    lookups: Arc::clone(&self.lookups),
                    ended: false,
                }
            })
        };
        if let Some(asking) = asking {
            self.tasks
                .spawn(ask(Arc::clone(&self.engine), statement, asking));
        }
        answer
            .await
            .unwrap_or_else(|_| Err(Error::Down("a task of the store failed".into())))
    }
}

/// Asks until nobody waits.
async fn ask<E: Engine>(engine: Arc<E>, statement: &'static str, mut asking: Asking) {
    while let Some(lookups) = asking.next() {
        let keys = lookups.iter().map(|lookup| key(&lookup.address));
        let unused = iter::repeat_with(|| [(); 3].map(|()| Value::Text(String::new())));
        let mut values: Vec<Value> = keys.chain(unused).take(TOGETHER).flatten().collect();
        values.push(u64::try_from(lookups.len()).unwrap_or(u64::MAX).into());
        answer_all(lookups, &query(&*engine, statement, values).await);
    }
}

fn answer_all<R: Columns>(lookups: Vec<Lookup>, rows: &Result<Vec<R>, Error>) {
    for (position, lookup) in (0..).zip(lookups) {
        let found = rows.as_ref().map_err(Clone::clone).and_then(|rows| {
            let is_it = |row: &&R| row.integer(POSITION).is_ok_and(|it| it == position);
            let row = rows.iter().find(is_it);
            row.map(|row| record(row, &lookup.address)).transpose()
        });
        lookup.answer(found);
    }
}

fn key(address: &KeyAddress) -> [Value; 3] {
    [
        address.tenant.as_str().into(),
        address.user.as_str().into(),
        address.name.as_str().into(),
    ]
}

fn record(row: &impl Columns, address: &KeyAddress) -> Result<Record, Error> {
    Ok(Record {
        info: rows::info(row, address.clone())?,
        envelope: rows::bytes(row, 7, "revisions.envelope")?,
    })
}
