//! Starts and stops `keybroker serve`, from the first check to the last audit entry.

use std::{
    error::Error,
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
    time::Duration,
};

use axum::Router;
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::Semaphore,
    time,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic_health::{ServingStatus, server::HealthReporter};

use crate::{
    cli::exit::{Exit, Failure},
    config::Config,
    output_file, telemetry,
};
use keybroker_api::{console::Provider, rest, rpc};
use keybroker_audit::{AuditLog, OpenIntent};
use keybroker_auth::{
    Authenticator,
    client_secret::{self, Secrets},
    token::Tokens,
};
use keybroker_broker::{ApprovalRules, Broker, Capacity, ClientRules, Parts, limits::Limits};
use keybroker_core::{call::Deadline, error::chain, state::StateDirectory};
use keybroker_hsm::{Pool, Token};
use keybroker_policy::{Networks, Policy};
use keybroker_store as store;
use keybroker_store::{Store, StoreLock};

use super::{
    apis::Apis,
    clients::Clients,
    console::{self, Console},
    descriptors,
    file_problems::FileProblems,
    identify::Identifier,
    listener::Listener,
    notices::Notifier,
    notify,
    opening::{self, Bound, BoundStatus},
    shared::Shared,
    status,
    tls::Tls,
    token_reload::{ReloadParts, TokenReload, TokensInUse},
    unauthenticated::Places,
    waiting::Waiting,
    watch::{self, REGISTRY_TIMEOUT},
};

/// Maximum wait for the first key sets of identity providers before the listeners open. The broker
/// contacts an unavailable provider again in the background.
const FIRST_KEYS_TIMEOUT: Duration = Duration::from_secs(2);
/// Time between the change of the health to `NOT_SERVING` and the closing of the listeners. Load
/// balancers check the health about once a second.
const LAME_DUCK: Duration = Duration::from_millis(500);
/// Maximum time for each step after the drain of the listeners: mutations, workers and store.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);
/// Divisor for the share of all connections that may be without a principal: a quarter.
const UNAUTHENTICATED_DIVISOR: usize = 4;
/// Divisor for the share of all connections that may be in their handshake: a half.
const HANDSHAKES_DIVISOR: usize = 2;
/// Divisor for the share of all connections on which REST requests may wait for a retry: a half.
/// The other connections remain available for new requests.
const RETRIES_DIVISOR: usize = 2;
const METRICS_UPKEEP: Duration = Duration::from_secs(5);

/// Runs the broker until SIGTERM or SIGINT. The broker reads the tokens in `config_file` again while it runs. A second signal ends the process without a drain.
pub async fn run(
    config: Config,
    config_file: PathBuf,
    program: PathBuf,
    ready_file: Option<PathBuf>,
) -> Result<(), Failure> {
    let no_signals = |error: io::Error| Failure::new(Exit::Internal, error.to_string());
    let mut signals = Signals::listen().map_err(no_signals)?;
    // The process handles SIGHUP from its start, because SIGHUP would end the process by default.
    let hangup = signal(SignalKind::hangup()).map_err(no_signals)?;
    let token = OnceLock::new();
    let started = tokio::select! {
        started = Server::start(config, config_file, program, ready_file, hangup, &token) => started.map(Some),
        name = signals.next() => {
            tracing::info!(signal = name, "the broker was stopped during its start; no call was served");
            Ok(None)
        }
    };
    let started = match started {
        Ok(Some(started)) => started,
        unserved => {
            // Stop the workers before this process ends. If this process ended first, the service
            // manager might kill a worker during its login.
            if let Some(token) = token.get() {
                token.drain_and_stop(Deadline::after(Duration::ZERO)).await;
            }
            return unserved.map(drop);
        }
    };
    let manager = notify::Manager::serving(started.probes());
    let name = signals.next().await;
    tracing::info!(signal = name, "stopping");
    manager.stopping();
    tokio::select! {
        () = started.stop() => Ok(()),
        name = signals.next() => Err(Failure::new(
            Exit::Interrupted,
            format!("a second signal, {name}, stopped the broker without a drain; the next start finds out whether the unfinished changes were committed"),
        )),
    }
}

