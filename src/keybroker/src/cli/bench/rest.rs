//! Sends the same REST requests as a Bitwarden client, on connections that the caller controls.

use std::{net::SocketAddr, sync::Arc};

use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::{
    Request, Uri,
    body::Bytes,
    client::conn::{http1, http2},
    header::{ACCEPT, AUTHORIZATION, HOST},
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::{ClientConfig, RootCertStore, client::Resumption};
use rustls_pki_types::ServerName;
use serde_json::Value;
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, client::TlsStream};

use crate::cli::exit::Failure;
use keybroker_core::error::root_cause;

use super::{Bench, internal, served::Served};

const ANSWER_BYTES_MAX: usize = 16 * 1_024;

/// The version of HTTP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Version {
    Http1,
    Http2,
}

/// The REST listener of the measured broker. Clones share the TLS configuration.
#[derive(Clone)]
pub(super) struct Rest(Arc<Target>);

struct Target {
    address: SocketAddr,
    name: ServerName<'static>,
    authority: String,
    path: String,
    http1: TlsConnector,
    http2: TlsConnector,
}

/// An open connection.
pub(super) enum Connection {
    Http1(http1::SendRequest<Empty<Bytes>>),
    Http2(http2::SendRequest<Empty<Bytes>>),
}

/// An answer whose body was read completely.
pub(super) struct Answer {
    pub(super) status: u16,
    body: Option<Value>,
}

impl Rest {
    /// Uses the last listener of the broker's configuration, because the REST listener was added
    /// last.
    pub(super) fn of(bench: &Bench<'_>, broker: &Served) -> Result<Self, Failure> {
        let address = broker.listeners.last().copied();
        let address = address.ok_or_else(|| internal("the broker has no REST listener"))?;
        let endpoint: Uri = broker.endpoint.parse().map_err(internal)?;
        // The REST listener uses the certificate of the gRPC listener.
        let host = endpoint.host().unwrap_or_default();
        let host = host
            .trim_start_matches('[')
            .trim_end_matches(']')
            .to_owned();
        let name = ServerName::try_from(host.clone()).map_err(internal)?;
        let mut roots = RootCertStore::empty();
        for certificate in bench.arguments.connection.authorities()? {
            roots.add(certificate).map_err(internal)?;
        }
        let connector = |protocol: &[u8]| {
            let mut config = ClientConfig::builder()
                .with_root_certificates(roots.clone())
                .with_no_client_auth();
            config.alpn_protocols = vec![protocol.to_vec()];
            // Every connection makes a full TLS handshake.
            config.resumption = Resumption::disabled();
            TlsConnector::from(Arc::new(config))
        };
        let prefix = &bench.config.rest.path_prefix;
        Ok(Self(Arc::new(Target {
            address,
            name,
            authority: format!("{host}:{}", address.port()),
            path: format!("{prefix}/user-keys"),
            http1: connector(b"http/1.1"),
            http2: connector(b"h2"),
        })))
    }

    /// Opens a connection. An error is a short text, so that equal errors can be counted together.
    pub(super) async fn connect(&self, version: Version) -> Result<Connection, String> {
        let target = &self.0;
        let stream = TcpStream::connect(target.address).await;
        let stream = stream.map_err(|error| format!("no connection: {}", error.kind()))?;
        stream
            .set_nodelay(true)
            .map_err(|error| error.to_string())?;
        let tls = match version {
            Version::Http1 => &target.http1,
            Version::Http2 => &target.http2,
        };
        let stream = tls.connect(target.name.clone(), stream).await;
        let stream = stream.map_err(|error| format!("no TLS connection: {}", error.kind()))?;
        connection(stream, version).await
    }

    /// Requests the key of the user that the access token identifies.
    pub(super) async fn fetch(
        &self,
        connection: &mut Connection,
        token: &str,
    ) -> Result<Answer, String> {
        let target = &self.0;
        let uri = match connection {
            Connection::Http1(_) => target.path.clone(),
            Connection::Http2(_) => format!("https://{}{}", target.authority, target.path),
        };
        let mut request = Request::get(uri)
            .header(AUTHORIZATION, format!("Bearer {token}"))
            .header(ACCEPT, "application/json");
        if matches!(connection, Connection::Http1(_)) {
            request = request.header(HOST, &target.authority);
        }
        let request = request
            .body(Empty::new())
            .map_err(|error| error.to_string())?;
        let ended = |error: hyper::Error| format!("the connection ended: {}", root_cause(&error));
        let response = match connection {
            Connection::Http1(sender) => sender.send_request(request).await,
            Connection::Http2(sender) => sender.send_request(request).await,
        }
        .map_err(ended)?;
        let status = response.status().as_u16();
        let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX)
            .collect()
            .await
            .map_err(|_| "the connection ended during the answer".to_owned())?;
        Ok(Answer {
            status,
            body: serde_json::from_slice(&body.to_bytes()).ok(),
        })
    }
}

async fn connection(stream: TlsStream<TcpStream>, version: Version) -> Result<Connection, String> {
    let io = TokioIo::new(stream);
    let ended = |error: hyper::Error| format!("no HTTP connection: {}", root_cause(&error));
    // A separate task drives each connection. The task ends when the sender is dropped or the
    // broker closes the connection.
    match version {
        Version::Http1 => {
            let (sender, driver) = http1::handshake(io).await.map_err(ended)?;
            tokio::spawn(driver);
            Ok(Connection::Http1(sender))
        }
        Version::Http2 => {
            let (sender, driver) = http2::handshake(TokioExecutor::new(), io)
                .await
                .map_err(ended)?;
            tokio::spawn(driver);
            Ok(Connection::Http2(sender))
        }
    }
}

impl Answer {
    /// The key, in base64.
    pub(super) fn key(&self) -> Option<&str> {
        self.body.as_ref()?.get("key")?.as_str()
    }

    /// The HTTP status and the broker's reason.
    pub(super) fn describe(&self) -> String {
        let reason = self.body.as_ref().and_then(|body| body.get("reason"));
        let reason = reason.and_then(Value::as_str).unwrap_or("no reason");
        format!("status {}, {reason}", self.status)
    }
}
