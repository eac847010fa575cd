//! TLS of one listener: loaded and checked as a whole, replaced as a whole. A bad file on reload leaves the old
//! configuration in place.
//!
//! Mitigation: M1 of `THREAT_MODEL.md`.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
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
use revocation::{Age, LISTS_BYTES_MAX, Life, Lists, ListsFile, Memory, MemoryError};

const SECONDS_PER_HOUR: i64 = 3_600;

/// Longest chain, key and file of authorities, in bytes.
const PEM_BYTES_MAX: u64 = 4 * 1024 * 1024;
/// Files with a problem are evaluated again after this time, although they are the same: a list may have become valid.
const RETRY_AFTER: Duration = Duration::from_mins(1);
const CHAIN: Purpose =
    Purpose::trust("other users could decide which certificate clients are shown");
const KEY: Purpose = Purpose::secret("private key");
const AUTHORITIES: Purpose =
    Purpose::trust("other users could name a certificate authority, and be any client");
const LISTS: Purpose = Purpose::trust("other users could hide a revocation");
const LIST_ISSUERS: Purpose =
    Purpose::trust("other users could choose whose revocation lists are accepted");

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

impl Accepting {
    /// What the log says about the revocation lists that were left out.
    fn left_out(&self) -> Option<String> {
        self.lists.as_ref().and_then(Lists::left_out)
    }
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
    /// Why the accepted revocation lists could not be stored.
    unstored: Mutex<Option<String>>,
    /// The newest revocation lists that were accepted, now and before a restart.
    memory: Mutex<Memory>,
    evaluated: Mutex<Evaluated>,
}

/// The files that were evaluated last.
#[derive(Debug)]
struct Evaluated {
    /// Of the files, or of why they could not be read.
    digest: [u8; 32],
    /// When the same files are evaluated again; absent if nothing is wrong with them.
    again_at: Option<Instant>,
}

/// Whether a look at the files evaluated them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Look {
    /// They are the same, and either good or evaluated a moment ago.
    Unchanged,
    Evaluated,
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

/// The files that decide which clients are accepted.
struct Trust {
    client_ca: Vec<u8>,
    client_crl: Option<ListsFile>,
    /// Certificates of further authorities that sign revocation lists.
    crl_issuers: Option<Vec<u8>>,
}

struct Files {
    shown: Shown,
    trust: Trust,
}

/// The files, each part of which is used by itself when the other cannot be read.
struct Found {
    shown: Result<Shown, Error>,
    trust: Result<Trust, Error>,
}

impl Tls {
    /// Loads the files; any problem stops the start, except a revocation list whose authority has another one, has one that was accepted
    /// before a restart, or is not configured. Without a state directory, this is a check of the configuration, which also fails on lists
    /// that a start leaves out.
    pub(super) fn load(
        settings: TlsSettings,
        clients: ClientCertificates,
        protocols: Vec<Vec<u8>>,
        state: Option<&StateDirectory>,
    ) -> Result<Self, Error> {
        let files = Files::read(&settings, clients)?;
        let mut memory = match (state, &settings.client_crl_file) {
            (Some(state), Some(file)) => Memory::open(state.clone(), file)?,
            _ => Memory::default(),
        };
        let mut follows = Follows {
            memory: &mut memory,
            in_use: None,
        };
        let mut accepting = files.build(
            &settings,
            clients,
            &protocols,
            Validity::Checked,
            &mut follows,
        )?;
        if state.is_none()
            && let Some(problem) = accepting.lists.as_mut().and_then(Lists::take_problem)
        {
            return Err(Error::lists(settings.client_crl_file.as_deref(), problem));
        }
        if let Some(lists) = &accepting.lists {
            memory.accept(lists);
        }
        log_contents("TLS files read", &settings, accepting.contents);
        let evaluated = Evaluated {
            digest: accepting.files,
            again_at: accepting.left_out().map(|_| Instant::now() + RETRY_AFTER),
        };
        let tls = Self {
            shown: Mutex::new(files.shown),
            settings,
            clients,
            protocols,
            current: ArcSwap::from_pointee(accepting),
            refused: Mutex::default(),
            left_out: Mutex::default(),
            age: Mutex::default(),
            unstored: Mutex::default(),
            memory: Mutex::new(memory),
            evaluated: Mutex::new(evaluated),
        };
        tls.report_left_out();
        Ok(tls)
    }

