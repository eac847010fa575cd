//! While the broker serves, periodically checks the health, the TLS files, the policies, and a
//! registry that is not verified yet.

use std::{sync::Arc, time::Duration};

use tokio::{signal::unix::Signal, time};
use tokio_util::sync::CancellationToken;
use tonic_health::{ServingStatus, server::HealthReporter};

use keybroker_api::rpc;
use keybroker_broker::{Broker, Health};
use keybroker_core::{call::Deadline, error::Reason};
use keybroker_hsm::Token;
use keybroker_policy::Policy;

use super::{file_problems::FileProblems, notify, tls::Tls, token_reload::TokenReload};

/// Maximum time for reading the registry and verifying it with the token.
pub(super) const REGISTRY_TIMEOUT: Duration = Duration::from_secs(10);

const HEALTH_INTERVAL: Duration = Duration::from_millis(250);
const FILES_INTERVAL: Duration = Duration::from_secs(1);
const REGISTRY_INTERVAL: Duration = Duration::from_millis(250);

pub(super) async fn health(
    broker: Arc<Broker>,
    files: Arc<FileProblems>,
    reporter: HealthReporter,
    stop: CancellationToken,
) {
    let mut ticks = time::interval(HEALTH_INTERVAL);
    let mut last = None;
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = ticks.tick() => {}
        }
        let health = files.health(&broker);
        if last.as_ref() == Some(&health) {
            continue;
        }
        tracing::info!(user_keys = health.user_keys, control = health.control, detail = %health.detail, "health");
        notify::health(&health.detail);
        report(&health, &reporter).await;
        last = Some(health);
    }
}

pub(super) async fn report(health: &Health, reporter: &HealthReporter) {
    let status = |good| {
        if good {
            ServingStatus::Serving
        } else {
            ServingStatus::NotServing
        }
    };
    for (service, good) in [
        (rpc::USER_KEY_SERVICE, health.user_keys),
        (rpc::DEVICE_SERVICE, health.user_keys),
        (rpc::CONTROL_SERVICE, health.control),
        ("", health.user_keys && health.control),
    ] {
        reporter.set_service_status(service, status(good)).await;
    }
}

/// Checks the TLS files, the policies and the tokens of the configuration for changes each second and on SIGHUP.
pub(super) async fn files(
    tls: Vec<Arc<Tls>>,
    policy: Arc<Policy>,
    mut tokens: TokenReload,
    problems: Arc<FileProblems>,
    mut hangup: Signal,
    stop: CancellationToken,
) {
    let mut ticks = time::interval(FILES_INTERVAL);
    loop {
        let asked = tokio::select! {
            () = stop.cancelled() => return,
            _ = hangup.recv() => true,
            _ = ticks.tick() => false,
        };
        if asked {
            tracing::info!(
                "SIGHUP received; reading the TLS files, the policies and the tokens of the configuration again"
            );
            notify::reloading();
        }
        // The check runs on a blocking thread, because the verification of large revocation lists
        // and policies takes a long time.
        let listeners = tls.clone();
        let look = move || {
            for one in &listeners {
                if asked {
                    one.report_again();
                }
                one.reload();
            }
            Tls::measure(&listeners)
        };
        match tokio::task::spawn_blocking(look).await {
            Ok(found) => problems.set_of_tls(found),
            Err(panic) => {
                keybroker_core::alert!(Bug, %panic, "cannot check the TLS files for changes");
            }
        }
        let policy = Arc::clone(&policy);
        if let Err(panic) = tokio::task::spawn_blocking(move || policy.reload(asked)).await {
            keybroker_core::alert!(Bug, %panic, "cannot check the policies for changes");
        }
        tokens.follow(asked).await;
        problems.set_of_configuration(tokens.problem());
        if asked {
            notify::reloaded();
        }
    }
}

/// If the token was unavailable at the start, verifies the registry later, and retries until the
/// verification succeeds.
pub(super) async fn registry_once_up(
    broker: Arc<Broker>,
    token: Arc<dyn Token>,
    stop: CancellationToken,
) {
    let mut ticks = time::interval(REGISTRY_INTERVAL);
    while !broker.has_registry() {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = ticks.tick() => {}
        }
        if !token.state().serves_a_key() {
            continue;
        }
        match broker
            .load_registry(Deadline::after(REGISTRY_TIMEOUT))
            .await
        {
            Ok(()) => return,
            Err(error) if error.reason() == Reason::TokenUntrusted => {
                keybroker_core::alert!(Registry, %error, "the registry and the token differ; no key is released");
                tokio::select! {
                    () = stop.cancelled() => return,
                    () = time::sleep(REGISTRY_TIMEOUT) => {}
                }
            }
            Err(error) => tracing::warn!(
                %error,
                "the registry is not verified yet, so no key is released; the broker tries again"
            ),
        }
    }
}
