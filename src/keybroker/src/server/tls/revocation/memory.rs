//! The newest revocation lists that were accepted, kept across restarts.

use std::{
    collections::{BTreeMap, BTreeSet},
    os::unix::ffi::OsStrExt as _,
    path::Path,
};

use aws_lc_rs::digest;
use serde::{Deserialize, Serialize};

use keybroker_core::state::StateDirectory;

use super::{
    Lists,
    error::{ListsError, MemoryError},
    list::{Authority, AuthorityId, Version, id_of, name_of},
};

/// Authorities whose newest list is remembered.
const AUTHORITIES_MAX: usize = 128;

/// The newest verified list of each configured authority that a listener has accepted, kept across restarts. An older one is
/// refused: it would accept certificates that were revoked since.
#[derive(Debug, Default)]
pub(in super::super) struct Newest {
    versions: BTreeMap<AuthorityId, Version>,
    /// Absent for a check of the configuration, which remembers nothing.
    fact: Option<Fact>,
}

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

impl Newest {
    /// What the state directory remembers of the lists in `file`.
    pub(in super::super) fn read(state: StateDirectory, file: &Path) -> Result<Self, MemoryError> {
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
    pub(super) fn refusal(&self, authority: &Authority, version: &Version) -> Option<ListsError> {
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
    pub(in super::super) fn accept(&mut self, accepted: &Lists) {
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
    pub(in super::super) fn store(&self) -> Result<(), MemoryError> {
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
