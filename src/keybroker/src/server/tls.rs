//! TLS of one listener: loaded and checked as a whole, replaced as a whole. A bad file on reload leaves the old
//! configuration in place.
//!
//! Mitigation: M1 of `THREAT_MODEL.md`.

use std::{
    collections::BTreeSet,
    fmt,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use arc_swap::ArcSwap;
use aws_lc_rs::digest;
use rustls::{
    InconsistentKeys, RootCertStore, ServerConfig,
    server::{NoServerSessionStorage, WebPkiClientVerifier, danger::ClientCertVerifier},
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio_util::sync::CancellationToken;
use x509_parser::prelude::{FromDer as _, X509Certificate};
use zeroize::Zeroizing;

use keybroker_core::{
    call::Timestamp,
    error::chain,
    metrics, pem,
    state::StateDirectory,
    trusted_file::{self, Purpose},
};

use crate::certificate::{Age as LifeAge, Life as CertificateLife};

use super::{ClientCertificates, TlsSettings};

mod error;
mod namesakes;
mod purpose;
mod revocation;
#[cfg(test)]
mod tests;

pub use error::Error;
use error::shown;
use namesakes::Namesakes;
use purpose::ForClients;
use revocation::{Age, Life, Lists, MemoryError, Newest};

const SECONDS_PER_HOUR: i64 = 3_600;

/// Longest chain, key and file of authorities, in bytes.
const PEM_BYTES_MAX: u64 = 4 * 1024 * 1024;
/// Longest file of revocation lists, in bytes.
const LISTS_BYTES_MAX: u64 = 64 * 1024 * 1024;
const CHAIN: Purpose =
    Purpose::trust("other users could decide which certificate clients are shown");
const KEY: Purpose = Purpose::secret("private key");
const AUTHORITIES: Purpose =
    Purpose::trust("other users could name a certificate authority, and be any client");
const LISTS: Purpose = Purpose::trust("other users could hide a revocation");

/// What connections are accepted with, from one moment to the next.
#[derive(Debug)]
pub(super) struct Accepting {
    pub(super) config: Arc<ServerConfig>,
    /// Cancelled when the trust in clients has changed: a revoked client must not keep its connection.
    pub(super) outdated: CancellationToken,
    /// SHA-256 of the files, and of what decides about clients: their CAs, and who is revoked.
    files: [u8; 32],
    trust: [u8; 32],
    /// The revocation lists.
    lists: Option<Lists>,
    /// Last second of the certificate, since 1970.
    until: i64,
    contents: Contents,
}

const OUT_OF_ORDER: &str = "the chain is not in order, and some clients will refuse it";

/// How much each file of a listener gave: a number that is too small is how an operator sees that something is missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Contents {
    /// Certificates of the chain.
    pub certificates: usize,
    /// Authorities of client certificates.
    pub authorities: usize,
    /// Revocation lists.
    pub revocation_lists: usize,
    /// Whether each certificate of the chain is followed by its issuer. Some clients refuse a chain that is not.
    pub is_chain_in_order: bool,
}

impl fmt::Display for Contents {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut separator = "";
        for (number, one, many) in [
            (
                self.certificates,
                "certificate in the chain",
                "certificates in the chain",
            ),
            (self.authorities, "client authority", "client authorities"),
            (self.revocation_lists, "revocation list", "revocation lists"),
        ] {
            if number > 0 {
                let what = if number == 1 { one } else { many };
                write!(f, "{separator}{number} {what}")?;
                separator = ", ";
            }
        }
        if !self.is_chain_in_order {
            write!(
                f,
                "; {OUT_OF_ORDER}: write the server's certificate first and after each certificate its issuer"
            )?;
        }
        Ok(())
    }
}

