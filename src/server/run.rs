//! The life of `keybroker serve`, from the first check to the last entry of the audit log.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use metrics_exporter_prometheus::PrometheusHandle;
use tokio::{
    net::TcpListener,
    signal::unix::{Signal, SignalKind, signal},
    sync::Semaphore,
    time,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic_health::{ServingStatus, server::HealthReporter};

use crate::{
    audit::{self, AuditLog, OpenIntent},
    auth::Authenticator,
    broker::{Broker, Parts, Serving},
    call::Deadline,
    cli::exit::{Exit, Failure},
    config::Config,
    error::Reason,
    hsm::{ExpectedKey, Supervisor, Token},
    key::WrappingKeyState,
    rpc, store,
    store::{Store, StoreLock},
    telemetry,
};

use super::{
    Door, ListenerSettings,
    listener::{Listener, Shared},
    notify, status,
    tls::Tls,
};

const HEALTH_INTERVAL: Duration = Duration::from_millis(250);
const TLS_INTERVAL: Duration = Duration::from_secs(1);
const REGISTRY_INTERVAL: Duration = Duration::from_millis(250);
const REGISTRY_TIMEOUT: Duration = Duration::from_secs(10);
/// Between `NOT_SERVING` and the end of accepting: load balancers look once a second or so.
const LAME_DUCK: Duration = Duration::from_millis(500);
/// For what follows the drain of the doors: workers and store.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);
const METRICS_UPKEEP: Duration = Duration::from_secs(5);

/// Runs until SIGTERM or SIGINT; a second signal ends it at once.
pub async fn run(
    config: Config,
    program: PathBuf,
    ready_file: Option<PathBuf>,
) -> Result<(), Failure> {
    let mut signals =
        Signals::listen().map_err(|error| Failure::new(Exit::Internal, error.to_string()))?;
    let started = tokio::select! {
        started = Server::start(config, program) => started?,
        name = signals.next() => {
            tracing::info!(signal = name, "stopped while starting; nothing was served");
            return Ok(());
        }
    };
    if let Some(path) = &ready_file {
        started.write_ready_file(path)?;
    }
    let manager = notify::Manager::serving(started.status_address);
    let name = signals.next().await;
    tracing::info!(signal = name, "stopping");
    manager.stopping();
    tokio::select! {
        () = started.stop() => Ok(()),
        name = signals.next() => Err(Failure::new(
            Exit::Interrupted,
            format!("stopped at once by a second signal, {name}; the next start resolves what was open"),
        )),
    }
}

/// The two signals that end a service.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn listen() -> std::io::Result<Self> {
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
    supervisor: Arc<Supervisor>,
    store: Arc<dyn Store>,
    audit: AuditLog,
    health: HealthReporter,
    addresses: Vec<SocketAddr>,
    status_address: SocketAddr,
    /// Connections and the accept loops.
    connections: TaskTracker,
    stop_connections: CancellationToken,
    /// What runs beside them: health, maintenance, reload.
    background: TaskTracker,
    stop_background: CancellationToken,
    _store_lock: StoreLock,
}

struct Bound {
    socket: TcpListener,
    settings: ListenerSettings,
    tls: Arc<Tls>,
}

impl Server {
    /// In this order, so that each failure leaves nothing half done: ports, certificates, audit log, database, token,
    /// registry, then the doors open.
    async fn start(config: Config, program: PathBuf) -> Result<Self, Failure> {
        let metrics = telemetry::init_metrics().map_err(|e| Failure::new(Exit::Internal, e))?;
        let authenticator = Authenticator::new(&config.principals)
            .map_err(|what| Failure::new(Exit::Configuration, what))?;
        let bound = bind_all(&config.listeners).await?;
        let status_socket = bind(config.status.address).await?;
        let status_address = local(&status_socket)?;
        let store_lock = store::lock(&config.store)?;
        let store = store::open(&config.store).await?;
        let (audit, open_intents) = open_audit(config.audit.clone()).await?;
        let supervisor = start_token(&config, &store, program).await?;
        let token: Arc<dyn Token> = Arc::<Supervisor>::clone(&supervisor);
        let broker = Broker::new(Parts {
            audit: audit.clone(),
            store: Arc::clone(&store),
            token,
        });
        broker.recover(open_intents).await;
        if supervisor.settled().await == Serving::Up {
            broker
                .load_registry(Deadline::after(REGISTRY_TIMEOUT))
                .await?;
        }
        let (health, _) = tonic_health::server::health_reporter();
        let mut server = Self {
            addresses: Vec::new(),
            status_address,
            connections: TaskTracker::new(),
            stop_connections: CancellationToken::new(),
            background: TaskTracker::new(),
            stop_background: CancellationToken::new(),
            _store_lock: store_lock,
            config,
            broker,
            supervisor,
            store,
            audit,
            health,
        };
        server.look_after(&bound)?;
        server.serve_status(status_socket, metrics);
        server.open_doors(bound, authenticator)?;
        Ok(server)
    }

