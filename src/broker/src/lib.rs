//! The use cases, and the only path to a key.
//!
//! ```text
//! authenticate -> Principal -> policy -> record from SQL -> token job: MAC, then RSA -> audit entry durable -> answer
//! ```
//!
//! Every API ends in a method of [`Broker`], which takes the [`Principal`] first. The order is held by types, so that
//! no path can leave a step out: the record is read at the address of a [`KeyPermit`], which only [`keybroker_policy`]
//! makes; a [`Released`] key is made of a `Recorded` one, which only `journal` makes of the key and its own entry once
//! the audit log has synced it.
//!
//! A release writes one entry. A mutation writes an intent before the commit and an outcome before the answer; it
//! runs in a separate task, so that a caller that ends its call cannot stop it between the two.
//!
//! Mitigation: M5 of `THREAT_MODEL.md`.

use std::{
    net::IpAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use arc_swap::ArcSwapOption;
use tokio_util::task::TaskTracker;

use crate::limits::Limits;
use keybroker_audit::{AuditLog, OpenIntent};
use keybroker_core::{
    call::{Call, Deadline, outside_time},
    error::{Error, Reason},
    key::{KeyAddress, KeyName, UserId},
    metrics,
    principal::{Action, Principal},
    state::StateDirectory,
};
use keybroker_hsm::{Caller, Token};
use keybroker_policy::{Denied, KeyPermit, Permit, Policy, Question, Resource};
use keybroker_store::Store;

pub mod acknowledged;
mod change;
mod clients;
mod commit;
mod control;
mod damage;
mod journal;
pub mod limits;
mod maintenance;
mod mutation;
mod overload;
mod plan;
mod reading;
mod refusals;
mod registry;
mod release;
mod request;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod ticks;
mod uses;

pub use clients::{ClientPage, ClientRules, ClientView, CreatedSecret, Hash, NewClient};
pub use control::{KeyOnToken, WrappingKeyView};
pub use keybroker_hsm::{Serving, TokenInfo, TokenState, WorkerInfo};
pub use keybroker_store::{
    Damage, DamagedClient, DamagedRecord, Position, RecordInfo, RecordState, SKIPPED_MAX,
};
pub use maintenance::Health;
pub use reading::{ListPage, ListRequest, PageRow, RecordView};
pub use release::Released;

use acknowledged::Acknowledged;
use clients::ClientUses;
use overload::Overload;
use refusals::Refusals;
use registry::Registry;
use uses::Uses;

/// Which of whose keys, within the principal's tenant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UserKeyRef {
    /// The user.
    pub user: UserId,
    /// Which of the user's keys.
    pub name: KeyName,
}

impl UserKeyRef {
    fn address(&self, principal: &Principal) -> KeyAddress {
        KeyAddress {
            tenant: principal.tenant().clone(),
            user: self.user.clone(),
            name: self.name.clone(),
        }
    }

    fn resource<'a>(&'a self, principal: &'a Principal) -> Resource<'a> {
        Resource::UserKey {
            tenant: principal.tenant(),
            user: &self.user,
            name: &self.name,
        }
    }
}

/// What a broker is made of.
#[derive(Debug)]
pub struct Parts {
    /// What decides.
    pub policy: Arc<Policy>,
    /// Where decisions are recorded.
    pub audit: AuditLog,
    /// Where wrapped keys are kept.
    pub store: Arc<dyn Store>,
    /// Where keys are unwrapped.
    pub token: Arc<dyn Token>,
    /// What callers have left of their limits.
    pub limits: Arc<Limits>,
    /// What may be given to API clients.
    pub client_rules: ClientRules,
    /// What this instance remembers across restarts.
    pub state: StateDirectory,
    /// Name of this instance among the brokers that share the state directory.
    pub instance: String,
    /// How long the database keeps the marks of changes at least.
    pub retention: Duration,
    /// Limits on what is stored for one user.
    pub capacity: Capacity,
    /// Risks of the token that its settings accept, for the health details, each as a sentence without its end.
    pub accepted_risks: Vec<String>,
}

/// Limits on what is stored for one user. Concurrent calls can exceed a limit by one each.
#[derive(Clone, Copy, Debug)]
pub struct Capacity {
    /// Revisions of a record, superseded ones included: `store.revisions_max`.
    pub revisions_max: u32,
    /// Keys of a user, deleted ones included: `store.keys_per_user_max`.
    pub keys_per_user_max: u32,
}

