//! The accept loop: connections under a limit, a handshake under a timeout, HTTP/2 with every limit set, and an orderly
//! end. Our own rather than tonic's, which has no cap, no age with a grace, and no bound on its graceful stop.
//!
//! Mitigations: M1, M3 of `THREAT_MODEL.md`.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use axum::{Extension, Router};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    auth::{Authenticator, PeerCertificate},
    broker::Broker,
    error::Reason,
    rpc::Caller,
};

use super::{Limits, tls::Tls};

/// After an accept that failed for want of descriptors: a moment, so that the loop does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(20);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(10);
const HEADER_BYTES_MAX: u32 = 16 * 1024;
/// How long a connection that was asked to leave may take.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(30);

/// What every connection of every listener shares.
#[derive(Clone, Debug)]
pub(super) struct Shared {
    pub(super) broker: Arc<Broker>,
    pub(super) authenticator: Arc<Authenticator>,
    pub(super) connections: Arc<Semaphore>,
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
        loop {
            let Ok(permit) = Arc::clone(&shared.connections).acquire_owned().await else {
                return;
            };
            let accepted = tokio::select! {
                () = shared.stop.cancelled() => return,
                accepted = self.socket.accept() => accepted,
            };
            let (stream, peer) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "accept failed");
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
        metrics::gauge!("keybroker_connections").increment(1.0);
        let accepting = self.tls.current();
        let timeout = Duration::from_millis(self.shared.limits.handshake_timeout_ms);
        let acceptor = TlsAcceptor::from(Arc::clone(&accepting.config));
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "no TCP_NODELAY");
        }
        match time::timeout(timeout, acceptor.accept(stream)).await {
            Ok(Ok(stream)) => self.serve_http(stream, &accepting.outdated).await,
            Ok(Err(error)) => self.refuse("handshake", &error),
            Err(_) => self.refuse("timeout", &io::Error::from(io::ErrorKind::TimedOut)),
        }
        metrics::gauge!("keybroker_connections").decrement(1.0);
    }

    fn refuse(&self, cause: &'static str, error: &io::Error) {
        metrics::counter!("keybroker_handshakes_failed_total", "cause" => cause).increment(1);
        tracing::debug!(peer = %self.peer, %error, "TLS handshake failed");
        self.shared
            .broker
            .note_refusal(self.peer.ip(), Reason::Credential);
    }

    async fn serve_http(self, stream: TlsStream<TcpStream>, outdated: &CancellationToken) {
        let caller = self.caller(&stream);
        let service = self.routes.clone().layer(Extension(caller));
        let limits = &self.shared.limits;
        let mut http = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
        http.timer(TokioTimer::new())
            .max_concurrent_streams(limits.streams_per_connection_max)
            .max_header_list_size(HEADER_BYTES_MAX)
            .keep_alive_interval(KEEP_ALIVE_INTERVAL)
            .keep_alive_timeout(KEEP_ALIVE_TIMEOUT);
        let connection =
            http.serve_connection(TokioIo::new(stream), TowerToHyperService::new(service));
        tokio::pin!(connection);
        let age = time::sleep(Duration::from_millis(limits.connection_age_max_ms));
        tokio::select! {
            ended = connection.as_mut() => return note_end(self.peer, ended),
            () = self.shared.stop.cancelled() => {}
            () = outdated.cancelled() => {}
            () = age => {}
        }
        // GOAWAY: calls under way end, new ones go to another connection.
        connection.as_mut().graceful_shutdown();
        if let Ok(ended) = time::timeout(LEAVE_TIMEOUT, connection.as_mut()).await {
            note_end(self.peer, ended);
        } else {
            tracing::debug!(peer = %self.peer, "connection cut after its grace");
        }
    }

    /// Who is at the other end: asked once per connection, of the certificate that the handshake verified.
    fn caller(&self, stream: &TlsStream<TcpStream>) -> Caller {
        let leaf = stream
            .get_ref()
            .1
            .peer_certificates()
            .and_then(|c| c.first());
        let certificate = leaf.and_then(|leaf| match PeerCertificate::read(leaf) {
            Ok(certificate) => Some(certificate),
            Err(error) => {
                tracing::info!(peer = %self.peer, error, "client certificate");
                None
            }
        });
        let principal = self.shared.authenticator.authenticate(certificate.as_ref());
        if let Err(error) = &principal {
            tracing::info!(peer = %self.peer, %error, "connection without a principal");
        }
        Caller::new(self.peer, principal)
    }
}

fn note_end(peer: SocketAddr, ended: Result<(), hyper::Error>) {
    if let Err(error) = ended {
        tracing::debug!(%peer, %error, "connection ended");
    }
}
