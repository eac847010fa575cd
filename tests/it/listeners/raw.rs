//! A client that sends what no generated client would.

use std::{fs, io, net::SocketAddr, sync::Arc, time::Duration};

use http_body_util::{BodyExt as _, Full};
use hyper::{
    HeaderMap, Request,
    body::Bytes,
    client::conn::http2::{self, SendRequest},
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::{
    ClientConfig, RootCertStore, SupportedProtocolVersion,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject as _},
};
use tokio::{net::TcpStream, time::timeout};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tonic::Status;

use crate::pki::Pki;

/// Longest wait for an answer.
const WAIT_MAX: Duration = Duration::from_secs(10);

/// How a client speaks TLS: with that certificate or none, and only these versions.
pub(crate) fn tls_config(
    pki: &Pki,
    client: Option<&str>,
    versions: &[&'static SupportedProtocolVersion],
) -> Arc<ClientConfig> {
    let mut roots = RootCertStore::empty();
    for root in CertificateDer::pem_file_iter(pki.ca_file()).unwrap() {
        roots.add(root.unwrap()).unwrap();
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(versions)
        .unwrap()
        .with_root_certificates(roots);
    let mut config = match client {
        Some(name) => {
            let chain = CertificateDer::pem_file_iter(pki.certificate_file(name))
                .unwrap()
                .collect::<Result<_, _>>()
                .unwrap();
            let key = PrivateKeyDer::from_pem_slice(&fs::read(pki.key_file(name)).unwrap());
            builder.with_client_auth_cert(chain, key.unwrap()).unwrap()
        }
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    Arc::new(config)
}

/// A TLS connection on which nothing was said yet.
pub(crate) async fn handshake(
    address: SocketAddr,
    config: Arc<ClientConfig>,
) -> io::Result<TlsStream<TcpStream>> {
    let stream = TcpStream::connect(address).await?;
    let name = ServerName::try_from("localhost").unwrap();
    let handshake = TlsConnector::from(config).connect(name, stream);
    timeout(WAIT_MAX, handshake).await.unwrap()
}

/// One HTTP/2 connection.
#[derive(Clone)]
pub(crate) struct Raw(SendRequest<Full<Bytes>>);

/// An answer with its headers and trailers in one map.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

impl Answer {
    /// The gRPC status.
    pub(crate) fn status(&self) -> Status {
        Status::from_header_map(&self.headers).unwrap()
    }
}

impl Raw {
    /// Connects with both versions of TLS on offer.
    pub(crate) async fn connect(pki: &Pki, client: Option<&str>, address: SocketAddr) -> Self {
        let config = tls_config(pki, client, rustls::ALL_VERSIONS);
        Self::over(handshake(address, config).await.unwrap())
            .await
            .unwrap()
    }

    /// Speaks HTTP/2 on a TLS connection.
    pub(crate) async fn over(stream: TlsStream<TcpStream>) -> Result<Self, hyper::Error> {
        let (send, connection) =
            http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        Ok(Self(send))
    }

    /// Whether another call can be made.
    pub(crate) async fn ready(&mut self) -> Result<(), hyper::Error> {
        self.0.ready().await
    }

    /// Sends a body as it is, with headers beyond those that gRPC needs.
    pub(crate) async fn post(
        &self,
        path: &str,
        body: Vec<u8>,
        headers: &[(&str, &str)],
    ) -> Result<Answer, hyper::Error> {
        let mut request = Request::post(format!("https://localhost{path}"))
            .header("content-type", "application/grpc")
            .header("te", "trailers");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(Full::new(Bytes::from(body))).unwrap();
        let sent = self.0.clone().send_request(request);
        let response = timeout(WAIT_MAX, sent).await.unwrap()?;
        let (parts, body) = response.into_parts();
        let collected = timeout(WAIT_MAX, body.collect()).await.unwrap()?;
        let mut headers = parts.headers;
        headers.extend(collected.trailers().cloned().unwrap_or_default());
        Ok(Answer {
            headers,
            body: collected.to_bytes(),
        })
    }

    /// Calls a method with one message.
    pub(crate) async fn call(&self, path: &str, message: &impl prost::Message) -> Answer {
        self.post(path, frame(&message.encode_to_vec()), &[])
            .await
            .unwrap()
    }
}

/// A message with its gRPC prefix.
pub(crate) fn frame(message: &[u8]) -> Vec<u8> {
    let length = u32::try_from(message.len()).unwrap();
    let mut frame = vec![0];
    frame.extend(length.to_be_bytes());
    frame.extend(message);
    frame
}
