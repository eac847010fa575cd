//! Which client certificates their authorities have taken back (RFC 5280 section 5).
//!
//! Each authority's lists are decided on separately: a list that does not parse, is not signed by its authority, is not valid today or
//! is older than one accepted before (also before a restart) is left out and reported. Its authority keeps the list in use, and the
//! other authorities get their new lists. At the start there is no list in use: then each configured authority needs a list in
//! the file. A client of whose certificate nothing is known is refused. A list is valid until its `nextUpdate`. After that, new
//! connections are refused until there is a newer one; before that, an alert is raised.
//!
//! The list of an authority that is not configured, such as an intermediate CA, can be verified only in the handshake. An
//! attacker on the network path to its distribution point can replace it, so nothing that it says about its age is remembered.
//!
//! Signatures are verified with the algorithms that the handshake verifies with, so that a list that is taken over works there.
//!
//! Mitigation: M1 of `THREAT_MODEL.md`.

use std::{
    cmp::Ordering,
    collections::{BTreeMap, BTreeSet},
    os::unix::ffi::OsStrExt as _,
    path::Path,
    sync::Arc,
};

use aws_lc_rs::digest;
use rustls::{
    RootCertStore,
    crypto::aws_lc_rs::default_provider,
    server::{VerifierBuilderError, WebPkiClientVerifier},
};
use rustls_pki_types::{CertificateDer, CertificateRevocationListDer};
use serde::{Deserialize, Serialize};
use x509_parser::{
    error::X509Error,
    nom,
    num_bigint::BigUint,
    prelude::{CertificateRevocationList, FromDer as _, RevokedCertificate, X509Certificate},
};

use keybroker_core::{
    call::Timestamp,
    error::chain,
    pem,
    state::{self, StateDirectory},
};

/// Part of a list's life, from its end, in which a missing newer list is worth a warning.
const LAST_PART: i64 = 4;
/// Authorities whose newest list is remembered.
const AUTHORITIES_MAX: usize = 128;

/// Lists that the log names when they are left out; a file may have very many.
const PROBLEMS_SHOWN: usize = 5;
/// Length of each of them in the log: the name of an authority may be very long.
const PROBLEM_CHARS_MAX: usize = 600;

/// The lists that are in use, or that a file offers.
#[derive(Debug)]
pub(super) struct Lists {
    /// The lists of each authority, the newest first: the verifier uses the first that fits.
    groups: BTreeMap<Authority, Vec<List>>,
    /// The configured authorities, each with its name as messages show it.
    configured: BTreeMap<Authority, String>,
    /// Why lists were left out.
    problems: Vec<Problem>,
}

/// One list that can be used.
#[derive(Clone, Debug)]
struct List {
    der: CertificateRevocationListDer<'static>,
    version: Version,
    life: Life,
    /// SHA-256 of the authority and the serial numbers on the list.
    revoked: [u8; 32],
}

/// Why a list was left out.
#[derive(Debug)]
struct Problem {
    /// Name of the authority; absent when the list does not parse.
    name: Option<Vec<u8>>,
    error: ListsError,
}

/// When the first of several lists ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Life {
    /// Seconds since 1970.
    from: i64,
    pub(super) until: i64,
}

/// What the log says about the age of a list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Age {
    Good,
    /// It should have been replaced by now.
    Late,
    /// It counts no more.
    Over,
}

impl Life {
    pub(super) fn age(self, now: i64) -> Age {
        let last_part = (self.until - self.from) / LAST_PART;
        if now > self.until {
            Age::Over
        } else if now > self.until - last_part {
            Age::Late
        } else {
            Age::Good
        }
    }
}

/// How new a list is: its `crlNumber`, if it has one, and its `thisUpdate`.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Version {
    /// Big-endian, without zeros in front.
    number: Option<Vec<u8>>,
    /// Seconds since 1970.
    from: i64,
}

/// Name of an authority, and SHA-256 of its key; without a key where its certificate is not known.
type Authority = (Vec<u8>, Option<[u8; 32]>);

