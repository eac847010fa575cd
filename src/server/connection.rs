//! One connection: a handshake under a timeout, HTTP with every limit set, and an orderly end.
//!
//! Mitigations: M1, M3 of `THREAT_MODEL.md`.

use std::{net::SocketAddr, pin::Pin, sync::Arc, time::Duration};

use axum::{Extension, Router};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use rustls_pki_types::CertificateDer;
use tokio::{net::TcpStream, sync::Semaphore, time};
use tokio_util::sync::CancellationToken;

use crate::{auth::PeerCertificate, call::caller::Caller};

use super::{
    handshake::{self, Greeted, Refused},
    listener::Shared,
    strangers::Acquaintance,
    tls::Tls,
};

const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(20);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// A request's head may have at least so many bytes.
const HEADER_BYTES_MIN: usize = 16 * 1024;
/// Bytes that a client may send ahead on one call (a message and its prefix fit) and on all calls of a connection.
const STREAM_WINDOW_BYTES: u32 = 128 * 1024;
const CONNECTION_WINDOW_BYTES: u32 = 512 * 1024;
/// Bytes of answers kept for a client that does not read them.
const SEND_BUFFER_BYTES_MAX: usize = 128 * 1024;

/// After GOAWAY, a connection without calls that has not ended for this long is one whose client does not listen.
const GOODBYE: Duration = Duration::from_secs(1);
/// Bytes of a request's head and of what is read ahead, on HTTP/1.1.
const HTTP1_BUFFER_BYTES_MAX: usize = 32 * 1024;
/// For how long a proxy may keep a connection without a request.
const PROXY_IDLE: Duration = Duration::from_mins(2);

/// A connection on which nobody is recognised for this long is ended, whatever it does.
const STRANGER_AGE_MAX: Duration = Duration::from_mins(1);
/// How long a connection may lie idle that only the credential of a call introduced.
const INTRODUCED_IDLE: Duration = Duration::from_mins(1);

/// What the accept loop hands over.
pub(super) struct Connection {
    pub(super) peer: SocketAddr,
    pub(super) tls: Option<Arc<Tls>>,
    pub(super) routes: Router,
    pub(super) shared: Shared,
}