/// Creates the authenticator of callers. The secrets of API clients are added later, because they
/// are in the database.
fn credentials(config: &Config) -> Result<(Authenticator, Arc<Tokens>), Failure> {
    let tokens = Tokens::new(&config.issuers).map_err(|error| unusable(&error))?;
    let tokens = Arc::new(tokens.with_token_bytes_max(config.limits.access_token_bytes_max));
    let authenticator = Authenticator::new(&config.principals).map_err(|error| unusable(&error))?;
    Ok((authenticator.with_tokens(Arc::clone(&tokens)), tokens))
}

/// The failure for an unusable configuration.
fn unusable(error: &dyn Error) -> Failure {
    Failure::new(Exit::Configuration, chain(error))
}

/// The failure for an error in the program or a problem of the machine.
fn internal(error: &dyn Error) -> Failure {
    Failure::new(Exit::Internal, chain(error))
}

/// Creates the verifier of API client secrets, which are in the broker's database.
fn client_secrets(config: &Config, broker: &Arc<Broker>) -> Result<Secrets, Failure> {
    let directory = Arc::new(Clients(Arc::clone(broker)));
    Secrets::new(config.client_credentials.clone(), directory).map_err(|error| internal(&error))
}

/// Verifies the registry if the token is available. If the token is unavailable, a background task
/// verifies the registry later.
async fn load_registry(token: &dyn Token, broker: &Broker) -> Result<(), Failure> {
    if token.state().serves_a_key() {
        broker
            .load_registry(Deadline::after(REGISTRY_TIMEOUT))
            .await?;
    }
    Ok(())
}

/// Migrates the database, if the configuration permits migrations, and then opens the database.
async fn open_store(
    config: &Config,
    audit: &AuditLog,
    open: &mut Vec<OpenIntent>,
) -> Result<(StoreLock, Arc<dyn Store>), Failure> {
    opening::migrate(&config.store, audit, &config.audit.instance, open).await?;
    opening::open_store(config, audit).await
}

/// Which changes need the approval of a second person. The log shows it at each start.
fn approval_rules(config: &Config) -> ApprovalRules {
    config.approvals.log();
    config.approvals.rules(retention(&config.store))
}

fn retention(settings: &store::Settings) -> Duration {
    Duration::from_hours(u64::from(settings.retention_days) * 24)
}

fn capacity(settings: &store::Settings) -> Capacity {
    Capacity {
        revisions_max: settings.revisions_max,
        keys_per_user_max: settings.keys_per_user_max,
    }
}

fn client_rules(settings: &client_secret::Settings) -> ClientRules {
    let hashing = settings.clone();
    ClientRules {
        grantable_roles: settings.grantable_roles.clone(),
        hash: Arc::new(move |secret| hashing.hash(secret)),
    }
}

/// The two signals that stop the broker.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn listen() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}

struct Server {
    config: Config,
    broker: Arc<Broker>,
    tokens: Arc<Pool>,
    store: Arc<dyn Store>,
    audit: AuditLog,
    health: HealthReporter,
    file_problems: Arc<FileProblems>,
    addresses: Vec<SocketAddr>,
    status_address: SocketAddr,
    remote_status_address: Option<SocketAddr>,
    metrics: PrometheusHandle,
    /// The tasks of connections and accept loops.
    connections: TaskTracker,
    stop_connections: CancellationToken,
    /// Background tasks: health, maintenance and reload.
    background: TaskTracker,
    stop_background: CancellationToken,
    /// The tasks of the status listeners, which run until the end of the drain.
    status: TaskTracker,
    stop_status: CancellationToken,
    notifier: Notifier,
    _store_lock: StoreLock,
}