impl Version {
    fn of(list: &CertificateRevocationList<'_>) -> Self {
        let number = list.crl_number().map(BigUint::to_bytes_be);
        Self {
            number,
            from: list.last_update().timestamp(),
        }
    }

    fn numbers(&self, other: &Self) -> Option<Ordering> {
        let (one, other) = (self.number.as_ref()?, other.number.as_ref()?);
        Some((one.len(), one).cmp(&(other.len(), other)))
    }

    /// By number, and where that does not decide by date.
    fn compare(&self, other: &Self) -> Ordering {
        let numbers = self.numbers(other).unwrap_or(Ordering::Equal);
        numbers.then(self.from.cmp(&other.from))
    }

    /// Whether a list of this version must not take the place of one of that version.
    fn goes_back(&self, accepted: &Self) -> bool {
        self.numbers(accepted) == Some(Ordering::Less) || self.from < accepted.from
    }

    fn shown(&self) -> String {
        let date = Timestamp::from_micros(self.from.saturating_mul(1_000_000));
        match &self.number {
            Some(number) => format!("number 0x{} of {date}", hex::encode(number)),
            None => format!("without a number, of {date}"),
        }
    }
}

/// The newest verified list of each configured authority that a listener has accepted, kept across restarts. An older one is
/// refused: it would accept certificates that were revoked since.
#[derive(Debug, Default)]
pub(super) struct Newest {
    versions: BTreeMap<AuthorityId, Version>,
    /// Absent for a check of the configuration, which remembers nothing.
    fact: Option<Fact>,
}

/// SHA-256 of an authority's name and key.
type AuthorityId = [u8; 32];

/// Where the newest versions are stored.
#[derive(Debug)]
struct Fact {
    state: StateDirectory,
    name: String,
}

/// One entry of the state file.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    /// SHA-256 of the authority's name and key, in hex.
    authority: String,
    /// `crlNumber` in hex, if the list has one.
    number: Option<String>,
    /// `thisUpdate`, in seconds since 1970.
    this_update: i64,
}

/// Why the newest versions could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The file was not read or written.
    #[error(transparent)]
    File(state::Error),
    /// It is not what the broker writes.
    #[error("the state file {path} does not list versions of revocation lists")]
    Content {
        /// The file.
        path: String,
        /// Where the parser stopped.
        source: serde_json::Error,
    },
    /// An entry is not hexadecimal.
    #[error("the state file {path} holds an entry that is not hexadecimal")]
    Hex {
        /// The file.
        path: String,
        /// What it holds instead.
        source: hex::FromHexError,
    },
}

