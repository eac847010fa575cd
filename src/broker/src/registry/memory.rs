//! What this instance remembers about the registry: the number and the state of each row that the token verified last.
//!
//! The MAC of an earlier row of a key is valid, too. A running broker refuses such a row by its number. The memory lets the broker
//! also refuse an earlier row that a person put back into the database while no broker ran. Each change of the registry is also in the
//! audit log of the instance, with the numbers and a digest of all rows. At its start, the broker compares the rows with the state file
//! and with the newest entry of the audit log, so that neither of them is enough to hide a change.
//!
//! Mitigation: M11 of `THREAT_MODEL.md`.

use std::{
    cmp::Reverse,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use aws_lc_rs::digest;
use serde::{Deserialize, Serialize};

use keybroker_audit::{Entry as AuditEntry, EntryKind, Outcome, Recorded};
use keybroker_core::{
    call::Timestamp,
    error::{Error, Reason, chain},
    key::{WrappingKeyId, WrappingKeyState},
    state::{self, StateDirectory},
};
use keybroker_store::{RegistryRow, Store};

use crate::{Broker, TaskFailed, digests::hex_of};

use super::{Entry, RefusedChange, Registry, Standing, altered};

/// The memory in the form in which the state directory stores it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Kept {
    /// The digest of all rows that the audit log contains.
    digest: String,
    rows: Vec<KeptRow>,
    /// When an operator accepted the present rows; 0 if never. Earlier entries of the audit log do not count.
    #[serde(default)]
    accepted_us: i64,
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
    /// When the rows were last written to the audit log or, before that, when the broker started.
    logged: Mutex<Instant>,
}

/// The largest number of rows in an entry. A row has at most 90 bytes.
const RECORDED_ROWS_MAX: usize = 64;
/// The action of the entries that record the registry.
const RECORDED: &str = "wrapping_key.registry";
/// An unchanged registry is recorded again after this time, so that the newest entry is not far from the end of the audit log.
const RECORDED_AGAIN: Duration = Duration::from_hours(1);
/// How much of the audit log is searched for the newest entry.
const SEARCHED_BYTES: u64 = 256 << 20;

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

    /// The row as a word of the audit log.
    fn to_word(&self) -> String {
        let Self {
            key,
            sequence,
            state,
            registered_us,
        } = self;
        format!("{key}/{sequence}/{state}/{registered_us}")
    }

    fn from_word(word: &str) -> Option<Self> {
        let mut parts = word.split('/');
        let row = Self {
            key: WrappingKeyId::from_hex(parts.next()?)?.to_string(),
            sequence: parts.next()?.parse().ok()?,
            state: WrappingKeyState::parse(parts.next()?)?,
            registered_us: parts.next()?.parse().ok()?,
        };
        parts.next().is_none().then_some(row)
    }

    /// Whether another memory of the same key is from after this memory.
    fn is_before(&self, other: &Self) -> bool {
        (self.registered_us, self.sequence) < (other.registered_us, other.sequence)
    }

    /// Whether a row of the same key cannot follow this row: it is from before this row, or makes a compromised key usable again. A
    /// key that was registered again has a later time, but stays compromised.
    fn is_after(&self, row: &RegistryRow) -> bool {
        let is_same_registration = row.registered.micros() <= self.registered_us;
        let went_back = row.sequence < self.sequence;
        let has_other_state = row.sequence == self.sequence && row.state != self.state;
        let is_usable_again = !row.state.may_follow(self.state);
        is_usable_again || is_same_registration && (went_back || has_other_state)
    }
}

impl Kept {
    fn row(&self, id: WrappingKeyId) -> Option<&KeptRow> {
        let id = id.to_string();
        self.rows.iter().find(|row| row.key == id)
    }

    /// Remembers also what an entry of the audit log says.
    fn merge(&mut self, recorded: &Recorded) {
        if recorded.at.micros() <= self.accepted_us {
            return;
        }
        let words = recorded.registry.as_deref().unwrap_or_default();
        for logged in words.split(' ').filter_map(KeptRow::from_word) {
            match self.rows.iter_mut().find(|row| row.key == logged.key) {
                Some(known) if known.is_before(&logged) => *known = logged,
                Some(_) => {}
                None => self.rows.push(logged),
            }
        }
    }

    /// The rows as words of the audit log, the newest first. A registry with more rows than an entry can have is cut off.
    fn to_words(&self) -> String {
        let mut rows: Vec<&KeptRow> = self.rows.iter().collect();
        rows.sort_by_key(|row| Reverse(row.sequence));
        let words: Vec<String> = rows
            .iter()
            .take(RECORDED_ROWS_MAX)
            .map(|row| row.to_word())
            .collect();
        words.join(" ")
    }
}

impl RegistryMemory {
    pub(crate) fn new(state: StateDirectory, instance: &str) -> Self {
        Self {
            state,
            fact: fact_of(instance),
            kept: Mutex::default(),
            logged: Mutex::new(Instant::now()),
        }
    }

