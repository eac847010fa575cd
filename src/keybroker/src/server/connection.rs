//! Serves one connection: makes the handshake with a timeout, serves HTTP with limits, and shuts
//! the connection down gracefully.
//!
//! Mitigations: M1, M3 of `THREAT_MODEL.md`.

use std::{
    net::{IpAddr, SocketAddr},
    pin::Pin,
    sync::Arc,
    time::Duration,
};

use axum::Router;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use rustls_pki_types::CertificateDer;
use tokio::{net::TcpStream, sync::Semaphore, time};
use tokio_util::sync::CancellationToken;

use keybroker_auth::PeerCertificate;
use keybroker_core::{call::caller::Caller, error::chain, metrics};

use super::{
    connection_service::ConnectionService,
    frames::{self, Watched},
    handshake::{self, Established, PREFACE, Refused},
    shared::Shared,
    tls::Tls,
    unauthenticated::{self, Authentication, Full},
    waiting::Ticket,
};

const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(20);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// Minimum of the limit on the length of a request head, in bytes.
const HEADER_BYTES_MIN: usize = 16 * 1024;
/// HTTP/2 flow-control windows for clients with an accepted certificate, in bytes: for one call and
/// for all calls of a connection. The longest message fits into the window of a call.
const STREAM_WINDOW_BYTES: u32 = 128 * 1024;
const CONNECTION_WINDOW_BYTES: u32 = 512 * 1024;
/// HTTP/2 flow-control window of one call for a client without an accepted certificate, in bytes.
/// The HTTP/2 windows are set before a call can authenticate the caller. Messages that are longer
/// than the window need additional round trips.
const UNAUTHENTICATED_STREAM_WINDOW_BYTES: u32 = 16 * 1024;
/// The smallest permitted connection window of HTTP/2, in bytes (RFC 9113 section 6.9.2).
const UNAUTHENTICATED_CONNECTION_WINDOW_BYTES: u32 = 65_535;
/// Maximum number of buffered answer bytes for a client that does not read its answers.
const SEND_BUFFER_BYTES_MAX: usize = 128 * 1024;

/// Interval at which the broker checks for calls on a connection after GOAWAY. The broker closes a
/// connection without calls, because its client ignores GOAWAY.
const SILENT_CLOSE: Duration = Duration::from_secs(1);
/// Size of the HTTP/1.1 read buffer, in bytes.
const HTTP1_BUFFER_BYTES_MAX: usize = 32 * 1024;
/// Maximum time for which a proxy's connection may remain open without a request.
const PROXY_IDLE: Duration = Duration::from_mins(2);

/// Maximum age of a connection without an authenticated principal.
const UNAUTHENTICATED_AGE_MAX: Duration = Duration::from_mins(1);
/// Interval at which the broker checks for calls on connections without a client certificate that
/// identifies a principal.
const CREDENTIAL_IDLE: Duration = Duration::from_mins(1);

