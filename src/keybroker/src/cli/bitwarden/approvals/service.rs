//! The service: looks for requests at regular intervals, approves what the policy permits, and leaves the rest to a person.

use std::{
    collections::{HashMap, HashSet},
    sync::mpsc::{self, Receiver, RecvTimeoutError},
    thread,
    time::Duration,
};

use tokio::{
    runtime,
    signal::unix::{SignalKind, signal},
};

use crate::{
    cli::{
        Context,
        change::audited_in_parts,
        exit::{Exit, Failure},
        output::{Output, printable},
    },
    config::{Config, bitwarden::Settings},
};
use keybroker_audit::AuditLog;
use keybroker_core::{call::Timestamp, organization::Guid};
use keybroker_hsm::admin::{Admin, AdminError};
use keybroker_policy::{
    DEFAULT_DENY,
    device_approval::{DeviceApprovalPolicy, DeviceRequest, DeviceVerdict},
};
use keybroker_store::tables::Tables;
use keybroker_worker_protocol::PinSource;

use super::{
    Organization, Run,
    api::Api,
    decision::{self, Decided},
    inventory::Inventory,
    pending::Pending,
    pins::{KeyState, Pins},
    review::{Reviewed, open_token, review, with_store},
};

/// Longest wait after repeated failures.
const PAUSE_MAX: Duration = Duration::from_mins(15);
/// Highest number of requests whose notes are remembered.
const NOTED_MAX: usize = 10_000;

pub(super) fn run(run: &Run, context: &Context) -> Result<(), Failure> {
    let config = context.config_for_token()?;
    let organization = Organization::of(&config, &run.choice)?;
    let pin = run.pin.get(config.token())?;
    let rules = Rules::load(organization.settings)?;
    // The first look at the token shows a wrong setting at once.
    let admin = open_token(&config, &pin, organization)?;
    let terminated = terminations()?;
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
                rules,
                admin: Some(admin),
                noted: HashMap::new(),
            };
            if run.once {
                return service.look();
            }
            context.output.note(&format!(
                "looking for requests of organisation {} every {} s",
                organization.id, organization.settings.interval_seconds
            ));
            service.serve(&terminated)
        },
    )
}

/// What decides about a request without a person.
#[derive(Debug, Default)]
struct Rules {
    policy: Option<DeviceApprovalPolicy>,
    inventory: Inventory,
}

impl Rules {
    fn load(settings: &Settings) -> Result<Self, Failure> {
        let bad = |setting: &str, why: String| {
            Failure::new(Exit::Configuration, format!("`{setting}`: {why}"))
        };
        let policy = settings
            .policy_file
            .as_deref()
            .map(DeviceApprovalPolicy::load);
        let inventory = settings.inventory_file.as_deref().map(Inventory::load);
        Ok(Self {
            policy: policy
                .transpose()
                .map_err(|problems| bad("policy_file", problems.to_string()))?,
            inventory: inventory
                .transpose()
                .map_err(|error| bad("inventory_file", error.to_string()))?
                .unwrap_or_default(),
        })
    }
}

struct Service<'a> {
    config: &'a Config,
    pin: &'a PinSource,
    organization: Organization<'a>,
    log: &'a AuditLog,
    output: Output,
    rules: Rules,
    /// The token, unless the last job failed because of it.
    admin: Option<Admin>,
    /// What was last said about each pending request, so that the log has one line and not one for each look.
    noted: HashMap<Guid, String>,
}

