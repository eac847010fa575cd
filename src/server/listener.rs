//! The accept loop: connections under a limit, a handshake under a timeout, HTTP/2 with every limit set, and an orderly
//! end. Our own rather than tonic's, which has no cap, no age with a grace, and no bound on its graceful stop.
//!
//! Mitigations: M1, M3 of `THREAT_MODEL.md`.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use axum::{Extension, Router};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Semaphore, SemaphorePermit, TryAcquireError},
    time,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    auth::{Authenticator, PeerCertificate},
    broker::Broker,
    call::caller::Caller,
};

use super::{
    Limits,
    handshake::{self, Greeted, Refused},
    tls::Tls,
};

/// After an accept that failed for want of descriptors: a moment, so that the loop does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// Between two log lines about that.
const ACCEPT_WARNING_INTERVAL: Duration = Duration::from_secs(10);
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(20);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(10);
const HEADER_BYTES_MAX: u32 = 16 * 1024;
/// Bytes that a client may send ahead on one call (a message and its prefix fit) and on all calls of a connection.
const STREAM_WINDOW_BYTES: u32 = 128 * 1024;
const CONNECTION_WINDOW_BYTES: u32 = 512 * 1024;
/// Bytes of answers kept for a client that does not read them.
const SEND_BUFFER_BYTES_MAX: usize = 128 * 1024;

/// After GOAWAY, a connection without calls that has not ended for this long is one whose client does not listen.
const GOODBYE: Duration = Duration::from_secs(1);

/// What every connection of every listener shares.
#[derive(Clone, Debug)]
pub(super) struct Shared {
    pub(super) broker: Arc<Broker>,
    pub(super) authenticator: Arc<Authenticator>,
    pub(super) connections: Arc<Semaphore>,
    /// Places among them for peers without a principal: a part, so that they never take all.
    pub(super) strangers: Arc<Semaphore>,
    pub(super) limits: Arc<Limits>,
    /// Stop accepting and ask every connection to leave.
    pub(super) stop: CancellationToken,
    pub(super) tasks: TaskTracker,
}