/// TLS of a listener, replaceable while it serves.
#[derive(Debug)]
pub(super) struct Tls {
    settings: TlsSettings,
    clients: ClientCertificates,
    /// What clients can speak here (RFC 7301).
    protocols: Vec<Vec<u8>>,
    current: ArcSwap<Accepting>,
    /// Chain and key that are in use: with them changed trust counts also while those on disk are bad.
    shown: Mutex<Shown>,
    /// What the last reload failed with, so that it is reported once and not each second.
    refused: Mutex<Option<String>>,
    /// Which revocation lists were last reported as left out.
    left_out: Mutex<Option<String>>,
    /// What was last reported of the age of the revocation lists.
    age: Mutex<Option<Age>>,
    /// The newest revocation lists that were accepted, now and before a restart.
    newest: Mutex<Newest>,
}

/// The server's certificate chain and key, as in the files.
#[derive(Clone)]
struct Shown {
    chain: Vec<u8>,
    key: Zeroizing<Vec<u8>>,
}

impl fmt::Debug for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Shown(…)")
    }
}

struct Files {
    chain: Vec<u8>,
    key: Zeroizing<Vec<u8>>,
    client_ca: Vec<u8>,
    client_crl: Option<Vec<u8>>,
}

impl Tls {
    /// Loads the files; any problem stops the start, except a revocation list whose authority has another one or is not configured.
    /// With a state directory, revocation lists that are older than those of an earlier start are refused. Without one, this is a
    /// check of the configuration, which also fails on lists that a start leaves out.
    pub(super) fn load(
        settings: TlsSettings,
        clients: ClientCertificates,
        protocols: Vec<Vec<u8>>,
        state: Option<&StateDirectory>,
    ) -> Result<Self, Error> {
        let files = Files::read(&settings, clients)?;
        let mut newest = match (state, &settings.client_crl_file) {
            (Some(state), Some(file)) => Newest::read(state.clone(), file)?,
            _ => Newest::default(),
        };
        let follows = Follows {
            newest: &newest,
            in_use: None,
        };
        let mut accepting =
            files.build(&settings, clients, &protocols, Validity::Checked, &follows)?;
        if state.is_none()
            && let Some(problem) = accepting.lists.as_mut().and_then(Lists::take_problem)
        {
            return Err(Error::lists(settings.client_crl_file.as_deref(), problem));
        }
        if let Some(lists) = &accepting.lists {
            newest.accept(lists);
        }
        log_contents("TLS files read", &settings, accepting.contents);
        let tls = Self {
            shown: Mutex::new(files.shown()),
            settings,
            clients,
            protocols,
            current: ArcSwap::from_pointee(accepting),
            refused: Mutex::default(),
            left_out: Mutex::default(),
            age: Mutex::default(),
            newest: Mutex::new(newest),
        };
        tls.report_left_out();
        Ok(tls)
    }

    /// Stores which revocation lists were accepted, so that a restart does not forget them.
    pub(super) fn remember_lists(&self) -> Result<(), MemoryError> {
        let newest = self.newest.lock().unwrap_or_else(PoisonError::into_inner);
        newest.store()
    }

    pub(super) fn current(&self) -> Arc<Accepting> {
        self.current.load_full()
    }

    /// How much each file gave.
    pub(super) fn contents(&self) -> Contents {
        self.current().contents
    }

    /// Trust domains of SPIFFE ids that are accepted; empty: any.
    pub(super) fn trust_domains(&self) -> &BTreeSet<String> {
        &self.settings.trust_domains
    }

    /// Takes over changed files. Connections continue, unless the trust in clients has changed: then all of them get GOAWAY, and
    /// clients that are still trusted reconnect.
    pub(super) fn reload(&self) {
        let outcome = self.try_reload();
        self.report_left_out();
        let mut refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        match outcome {
            Ok(changed) => {
                *refused = None;
                if changed {
                    log_contents("TLS files reloaded", &self.settings, self.contents());
                }
            }
            Err(error) => {
                let error = chain(&error);
                if refused.as_ref() == Some(&error) {
                    return;
                }
                keybroker_core::alert!(TlsReload, %error, "TLS files rejected; the previous ones stay in use");
                *refused = Some(error);
            }
        }
    }

