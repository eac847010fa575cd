//! What this instance remembers about the registry: the number and the state of each row that the token verified last.
//!
//! The MAC of an earlier row of a key is valid, too. A running broker refuses such a row by its number. The memory lets the broker
//! also refuse an earlier row that a person put back into the database while no broker ran. Each change of the registry is also in the
//! audit log, with the highest number and a digest of all rows.
//!
//! Mitigation: M11 of `THREAT_MODEL.md`.

use std::sync::{Mutex, MutexGuard, PoisonError};

use aws_lc_rs::digest;
use serde::{Deserialize, Serialize};

use keybroker_audit::{Entry as AuditEntry, EntryKind, Outcome};
use keybroker_core::{
    error::{Error, Reason, chain},
    key::{WrappingKeyId, WrappingKeyState},
    state::{self, StateDirectory},
};
use keybroker_store::{RegistryRow, Store};

use crate::{Broker, digests::hex_of};

use super::{RefusedChange, Registry, Standing, altered};

/// The memory in the form in which the state directory stores it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Kept {
    /// The digest of all rows that the audit log contains.
    digest: String,
    rows: Vec<KeptRow>,
}

/// The row of a key that the token verified last.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct KeptRow {
    key: String,
    sequence: u64,
    state: WrappingKeyState,
    registered_us: i64,
}

/// The memory of a running broker.
#[derive(Debug)]
pub(crate) struct RegistryMemory {
    state: StateDirectory,
    fact: String,
    kept: Mutex<Kept>,
}

/// The name of the state file. The name contains the instance, because several instances may share the state directory.
fn fact_of(instance: &str) -> String {
    format!("registry-{instance}")
}

impl KeptRow {
    fn of(row: &RegistryRow) -> Self {
        Self {
            key: row.id.to_string(),
            sequence: row.sequence,
            state: row.state,
            registered_us: row.registered.micros(),
        }
    }

    /// Whether a row of the same key is from before this row. A key that was registered again has a later time.
    fn is_after(&self, row: &RegistryRow) -> bool {
        let is_same_registration = row.registered.micros() <= self.registered_us;
        let went_back = row.sequence < self.sequence;
        let has_other_state = row.sequence == self.sequence && row.state != self.state;
        is_same_registration && (went_back || has_other_state)
    }
}

impl Kept {
    fn row(&self, id: WrappingKeyId) -> Option<&KeptRow> {
        let id = id.to_string();
        self.rows.iter().find(|row| row.key == id)
    }
}

impl RegistryMemory {
    pub(crate) fn new(state: StateDirectory, instance: &str) -> Self {
        Self {
            state,
            fact: fact_of(instance),
            kept: Mutex::default(),
        }
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads what the previous run remembered.
    fn take_over(&self) -> Result<(), Error> {
        let kept = self.state.read_json::<Kept>(&self.fact);
        let kept = kept.map_err(|source| Error::caused(Reason::StoreDown, Unusable { source }))?;
        *self.kept() = kept.unwrap_or_default();
        Ok(())
    }

    /// Refuses each row that is from before the remembered row, and reports each remembered row that is not there.
    pub(super) fn compare(&self, registry: &mut Registry) {
        let kept = self.kept();
        for entry in &mut registry.entries {
            let Some(known) = kept
                .row(entry.row.id)
                .filter(|known| known.is_after(&entry.row))
            else {
                continue;
            };
            let what = format!(
                "an earlier row was put back: the row has number {} ({}), but this broker has verified a row with number {} ({}) \
                 before",
                entry.row.sequence, entry.row.state, known.sequence, known.state
            );
            entry.standing = altered(&entry.row, &what);
        }
        for known in &kept.rows {
            let id = WrappingKeyId::from_hex(&known.key);
            if let Some(id) = id.filter(|id| !registry.knows(*id)) {
                registry.refused_changes.push(RefusedChange::Deleted(id));
            }
        }
    }

    /// The memory after these rows were verified. `None` if nothing changed.
    fn after(&self, registry: &Registry) -> Option<Kept> {
        let kept = self.kept();
        let mut next = kept.clone();
        for entry in &registry.entries {
            if entry.standing != Standing::Verified {
                continue;
            }
            let new = KeptRow::of(&entry.row);
            match next.rows.iter_mut().find(|known| known.key == new.key) {
                Some(known) => *known = new,
                None => next.rows.push(new),
            }
        }
        next.digest = digest_of(registry);
        (next != *kept).then_some(next)
    }
}

/// The SHA-256 of all rows in the order of their ids, as hexadecimal digits. The input is, for each row, the message that its MAC
/// covers and the MAC.
fn digest_of(registry: &Registry) -> String {
    let mut rows: Vec<&RegistryRow> = registry.entries.iter().map(|entry| &entry.row).collect();
    rows.sort_by_key(|row| row.id);
    let mut context = digest::Context::new(&digest::SHA256);
    for row in rows {
        let message = if row.state == WrappingKeyState::Destroyed {
            row.tombstone_message()
        } else {
            row.mac_message()
        };
        context.update(message.as_bytes());
        context.update(&row.mac);
    }
    hex_of(context.finish())
}

/// The reason why the state file cannot be used.
#[derive(Debug, thiserror::Error)]
#[error(
    "{cause}; without this file, the broker could not notice an earlier row of the registry. If the database is the right one, run \
     `keybroker store accept-restored`",
    cause = chain(.source)
)]
struct Unusable {
    source: state::Error,
}

