//! The broker's regular work and its health. The broker's regular work probes the store, resolves intents without an
//! outcome, writes counted refusals and deletes old request ids.

use std::{
    sync::{Arc, MutexGuard, PoisonError, atomic::Ordering},
    time::Duration,
};

use tokio_util::sync::CancellationToken;

use keybroker_audit::{OpenIntent, Outcome};
use keybroker_core::{
    call::{CallId, Timestamp},
    error::Error,
    metrics,
};
use keybroker_hsm::Serving;
use keybroker_store as store;
use keybroker_store::REQUEST_KEPT_US;

use super::{Broker, journal::REMOVE_OBJECTS, ticks::Ticks};

const TICK: Duration = Duration::from_secs(1);
/// Pause between two reads of the registry while the workers check a new key.
const UNPROVED_PAUSE: Duration = Duration::from_millis(100);
/// The store is unavailable when it does not answer a probe within this time.
const PING_TIMEOUT: Duration = Duration::from_secs(1);
const TICKS_PER_MINUTE: u64 = 60;
const TICKS_PER_HOUR: u64 = 3_600;

/// The health of the broker's services.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Health {
    /// Whether user keys can be released and changed. The service for user keys requires the token, the store and the
    /// audit log.
    pub user_keys: bool,
    /// Whether the control plane can answer. The control plane requires the audit log.
    pub control: bool,
    /// Description of all problems, for the log and for administrators; empty if there is no
    /// problem. Some problems do not stop the service.
    pub detail: String,
}

/// The result of looking up an intent.
enum Resolved {
    Yes,
    /// A transaction that has not ended may still commit the change.
    UnderWay,
    /// The store or the audit log is unavailable. The other intents are not looked up now, because their lookup would
    /// fail, too.
    Unavailable,
}

impl Broker {
    /// Returns the state of the broker at its last check. The function reads only memory.
    pub fn health(&self) -> Health {
        let mut problems = Vec::new();
        let control = match self.audit.writable() {
            Ok(()) => true,
            Err(error) => {
                problems.push(error.to_string());
                false
            }
        };
        if !self.store_is_up() {
            problems.push(match self.check_acknowledged() {
                Ok(()) => "store: does not answer".to_owned(),
                Err(error) => format!("store: {}", error.detail()),
            });
        }
        let token = self.token.state();
        let registry = self.registry.load_full();
        match token.serving {
            Serving::Up => {
                let problem = match &registry {
                    Some(registry) => {
                        let service = registry.check_service();
                        service.err().map(|why| why.detail().to_owned())
                    }
                    None => Some("the registry of wrapping keys is not verified".to_owned()),
                };
                problems.extend(problem.map(|why| format!("token: {why}")));
            }
            Serving::Down(cause) => problems.push(format!("token: unavailable: {cause}")),
            Serving::Untrusted(cause) => problems.push(format!("token: not trusted: {cause}")),
        }
        let user_keys = problems.is_empty();
        // The notes about the token are risks and warnings, which do not prevent the use of the
        // token.
        let risks = self.accepted_risks.load_full();
        let of_keys = registry.map_or_else(Vec::new, |registry| registry.problems());
        let of_keys = of_keys.into_iter().chain(self.key_age_note());
        let of_keys = of_keys.chain(self.scheduled.notes());
        let notes = token
            .note
            .into_iter()
            .chain(of_keys)
            .chain(risks.iter().cloned());
        problems.extend(notes.map(|note| format!("token: {note}")));
        Health {
            user_keys,
            control,
            detail: problems.join("; "),
        }
    }

    /// Whether the registry was loaded and verified.
    pub fn has_registry(&self) -> bool {
        self.registry.load().is_some()
    }

    /// Runs the regular work until `stop`. Call this function only once per process.
    pub async fn maintain(self: Arc<Self>, stop: CancellationToken) {
        tokio::join!(
            self.maintain_store(&stop),
            self.follow_regularly(&stop),
            self.resolve_regularly(&stop),
            self.record_refusals(&stop),
            self.write_uses(&stop),
            self.rewrap_regularly(&stop),
            self.destroy_regularly(&stop)
        );
    }

    /// Resolves intents in a separate loop, because the wait for a transaction that may still be running takes
    /// seconds.
    async fn resolve_regularly(&self, stop: &CancellationToken) {
        let mut ticks = Ticks::every(TICK, stop);
        while ticks.next().await {
            tokio::select! {
                () = stop.cancelled() => return,
                () = self.resolve_intents() => {}
            }
        }
    }

    /// Writes the counts of refusals in a separate loop, because a hanging database must not delay the counts by more
    /// than a second.
    async fn record_refusals(self: &Arc<Self>, stop: &CancellationToken) {
        let mut ticks = Ticks::every(TICK, stop);
        let mut count: u64 = 0;
        while ticks.next().await {
            if count.is_multiple_of(TICKS_PER_MINUTE) {
                self.flush_refusals().await;
            } else {
                self.keep_refusals().await;
            }
            self.flush_overload().await;
            count += 1;
        }
    }