/// What is wrong with a file of revocation lists, after its name.
#[derive(Debug, thiserror::Error)]
pub enum ListsError {
    /// Older than a list that was accepted before.
    #[error(
        "holds an older list of \"{authority}\" than one accepted before ({found}; accepted: {accepted}): it would accept \
         certificates that were revoked since. Fetch the newest list{how_to_go_back}"
    )]
    GoesBack {
        /// Name of the authority.
        authority: String,
        /// Number and date of the list.
        found: String,
        /// Number and date of the accepted one.
        accepted: String,
        /// What to do if the older list is meant, or nothing.
        how_to_go_back: String,
    },
    /// A certificate of an authority does not parse.
    #[error("cannot be compared with the CA")]
    Authority(#[source] nom::Err<X509Error>),
    /// A list does not parse.
    #[error("holds a list that does not parse")]
    Malformed(#[source] nom::Err<X509Error>),
    /// The file is not what it should be.
    #[error("is unusable")]
    Pem(#[source] pem::Error),
    /// One list in DER, and more after it.
    #[error("has more bytes after a list in DER; put several lists into one file as PEM")]
    Trailing,
    /// It begins like DER, and is no list.
    #[error("is neither PEM nor a list in DER")]
    Der(#[source] nom::Err<X509Error>),
    /// No list at all.
    #[error("holds no revocation list")]
    Empty,
    /// An authority without a list.
    #[error(
        "holds no list of \"{0}\" that this CA signed: every client of that authority would be refused"
    )]
    Missing(String),
    /// Several lists of an authority whose certificate is not configured.
    #[error(
        "holds more than one list of \"{0}\", which is not in `client_ca_file`, so which of them it signed cannot be verified here: \
         keep its newest list only"
    )]
    Ambiguous(String),
    /// The signature is not that of the authority.
    #[error(
        "holds a list of \"{issuer}\" ({version}) that is not signed by it: it was changed, or made by another authority of that name"
    )]
    Signature {
        /// Name of the authority.
        issuer: String,
        /// Number and date of the list.
        version: String,
    },
    /// The signature cannot be verified.
    #[error(
        "holds a list of \"{issuer}\" ({version}) whose signature algorithm {algorithm} is not supported for the key of that \
         authority: let it sign with RSA (PKCS #1 or PSS), ECDSA (P-256, P-384, P-521) or Ed25519"
    )]
    Algorithm {
        /// Name of the authority.
        issuer: String,
        /// Number and date of the list.
        version: String,
        /// Object identifier of the algorithm.
        algorithm: String,
    },
    /// The library of the handshake does not take the list.
    #[error("holds a list of \"{issuer}\" that cannot be used")]
    Unusable {
        /// Name of the authority.
        issuer: String,
        /// What the library says.
        source: VerifierBuilderError,
    },
    /// A list without an end.
    #[error("holds a list of \"{0}\" without `nextUpdate`: it would never expire")]
    NoEnd(String),
    /// A list that has ended.
    #[error(
        "holds a list of \"{issuer}\" that ended on {until}: fetch the newest one from that authority"
    )]
    Ended {
        /// Name of the authority.
        issuer: String,
        /// When it ended.
        until: Timestamp,
    },
    /// A list that is not valid yet.
    #[error(
        "holds a list of \"{issuer}\" that is not valid before {from}; look at the clock of this machine"
    )]
    NotYetValid {
        /// Name of the authority.
        issuer: String,
        /// When it begins.
        from: Timestamp,
    },
}

impl Newest {
    /// What the state directory remembers of the lists in `file`.
    pub(super) fn read(state: StateDirectory, file: &Path) -> Result<Self, MemoryError> {
        let digest = digest::digest(&digest::SHA256, file.as_os_str().as_bytes());
        let name = format!("client-crl-{}.json", hex::encode(&digest.as_ref()[..8]));
        let path = state.path().join(&name).display().to_string();
        let bytes = state.read(&name).map_err(MemoryError::File)?;
        let stored: Vec<Stored> = match bytes {
            None => Vec::new(),
            Some(bytes) => {
                serde_json::from_slice(&bytes).map_err(|source| MemoryError::Content {
                    path: path.clone(),
                    source,
                })?
            }
        };
        let mut versions = BTreeMap::new();
        for entry in stored {
            let not_hex = |source| MemoryError::Hex {
                path: path.clone(),
                source,
            };
            let mut id = AuthorityId::default();
            hex::decode_to_slice(&entry.authority, &mut id).map_err(not_hex)?;
            let number = entry.number.map(hex::decode).transpose().map_err(not_hex)?;
            let version = Version {
                number,
                from: entry.this_update,
            };
            versions.insert(id, version);
        }
        let fact = Some(Fact { state, name });
        Ok(Self { versions, fact })
    }

    /// Why a list must not be used: its authority has signed a newer one, which was accepted before.
    fn refusal(&self, authority: &Authority, version: &Version) -> Option<ListsError> {
        // Earlier releases also remembered unverified lists.
        authority.1?;
        let before = self.versions.get(&id_of(authority))?;
        version.goes_back(before).then(|| ListsError::GoesBack {
            authority: name_of(&authority.0),
            found: version.shown(),
            accepted: before.shown(),
            how_to_go_back: self.how_to_go_back(),
        })
    }

    fn how_to_go_back(&self) -> String {
        self.fact.as_ref().map_or_else(String::new, |fact| {
            format!(
                "; to accept the older list, stop the broker and remove {}",
                fact.state.path().join(&fact.name).display()
            )
        })
    }

