//! Prepares the broker before the listeners open: the ports, certificates, audit log, database
//! schema and token.
//!
//! Mitigation: M14 of `THREAT_MODEL.md`.

use std::{
    net::SocketAddr,
    path::PathBuf,
    sync::{Arc, OnceLock},
};

use tokio::net::TcpListener;

use crate::{
    cli::exit::{Exit, Failure},
    config::{Config, accepted},
    places::Registry,
};
use keybroker_audit as audit;
use keybroker_audit::{AuditLog, Entry, EntryKind, OpenIntent, Outcome};
use keybroker_broker::Serving;
use keybroker_core::{
    call::{CallId, Timestamp},
    error::chain,
    state::StateDirectory,
};
use keybroker_hsm::{Entry as TokenEntry, Pool};
use keybroker_store as store;
use keybroker_store::{KnownLog, Store, StoreLock};

use super::{ListenerSettings, StatusSettings, tls::Tls};

pub(super) struct Bound {
    pub(super) socket: TcpListener,
    pub(super) settings: ListenerSettings,
    pub(super) tls: Option<Arc<Tls>>,
}

/// The status listener, and the remote status listener.
pub(super) struct BoundStatus {
    pub(super) socket: TcpListener,
    pub(super) address: SocketAddr,
    pub(super) remote: Option<BoundRemote>,
}

pub(super) struct BoundRemote {
    pub(super) socket: TcpListener,
    pub(super) address: SocketAddr,
    pub(super) tls: Option<Arc<Tls>>,
}

impl BoundStatus {
    /// The TLS settings of the remote status listener.
    pub(super) fn tls(&self) -> Option<Arc<Tls>> {
        self.remote.as_ref()?.tls.clone()
    }
}

pub(super) async fn bind_status(
    settings: &StatusSettings,
    state: &StateDirectory,
) -> Result<BoundStatus, Failure> {
    let socket = bind(settings.address).await?;
    let remote = match &settings.remote {
        None => None,
        Some(remote) => {
            let tls = remote
                .load_tls(Some(state))
                .map_err(|error| Failure::new(Exit::Configuration, chain(&error)))?;
            let socket = bind(remote.address).await?;
            Some(BoundRemote {
                address: local(&socket)?,
                socket,
                tls: tls.map(Arc::new),
            })
        }
    };
    Ok(BoundStatus {
        address: local(&socket)?,
        socket,
        remote,
    })
}

/// Opens the audit log on a blocking thread, because opening reads and synchronises files and waits
/// for the first entry.
pub(super) async fn open_audit(
    settings: audit::Settings,
) -> Result<(AuditLog, Vec<OpenIntent>), Failure> {
    let opened = tokio::task::spawn_blocking(move || settings.open_instance()).await;
    let opened = opened.map_err(|panic| Failure::new(Exit::Internal, panic.to_string()))?;
    Ok(opened?)
}

const MIGRATE: &str = "store.migrate";

/// Migrates the database to the schema of this release, if the configuration permits migrations.
/// The function writes an intent and an outcome of the migration to the audit log, and holds the
/// lock of the database during the migration. First writes the missing outcomes of interrupted
/// migrations of earlier starts.
pub(super) async fn migrate(
    settings: &store::Settings,
    audit: &AuditLog,
    instance: &str,
    open: &mut Vec<OpenIntent>,
) -> Result<(), Failure> {
    let cut_short: Vec<OpenIntent> = open
        .extract_if(.., |intent| intent.intent.action == MIGRATE)
        .collect();
    if !settings.migrate_at_start && cut_short.is_empty() {
        return Ok(());
    }
    // A newer schema is not an error at this point. When the database is opened, the store decides
    // whether this release supports the newer schema.
    let status = store::status(settings).await?;
    let pending = status.current < status.newest;
    for intent in cut_short {
        let outcome = if pending {
            Outcome::Failed
        } else {
            Outcome::Ok
        };
        audit.append(intent.recovered(outcome)).await?;
    }
    if !settings.migrate_at_start || !pending {
        return Ok(());
    }
    // A migration cannot be undone, so the broker first rejects a database that was used with
    // another audit log.
    let known = store::known_audit_log(settings, instance, audit.id()).await?;
    if known == KnownLog::Another && audit.is_binding_required() {
        return Err(audit.refuse_unknown().into());
    }
    let call = CallId::fresh();
    let entry = |kind, outcome| {
        let mut entry = Entry::new(kind, MIGRATE, outcome);
        entry.principal = Some(format!("local-uid:{}", rustix::process::getuid().as_raw()));
        entry.peer = Some("local".to_owned());
        entry.call_id = Some(call);
        entry
    };
    audit.append(entry(EntryKind::Intent, Outcome::Ok)).await?;
    let migrated = store::migrate(settings, false).await;
    let outcome = if migrated.is_ok() {
        Outcome::Ok
    } else {
        Outcome::Failed
    };
    let recorded = audit.append(entry(EntryKind::Outcome, outcome)).await;
    migrated?;
    recorded?;
    Ok(())
}

