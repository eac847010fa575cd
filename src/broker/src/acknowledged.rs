//! Detects that a broker instance was connected to another database, or to an earlier state of its database. The
//! instance remembers the identity of the database, and the newest changes that the broker acknowledged. Each
//! acknowledged change leaves a mark in the database. If the identity differs or a mark is missing, the broker releases
//! and changes nothing until an operator accepts the database.
//!
//! The broker stores the identity and the changes in the state directory, at most one second after a change. After a
//! broker is killed, its next start reads the changes of the last second from the audit log. Each broker instance
//! checks only the marks of the changes that it made.

use std::{
    collections::VecDeque,
    path::PathBuf,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use serde::{Deserialize, Serialize};

use keybroker_audit::Change;
use keybroker_core::{
    call::{CallId, Timestamp},
    error::{Error, Reason, chain},
    state::{self, StateDirectory},
};
use keybroker_store::{CHANGES_MAX, Store, StoreId};

use super::{Broker, key_change::forget_accepted, registry::memory};

/// Name of the state file in the previous release, without the name of the instance.
const LEGACY_FACT: &str = "acknowledged";
/// Delay after which a caller may retry a call that was refused because of the database.
const RETRY: Duration = Duration::from_secs(1);
/// Margin for clock differences: a machine whose clock is ahead may purge a mark shortly before the end of the
/// retention period.
const CLOCKS_APART: Duration = Duration::from_hours(1);

/// The content of the state file: the identity of the database, and the acknowledged changes.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Kept {
    /// The identity of the database; `None` until it is read for the first time.
    store: Option<String>,
    /// The newest changes, oldest first.
    changes: Vec<KeptChange>,
    /// Time at which an operator last accepted a database. Older changes in the audit log are ignored.
    #[serde(default)]
    accepted_us: i64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct KeptChange {
    call: String,
    at_us: i64,
}

/// The content of the state file as this release or the previous release writes it. The previous release stored only
/// one change.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Fact {
    Now(Kept),
    Before(KeptChange),
}

/// The parsed content of the state file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Known {
    store: Option<StoreId>,
    /// At most [`CHANGES_MAX`] changes, oldest first.
    changes: VecDeque<(CallId, Timestamp)>,
    accepted: Option<Timestamp>,
}

/// The reason for refusing a database.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mismatch {
    /// The database has another identity, or no identity.
    OtherStore,
    /// The database does not contain the mark of an acknowledged change.
    NoMark,
}

impl Mismatch {
    const fn text(self) -> &'static str {
        match self {
            Self::OtherStore => {
                "the broker used another database before: the identity of this database differs"
            }
            Self::NoMark => {
                "the database lacks an acknowledged change: it is an earlier state of this database"
            }
        }
    }
}

#[derive(Debug)]
pub(super) struct Acknowledged {
    known: Mutex<Known>,
    /// Whether the identity or the changes differ from the content of the state file.
    is_changed: AtomicBool,
    /// Reason for refusing the database; `None` if the database is accepted.
    mismatch: Mutex<Option<Mismatch>>,
    retention: Duration,
    state: StateDirectory,
    /// Name of the state file. The name contains the broker instance, because two brokers may share the state
    /// directory.
    fact: String,
}

fn fact_of(instance: &str) -> String {
    format!("acknowledged-{instance}")
}

/// Reads the state file of an instance, including a state file of the previous release.
fn read_fact(state: &StateDirectory, fact: &str) -> Result<Option<Kept>, state::Error> {
    let found = match state.read_json::<Fact>(fact)? {
        None => state.read_json::<Fact>(LEGACY_FACT)?,
        found => found,
    };
    Ok(found.map(Kept::from))
}

/// The result of [`accept_restored`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Acceptance {
    /// The database matches the state file, so no acceptance was necessary.
    AlreadyKnown,
    /// Only rows of the registry were refused, because they were earlier than those that the broker remembered. The next start of the
    /// broker accepts them.
    Registry,
    /// The database was accepted.
    Accepted {
        /// Call id of the newest change that the state file contained before the acceptance.
        forgotten: Option<String>,
    },
}

/// Accepts the database in its current state, unless the database already matches the state file. Also accepts earlier
/// rows of the registry. The acceptance replaces the previous identity and removes the acknowledged changes from the
/// state file. A damaged state file is replaced. Returns an error if the state directory cannot be used, or if the
/// database does not answer.
pub async fn accept_restored(
    state: &StateDirectory,
    instance: &str,
    store: &dyn Store,
) -> Result<Acceptance, Error> {
    let failed = |error| Error::caused(Reason::StoreDown, error);
    let fact = fact_of(instance);
    // The schedules come first: if the command is interrupted, the operator repeats it.
    let forget_schedules = || forget_accepted(state, instance).map_err(failed);
    let is_registry_refused = memory::forget(state, instance, store, forget_schedules).await?;
    let known = match read_fact(state, &fact) {
        Ok(kept) => kept.as_ref().and_then(Known::read),
        Err(error) if error.is_damaged() => None,
        Err(error) => return Err(failed(error)),
    };
    if let Some(known) = &known
        && known.store.is_some()
    {
        let calls: Vec<CallId> = known.changes.iter().map(|(call, _)| *call).collect();
        let evidence = store.evidence(&calls).await?;
        if evidence.store == known.store && evidence.marks == calls.len() {
            return Ok(if is_registry_refused {
                Acceptance::Registry
            } else {
                Acceptance::AlreadyKnown
            });
        }
    }
    let forgotten = known.and_then(|known| known.changes.back().map(|(call, _)| call.to_string()));
    let accepted = Kept {
        accepted_us: Timestamp::now().micros(),
        ..Kept::default()
    };
    forget_schedules()?;
    state.write_json(&fact, &accepted).map_err(failed)?;
    Ok(Acceptance::Accepted { forgotten })
}