    /// Reports the revocation lists that were left out, once until they change.
    fn report_left_out(&self) {
        let current = self.current();
        let left_out = current.lists.as_ref().and_then(Lists::left_out);
        let mut said = self.left_out.lock().unwrap_or_else(PoisonError::into_inner);
        if *said == left_out {
            return;
        }
        if let (Some(error), Some(path)) = (&left_out, &self.settings.client_crl_file) {
            let file = path.display().to_string();
            keybroker_core::alert!(
                ClientCrl, %file, %error,
                "revocation lists not taken over; their authorities keep the lists in use, if there are any"
            );
        }
        *said = left_out;
    }

    /// Forgets what was reported: after a requested reload, problems are reported again.
    pub(super) fn report_again(&self) {
        for said in [&self.refused, &self.left_out] {
            *said.lock().unwrap_or_else(PoisonError::into_inner) = None;
        }
    }

    /// Says again how long the certificate in use is valid: time goes on while it serves.
    pub(super) fn measure(&self) {
        let current = self.current();
        note_expiry(current.until, &self.settings.certificate_file);
        let life = current.lists.as_ref().and_then(Lists::life);
        if let (Some(life), Some(path)) = (life, &self.settings.client_crl_file) {
            self.note_age(life, path);
        }
    }

    fn note_age(&self, life: Life, path: &Path) {
        let now = Timestamp::now().micros() / 1_000_000;
        let shown = path.display().to_string();
        let hours = (life.until - now).div_euclid(SECONDS_PER_HOUR);
        metrics::CLIENT_CRL_EXPIRY
            .with([shown.clone()])
            .set(to_float(life.until));
        let age = life.age(now);
        let mut reported = self.age.lock().unwrap_or_else(PoisonError::into_inner);
        if *reported == Some(age) {
            return;
        }
        match age {
            Age::Good => {}
            Age::Late => keybroker_core::alert!(
                ClientCrl, file = %shown, hours_left = hours,
                "a revocation list ends soon, and there is no newer one; then no client certificate is accepted"
            ),
            Age::Over => keybroker_core::alert!(
                ClientCrl, file = %shown,
                "a revocation list has ended: its authority's clients are refused until there is a newer one"
            ),
        }
        *reported = Some(age);
    }

    fn try_reload(&self) -> Result<bool, Error> {
        let reloaded = self.try_reload_all();
        if reloaded.is_err() {
            // A renewal that went wrong must not keep a revoked client in.
            self.try_reload_trust()?;
        }
        reloaded
    }

    fn try_reload_all(&self) -> Result<bool, Error> {
        let files = Files::read(&self.settings, self.clients)?;
        let current = self.current();
        let left_out = |accepting: &Accepting| accepting.lists.as_ref().and_then(Lists::left_out);
        let is_same = files.digest() == current.files;
        // A list that was left out may have become valid since.
        if is_same && left_out(&current).is_none() {
            return Ok(false);
        }
        let next = self.build(&files, Validity::Checked)?;
        if is_same && left_out(&next) == left_out(&current) {
            return Ok(false);
        }
        *self.shown.lock().unwrap_or_else(PoisonError::into_inner) = files.shown();
        self.take_over(next);
        Ok(true)
    }

    /// Changed authorities and revocation lists, with the chain and key that are in use.
    fn try_reload_trust(&self) -> Result<(), Error> {
        let shown = self
            .shown
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        let files = Files::with_trust(shown, &self.settings, self.clients)?;
        let next = self.build(&files, Validity::Unchecked)?;
        if next.trust != self.current().trust {
            self.take_over(next);
            tracing::warn!("changed trust in clients is taken over without the other TLS files");
        }
        Ok(())
    }