    /// Takes note of lists that were accepted. What an unverified list says about its age is not remembered, and what an earlier
    /// release remembered of it is forgotten.
    pub(super) fn accept(&mut self, accepted: &Lists) {
        let mut current = BTreeSet::new();
        for (authority, lists) in &accepted.groups {
            if authority.1.is_none() {
                self.versions.remove(&id_of(authority));
            } else if let Some(newest) = lists.first() {
                let id = id_of(authority);
                current.insert(id);
                self.versions.insert(id, newest.version.clone());
            }
        }
        // Authorities that are configured no longer must not fill the state file over the years.
        while self.versions.len() > AUTHORITIES_MAX {
            let former = self
                .versions
                .iter()
                .filter(|(id, _)| !current.contains(*id));
            let Some(oldest) = former.min_by_key(|(_, version)| version.from) else {
                return;
            };
            let oldest = *oldest.0;
            self.versions.remove(&oldest);
        }
    }

    /// Stores the newest versions, so that they survive a restart.
    pub(super) fn store(&self) -> Result<(), MemoryError> {
        let Some(fact) = &self.fact else {
            return Ok(());
        };
        let stored: Vec<Stored> = self
            .versions
            .iter()
            .map(|(id, version)| Stored {
                authority: hex::encode(id),
                number: version.number.as_ref().map(hex::encode),
                this_update: version.from,
            })
            .collect();
        let bytes = serde_json::to_vec(&stored).map_err(|source| MemoryError::Content {
            path: fact.name.clone(),
            source,
        })?;
        // The broker looks at its files each second; a fact that has not changed is not written again.
        if let Ok(Some(before)) = fact.state.read(&fact.name)
            && before == bytes
        {
            return Ok(());
        }
        fact.state
            .write(&fact.name, &bytes)
            .map_err(MemoryError::File)
    }
}

fn id_of((name, key): &Authority) -> AuthorityId {
    let mut context = digest::Context::new(&digest::SHA256);
    context.update(&u64::try_from(name.len()).unwrap_or(0).to_be_bytes());
    context.update(name);
    context.update(key.as_ref().map_or(&[][..], |key| key));
    super::to_array(context.finish().as_ref())
}

fn name_of(raw: &[u8]) -> String {
    match x509_parser::x509::X509Name::from_der(raw) {
        Ok((_, name)) => name.to_string(),
        Err(_) => hex::encode(raw),
    }
}