    fn logged(&self) -> MutexGuard<'_, Instant> {
        self.logged.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads what the previous run remembered, and what it recorded last in the audit log.
    fn take_over(&self, recorded: Option<&Recorded>) -> Result<(), Error> {
        let kept = self.state.read_json::<Kept>(&self.fact);
        let kept = kept.map_err(|source| Error::caused(Reason::StoreDown, Unusable { source }))?;
        let mut kept = kept.unwrap_or_default();
        if let Some(recorded) = recorded {
            kept.merge(recorded);
        }
        *self.kept() = kept;
        Ok(())
    }

    /// Refuses the row of a key if it is from before the remembered row.
    pub(super) fn compare_entry(&self, entry: &mut Entry) {
        let kept = self.kept();
        let known = kept.row(entry.row.id);
        let Some(known) = known.filter(|known| known.is_after(&entry.row)) else {
            return;
        };
        let cause = if entry.row.sequence > known.sequence {
            "the row makes a compromised key usable again"
        } else {
            "an earlier row was put back"
        };
        let what = format!(
            "{cause}: the row has number {} ({}), but this broker has verified a row with number {} ({}) before",
            entry.row.sequence, entry.row.state, known.sequence, known.state
        );
        entry.standing = altered(&entry.row, &what);
    }

    /// Refuses each row that is from before the remembered row, and reports each remembered row that is not there.
    pub(super) fn compare(&self, registry: &mut Registry) {
        for entry in &mut registry.entries {
            self.compare_entry(entry);
        }
        for known in &self.kept().rows {
            let id = WrappingKeyId::from_hex(&known.key);
            if let Some(id) = id.filter(|id| !registry.knows(*id)) {
                registry.refused_changes.push(RefusedChange::Deleted(id));
            }
        }
    }

