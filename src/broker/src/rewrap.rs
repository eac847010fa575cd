//! Re-wrap: moves all rows from the wrapping keys that no longer wrap to the wrapping key that wraps new user keys.
//!
//! An administrator requests a run, and the database stores the request. Every broker on the database looks for a run
//! once a second, and one broker acquires its lease. The holder of the lease reads rows page by page and lets the token
//! re-wrap each row. The holder replaces an envelope only if the stored bytes have not changed since they were read.
//! The rows themselves show the progress: a row under an old wrapping key must still be moved. Therefore a run can be
//! interrupted at any moment, and a broker continues it later. Two brokers that both assume that they have the lease
//! never move a row twice.
//!
//! The target of a run is always the wrapping key that wraps new user keys, and is never read from the database.
//!
//! Mitigation: M22 of `THREAT_MODEL.md`.

use std::{sync::Arc, time::Duration};

use keybroker_core::{
    call::{Call, Timestamp},
    error::{Error, Reason},
    key::{ID_BYTES, KeyUse, Purpose, WrappingKeyId, WrappingKeyState},
    principal::{Action, Principal},
};
use keybroker_policy::Resource;
use keybroker_store as store;
use keybroker_store::{KeyUses, RunId, RunRow, RunState};

use super::{Broker, commit::Settled, journal::Draft, registry::Registry, within};

mod batch;
mod clients;
mod devices;
pub mod listed;
mod pace;
mod progress;
mod revisions;
mod run;
mod verify;

pub(crate) use batch::background;
use listed::Listed;
pub(crate) use pace::Pace;
pub use progress::{FailedRow, Phase, Progress};
pub(crate) use revisions::{context_of, envelope_of};

/// Time limit for reading the changed run again, if the rows could not be counted within the
/// deadline of the call.
const VIEW_TIMEOUT: Duration = Duration::from_secs(1);

/// What an administrator requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NewRun {
    /// The wrapping key whose rows are moved; `None` for all wrapping keys other than the target.
    pub source: Option<WrappingKeyId>,
    /// Highest number of rows per second; 0 for no limit.
    pub rate: u32,
    /// Whether the source is a compromised wrapping key, from which only listed rows are moved.
    pub from_compromised: bool,
}

/// The run that was requested last, and the number of rows under each wrapping key.
#[derive(Clone, Debug)]
pub struct RewrapView {
    /// The run; `None` if no run was ever requested.
    pub run: Option<RunView>,
    /// The wrapping key to which rows are moved; `None` if no wrapping key is active.
    pub target: Option<WrappingKeyId>,
    /// Number of rows under each registered wrapping key, in the order of the registry.
    pub uses: Vec<(WrappingKeyId, KeyUses)>,
}

impl RewrapView {
    /// Returns the number of revisions, API clients and devices that the run must still move, including failed rows.
    pub fn left(&self) -> u64 {
        let source = self.run.as_ref().and_then(|run| run.source);
        self.uses
            .iter()
            .filter(|(key, _)| Some(*key) != self.target)
            .filter(|(key, _)| source.is_none_or(|source| source == *key))
            .map(|(_, uses)| uses.revisions + uses.clients + uses.devices)
            .sum()
    }
}

/// The properties of a run that administrators can see.
#[derive(Clone, Debug)]
pub struct RunView {
    /// Whether the run is running, paused or done.
    pub state: RunState,
    /// The wrapping key whose rows are moved; `None` for all wrapping keys other than the target.
    pub source: Option<WrappingKeyId>,
    /// Highest number of rows per second; 0 for no limit.
    pub rate: u32,
    /// Time at which the run was requested.
    pub started: Timestamp,
    /// The broker instance that moves rows; empty before the first instance begins.
    pub holder: String,
    /// The progress that the holder last stored.
    pub progress: Progress,
}

impl From<RunRow> for RunView {
    fn from(row: RunRow) -> Self {
        Self {
            state: row.state,
            source: row.source,
            rate: row.rate,
            started: row.started,
            progress: Progress::read(&row.document),
            holder: row.holder,
        }
    }
}

/// The answer to a request for a change of the run.
#[derive(Clone, Debug)]
pub struct ChangedRun {
    /// The run after the request.
    pub view: RewrapView,
    /// Whether the request changed anything.
    pub is_changed: bool,
}

/// A change of the run that an administrator requests.
#[derive(Clone, Copy, Debug)]
enum Request {
    Start(NewRun),
    Pause,
    Resume { rate: Option<u32> },
}

impl Broker {
    /// Requests a run. If the last run has not ended, the request changes nothing.
    pub async fn start_rewrap(
        self: &Arc<Self>,
        principal: &Principal,
        call: &Call,
        new: NewRun,
    ) -> Result<ChangedRun, Error> {
        self.change_run(principal, call, Request::Start(new)).await
    }