impl Server {
    /// Starts all components of the broker, and opens the listeners. The order of the steps is:
    /// policies, ports and certificates, audit log, database, token, registry, listeners. Because
    /// of this order, a failed start leaves no step incomplete.
    #[expect(clippy::too_many_lines, reason = "one order of steps")]
    async fn start(
        config: Config,
        config_file: PathBuf,
        program: PathBuf,
        ready_file: Option<PathBuf>,
        hangup: Signal,
        token_started: &OnceLock<Arc<Pool>>,
    ) -> Result<Self, Failure> {
        let metrics = telemetry::init_metrics().map_err(|error| internal(&error))?;
        let (authenticator, tokens) = credentials(&config)?;
        let provider = console::provider(&config, &tokens)?;
        let limits = Limits::new(&config.rates);
        let networks = Networks::new(&config.networks);
        let policy =
            Policy::load(&config.policy, networks).map_err(|problems| unusable(&problems))?;
        let (notifier, notices) =
            Notifier::start(config.notices.as_ref()).map_err(|error| unusable(&error))?;
        let state = StateDirectory::below(&config.audit.directory);
        let bound = opening::bind_all(&config.listeners, &state).await?;
        let status = opening::bind_status(&config.status, &state).await?;
        let (audit, mut open_intents) = opening::open_audit(config.audit.clone()).await?;
        let (store_lock, store) = open_store(&config, &audit, &mut open_intents).await?;
        opening::remember_lists(&bound, &status)?;
        let accepted_risks = opening::record_accepted_risks(&config, &audit).await?;
        let pool = opening::start_token(&config, &store, program.clone(), token_started).await?;
        let following = TokensInUse::new(&config, config_file, program);
        let broker = Broker::new(Parts {
            policy: Arc::clone(&policy),
            audit: audit.clone(),
            store: Arc::clone(&store),
            token: pool.token(),
            limits: Arc::clone(&limits),
            weights: config.tokens.weights(),
            client_rules: client_rules(&config.client_credentials),
            instance: config.audit.instance.clone(),
            retention: retention(&config.store),
            capacity: capacity(&config.store),
            expect: following.expect(),
            configured: following.configured.clone(),
            destroy_after_days: config.wrapping_keys.destroy_after_days,
            rotate_after: config.wrapping_keys.rotate_after(),
            approvals: approval_rules(&config),
            sealed_only: config.release.sealed_only,
            devices: config.devices.rules(retention(&config.store)),
            notices,
            state,
            accepted_risks,
        });
        let secrets = client_secrets(&config, &broker)?;
        let identifier = Identifier::new(authenticator.with_secrets(secrets), limits);
        broker.recover(open_intents).await?;
        load_registry(&*pool.token(), &broker).await?;
        let (health, _) = tonic_health::server::health_reporter();
        let mut server = Self {
            addresses: Vec::new(),
            status_address: status.address,
            remote_status_address: status.remote.as_ref().map(|remote| remote.address),
            metrics,
            connections: TaskTracker::new(),
            stop_connections: CancellationToken::new(),
            background: TaskTracker::new(),
            stop_background: CancellationToken::new(),
            status: TaskTracker::new(),
            stop_status: CancellationToken::new(),
            notifier,
            _store_lock: store_lock,
            config,
            broker,
            tokens: pool,
            store,
            audit,
            health,
            file_problems: Arc::default(),
        };
        // Report the health now, so that the health is not `SERVING` before the first check.
        watch::report(&server.broker.health(), &server.health).await;
        server.look_after(&bound, status.tls(), policy, following, hangup);
        let stop = server.stop_background.clone();
        server.background.spawn(Arc::clone(&tokens).refresh(stop));
        server.serve_status(status);
        tokens.asked_once(FIRST_KEYS_TIMEOUT).await;
        server.open_listeners(bound, &identifier, provider)?;
        server.write_ready_file(ready_file.as_deref())?;
        Ok(server)
    }