/// Locks and opens the database, and compares the audit log of this instance with the audit logs
/// that the database lists.
pub(super) async fn open_store(
    config: &Config,
    audit: &AuditLog,
) -> Result<(StoreLock, Arc<dyn Store>), Failure> {
    let lock = store::lock(&config.store)?;
    let store = store::open_to_serve(&config.store).await?;
    bind_log(audit, &store, &config.audit.instance).await?;
    Ok((lock, store))
}

/// Records the audit log of this instance in the database. Fails if the database lists only other
/// logs of this instance, because the log was probably replaced. If an operator acknowledged the
/// current log, or an earlier release created it, the function adds the log with a warning.
async fn bind_log(audit: &AuditLog, store: &Arc<dyn Store>, instance: &str) -> Result<(), Failure> {
    match store.audit_log(instance, audit.id()).await? {
        KnownLog::This => {}
        KnownLog::Another if audit.is_binding_required() => {
            return Err(audit.refuse_unknown().into());
        }
        known @ (KnownLog::Another | KnownLog::None) => {
            if known == KnownLog::Another {
                tracing::warn!(
                    instance,
                    log = audit.id(),
                    "the database already lists other audit logs of this instance; the current audit log is added to the \
                     list, because an operator acknowledged the log, or an earlier version of the broker created the log. If you did \
                     not expect a new log, find out who replaced it"
                );
            }
            let added = store.add_audit_log(instance, audit.id(), Timestamp::now());
            if let Err(error) = added.await {
                // A temporarily read-only database must not prevent the release of keys.
                tracing::warn!(%error, "cannot record the audit log in the database; the next start tries again");
                return Ok(());
            }
            let mut bound = Entry::new(EntryKind::System, "log.store_bound", Outcome::Ok);
            bound.store = store.evidence(&[]).await?.store.map(|id| id.to_string());
            audit.append(bound).await?;
        }
    }
    Ok(audit.require_binding()?)
}

/// Name of the file in the state directory that lists the accepted risks of the last start.
const ACCEPTED_RISKS: &str = "accepted-risks";

/// Logs the risks of the token that the settings accept, and records them in the audit log if they differ from the risks at the
/// last start. Returns the risks as sentences.
pub(super) async fn record_accepted_risks(
    config: &Config,
    audit: &AuditLog,
) -> Result<Vec<String>, Failure> {
    let mut risks = Vec::new();
    for token in config.tokens.all() {
        let prefix = config.tokens.prefix(token);
        for risk in accepted::risks(token) {
            tracing::warn!(
                token = token.name,
                setting = risk.setting,
                what = risk.what,
                gives_away = risk.gives_away,
                "the configuration accepts a risk of the token"
            );
            risks.push(format!("{prefix}{risk}"));
        }
    }
    let state = StateDirectory::below(&config.audit.directory);
    // The name contains the instance, because several instances may share the state directory.
    let fact = format!("{ACCEPTED_RISKS}-{}", config.audit.instance);
    let before = state.read_json::<Vec<String>>(&fact);
    let is_known = match &before {
        Ok(before) => *before.as_deref().unwrap_or_default() == *risks,
        Err(error) => {
            tracing::warn!(error = %chain(error), "cannot read the accepted risks of the last start");
            false
        }
    };
    if is_known {
        return Ok(risks);
    }
    let mut changed = Entry::new(EntryKind::System, "token.risks_accepted", Outcome::Ok);
    changed.count = u64::try_from(risks.len()).ok();
    changed.risks = (!risks.is_empty()).then(|| risks.join(". ").into());
    audit.append(changed).await?;
    if let Err(error) = state.write_json(&fact, &risks) {
        tracing::warn!(error = %chain(&error), "cannot store the accepted risks; the next start records them again");
    }
    Ok(risks)
}