    fn build(&self, files: &Files, validity: Validity) -> Result<Accepting, Error> {
        let newest = self.newest.lock().unwrap_or_else(PoisonError::into_inner);
        let current = self.current();
        let follows = Follows {
            newest: &newest,
            in_use: current.lists.as_ref(),
        };
        files.build(
            &self.settings,
            self.clients,
            &self.protocols,
            validity,
            &follows,
        )
    }

    fn take_over(&self, mut next: Accepting) {
        let current = self.current();
        let trust_changed = next.trust != current.trust;
        if !trust_changed {
            // Connections that were accepted under the earlier trust are notified at the next change.
            next.outdated = current.outdated.clone();
        }
        if let Some(lists) = &next.lists {
            self.newest
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .accept(lists);
        }
        if let Err(error) = self.remember_lists() {
            // The newer list counts all the same; only a restart would not know of it.
            let error = chain(&error);
            keybroker_core::alert!(
                ClientCrl, %error,
                "the accepted revocation lists could not be stored; after a restart an older one would be accepted"
            );
        }
        self.current.store(Arc::new(next));
        if trust_changed {
            current.outdated.cancel();
        }
    }
}

/// The revocation lists that a file must not go back behind.
struct Follows<'a> {
    newest: &'a Newest,
    /// The lists that an authority keeps when its new lists are refused.
    in_use: Option<&'a Lists>,
}

/// Whether the dates of the server's own certificate matter.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Validity {
    Checked,
    /// It is in use already.
    Unchecked,
}

impl Files {
    fn read(settings: &TlsSettings, clients: ClientCertificates) -> Result<Self, Error> {
        let shown = Shown {
            chain: read(
                "certificate_file",
                &settings.certificate_file,
                PEM_BYTES_MAX,
                CHAIN,
            )?
            .to_vec(),
            key: read("key_file", &settings.key_file, PEM_BYTES_MAX, KEY)?,
        };
        Self::with_trust(shown, settings, clients)
    }

    fn with_trust(
        Shown { chain, key }: Shown,
        settings: &TlsSettings,
        clients: ClientCertificates,
    ) -> Result<Self, Error> {
        let client_ca = match (&settings.client_ca_file, clients) {
            (_, ClientCertificates::None) => Vec::new(),
            (Some(path), _) => read("client_ca_file", path, PEM_BYTES_MAX, AUTHORITIES)?.to_vec(),
            (None, _) => return Err(Error::NoAuthorities),
        };
        let client_crl = match (&settings.client_crl_file, clients) {
            (Some(path), ClientCertificates::Required | ClientCertificates::Optional) => {
                Some(read("client_crl_file", path, LISTS_BYTES_MAX, LISTS)?.to_vec())
            }
            _ => None,
        };
        Ok(Self {
            chain,
            key,
            client_ca,
            client_crl,
        })
    }

    fn shown(&self) -> Shown {
        Shown {
            chain: self.chain.clone(),
            key: self.key.clone(),
        }
    }