/// One listener: its socket, its TLS and what it lets in.
#[derive(Debug)]
pub(super) struct Listener {
    pub(super) socket: TcpListener,
    pub(super) tls: Arc<Tls>,
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
                tls: Arc::clone(&self.tls),
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

struct Connection {
    peer: SocketAddr,
    tls: Arc<Tls>,
    routes: Router,
    shared: Shared,
}

impl Connection {
    async fn serve(self, stream: TcpStream) {
        let _open = Open::new();
        let accepting = self.tls.current();
        let timeout = Duration::from_millis(self.shared.limits.handshake_timeout_ms);
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "no TCP_NODELAY");
        }
        let config = Arc::clone(&accepting.config);
        let greeted = tokio::select! {
            // No call can be under way yet.
            () = self.shared.stop.cancelled() => return,
            greeted = handshake::greet(stream, config, timeout) => greeted,
        };
        match greeted {
            Ok(greeted) => self.serve_http(greeted, &accepting.outdated).await,
            Err(refused) => self.refuse(&refused),
        }
    }

    fn refuse(&self, refused: &Refused) {
        let cause = refused.cause();
        metrics::counter!("keybroker_handshakes_failed_total", "cause" => cause).increment(1);
        tracing::debug!(peer = %self.peer, cause, error = %refused, "connection refused");
        if let Some(reason) = refused.reason() {
            self.shared.broker.note_refusal(self.peer.ip(), reason);
        }
    }

    async fn serve_http(self, greeted: Greeted, outdated: &CancellationToken) {
        let limits = &self.shared.limits;
        let certificate = self.certificate(&greeted);
        let caller = self.caller(certificate.as_ref());
        let Ok(_place) = self.stranger_place(&caller) else {
            metrics::counter!("keybroker_strangers_turned_away_total").increment(1);
            return;
        };
        let service = self.routes.clone().layer(Extension(caller.clone()));
        let mut http = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
        http.timer(TokioTimer::new())
            .max_concurrent_streams(limits.streams_per_connection_max)
            .max_header_list_size(HEADER_BYTES_MAX)
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .max_send_buf_size(SEND_BUFFER_BYTES_MAX)
            .keep_alive_interval(KEEP_ALIVE_INTERVAL)
            .keep_alive_timeout(KEEP_ALIVE_TIMEOUT);
        let connection =
            http.serve_connection(TokioIo::new(greeted), TowerToHyperService::new(service));
        tokio::pin!(connection);
        let age_max = Duration::from_millis(limits.connection_age_max_ms);
        // The handshake looked at the certificate's dates once; nobody looks again while the connection lasts.
        let valid = certificate.map_or(age_max, |certificate| certificate.remaining());
        let handshake = Duration::from_millis(limits.handshake_timeout_ms);
        let patience_with_strangers = async {
            if caller.is_known() {
                std::future::pending::<()>().await;
            } else {
                unused(&caller, handshake).await;
            }
        };
        tokio::select! {
            ended = connection.as_mut() => return note_end(self.peer, ended),
            () = self.shared.stop.cancelled() => {}
            () = outdated.cancelled() => {}
            () = time::sleep(age_max.min(valid)) => {}
            () = patience_with_strangers => {}
        }
        // GOAWAY: calls under way end, new ones go to another connection. No call is longer than this.
        connection.as_mut().graceful_shutdown();
        let patience = Duration::from_millis(limits.call_timeout_max_ms);
        tokio::select! {
            ended = connection.as_mut() => note_end(self.peer, ended),
            () = unused(&caller, GOODBYE) => tracing::debug!(peer = %self.peer, "silent connection cut"),
            () = time::sleep(patience) => {
                tracing::debug!(peer = %self.peer, "connection cut after its grace");
            }
        }
    }

    fn stranger_place(
        &self,
        caller: &Caller,
    ) -> Result<Option<SemaphorePermit<'_>>, TryAcquireError> {
        if caller.is_known() {
            return Ok(None);
        }
        self.shared.strangers.try_acquire().map(Some)
    }

    /// What the handshake verified: read once per connection.
    fn certificate(&self, greeted: &Greeted) -> Option<PeerCertificate> {
        let chain = greeted.tls().get_ref().1.peer_certificates();
        let leaf = chain.and_then(|chain| chain.first())?;
        PeerCertificate::read(leaf)
            .inspect_err(|error| tracing::info!(peer = %self.peer, error, "client certificate"))
            .ok()
    }

    /// Who is at the other end: asked once per connection.
    fn caller(&self, certificate: Option<&PeerCertificate>) -> Caller {
        let principal = self.shared.authenticator.authenticate(certificate);
        if let Err(error) = &principal {
            tracing::info!(peer = %self.peer, %error, "connection without a principal");
        }
        let calls_max = usize::try_from(self.shared.limits.streams_per_connection_max);
        Caller::new(
            self.peer,
            principal.map(Arc::new),
            calls_max.unwrap_or(Semaphore::MAX_PERMITS),
        )
    }
}

/// Waits until a connection was without calls at two looks in a row.
async fn unused(caller: &Caller, while_looking: Duration) {
    let mut was_idle = false;
    loop {
        time::sleep(while_looking).await;
        let is_idle = caller.is_idle();
        if was_idle && is_idle {
            return;
        }
        was_idle = is_idle;
    }
}

/// Open connections, counted also when one panics.
struct Open;

impl Open {
    fn new() -> Self {
        metrics::gauge!("keybroker_connections").increment(1.0);
        Self
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        metrics::gauge!("keybroker_connections").decrement(1.0);
    }
}

fn note_end(peer: SocketAddr, ended: Result<(), hyper::Error>) {
    if let Err(error) = ended {
        tracing::debug!(%peer, %error, "connection ended");
    }
}