impl From<Fact> for Kept {
    fn from(fact: Fact) -> Self {
        match fact {
            Fact::Now(kept) => kept,
            Fact::Before(change) => Self {
                changes: vec![change],
                ..Self::default()
            },
        }
    }
}

impl From<&Known> for Kept {
    fn from(known: &Known) -> Self {
        let kept = |(call, at): &(CallId, Timestamp)| KeptChange {
            call: call.to_string(),
            at_us: at.micros(),
        };
        Self {
            store: known.store.map(|id| id.to_string()),
            changes: known.changes.iter().map(kept).collect(),
            accepted_us: known.accepted.map_or(0, Timestamp::micros),
        }
    }
}

impl Known {
    /// Parses the content of the state file. Returns `None` if an id cannot be parsed.
    fn read(kept: &Kept) -> Option<Self> {
        let store = match &kept.store {
            Some(id) => Some(StoreId::from_hex(id)?),
            None => None,
        };
        let mut known = Self {
            store,
            accepted: (kept.accepted_us > 0).then(|| Timestamp::from_micros(kept.accepted_us)),
            ..Self::default()
        };
        for change in &kept.changes {
            let call = CallId::parse(&change.call)?;
            known.note(call, Timestamp::from_micros(change.at_us));
        }
        Some(known)
    }

    fn note(&mut self, call: CallId, at: Timestamp) {
        if self.changes.iter().any(|(known, _)| *known == call) {
            return;
        }
        self.changes.push_back((call, at));
        if self.changes.len() > CHANGES_MAX {
            self.changes.pop_front();
        }
    }
}

