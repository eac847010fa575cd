//! The use cases of the broker. A call can reach a user key only through this crate.
//!
//! ```text
//! authenticate -> Principal -> policy -> record from SQL -> token job: MAC, then RSA -> audit entry durable -> answer
//! ```
//!
//! Every API calls the methods of [`Broker`]. The first argument of each use case is the [`Principal`]. The types
//! enforce the order of the steps, so that no code path can leave out a step:
//!
//! - Reading a record needs a [`KeyPermit`], which contains the address of the record. Only
//!   [`keybroker_policy`] creates a permit.
//!
//! - A [`Released`] key is made only from a `Recorded` key. Only `journal` creates a `Recorded` key, from a key and its
//!   audit entry, after the audit log has synced this entry.
//!
//! A release writes one audit entry. A mutation writes an intent before the commit and an outcome
//! before the answer. A mutation runs in a separate task. Therefore a cancelled call cannot stop
//! its mutation between the two entries.
//!
//! Mitigation: M5 of `THREAT_MODEL.md`.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use arc_swap::{ArcSwap, ArcSwapOption};
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
use keybroker_hsm::{Caller, Calls, Token};
use keybroker_policy::{Denied, KeyPermit, Permit, Policy, Question, Release, Resource};
use keybroker_store::Store;

pub mod acknowledged;
mod admission;
mod approval;
mod change;
mod clients;
mod commit;
mod control;
mod damage;
mod devices;
mod digests;
mod journal;
mod key_change;
pub mod limits;
mod maintenance;
mod mutation;
mod notices;
mod overload;
mod plan;
mod reading;
mod refusals;
mod registry;
mod release;
mod request;
pub mod rewrap;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod ticks;
mod uses;

pub use approval::{ApprovalList, ApprovalRules, ApprovalView, Decided, Person, Removal, Verdict};
pub use clients::{ClientPage, ClientRules, ClientView, CreatedSecret, Hash, NewClient};
pub use control::{KeyOnToken, WrappingKeyView};
pub use devices::{
    AccessAnswer, AccessDenial, AccessList, AccessPage, AccessView, AdministratorApproval,
    DeviceApproval, DeviceList, DeviceRotation, DeviceRules, DeviceView, NewAccessRequest,
    NewDevice, PhraseView, RotatedDevice, Untrusted, Which,
};
pub use key_change::{ConfiguredTokens, KeyChange, Rotated, Rotation, Wait};
pub use keybroker_hsm::{
    Recipient, RecipientError, RecipientKey, Serving, TokenInfo, TokenState, WorkerInfo,
};
pub use keybroker_policy::Release as ReleaseForm;
pub use keybroker_store::{
    ACCESS_REQUESTS_LISTED_MAX, AccessCursor, AccessRow, Answer, ApprovalRow, Damage,
    DamagedAccess, DamagedApproval, DamagedClient, DamagedDevice, DamagedRecord, DeviceRow,
    KeyUses, Position, RecordInfo, RecordState, RunState, SKIPPED_MAX, SealedKeys,
};
pub use maintenance::Health;
pub use notices::{MemberSemaphores, Notice, NoticeDevice, NoticeEvent, NoticeQueue, QueuedNotice};
pub use reading::{ListPage, ListRequest, PageRow, RecordView};
pub use registry::Expect;
pub use release::{Released, SealedUserKey};

use acknowledged::Acknowledged;
use approval::Approvals;
use clients::ClientUses;
use key_change::{KeyAge, KeyChanges, Scheduled};
use overload::Overload;
use refusals::Refusals;
use registry::{LoggedProblems, Registry, memory::RegistryMemory};
use uses::Uses;

/// Identifies a user key within the principal's tenant by its user and its key name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UserKeyRef {
    /// The user.
    pub user: UserId,
    /// The key name, which distinguishes several keys of one user.
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

