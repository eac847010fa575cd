//! Which client certificates their authorities have taken back (RFC 5280 section 5).
//!
//! Each authority's lists are decided on separately: a list that does not parse, is not signed by its authority, is not valid today or
//! is older than one accepted before (also before a restart) is left out and reported, and so is a list that is missing although one
//! was accepted before. Its authority keeps the accepted list until that ends, and the other authorities get their new lists. The same holds
//! for a file of which a part, or nothing, can be read. A start fails if a configured authority has neither a valid list in the file nor
//! an accepted one. A client of whose certificate nothing is known is refused. A list is valid until its `nextUpdate`. After that, new
//! connections are refused until there is a newer one; before that, an alert is raised.
//!
//! The list of an authority that is not configured, such as an intermediate CA, can be verified only in the handshake. An
//! attacker on the network path to its distribution point can replace it, so nothing of it is remembered across restarts.
//!
//! Signatures are verified with the algorithms of the TLS handshake, so that the handshake accepts every list that is accepted here.
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

/// Longest file of revocation lists, in bytes.
pub(super) const LISTS_BYTES_MAX: u64 = 64 * 1024 * 1024;
/// Unverified lists that are kept although they are no longer in the file, and their length in bytes.
const UNVERIFIED_KEPT_MAX: usize = 128;
const UNVERIFIED_BYTES_MAX: usize = 16 * 1024 * 1024;
/// Lists that the log names when they are left out; a file may have very many.
const PROBLEMS_SHOWN: usize = 5;
/// Length of each of them in the log: the name of an authority may be very long.
const PROBLEM_CHARS_MAX: usize = 600;

/// The lists that are in use, or that a file offers.
#[derive(Debug)]
pub(super) struct Lists {
    /// The newest list of each authority, and of each part of its certificates for which it makes a list of its own.
    groups: BTreeMap<Slot, Arc<List>>,
    /// The authorities that sign lists by the configuration, each with its name as messages show it.
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
    /// The lists of a file, for the certificates of those authorities. Lists that cannot be used are left out.
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
        // The verifier uses only the first list of a name, and which of these the authority signed is not known here: a forged
        // one would cause every client of that authority to be refused.
        for slot in ambiguous {
            let error = ListsError::Ambiguous(name_of(&slot.authority.0));
            lists.leave_out(&slot, error);
        }
        Ok(lists)
    }

    /// Adds a list of the file; of two the newer one stays. False if it is not known which of two unverified lists is genuine.
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

    /// Leaves out lists that are older than those accepted before, and keeps the accepted lists of authorities that have none
    /// in the file. Fails if a configured authority then has no list.
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

    /// Keeps the accepted lists of a configured authority until they end. Such a list can be missing because somebody wants to hide a
    /// revocation. To stop accepting the authority's clients, its certificate is removed from the configuration.
    fn keep_accepted(&mut self, authority: &Authority, memory: &Memory, now: i64) {
        let is_reported = self.has_problem_of(&authority.0);
        for (slot, accepted) in memory.of(authority) {
            if !self.groups.contains_key(slot) && accepted.is_valid(now) {
                self.keep(slot, &accepted.list, is_reported);
            }
        }
    }

    /// The ended lists of an authority stay in use while there is no other, so that its clients are refused for that reason. At a
    /// start, no list is in use.
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

    /// Keeps the lists in use of authorities that are not configured and have none in the file, until they end. A file that has lists of
    /// other unknown authorities at each reload must not fill the memory.
    fn keep_unverified(&mut self, in_use: &Self, now: i64) {
        let (mut count, mut bytes) = (0, 0);
        // Names that have a problem already, looked up for each of what may be many lists.
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

    /// What the log says about the lists that were left out. Those of configured authorities come first, so that others in the file do not
    /// hide them.
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

    /// The first reason why a list was left out.
    pub(super) fn take_problem(&mut self) -> Option<ListsError> {
        let mut problems = std::mem::take(&mut self.problems).into_iter();
        problems.next().map(|problem| problem.error)
    }

    /// How many lists were left out or are missing.
    pub(super) fn problem_count(&self) -> usize {
        self.problems.len()
    }

    /// How many lists are in use.
    pub(super) fn count(&self) -> usize {
        self.groups.len()
    }

    /// When the first list ends.
    pub(super) fn life(&self) -> Option<Life> {
        let lives = self.groups.values().map(|list| list.life);
        lives.min_by_key(|life| life.until)
    }

    /// SHA-256 of who is revoked; a list that is only made anew changes nothing.
    pub(super) fn revoked(&self) -> [u8; 32] {
        let each: BTreeSet<_> = self.groups.values().map(|list| list.revoked).collect();
        let mut context = digest::Context::new(&digest::SHA256);
        for revoked in each {
            context.update(&revoked);
        }
        super::to_array(context.finish().as_ref())
    }

    /// The lists for each verifier. A verifier uses only the first list that covers a certificate of that name, so authorities with one
    /// name and different keys, as while a key is replaced, need a verifier each.
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

/// A file of revocation lists.
#[derive(Clone, Debug)]
pub(super) enum ListsFile {
    /// What it holds.
    Content(Vec<u8>),
    /// It is longer than [`LISTS_BYTES_MAX`].
    TooLong,
}

/// A list, and the block of the file that holds it.
type FoundList = (usize, CertificateRevocationListDer<'static>);

/// The lists of a PEM file, or the one that the file is in DER, and for each part that is none, why.
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
