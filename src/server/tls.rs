//! TLS of one listener: loaded and checked as a whole, replaced as a whole. A bad file on reload leaves the old
//! configuration in place.
//!
//! Mitigation: M1 of `THREAT_MODEL.md`.

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use arc_swap::ArcSwap;
use aws_lc_rs::digest;
use rustls::{
    RootCertStore, ServerConfig,
    server::{NoServerSessionStorage, WebPkiClientVerifier, danger::ClientCertVerifier},
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _};
use tokio_util::sync::CancellationToken;
use x509_parser::prelude::{FromDer as _, X509Certificate};
use zeroize::Zeroizing;

use crate::{call::Timestamp, hardening};

use super::{ClientCertificates, TlsSettings, handshake::ALPN_HTTP1};

const SECONDS_PER_DAY: i64 = 86_400;
/// A certificate with less than this left is worth a warning.
const WARN_DAYS: i64 = 30;

/// What connections are accepted with, from one moment to the next.
#[derive(Debug)]
pub(super) struct Accepting {
    pub(super) config: Arc<ServerConfig>,
    /// Cancelled when the trust in clients has changed: a revoked client must not keep its connection.
    pub(super) outdated: CancellationToken,
    /// SHA-256 of the files: of all of them, and of the client CAs alone.
    files: [u8; 32],
    client_ca: [u8; 32],
    /// Last second of the certificate, since 1970.
    until: i64,
}

/// TLS of a listener, replaceable while it serves.
#[derive(Debug)]
pub(super) struct Tls {
    settings: TlsSettings,
    clients: ClientCertificates,
    /// What clients can speak here (RFC 7301).
    protocols: Vec<Vec<u8>>,
    current: ArcSwap<Accepting>,
    /// What the last reload failed with, so that it is reported once and not each second.
    refused: Mutex<Option<String>>,
}

struct Files {
    chain: Vec<u8>,
    key: Zeroizing<Vec<u8>>,
    client_ca: Vec<u8>,
}

impl Tls {
    /// Loads the files; any problem stops the start.
    pub(super) fn load(
        settings: TlsSettings,
        clients: ClientCertificates,
        speaks_http1: bool,
    ) -> Result<Self, String> {
        let mut protocols = vec![b"h2".to_vec()];
        if speaks_http1 {
            protocols.push(ALPN_HTTP1.to_vec());
        }
        let files = Files::read(&settings, clients)?;
        let accepting = files.build(&settings, clients, &protocols)?;
        Ok(Self {
            settings,
            clients,
            protocols,
            current: ArcSwap::from_pointee(accepting),
            refused: Mutex::default(),
        })
    }

    pub(super) fn current(&self) -> Arc<Accepting> {
        self.current.load_full()
    }

    /// Takes over changed files. Connections go on; those of clients that an old CA vouched for are asked to leave.
    pub(super) fn reload(&self) {
        let shown = self.settings.certificate_file.display();
        let outcome = self.try_reload();
        let mut refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        match outcome {
            Ok(changed) => {
                *refused = None;
                if changed {
                    tracing::info!(certificate = %shown, "TLS files reloaded");
                }
            }
            Err(error) if refused.as_ref() == Some(&error) => {}
            Err(error) => {
                metrics::counter!("keybroker_tls_reload_failures_total").increment(1);
                tracing::error!(alarm = "tls-reload", %error, "TLS files not taken over; the old ones stay in use");
                *refused = Some(error);
            }
        }
    }

    /// Forgets what was reported: whoever asks for a reload wants to hear of it again.
    pub(super) fn report_again(&self) {
        *self.refused.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Says again how long the certificate in use is valid: time goes on while it serves.
    pub(super) fn measure(&self) {
        note_days_left(self.current().until, &self.settings.certificate_file);
    }

    fn try_reload(&self) -> Result<bool, String> {
        let current = self.current();
        let files = Files::read(&self.settings, self.clients)?;
        if files.digest() == current.files {
            return Ok(false);
        }
        let next = files.build(&self.settings, self.clients, &self.protocols)?;
        let trust_changed = next.client_ca != current.client_ca;
        self.current.store(Arc::new(next));
        if trust_changed {
            current.outdated.cancel();
        }
        Ok(true)
    }
}

impl Files {
    fn read(settings: &TlsSettings, clients: ClientCertificates) -> Result<Self, String> {
        let client_ca = match (&settings.client_ca_file, clients) {
            (_, ClientCertificates::None) => Vec::new(),
            (Some(path), _) => read(path)?,
            (None, _) => {
                return Err(
                    "client certificates are asked for, but `client_ca_file` is not set; without \
                     it nobody could be recognised"
                        .to_owned(),
                );
            }
        };
        check_mode(&settings.key_file)?;
        Ok(Self {
            chain: read(&settings.certificate_file)?,
            key: Zeroizing::new(read(&settings.key_file)?),
            client_ca,
        })
    }

    fn digest(&self) -> [u8; 32] {
        let mut context = digest::Context::new(&digest::SHA256);
        for part in [&self.chain, &*self.key, &self.client_ca] {
            context.update(&u64::try_from(part.len()).unwrap_or(0).to_be_bytes());
            context.update(part);
        }
        to_array(context.finish().as_ref())
    }