/// The components from which a broker is built.
#[derive(Debug)]
pub struct Parts {
    /// The policy that permits or denies each action.
    pub policy: Arc<Policy>,
    /// The audit log that records each decision.
    pub audit: AuditLog,
    /// The store with the wrapped keys.
    pub store: Arc<dyn Store>,
    /// The token that wraps and unwraps keys.
    pub token: Arc<dyn Token>,
    /// The call rates and failure limits of the callers.
    pub limits: Arc<Limits>,
    /// Weights of principals in the queue of the token, by the principal's name: `token.weights`.
    pub weights: BTreeMap<String, u32>,
    /// The settings of API clients, including the roles that they may be given.
    pub client_rules: ClientRules,
    /// The directory for the data of this instance that must survive a restart.
    pub state: StateDirectory,
    /// Name of this instance among the brokers that share the state directory.
    pub instance: String,
    /// The shortest time for which the database keeps the marks of changes.
    pub retention: Duration,
    /// Limits on the data that is stored for one user.
    pub capacity: Capacity,
    /// The rule that determines which keys must be on each token.
    pub expect: Expect,
    /// Starts the short-lived admin workers that make, find and remove wrapping keys on the configured tokens.
    pub configured: ConfiguredTokens,
    /// The age after which a wrapping key must be rotated: `wrapping_keys.rotate_after_days`; `None` for no limit.
    pub rotate_after: Option<Duration>,
    /// The shortest waiting time in days before a wrapping key is destroyed: `wrapping_keys.destroy_after_days`.
    pub destroy_after_days: u32,
    /// Which changes need the approval of a second person.
    pub approvals: ApprovalRules,
    /// Whether user keys are wrapped only under sealed wrapping keys and released only to recipients: `release.sealed_only`.
    pub sealed_only: bool,
    /// The limits and lifetimes of devices and requests for access.
    pub devices: DeviceRules,
    /// The queue of notices to members; `None` without a receiver of notices.
    pub notices: Option<NoticeQueue>,
    /// The risks that the token's settings accept, for the details of the broker's health. Each risk is a sentence
    /// without a full stop.
    pub accepted_risks: Vec<String>,
}

/// Limits on the data that is stored for one user. If several calls run concurrently, each of them can exceed a limit
/// by one.
#[derive(Clone, Copy, Debug)]
pub struct Capacity {
    /// Largest number of revisions of a record, including superseded revisions: `store.revisions_max`.
    pub revisions_max: u32,
    /// Largest number of keys of a user, including deleted keys: `store.keys_per_user_max`.
    pub keys_per_user_max: u32,
}

/// The use cases of a broker with one store, one token and one audit log.
#[derive(Debug)]
pub struct Broker {
    policy: Arc<Policy>,
    audit: AuditLog,
    store: Arc<dyn Store>,
    token: Arc<dyn Token>,
    limits: Arc<Limits>,
    /// The releases that are in progress in the front.
    calls: Calls,
    /// The verified registry, or `None` until the token has verified the MAC of every row. Without a verified registry,
    /// the broker wraps and unwraps nothing.
    registry: ArcSwapOption<Registry>,
    /// A lock that is held while the registry is updated.
    registry_refresh: tokio::sync::Mutex<()>,
    /// The problems of the registry that were logged last.
    logged_problems: Mutex<LoggedProblems>,
    /// The directory in which this instance keeps facts across restarts.
    state: StateDirectory,
    /// What this instance remembers about the registry.
    registry_memory: RegistryMemory,
    /// The changes of wrapping keys that this broker makes.
    key_changes: KeyChanges,
    configured: ConfiguredTokens,
    expect: Expect,
    key_age: KeyAge,
    scheduled: Scheduled,
    approvals: Approvals,
    device_rules: DeviceRules,
    notices: Option<NoticeQueue>,
    refusals: Refusals,
    overload: Overload,
    uses: Uses,
    client_rules: ClientRules,
    client_uses: ClientUses,
    acknowledged: Acknowledged,
    capacity: Capacity,
    sealed_only: bool,
    accepted_risks: ArcSwap<Vec<String>>,
    /// Counter that is incremented with each change of an API client through this broker.
    clients_generation: AtomicU64,
    store_up: AtomicBool,
    /// Name of this instance in the lease of a re-wrap.
    instance: String,
    /// The running mutations. A mutation can run longer than the call that started it.
    mutations: TaskTracker,
    /// Intents whose outcome is unknown, because the store has not answered whether it committed the change.
    unresolved: Mutex<Vec<OpenIntent>>,
}