    fn open_doors(
        &mut self,
        bound: Vec<Bound>,
        authenticator: Authenticator,
    ) -> Result<(), Failure> {
        let limits = self.config.limits.clone();
        let shared = Shared {
            broker: Arc::clone(&self.broker),
            authenticator: Arc::new(authenticator),
            connections: Arc::new(Semaphore::new(limits.connections_max)),
            limits: Arc::new(limits),
            stop: self.stop_connections.clone(),
            tasks: self.connections.clone(),
        };
        for Bound {
            socket,
            settings,
            tls,
        } in bound
        {
            let services = rpc::Services {
                user_keys: settings.doors.contains(&Door::Grpc),
                control: settings.doors.contains(&Door::Admin),
                reflection: self.config.limits.reflection,
            };
            let health = tonic_health::pb::health_server::HealthServer::new(
                tonic_health::server::HealthService::from_health_reporter(self.health.clone()),
            );
            let routes = rpc::routes(
                &self.broker,
                services,
                health,
                Duration::from_millis(self.config.limits.call_timeout_max_ms),
            )
            .map_err(|what| Failure::new(Exit::Internal, what))?;
            let address = local(&socket)?;
            tracing::info!(%address, doors = ?settings.doors, "listening");
            self.addresses.push(address);
            let listener = Listener {
                socket,
                tls,
                routes,
            };
            self.connections.spawn(listener.accept(shared.clone()));
        }
        Ok(())
    }

    fn serve_status(&self, socket: TcpListener, metrics: PrometheusHandle) {
        tracing::info!(address = %self.status_address, "status listener");
        let routes = status::routes(Arc::clone(&self.broker), metrics.clone());
        let stop = self.stop_background.clone();
        self.background.spawn(async move {
            let served = axum::serve(socket, routes).with_graceful_shutdown(stop.cancelled_owned());
            if let Err(error) = served.await {
                tracing::error!(%error, "status listener ended");
            }
        });
        self.each(METRICS_UPKEEP, move || metrics.run_upkeep());
    }

