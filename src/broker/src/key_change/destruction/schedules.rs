//! The rows of the scheduled destructions, as this broker last read them.
//!
//! A person who can write to the database can add, change and remove rows. The broker verifies the MAC of each row when it reads the
//! row for the first time. A row that no broker made, or that cannot be read, concerns only its own key.

use std::{
    collections::{BTreeSet, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;

use keybroker_core::{
    call::{Deadline, Timestamp},
    error::Error,
    key::{KeyUse, WrappingKeyId, WrappingKeyState},
    state::StateDirectory,
};
use keybroker_hsm as hsm;
use keybroker_hsm::Caller;
use keybroker_store::{DestructionRow, FoundDestructions, RegistryRow, UnreadableDestruction};

use crate::{Broker, registry::Registry};

use super::{super::MAC_TIMEOUT, DAY, accepted::Accepted, removal::Removed};

/// The same cause of a delay is told again after this time.
const TOLD_AGAIN: Duration = DAY;

/// Who made a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    /// A broker: the MAC of the row verifies.
    Broker,
    /// A person who can write to the database: the MAC of the row does not verify.
    Forger,
    /// No token can verify the MAC at present.
    Unknown,
}

/// A row, and who made it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Schedule {
    pub(super) row: DestructionRow,
    pub(super) origin: Origin,
    /// Whether the registry said that the key is destroyed when the MAC was verified.
    is_marked: bool,
}

impl Schedule {
    /// The problem of a row that no broker made.
    fn problem(&self) -> Option<String> {
        (self.origin == Origin::Forger).then(|| forged(self.row.key))
    }
}

/// The text about a row that no broker made.
fn forged(key: WrappingKeyId) -> String {
    format!(
        "the row of key {key} in the table key_destructions was not made by a broker: its MAC does not verify"
    )
}

/// The rows of all scheduled destructions.
#[derive(Debug, Default)]
pub(super) struct Schedules {
    pub(super) rows: Vec<Schedule>,
    unreadable: Vec<UnreadableDestruction>,
}

impl Schedules {
    /// The schedule of a key, unless no broker made it or the key was changed afterwards. No token may have verified its MAC yet.
    pub(super) fn of(&self, key: &RegistryRow) -> Option<&Schedule> {
        self.rows.iter().find(|schedule| {
            schedule.row.key == key.id
                && schedule.row.sequence == key.sequence
                && schedule.origin != Origin::Forger
                && key.state != WrappingKeyState::Destroyed
        })
    }

    /// The row of a key that cannot be read.
    pub(super) fn unreadable_row(&self, key: WrappingKeyId) -> Option<&UnreadableDestruction> {
        self.unreadable.iter().find(|row| row.key == Some(key))
    }

    /// The problems of rows that cannot be read, or that no broker made.
    fn problems(&self) -> impl Iterator<Item = String> {
        let forged = self.rows.iter().filter_map(Schedule::problem);
        self.unreadable
            .iter()
            .map(ToString::to_string)
            .chain(forged)
    }
}

/// The scheduled destructions, and what this broker did about them.
#[derive(Debug)]
pub(crate) struct Scheduled {
    /// The shortest waiting time in days: `wrapping_keys.destroy_after_days`.
    pub(super) days_min: u32,
    pub(super) found: ArcSwap<Schedules>,
    /// The schedules that this instance may carry out.
    pub(super) accepted: Accepted,
    /// The problems of rows about which an alert was raised.
    told: Mutex<BTreeSet<String>>,
    /// The destructions that this broker could not complete.
    delays: Mutex<HashMap<WrappingKeyId, Delay>>,
    /// The tokens from which this broker removed the objects of a key.
    emptied: Mutex<HashMap<(WrappingKeyId, String), (Removed, Instant)>>,
    /// When this broker learnt that the objects of a destroyed key must be removed.
    unremoved: Mutex<HashMap<WrappingKeyId, Instant>>,
}