    fn open_listeners(
        &mut self,
        bound: Vec<Bound>,
        identifier: &Identifier,
        provider: Option<Arc<dyn Provider>>,
    ) -> Result<(), Failure> {
        let limits = self.config.limits.clone();
        let connections_max = descriptors::connections(limits.connections_max);
        let unauthenticated_max = connections_max.div_ceil(UNAUTHENTICATED_DIVISOR);
        let shared = Shared {
            broker: Arc::clone(&self.broker),
            authenticator: Arc::clone(&identifier.authenticator),
            connections: Arc::new(Semaphore::new(connections_max)),
            handshakes: Waiting::new(connections_max.div_ceil(HANDSHAKES_DIVISOR)),
            places: Places::new(unauthenticated_max, limits.connections_per_principal_max),
            refusals: Arc::default(),
            limits: Arc::new(limits),
            stop: self.stop_connections.clone(),
            tasks: self.connections.clone(),
        };
        let memory = rpc::Memory::new(shared.limits.message_bytes_max);
        let rest_retries = rest::RetryPlaces::new(connections_max.div_ceil(RETRIES_DIVISOR));
        let apis = Apis {
            config: &self.config,
            broker: &self.broker,
            health: &self.health,
            calls: &self.connections,
            stop: &self.stop_connections,
            memory: &memory,
            rest_retries: &rest_retries,
            identifier,
            console: Console::new(
                &self.config,
                provider,
                &self.broker,
                &identifier.limits,
                &self.connections,
            ),
        };
        for Bound {
            socket,
            settings,
            tls,
        } in bound
        {
            let routes = apis.routes(&settings)?;
            let address = opening::local(&socket)?;
            let apis: Vec<&str> = settings.apis.iter().map(|api| api.as_str()).collect();
            tracing::info!(%address, apis = %apis.join(", "), "listening");
            self.addresses.push(address);
            let listener = Listener {
                socket,
                tls,
                routes,
                trusted_proxies: settings.trusted_proxies,
            };
            self.connections.spawn(listener.accept(shared.clone()));
        }
        Ok(())
    }

    /// The routes of the status listeners and of the watchdog's probe.
    fn probes(&self) -> Router {
        status::routes(status::Probe {
            broker: Arc::clone(&self.broker),
            files: Arc::clone(&self.file_problems),
            metrics: self.metrics.clone(),
            stopping: self.stop_background.clone(),
        })
    }

    fn serve_status(&self, bound: BoundStatus) {
        let BoundStatus {
            socket,
            address,
            remote,
        } = bound;
        tracing::info!(%address, "status listener");
        let serving = status::serve(socket, None, self.probes(), self.stop_status.clone());
        self.status.spawn(serving);
        if let Some(remote) = remote {
            tracing::info!(address = %remote.address, tls = remote.tls.is_some(), "remote status listener");
            let serving = status::serve(
                remote.socket,
                remote.tls,
                self.probes(),
                self.stop_status.clone(),
            );
            self.status.spawn(serving);
        }
        let metrics = self.metrics.clone();
        self.each(METRICS_UPKEEP, move || metrics.run_upkeep());
    }

    fn reload_parts(&self) -> ReloadParts {
        ReloadParts {
            pool: Arc::clone(&self.tokens),
            broker: Arc::clone(&self.broker),
            audit: self.audit.clone(),
            store: Arc::clone(&self.store),
        }
    }