pub(super) async fn bind_all(
    listeners: &[ListenerSettings],
    state: &StateDirectory,
) -> Result<Vec<Bound>, Failure> {
    let mut bound = Vec::new();
    for settings in listeners {
        let tls = settings
            .load_tls(Some(state))
            .map_err(|error| Failure::new(Exit::Configuration, chain(&error)))?;
        bound.push(Bound {
            socket: bind(settings.address).await?,
            settings: settings.clone(),
            tls: tls.map(Arc::new),
        });
    }
    Ok(bound)
}

/// Stores the revocation lists that the listeners accepted. Call this function after the audit log
/// is open and the database is checked: only then is it certain that no other broker uses the state
/// directory.
pub(super) fn remember_lists(bound: &[Bound], status: &BoundStatus) -> Result<(), Failure> {
    let listeners = bound.iter().filter_map(|one| one.tls.clone());
    for tls in listeners.chain(status.tls()) {
        tls.remember_lists()
            .map_err(|error| Failure::new(Exit::Configuration, chain(&error)))?;
    }
    Ok(())
}

pub(super) async fn bind(address: SocketAddr) -> Result<TcpListener, Failure> {
    TcpListener::bind(address).await.map_err(|error| {
        let in_use = error.kind() == std::io::ErrorKind::AddrInUse;
        let what = if in_use {
            format!(
                "{address} is in use by another keybroker process or another program; stop this program, or choose \
                 another address"
            )
        } else {
            format!("cannot listen on {address}: {error}")
        };
        let exit = if in_use { Exit::InUse } else { Exit::Configuration };
        let failure = Failure::new(exit, what);
        match error.kind() {
            std::io::ErrorKind::PermissionDenied => failure.hint(
                "ports below 1024 need the capability CAP_NET_BIND_SERVICE: set \
                 `AmbientCapabilities=CAP_NET_BIND_SERVICE` in the systemd unit, or listen on a higher port behind a \
                 redirect",
            ),
            std::io::ErrorKind::AddrNotAvailable => failure.hint(
                "no network interface of this machine has this address; use 0.0.0.0 or [::] to listen on all interfaces",
            ),
            _ => failure,
        }
    })
}

pub(super) fn local(socket: &TcpListener) -> Result<SocketAddr, Failure> {
    socket
        .local_addr()
        .map_err(|error| Failure::new(Exit::Internal, error.to_string()))
}

/// Starts the workers with the keys of the registry, and waits for the result of the first attempt.
/// If a caller cancels this function, the caller must stop the tokens in `started`.
pub(super) async fn start_token(
    config: &Config,
    store: &Arc<dyn Store>,
    program: PathBuf,
    started: &OnceLock<Arc<Pool>>,
) -> Result<Arc<Pool>, Failure> {
    let registry = Registry::read_for_service(&**store).await?;
    let tokens = config.tokens.all();
    let entries: Vec<TokenEntry> = tokens
        .iter()
        .map(|token| TokenEntry {
            keys: registry.expected_among(token, tokens),
            settings: token.clone(),
        })
        .collect();
    if entries.iter().all(|entry| entry.keys.is_empty()) {
        return Err(Failure::new(
            Exit::Untrusted,
            "no wrapping key is registered; create a wrapping key with `keybroker key generate`",
        ));
    }
    let pool = Arc::clone(started.get_or_init(|| {
        let state = StateDirectory::below(&config.audit.directory);
        Pool::start(entries, program, state)
    }));
    let serving = pool.settled().await;
    if let Some(error) = pool.startup_error() {
        let exit = if error.untrusted {
            Exit::Untrusted
        } else {
            Exit::Token
        };
        return Err(Failure::new(exit, error.message));
    }
    if let Serving::Down(cause) | Serving::Untrusted(cause) = serving {
        // The broker continues, because the token may become available again, and an operator can
        // correct a wrong PIN file.
        tracing::error!(%cause, "the broker started without the token; no key is released until the token is available");
    }
    Ok(pool)
}