    /// Stores the accepted revocation lists, so that a restart does not forget them.
    pub(super) fn remember_lists(&self) -> Result<(), MemoryError> {
        held(&self.memory).store()
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
    /// clients that are still trusted reconnect. Files with a problem are evaluated again once a minute.
    pub(super) fn reload(&self) {
        self.reload_at(Instant::now());
    }

    fn reload_at(&self, now: Instant) -> Look {
        let found = Found::read(&self.settings, self.clients);
        let digest = found.digest();
        {
            let last = held(&self.evaluated);
            if last.digest == digest && last.again_at.is_none_or(|at| now < at) {
                return Look::Unchanged;
            }
        }
        let outcome = self.try_reload(found);
        self.report_left_out();
        let is_good = [
            self.report_reload(outcome),
            self.store_accepted(),
            self.current().left_out().is_none(),
        ];
        let is_bad = is_good.contains(&false);
        let again_at = is_bad.then(|| now + RETRY_AFTER);
        *held(&self.evaluated) = Evaluated { digest, again_at };
        Look::Evaluated
    }

    fn report_reload(&self, outcome: Result<bool, Error>) -> bool {
        let mut refused = held(&self.refused);
        match outcome {
            Ok(changed) => {
                *refused = None;
                if changed {
                    log_contents("TLS files reloaded", &self.settings, self.contents());
                }
                true
            }
            Err(error) => {
                let error = chain(&error);
                if refused.as_ref() != Some(&error) {
                    keybroker_core::alert!(TlsReload, %error, "TLS files rejected; the previous ones stay in use");
                    *refused = Some(error);
                }
                false
            }
        }
    }

    fn store_accepted(&self) -> bool {
        let error = self.remember_lists().err().map(|error| chain(&error));
        let mut unstored = held(&self.unstored);
        if *unstored != error
            && let Some(error) = &error
        {
            // The newer list counts all the same; only a restart would not know of it.
            keybroker_core::alert!(
                ClientCrl, %error,
                "the accepted revocation lists could not be stored; after a restart an older one would be accepted"
            );
        }
        *unstored = error;
        unstored.is_none()
    }

    /// Reports the revocation lists that were left out, once until they change.
    fn report_left_out(&self) {
        let left_out = self.current().left_out();
        let mut said = held(&self.left_out);
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

    /// Forgets what was reported: after a requested reload, problems are evaluated and reported again.
    pub(super) fn report_again(&self) {
        for said in [&self.refused, &self.left_out, &self.unstored] {
            *held(said) = None;
        }
        let mut evaluated = held(&self.evaluated);
        if evaluated.again_at.is_some() {
            evaluated.again_at = Some(Instant::now());
        }
    }

    /// Sets the metrics of these listeners anew, because time goes on while they serve, and raises the alerts of their revocation lists.
    /// Returns what is wrong with the lists, for the health of the broker; empty if nothing is.
    pub(super) fn measure(listeners: &[Arc<Self>]) -> String {
        // Several listeners may have one file of lists.
        let mut files: BTreeMap<&Path, FileState> = BTreeMap::new();
        for one in listeners {
            let current = one.current();
            note_expiry(current.until, &one.settings.certificate_file);
            if let (Some(lists), Some(path)) = (&current.lists, &one.settings.client_crl_file)
                && let Some(life) = lists.life()
            {
                one.note_age(life, path);
                let file = files.entry(path).or_default();
                file.problems = file.problems.max(lists.problem_count());
                file.until = file
                    .until
                    .map_or(Some(life.until), |at| Some(at.min(life.until)));
            }
        }
        let now = now();
        let problems: Vec<String> = files
            .iter()
            .filter_map(|(path, file)| file.measure(path, now))
            .collect();
        problems.join("; ")
    }

    fn note_age(&self, life: Life, path: &Path) {
        let now = now();
        let shown = path.display().to_string();
        let hours = (life.until - now).div_euclid(SECONDS_PER_HOUR);
        let age = life.age(now);
        let mut reported = held(&self.age);
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

    fn try_reload(&self, found: Found) -> Result<bool, Error> {
        // A renewal of the server's certificate that went wrong must not keep a revoked client in.
        let trust = found.trust?;
        let refused = match found.shown {
            Err(error) => (error, trust),
            Ok(shown) => {
                let files = Files { shown, trust };
                match self.try_reload_all(&files) {
                    Ok(changed) => return Ok(changed),
                    Err(error) => (error, files.trust),
                }
            }
        };
        let (error, trust) = refused;
        self.try_reload_trust(trust)?;
        Err(error)
    }

    fn try_reload_all(&self, files: &Files) -> Result<bool, Error> {
        let current = self.current();
        let next = self.build(files, Validity::Checked)?;
        // A list that was left out may have become valid since, and one that was kept may have ended.
        if next.files == current.files
            && next.trust == current.trust
            && next.left_out() == current.left_out()
        {
            return Ok(false);
        }
        *held(&self.shown) = files.shown.clone();
        self.take_over(next);
        Ok(true)
    }

    /// Changed authorities and revocation lists, with the chain and key that are in use.
    fn try_reload_trust(&self, trust: Trust) -> Result<(), Error> {
        let shown = held(&self.shown).clone();
        let next = self.build(&Files { shown, trust }, Validity::Unchecked)?;
        if next.trust != self.current().trust {
            self.take_over(next);
            tracing::warn!("changed trust in clients is taken over without the other TLS files");
        }
        Ok(())
    }

    fn build(&self, files: &Files, validity: Validity) -> Result<Accepting, Error> {
        let mut memory = held(&self.memory);
        let current = self.current();
        let mut follows = Follows {
            memory: &mut memory,
            in_use: current.lists.as_ref(),
        };
        files.build(
            &self.settings,
            self.clients,
            &self.protocols,
            validity,
            &mut follows,
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
            held(&self.memory).accept(lists);
        }
        self.current.store(Arc::new(next));
        if trust_changed {
            current.outdated.cancel();
        }
    }
}

/// The revocation lists that a file must not go back behind.
struct Follows<'a> {
    memory: &'a mut Memory,
    /// The lists that are in use now.
    in_use: Option<&'a Lists>,
}

/// Whether the dates of the server's own certificate matter.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Validity {
    Checked,
    /// It is in use already.
    Unchecked,
}

impl Shown {
    fn update(&self, context: &mut digest::Context) {
        update(context, &self.chain);
        update(context, &self.key);
    }