impl Service<'_> {
    /// Looks at regular intervals until the process is told to end. Failures that may end by themselves are reported, and the
    /// waits become longer.
    fn serve(&mut self, terminated: &Receiver<()>) -> Result<(), Failure> {
        let interval = Duration::from_secs(self.organization.settings.interval_seconds);
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
            match terminated.recv_timeout(longer.min(PAUSE_MAX.max(interval))) {
                Err(RecvTimeoutError::Timeout) => {}
                Ok(()) | Err(RecvTimeoutError::Disconnected) => return Ok(()),
            }
        }
    }

    /// Looks once. The database is open only meanwhile, so that other commands can use an embedded database.
    fn look(&mut self) -> Result<(), Failure> {
        match Rules::load(self.organization.settings) {
            Ok(rules) => self.rules = rules,
            Err(failure) => {
                // Devices may have been removed from an inventory that cannot be read, and permissions from a policy.
                self.rules = Rules::default();
                let what = format!("warning: {failure}; every request waits for a person");
                self.output.note(&what);
            }
        }
        with_store(self.config, async |store| self.process(&**store).await)
    }

    async fn process(&mut self, store: &dyn Tables) -> Result<(), Failure> {
        let mut api = Api::open(self.organization)?;
        let found = api.pending().await?;
        let readable = found.pending.iter().map(|one| one.id);
        let unreadable = found.unreadable.iter().filter_map(|one| one.id);
        let listed: HashSet<Guid> = readable.chain(unreadable).collect();
        self.noted.retain(|id, _| listed.contains(id));
        for one in &found.unreadable {
            self.note(one.id, &one.to_string());
        }
        let counts = counts(&found.pending);
        for pending in found.pending {
            let of_member = counts.get(&pending.member).copied().unwrap_or(1);
            self.decide(&mut api, store, pending, of_member).await?;
        }
        Ok(())
    }

    /// Decides about one request. An error ends this look: it is one of the server, the token or the database.
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
        };
        let reviewed = review(api, pins, pending).await?;
        let waits = self.approve(api, pins, &reviewed, of_member).await?;
        // After an error, the token is opened again.
        self.admin = Some(admin);
        let pending = &reviewed.pending;
        let who = printable(&pending.email);
        let what = match waits {
            None => format!("request {} of {who}: approved", pending.id),
            Some(why) => format!("request {} of {who} waits for a person: {why}", pending.id),
        };
        self.note(Some(pending.id), &what);
        Ok(())
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
        let pinned = match state {
            KeyState::Known { since } => *since,
            KeyState::FirstSeen => Timestamp::now(),
            _ => return Ok(Some(state.to_string())),
        };
        let verdict = self.verdict(&reviewed.pending, pinned, of_member);
        if !verdict.approves {
            for (policy, error) in &verdict.errors {
                self.output.note(&format!(
                    "warning: cannot evaluate policy {policy}: {error}"
                ));
            }
            return Ok(Some(why(&verdict)));
        }
        let slots = self.organization.settings.automatic_per_hour;
        if !pins.take_slot(slots).await? {
            return Ok(Some(format!(
                "the limit `automatic_per_hour` ({slots}) is reached"
            )));
        }
        let approved = match reviewed.release(pins.admin, self.organization, key) {
            Ok(approved) => approved,
            Err(AdminError::Untrusted(why)) => return Ok(Some(why)),
            Err(error) => return Err(error.into()),
        };
        let decided = Decided {
            pending: reviewed.pending.clone(),
            digest: Some(key.digest),
            policy: Some(verdict.policy),
        };
        decision::approve(api, self.log, self.organization, vec![(decided, approved)]).await?;
        Ok(None)
    }

    fn verdict(&self, pending: &Pending, key_pinned: Timestamp, of_member: u32) -> DeviceVerdict {
        let Some(policy) = &self.rules.policy else {
            return DeviceVerdict {
                approves: false,
                policy: String::new(),
                errors: Vec::new(),
            };
        };
        let settings = self.organization.settings;
        let networks = pending.address.map(|address| settings.networks_of(address));
        policy.decide(&DeviceRequest {
            organization: self.organization.id,
            member: pending.member,
            email: &pending.email,
            device: &pending.device,
            device_type: &pending.device_type,
            address: pending.address,
            country: pending.country.as_deref(),
            networks: &networks.unwrap_or_default(),
            is_in_inventory: self.rules.inventory.has(&pending.device, &pending.email),
            key_pinned,
            pending_of_member: of_member,
            created: pending.created,
            at: Timestamp::now(),
        })
    }

    /// Says something about a request, unless it was said before.
    fn note(&mut self, request: Option<Guid>, what: &str) {
        if let Some(id) = request {
            let is_known = self.noted.get(&id).is_some_and(|known| known == what);
            if is_known || self.noted.len() >= NOTED_MAX {
                return;
            }
            self.noted.insert(id, what.to_owned());
        }
        self.output.note(what);
    }
}

/// Why a request is not approved without a person.
fn why(verdict: &DeviceVerdict) -> String {
    match verdict.policy.as_str() {
        "" => "no `policy_file` is configured, or the file is invalid".to_owned(),
        DEFAULT_DENY => "no policy permits the approval".to_owned(),
        policy if verdict.errors.iter().any(|(broken, _)| broken == policy) => {
            format!("policy {policy} cannot be evaluated")
        }
        policy => format!("policy {policy} forbids the approval"),
    }
}

/// Whether the failure may end by itself. A rejected PIN, a wrong key or a wrong credential does not.
fn is_worth_waiting(failure: &Failure) -> bool {
    !failure.exit.needs_person() && failure.exit != Exit::Pin
}

/// Starts a thread that reports the first SIGTERM, so that a decision in progress is completed.
fn terminations() -> Result<Receiver<()>, Failure> {
    let failed = |error| Failure::new(Exit::Internal, format!("cannot wait for signals: {error}"));
    let runtime = runtime::Builder::new_current_thread()
        .enable_io()
        .build()
        .map_err(failed)?;
    let entered = runtime.enter();
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    drop(entered);
    let (sender, receiver) = mpsc::channel();
    let wait = move || {
        if runtime.block_on(terminate.recv()).is_some() {
            // The command may have ended meanwhile.
            let _ended = sender.send(());
        }
    };
    let thread = thread::Builder::new().name("terminate".to_owned());
    thread.spawn(wait).map_err(failed)?;
    Ok(receiver)
}

/// The number of pending requests of each member.
fn counts(pending: &[Pending]) -> HashMap<Guid, u32> {
    let mut counts = HashMap::new();
    for one in pending {
        *counts.entry(one.member).or_insert(0) += 1;
    }
    counts
}