    /// Starts what runs beside the doors.
    fn look_after(&self, bound: &[Bound]) -> Result<(), Failure> {
        let tls: Vec<Arc<Tls>> = bound.iter().map(|one| Arc::clone(&one.tls)).collect();
        let mut hangup = signal(SignalKind::hangup())
            .map_err(|error| Failure::new(Exit::Internal, error.to_string()))?;
        let stop = self.stop_background.clone();
        self.background.spawn(async move {
            let mut ticks = time::interval(TLS_INTERVAL);
            loop {
                let asked = tokio::select! {
                    () = stop.cancelled() => return,
                    _ = hangup.recv() => true,
                    _ = ticks.tick() => false,
                };
                if asked {
                    tracing::info!("SIGHUP: looking at the TLS files");
                    notify::reloading();
                }
                for one in &tls {
                    one.reload();
                }
                if asked {
                    notify::reloaded();
                }
            }
        });
        self.background
            .spawn(Arc::clone(&self.broker).maintain(self.stop_background.clone()));
        self.background.spawn(watch_health(
            Arc::clone(&self.broker),
            self.health.clone(),
            self.stop_background.clone(),
        ));
        self.background.spawn(load_registry_when_up(
            Arc::clone(&self.broker),
            Arc::clone(&self.supervisor),
            self.stop_background.clone(),
        ));
        Ok(())
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

    /// Says where it listens, for whoever started it with port 0. Written under another name first: a reader never sees
    /// half of it.
    fn write_ready_file(&self, path: &Path) -> Result<(), Failure> {
        let text = serde_json::json!({
            "listeners": self.addresses,
            "status": self.status_address,
            "pid": std::process::id(),
        });
        let partial = path.with_extension("partial");
        fs::write(&partial, text.to_string())
            .and_then(|()| fs::rename(&partial, path))
            .map_err(|error| {
                let what = format!("cannot write the ready file {}: {error}", path.display());
                Failure::new(Exit::Usage, what)
            })
    }

    /// The drain, in this order: health says `NOT_SERVING`; load balancers get a moment; no more connections, and GOAWAY on
    /// those there are; calls under way end; mutations get their outcomes; the token's workers end; the store closes; the
    /// audit log gets its last entry.
    async fn stop(self) {
        for service in [rpc::USER_KEY_SERVICE, rpc::CONTROL_SERVICE, ""] {
            self.health
                .set_service_status(service, ServingStatus::NotServing)
                .await;
        }
        self.stop_background.cancel();
        self.background.close();
        self.background.wait().await;
        time::sleep(LAME_DUCK).await;
        self.stop_connections.cancel();
        self.connections.close();
        let patience = Duration::from_millis(self.config.limits.drain_timeout_ms);
        if time::timeout(patience, self.connections.wait())
            .await
            .is_err()
        {
            tracing::warn!(
                connections = self.connections.len(),
                "connections cut at the end of the drain"
            );
        }
        self.broker.finish(Deadline::after(STOP_TIMEOUT)).await;
        self.supervisor
            .drain_and_stop(Deadline::after(STOP_TIMEOUT))
            .await;
        self.store.close().await;
        let audit = self.audit;
        if tokio::task::spawn_blocking(move || audit.close())
            .await
            .is_err()
        {
            tracing::error!("the audit log was not closed in order");
        }
        tracing::info!("stopped");
    }
}

/// Opening reads and syncs files, and waits for its own first entry.
async fn open_audit(settings: audit::Settings) -> Result<(AuditLog, Vec<OpenIntent>), Failure> {
    let opened = tokio::task::spawn_blocking(move || settings.open(&settings.instance)).await;
    let opened = opened.map_err(|panic| Failure::new(Exit::Internal, panic.to_string()))?;
    Ok(opened?)
}

async fn bind_all(listeners: &[ListenerSettings]) -> Result<Vec<Bound>, Failure> {
    let mut bound = Vec::new();
    for settings in listeners {
        let tls = Tls::load(settings.tls.clone(), settings.client_certificates)
            .map_err(|what| Failure::new(Exit::Configuration, what))?;
        bound.push(Bound {
            socket: bind(settings.address).await?,
            settings: settings.clone(),
            tls: Arc::new(tls),
        });
    }
    Ok(bound)
}

async fn bind(address: SocketAddr) -> Result<TcpListener, Failure> {
    TcpListener::bind(address).await.map_err(|error| {
        let in_use = error.kind() == std::io::ErrorKind::AddrInUse;
        let what = if in_use {
            format!(
                "{address} is in use: another keybroker or another program listens there; stop it, or \
                 choose another address"
            )
        } else {
            format!("cannot listen on {address}: {error}")
        };
        let exit = if in_use { Exit::InUse } else { Exit::Configuration };
        Failure::new(exit, what)
    })
}

fn local(socket: &TcpListener) -> Result<SocketAddr, Failure> {
    socket
        .local_addr()
        .map_err(|error| Failure::new(Exit::Internal, error.to_string()))
}

/// Starts the workers with the keys that the registry names, and waits for the first attempt.
async fn start_token(
    config: &Config,
    store: &Arc<dyn Store>,
    program: PathBuf,
) -> Result<Arc<Supervisor>, Failure> {
    let rows = store.registry().await?;
    let keys: Vec<ExpectedKey> = rows
        .iter()
        .filter(|row| row.state != WrappingKeyState::Destroyed)
        .map(|row| ExpectedKey {
            id: row.id,
            fingerprint: row.fingerprint,
        })
        .collect();
    if keys.is_empty() {
        return Err(Failure::new(
            Exit::Untrusted,
            "no wrapping key is registered, so there is nothing to serve with; run `keybroker key \
             generate`",
        ));
    }
    let supervisor = Supervisor::start(config.token.clone(), keys, program);
    let serving = supervisor.settled().await;
    if let Some(error) = supervisor.startup_error() {
        let exit = if error.untrusted {
            Exit::Untrusted
        } else {
            Exit::Token
        };
        supervisor
            .drain_and_stop(Deadline::after(Duration::ZERO))
            .await;
        return Err(Failure::new(exit, error.message));
    }
    if let Serving::Down(cause) | Serving::Untrusted(cause) = serving {
        // Not an end: a token that is away comes back, and a refused PIN is mended in its file.
        tracing::error!(%cause, "started without the token; nothing is released until it serves");
    }
    Ok(supervisor)
}

async fn watch_health(broker: Arc<Broker>, reporter: HealthReporter, stop: CancellationToken) {
    let mut ticks = time::interval(HEALTH_INTERVAL);
    let mut last = None;
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = ticks.tick() => {}
        }
        let health = broker.health();
        if last.as_ref() == Some(&health) {
            continue;
        }
        tracing::info!(user_keys = health.user_keys, control = health.control, detail = %health.detail, "health");
        notify::health(&health.detail);
        let status = |good| {
            if good {
                ServingStatus::Serving
            } else {
                ServingStatus::NotServing
            }
        };
        let whole = status(health.user_keys && health.control);
        for (service, status) in [
            (rpc::USER_KEY_SERVICE, status(health.user_keys)),
            (rpc::CONTROL_SERVICE, status(health.control)),
            ("", whole),
        ] {
            reporter.set_service_status(service, status).await;
        }
        last = Some(health);
    }
}

/// When the token was not up at the start: verifies the registry once it is, again and again until that succeeds.
async fn load_registry_when_up(
    broker: Arc<Broker>,
    supervisor: Arc<Supervisor>,
    stop: CancellationToken,
) {
    let mut ticks = time::interval(REGISTRY_INTERVAL);
    while !broker.has_registry() {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = ticks.tick() => {}
        }
        if supervisor.state().serving != Serving::Up {
            continue;
        }
        match broker
            .load_registry(Deadline::after(REGISTRY_TIMEOUT))
            .await
        {
            Ok(()) => return,
            Err(error) if error.reason() == Reason::TokenUntrusted => {
                tracing::error!(alarm = "registry", %error, "registry and token disagree; nothing is released");
                time::sleep(REGISTRY_TIMEOUT).await;
            }
            Err(error) => tracing::warn!(%error, "registry not verified yet"),
        }
    }
}
