//! Stores the newest accepted revocation lists across restarts.
//!
//! With a list that is older than the accepted list, the broker would accept certificates that were
//! revoked between the two lists. Therefore, the state directory contains a copy of each accepted
//! list. If the configured file contains an older or damaged list, the broker uses the stored copy
//! at its start. Each configured file and CA has a separate state file, because two listeners may
//! use the same file with different CAs.
//!
//! Each stored list is verified again before its use. Only lists of configured CAs are stored.

use std::{
    collections::{BTreeMap, BTreeSet},
    os::unix::ffi::OsStrExt as _,
    path::Path,
    sync::Arc,
};

use aws_lc_rs::digest;
use rustls_pki_types::CertificateDer;
use serde::Deserialize;

use keybroker_core::state::StateDirectory;

use super::{
    LISTS_BYTES_MAX, Lists,
    error::{ListsError, MemoryError},
    list::{
        Authority, AuthorityId, Life, List, Slot, Version, authority_of, check_for_handshake,
        id_of, name_of,
    },
    parsed, roots,
};

/// Maximum number of stored lists for one file. If there are more lists, expired lists are removed.
const STORED_MAX: usize = 128;
/// Number of digest bytes in the name of a state file.
const NAMED_BYTES: usize = 8;
const SUFFIX: &str = ".der";

/// The newest list of each configured CA that a listener has verified and accepted.
#[derive(Debug, Default)]
pub(in super::super) struct Memory {
    accepted: BTreeMap<Slot, Accepted>,
    /// The CAs whose stored lists have been read.
    loaded: BTreeSet<AuthorityId>,
    /// The versions that an earlier release stored instead of lists. The broker reads the stored versions, but does not
    /// write them any more.
    versions: BTreeMap<AuthorityId, Version>,
    /// The directory and names of the state files; `None` for a check of the configuration, which
    /// stores nothing.
    place: Option<Place>,
}

/// An accepted list.
#[derive(Debug)]
pub(super) struct Accepted {
    pub(super) list: Arc<List>,
    /// Whether the TLS library accepts the list.
    is_usable: bool,
    is_stored: bool,
}

impl Accepted {
    /// Whether the list is valid at a given time and can be used to verify clients.
    pub(super) fn is_valid(&self, now: i64) -> bool {
        self.is_usable && self.list.life.includes(now)
    }
}

/// The state files for the accepted lists of one configured file.
#[derive(Debug)]
struct Place {
    state: StateDirectory,
    /// Prefix of the names of the state files.
    file: String,
}

/// One entry of the state file of an earlier release.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct StoredVersion {
    /// SHA-256 of the CA's name and key, in hexadecimal.
    authority: String,
    /// `crlNumber` in hexadecimal; `None` if the list has no number.
    number: Option<String>,
    /// `thisUpdate`, in seconds since 1970.
    this_update: i64,
}

impl Place {
    fn new(state: StateDirectory, file: &Path) -> Self {
        let digest = digest::digest(&digest::SHA256, file.as_os_str().as_bytes());
        Self {
            state,
            file: format!("client-crl-{}", short(digest.as_ref())),
        }
    }

    /// Prefix of the names of the state files of a CA.
    fn of(&self, authority: &Authority) -> String {
        format!("{}-{}-", self.file, short(&id_of(authority)))
    }

    fn name(&self, slot: &Slot) -> String {
        let scope = slot.scope.map_or("all".to_owned(), |scope| short(&scope));
        format!("{}{scope}{SUFFIX}", self.of(&slot.authority))
    }

    fn shown(&self, name: &str) -> String {
        self.state.path().join(name).display().to_string()
    }

    fn read(&self, name: &str) -> Result<Option<Vec<u8>>, MemoryError> {
        Ok(self.state.read_up_to(name, LISTS_BYTES_MAX)?)
    }

