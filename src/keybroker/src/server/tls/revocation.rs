//! Revocation lists: the lists of client certificates that the CAs have revoked (RFC 5280 section
//! 5).
//!
//! The lists of each CA are evaluated separately:
//!
//! - A list is rejected and reported if the list is malformed, is not signed by its CA, is not
//!   currently valid, or is older than the CA's accepted list. Accepted lists are stored across
//!   restarts.
//!
//! - If the list of a CA is rejected or missing, the accepted list of this CA remains in use until
//!   it expires. New lists of other CAs still take effect. Accepted lists also remain in use if the
//!   file is partly or completely unreadable.
//!
//! - The broker does not start if a configured CA has neither a valid list in the file nor an
//!   accepted list.
//!
//! - A client certificate is rejected if no list covers it.
//!
//! - A list is valid until its `nextUpdate`, and an alert is raised earlier. After the expiry, new
//!   connections of the CA's clients are rejected until the file contains a newer list.
//!
//! If a CA (such as an intermediate CA) is not configured, its list can be verified only in the
//! handshake. An attacker on the network path to the distribution point can replace an unverified
//! list, so unverified lists are not stored across restarts.
//!
//! Signatures are verified with the algorithms of the TLS handshake, so that the handshake accepts every list that this module
//! accepts.
//!
//! Mitigation: M1 of `THREAT_MODEL.md`.