    async fn maintain_store(self: &Arc<Self>, stop: &CancellationToken) {
        let mut ticks = Ticks::every(TICK, stop);
        let mut count: u64 = 0;
        while ticks.next().await {
            self.probe_store().await;
            if !self.acknowledged.is_missing() {
                self.keep_acknowledged();
            }
            if count.is_multiple_of(TICKS_PER_HOUR) {
                self.forget_requests().await;
                self.forget_approvals().await;
                self.forget_device_rows().await;
            }
            count += 1;
        }
    }

    /// Loads the intents that an earlier run left without an outcome, and resolves them as far as
    /// possible. Returns an error if the data that this instance keeps about its database cannot be
    /// read.
    pub async fn recover(&self, open: Vec<OpenIntent>) -> Result<(), Error> {
        self.take_over_refusals();
        self.take_over_acknowledged().await?;
        for intent in open {
            self.resolve_later(intent);
        }
        self.resolve_intents().await;
        Ok(())
    }

    /// Leaves an intent for the next tick, because its outcome could not be determined or recorded.
    pub(super) fn resolve_later(&self, intent: OpenIntent) {
        self.unresolved().push(intent);
    }

    /// Whether the intent of a call waits for its outcome.
    pub(super) fn is_unresolved(&self, call: CallId) -> bool {
        self.unresolved().iter().any(|open| open.call == call)
    }

    pub(super) async fn resolve_intents(&self) {
        let count = self.unresolved().len();
        for _ in 0..count {
            // The intent stays in the list until it is resolved, because this future may be dropped at any await.
            let Some(intent) = self.unresolved().first().cloned() else {
                return;
            };
            let resolved = self.resolve(&intent).await;
            let mut unresolved = self.unresolved();
            // Other tasks only append intents to the list, so the intent that was just resolved is still the first in
            // the list.
            let intent = unresolved.remove(0);
            match resolved {
                Resolved::Yes => {}
                // The intent is looked up again after the other intents, because the outcome of another intent may be
                // known already.
                Resolved::UnderWay => unresolved.push(intent),
                Resolved::Unavailable => {
                    unresolved.insert(0, intent);
                    return;
                }
            }
        }
    }

    fn unresolved(&self) -> MutexGuard<'_, Vec<OpenIntent>> {
        self.unresolved
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks the store whether an intent was committed, and records the outcome.
    async fn resolve(&self, open: &OpenIntent) -> Resolved {
        if open.intent.action == REMOVE_OBJECTS {
            return self.record_outcome(open, Outcome::Unknown).await;
        }
        let committed = match self.store.committed_by(open.call).await {
            Ok(committed) => committed,
            Err(error) => {
                tracing::warn!(call_id = %open.call, %error, "cannot resolve an open intent; the broker tries again later");
                return match error {
                    store::Error::Down(_) | store::Error::Busy(_) => Resolved::Unavailable,
                    _ => Resolved::UnderWay,
                };
            }
        };
        if let Some(notices) = &self.notices {
            notices.settle(open.call, committed);
        }
        let outcome = if committed {
            Outcome::Ok
        } else {
            Outcome::Failed
        };
        self.record_outcome(open, outcome).await
    }

    async fn record_outcome(&self, open: &OpenIntent, outcome: Outcome) -> Resolved {
        if let Err(error) = self.audit.append(open.recovered(outcome)).await {
            tracing::warn!(
                call_id = %open.call, %error,
                "cannot record the outcome of an open intent; the broker tries again later"
            );
            return Resolved::Unavailable;
        }
        tracing::info!(call_id = %open.call, action = %open.intent.action, ?outcome, "open intent resolved");
        Resolved::Yes
    }

    async fn probe_store(&self) {
        let up = matches!(
            tokio::time::timeout(PING_TIMEOUT, self.store.ping()).await,
            Ok(Ok(()))
        );
        if up {
            self.check_store_identity().await;
        }
        let up = up && !self.acknowledged.is_missing();
        let was_up = self.store_up.swap(up, Ordering::Relaxed);
        if up && !was_up {
            tracing::warn!("the database is available again");
        } else if !up && was_up {
            tracing::warn!("the database is unavailable");
        }
        metrics::STORE_UP.set_flag(up);
    }

    /// Loads changes of the registry in a separate loop, because a key that was just registered
    /// must be used soon.
    async fn follow_regularly(&self, stop: &CancellationToken) {
        loop {
            let pause = if self.has_unproved_key() {
                UNPROVED_PAUSE
            } else {
                TICK
            };
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(pause) => {}
            }
            self.follow_registry().await;
            self.publish_key_age();
        }
    }

    /// Loads changes that other processes made to the registry: commands, or another broker on the
    /// same database.
    async fn follow_registry(&self) {
        if !self.store_is_up() || !self.token.state().serves_a_key() {
            return;
        }
        if let Err(error) = self.refresh_registry().await {
            self.note_unreadable_registry(&error);
        }
        self.remember_registry().await;
    }

    async fn forget_requests(&self) {
        let before = Timestamp::from_micros(Timestamp::now().micros() - REQUEST_KEPT_US);
        match self.store.forget_requests(before).await {
            Ok(count) => tracing::debug!(count, "deleted old request ids"),
            Err(error) => {
                tracing::warn!(%error, "cannot delete old request ids; the broker tries again later");
            }
        }
    }
}