    fn build(
        &self,
        settings: &TlsSettings,
        clients: ClientCertificates,
        protocols: &[Vec<u8>],
    ) -> Result<Accepting, String> {
        let certificate_file = settings.certificate_file.display();
        let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_slice_iter(&self.chain)
            .collect::<Result<_, _>>()
            .map_err(|error| {
                format!("{certificate_file} is not a PEM certificate chain: {error}")
            })?;
        let leaf = chain
            .first()
            .ok_or_else(|| format!("{certificate_file} holds no PEM certificate"))?;
        let until = check_validity(leaf, &settings.certificate_file)?;
        let key = PrivateKeyDer::from_pem_slice(&self.key).map_err(|error| {
            format!(
                "{} holds no PEM private key: {error}",
                settings.key_file.display()
            )
        })?;
        let builder = ServerConfig::builder();
        let builder = match self.verifier(settings, clients)? {
            Some(verifier) => builder.with_client_cert_verifier(verifier),
            None => builder.with_no_client_auth(),
        };
        let mut config = builder.with_single_cert(chain, key).map_err(|error| {
            format!(
                "{certificate_file} and {} do not fit together: {error}",
                settings.key_file.display()
            )
        })?;
        config.alpn_protocols = protocols.to_vec();
        // No resumption: a resumed session brings the client certificate of the first one, unverified.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(Accepting {
            config: Arc::new(config),
            outdated: CancellationToken::new(),
            until,
            files: self.digest(),
            client_ca: to_array(digest::digest(&digest::SHA256, &self.client_ca).as_ref()),
        })
    }

    fn verifier(
        &self,
        settings: &TlsSettings,
        clients: ClientCertificates,
    ) -> Result<Option<Arc<dyn ClientCertVerifier>>, String> {
        if clients == ClientCertificates::None {
            return Ok(None);
        }
        let path = settings.client_ca_file.as_deref().unwrap_or(Path::new(""));
        let shown = path.display();
        let mut roots = RootCertStore::empty();
        for certificate in CertificateDer::pem_slice_iter(&self.client_ca) {
            let certificate = certificate
                .map_err(|error| format!("{shown} is not a PEM certificate file: {error}"))?;
            roots
                .add(certificate)
                .map_err(|error| format!("{shown} holds a certificate that is no CA: {error}"))?;
        }
        let builder = WebPkiClientVerifier::builder(Arc::new(roots));
        let builder = if clients == ClientCertificates::Optional {
            builder.allow_unauthenticated()
        } else {
            builder
        };
        let verifier = builder
            .build()
            .map_err(|error| format!("{shown} holds no usable CA certificate: {error}"))?;
        Ok(Some(verifier))
    }
}

fn read(path: &Path) -> Result<Vec<u8>, String> {
    fs::read(path).map_err(|error| format!("cannot read {}: {error}", path.display()))
}

fn to_array(bytes: &[u8]) -> [u8; 32] {
    bytes.try_into().expect("SHA-256 gives 32 bytes")
}

fn check_mode(path: &Path) -> Result<(), String> {
    let shown = path.display();
    let meta = fs::metadata(path).map_err(|error| format!("cannot read {shown}: {error}"))?;
    if hardening::is_open_to_others(&meta) {
        let mode = meta.mode() & 0o777;
        return Err(format!(
            "the private key {shown} has mode {mode:03o}: others can read it; run `chmod 600 {shown}`, \
             and replace the key if others may have read it"
        ));
    }
    Ok(())
}

/// Refuses a certificate that is expired or not valid yet, and warns of one that soon will be.
fn check_validity(leaf: &CertificateDer<'_>, path: &Path) -> Result<i64, String> {
    let shown = path.display();
    let (_, certificate) = X509Certificate::from_der(leaf)
        .map_err(|error| format!("{shown} does not parse: {error}"))?;
    let (from, until) = (
        certificate.validity().not_before.timestamp(),
        certificate.validity().not_after.timestamp(),
    );
    let now = Timestamp::now().micros() / 1_000_000;
    let date = |seconds: i64| Timestamp::from_micros(seconds.saturating_mul(1_000_000));
    if now > until {
        return Err(format!(
            "{shown} expired on {}; every client would refuse it: renew it",
            date(until)
        ));
    }
    if now < from {
        return Err(format!(
            "{shown} is not valid before {}; look at the clock of this machine",
            date(from)
        ));
    }
    let days = note_days_left(until, path);
    if days < WARN_DAYS {
        tracing::warn!(certificate = %shown, days, "the certificate expires soon; renew it");
    }
    Ok(until)
}

fn note_days_left(until: i64, path: &Path) -> i64 {
    let now = Timestamp::now().micros() / 1_000_000;
    let days = (until - now).div_euclid(SECONDS_PER_DAY);
    let name = path.display().to_string();
    metrics::gauge!("keybroker_certificate_days_left", "file" => name)
        .set(f64::from(i32::try_from(days).unwrap_or(i32::MAX)));
    days
}