/// An accepted connection.
pub(super) struct Connection {
    pub(super) peer: SocketAddr,
    /// The network of the peer, for the limits on handshakes and unauthenticated connections of one
    /// network; `None` for a trusted proxy.
    pub(super) network: Option<IpAddr>,
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
        let waiting = self.wait_for_handshake();
        let accepting = tls.current();
        let timeout = Duration::from_millis(self.shared.limits.handshake_timeout_ms);
        let config = Arc::clone(&accepting.config);
        let established = tokio::select! {
            // The connection can be closed immediately, because no call is in progress during the
            // handshake.
            () = self.shared.stop.cancelled() => return,
            () = waiting.closed() => return self.refuse(&Refused::Displaced),
            established = handshake::complete(stream, config, timeout) => established,
        };
        match established {
            Ok(established) => {
                self.serve_established(established, waiting, &accepting.outdated)
                    .await;
            }
            Err(refused) => self.refuse(&refused),
        }
    }

    fn wait_for_handshake(&self) -> Ticket {
        let waiting = self.shared.handshakes.enter(self.network);
        if waiting.made_room()
            && let Some(left_out) = self.shared.refusals.count()
        {
            tracing::warn!(
                peer = %self.peer, left_out,
                "too many handshakes in progress; each new handshake ends the oldest handshake of the network that has \
                 the most handshakes"
            );
        }
        waiting
    }

    fn refuse(&self, refused: &Refused) {
        let cause = refused.cause();
        debug_assert!(metrics::HANDSHAKE_CAUSES.contains(&cause), "{cause}");
        metrics::HANDSHAKES_FAILED.with([cause]).increment(1);
        match refused.reason() {
            Some(reason) => {
                let broker = &self.shared.broker;
                broker.refuse_connection(self.peer, reason, cause, refused);
            }
            None => {
                tracing::debug!(peer = %self.peer, cause, error = %refused, "connection ended early");
            }
        }
    }

    async fn serve_plain(self, stream: TcpStream) {
        let Some(client) = self.place(None) else {
            return;
        };
        let http = self.http1(PROXY_IDLE);
        let connection = http.serve_connection(TokioIo::new(stream), self.service(&client));
        self.watch(Box::pin(connection), &client, &CancellationToken::new())
            .await;
    }

    async fn serve_established(
        self,
        established: Established,
        waiting: Ticket,
        outdated: &CancellationToken,
    ) {
        let Some(client) = self.place(established.leaf()) else {
            return;
        };
        // The connection now has a place among the established connections and no longer counts as
        // a handshake.
        drop(waiting);
        let service = self.service(&client);
        match established {
            Established::Http2(io) => {
                let io = Watched::new(io, PREFACE.len(), client.authentication.flag());
                let http = self.http2(&client);
                let connection = http.serve_connection(TokioIo::new(io), service);
                self.watch(Box::pin(connection), &client, outdated).await;
            }
            Established::Http1(io) => {
                let silence = Duration::from_millis(self.shared.limits.handshake_timeout_ms);
                let connection = self
                    .http1(silence)
                    .serve_connection(TokioIo::new(io), service);
                self.watch(Box::pin(connection), &client, outdated).await;
            }
        }
    }

    /// Maximum length of a request head, in bytes. The head may contain an access token of twice
    /// the permitted length, so that the broker can log the length of a rejected access token.
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

    /// Configures HTTP/2. The limits must be set before the first call, and are higher for clients
    /// with an accepted certificate.
    fn http2(&self, client: &Client) -> hyper::server::conn::http2::Builder<TokioExecutor> {
        let limits = &self.shared.limits;
        let (streams, stream_window, connection_window) = if client.caller.is_known() {
            (
                limits.streams_per_connection_max,
                STREAM_WINDOW_BYTES,
                CONNECTION_WINDOW_BYTES,
            )
        } else {
            (
                limits.streams_without_certificate_max,
                UNAUTHENTICATED_STREAM_WINDOW_BYTES,
                UNAUTHENTICATED_CONNECTION_WINDOW_BYTES,
            )
        };
        let mut http = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
        http.timer(TokioTimer::new())
            .max_concurrent_streams(streams.min(limits.streams_per_connection_max))
            .max_header_list_size(u32::try_from(self.head_bytes_max()).unwrap_or(u32::MAX))
            .initial_stream_window_size(stream_window)
            .initial_connection_window_size(connection_window)
            .max_send_buf_size(SEND_BUFFER_BYTES_MAX)
            .max_pending_accept_reset_streams(frames::LIBRARY_RESETS_MAX)
            .keep_alive_interval(KEEP_ALIVE_INTERVAL)
            .keep_alive_timeout(KEEP_ALIVE_TIMEOUT);
        http
    }

    fn service(&self, client: &Client) -> ConnectionService {
        ConnectionService {
            routes: self.routes.clone(),
            caller: client.caller.clone(),
            authentication: Arc::clone(&client.authentication),
        }
    }

    /// Serves a connection until it ends. The broker ends a connection when the broker stops, the
    /// trusted CAs or revocations change, or the maximum age is reached. A connection also ends
    /// when its client certificate expires, or if an unauthenticated client makes no call.
    ///
    /// The connection is boxed, because the state of this function and of its caller would otherwise
    /// each contain space for the connection.
    async fn watch(
        &self,
        mut connection: Pin<Box<impl GracefulShutdown>>,
        client: &Client,
        outdated: &CancellationToken,
    ) {
        let limits = &self.shared.limits;
        let age_max = Duration::from_millis(limits.connection_age_max_ms);
        // The certificate's dates are checked only in the handshake, so the connection must end
        // when the certificate expires.
        let valid = client.valid.unwrap_or(age_max);
        let handshake = Duration::from_millis(limits.handshake_timeout_ms);
        let unauthenticated = async {
            tokio::select! {
                () = unused(&client.caller, handshake), if self.tls.is_some() => {}
                () = time::sleep(UNAUTHENTICATED_AGE_MAX) => {}
            }
            if !client.authentication.is_done() {
                return;
            }
            if client.caller.is_known() || self.tls.is_none() {
                std::future::pending::<()>().await;
            }
            // A credential authenticates only a call, so a connection without calls must end.
            unused(&client.caller, CREDENTIAL_IDLE).await;
        };
        tokio::select! {
            ended = connection.as_mut() => return note_end(self.peer, ended),
            () = self.shared.stop.cancelled() => {}
            () = outdated.cancelled() => {}
            () = time::sleep(age_max.min(valid)) => {}
            () = unauthenticated => {}
        }
        // After GOAWAY, calls in progress continue, and new calls use another connection. No call
        // takes longer than the grace period.
        connection.as_mut().begin_shutdown();
        let grace = Duration::from_millis(limits.call_timeout_max_ms);
        tokio::select! {
            ended = connection.as_mut() => note_end(self.peer, ended),
            () = unused(&client.caller, SILENT_CLOSE) => tracing::debug!(peer = %self.peer, "silent connection cut"),
            () = time::sleep(grace) => {
                tracing::debug!(peer = %self.peer, "connection closed after the grace period");
            }
        }
    }

    /// Identifies the peer and reserves one of the permitted connections. Returns `None` if too
    /// many connections are open.
    fn place(&self, leaf: Option<&CertificateDer<'_>>) -> Option<Client> {
        self.client_of(leaf)
            .inspect_err(|full| {
                unauthenticated::refused(*full);
                if let Some(left_out) = self.shared.refusals.count() {
                    tracing::warn!(
                        peer = %self.peer, cause = full.cause(), left_out,
                        "connection refused, because the limit of unauthenticated connections, or of one principal's connections, is reached"
                    );
                }
            })
            .ok()
    }

    /// Identifies the peer from its certificate, and reserves one of the permitted connections.
    fn client_of(&self, leaf: Option<&CertificateDer<'_>>) -> Result<Client, Full> {
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
                        tracing::info!(peer = %self.peer, error = chain(error), "client certificate");
                    }
                })
                .ok()
        });
        let principal = self.shared.authenticator.certificate(certificate.as_ref());
        if let Err(error) = &principal {
            tracing::debug!(peer = %self.peer, %error, "the client certificate identifies no principal");
        }
        let calls_max = usize::try_from(self.shared.limits.streams_per_connection_max);
        let caller = Caller::new(
            self.peer,
            principal,
            calls_max.unwrap_or(Semaphore::MAX_PERMITS),
        );
        let places = &self.shared.places;
        let authentication = match caller.principal() {
            Ok(principal) => Authentication::done(places, principal)?,
            // A trusted CA issued the certificate, but the certificate is not accepted. A
            // credential in a call cannot replace a rejected certificate.
            Err(_) if leaf.is_some() && certificate.is_none() => {
                Authentication::pending(places, self.network)?.without_credentials()
            }
            Err(_) => Authentication::pending(places, self.network)?,
        };
        Ok(Client {
            caller,
            authentication: Arc::new(authentication),
            valid: certificate.map(|certificate| certificate.remaining()),
        })
    }
}