/// The use cases over one store, one token and one audit log.
#[derive(Debug)]
pub struct Broker {
    policy: Arc<Policy>,
    audit: AuditLog,
    store: Arc<dyn Store>,
    token: Arc<dyn Token>,
    limits: Arc<Limits>,
    /// Absent until every row's MAC was verified on the token; without it nothing is wrapped or unwrapped.
    registry: ArcSwapOption<Registry>,
    /// Held while it is updated.
    registry_refresh: tokio::sync::Mutex<()>,
    /// The problem of the registry at its last check.
    registry_complaint: Mutex<Option<String>>,
    refusals: Refusals,
    overload: Overload,
    uses: Uses,
    client_rules: ClientRules,
    client_uses: ClientUses,
    acknowledged: Acknowledged,
    capacity: Capacity,
    accepted_risks: Vec<String>,
    /// Grows with each change of an API client through this broker.
    clients_generation: AtomicU64,
    store_up: AtomicBool,
    /// Mutations under way, which outlive their callers.
    mutations: TaskTracker,
    /// Intents of which it is not known yet whether the store committed them.
    unresolved: Mutex<Vec<OpenIntent>>,
}

impl Broker {
    /// A broker that refuses every release until [`Broker::load_registry`] has succeeded.
    pub fn new(parts: Parts) -> Arc<Self> {
        Arc::new(Self {
            policy: parts.policy,
            audit: parts.audit,
            store: parts.store,
            token: parts.token,
            limits: parts.limits,
            registry: ArcSwapOption::empty(),
            registry_refresh: tokio::sync::Mutex::default(),
            registry_complaint: Mutex::default(),
            capacity: parts.capacity,
            accepted_risks: parts.accepted_risks,
            acknowledged: Acknowledged::new(parts.state.clone(), &parts.instance, parts.retention),
            refusals: Refusals::new(parts.state, &parts.instance),
            overload: Overload::default(),
            uses: Uses::default(),
            client_rules: parts.client_rules,
            client_uses: ClientUses::default(),
            clients_generation: AtomicU64::new(0),
            store_up: AtomicBool::new(true),
            mutations: TaskTracker::new(),
            unresolved: Mutex::default(),
        })
    }

    /// Whether a log line that an unauthenticated caller of that address causes may be written.
    pub fn may_log(&self, address: IpAddr) -> bool {
        self.limits.may_log(address)
    }

    /// Waits until every mutation under way has its outcome on disk, and writes what refusals were counted and what
    /// was used. Called once the listeners are closed.
    pub async fn finish(self: &Arc<Self>, deadline: Deadline) {
        self.mutations.close();
        if tokio::time::timeout(deadline.remaining(), self.mutations.wait())
            .await
            .is_err()
        {
            tracing::error!(
                mutations = self.mutations.len(),
                "mutations still under way at the end of the drain; the next start resolves their intents"
            );
        }
        self.flush_refusals().await;
        self.flush_overload().await;
        self.keep_acknowledged();
        let uses = async {
            self.flush_uses(usize::MAX).await;
            self.flush_client_uses().await;
        };
        if tokio::time::timeout(deadline.remaining(), uses)
            .await
            .is_err()
        {
            tracing::warn!("the last uses of some records were not written");
        }
    }

    /// Records that a call of an authenticated principal ended in the API, because it did not parse or had to wait
    /// for too long, and hands the error back. An unavailable audit log takes precedence, as everywhere.
    pub async fn unserved(
        &self,
        principal: &Principal,
        call: &Call,
        action: Action,
        error: Error,
    ) -> Error {
        let started = Instant::now();
        let entry = journal::Draft::new(principal, call, action);
        let error = match self.record_failure(entry, &error).await {
            Ok(()) => error,
            Err(audit) => audit,
        };
        observe(
            action,
            call,
            started.elapsed(),
            &Err::<(), _>(error.clone()),
        );
        error
    }

    /// Whether a principal may do so with any of the keys: for calls of many parts, each of which is decided again. A principal
    /// that may do so with none of them gets one refusal, which costs one entry.
    pub async fn admit(
        &self,
        principal: &Principal,
        call: &Call,
        action: Action,
        keys: &[UserKeyRef],
    ) -> Result<(), Error> {
        let started = Instant::now();
        // The call itself was counted when it came.
        if let Err(over) = self
            .limits
            .take_calls(principal, keys.len().saturating_sub(1))
        {
            return Err(self.unserved(principal, call, action, over).await);
        }
        let mut refusal = None;
        for key in keys {
            match self.ask(principal, call, action, key.resource(principal)) {
                Ok(_) => return Ok(()),
                Err(denied) => refusal = refusal.or(Some(denied)),
            }
        }
        // Without a key there is nothing to decide, and nothing to release either.
        let Some(denied) = refusal else { return Ok(()) };
        let draft = journal::Draft::new(principal, call, action);
        let refused = Err(self.refuse(draft, &denied).await);
        observe(action, call, started.elapsed(), &refused);
        refused
    }

