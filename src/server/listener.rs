//! The accept loop: connections under a limit, each in a task of its own. Our own rather than tonic's, which has no cap, no age
//! with a grace, and no bound on its graceful stop.
//!
//! Mitigations: M1, M3 of `THREAT_MODEL.md`.

use std::{sync::Arc, time::Duration};

use axum::Router;
use tokio::{net::TcpListener, sync::Semaphore, time};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{auth::Authenticator, broker::Broker};

use super::{Limits, connection::Connection, strangers::Strangers, tls::Tls};

/// After an accept that failed for want of descriptors: a moment, so that the loop does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// Between two log lines about that.
const ACCEPT_WARNING_INTERVAL: Duration = Duration::from_secs(10);
/// What every connection of every listener shares.
#[derive(Clone, Debug)]
pub(super) struct Shared {
    pub(super) broker: Arc<Broker>,
    pub(super) authenticator: Arc<Authenticator>,
    pub(super) connections: Arc<Semaphore>,
    /// Places among them for peers without a principal: a part, so that they never take all.
    pub(super) strangers: Arc<Strangers>,
    pub(super) limits: Arc<Limits>,
    /// Stop accepting and ask every connection to leave.
    pub(super) stop: CancellationToken,
    pub(super) tasks: TaskTracker,
}

/// One listener: its socket, its TLS and what it lets in.
#[derive(Debug)]
pub(super) struct Listener {
    pub(super) socket: TcpListener,
    /// Absent where the configuration says in so many words that there is none.
    pub(super) tls: Option<Arc<Tls>>,
    pub(super) routes: Router,
}

impl Listener {
    /// Accepts until told to stop; dropping the socket then refuses newcomers at once.
    pub(super) async fn accept(self, shared: Shared) {
        let mut warned: Option<time::Instant> = None;
        loop {
            let place = Arc::clone(&shared.connections).acquire_owned();
            let (permit, accepted) = tokio::select! {
                () = shared.stop.cancelled() => return,
                both = async { (place.await, self.socket.accept().await) } => both,
            };
            let (stream, peer) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    metrics::counter!("keybroker_accept_failures_total").increment(1);
                    if warned.is_none_or(|at| at.elapsed() > ACCEPT_WARNING_INTERVAL) {
                        tracing::warn!(%error, "accept failed; connections wait in the kernel's queue");
                        warned = Some(time::Instant::now());
                    }
                    time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let connection = Connection {
                peer,
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