impl Lists {
    /// From PEM or DER, for the certificates of those authorities. Lists that cannot be used are left out.
    pub(super) fn read(
        bytes: &[u8],
        authorities: &[CertificateDer<'_>],
    ) -> Result<Self, ListsError> {
        let now = Timestamp::now().micros() / 1_000_000;
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(authorities.iter().map(|one| one.clone().into_owned()));
        let roots = Arc::new(roots);
        let authorities = authorities
            .iter()
            .map(|authority| X509Certificate::from_der(authority).map(|(_, read)| read))
            .collect::<Result<Vec<_>, _>>()
            .map_err(ListsError::Authority)?;
        let configured = authorities
            .iter()
            .map(|one| (authority_of(one), one.subject().to_string()));
        let mut lists = Self {
            configured: configured.collect(),
            groups: BTreeMap::new(),
            problems: Vec::new(),
        };
        let mut ambiguous = BTreeSet::new();
        for der in ders(bytes)? {
            match List::read(&der, &authorities, &roots, now) {
                Err(problem) => lists.problems.push(problem),
                Ok((authority, list)) => {
                    let is_verified = authority.1.is_some();
                    let group = lists.groups.entry(authority.clone()).or_default();
                    if !is_verified && group.iter().any(|other| other.der != list.der) {
                        ambiguous.insert(authority);
                    } else {
                        group.push(list);
                    }
                }
            }
        }
        // The verifier uses only the first list of a name, and which of these the authority signed is not known here: a forged
        // one would cause every client of that authority to be refused.
        for authority in ambiguous {
            let error = ListsError::Ambiguous(name_of(&authority.0));
            lists.leave_out(&authority, error);
        }
        for group in lists.groups.values_mut() {
            group.sort_by(|one, other| other.version.compare(&one.version));
        }
        Ok(lists)
    }

    fn leave_out(&mut self, authority: &Authority, error: ListsError) {
        self.groups.remove(authority);
        self.problems.push(Problem {
            name: Some(authority.0.clone()),
            error,
        });
    }

    /// Leaves out lists that are older than those accepted before, and keeps the lists in use of authorities that have none
    /// in the file. Fails if a configured authority then has no list.
    pub(super) fn follow(
        mut self,
        newest: &Newest,
        in_use: Option<&Self>,
    ) -> Result<Self, ListsError> {
        let refused: Vec<_> = self
            .groups
            .iter()
            .filter_map(|(authority, lists)| {
                let error = newest.refusal(authority, &lists.first()?.version)?;
                Some((authority.clone(), error))
            })
            .collect();
        for (authority, error) in refused {
            self.leave_out(&authority, error);
        }
        for (authority, shown) in self.configured.clone() {
            if self.groups.contains_key(&authority) {
                continue;
            }
            let is_reported = self.has_problem_of(&authority.0);
            let Some(kept) = in_use.and_then(|lists| lists.groups.get(&authority)) else {
                return Err(self.reason_without(&authority.0, shown));
            };
            self.groups.insert(authority.clone(), kept.clone());
            if !is_reported {
                let error = ListsError::Missing(shown);
                let name = Some(authority.0);
                self.problems.push(Problem { name, error });
            }
        }
        if let Some(in_use) = in_use {
            self.keep_unverified(in_use);
        }
        if self.groups.is_empty() {
            return Err(ListsError::Empty);
        }
        Ok(self)
    }

    /// Keeps the lists in use of authorities that are not configured and whose new list is left out. A list that the file no longer has
    /// is not kept.
    fn keep_unverified(&mut self, in_use: &Self) {
        for (authority, kept) in &in_use.groups {
            let (name, key) = authority;
            let is_configured = self.configured.keys().any(|(other, _)| other == name);
            if key.is_none()
                && !is_configured
                && !self.groups.contains_key(authority)
                && self.has_problem_of(name)
            {
                self.groups.insert(authority.clone(), kept.clone());
            }
        }
    }

    fn has_problem_of(&self, name: &[u8]) -> bool {
        let mut names = self.problems.iter().map(|problem| &problem.name);
        names.any(|other| other.as_deref() == Some(name))
    }

    /// Why that authority has no list: the problem of its list, or of a list that does not parse.
    fn reason_without(&mut self, name: &[u8], shown: String) -> ListsError {
        let mut problems = std::mem::take(&mut self.problems);
        let of = |name: Option<&[u8]>| {
            let mut problems = problems.iter();
            problems.position(|problem| problem.name.as_deref() == name)
        };
        match of(Some(name)).or_else(|| of(None)) {
            Some(position) => problems.swap_remove(position).error,
            None => ListsError::Missing(shown),
        }
    }

    /// What the log says about the lists that were left out.
    pub(super) fn left_out(&self) -> Option<String> {
        let shown: Vec<String> = self
            .problems
            .iter()
            .take(PROBLEMS_SHOWN)
            .map(|problem| {
                let text = chain(&problem.error);
                text.chars().take(PROBLEM_CHARS_MAX).collect()
            })
            .collect();
        let more = self.problems.len().saturating_sub(PROBLEMS_SHOWN);
        match (shown.is_empty(), more) {
            (true, _) => None,
            (false, 0) => Some(shown.join("; ")),
            (false, more) => Some(format!("{}; and {more} more", shown.join("; "))),
        }
    }

    /// The first reason why a list was left out.
    pub(super) fn take_problem(&mut self) -> Option<ListsError> {
        let mut problems = std::mem::take(&mut self.problems).into_iter();
        problems.next().map(|problem| problem.error)
    }

    pub(super) fn count(&self) -> usize {
        self.groups.values().map(Vec::len).sum()
    }

    /// When the first list ends.
    pub(super) fn life(&self) -> Option<Life> {
        let lives = self.groups.values().flatten().map(|list| list.life);
        lives.min_by_key(|life| life.until)
    }

    /// SHA-256 of who is revoked; a list that is only made anew changes nothing.
    pub(super) fn revoked(&self) -> [u8; 32] {
        let each: BTreeSet<_> = self
            .groups
            .values()
            .flatten()
            .map(|it| it.revoked)
            .collect();
        let mut context = digest::Context::new(&digest::SHA256);
        for revoked in each {
            context.update(&revoked);
        }
        super::to_array(context.finish().as_ref())
    }

    /// The lists for each verifier. A verifier uses only the first list of a name, so authorities with one name and different keys, as
    /// while a key is replaced, need a verifier each.
    pub(super) fn by_verifier(&self) -> Vec<Vec<CertificateRevocationListDer<'static>>> {
        let mut names: BTreeMap<&[u8], Vec<&Vec<List>>> = BTreeMap::new();
        for ((name, _), lists) in &self.groups {
            names.entry(name).or_default().push(lists);
        }
        let verifiers = names.values().map(Vec::len).max().unwrap_or(0);
        (0..verifiers)
            .map(|number| {
                let chosen = names
                    .values()
                    .filter_map(|namesakes| namesakes.get(number % namesakes.len()));
                let lists = chosen.flat_map(|lists| lists.iter());
                lists.map(|list| list.der.clone()).collect()
            })
            .collect()
    }
}