    /// Asks policy, and records a refusal.
    async fn permit(
        &self,
        principal: &Principal,
        call: &Call,
        action: Action,
        resource: Resource<'_>,
    ) -> Result<Permit, Error> {
        match self.ask(principal, call, action, resource) {
            Ok(permit) => Ok(permit),
            Err(denied) => {
                let draft = journal::Draft::of(principal, call, action, resource);
                Err(self.refuse(draft, &denied).await)
            }
        }
    }

    /// Asks policy about one user key, and records a refusal. What follows takes the address from the permit.
    async fn permit_key(
        &self,
        principal: &Principal,
        call: &Call,
        action: Action,
        key: &UserKeyRef,
    ) -> Result<KeyPermit, Error> {
        let asked = self
            .policy
            .decide_key(principal, call, action, key.address(principal));
        match asked {
            Ok(permit) => Ok(permit),
            Err(denied) => {
                let draft = journal::Draft::of(principal, call, action, key.resource(principal));
                Err(self.refuse(draft, &denied).await)
            }
        }
    }

    fn ask(
        &self,
        principal: &Principal,
        call: &Call,
        action: Action,
        resource: Resource<'_>,
    ) -> Result<Permit, Denied> {
        self.policy.decide(&Question {
            principal,
            action,
            resource,
            call,
        })
    }

    /// Records a refusal; an unavailable audit log takes precedence.
    async fn refuse(&self, mut draft: journal::Draft, denied: &Denied) -> Error {
        draft.policy(denied.policy());
        let error = Error::new(Reason::Policy, format!("denied by {}", denied.policy()));
        match self.record_failure(draft, &error).await {
            Ok(()) => error,
            Err(audit) => audit,
        }
    }

    fn store_is_up(&self) -> bool {
        // Another database than the known one is found at the start, before the first probe.
        self.store_up.load(Ordering::Relaxed) && !self.acknowledged.is_missing()
    }
}

/// Runs a use case under the call's deadline, counts it and writes the log line that the call id finds.
async fn observed<T>(
    action: Action,
    call: &Call,
    work: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    let started = Instant::now();
    let (result, outside) = outside_time::measured(work).await;
    let total = started.elapsed();
    if action == Action::Unwrap && result.is_ok() {
        // One job on the token: what is left is the broker's own.
        metrics::CALL_OVERHEAD
            .handle()
            .record(total.saturating_sub(outside));
    }
    observe(action, call, total, &result);
    result
}

fn observe<T>(action: Action, call: &Call, total: Duration, result: &Result<T, Error>) {
    let reason = match result {
        Ok(_) => "OK",
        Err(error) => error.reason().as_str(),
    };
    metrics::CALLS.with([action.as_str(), reason]).increment(1);
    metrics::CALL_DURATION.with([action.as_str()]).record(total);
    let Err(error) = result else { return };
    match error.reason() {
        Reason::RecordDamaged => {
            metrics::RECORDS_DAMAGED.increment();
            keybroker_core::alert!(
                RecordDamaged, call_id = %call.id, action = %action, error = %error,
                "a stored record does not verify; compare it with a backup before you replace it"
            );
        }
        Reason::Bug => {
            keybroker_core::alert!(Bug, call_id = %call.id, action = %action, error = %error, "internal error");
        }
        // Counted, with a line for each principal and second.
        Reason::QueueFull => {
            tracing::debug!(call_id = %call.id, action = %action, error = %error, "call refused");
        }
        _ => tracing::info!(call_id = %call.id, action = %action, error = %error, "call failed"),
    }
}

/// For whom the token works: the jobs of each principal wait in a separate queue.
fn caller(principal: &Principal, call: &Call) -> Caller {
    Caller::principal(principal.name(), call.deadline)
}

/// The result of a store or token call, or `DEADLINE` when the call's time is up first.
async fn within<T, E>(call: &Call, work: impl Future<Output = Result<T, E>>) -> Result<T, Error>
where
    Error: From<E>,
{
    match tokio::time::timeout_at(call.deadline.instant().into(), work).await {
        Ok(result) => result.map_err(Error::from),
        Err(_) => Err(Error::new(
            Reason::Deadline,
            "deadline passed while waiting for the store or the token",
        )),
    }
}

/// A task of the broker panicked or was cancelled.
#[derive(Debug, thiserror::Error)]
#[error("the task of {work} failed")]
struct TaskFailed {
    work: &'static str,
    source: tokio::task::JoinError,
}

impl TaskFailed {
    fn of(work: &'static str, source: tokio::task::JoinError) -> Error {
        Error::caused(Reason::Bug, Self { work, source })
    }
}

/// How long a caller should wait for a broker that is starting.
const START_RETRY: Duration = Duration::from_secs(1);
