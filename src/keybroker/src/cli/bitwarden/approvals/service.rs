//! The service: looks for requests at regular intervals, approves what the policy permits, and leaves the rest to a person.
//!
//! A server may be hostile or slow, and a member may send requests that always fail. Therefore one request does not block the others, a
//! pass over the requests ends after a limited time, and a request that failed or whose approval was sent is not tried again.

use std::{
    collections::{HashMap, HashSet},
    sync::mpsc::{self, Receiver, RecvTimeoutError, TryRecvError},
    time::{Duration, Instant},
};

use crate::{
    cli::{
        Context,
        change::audited_in_parts,
        exit::{Exit, Failure},
        output::{Output, printable},
        signals,
    },
    config::Config,
};
use keybroker_audit::AuditLog;
use keybroker_core::{call::Timestamp, organization::Guid};
use keybroker_hsm::admin::Admin;
use keybroker_store::tables::Tables;
use keybroker_worker_protocol::PinSource;
use tokio::signal::unix::SignalKind;

use super::{
    Organization, Run,
    api::{Api, Approved, Requests},
    attempts::Attempts,
    decision::{self, Decided},
    outage::Outage,
    pending::Pending,
    pins::{KeyState, NewPins, Pins},
    rate::Slot,
    review::{Reviewed, open_token, review, with_store},
    rules::{Facts, Rules},
    turns::Turns,
};

/// Longest wait after repeated failures.
const PAUSE_MAX: Duration = Duration::from_mins(15);
/// Shortest limit of the time that a pass takes. The limit is longer if the interval is longer.
const LOOK_MIN: Duration = Duration::from_mins(1);

// Why a request that used a slot waits for a person.
const UNKNOWN: &str =
    "the approval was sent, and its result is unknown: compare with the event log of the server";
const STILL_LISTED: &str = "the server accepted the approval, but still lists the request";
const USED_BEFORE: &str =
    "an approval of this request was sent within the last hour, and is not sent again";

pub(super) fn run(run: &Run, context: &Context) -> Result<(), Failure> {
    let config = context.config_for_token()?;
    let organization = Organization::of(&config, &run.choice)?;
    let pin = run.pin.get(config.token())?;
    let rules = Rules::load(organization.settings)?;
    // Opening the token before the first pass shows a wrong setting at once.
    let admin = open_token(&config, &pin, organization)?;
    // Closed at the first SIGTERM, so that a decision in progress is completed.
    let (until_terminated, terminated) = mpsc::channel();
    signals::at_first(SignalKind::terminate(), "terminate", || {
        drop(until_terminated);
    })?;
    let new_pins = NewPins::of(organization.settings);
    let turns = if run.once {
        Turns::at_random_place()?
    } else {
        Turns::default()
    };
    audited_in_parts(
        context,
        &config,
        "bitwarden.approvals_run",
        |_| {},
        |log| {
            let mut service = Service {
                config: &config,
                pin: &pin,
                organization,
                log,
                output: context.output,
                terminated: &terminated,
                new_pins: &new_pins,
                rules,
                rules_problem: None,
                admin: Some(admin),
                turns,
                attempts: Attempts::default(),
                outage: Outage::default(),
                is_limited: false,
                noted: HashMap::new(),
                without_id: 0,
            };
            if run.once {
                return service.look();
            }
            context.output.note(&format!(
                "looking for requests of organisation {} every {} s",
                organization.id, organization.settings.interval_seconds
            ));
            service.serve()
        },
    )
}

struct Service<'a> {
    config: &'a Config,
    pin: &'a PinSource,
    organization: Organization<'a>,
    log: &'a AuditLog,
    output: Output,
    /// Closed at the first SIGTERM.
    terminated: &'a Receiver<()>,
    new_pins: &'a NewPins,
    rules: Rules,
    /// Why the files of the rules could not be loaded the last time.
    rules_problem: Option<String>,
    /// The token, unless the last job failed because of it.
    admin: Option<Admin>,
    turns: Turns,
    attempts: Attempts,
    outage: Outage,
    /// Whether `automatic_per_hour` was reached in this pass.
    is_limited: bool,
    /// The kind of the last line about each listed request, so that the log does not get a line in each pass.
    noted: HashMap<Guid, String>,
    /// Number of requests without a readable id in the last pass.
    without_id: usize,
}