    /// What to store after an operator may have run `keybroker store accept-restored` beside this broker. `None` if the operator
    /// discarded the rows that this broker remembers: until its restart, the broker must neither store nor record them again.
    fn unless_accepted(&self, next: Kept) -> Option<Kept> {
        let stored = self.state.read_json::<Kept>(&self.fact).ok().flatten();
        let Some(stored) = stored.filter(|stored| stored.accepted_us > next.accepted_us) else {
            return Some(next);
        };
        let accepted_us = stored.accepted_us;
        (!stored.rows.is_empty()).then_some(Kept {
            accepted_us,
            ..next
        })
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
/// remembered a row that is later than the present row, or that is not there. `first` is done before, unless the memory shows that no
/// row is refused.
pub(crate) async fn forget(
    state: &StateDirectory,
    instance: &str,
    store: &dyn Store,
    first: impl Fn() -> Result<(), Error>,
) -> Result<bool, Error> {
    let failed = |error| Error::caused(Reason::StoreDown, error);
    let fact = fact_of(instance);
    let (is_refused, kept) = match state.read_json::<Kept>(&fact) {
        // The audit log may still have the rows, and the start may refuse some of them.
        Ok(None) => {
            first()?;
            (false, Kept::default())
        }
        Ok(Some(kept)) => {
            let rows = store.registry().await?;
            let is_refused = kept.rows.iter().any(|known| {
                let row = rows.iter().find(|row| row.id.to_string() == known.key);
                row.is_none_or(|row| known.is_after(row))
            });
            (is_refused, kept)
        }
        Err(error) if error.is_damaged() => (true, Kept::default()),
        Err(error) => return Err(failed(error)),
    };
    let kept = if is_refused {
        first()?;
        Kept::default()
    } else {
        kept
    };
    let kept = Kept {
        accepted_us: Timestamp::now().micros(),
        ..kept
    };
    state.write_json(&fact, &kept).map_err(failed)?;
    Ok(is_refused)
}

impl Broker {
    /// Reads what the previous run remembered and recorded. The examination of the registry compares the rows with it.
    pub(super) async fn take_over_memory(&self) -> Result<(), Error> {
        let audit = self.audit.clone();
        let search = move || audit.newest(RECORDED, SEARCHED_BYTES);
        let recorded = tokio::task::spawn_blocking(search).await;
        let recorded =
            recorded.map_err(|source| TaskFailed::of("reading the audit log", source))?;
        match &recorded {
            Ok(Some(_)) => {}
            Ok(None) => tracing::warn!(
                "the audit log has no recent entry `wrapping_key.registry`, so only the state directory can show that an earlier \
                 registry row was put back; this is normal at the first start of an instance"
            ),
            Err(error) => tracing::warn!(
                %error,
                "cannot compare the registry with the audit log; the broker compares it only with the state directory"
            ),
        }
        let recorded = recorded.ok().flatten();
        self.registry_memory.take_over(recorded.as_ref())
    }

    /// Remembers the verified rows, and records a changed registry in the audit log. A failure is tried again with the next refresh.
    pub(crate) async fn remember_registry(&self) {
        let memory = &self.registry_memory;
        let Some(registry) = self.registry.load_full() else {
            return;
        };
        let is_old = memory.logged().elapsed() >= RECORDED_AGAIN;
        let unchanged = || is_old.then(|| memory.kept().clone());
        let Some(next) = memory.after(&registry).or_else(unchanged) else {
            return;
        };
        let Some(next) = memory.unless_accepted(next) else {
            return;
        };
        if is_old || next.digest != memory.kept().digest {
            let highest = registry
                .entries
                .iter()
                .map(|entry| entry.row.sequence)
                .max();
            let mut entry = AuditEntry::new(EntryKind::System, RECORDED, Outcome::Ok);
            entry.count = highest;
            entry.digest = Some(next.digest.clone());
            entry.registry = Some(next.to_words());
            if let Err(error) = self.audit.append(entry).await {
                return tracing::warn!(%error, "cannot record the registry in the audit log");
            }
            *memory.logged() = Instant::now();
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
    use crate::testing;

    use super::*;

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
        memory.take_over(None).unwrap();
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
        // A key that was registered again has a new number, but a compromised key stays compromised.
        let again = |id| RegistryRow {
            registered: Timestamp::from_micros(11),
            ..row(id, 1, Active)
        };
        assert_eq!(refused(&[row(1, 5, Compromised), again(2)]), (vec![], 0));
        assert_eq!(refused(&[again(1), row(2, 6, Active)]), (vec![1], 0));
    }

    /// The state directory was lost: the entry of the audit log takes its place. A later acceptance counts more than the entry.
    #[test]
    fn the_audit_log_remembers_the_rows_too() {
        use WrappingKeyState::{Active, Compromised, Deactivated};
        let folder = tempfile::tempdir().unwrap();
        let state = StateDirectory::below(folder.path());
        let memory = RegistryMemory::new(state.clone(), "one");
        let kept = memory
            .after(&registry(&[row(1, 5, Compromised), row(2, 6, Active)]))
            .unwrap();
        let recorded = Recorded {
            at: Timestamp::from_micros(100),
            registry: Some(kept.to_words()),
        };
        let refused = |memory: &RegistryMemory, rows: &[RegistryRow]| {
            let mut registry = registry(rows);
            memory.compare(&mut registry);
            let altered = registry.altered_rows();
            altered.len()
        };
        let former = [row(1, 4, Active), row(2, 6, Active)];
        memory.take_over(None).unwrap();
        assert_eq!(refused(&memory, &former), 0);
        memory.take_over(Some(&recorded)).unwrap();
        assert_eq!(refused(&memory, &former), 1);
        assert_eq!(refused(&memory, &[row(2, 6, Active)]), 1);
        let later = [row(1, 5, Compromised), row(2, 7, Deactivated)];
        assert_eq!(refused(&memory, &later), 0);

        // The state file is from before the entry.
        let before = Kept {
            rows: vec![KeptRow::of(&row(1, 3, Active))],
            ..Kept::default()
        };
        state.write_json(&memory.fact, &before).unwrap();
        memory.take_over(Some(&recorded)).unwrap();
        assert_eq!(refused(&memory, &former), 1);
        let accepted = Kept {
            accepted_us: 100,
            ..before
        };
        state.write_json(&memory.fact, &accepted).unwrap();
        memory.take_over(Some(&recorded)).unwrap();
        assert_eq!(refused(&memory, &former), 0);
    }

    /// An operator accepts the present rows while the broker runs. The broker does not bring its rows back.
    #[test]
    fn a_running_broker_does_not_undo_an_acceptance() {
        let folder = tempfile::tempdir().unwrap();
        let state = StateDirectory::below(folder.path());
        let memory = RegistryMemory::new(state.clone(), "one");
        let own = memory
            .after(&registry(&[row(1, 5, WrappingKeyState::Active)]))
            .unwrap();
        state.write_json(&memory.fact, &own).unwrap();
        assert_eq!(memory.unless_accepted(own.clone()), Some(own.clone()));
        // The rows are the same.
        let accepted = Kept {
            accepted_us: 100,
            ..own.clone()
        };
        state.write_json(&memory.fact, &accepted).unwrap();
        assert_eq!(memory.unless_accepted(own.clone()), Some(accepted));
        let discarded = Kept {
            accepted_us: 200,
            ..Kept::default()
        };
        state.write_json(&memory.fact, &discarded).unwrap();
        assert_eq!(memory.unless_accepted(own), None);
    }

    #[test]
    fn a_row_of_the_audit_log_is_read_completely_or_not_at_all() {
        let kept = KeptRow::of(&row(1, 5, WrappingKeyState::PreActive));
        let word = kept.to_word();
        assert_eq!(KeptRow::from_word(&word), Some(kept));
        for damaged in [
            "",
            "1",
            &word[1..],
            &format!("{word}/1"),
            &word.replace("pre", ""),
        ] {
            assert_eq!(KeptRow::from_word(damaged), None, "{damaged}");
        }
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