    /// Stores a list, unless another listener with the same file has already stored a newer list.
    fn store(&self, slot: &Slot, list: &List) -> Result<(), MemoryError> {
        let name = self.name(slot);
        if let Some(stored) = self.read(&name)?
            && (stored == *list.der
                || Version::read(&stored).is_some_and(|stored| list.version.goes_back(&stored)))
        {
            return Ok(());
        }
        self.state
            .write_up_to(&name, &list.der, LISTS_BYTES_MAX)
            .map_err(MemoryError::File)
    }

    /// Reads the versions that an earlier release stored.
    fn versions(&self) -> Result<BTreeMap<AuthorityId, Version>, MemoryError> {
        let name = format!("{}.json", self.file);
        let path = self.shown(&name);
        let Some(bytes) = self.state.read(&name)? else {
            return Ok(BTreeMap::new());
        };
        let stored: Vec<StoredVersion> =
            serde_json::from_slice(&bytes).map_err(|source| MemoryError::Content {
                path: path.clone(),
                source,
            })?;
        let not_hex = |source| MemoryError::Hex {
            path: path.clone(),
            source,
        };
        let mut versions = BTreeMap::new();
        for entry in stored {
            let mut id = AuthorityId::default();
            hex::decode_to_slice(&entry.authority, &mut id).map_err(not_hex)?;
            let number = entry.number.map(hex::decode).transpose().map_err(not_hex)?;
            let from = entry.this_update;
            versions.insert(id, Version { number, from });
        }
        Ok(versions)
    }

    /// If there are too many stored lists, removes expired lists. Starts with the list whose file
    /// has not been replaced for the longest time. Keeps the lists in `own`, which this listener
    /// uses. Other listeners may use the same file with other CAs.
    fn limit(&self, own: &BTreeSet<String>, now: i64) -> Result<(), MemoryError> {
        let names = self.state.names(&format!("{}-", self.file), SUFFIX)?;
        let mut too_many = names.len().saturating_sub(STORED_MAX);
        for name in names.iter().filter(|name| !own.contains(*name)) {
            if too_many == 0 {
                break;
            }
            let stored = self.read(name)?;
            let is_valid =
                stored.is_some_and(|der| Life::read(&der).is_some_and(|life| life.includes(now)));
            if !is_valid {
                self.state.remove(name)?;
                too_many -= 1;
            }
        }
        Ok(())
    }
}

impl Memory {
    /// Opens the state files for the lists in `file`.
    pub(in super::super) fn open(state: StateDirectory, file: &Path) -> Result<Self, MemoryError> {
        let place = Place::new(state, file);
        Ok(Self {
            versions: place.versions()?,
            place: Some(place),
            ..Self::default()
        })
    }