use std::{
    cmp::{Ordering, Reverse},
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use aws_lc_rs::digest;
use rustls::RootCertStore;
use rustls_pki_types::{CertificateDer, CertificateRevocationListDer};
use x509_parser::prelude::{CertificateRevocationList, FromDer as _, X509Certificate};

use keybroker_core::{error::chain, pem};

mod error;
mod list;
mod memory;

pub(super) use error::{ListsError, MemoryError};
pub(super) use list::{Age, Life};
pub(super) use memory::Memory;

use list::{Authority, List, Slot, Version, authority_of, name_of};

/// Maximum length of a file of revocation lists, in bytes.
pub(super) const LISTS_BYTES_MAX: u64 = 64 * 1024 * 1024;
/// Limits on the number and the total size of unverified lists that remain in use although the file
/// no longer contains them.
const UNVERIFIED_KEPT_MAX: usize = 128;
const UNVERIFIED_BYTES_MAX: usize = 16 * 1024 * 1024;
/// Maximum number of rejected lists in a log line, because a file may contain many lists.
const PROBLEMS_SHOWN: usize = 5;
/// Maximum length of the description of a problem in the log, in characters, because the name of a
/// CA may be very long.
const PROBLEM_CHARS_MAX: usize = 600;

/// A set of revocation lists: the lists in use, or the lists of a file.
#[derive(Debug)]
pub(super) struct Lists {
    /// The newest list of each CA. If a CA issues separate lists for several scopes, this field
    /// contains the newest list of each scope.
    groups: BTreeMap<Slot, Arc<List>>,
    /// The configured CAs, with their names for messages.
    configured: BTreeMap<Authority, String>,
    /// The problems of lists that were rejected or are missing.
    problems: Vec<Problem>,
}

/// The problem of a list that was rejected or is missing.
#[derive(Debug)]
struct Problem {
    /// Name of the CA; `None` if the list cannot be parsed.
    name: Option<Vec<u8>>,
    error: ListsError,
}

impl Lists {
    /// Reads the lists of a file and verifies the lists of the given CAs. Ignores lists that cannot
    /// be used.
    pub(super) fn read(
        file: &ListsFile,
        authorities: &[CertificateDer<'_>],
        now: i64,
    ) -> Result<Self, ListsError> {
        let roots = roots(authorities);
        let authorities = parsed(authorities)?;
        let configured = authorities
            .iter()
            .map(|one| (authority_of(one), one.subject().to_string()));
        let mut lists = Self {
            configured: configured.collect(),
            groups: BTreeMap::new(),
            problems: Vec::new(),
        };
        let mut ambiguous = BTreeSet::new();
        for der in ders(file) {
            let read = der
                .map_err(|error| Problem { name: None, error })
                .and_then(|(block, der)| List::read(&der, block, &authorities, &roots, now));
            match read {
                Err(problem) => lists.problems.push(problem),
                Ok((slot, list)) => {
                    if !lists.add(&slot, list) {
                        ambiguous.insert(slot);
                    }
                }
            }
        }
        // The verifier uses only the first list for a CA name. If the first of several unverified
        // lists is forged, every client of this CA is rejected.
        for slot in ambiguous {
            let error = ListsError::Ambiguous(name_of(&slot.authority.0));
            lists.leave_out(&slot, error);
        }
        Ok(lists)
    }

    /// Adds a list of the file, and keeps the newer of two lists. Returns false for a second,
    /// different unverified list, because either list may be forged.
    fn add(&mut self, slot: &Slot, list: List) -> bool {
        match self.groups.get(slot) {
            Some(other) if slot.authority.1.is_none() => return other.der == list.der,
            Some(other) if list.version.compare(&other.version) != Ordering::Greater => {}
            _ => {
                self.groups.insert(slot.clone(), Arc::new(list));
            }
        }
        true
    }

    fn leave_out(&mut self, slot: &Slot, error: ListsError) {
        self.groups.remove(slot);
        self.report(slot.authority.0.clone(), error);
    }

    fn report(&mut self, name: Vec<u8>, error: ListsError) {
        let name = Some(name);
        self.problems.push(Problem { name, error });
    }

    /// Rejects lists that are older than the accepted lists, and keeps the accepted lists of CAs
    /// without a list in the file. Fails if a configured CA has no usable list.
    pub(super) fn follow(
        mut self,
        memory: &Memory,
        in_use: Option<&Self>,
        now: i64,
    ) -> Result<Self, ListsError> {
        self.leave_out_older(memory);
        for (authority, shown) in self.configured.clone() {
            self.keep_accepted(&authority, memory, now);
            if !self.has_list(&authority) {
                self.keep_ended(&authority, shown, in_use)?;
            }
        }
        if let Some(in_use) = in_use {
            self.keep_unverified(in_use, now);
        }
        if self.groups.is_empty() {
            return Err(ListsError::Empty);
        }
        Ok(self)
    }

    fn leave_out_older(&mut self, memory: &Memory) {
        let mut newest: BTreeMap<&Authority, &Version> = BTreeMap::new();
        for (slot, list) in &self.groups {
            let version = newest.entry(&slot.authority).or_insert(&list.version);
            if list.version.compare(version) == Ordering::Greater {
                *version = &list.version;
            }
        }
        let refused: Vec<_> = self
            .groups
            .iter()
            .filter_map(|(slot, list)| {
                let of_all = memory.refusal_of_all(&slot.authority, newest.get(&slot.authority)?);
                let error = of_all.or_else(|| memory.refusal(slot, &list.version))?;
                Some((slot.clone(), error))
            })
            .collect();
        for (slot, error) in refused {
            self.leave_out(&slot, error);
        }
    }

    /// Keeps the accepted lists of a configured CA until they expire, because a missing list may be
    /// an attempt to hide a revocation. To stop accepting clients of a CA, operators must remove
    /// the CA certificate from the configuration.
    fn keep_accepted(&mut self, authority: &Authority, memory: &Memory, now: i64) {
        let is_reported = self.has_problem_of(&authority.0);
        for (slot, accepted) in memory.of(authority) {
            if !self.groups.contains_key(slot) && accepted.is_valid(now) {
                self.keep(slot, &accepted.list, is_reported);
            }
        }
    }

    /// Keeps the expired lists of a CA without another list, so that the broker rejects the CA's
    /// clients for the correct reason. At the start of the broker, no lists are in use.
    fn keep_ended(
        &mut self,
        authority: &Authority,
        shown: String,
        in_use: Option<&Self>,
    ) -> Result<(), ListsError> {
        let groups = in_use.map(|lists| lists.groups.iter());
        let of_authority = |(slot, _): &(&Slot, _)| slot.authority == *authority;
        let kept: Vec<_> = groups.into_iter().flatten().filter(of_authority).collect();
        if kept.is_empty() {
            return Err(self.reason_without(&authority.0, shown));
        }
        if !self.has_problem_of(&authority.0) {
            self.report(authority.0.clone(), ListsError::Missing(shown));
        }
        for (slot, list) in kept {
            self.groups.insert(slot.clone(), Arc::clone(list));
        }
        Ok(())
    }

    /// If a CA is not configured and has no list in the file, keeps the list that is in use for
    /// this CA until the list expires. The number and size of the kept lists are limited, because a
    /// file that contains lists of different CAs at each reload could otherwise fill the memory.
    fn keep_unverified(&mut self, in_use: &Self, now: i64) {
        let (mut count, mut bytes) = (0, 0);
        // A set of the names of the CAs with a problem. A vector would be slow, because the names
        // are searched for each of many lists.
        let mut reported: BTreeSet<Vec<u8>> = self
            .problems
            .iter()
            .filter_map(|problem| problem.name.clone())
            .collect();
        for (slot, kept) in &in_use.groups {
            let (name, key) = &slot.authority;
            let is_configured = self.configured.keys().any(|(other, _)| other == name);
            if key.is_none()
                && !is_configured
                && !self.groups.contains_key(slot)
                && kept.life.includes(now)
            {
                let is_reported = !reported.insert(name.clone());
                count += 1;
                bytes += kept.der.len();
                if count <= UNVERIFIED_KEPT_MAX && bytes <= UNVERIFIED_BYTES_MAX {
                    self.keep(slot, kept, is_reported);
                } else if !is_reported {
                    self.report(name.clone(), ListsError::Missing(name_of(name)));
                }
            }
        }
    }

    fn keep(&mut self, slot: &Slot, list: &Arc<List>, is_reported: bool) {
        self.groups.insert(slot.clone(), Arc::clone(list));
        if !is_reported {
            let name = &slot.authority.0;
            let error = ListsError::Gone {
                authority: name_of(name),
                version: list.version.shown(),
                until: list.life.ends(),
            };
            self.report(name.clone(), error);
        }
    }

    fn has_list(&self, authority: &Authority) -> bool {
        self.groups.keys().any(|slot| slot.authority == *authority)
    }

    fn has_problem_of(&self, name: &[u8]) -> bool {
        let mut names = self.problems.iter().map(|problem| &problem.name);
        names.any(|other| other.as_deref() == Some(name))
    }

    /// The reason why a CA has no list: the problem of its list, or the problem of a list that
    /// cannot be parsed.
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

    /// The log text about rejected and missing lists. The text begins with the lists of configured
    /// CAs, because the number of problems in the text is limited.
    pub(super) fn left_out(&self) -> Option<String> {
        let configured: BTreeSet<&[u8]> = self
            .configured
            .keys()
            .map(|(name, _)| name.as_slice())
            .collect();
        let is_foreign = |problem: &&Problem| {
            let name = problem.name.as_deref();
            name.is_none_or(|name| !configured.contains(name))
        };
        let mut problems: Vec<&Problem> = self.problems.iter().collect();
        problems.sort_by_key(is_foreign);
        let shown: Vec<String> = problems
            .into_iter()
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

    /// Removes all problems and returns the first problem.
    pub(super) fn take_problem(&mut self) -> Option<ListsError> {
        let mut problems = std::mem::take(&mut self.problems).into_iter();
        problems.next().map(|problem| problem.error)
    }

    /// The number of lists that were rejected or are missing.
    pub(super) fn problem_count(&self) -> usize {
        self.problems.len()
    }

    /// The number of lists.
    pub(super) fn count(&self) -> usize {
        self.groups.len()
    }

    /// The validity period of the list that expires first.
    pub(super) fn life(&self) -> Option<Life> {
        let lives = self.groups.values().map(|list| list.life);
        lives.min_by_key(|life| life.until)
    }

    /// SHA-256 of the revoked serial numbers. A renewed list with the same entries has the same digest.
    pub(super) fn revoked(&self) -> [u8; 32] {
        let each: BTreeSet<_> = self.groups.values().map(|list| list.revoked).collect();
        let mut context = digest::Context::new(&digest::SHA256);
        for revoked in each {
            context.update(&revoked);
        }
        super::to_array(context.finish().as_ref())
    }

    /// The lists for each verifier. A verifier uses only the first list for an issuer name, so CAs
    /// with the same name and different keys need separate verifiers.
    pub(super) fn by_verifier(&self) -> Vec<Vec<CertificateRevocationListDer<'static>>> {
        let mut names: BTreeMap<&[u8], BTreeMap<&Authority, Vec<&List>>> = BTreeMap::new();
        for (slot, list) in &self.groups {
            let namesakes = names.entry(&slot.authority.0).or_default();
            namesakes.entry(&slot.authority).or_default().push(list);
        }
        let names: Vec<Vec<Vec<&List>>> = names
            .into_values()
            .map(|namesakes| namesakes.into_values().map(newest_first).collect())
            .collect();
        let verifiers = names.iter().map(Vec::len).max().unwrap_or(0);
        (0..verifiers)
            .map(|number| {
                let chosen = names
                    .iter()
                    .filter_map(|namesakes| namesakes.get(number % namesakes.len()));
                let lists = chosen.flat_map(|lists| lists.iter());
                lists.map(|list| list.der.clone()).collect()
            })
            .collect()
    }
}

fn newest_first(mut lists: Vec<&List>) -> Vec<&List> {
    lists.sort_by_key(|list| Reverse(list.version.from));
    lists
}

fn roots(authorities: &[CertificateDer<'_>]) -> Arc<RootCertStore> {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(authorities.iter().map(|one| one.clone().into_owned()));
    Arc::new(roots)
}

fn parsed<'a>(
    authorities: &'a [CertificateDer<'_>],
) -> Result<Vec<X509Certificate<'a>>, ListsError> {
    authorities
        .iter()
        .map(|authority| X509Certificate::from_der(authority).map(|(_, read)| read))
        .collect::<Result<_, _>>()
        .map_err(ListsError::Authority)
}

