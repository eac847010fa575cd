//! The newest change that this instance acknowledged. Its mark is in the database that it was made in: a database without the
//! mark is another one, or an earlier state of the same, and nothing is released or changed until an operator accepts it.
//!
//! The change is written to the state directory at most a second later, so that a broker that is killed forgets no more than
//! that second. Each instance looks for its own.

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use serde::{Deserialize, Serialize};

use keybroker_core::{
    call::{CallId, Timestamp},
    error::{Error, Reason},
    state::{self, StateDirectory},
};

use super::Broker;

/// Name of the fact in the state directory.
const FACT: &str = "acknowledged";
/// How long a caller should wait for an operator.
const RETRY: Duration = Duration::from_secs(1);
/// Marks are purged after the retention by the clock of another machine, perhaps.
const CLOCKS_APART: Duration = Duration::from_hours(1);

/// A change as it is remembered across a restart.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Newest {
    call: String,
    at_us: i64,
}

/// The fact cannot be read, or does not parse.
#[derive(Clone, Copy, Debug)]
struct Unreadable;

#[derive(Debug)]
pub(super) struct Acknowledged {
    newest: Mutex<Option<(CallId, Timestamp)>>,
    /// Whether there is a newer one than the state directory has.
    is_changed: AtomicBool,
    /// Whether the database has no mark of it.
    is_missing: AtomicBool,
    retention: Duration,
    state: StateDirectory,
}

/// Accepts that the database is an earlier state: forgets the newest acknowledged change, and says which it was.
pub fn accept_restored(state: &StateDirectory) -> Result<Option<String>, state::Error> {
    let fact = state.read(FACT)?;
    state.remove(FACT)?;
    let newest = fact.and_then(|bytes| serde_json::from_slice::<Newest>(&bytes).ok());
    Ok(newest.map(|newest| newest.call))
}

impl Acknowledged {
    pub(super) fn new(state: StateDirectory, retention: Duration) -> Self {
        Self {
            newest: Mutex::default(),
            is_changed: AtomicBool::new(false),
            is_missing: AtomicBool::new(false),
            retention,
            state,
        }
    }

    fn newest(&self) -> Option<(CallId, Timestamp)> {
        *self.newest.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, newest: Option<(CallId, Timestamp)>) {
        *self.newest.lock().unwrap_or_else(PoisonError::into_inner) = newest;
    }

    /// The newest one, unless its mark may have been purged.
    fn expected(&self) -> Option<CallId> {
        let (call, at) = self.newest()?;
        let kept = self.retention.saturating_sub(CLOCKS_APART).as_micros();
        let age = Timestamp::now().micros().saturating_sub(at.micros());
        (i128::from(age) < i128::try_from(kept).unwrap_or(i128::MAX)).then_some(call)
    }

    fn note(&self, call: CallId, at: Timestamp) {
        let mut newest = self.newest.lock().unwrap_or_else(PoisonError::into_inner);
        if newest.is_none_or(|(_, before)| before <= at) {
            *newest = Some((call, at));
            self.is_changed.store(true, Ordering::Release);
        }
    }

    pub(super) fn is_missing(&self) -> bool {
        self.is_missing.load(Ordering::Acquire)
    }

    fn keep(&self) {
        if !self.is_changed.swap(false, Ordering::AcqRel) {
            return;
        }
        let Some((call, at)) = self.newest() else {
            return;
        };
        let newest = Newest {
            call: call.to_string(),
            at_us: at.micros(),
        };
        let written = serde_json::to_vec(&newest)
            .map_err(|error| error.to_string())
            .and_then(|bytes| {
                let written = self.state.write(FACT, &bytes);
                written.map_err(|error| error.to_string())
            });
        if let Err(error) = written {
            self.is_changed.store(true, Ordering::Release);
            tracing::warn!(%error, "the newest acknowledged change is in memory alone");
        }
    }

    /// What the state directory has.
    fn kept(&self) -> Result<Option<(CallId, Timestamp)>, Unreadable> {
        let Some(bytes) = self.state.read(FACT).map_err(|_| Unreadable)? else {
            return Ok(None);
        };
        let newest: Newest = serde_json::from_slice(&bytes).map_err(|_| Unreadable)?;
        let call = CallId::parse(&newest.call).ok_or(Unreadable)?;
        Ok(Some((call, Timestamp::from_micros(newest.at_us))))
    }

    fn take_over(&self) {
        if let Ok(newest) = self.kept() {
            self.set(newest);
        } else {
            tracing::error!(
                alarm = "store-restored",
                "the state file `{FACT}` cannot be read: an earlier state of the database would not be noticed"
            );
        }
    }
}

impl Broker {
    /// Takes over what the run before acknowledged, and looks for it.
    pub(super) async fn take_over_acknowledged(&self) {
        self.acknowledged.take_over();
        self.look_for_acknowledged().await;
    }

    /// Takes note of a change that was committed. An error when the database it was committed to is not the one of the change before.
    pub(super) async fn acknowledge(&self, call: CallId, at: Timestamp) -> Result<(), Error> {
        if let Some(before) = self.acknowledged.expected()
            && matches!(self.store.has_mark(before).await, Ok(false))
        {
            self.look_for_acknowledged().await;
            self.check_acknowledged()?;
        }
        self.acknowledged.note(call, at);
        Ok(())
    }

    /// Fails while the database has no mark of the newest acknowledged change.
    pub(super) fn check_acknowledged(&self) -> Result<(), Error> {
        if !self.acknowledged.is_missing() {
            return Ok(());
        }
        let detail = "the database has no mark of the newest acknowledged change: it is another one, or an earlier state";
        Err(Error::new(Reason::StoreDown, detail).retry_after(RETRY))
    }

    pub(super) fn keep_acknowledged(&self) {
        self.acknowledged.keep();
    }

    /// Looks for the mark of the newest acknowledged change.
    pub(super) async fn look_for_acknowledged(&self) {
        let acknowledged = &self.acknowledged;
        let was_missing = acknowledged.is_missing();
        // The operator's command removes the fact.
        if was_missing && matches!(acknowledged.kept(), Ok(None)) {
            tracing::warn!("an operator accepted the database as it is");
            acknowledged.set(None);
        }
        let missing = match acknowledged.expected() {
            None => None,
            Some(call) => match self.store.has_mark(call).await {
                Ok(true) => None,
                Ok(false) => Some(call),
                // Not known, so nothing changes.
                Err(_) => return,
            },
        };
        if missing.is_some() {
            // Before anybody looks whether it was removed.
            acknowledged.keep();
        }
        acknowledged
            .is_missing
            .store(missing.is_some(), Ordering::Release);
        match missing {
            Some(call) if !was_missing => tracing::error!(
                alarm = "store-restored", %call,
                "the database has no mark of the newest acknowledged change: it is another one, or an earlier state; \
                 nothing is released or changed until it is put right, or accepted with `keybroker store accept-restored`"
            ),
            None if was_missing => tracing::warn!("the database is accepted again"),
            _ => {}
        }
    }
}