    /// Starts the tasks that run concurrently with the listeners.
    fn look_after(
        &self,
        bound: &[Bound],
        status: Option<Arc<Tls>>,
        policy: Arc<Policy>,
        tokens: TokensInUse,
        hangup: Signal,
    ) {
        let listeners = bound.iter().filter_map(|one| one.tls.clone());
        let tls: Vec<Arc<Tls>> = listeners.chain(status).collect();
        let tokens = TokenReload::new(&self.config, tokens, self.reload_parts());
        let problems = Arc::clone(&self.file_problems);
        let stop = self.stop_background.clone();
        self.background
            .spawn(watch::files(tls, policy, tokens, problems, hangup, stop));
        self.background
            .spawn(Arc::clone(&self.broker).maintain(self.stop_background.clone()));
        self.background.spawn(watch::health(
            Arc::clone(&self.broker),
            Arc::clone(&self.file_problems),
            self.health.clone(),
            self.stop_background.clone(),
        ));
        self.background.spawn(watch::registry_once_up(
            Arc::clone(&self.broker),
            self.tokens.token(),
            self.stop_background.clone(),
        ));
    }

    fn each(&self, interval: Duration, work: impl Fn() + Send + 'static) {
        let stop = self.stop_background.clone();
        self.background.spawn(async move {
            let mut ticks = time::interval(interval);
            loop {
                tokio::select! {
                    () = stop.cancelled() => return,
                    _ = ticks.tick() => work(),
                }
            }
        });
    }

    /// Writes the addresses of the listeners to a file, for example for a program that starts the
    /// broker with port 0. Replaces the file atomically.
    fn write_ready_file(&self, path: Option<&Path>) -> Result<(), Failure> {
        let Some(path) = path else {
            return Ok(());
        };
        let text = serde_json::json!({
            "listeners": self.addresses,
            "remote_status": self.remote_status_address,
            "status": self.status_address,
            "pid": std::process::id(),
        });
        output_file::replace(path, &text.to_string()).map_err(|error| {
            let what = format!("cannot write the ready file {}: {error}", path.display());
            Failure::new(Exit::Usage, what)
        })
    }

    /// Drains and stops the broker. Before the listeners close, the health changes to
    /// `NOT_SERVING`, and load balancers get time to notice this change. After the listeners have
    /// closed, open connections receive GOAWAY, calls in progress end, and the outcomes of
    /// mutations are written. Finally, the workers end, the store closes, and the audit log gets
    /// its last entry.
    async fn stop(self) {
        // Stop the background tasks first, because one of them would overwrite the health
        // `NOT_SERVING`. The broker waits only a short time for background tasks, because a check
        // of the database may take a long time.
        self.stop_background.cancel();
        self.background.close();
        if time::timeout(LAME_DUCK, self.background.wait())
            .await
            .is_err()
        {
            tracing::debug!("background tasks have not ended yet");
        }
        let services = [
            rpc::USER_KEY_SERVICE,
            rpc::DEVICE_SERVICE,
            rpc::CONTROL_SERVICE,
            "",
        ];
        for service in services {
            self.health
                .set_service_status(service, ServingStatus::NotServing)
                .await;
        }
        time::sleep(LAME_DUCK).await;
        self.stop_connections.cancel();
        self.connections.close();
        let drain_timeout = Duration::from_millis(self.config.limits.drain_timeout_ms);
        if time::timeout(drain_timeout, self.connections.wait())
            .await
            .is_err()
        {
            tracing::warn!(
                connections = self.connections.len(),
                "the broker closed open connections at the end of the drain"
            );
        }
        self.broker.finish(Deadline::after(STOP_TIMEOUT)).await;
        // All calls have ended, so no further notice comes.
        self.notifier.stop().await;
        self.tokens
            .drain_and_stop(Deadline::after(STOP_TIMEOUT))
            .await;
        if time::timeout(STOP_TIMEOUT, self.store.close())
            .await
            .is_err()
        {
            tracing::warn!(
                "the database does not answer; the broker drops its connections to the database"
            );
        }
        let audit = self.audit;
        if tokio::task::spawn_blocking(move || audit.close())
            .await
            .is_err()
        {
            tracing::error!(
                "the audit log was not closed cleanly; the next start moves an incomplete last entry to a separate file"
            );
        }
        self.stop_status.cancel();
        self.status.close();
        self.status.wait().await;
        tracing::info!("stopped");
    }
}