    /// Pauses the run. If no run is running, the request changes nothing.
    pub async fn pause_rewrap(
        self: &Arc<Self>,
        principal: &Principal,
        call: &Call,
    ) -> Result<ChangedRun, Error> {
        self.change_run(principal, call, Request::Pause).await
    }

    /// Resumes a paused run, with another rate if `rate` is present. If no run is paused, the request changes nothing.
    pub async fn resume_rewrap(
        self: &Arc<Self>,
        principal: &Principal,
        call: &Call,
        rate: Option<u32>,
    ) -> Result<ChangedRun, Error> {
        self.change_run(principal, call, Request::Resume { rate })
            .await
    }

    /// Returns the run that was requested last, and the number of rows under each wrapping key.
    pub async fn rewrap(&self, principal: &Principal, call: &Call) -> Result<RewrapView, Error> {
        let view = Box::pin(self.view(call));
        self.read_async(principal, call, Action::ReadWrappingKeys, view)
            .await
    }

    async fn change_run(
        self: &Arc<Self>,
        principal: &Principal,
        call: &Call,
        request: Request,
    ) -> Result<ChangedRun, Error> {
        let (broker, principal, call) = (Arc::clone(self), principal.clone(), call.clone());
        self.run_change(Action::Rewrap, call.clone(), async move {
            broker.change_run_now(&principal, &call, request).await
        })
        .await
    }

    async fn change_run_now(
        &self,
        principal: &Principal,
        call: &Call,
        request: Request,
    ) -> Result<ChangedRun, Error> {
        let permit = self
            .permit(principal, call, Action::Rewrap, Resource::Broker)
            .await?;
        let mut draft = Draft::new(principal, call, Action::Rewrap);
        draft.policy(permit.policy());
        let prepared = self.prepare_run(principal, call, request, &mut draft).await;
        let change = match prepared {
            Ok(change) => change,
            Err(error) => {
                self.record_failure(draft, &error).await?;
                return Err(error);
            }
        };
        let is_changed = if let Some(change) = change {
            self.commit_run(call, &draft, change).await?
        } else {
            self.conclude(draft, Ok(())).await?;
            false
        };
        let view = match self.view(call).await {
            Ok(view) => view,
            // The change is committed, so a failed count of rows must not turn the answer into an
            // error.
            Err(error) if is_changed => {
                tracing::warn!(%error, "the rows under each wrapping key could not be counted in time");
                let found = tokio::time::timeout(VIEW_TIMEOUT, self.store.rewrap_run()).await;
                let run = found.ok().and_then(Result::ok).flatten();
                RewrapView {
                    run: run.map(RunView::from),
                    target: self.registry()?.wrapping_key().ok(),
                    uses: Vec::new(),
                }
            }
            Err(error) => return Err(error),
        };
        Ok(ChangedRun { view, is_changed })
    }

    /// Returns the change that the request causes, or `None` if the request does not change the run.
    async fn prepare_run(
        &self,
        principal: &Principal,
        call: &Call,
        request: Request,
        draft: &mut Draft,
    ) -> Result<Option<Change>, Error> {
        call.deadline.check()?;
        self.check_acknowledged()?;
        let registry = self.registry()?;
        if let Request::Start(new) = &request {
            let target = registry.wrapping_key()?;
            draft.wrapping_key(target);
            check_source(&registry, target, new)?;
            if let Some(source) = new.source.filter(|_| new.from_compromised) {
                self.listed(source)?;
            }
        }
        let now = within(call, self.store.rewrap_run()).await?;
        let change = match (request, now) {
            (Request::Start(new), now)
                if now.as_ref().is_none_or(|run| run.state == RunState::Done) =>
            {
                Some(Change::Start(new_run(principal, new)?))
            }
            (Request::Pause, Some(run)) if run.state == RunState::Running => Some(Change::State {
                run: run.id,
                from: RunState::Running,
                to: RunState::Paused,
                rate: None,
            }),
            (Request::Resume { rate }, Some(run)) if run.state == RunState::Paused => {
                Some(Change::State {
                    run: run.id,
                    from: RunState::Paused,
                    to: RunState::Running,
                    rate,
                })
            }
            _ => None,
        };
        Ok(change)
    }

