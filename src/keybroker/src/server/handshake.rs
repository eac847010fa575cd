//! Makes the TLS handshake of a connection, and reads the first bytes of HTTP/2. A single timeout
//! applies to the handshake and the first bytes together, so that a silent peer cannot keep its
//! connection open. With HTTP/1.1, a separate timeout applies to the head of each request.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use rustls::{CertificateError, ServerConfig};
use rustls_pki_types::CertificateDer;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, ReadBuf},
    net::TcpStream,
    time,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

use keybroker_core::error::Reason;

use super::zeroed_reads::ZeroedReads;

/// The first bytes that every HTTP/2 client sends (RFC 9113 section 3.4).
pub(super) const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// The cause of a connection's failure before its first call.
#[derive(Debug, thiserror::Error)]
pub(super) enum Refused {
    /// The TLS handshake failed.
    #[error("TLS handshake: {0}")]
    Tls(io::Error),
    /// The handshake took longer than its timeout.
    #[error("no handshake in time")]
    Timeout,
    /// The TLS handshake succeeded, but the peer did not send the HTTP/2 preface.
    #[error("not HTTP/2")]
    NotHttp2,
    /// The peer closed the connection.
    #[error("closed by the peer")]
    Closed,
    /// The connection was closed to make room for a newer connection.
    #[error("too many handshakes in progress")]
    Displaced,
}

impl Refused {
    /// The cause as a label in the metrics.
    pub(super) fn cause(&self) -> &'static str {
        match self {
            Self::Tls(error) => tls_cause(error),
            Self::Timeout => "timeout",
            Self::NotHttp2 => "not_http2",
            Self::Closed => "closed",
            Self::Displaced => "displaced",
        }
    }

    /// The reason for the audit log; `None` for events that are not refusals, such as a port scan.
    pub(super) fn reason(&self) -> Option<Reason> {
        match self.cause() {
            "no_certificate"
            | "expired"
            | "not_yet_valid"
            | "unknown_ca"
            | "bad_certificate"
            | "revoked"
            | "revocation_unknown"
            | "revocation_list_ended" => Some(Reason::Credential),
            "timeout" | "closed" | "alert" | "displaced" => None,
            _ => Some(Reason::Request),
        }
    }
}

fn tls_cause(error: &io::Error) -> &'static str {
    use rustls::Error;
    let Some(error) = error.get_ref().and_then(|it| it.downcast_ref::<Error>()) else {
        return "closed";
    };
    // Causes have separate names if operators handle them differently. Errors without a separate
    // name are faults of the client.
    if let Error::InvalidCertificate(why) = error {
        return certificate_cause(why);
    }
    match error {
        Error::NoCertificatesPresented => "no_certificate",
        Error::InvalidMessage(_) => "not_tls",
        Error::AlertReceived(_) => "alert",
        Error::PeerIncompatible(_) | Error::NoApplicationProtocol => "incompatible",
        _ => "misbehaved",
    }
}

fn certificate_cause(why: &CertificateError) -> &'static str {
    match why {
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => "expired",
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            "not_yet_valid"
        }
        CertificateError::UnknownIssuer => "unknown_ca",
        CertificateError::Revoked => "revoked",
        CertificateError::UnknownRevocationStatus => "revocation_unknown",
        CertificateError::ExpiredRevocationList
        | CertificateError::ExpiredRevocationListContext { .. } => "revocation_list_ended",
        _ => "bad_certificate",
    }
}

/// The name of HTTP/1.1 in the handshake (RFC 7301).
pub(super) const ALPN_HTTP1: &[u8] = b"http/1.1";

/// Prepares a connection for its first request. The protocol is HTTP/1.1 if the listener supports
/// HTTP/1.1 and the client negotiates HTTP/1.1 or no protocol. Otherwise, the protocol is HTTP/2.
pub(super) async fn complete(
    stream: TcpStream,
    config: Arc<ServerConfig>,
    timeout: Duration,
) -> Result<Established, Refused> {
    let handshake = async {
        let speaks_http1 = config.alpn_protocols.iter().any(|it| it == ALPN_HTTP1);
        let accepted = TlsAcceptor::from(config).accept(ZeroedReads(stream)).await;
        let mut tls = accepted.map_err(Refused::Tls)?;
        // HTTP/1.1 is the default for a client that does not use ALPN.
        let wanted = tls.get_ref().1.alpn_protocol().unwrap_or(ALPN_HTTP1);
        if speaks_http1 && wanted == ALPN_HTTP1 {
            return Ok(Established::Http1(Box::new(tls)));
        }
        let mut preface = [0; PREFACE.len()];
        let read = tls.read_exact(&mut preface).await;
        read.map_err(|_| Refused::Closed)?;
        if preface != *PREFACE {
            return Err(Refused::NotHttp2);
        }
        Ok(Established::Http2(Box::new(Prefaced { replayed: 0, tls })))
    };
    time::timeout(timeout, handshake)
        .await
        .unwrap_or(Err(Refused::Timeout))
}

/// A connection that is ready for its first request.
#[derive(Debug)]
pub(super) enum Established {
    Http1(Box<TlsStream<ZeroedReads<TcpStream>>>),
    Http2(Box<Prefaced>),
}

impl Established {
    /// The client certificate that the handshake verified.
    pub(super) fn leaf(&self) -> Option<&CertificateDer<'static>> {
        let tls = match self {
            Self::Http1(tls) => tls,
            Self::Http2(prefaced) => &prefaced.tls,
        };
        tls.get_ref().1.peer_certificates()?.first()
    }
}

/// A connection whose HTTP/2 preface was already read. The HTTP/2 library reads the preface again
/// from this value.
#[derive(Debug)]
pub(super) struct Prefaced {
    /// Number of preface bytes that the library has already read.
    replayed: usize,
    tls: TlsStream<ZeroedReads<TcpStream>>,
}

impl AsyncRead for Prefaced {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let left = &PREFACE[self.replayed..];
        if left.is_empty() {
            return Pin::new(&mut self.tls).poll_read(context, buffer);
        }
        let count = left.len().min(buffer.remaining());
        buffer.put_slice(&left[..count]);
        self.replayed += count;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Prefaced {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.tls).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tls).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tls).poll_shutdown(context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.tls).poll_write_vectored(context, parts)
    }

    fn is_write_vectored(&self) -> bool {
        self.tls.is_write_vectored()
    }
}