    fn read(settings: &TlsSettings) -> Result<Self, Error> {
        let chain = &settings.certificate_file;
        Ok(Self {
            chain: read("certificate_file", chain, PEM_BYTES_MAX, CHAIN)?.to_vec(),
            key: read("key_file", &settings.key_file, PEM_BYTES_MAX, KEY)?,
        })
    }
}

impl Trust {
    fn read(settings: &TlsSettings, clients: ClientCertificates) -> Result<Self, Error> {
        let mut trust = Self {
            client_ca: Vec::new(),
            client_crl: None,
            crl_issuers: None,
        };
        if clients == ClientCertificates::None {
            return Ok(trust);
        }
        let path = settings.client_ca_file.as_deref();
        let path = path.ok_or(Error::NoAuthorities)?;
        trust.client_ca = read("client_ca_file", path, PEM_BYTES_MAX, AUTHORITIES)?.to_vec();
        if let Some(path) = &settings.client_crl_file {
            trust.client_crl = Some(read_lists(path)?);
            if let Some(path) = &settings.client_crl_issuers_file {
                let setting = "client_crl_issuers_file";
                let issuers = read(setting, path, PEM_BYTES_MAX, LIST_ISSUERS)?;
                trust.crl_issuers = Some(issuers.to_vec());
            }
        }
        Ok(trust)
    }

    fn update(&self, context: &mut digest::Context) {
        update(context, &self.client_ca);
        match &self.client_crl {
            None => update(context, b""),
            Some(ListsFile::Content(bytes)) => update(context, bytes),
            Some(ListsFile::TooLong) => update(context, b"too long"),
        }
        update(context, self.crl_issuers.as_deref().unwrap_or_default());
    }
}

/// Adds a part to a digest, so that two parts are not taken for one.
fn update(context: &mut digest::Context, part: &[u8]) {
    context.update(&u64::try_from(part.len()).unwrap_or(0).to_be_bytes());
    context.update(part);
}

/// A file that is too long is reported like one that is damaged: the accepted lists stay in use, also after a restart.
fn read_lists(path: &Path) -> Result<ListsFile, Error> {
    match trusted_file::read(path, LISTS_BYTES_MAX, LISTS) {
        Ok(bytes) => Ok(ListsFile::Content(bytes.to_vec())),
        Err(error) if error.is_too_long() => Ok(ListsFile::TooLong),
        Err(source) => Err(Error::File {
            setting: "client_crl_file",
            source: Box::new(source),
        }),
    }
}

impl Found {
    fn read(settings: &TlsSettings, clients: ClientCertificates) -> Self {
        Self {
            shown: Shown::read(settings),
            trust: Trust::read(settings, clients),
        }
    }