/// Why a destruction is not done yet.
#[derive(Debug)]
struct Delay {
    cause: String,
    told: Instant,
    /// This broker does not try again before.
    again: Instant,
}

impl Scheduled {
    pub(crate) fn new(days_min: u32, state: StateDirectory, instance: &str) -> Self {
        Self {
            days_min,
            found: ArcSwap::default(),
            accepted: Accepted::new(state, instance),
            told: Mutex::default(),
            delays: Mutex::default(),
            emptied: Mutex::default(),
            unremoved: Mutex::default(),
        }
    }

    /// Makes this broker believe that the notice after the mark has passed.
    #[cfg(test)]
    pub(crate) fn pass_notice(&self, key: WrappingKeyId) {
        let long_ago = Instant::now().checked_sub(Duration::from_mins(1));
        let mut unremoved = self
            .unremoved
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        unremoved.insert(
            key,
            long_ago.expect("the machine runs for more than a minute"),
        );
    }

    /// How long this broker has known that the objects of a destroyed key must be removed.
    pub(super) fn unremoved_for(&self, key: WrappingKeyId) -> Duration {
        let mut unremoved = self
            .unremoved
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        unremoved.entry(key).or_insert_with(Instant::now).elapsed()
    }

    fn delays(&self) -> MutexGuard<'_, HashMap<WrappingKeyId, Delay>> {
        self.delays.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn emptied(&self) -> MutexGuard<'_, HashMap<(WrappingKeyId, String), (Removed, Instant)>> {
        self.emptied.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// When a key is destroyed; `None` if no valid destruction of the key is scheduled.
    pub(crate) fn due(&self, row: &RegistryRow) -> Option<Timestamp> {
        self.found.load().of(row).map(|schedule| schedule.row.due)
    }

    /// Sentences without a full stop about destructions that are delayed and about rows that are not valid, for the details of the
    /// health.
    pub(crate) fn notes(&self) -> Vec<String> {
        let mut notes: Vec<String> = self
            .delays()
            .iter()
            .filter(|(_, delay)| !delay.cause.is_empty())
            .map(|(key, delay)| {
                format!(
                    "the destruction of wrapping key {key} is postponed: {}",
                    delay.cause
                )
            })
            .chain(self.found.load().problems())
            .collect();
        notes.sort();
        notes
    }

    /// Whether this broker waits before it tries again.
    pub(super) fn is_delayed(&self, key: WrappingKeyId) -> bool {
        let delays = self.delays();
        delays
            .get(&key)
            .is_some_and(|delay| Instant::now() < delay.again)
    }

    /// Records that a destruction cannot go on before `pause` has passed. An empty cause is no problem. Returns whether an alert about
    /// the cause is due.
    pub(super) fn delay(&self, key: WrappingKeyId, cause: &str, pause: Duration) -> bool {
        let now = Instant::now();
        let mut delays = self.delays();
        let known = delays.get(&key).filter(|delay| delay.cause == cause);
        let told = known.map(|delay| delay.told);
        let is_due = told.is_none_or(|told| told.elapsed() >= TOLD_AGAIN);
        let told = told.filter(|_| !is_due).unwrap_or(now);
        let delay = Delay {
            cause: cause.to_owned(),
            told,
            again: now + pause,
        };
        delays.insert(key, delay);
        is_due && !cause.is_empty()
    }

    pub(crate) fn forget(&self, key: WrappingKeyId) {
        self.delays().remove(&key);
        self.emptied().retain(|(known, _), _| *known != key);
    }

    /// What this broker removed from a token within the last day. Another token that is not available must not cause a login and
    /// an audit entry for this token every 30 s.
    pub(super) fn emptied_before(&self, key: WrappingKeyId, token: &str) -> Option<Removed> {
        let emptied = self.emptied();
        let (removed, at) = emptied.get(&(key, token.to_owned()))?;
        (at.elapsed() < DAY).then(|| removed.clone())
    }