/// The peer of a connection.
struct Client {
    caller: Caller,
    authentication: Arc<Authentication>,
    /// Time until the client certificate expires.
    valid: Option<Duration>,
}

/// The graceful shutdown of a connection, for both versions of HTTP.
trait GracefulShutdown: Future<Output = Result<(), hyper::Error>> {
    /// Stops accepting requests. The connection ends when the requests in progress are complete.
    fn begin_shutdown(self: Pin<&mut Self>);
}

impl<I> GracefulShutdown for hyper::server::conn::http1::Connection<I, ConnectionService>
where
    I: hyper::rt::Read + hyper::rt::Write + Unpin,
{
    fn begin_shutdown(self: Pin<&mut Self>) {
        self.graceful_shutdown();
    }
}

impl<I> GracefulShutdown
    for hyper::server::conn::http2::Connection<I, ConnectionService, TokioExecutor>
where
    I: hyper::rt::Read + hyper::rt::Write + Unpin,
{
    fn begin_shutdown(self: Pin<&mut Self>) {
        self.graceful_shutdown();
    }
}

/// Waits until a connection has no calls at two consecutive checks.
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

/// Counts an open connection. The count decreases even if the task of the connection panics.
struct Open;

impl Open {
    fn new() -> Self {
        metrics::CONNECTIONS.handle().increment(1.0);
        Self
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        metrics::CONNECTIONS.handle().decrement(1.0);
    }
}

fn note_end(peer: SocketAddr, ended: Result<(), hyper::Error>) {
    if let Err(error) = ended {
        tracing::debug!(%peer, %error, "connection ended");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Largest state of the task of a connection, in bytes. The state has about 2 KiB.
    const STATE_BYTES_MAX: usize = 3 * 1_024;

    /// Returns the size of the future that a function returns.
    fn state_bytes<F: Future>(_: impl Fn(Connection, TcpStream) -> F) -> usize {
        size_of::<F>()
    }

    /// The task of a connection has this state for as long as the connection is open. The test
    /// fails if the state contains the HTTP connection, which has its own block of memory, or a
    /// second copy of another large value.
    #[test]
    fn the_task_of_a_connection_is_small() {
        let bytes = state_bytes(Connection::serve);
        assert!(bytes <= STATE_BYTES_MAX, "{bytes} bytes");
    }
}