impl Service<'_> {
    /// Makes a pass at regular intervals until the process is told to end. Failures that may end by themselves are reported, and the
    /// waits become longer.
    fn serve(&mut self) -> Result<(), Failure> {
        let interval = self.interval();
        let mut failures = 0_u32;
        loop {
            match self.look() {
                Ok(()) => failures = 0,
                Err(failure) if !is_worth_waiting(&failure) => return Err(failure),
                Err(failure) => {
                    self.output.note(&format!("warning: {failure}"));
                    failures += 1;
                }
            }
            // The first pause after a failure is as long as every other.
            let doubled = failures.saturating_sub(1);
            let longer = interval.saturating_mul(2_u32.saturating_pow(doubled));
            let pause = longer.min(PAUSE_MAX.max(interval));
            match self.terminated.recv_timeout(pause) {
                Err(RecvTimeoutError::Timeout) => {}
                Ok(()) | Err(RecvTimeoutError::Disconnected) => return Ok(()),
            }
        }
    }

    fn interval(&self) -> Duration {
        Duration::from_secs(self.organization.settings.interval_seconds)
    }

    fn is_terminated(&self) -> bool {
        self.terminated.try_recv() != Err(TryRecvError::Empty)
    }

    /// Makes one pass. The database is open only meanwhile, so that other commands can use an embedded database.
    fn look(&mut self) -> Result<(), Failure> {
        self.load_rules();
        with_store(self.config, async |store| self.process(&**store).await)
    }

    /// Loads the policy and the inventory as they are now. A problem is reported once.
    fn load_rules(&mut self) {
        let problem = match Rules::load(self.organization.settings) {
            Ok(rules) => {
                self.rules = rules;
                None
            }
            Err(failure) => {
                // Devices may have been removed from an inventory that cannot be read, and permissions from a policy.
                self.rules = Rules::default();
                let what = format!("warning: {failure}; every request waits for a person");
                Some(what)
            }
        };
        if problem != self.rules_problem
            && let Some(what) = &problem
        {
            self.output.note(what);
        }
        self.rules_problem = problem;
    }

    /// Decides about each request once, until the time is over or a signal arrives.
    async fn process(&mut self, store: &dyn Tables) -> Result<(), Failure> {
        let until = Instant::now() + self.interval().max(LOOK_MIN);
        let mut api = Api::open(self.organization)?;
        let mut found = api.pending().await?;
        self.begin(&found);
        let counts = counts(&found.pending);
        self.turns.order(&mut found.pending, |one| one.id);
        for pending in found.pending {
            if self.is_terminated() || Instant::now() >= until {
                break;
            }
            self.turns.take(pending.id);
            let of_member = counts.get(&pending.member).copied().unwrap_or(1);
            self.decide(&mut api, store, pending, of_member).await?;
        }
        Ok(())
    }

    /// Forgets the requests that are no longer listed, and reports those that cannot be read.
    fn begin(&mut self, found: &Requests) {
        self.is_limited = false;
        self.outage = Outage::default();
        let mut listed: HashSet<Guid> = found.pending.iter().map(|one| one.id).collect();
        let mut without_id = 0;
        for one in &found.unreadable {
            match one.id {
                // Two texts about one id would replace each other in each pass.
                Some(id) if listed.insert(id) => self.note(id, one.kind(), &one.to_string()),
                Some(_) => {}
                None => without_id += 1,
            }
        }
        if without_id != self.without_id && without_id > 0 {
            self.output.note(&format!(
                "warning: requests without a readable id: {without_id}; `keybroker bitwarden approvals list` shows the reasons"
            ));
        }
        self.without_id = without_id;
        self.noted.retain(|id, _| listed.contains(id));
        self.attempts.retain(&listed);
    }

    /// Decides about one request. An error ends this pass: it is one of the server, the token or the database.
    async fn decide(
        &mut self,
        api: &mut Api<'_>,
        store: &dyn Tables,
        pending: Pending,
        of_member: u32,
    ) -> Result<(), Failure> {
        let admin = match self.admin.take() {
            Some(admin) => admin,
            None => open_token(self.config, self.pin, self.organization)?,
        };
        let pins = Pins {
            store,
            admin: &admin,
            organization: self.organization.id,
            new: self.new_pins,
        };
        let reviewed = review(api, pins, pending).await?;
        // The answer of the server may have taken long.
        if self.is_terminated() {
            return Ok(());
        }
        let waits = self.approve(api, pins, &reviewed, of_member).await?;
        // After an error, the token is opened again.
        self.admin = Some(admin);
        let pending = &reviewed.pending;
        let who = printable(&pending.email);
        let what = match waits {
            None => format!("request {} of {who}: approved", pending.id),
            Some(why) => format!("request {} of {who} waits for a person: {why}", pending.id),
        };
        let kind = match &reviewed.key {
            Ok(_) => what.clone(),
            Err(why) => why.kind(),
        };
        self.note(pending.id, kind, &what);
        self.outage.count(pending.organization_user, &reviewed.key)
    }

    /// Approves a request if the policy permits it. Returns the reason if it waits for a person.
    async fn approve(
        &mut self,
        api: &mut Api<'_>,
        pins: Pins<'_>,
        reviewed: &Reviewed,
        of_member: u32,
    ) -> Result<Option<String>, Failure> {
        let (key, state) = match &reviewed.key {
            Ok(found) => found,
            Err(why) => return Ok(Some(why.to_string())),
        };
        let key_pinned = match state {
            KeyState::Known { since } => *since,
            KeyState::FirstSeen => Timestamp::now(),
            _ => return Ok(Some(state.to_string())),
        };
        let pending = &reviewed.pending;
        if let Some(why) = self.attempts.reason(pending.id, &key.digest) {
            return Ok(Some(why));
        }
        let facts = Facts {
            key_pinned,
            pending_of_member: of_member,
        };
        let policy = match self.permitted(pending, facts) {
            Ok(policy) => policy,
            Err(why) => return Ok(Some(why)),
        };
        let slots = self.organization.settings.automatic_per_hour;
        let limit = || format!("the limit `automatic_per_hour` ({slots}) is reached");
        if self.is_limited {
            return Ok(Some(limit()));
        }
        // A slot is taken only for a key that the token releases: a member whose key is damaged must not use up the slots of all members.
        let approved = match reviewed.release(pins.admin, self.organization, key)? {
            Ok(approved) => approved,
            Err(why) => {
                let why = why.to_string();
                self.attempts.refused(pending.id, key.digest, &why);
                return Ok(Some(why));
            }
        };
        // Without a slot, the ciphertext is dropped. It needs no audit entry, because it leaves this process only with
        // an approval.
        match pins.take_slot(slots, pending.id).await? {
            Slot::Taken => {}
            Slot::TakenBefore => {
                self.attempts.used(pending.id, USED_BEFORE);
                return Ok(Some(USED_BEFORE.to_owned()));
            }
            Slot::NotFree => {
                self.is_limited = true;
                return Ok(Some(limit()));
            }
        }
        let decided = Decided {
            pending: pending.clone(),
            digest: Some(key.digest),
            policy: Some(policy),
        };
        self.send(api, decided, approved).await
    }

    /// Sends an approval that has a slot. It is sent only once, also if it fails: the server may have the
    /// ciphertext, so the slot is not given back, and one request that always fails would use up the slots of all
    /// members.
    async fn send(
        &mut self,
        api: &mut Api<'_>,
        decided: Decided,
        approved: Approved,
    ) -> Result<Option<String>, Failure> {
        let request = approved.request;
        // This stays true if the audit log fails.
        self.attempts.used(request, UNKNOWN);
        let ready = vec![(decided, approved)];
        let error = match decision::approve(api, self.log, self.organization, ready).await? {
            Ok(()) => {
                self.attempts.used(request, STILL_LISTED);
                return Ok(None);
            }
            Err(error) => error,
        };
        if error.may_have_happened {
            return Err(error.into());
        }
        let message = &error.failure.message;
        let why = format!("the approval failed, and is not sent again: {message}");
        self.attempts.used(request, &why);
        if error.others_may_succeed {
            return Ok(Some(why));
        }
        Err(error.into())
    }

    /// Returns the policy that approves a request, or the reason why the request waits. An approval must be permitted by the files as they
    /// are now, and not as they were at the beginning of a long pass.
    fn permitted(&mut self, pending: &Pending, facts: Facts) -> Result<String, String> {
        let Organization { id, settings, .. } = self.organization;
        self.rules.decide(id, settings, pending, facts)?;
        self.load_rules();
        self.rules.decide(id, settings, pending, facts)
    }

    /// Says something about a request, unless something of the same kind was said last.
    fn note(&mut self, request: Guid, kind: String, what: &str) {
        if self.noted.get(&request) != Some(&kind) {
            self.noted.insert(request, kind);
            self.output.note(what);
        }
    }
}

/// Whether the failure may end by itself. A rejected PIN, a wrong key or a wrong credential does not.
fn is_worth_waiting(failure: &Failure) -> bool {
    !failure.exit.needs_person() && failure.exit != Exit::Pin
}

/// The number of pending requests of each member.
fn counts(pending: &[Pending]) -> HashMap<Guid, u32> {
    let mut counts = HashMap::new();
    for one in pending {
        *counts.entry(one.member).or_insert(0) += 1;
    }
    counts
}
