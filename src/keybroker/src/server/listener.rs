//! The accept loop, which limits the number of connections and serves each connection in a separate
//! task. The loop replaces the server of the library tonic, which limits neither the number of
//! connections nor the time of a graceful shutdown.
//!
//! Mitigations: M1, M3 of `THREAT_MODEL.md`.

use std::{sync::Arc, time::Duration};

use axum::Router;
use ipnet::IpNet;
use tokio::{net::TcpListener, time};

use keybroker_core::metrics;

use super::{
    Limits, connection::Connection, log_limit::LogLimit, shared::Shared, tls::Tls, unauthenticated,
};

/// Pause after a failure of `accept()`, for example if no descriptors are free, so that the loop
/// does not use the CPU continuously.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// A listener with its socket, its TLS settings and its routes.
#[derive(Debug)]
pub(super) struct Listener {
    pub(super) socket: TcpListener,
    /// The TLS settings; `None` only if the configuration sets `plaintext`.
    pub(super) tls: Option<Arc<Tls>>,
    pub(super) routes: Router,
    /// Networks of proxies and load balancers, whose connections transport calls of many clients.
    pub(super) trusted_proxies: Vec<IpNet>,
}

impl Listener {
    /// Accepts connections until the stop signal, and then closes the socket, so that the system
    /// refuses new connections.
    pub(super) async fn accept(self, shared: Shared) {
        let failures = LogLimit::default();
        let full = LogLimit::default();
        loop {
            if shared.connections.available_permits() == 0 {
                note_full(&shared.limits, &full);
            }
            let place = Arc::clone(&shared.connections).acquire_owned();
            let (permit, accepted) = tokio::select! {
                () = shared.stop.cancelled() => return,
                both = async { (place.await, self.socket.accept().await) } => both,
            };
            let (stream, peer) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    metrics::ACCEPT_FAILURES.increment();
                    if let Some(left_out) = failures.count() {
                        tracing::warn!(
                            %error, left_out,
                            "cannot accept a connection; new connections wait in the kernel's queue"
                        );
                    }
                    time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            // Without TLS, every connection comes from the proxy that terminates TLS.
            let network = self
                .tls
                .as_ref()
                .and_then(|_| unauthenticated::network(peer.ip(), &self.trusted_proxies));
            let connection = Connection {
                peer,
                network,
                tls: self.tls.clone(),
                routes: self.routes.clone(),
                shared: shared.clone(),
            };
            shared.tasks.spawn(async move {
                connection.serve(stream).await;
                drop(permit);
            });
        }
    }
}

/// Logs that the maximum number of connections is reached. The next connection waits in the
/// kernel's queue until an open connection ends.
fn note_full(limits: &Limits, full: &LogLimit) {
    metrics::CONNECTIONS_FULL.increment();
    if let Some(left_out) = full.count() {
        tracing::warn!(
            connections_max = limits.connections_max,
            left_out,
            "the limit of connections is reached; a new connection waits until another connection ends"
        );
    }
}