    pub(super) fn note_emptied(&self, key: WrappingKeyId, token: &str, removed: Removed) {
        self.emptied()
            .insert((key, token.to_owned()), (removed, Instant::now()));
    }

    /// The problems of rows about which no alert was raised yet.
    pub(super) fn untold_problems(&self) -> Vec<String> {
        let problems: BTreeSet<String> = self.found.load().problems().collect();
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let new = problems.difference(&told).cloned().collect();
        *told = problems;
        new
    }
}

impl Broker {
    /// Reads the schedules. The registry must be as new as the schedules: a row of a key that another broker just marked as
    /// destroyed has another MAC.
    pub(super) async fn schedules(&self, registry: &Registry) -> Result<Arc<Schedules>, Error> {
        let found = self.store.destructions().await?;
        Ok(self.check_origins(registry, found).await)
    }

    /// Verifies the MAC of each row that was not verified before.
    pub(super) async fn check_origins(
        &self,
        registry: &Registry,
        found: FoundDestructions,
    ) -> Arc<Schedules> {
        let known = self.scheduled.found.load_full();
        let mut rows = Vec::with_capacity(found.rows.len());
        for row in found.rows {
            let key = registry.row(row.key);
            let is_marked = key.is_some_and(|key| key.state == WrappingKeyState::Destroyed);
            let before = known.rows.iter().find(|known| {
                known.row == row && known.is_marked == is_marked && known.origin != Origin::Unknown
            });
            let origin = match before {
                Some(before) => before.origin,
                None => self.origin(registry, &row, is_marked).await,
            };
            rows.push(Schedule {
                row,
                origin,
                is_marked,
            });
        }
        let schedules = Arc::new(Schedules {
            rows,
            unreadable: found.unreadable,
        });
        self.scheduled.found.store(Arc::clone(&schedules));
        schedules
    }

    async fn origin(&self, registry: &Registry, row: &DestructionRow, is_marked: bool) -> Origin {
        // Others may know the integrity key of a compromised key.
        let is_untrusted = |signer: &RegistryRow| {
            matches!(
                signer.state,
                WrappingKeyState::Compromised | WrappingKeyState::Destroyed
            )
        };
        if !registry.knows(row.signer) || registry.verified(row.signer).is_ok_and(is_untrusted) {
            return Origin::Forger;
        }
        if registry.check(row.signer, KeyUse::VerifyMac).is_err() {
            return Origin::Unknown;
        }
        let message = if is_marked {
            row.removal_message()
        } else {
            row.mac_message()
        };
        let caller = Caller::background(Deadline::after(MAC_TIMEOUT));
        let job = self
            .token
            .verify_mac(row.signer, &message, &row.mac, &caller);
        match job.await {
            Ok(()) => Origin::Broker,
            Err(hsm::Error::MacRefused) => Origin::Forger,
            Err(_) => Origin::Unknown,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cause_is_told_once_a_day_and_a_new_cause_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let scheduled = Scheduled::new(30, StateDirectory::below(folder.path()), "one");
        let key = WrappingKeyId::from_bytes([1; 16]);
        assert!(!scheduled.is_delayed(key));
        assert!(scheduled.delay(key, "rows", Duration::from_mins(1)));
        assert!(scheduled.is_delayed(key));
        assert!(!scheduled.delay(key, "rows", Duration::ZERO));
        assert!(!scheduled.is_delayed(key));
        assert!(scheduled.delay(key, "token", Duration::ZERO));
        assert!(!scheduled.delay(key, "", Duration::ZERO));
        assert!(scheduled.notes().is_empty());
        scheduled.delay(key, "token", Duration::ZERO);
        let notes = scheduled.notes();
        assert!(notes[0].ends_with("is postponed: token"), "{notes:?}");
        scheduled.forget(key);
        assert!(scheduled.notes().is_empty());
    }
}