impl Broker {
    /// Returns a broker that refuses every release until [`Broker::load_registry`] has succeeded.
    pub fn new(parts: Parts) -> Arc<Self> {
        Arc::new(Self {
            policy: parts.policy,
            audit: parts.audit,
            store: parts.store,
            token: parts.token,
            limits: parts.limits,
            calls: Calls::new(parts.weights),
            registry: ArcSwapOption::empty(),
            registry_refresh: tokio::sync::Mutex::default(),
            logged_problems: Mutex::default(),
            state: parts.state.clone(),
            registry_memory: RegistryMemory::new(parts.state.clone(), &parts.instance),
            key_changes: KeyChanges::default(),
            configured: parts.configured,
            expect: parts.expect,
            key_age: KeyAge::new(parts.rotate_after),
            scheduled: Scheduled::new(
                parts.destroy_after_days,
                parts.state.clone(),
                &parts.instance,
            ),
            approvals: Approvals::new(parts.approvals),
            device_rules: parts.devices,
            notices: parts.notices,
            capacity: parts.capacity,
            sealed_only: parts.sealed_only,
            accepted_risks: ArcSwap::from_pointee(parts.accepted_risks),
            acknowledged: Acknowledged::new(parts.state.clone(), &parts.instance, parts.retention),
            refusals: Refusals::new(parts.state, &parts.instance),
            instance: parts.instance,
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

    /// Whether the log limits allow another line about an unauthenticated caller at this address.
    pub fn may_log(&self, address: IpAddr) -> bool {
        self.limits.may_log(address)
    }

    /// Replaces the risks that the settings of the tokens accept, after the list of tokens was changed.
    pub fn accept_risks(&self, risks: Vec<String>) {
        self.accepted_risks.store(Arc::new(risks));
    }

    /// Waits until the outcome of every running mutation is on disk. Then writes the counted
    /// refusals and the times of last use. The listeners must be closed before this call.
    pub async fn finish(self: &Arc<Self>, deadline: Deadline) {
        self.mutations.close();
        if tokio::time::timeout(deadline.remaining(), self.mutations.wait())
            .await
            .is_err()
        {
            tracing::error!(
                mutations = self.mutations.len(),
                "mutations were still in progress at the end of the drain; the next start resolves their intents"
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
            tracing::warn!("the times of last use of some records were not written");
        }
    }

    /// Records that a call of an authenticated principal did not reach its use case, because the request could not be
    /// parsed or waited too long. Returns the error for the caller: the given error, or the error of the audit log if
    /// the audit entry cannot be written.
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

    /// Counts the items of a batch as calls, and checks whether a principal may release at least one of
    /// the keys in the requested form. A batch needs this check before its items are decided. After this
    /// check, each item of the batch is decided separately. If the principal may use none of the keys,
    /// the complete batch gets one refusal and one audit entry.
    ///
    /// `items` is the number of all items. `keys` are the keys of the well-formed items. A malformed item
    /// counts as a call, too, because its refusal has its own audit entry.
    pub async fn admit(
        &self,
        principal: &Principal,
        call: &Call,
        items: usize,
        keys: &[(UserKeyRef, ReleaseForm)],
    ) -> Result<(), Error> {
        let action = Action::Unwrap;
        let started = Instant::now();
        // The middleware has already counted the batch as one call.
        if let Err(over) = self.limits.take_calls(principal, items.saturating_sub(1)) {
            return Err(self.unserved(principal, call, action, over).await);
        }
        let mut refusal = None;
        for (key, release) in keys {
            match self.ask_about(principal, call, action, key.resource(principal), *release) {
                Ok(_) => return Ok(()),
                Err(denied) => refusal = refusal.or(Some(denied)),
            }
        }
        // An empty list of keys needs no decision, because nothing is released.
        let Some(denied) = refusal else { return Ok(()) };
        let draft = journal::Draft::new(principal, call, action);
        let refused = Err(self.refuse(draft, &denied).await);
        observe(action, call, started.elapsed(), &refused);
        refused
    }

    /// Asks the policy for a permit, and records a denial.
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

    /// Asks the policy for a permit on one user key, and records a denial. The steps after the policy take the address
    /// of the key from the permit.
    async fn permit_key(
        &self,
        principal: &Principal,
        call: &Call,
        action: Action,
        key: &UserKeyRef,
    ) -> Result<KeyPermit, Error> {
        self.permit_release(principal, call, action, key, Release::Plain)
            .await
    }

    /// Does the same as [`Broker::permit_key`] for a release in this form.
    async fn permit_release(
        &self,
        principal: &Principal,
        call: &Call,
        action: Action,
        key: &UserKeyRef,
        release: Release,
    ) -> Result<KeyPermit, Error> {
        let address = key.address(principal);
        let asked = self
            .policy
            .decide_release(principal, call, action, address, release);
        match asked {
            Ok(permit) => Ok(permit),
            Err(denied) => {
                let mut draft =
                    journal::Draft::of(principal, call, action, key.resource(principal));
                draft.release(release);
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
        self.ask_about(principal, call, action, resource, Release::Plain)
    }

    fn ask_about(
        &self,
        principal: &Principal,
        call: &Call,
        action: Action,
        resource: Resource<'_>,
        release: Release,
    ) -> Result<Permit, Denied> {
        self.policy.decide(&Question {
            principal,
            action,
            resource,
            release,
            call,
        })
    }

    /// Records a denial and returns the error for the caller. If the audit entry cannot be written, returns the error
    /// of the audit log.
    async fn refuse(&self, mut draft: journal::Draft, denied: &Denied) -> Error {
        draft.policy(denied.policy());
        let error = Error::new(Reason::Policy, format!("denied by {}", denied.policy()));
        match self.record_failure(draft, &error).await {
            Ok(()) => error,
            Err(audit) => audit,
        }
    }

    fn store_is_up(&self) -> bool {
        // A database that does not match the state file is detected at the start, before the first probe.
        self.store_up.load(Ordering::Relaxed) && !self.acknowledged.is_missing()
    }
}

/// Runs a use case, measures its time, and writes the log line with the call id.
async fn observed<T>(
    action: Action,
    call: &Call,
    work: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    let started = Instant::now();
    let (result, outside) = outside_time::measured(work).await;
    let total = started.elapsed();
    if action == Action::Unwrap && result.is_ok() {
        // Only the overhead of a release is measured, because a release runs exactly one job on the token. The overhead
        // is the time of the call without the time of the token job.
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
                "a stored record failed verification; compare the record with a backup before you replace the record"
            );
        }
        Reason::Bug => {
            keybroker_core::alert!(Bug, call_id = %call.id, action = %action, error = %error, "internal error");
        }
        // Refusals because of overload are only counted, and one log line per second reports the
        // counts.
        Reason::QueueFull => {
            tracing::debug!(call_id = %call.id, action = %action, error = %error, "call refused");
        }
        _ => tracing::info!(call_id = %call.id, action = %action, error = %error, "call failed"),
    }
}

/// Returns the identity of a caller for the queue of the token. The jobs of each principal wait in a separate queue.
fn caller(principal: &Principal, call: &Call) -> Caller {
    Caller::principal(principal.name(), call.deadline)
}

/// Waits for the result of a store or token call, or returns `DEADLINE` when the call's deadline passes.
async fn within<T, E>(call: &Call, work: impl Future<Output = Result<T, E>>) -> Result<T, Error>
where
    Error: From<E>,
{
    match tokio::time::timeout_at(call.deadline.instant().into(), work).await {
        Ok(result) => result.map_err(Error::from),
        Err(_) => Err(Error::new(
            Reason::Deadline,
            "the deadline passed while the call waited for the store or the token",
        )),
    }
}

/// A task of the broker panicked or was cancelled.
#[derive(Debug, thiserror::Error)]
#[error("the task for {work} failed")]
struct TaskFailed {
    work: &'static str,
    source: tokio::task::JoinError,
}

impl TaskFailed {
    fn of(work: &'static str, source: tokio::task::JoinError) -> Error {
        Error::caused(Reason::Bug, Self { work, source })
    }
}

/// Delay after which a caller should retry while the broker is starting.
const START_RETRY: Duration = Duration::from_secs(1);
