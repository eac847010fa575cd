//! The newest revocation lists that were accepted, kept across restarts.
//!
//! A list that is older than the accepted one would accept certificates that were revoked since. So the state directory holds the accepted
//! list itself, in a file for each file of lists and each authority, and a start has a list to serve with when the file has an older or
//! a damaged one. Two listeners may have one file of lists and different authorities.
//!
//! Each stored list is verified again before it is used. Only lists whose authority is configured are stored.

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

/// Lists of one file that are stored. Of more, those that have ended are removed.
const STORED_MAX: usize = 128;
/// Bytes of a digest in the name of a state file.
const NAMED_BYTES: usize = 8;
const SUFFIX: &str = ".der";

/// The newest verified list of each configured authority that a listener has accepted.
#[derive(Debug, Default)]
pub(in super::super) struct Memory {
    accepted: BTreeMap<Slot, Accepted>,
    /// Authorities whose stored lists were read.
    loaded: BTreeSet<AuthorityId>,
    /// What a release that stored only versions has remembered. It is not written any more.
    versions: BTreeMap<AuthorityId, Version>,
    /// Absent for a check of the configuration, which remembers nothing.
    place: Option<Place>,
}

/// A list that was accepted.
#[derive(Debug)]
pub(super) struct Accepted {
    pub(super) list: Arc<List>,
    /// Whether the library of the handshake takes it.
    is_usable: bool,
    is_stored: bool,
}

impl Accepted {
    /// Whether clients may be verified with it.
    pub(super) fn is_valid(&self, now: i64) -> bool {
        self.is_usable && self.list.life.includes(now)
    }
}

/// Where the accepted lists of one file are stored.
#[derive(Debug)]
struct Place {
    state: StateDirectory,
    /// First part of the names of the state files.
    file: String,
}

/// One entry of the state file of an earlier release.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct StoredVersion {
    /// SHA-256 of the authority's name and key, in hex.
    authority: String,
    /// `crlNumber` in hex, if the list has one.
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

    /// First part of the names of the files of an authority.
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

    /// Stores a list, unless another listener with the same file has stored a newer one.
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

    /// The versions that an earlier release has remembered.
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

    /// Removes stored lists that have ended, those first that were not replaced for longest. `own` are the lists of this listener:
    /// another one with the same file may have other authorities.
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
    /// What the state directory holds of the lists in `file`.
    pub(in super::super) fn open(state: StateDirectory, file: &Path) -> Result<Self, MemoryError> {
        let place = Place::new(state, file);
        Ok(Self {
            versions: place.versions()?,
            place: Some(place),
            ..Self::default()
        })
    }

    /// Reads the stored lists of authorities that are configured now and were not before. Fails if another program has changed one.
    pub(in super::super) fn load(
        &mut self,
        authorities: &[CertificateDer<'_>],
    ) -> Result<(), MemoryError> {
        let Some(place) = &self.place else {
            return Ok(());
        };
        let roots = roots(authorities);
        // The lists of the file are read with the same certificates, and one that does not parse is reported there.
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

    /// The accepted lists of an authority.
    pub(super) fn of(&self, authority: &Authority) -> impl Iterator<Item = (&Slot, &Accepted)> {
        let all = self.accepted.iter();
        all.filter(move |(slot, _)| slot.authority == *authority)
    }

    /// Why a list must not be used: its authority has signed a newer one, which was accepted before.
    ///
    /// A list for certificates for which none was accepted yet must not be older than the other lists of its authority: numbers
    /// count only among lists for the same certificates, but an old list could be presented as the first one of its kind.
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

    /// The same, for the newest of the lists of an authority, by what an earlier release remembered of them.
    pub(super) fn refusal_of_all(
        &self,
        authority: &Authority,
        newest: &Version,
    ) -> Option<ListsError> {
        // Earlier releases also remembered unverified lists.
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

    /// Takes note of lists that were accepted. Nothing is remembered of an unverified list.
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
            // They are read again when their authority is configured again.
            let is_configured = |slot: &Slot| lists.configured.contains_key(&slot.authority);
            self.accepted
                .retain(|slot, accepted| is_configured(slot) || !accepted.is_stored);
            let configured: BTreeSet<_> = lists.configured.keys().map(id_of).collect();
            self.loaded.retain(|id| configured.contains(id));
        }
    }

    /// Stores the accepted lists that are not stored yet.
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
            let valid = self.accepted.iter().filter(|(_, list)| list.is_valid(now));
            let names = valid.map(|(slot, _)| place.name(slot));
            place.limit(&names.collect(), now)?;
        }
        Ok(())
    }
}

fn short(digest: &[u8]) -> String {
    hex::encode(&digest[..NAMED_BYTES])
}