/// Forgets the rows that an instance remembers, so that its next start accepts the present rows. Returns whether the instance
/// remembered a row that is later than the present row, or that is not there.
pub(crate) async fn forget(
    state: &StateDirectory,
    instance: &str,
    store: &dyn Store,
) -> Result<bool, Error> {
    let failed = |error| Error::caused(Reason::StoreDown, error);
    let fact = fact_of(instance);
    let is_refused = match state.read_json::<Kept>(&fact) {
        Ok(None) => return Ok(false),
        Ok(Some(kept)) => {
            let rows = store.registry().await?;
            kept.rows.iter().any(|known| {
                let row = rows.iter().find(|row| row.id.to_string() == known.key);
                row.is_none_or(|row| known.is_after(row))
            })
        }
        Err(error) if error.is_damaged() => true,
        Err(error) => return Err(failed(error)),
    };
    if is_refused {
        state.write_json(&fact, &Kept::default()).map_err(failed)?;
    }
    Ok(is_refused)
}

impl Broker {
    /// Compares the registry with what the previous run remembered.
    pub(super) fn compare_with_memory(&self, registry: &mut Registry) -> Result<(), Error> {
        self.registry_memory.take_over()?;
        self.registry_memory.compare(registry);
        Ok(())
    }

    /// Remembers the verified rows, and records a changed registry in the audit log. A failure is tried again with the next refresh.
    pub(crate) async fn remember_registry(&self) {
        let memory = &self.registry_memory;
        let Some(registry) = self.registry.load_full() else {
            return;
        };
        let Some(next) = memory.after(&registry) else {
            return;
        };
        if next.digest != memory.kept().digest {
            let highest = registry
                .entries
                .iter()
                .map(|entry| entry.row.sequence)
                .max();
            let mut entry =
                AuditEntry::new(EntryKind::System, "wrapping_key.registry", Outcome::Ok);
            entry.count = highest;
            entry.digest = Some(next.digest.clone());
            if let Err(error) = self.audit.append(entry).await {
                return tracing::warn!(%error, "cannot record the changed registry in the audit log");
            }
        }
        if let Err(error) = memory.state.write_json(&memory.fact, &next) {
            return tracing::warn!(
                error = chain(&error),
                "cannot store the numbers of the registry's rows in the state directory; the broker tries again"
            );
        }
        *memory.kept() = next;
    }
}

#[cfg(test)]
mod tests {
    use keybroker_core::call::Timestamp;

    use crate::testing;

    use super::{super::Entry, *};

    fn row(id: u8, sequence: u64, state: WrappingKeyState) -> RegistryRow {
        testing::registered(WrappingKeyId::from_bytes([id; 16]), state, sequence)
    }

    fn registry(rows: &[RegistryRow]) -> Registry {
        let entry = |row: &RegistryRow| Entry::first(row.clone(), Standing::Verified);
        Registry {
            entries: rows.iter().map(entry).collect(),
            ..Registry::default()
        }
    }

    #[test]
    fn an_earlier_row_is_refused_alone_and_a_later_one_is_remembered() {
        use WrappingKeyState::{Active, Compromised, Deactivated};
        let folder = tempfile::tempdir().unwrap();
        let memory = RegistryMemory::new(StateDirectory::below(folder.path()), "one");
        let now = registry(&[row(1, 5, Compromised), row(2, 6, Active)]);
        let kept = memory.after(&now).unwrap();
        memory.state.write_json(&memory.fact, &kept).unwrap();
        memory.take_over().unwrap();
        assert_eq!(memory.after(&now), None);
        let refused = |rows: &[RegistryRow]| {
            let mut registry = registry(rows);
            memory.compare(&mut registry);
            let altered = registry
                .entries
                .iter()
                .filter(|entry| matches!(entry.standing, Standing::Altered(_)));
            let altered: Vec<u8> = altered.map(|entry| entry.row.id.as_bytes()[0]).collect();
            (altered, registry.refused_changes.len())
        };
        assert_eq!(
            refused(&[row(1, 5, Compromised), row(2, 6, Active)]),
            (vec![], 0)
        );
        assert_eq!(
            refused(&[row(1, 4, Active), row(2, 6, Active)]),
            (vec![1], 0)
        );
        assert_eq!(
            refused(&[row(1, 5, Active), row(2, 6, Active)]),
            (vec![1], 0)
        );
        assert_eq!(
            refused(&[row(1, 7, Compromised), row(2, 8, Deactivated)]),
            (vec![], 0)
        );
        assert_eq!(refused(&[row(2, 6, Active)]), (vec![], 1));
        // The key was registered again.
        let again = RegistryRow {
            registered: Timestamp::from_micros(11),
            ..row(1, 1, Active)
        };
        assert_eq!(refused(&[again, row(2, 6, Active)]), (vec![], 0));
    }

    #[test]
    fn a_row_that_does_not_verify_is_not_remembered() {
        let folder = tempfile::tempdir().unwrap();
        let memory = RegistryMemory::new(StateDirectory::below(folder.path()), "one");
        let mut now = registry(&[row(1, 9, WrappingKeyState::Destroyed)]);
        now.entries[0].standing = altered(&now.entries[0].row, "no MAC");
        assert!(memory.after(&now).unwrap().rows.is_empty());
    }

    #[test]
    fn the_digest_depends_on_each_row_and_not_on_their_order() {
        let [one, two] = [1, 2].map(|id| row(id, id.into(), WrappingKeyState::Active));
        let digest = digest_of(&registry(&[one.clone(), two.clone()]));
        assert_eq!(digest.len(), 64);
        assert_eq!(digest, digest_of(&registry(&[two.clone(), one.clone()])));
        assert_ne!(digest, digest_of(&registry(std::slice::from_ref(&one))));
        let other = RegistryRow {
            mac: [4; 32],
            ..two
        };
        assert_ne!(digest, digest_of(&registry(&[one, other])));
    }
}