    /// Of the files, as [`Files::digest`]; where they cannot be read, of the reason.
    fn digest(&self) -> [u8; 32] {
        let mut context = digest::Context::new(&digest::SHA256);
        match &self.shown {
            Ok(shown) => shown.update(&mut context),
            Err(error) => update(&mut context, chain(error).as_bytes()),
        }
        match &self.trust {
            Ok(trust) => trust.update(&mut context),
            Err(error) => update(&mut context, chain(error).as_bytes()),
        }
        to_array(context.finish().as_ref())
    }
}

impl Files {
    fn read(settings: &TlsSettings, clients: ClientCertificates) -> Result<Self, Error> {
        let Found { shown, trust } = Found::read(settings, clients);
        Ok(Self {
            shown: shown?,
            trust: trust?,
        })
    }

    fn digest(&self) -> [u8; 32] {
        let mut context = digest::Context::new(&digest::SHA256);
        self.shown.update(&mut context);
        self.trust.update(&mut context);
        to_array(context.finish().as_ref())
    }

    fn build(
        &self,
        settings: &TlsSettings,
        clients: ClientCertificates,
        protocols: &[Vec<u8>],
        validity: Validity,
        follows: &mut Follows<'_>,
    ) -> Result<Accepting, Error> {
        let path = &settings.certificate_file;
        let chain = pem::chain(&self.shown.chain).map_err(of_pem("certificate_file", path))?;
        let leaf = chain
            .first()
            .ok_or_else(|| Error::NoCertificate { path: shown(path) })?;
        let until = match validity {
            Validity::Checked => check_validity(leaf, path)?,
            Validity::Unchecked => life_of(leaf, path)?.until,
        };
        let key =
            pem::private_key(&self.shown.key).map_err(of_pem("key_file", &settings.key_file))?;
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
    fn lists(
        &self,
        settings: &TlsSettings,
        follows: &mut Follows<'_>,
    ) -> Result<Option<Lists>, Error> {
        let (Some(file), Some(path)) = (&self.trust.client_crl, &settings.client_crl_file) else {
            return Ok(None);
        };
        let now = now();
        let mut authorities = self.authorities(settings)?;
        authorities.extend(self.list_issuers(settings)?);
        let lists = Lists::read(file, &authorities, now)
            .map_err(|error| Error::lists(Some(path), error))?;
        follows.memory.load(&authorities)?;
        let lists = lists.follow(follows.memory, follows.in_use, now);
        lists
            .map(Some)
            .map_err(|error| Error::lists(Some(path), error))
    }

    /// Further authorities that sign revocation lists. A client certificate does not become valid by them.
    fn list_issuers(&self, settings: &TlsSettings) -> Result<Vec<CertificateDer<'static>>, Error> {
        let (Some(bytes), Some(path)) =
            (&self.trust.crl_issuers, &settings.client_crl_issuers_file)
        else {
            return Ok(Vec::new());
        };
        pem::certificates(bytes).map_err(of_pem("client_crl_issuers_file", path))
    }

    fn trust(&self, lists: Option<&Lists>) -> [u8; 32] {
        let mut context = digest::Context::new(&digest::SHA256);
        context.update(digest::digest(&digest::SHA256, &self.trust.client_ca).as_ref());
        if let Some(lists) = lists {
            context.update(&lists.revoked());
        }
        to_array(context.finish().as_ref())
    }

    fn authorities(&self, settings: &TlsSettings) -> Result<Vec<CertificateDer<'static>>, Error> {
        let path = settings.client_ca_file.as_deref().unwrap_or(Path::new(""));
        pem::certificates(&self.trust.client_ca).map_err(of_pem("client_ca_file", path))
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

/// What is known of a file of revocation lists.
#[derive(Default)]
struct FileState {
    problems: usize,
    /// When its first list ends, in seconds since 1970.
    until: Option<i64>,
}

impl FileState {
    /// Sets its metrics, and says what is wrong.
    fn measure(&self, path: &Path, now: i64) -> Option<String> {
        let path = path.display().to_string();
        let problems = u32::try_from(self.problems).unwrap_or(u32::MAX);
        metrics::CLIENT_CRL_PROBLEMS
            .with([path.clone()])
            .set(f64::from(problems));
        if let Some(until) = self.until {
            metrics::CLIENT_CRL_EXPIRY
                .with([path.clone()])
                .set(to_float(until));
        }
        let has_ended = self.until.is_some_and(|until| until < now);
        match (self.problems, has_ended) {
            (0, false) => None,
            (0, true) => Some(format!(
                "client_crl_file {path}: a revocation list has ended"
            )),
            (problems, _) => Some(format!(
                "client_crl_file {path}: {problems} revocation lists refused or missing (alert client-crl)"
            )),
        }
    }
}

fn held<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn now() -> i64 {
    Timestamp::now().micros() / 1_000_000
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
    let now = now();
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