impl Acknowledged {
    pub(super) fn new(state: StateDirectory, instance: &str, retention: Duration) -> Self {
        Self {
            known: Mutex::default(),
            is_changed: AtomicBool::new(false),
            mismatch: Mutex::default(),
            retention,
            state,
            fact: fact_of(instance),
        }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn mismatch(&self) -> Option<Mismatch> {
        *self.mismatch.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the known identity of the database, and the newest changes whose marks cannot have been purged yet.
    fn expected(&self) -> (Option<StoreId>, Vec<CallId>) {
        let kept = self.retention.saturating_sub(CLOCKS_APART).as_micros();
        let kept = i128::try_from(kept).unwrap_or(i128::MAX);
        let now = Timestamp::now().micros();
        let known = self.known();
        let changes = known.changes.iter();
        let in_time = changes.filter(|(_, at)| i128::from(now.saturating_sub(at.micros())) < kept);
        (known.store, in_time.map(|(call, _)| *call).collect())
    }

    fn note(&self, call: CallId, at: Timestamp) {
        self.known().note(call, at);
        self.is_changed.store(true, Ordering::Release);
    }

    pub(super) fn is_missing(&self) -> bool {
        self.mismatch().is_some()
    }

    fn keep(&self) {
        if !self.is_changed.swap(false, Ordering::AcqRel) {
            return;
        }
        let kept = Kept::from(&*self.known());
        if let Err(error) = self.state.write_json(&self.fact, &kept) {
            self.is_changed.store(true, Ordering::Release);
            tracing::warn!(
                error = chain(&error),
                "cannot store the newest acknowledged changes in the state directory; the broker keeps these changes in memory"
            );
        }
    }

    /// Reads and parses the state file.
    fn kept(&self) -> Result<Option<Known>, Error> {
        let kept = read_fact(&self.state, &self.fact).map_err(Unusable::State)?;
        let Some(kept) = kept else {
            return Ok(None);
        };
        let path = self.state.path().join(&self.fact);
        let known = Known::read(&kept).ok_or(Unusable::Damaged(path))?;
        Ok(Some(known))
    }

    /// Loads the identity and the changes that the previous run stored. If the previous run was killed, the audit log
    /// contains newer changes than the state file.
    fn take_over(&self, logged: &[Change]) -> Result<(), Error> {
        let mut known = self.kept()?.unwrap_or_default();
        let accepted = known.accepted;
        // Only changes of records and of API clients leave a mark in the database.
        let marked = |change: &&Change| {
            ["user_key.", "client_credential."]
                .iter()
                .any(|kind| change.action.starts_with(kind))
        };
        for change in logged.iter().filter(marked) {
            if accepted.is_none_or(|accepted| change.at > accepted) {
                known.note(change.call, change.at);
            }
        }
        *self.known() = known;
        self.is_changed.store(true, Ordering::Release);
        Ok(())
    }

    /// Applies an acceptance that an operator gave while the database was refused.
    fn take_over_acceptance(&self) {
        let Ok(Some(kept)) = self.kept() else {
            return;
        };
        let mut known = self.known();
        if kept.accepted > known.accepted {
            tracing::warn!("an operator accepted the database in its current state");
            *known = kept;
        }
    }
}

/// The reason why the state file cannot be used.
#[derive(Debug, thiserror::Error)]
enum Unusable {
    #[error("{cause}; {remedy}", cause = chain(.0), remedy = UNNOTICED)]
    State(#[source] state::Error),
    #[error("the state file {path} is damaged; {remedy}", path = .0.display(), remedy = UNNOTICED)]
    Damaged(PathBuf),
}

const UNNOTICED: &str = "without this file, the broker could not detect an earlier state of the database. If the \
                          database is the right one, run `keybroker store accept-restored`";

impl From<Unusable> for Error {
    fn from(unusable: Unusable) -> Self {
        Self::caused(Reason::StoreDown, unusable)
    }
}

impl Broker {
    /// Loads the changes that the previous run acknowledged, and checks that the database contains their marks.
    pub(super) async fn take_over_acknowledged(&self) -> Result<(), Error> {
        self.acknowledged.take_over(self.audit.changes_before())?;
        self.check_store_identity().await;
        self.acknowledged.keep();
        Ok(())
    }

    /// Remembers a committed change. Returns an error if the change was committed to a database that does not match the
    /// state file.
    pub(super) async fn acknowledge(&self, call: CallId, at: Timestamp) -> Result<(), Error> {
        if matches!(self.compare_store().await, Ok(Some(_))) {
            self.check_store_identity().await;
            self.check_acknowledged()?;
        }
        self.acknowledged.note(call, at);
        Ok(())
    }

    /// Returns an error while the database is refused.
    pub(super) fn check_acknowledged(&self) -> Result<(), Error> {
        match self.acknowledged.mismatch() {
            None => Ok(()),
            Some(mismatch) => {
                Err(Error::new(Reason::StoreDown, mismatch.text()).retry_after(RETRY))
            }
        }
    }

    pub(super) fn keep_acknowledged(&self) {
        self.acknowledged.keep();
    }

    /// Compares the identity and the marks of the database with the state that this broker stored. Returns an error if
    /// the database does not answer.
    async fn compare_store(&self) -> Result<Option<Mismatch>, keybroker_store::Error> {
        let (store, changes) = self.acknowledged.expected();
        let evidence = self.store.evidence(&changes).await?;
        if store.is_some() && evidence.store != store {
            return Ok(Some(Mismatch::OtherStore));
        }
        if evidence.marks < changes.len() {
            return Ok(Some(Mismatch::NoMark));
        }
        if store.is_none()
            && let Some(id) = evidence.store
        {
            self.acknowledged.known().store = Some(id);
            self.acknowledged.is_changed.store(true, Ordering::Release);
        }
        Ok(None)
    }

    /// Compares the identity and the marks of the database with the state that this broker stored, and accepts or
    /// refuses the database.
    pub(super) async fn check_store_identity(&self) {
        let acknowledged = &self.acknowledged;
        let before = acknowledged.mismatch();
        if before.is_some() {
            acknowledged.take_over_acceptance();
        }
        // If the database does not answer, the previous result stays valid.
        let Ok(mismatch) = self.compare_store().await else {
            return;
        };
        if mismatch.is_some() {
            // Writes the state file immediately, because the command that accepts a database reads the state file.
            acknowledged.keep();
        }
        *acknowledged
            .mismatch
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = mismatch;
        match mismatch {
            Some(mismatch) if before.is_none() => keybroker_core::alert!(
                StoreRestored,
                cause = mismatch.text(),
                "the database was replaced by another database, or by an earlier state of this database; no key is \
                 released or changed until the right database is back, or an operator accepts the current database \
                 with `keybroker store accept-restored`"
            ),
            None if before.is_some() => tracing::warn!("the broker accepts the database again"),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{error::Error as _, fs};

    use super::*;

    /// Programs read the cause of the error; people read its text in the log.
    #[test]
    fn a_state_file_that_cannot_be_used_is_the_cause_of_the_refusal() {
        let folder = tempfile::tempdir().unwrap();
        let state = StateDirectory::below(folder.path());
        let path = state.path().join(fact_of("one"));
        fs::create_dir_all(state.path()).unwrap();
        fs::write(&path, "{").unwrap();
        let retention = Duration::from_hours(1);
        let refused = Acknowledged::new(state, "one", retention)
            .kept()
            .unwrap_err();
        assert_eq!(refused.reason(), Reason::StoreDown);
        assert!(refused.detail().contains("accept-restored"), "{refused}");
        let cause = refused.source().unwrap();
        assert!(matches!(cause.downcast_ref(), Some(Unusable::State(_))));
        assert!(
            cause
                .source()
                .is_some_and(<dyn std::error::Error>::is::<state::Error>)
        );
    }
}
