//! What must happen on a connection before the first call: TLS, then the first bytes of HTTP/2. Both within one timeout,
//! so that neither silence before TLS nor silence after it keeps a place.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use rustls::{CertificateError, ServerConfig};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, ReadBuf},
    net::TcpStream,
    time,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

use crate::error::Reason;

/// What every HTTP/2 client says first (RFC 9113 section 3.4).
const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Why a connection got no further.
#[derive(Debug, thiserror::Error)]
pub(super) enum Refused {
    /// TLS failed.
    #[error("TLS handshake: {0}")]
    Tls(io::Error),
    /// The time was up.
    #[error("no handshake in time")]
    Timeout,
    /// TLS went well, and then came something else than HTTP/2.
    #[error("not HTTP/2")]
    NotHttp2,
    /// The peer went away.
    #[error("closed by the peer")]
    Closed,
}

impl Refused {
    /// Name in the metrics.
    pub(super) fn cause(&self) -> &'static str {
        match self {
            Self::Tls(error) => tls_cause(error),
            Self::Timeout => "timeout",
            Self::NotHttp2 => "not_http2",
            Self::Closed => "closed",
        }
    }

    /// What the audit log says of it; silence says nothing, and a probe of the port is no refusal.
    pub(super) fn reason(&self) -> Option<Reason> {
        match self.cause() {
            "no_certificate" | "expired" | "unknown_ca" | "bad_certificate" => {
                Some(Reason::Credential)
            }
            "timeout" | "closed" | "alert" => None,
            _ => Some(Reason::Request),
        }
    }
}

fn tls_cause(error: &io::Error) -> &'static str {
    use rustls::Error;
    let Some(error) = error.get_ref().and_then(|it| it.downcast_ref::<Error>()) else {
        return "closed";
    };
    // A name for each cause that an operator acts on differently; the rest is a client that is wrong.
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
        CertificateError::UnknownIssuer => "unknown_ca",
        _ => "bad_certificate",
    }
}

/// Makes a connection ready for HTTP/2.
pub(super) async fn greet(
    stream: TcpStream,
    config: Arc<ServerConfig>,
    timeout: Duration,
) -> Result<Greeted, Refused> {
    let greeting = async {
        let accepted = TlsAcceptor::from(config).accept(stream).await;
        let mut tls = accepted.map_err(Refused::Tls)?;
        let mut preface = [0; PREFACE.len()];
        let read = tls.read_exact(&mut preface).await;
        read.map_err(|_| Refused::Closed)?;
        if preface != *PREFACE {
            return Err(Refused::NotHttp2);
        }
        Ok(Greeted { said: 0, tls })
    };
    time::timeout(timeout, greeting)
        .await
        .unwrap_or(Err(Refused::Timeout))
}

/// A connection whose preface was read; the HTTP/2 library reads it once more.
#[derive(Debug)]
pub(super) struct Greeted {
    said: usize,
    tls: TlsStream<TcpStream>,
}

impl Greeted {
    pub(super) fn tls(&self) -> &TlsStream<TcpStream> {
        &self.tls
    }
}

impl AsyncRead for Greeted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let left = &PREFACE[self.said..];
        if left.is_empty() {
            return Pin::new(&mut self.tls).poll_read(context, buffer);
        }
        let count = left.len().min(buffer.remaining());
        buffer.put_slice(&left[..count]);
        self.said += count;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Greeted {
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