/// The content of a file of revocation lists.
#[derive(Clone, Debug)]
pub(super) enum ListsFile {
    /// The content of the file.
    Content(Vec<u8>),
    /// The file is longer than [`LISTS_BYTES_MAX`].
    TooLong,
}

/// A list, and the number of its block in the file.
type FoundList = (usize, CertificateRevocationListDer<'static>);

/// The lists of a PEM file, or the only list of a DER file. For each block of the file that is not
/// a list, the result contains an error.
fn ders(file: &ListsFile) -> Vec<Result<FoundList, ListsError>> {
    let bytes = match file {
        ListsFile::Content(bytes) => bytes,
        ListsFile::TooLong => return vec![Err(ListsError::TooLong(LISTS_BYTES_MAX))],
    };
    if pem::is_der(bytes) {
        return vec![match CertificateRevocationList::from_der(bytes) {
            Ok(([], _)) => Ok((1, bytes.clone().into())),
            Ok(_) => Err(ListsError::Trailing),
            Err(error) => Err(ListsError::Der(error)),
        }];
    }
    let mut block = 0;
    pem::revocation_lists(bytes)
        .into_iter()
        .map(|read| match read {
            Ok(list) => {
                block += 1;
                Ok((block, list))
            }
            Err(damaged) => {
                if let pem::Place::Block(number) = damaged.place {
                    block = number;
                }
                Err(ListsError::Block(damaged))
            }
        })
        .collect()
}