    fn digest(&self) -> [u8; 32] {
        let mut context = digest::Context::new(&digest::SHA256);
        let lists = self.client_crl.as_deref().unwrap_or_default();
        for part in [&self.chain, &*self.key, &self.client_ca, lists] {
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
        validity: Validity,
        follows: &Follows<'_>,
    ) -> Result<Accepting, Error> {
        let path = &settings.certificate_file;
        let chain = pem::chain(&self.chain).map_err(of_pem("certificate_file", path))?;
        let leaf = chain
            .first()
            .ok_or_else(|| Error::NoCertificate { path: shown(path) })?;
        let until = match validity {
            Validity::Checked => check_validity(leaf, path)?,
            Validity::Unchecked => life_of(leaf, path)?.until,
        };
        let key = pem::private_key(&self.key).map_err(of_pem("key_file", &settings.key_file))?;
        let lists = self.lists(settings, follows)?;
        let trust = self.trust(lists.as_ref());
        let contents = Contents {
            certificates: chain.len(),
            authorities: match clients {
                ClientCertificates::None => 0,
                ClientCertificates::Optional | ClientCertificates::Required => {
                    self.authorities(settings)?.len()
                }
            },
            revocation_lists: lists.as_ref().map_or(0, Lists::count),
            is_chain_in_order: is_in_order(&chain),
        };
        let place = key_place(&chain, &key);
        let builder = ServerConfig::builder();
        let builder = match self.verifier(settings, clients, lists.as_ref())? {
            Some(verifier) => builder.with_client_cert_verifier(verifier),
            None => builder.with_no_client_auth(),
        };
        let mut config = builder.with_single_cert(chain, key).map_err(|error| {
            let (path, key_path) = (shown(path), shown(&settings.key_file));
            match place {
                Some(number) if number > 1 => Error::ChainOrder {
                    path,
                    key_path,
                    number,
                    count: contents.certificates,
                },
                None if error == rustls::Error::InconsistentKeys(InconsistentKeys::KeyMismatch) => {
                    Error::OtherKey { path, key_path }
                }
                _ => Error::Unusable {
                    path,
                    key_path,
                    source: error,
                },
            }
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
            trust,
            lists,
            contents,
        })
    }

    /// The revocation lists, if there are to be any.
    fn lists(&self, settings: &TlsSettings, follows: &Follows<'_>) -> Result<Option<Lists>, Error> {
        let (Some(pem), Some(path)) = (&self.client_crl, &settings.client_crl_file) else {
            return Ok(None);
        };
        Lists::read(pem, &self.authorities(settings)?)
            .and_then(|lists| lists.follow(follows.newest, follows.in_use))
            .map(Some)
            .map_err(|problem| Error::lists(Some(path), problem))
    }

    fn trust(&self, lists: Option<&Lists>) -> [u8; 32] {
        let mut context = digest::Context::new(&digest::SHA256);
        context.update(digest::digest(&digest::SHA256, &self.client_ca).as_ref());
        if let Some(lists) = lists {
            context.update(&lists.revoked());
        }
        to_array(context.finish().as_ref())
    }

    fn authorities(&self, settings: &TlsSettings) -> Result<Vec<CertificateDer<'static>>, Error> {
        let path = settings.client_ca_file.as_deref().unwrap_or(Path::new(""));
        pem::certificates(&self.client_ca).map_err(of_pem("client_ca_file", path))
    }

    fn verifier(
        &self,
        settings: &TlsSettings,
        clients: ClientCertificates,
        lists: Option<&Lists>,
    ) -> Result<Option<Arc<dyn ClientCertVerifier>>, Error> {
        if clients == ClientCertificates::None {
            return Ok(None);
        }
        let path = settings.client_ca_file.as_deref().unwrap_or(Path::new(""));
        let mut roots = RootCertStore::empty();
        for certificate in self.authorities(settings)? {
            roots.add(certificate).map_err(|source| Error::Authority {
                path: shown(path),
                source,
            })?;
        }
        let roots = Arc::new(roots);
        let build = |ders: Option<Vec<_>>| {
            let mut builder = WebPkiClientVerifier::builder(Arc::clone(&roots));
            if clients == ClientCertificates::Optional {
                builder = builder.allow_unauthenticated();
            }
            if let Some(ders) = ders {
                // The whole chain is looked up, and a certificate that no list covers is refused: both are the defaults.
                builder = builder.with_crls(ders).enforce_revocation_expiration();
            }
            builder.build().map_err(|source| Error::Verifier {
                path: shown(path),
                source,
            })
        };
        let mut lists = lists
            .map(Lists::by_verifier)
            .unwrap_or_default()
            .into_iter();
        let first = build(lists.next())?;
        let others = lists.map(|ders| build(Some(ders)));
        let verifier = Namesakes::over(first, others.collect::<Result<_, _>>()?);
        if settings.client_auth_usage_required {
            return Ok(Some(Arc::new(ForClients(verifier))));
        }
        Ok(Some(verifier))
    }
}