    /// Commits a change of the run. Returns `false` if another administrator changed the run first.
    async fn commit_run(&self, call: &Call, draft: &Draft, change: Change) -> Result<bool, Error> {
        let commit = async {
            match &change {
                Change::Start(run) => self.store.start_rewrap(run, call.id).await,
                Change::State {
                    run,
                    from,
                    to,
                    rate,
                } => {
                    self.store
                        .change_rewrap(*run, *from, *to, *rate, call.id)
                        .await
                }
            }
        };
        let settled = self
            .commit_with_intent(draft, Timestamp::now(), commit)
            .await?;
        let Settled { intent, result } = settled;
        let result = result.map_err(|error| match error {
            store::Error::Conflict => Error::new(
                Reason::Revision,
                "another call changed the re-wrap at the same time",
            ),
            other => other.into(),
        });
        self.close_intent(intent, draft, result)
            .await
            .map(|()| true)
    }

    /// The rows that may be moved from a compromised wrapping key.
    fn listed(&self, source: WrappingKeyId) -> Result<Listed, Error> {
        let found = Listed::read(&self.state, source);
        let found = found.map_err(|error| Error::caused(Reason::KeyState, error))?;
        found.ok_or_else(|| {
            let what = format!(
                "no rows under the compromised key {source} are listed on the host of this broker: run `keybroker audit envelopes \
                 --wrapping-key {source}` there"
            );
            Error::new(Reason::KeyState, what.clone()).explained("source_wrapping_key_id", &what)
        })
    }

    async fn view(&self, call: &Call) -> Result<RewrapView, Error> {
        let registry = self.registry()?;
        let run = within(call, self.store.rewrap_run()).await?;
        let mut uses = Vec::new();
        for (row, _) in registry.rows() {
            uses.push((row.id, within(call, self.store.key_uses(row.id)).await?));
        }
        Ok(RewrapView {
            run: run.map(RunView::from),
            target: registry.wrapping_key().ok(),
            uses,
        })
    }
}

/// A change of the run.
enum Change {
    Start(RunRow),
    State {
        run: RunId,
        from: RunState,
        to: RunState,
        rate: Option<u32>,
    },
}

fn new_run(principal: &Principal, new: NewRun) -> Result<RunRow, Error> {
    let mut id = [0; ID_BYTES];
    aws_lc_rs::rand::fill(&mut id).map_err(|_| Error::new(Reason::Bug, "no random bytes"))?;
    let progress = Progress {
        requested_by: principal.name().to_owned(),
        from_compromised: new.from_compromised,
        ..Progress::default()
    };
    Ok(RunRow {
        id: RunId::from_bytes(id),
        state: RunState::Running,
        rate: new.rate,
        source: new.source,
        document: progress.to_bytes(),
        holder: String::new(),
        lease: Timestamp::from_micros(0),
        started: Timestamp::now(),
    })
}

/// Returns an error if rows cannot be moved from this source.
fn check_source(registry: &Registry, target: WrappingKeyId, new: &NewRun) -> Result<(), Error> {
    let Some(source) = new.source else {
        return Ok(());
    };
    if is_unsealing(registry, source, target) {
        let what = "a plain wrapping key, because the key in use is plain; user keys are never moved from a sealed to a plain wrapping key";
        return Err(Error::violation("source_wrapping_key_id", what));
    }
    if source == target {
        let what = "the id of a wrapping key that does not wrap new user keys";
        return Err(Error::violation("source_wrapping_key_id", what));
    }
    if !registry.knows(source) {
        let what = "the id of a registered wrapping key";
        return Err(Error::violation("source_wrapping_key_id", what));
    }
    if !new.from_compromised {
        return Ok(registry.check(source, KeyUse::RewrapFrom)?);
    }
    let is_compromised = registry
        .row(source)
        .is_some_and(|row| row.state == WrappingKeyState::Compromised);
    if !is_compromised {
        let what = "unset, because the source wrapping key is not compromised";
        return Err(Error::violation("from_compromised", what));
    }
    Ok(registry.check(source, KeyUse::RewrapListed)?)
}

/// Whether a move would take user keys from a sealed to a plain wrapping key, so that they could be released in plain text.
fn is_unsealing(registry: &Registry, source: WrappingKeyId, target: WrappingKeyId) -> bool {
    let is_sealed = |id| {
        let row = registry.row(id);
        row.is_some_and(|row| row.purpose == Purpose::Sealed)
    };
    is_sealed(source) && !is_sealed(target)
}

/// Returns the wrapping keys from which a run moves rows. A run does not move rows whose wrapping key cannot be used at
/// present or has a state that forbids a re-wrap, and no rows from a sealed to a plain wrapping key.
fn sources(
    registry: &Registry,
    target: WrappingKeyId,
    only: Option<WrappingKeyId>,
    source: KeyUse,
) -> Vec<WrappingKeyId> {
    registry
        .rows()
        .filter(|(row, problem)| problem.is_none() && row.state.allows(source))
        .filter(|(row, _)| row.id != target && !is_unsealing(registry, row.id, target))
        .filter(|(row, _)| only.is_none_or(|only| only == row.id))
        .map(|(row, _)| row.id)
        .collect()
}