impl Connection {
    pub(super) async fn serve(self, stream: TcpStream) {
        let _open = Open::new();
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "no TCP_NODELAY");
        }
        let Some(tls) = &self.tls else {
            return self.serve_plain(stream).await;
        };
        let accepting = tls.current();
        let timeout = Duration::from_millis(self.shared.limits.handshake_timeout_ms);
        let config = Arc::clone(&accepting.config);
        let greeted = tokio::select! {
            // No call can be under way yet.
            () = self.shared.stop.cancelled() => return,
            greeted = handshake::greet(stream, config, timeout) => greeted,
        };
        match greeted {
            Ok(greeted) => self.serve_greeted(greeted, &accepting.outdated).await,
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

    async fn serve_plain(self, stream: TcpStream) {
        let link = self.link(None);
        if !link.acquaintance.has_place() {
            metrics::counter!("keybroker_strangers_turned_away_total").increment(1);
            return;
        }
        let http = self.http1(PROXY_IDLE);
        let service = TowerToHyperService::new(self.service(&link));
        let connection = http.serve_connection(TokioIo::new(stream), service);
        self.watch(connection, &link, &CancellationToken::new())
            .await;
    }

    async fn serve_greeted(self, greeted: Greeted, outdated: &CancellationToken) {
        let link = self.link(greeted.leaf());
        if !link.acquaintance.has_place() {
            metrics::counter!("keybroker_strangers_turned_away_total").increment(1);
            return;
        }
        let service = TowerToHyperService::new(self.service(&link));
        match greeted {
            Greeted::Http2(io) => {
                let mut http = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
                http.timer(TokioTimer::new())
                    .max_concurrent_streams(self.shared.limits.streams_per_connection_max)
                    .max_header_list_size(u32::try_from(self.head_bytes_max()).unwrap_or(u32::MAX))
                    .initial_stream_window_size(STREAM_WINDOW_BYTES)
                    .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
                    .max_send_buf_size(SEND_BUFFER_BYTES_MAX)
                    .keep_alive_interval(KEEP_ALIVE_INTERVAL)
                    .keep_alive_timeout(KEEP_ALIVE_TIMEOUT);
                let connection = http.serve_connection(TokioIo::new(io), service);
                self.watch(connection, &link, outdated).await;
            }
            Greeted::Http1(io) => {
                let silence = Duration::from_millis(self.shared.limits.handshake_timeout_ms);
                let connection = self
                    .http1(silence)
                    .serve_connection(TokioIo::new(io), service);
                self.watch(connection, &link, outdated).await;
            }
        }
    }

    /// Bytes of a request's head. A token that is somewhat too long must arrive, so that its refusal is logged with its length.
    fn head_bytes_max(&self) -> usize {
        let tokens = self.shared.limits.access_token_bytes_max.saturating_mul(2);
        tokens.max(HEADER_BYTES_MIN)
    }

    fn http1(&self, silence: Duration) -> hyper::server::conn::http1::Builder {
        let mut http = hyper::server::conn::http1::Builder::new();
        http.timer(TokioTimer::new())
            .header_read_timeout(silence)
            .max_buf_size(self.head_bytes_max().max(HTTP1_BUFFER_BYTES_MAX));
        http
    }

    fn service(&self, link: &Link) -> Router {
        self.routes
            .clone()
            .layer(Extension(link.caller.clone()))
            .layer(Extension(Arc::clone(&link.acquaintance)))
    }

    /// Serves until the connection ends by itself, or has to: at a stop, when the trust in clients has changed, with its age or
    /// its certificate, and when a stranger says nothing.
    async fn watch(&self, connection: impl Polite, link: &Link, outdated: &CancellationToken) {
        tokio::pin!(connection);
        let limits = &self.shared.limits;
        let age_max = Duration::from_millis(limits.connection_age_max_ms);
        // The handshake looked at the certificate's dates once; nobody looks again while the connection lasts.
        let valid = link.valid.unwrap_or(age_max);
        let handshake = Duration::from_millis(limits.handshake_timeout_ms);
        let patience = async {
            // What a stranger can do is ask for health, and a stream of that must not keep the place for ever.
            tokio::select! {
                () = unused(&link.caller, handshake), if self.tls.is_some() => {}
                () = time::sleep(STRANGER_AGE_MAX) => {}
            }
            if !link.acquaintance.is_known() {
                return;
            }
            if link.caller.is_known() || self.tls.is_none() {
                std::future::pending::<()>().await;
            }
            // Who was introduced by a header is known for that call, and not for a connection that lies idle.
            unused(&link.caller, INTRODUCED_IDLE).await;
        };
        tokio::select! {
            ended = connection.as_mut() => return note_end(self.peer, ended),
            () = self.shared.stop.cancelled() => {}
            () = outdated.cancelled() => {}
            () = time::sleep(age_max.min(valid)) => {}
            () = patience => {}
        }
        // Goodbye: calls under way end, new ones go to another connection. No call is longer than this.
        connection.as_mut().say_goodbye();
        let grace = Duration::from_millis(limits.call_timeout_max_ms);
        tokio::select! {
            ended = connection.as_mut() => note_end(self.peer, ended),
            () = unused(&link.caller, GOODBYE) => tracing::debug!(peer = %self.peer, "silent connection cut"),
            () = time::sleep(grace) => {
                tracing::debug!(peer = %self.peer, "connection cut after its grace");
            }
        }
    }

    /// What is known of the other end before it asks anything.
    fn link(&self, leaf: Option<&CertificateDer<'_>>) -> Link {
        let certificate = leaf.and_then(|leaf| {
            PeerCertificate::read(leaf)
                .and_then(|certificate| {
                    let tls = self.tls.as_ref();
                    tls.map_or(Ok(()), |tls| {
                        certificate.check_trust_domain(tls.trust_domains())
                    })?;
                    Ok(certificate)
                })
                .inspect_err(|error| {
                    if self.shared.broker.may_log(self.peer.ip()) {
                        tracing::info!(peer = %self.peer, error, "client certificate");
                    }
                })
                .ok()
        });
        let principal = self.shared.authenticator.certificate(certificate.as_ref());
        if let Err(error) = &principal {
            tracing::debug!(peer = %self.peer, %error, "connection without a principal of its own");
        }
        let calls_max = usize::try_from(self.shared.limits.streams_per_connection_max);
        let caller = Caller::new(
            self.peer,
            principal,
            calls_max.unwrap_or(Semaphore::MAX_PERMITS),
        );
        let acquaintance = if caller.is_known() {
            Acquaintance::known()
        } else {
            let is_proxy = self.tls.is_none();
            let stranger = Acquaintance::stranger(&self.shared.strangers, self.peer.ip(), is_proxy);
            // A certificate that the authority vouches for, and that is not accepted here: nobody goes on as if there were
            // none.
            let is_refused = leaf.is_some() && certificate.is_none();
            if is_refused {
                stranger.unheard()
            } else {
                stranger
            }
        };
        Link {
            caller,
            acquaintance: Arc::new(acquaintance),
            valid: certificate.map(|certificate| certificate.remaining()),
        }
    }
}

/// Who is at the other end of a connection.
struct Link {
    caller: Caller,
    acquaintance: Arc<Acquaintance>,
    /// How long the client certificate is valid.
    valid: Option<Duration>,
}

/// What both versions of HTTP can be told.
trait Polite: Future<Output = Result<(), hyper::Error>> {
    /// Takes no more requests, and ends with those under way.
    fn say_goodbye(self: Pin<&mut Self>);
}

type Service = TowerToHyperService<Router>;

impl<I> Polite for hyper::server::conn::http1::Connection<I, Service>
where
    I: hyper::rt::Read + hyper::rt::Write + Unpin,
{
    fn say_goodbye(self: Pin<&mut Self>) {
        self.graceful_shutdown();
    }
}

impl<I> Polite for hyper::server::conn::http2::Connection<I, Service, TokioExecutor>
where
    I: hyper::rt::Read + hyper::rt::Write + Unpin,
{
    fn say_goodbye(self: Pin<&mut Self>) {
        self.graceful_shutdown();
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