fn read(
    setting: &'static str,
    path: &Path,
    bytes_max: u64,
    purpose: Purpose,
) -> Result<Zeroizing<Vec<u8>>, Error> {
    trusted_file::read(path, bytes_max, purpose).map_err(|source| Error::File {
        setting,
        source: Box::new(source),
    })
}

/// What a problem with the PEM of a file is to the listener.
fn of_pem(setting: &'static str, path: &Path) -> impl Fn(pem::Error) -> Error {
    move |source| Error::Pem {
        setting,
        path: shown(path),
        source,
    }
}

fn log_contents(event: &'static str, settings: &TlsSettings, contents: Contents) {
    tracing::info!(
        certificate = %settings.certificate_file.display(),
        certificates = contents.certificates,
        authorities = contents.authorities,
        revocation_lists = contents.revocation_lists,
        "{event}"
    );
    if !contents.is_chain_in_order {
        tracing::warn!(certificate = %settings.certificate_file.display(), "{OUT_OF_ORDER}");
    }
}

/// Whether each certificate names the next one as its issuer. What does not parse is not in order.
fn is_in_order(chain: &[CertificateDer<'_>]) -> bool {
    let parsed: Result<Vec<_>, _> = chain
        .iter()
        .map(|certificate| X509Certificate::from_der(certificate))
        .collect();
    parsed.is_ok_and(|parsed| {
        parsed.windows(2).all(|pair| {
            let [(_, certificate), (_, next)] = pair else {
                return true;
            };
            certificate.issuer().as_raw() == next.subject().as_raw()
        })
    })
}

/// Which certificate of a chain, counted from 1, has the public half of the key.
fn key_place(chain: &[CertificateDer<'_>], key: &PrivateKeyDer<'_>) -> Option<usize> {
    let key = rustls::crypto::aws_lc_rs::sign::any_supported_type(key).ok()?;
    let public = key.public_key()?;
    let position = chain.iter().position(|certificate| {
        X509Certificate::from_der(certificate)
            .is_ok_and(|(_, certificate)| certificate.public_key().raw == public.as_ref())
    });
    position.map(|position| position + 1)
}

fn to_array(bytes: &[u8]) -> [u8; 32] {
    bytes.try_into().expect("SHA-256 gives 32 bytes")
}

fn life_of(leaf: &CertificateDer<'_>, path: &Path) -> Result<CertificateLife, Error> {
    let (_, certificate) =
        X509Certificate::from_der(leaf).map_err(|source| Error::certificate(path, source))?;
    Ok(CertificateLife {
        from: certificate.validity().not_before.timestamp(),
        until: certificate.validity().not_after.timestamp(),
    })
}

/// Refuses a certificate that is expired or not valid yet, and warns of one that soon will be.
fn check_validity(leaf: &CertificateDer<'_>, path: &Path) -> Result<i64, Error> {
    let life = life_of(leaf, path)?;
    let CertificateLife { from, until } = life;
    let now = Timestamp::now().micros() / 1_000_000;
    let date = |seconds: i64| Timestamp::from_micros(seconds.saturating_mul(1_000_000));
    if now > until {
        return Err(Error::Expired {
            path: shown(path),
            until: date(until),
        });
    }
    if now < from {
        return Err(Error::NotYetValid {
            path: shown(path),
            from: date(from),
        });
    }
    note_expiry(until, path);
    if life.age(now) == LifeAge::Late {
        tracing::warn!(certificate = %path.display(), until = %life.ends(), "the certificate expires soon; renew it");
    }
    Ok(until)
}

fn note_expiry(until: i64, path: &Path) {
    metrics::CERTIFICATE_EXPIRY
        .with([path.display().to_string()])
        .set(to_float(until));
}

/// A time after 1970 as the value of a metric.
fn to_float(seconds: i64) -> f64 {
    // Exact until the year 2106.
    f64::from(u32::try_from(seconds.max(0)).unwrap_or(u32::MAX))
}
