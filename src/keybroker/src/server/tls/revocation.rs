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
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use aws_lc_rs::digest;
use rustls::RootCertStore;
use rustls_pki_types::{CertificateDer, CertificateRevocationListDer};
use x509_parser::prelude::{CertificateRevocationList, FromDer as _, X509Certificate};

use keybroker_core::{call::Timestamp, error::chain, pem};

mod error;
mod list;
mod memory;

pub(super) use error::{ListsError, MemoryError};
pub(super) use list::{Age, Life};
pub(super) use memory::Newest;

use list::{Authority, List, authority_of, name_of};

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

/// Why a list was left out.
#[derive(Debug)]
struct Problem {
    /// Name of the authority; absent when the list does not parse.
    name: Option<Vec<u8>>,
    error: ListsError,
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