impl List {
    fn read(
        der: &CertificateRevocationListDer<'static>,
        authorities: &[X509Certificate<'_>],
        roots: &Arc<RootCertStore>,
        now: i64,
    ) -> Result<(Authority, Self), Problem> {
        let (_, list) = CertificateRevocationList::from_der(der).map_err(|error| Problem {
            name: None,
            error: ListsError::Malformed(error),
        })?;
        let of_issuer = |error| Problem {
            name: Some(list.issuer().as_raw().to_vec()),
            error,
        };
        let life = life(&list, now).map_err(of_issuer)?;
        let authority = signer(&list, der, authorities).map_err(of_issuer)?;
        check_for_handshake(&list, der, roots).map_err(of_issuer)?;
        let version = Version::of(&list);
        let revoked = revoked(&authority, &list);
        let list = Self {
            version,
            life,
            revoked,
            der: der.clone(),
        };
        Ok((authority, list))
    }
}

/// Refuses a list that the library of the handshake does not take, such as one with an unknown critical extension: with it among others, no
/// verifier could be made.
fn check_for_handshake(
    list: &CertificateRevocationList<'_>,
    der: &CertificateRevocationListDer<'static>,
    roots: &Arc<RootCertStore>,
) -> Result<(), ListsError> {
    let provider = Arc::new(default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::clone(roots), provider)
        .with_crls([der.clone()]);
    match verifier.build() {
        Err(source @ VerifierBuilderError::InvalidCrl(_)) => Err(ListsError::Unusable {
            issuer: list.issuer().to_string(),
            source,
        }),
        _ => Ok(()),
    }
}

fn authority_of(certificate: &X509Certificate<'_>) -> Authority {
    let key = digest::digest(&digest::SHA256, certificate.public_key().raw);
    let name = certificate.subject().as_raw().to_vec();
    (name, Some(super::to_array(key.as_ref())))
}

/// First byte of a list in DER.
const SEQUENCE: u8 = 0x30;

/// The lists of a PEM file, or the one that the file is in DER.
fn ders(bytes: &[u8]) -> Result<Vec<CertificateRevocationListDer<'static>>, ListsError> {
    if bytes.first() == Some(&SEQUENCE) {
        return match CertificateRevocationList::from_der(bytes) {
            Ok(([], _)) => Ok(vec![bytes.to_vec().into()]),
            Ok(_) => Err(ListsError::Trailing),
            Err(error) => Err(ListsError::Der(error)),
        };
    }
    pem::revocation_lists(bytes).map_err(ListsError::Pem)
}