    /// Reads the stored lists of newly configured CAs. Fails if a stored list was changed.
    pub(in super::super) fn load(
        &mut self,
        authorities: &[CertificateDer<'_>],
    ) -> Result<(), MemoryError> {
        let Some(place) = &self.place else {
            return Ok(());
        };
        let roots = roots(authorities);
        // A certificate that cannot be parsed is reported when the lists of the file are read.
        for certificate in &parsed(authorities).unwrap_or_default() {
            let authority = authority_of(certificate);
            let id = id_of(&authority);
            if self.loaded.contains(&id) {
                continue;
            }
            for name in place.state.names(&place.of(&authority), SUFFIX)? {
                let Some(der) = place.read(&name)? else {
                    continue;
                };
                let der = der.into();
                let read = List::accepted(&der, certificate);
                let Some((slot, list)) = read.filter(|(slot, _)| place.name(slot) == name) else {
                    return Err(MemoryError::List {
                        path: place.shown(&name),
                        authority: name_of(&authority.0),
                    });
                };
                let is_usable = check_for_handshake("", &der, &roots).is_ok();
                self.accepted.entry(slot).or_insert_with(|| Accepted {
                    list: Arc::new(list),
                    is_usable,
                    is_stored: true,
                });
            }
            self.loaded.insert(id);
        }
        Ok(())
    }

    /// The accepted lists of a CA.
    pub(super) fn of(&self, authority: &Authority) -> impl Iterator<Item = (&Slot, &Accepted)> {
        let all = self.accepted.iter();
        all.filter(move |(slot, _)| slot.authority == *authority)
    }

    /// Returns an error if a newer list of the same CA was already accepted, and `None` if the list
    /// may be used.
    ///
    /// The first list of a slot must not be older than the CA's other lists, because an attacker
    /// could present an old list as the first list. The comparison with other slots uses only
    /// dates, because numbers are comparable only within a slot.
    pub(super) fn refusal(&self, slot: &Slot, version: &Version) -> Option<ListsError> {
        let accepted = if let Some(accepted) = self.accepted.get(slot) {
            let accepted = &accepted.list.version;
            version.goes_back(accepted).then_some(accepted)
        } else {
            let others = self.of(&slot.authority);
            let versions = others.map(|(_, other)| &other.list.version);
            let newest = versions.max_by_key(|version| version.from);
            newest.filter(|newest| version.from < newest.from)
        };
        accepted.map(|accepted| self.older(&slot.authority, version, accepted))
    }

    /// Like [`Self::refusal`], but compares the newest list of a CA with the version that an
    /// earlier release stored.
    pub(super) fn refusal_of_all(
        &self,
        authority: &Authority,
        newest: &Version,
    ) -> Option<ListsError> {
        // Earlier releases also stored versions of unverified lists.
        authority.1?;
        if self.of(authority).next().is_some() {
            return None;
        }
        let before = self.versions.get(&id_of(authority))?;
        let goes_back = newest.goes_back(before);
        goes_back.then(|| self.older(authority, newest, before))
    }

    fn older(&self, authority: &Authority, found: &Version, accepted: &Version) -> ListsError {
        ListsError::GoesBack {
            authority: name_of(&authority.0),
            found: found.shown(),
            accepted: accepted.shown(),
            how_to_go_back: self.how_to_go_back(authority),
        }
    }

    fn how_to_go_back(&self, authority: &Authority) -> String {
        let Some(place) = &self.place else {
            return String::new();
        };
        let lists = place.shown(&format!("{}*{SUFFIX}", place.of(authority)));
        let versions = if self.versions.contains_key(&id_of(authority)) {
            format!(" and {}", place.shown(&format!("{}.json", place.file)))
        } else {
            String::new()
        };
        format!("; to accept the older list, stop the broker and remove {lists}{versions}")
    }

    /// Adds accepted lists. Unverified lists are not added.
    pub(in super::super) fn accept(&mut self, lists: &Lists) {
        for (slot, list) in &lists.groups {
            let is_known = self
                .accepted
                .get(slot)
                .is_some_and(|before| before.list.der == list.der);
            if slot.authority.1.is_none() || is_known {
                continue;
            }
            let accepted = Accepted {
                list: Arc::clone(list),
                is_usable: true,
                is_stored: false,
            };
            self.accepted.insert(slot.clone(), accepted);
        }
        if self.place.is_some() {
            // If a removed CA is configured again, its stored lists are read again.
            let is_configured = |slot: &Slot| lists.configured.contains_key(&slot.authority);
            self.accepted
                .retain(|slot, accepted| is_configured(slot) || !accepted.is_stored);
            let configured: BTreeSet<_> = lists.configured.keys().map(id_of).collect();
            self.loaded.retain(|id| configured.contains(id));
        }
    }

    /// Stores the accepted lists that have not been stored yet.
    pub(in super::super) fn store(&mut self, now: i64) -> Result<(), MemoryError> {
        let Some(place) = &self.place else {
            return Ok(());
        };
        let mut is_new = false;
        for (slot, accepted) in &mut self.accepted {
            if !accepted.is_stored {
                place.store(slot, &accepted.list)?;
                accepted.is_stored = true;
                is_new = true;
            }
        }
        if is_new {
            // The files of accepted lists are kept even after the lists expire. Otherwise, the
            // broker could accept an older list again.
            let names = self.accepted.keys().map(|slot| place.name(slot));
            place.limit(&names.collect(), now)?;
        }
        Ok(())
    }
}

fn short(digest: &[u8]) -> String {
    hex::encode(&digest[..NAMED_BYTES])
}