/// Who signed a list. A list of an authority that is not configured, such as one below those that are, is verified in the
/// handshake, with the certificate that the client sends.
fn signer(
    list: &CertificateRevocationList<'_>,
    der: &[u8],
    authorities: &[X509Certificate<'_>],
) -> Result<Authority, ListsError> {
    let issuer = list.issuer();
    let (mut is_named, mut is_supported) = (false, false);
    // Two authorities may have one name, as while a key is replaced.
    for authority in authorities {
        if authority.subject().as_raw() != issuer.as_raw() {
            continue;
        }
        is_named = true;
        match verifies(list, der, authority) {
            Signature::Good => return Ok(authority_of(authority)),
            Signature::Bad => is_supported = true,
            Signature::Unsupported => {}
        }
    }
    if !is_named {
        return Ok((issuer.as_raw().to_vec(), None));
    }
    let version = Version::of(list).shown();
    let issuer = issuer.to_string();
    Err(if is_supported {
        ListsError::Signature { issuer, version }
    } else {
        ListsError::Algorithm {
            issuer,
            version,
            algorithm: list.signature_algorithm.algorithm.to_string(),
        }
    })
}

/// What a signature of a list is worth.
enum Signature {
    Good,
    Bad,
    Unsupported,
}

fn verifies(
    list: &CertificateRevocationList<'_>,
    der: &[u8],
    authority: &X509Certificate<'_>,
) -> Signature {
    let key = authority.public_key();
    let tbs = list.tbs_cert_list.as_ref();
    // CertificateList ::= SEQUENCE { tbsCertList, signatureAlgorithm, signatureValue }; SubjectPublicKeyInfo begins with an
    // AlgorithmIdentifier, too. The parser keeps neither as it stands in the list.
    let signed = element(der).and_then(|(list, _)| element(list.get(tbs.len()..)?));
    let keyed = element(key.raw).and_then(|(info, _)| element(info));
    let (Some((signed, _)), Some((keyed, _))) = (signed, keyed) else {
        return Signature::Unsupported;
    };
    let supported = default_provider().signature_verification_algorithms.all;
    let fitting = supported.iter().filter(|algorithm| {
        *algorithm.signature_alg_id() == *signed && *algorithm.public_key_alg_id() == *keyed
    });
    let mut outcome = Signature::Unsupported;
    for algorithm in fitting {
        let (public, signature) = (&key.subject_public_key.data, &list.signature_value.data);
        outcome = Signature::Bad;
        if algorithm.verify_signature(public, tbs, signature).is_ok() {
            return Signature::Good;
        }
    }
    outcome
}

/// Content of the first DER element, and what follows it (X.690 section 8.1).
fn element(der: &[u8]) -> Option<(&[u8], &[u8])> {
    const LONG: u8 = 0x80;
    let (length, rest) = (*der.get(1)?, der.get(2..)?);
    if length < LONG {
        return rest.split_at_checked(length.into());
    }
    let (length, rest) = rest.split_at_checked((length - LONG).into())?;
    let length = length.iter().try_fold(0_usize, |length, byte| {
        Some(length.checked_mul(256)? + usize::from(*byte))
    })?;
    rest.split_at_checked(length)
}

fn life(list: &CertificateRevocationList<'_>, now: i64) -> Result<Life, ListsError> {
    let issuer = list.issuer().to_string();
    let date = |seconds: i64| Timestamp::from_micros(seconds.saturating_mul(1_000_000));
    let Some(next) = list.next_update() else {
        return Err(ListsError::NoEnd(issuer));
    };
    let (from, until) = (list.last_update().timestamp(), next.timestamp());
    if now > until {
        return Err(ListsError::Ended {
            issuer,
            until: date(until),
        });
    }
    if now < from {
        return Err(ListsError::NotYetValid {
            issuer,
            from: date(from),
        });
    }
    Ok(Life { from, until })
}

fn revoked(authority: &Authority, list: &CertificateRevocationList<'_>) -> [u8; 32] {
    let entries = list.iter_revoked_certificates();
    let serials: BTreeSet<&[u8]> = entries.map(RevokedCertificate::raw_serial).collect();
    let mut context = digest::Context::new(&digest::SHA256);
    context.update(&id_of(authority));
    for serial in serials {
        context.update(&u64::try_from(serial.len()).unwrap_or(0).to_be_bytes());
        context.update(serial);
    }
    super::to_array(context.finish().as_ref())
}
