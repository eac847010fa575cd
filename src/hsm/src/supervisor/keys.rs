//! Changes of the expected keys while workers run. The workers are replaced one after another. An old worker gets jobs
//! until a worker with the new keys is ready, then finishes its jobs and ends.
//!
//! While a key is missing or wrong, one worker is replaced at intervals. Therefore the broker can use a key that
//! reappears on the token, without a restart of the broker.

use std::{sync::Arc, time::Duration};

use keybroker_core::key::WrappingKeyId;
use keybroker_worker_protocol::ExpectedKey;

use crate::{Error, KeyProblem, UnusableKey, found::Found, link::Link};

use super::{Decider, Supervisor};

/// Bounds of the pause between two searches for a key that is missing or wrong. Each search costs one login.
const RECHECK_MIN: Duration = Duration::from_secs(2);
const RECHECK_MAX: Duration = Duration::from_mins(1);

/// The schedule of the searches for missing or wrong keys.
#[derive(Debug, Default)]
pub(super) struct Recheck {
    /// Time of the next search; `None` while every expected key can be used.
    next: Option<Duration>,
    pause: Duration,
}

impl Recheck {
    /// Whether a search for missing or wrong keys must begin now. Each search doubles the pause until the next search.
    fn is_due(&mut self, now: Duration, has_unusable: bool) -> bool {
        if !has_unusable {
            *self = Self::default();
            return false;
        }
        let is_due = self.next.is_some_and(|next| now >= next);
        if is_due || self.next.is_none() {
            self.pause = (self.pause * 2).clamp(RECHECK_MIN, RECHECK_MAX);
            self.next = Some(now + self.pause);
        }
        is_due
    }
}

impl Found {
    /// Whether this worker serves every key that another worker serves.
    fn has_keys_of(&self, other: &Self) -> bool {
        other.wrap.keys().all(|id| self.wrap.contains_key(id))
    }

    /// Returns the keys that this worker and all other workers have.
    fn shared_with(&self, others: &[Arc<Link>]) -> Self {
        let has_all = |id: &WrappingKeyId| {
            let mut found = others.iter().map(|link| link.found());
            found.all(|found| found.wrap.contains_key(id))
        };
        let keys = self.keys.iter().filter(|key| has_all(&key.id));
        let wrap = self.wrap.iter().filter(|(id, _)| has_all(id));
        Self {
            info: self.info.clone(),
            keys: keys.cloned().collect(),
            unusable: Arc::clone(&self.unusable),
            wrap: wrap.map(|(id, key)| (*id, Arc::clone(key))).collect(),
        }
    }
}

/// Whether two sorted lists contain the same keys. The proofs may differ, because they change with the state of a key.
/// A worker that has verified earlier proofs need not verify the new proofs. A worker that refused a key must, because the earlier proof
/// may be the reason.
pub(super) fn are_same(one: &[ExpectedKey], other: &[ExpectedKey]) -> bool {
    let without_proofs = |keys: &[ExpectedKey]| -> Vec<ExpectedKey> {
        let keys = keys.iter().cloned();
        keys.map(|key| ExpectedKey {
            proofs: Vec::new(),
            ..key
        })
        .collect()
    };
    without_proofs(one) == without_proofs(other)
}

/// Whether the proofs of a key changed that the workers could not use. Both lists contain the same keys in the same order.
fn has_new_proof(before: &[ExpectedKey], keys: &[ExpectedKey], unusable: &[UnusableKey]) -> bool {
    let mut pairs = before.iter().zip(keys);
    pairs.any(|(old, new)| old.proofs != new.proofs && unusable.iter().any(|key| key.id == new.id))
}

/// Sorts the keys, because the order in which the registry lists them changes with the states of the keys.
pub(super) fn in_order(mut keys: Vec<ExpectedKey>) -> Vec<ExpectedKey> {
    keys.sort_by_key(|key| key.id);
    keys
}

impl Supervisor {
    /// Replaces the list of keys that must be on the token. If the list has changed, every worker is replaced.
    pub(crate) fn expect(&self, keys: Vec<ExpectedKey>) {
        let keys = in_order(keys);
        // The lock prevents the admission of a worker with the earlier list during this change.
        let decider = self.decider();
        let before = self.expected.load_full();
        if *before == keys {
            return;
        }
        let unusable = Arc::clone(&self.found.load().unusable);
        if are_same(&before, &keys) && !has_new_proof(&before, &keys, &unusable) {
            self.expected.store(Arc::new(keys));
            return;
        }
        tracing::info!(
            keys = keys.len(),
            "the registered keys changed; the token workers are replaced one after another"
        );
        self.expected.store(Arc::new(keys));
        for link in self.queue.links() {
            link.outdate();
        }
        drop(decider);
        self.start_if_needed();
    }

    /// Returns an error if no worker serves this key. The error says whether the key is missing or wrong.
    pub(super) fn check_key(&self, id: WrappingKeyId) -> Result<(), Error> {
        let found = self.found.load();
        // Before the first worker is ready, the state of the service determines the error.
        if found.wrap.contains_key(&id) || !found.known() {
            return Ok(());
        }
        let unusable = found.unusable.iter().find(|key| key.id == id);
        Err(match unusable.map(|key| &key.problem) {
            Some(KeyProblem::Missing(cause)) => Error::KeyMissing {
                key: id,
                cause: cause.clone(),
            },
            Some(KeyProblem::Untrusted(cause)) => Error::Untrusted(cause.clone()),
            None => Error::UnknownKey(id),
        })
    }

    /// Number of workers that must be replaced.
    pub(super) fn outdated(&self) -> usize {
        let links = self.queue.links();
        links.iter().filter(|link| link.is_outdated()).count()
    }

    /// Gives no more jobs to the oldest worker that must be replaced, and lets this worker end after its jobs.
    pub(super) fn retire_oldest(&self) {
        let links = self.queue.links();
        let outdated = links.iter().filter(|link| link.is_outdated());
        let Some(link) = outdated.min_by_key(|link| link.generation()) else {
            return;
        };
        if self.queue.remove(link.generation()) {
            tracing::info!(
                pid = link.pid(),
                generation = link.generation(),
                "a token worker is retired: another worker has replaced it"
            );
            link.retire();
        }
    }

    /// Marks the other workers for replacement if they lack a key that a new worker found. A worker that found fewer
    /// keys than the other workers is replaced at the next search.
    pub(super) fn outdate_others(&self, decider: &mut Decider, new: &Link) {
        let mut differs = false;
        for link in self.queue.links() {
            if !link.found().has_keys_of(new.found()) {
                link.outdate();
                differs = true;
            }
        }
        if differs {
            decider.recheck = Recheck::default();
        }
    }

    /// Publishes the keys that every worker has. A key that only some workers have is not published yet, because any
    /// worker may get a job for it. While there is no worker, the last published keys remain published.
    pub(super) fn publish_keys(&self) {
        let links = self.queue.links();
        let Some(newest) = links.iter().max_by_key(|link| link.generation()) else {
            return;
        };
        let others = links
            .iter()
            .filter(|link| !link.found().has_keys_of(newest.found()));
        let others: Vec<_> = others.cloned().collect();
        self.found.store(if others.is_empty() {
            Arc::clone(newest.found())
        } else {
            Arc::new(newest.found().shared_with(&others))
        });
    }

    /// Marks one worker for replacement when the next search for missing or wrong keys is due.
    pub(super) fn recheck_keys(&self) {
        let mut decider = self.decider();
        let now = decider.epoch.elapsed();
        let has_unusable = !self.found.load().unusable.is_empty();
        let is_due = decider.recheck.is_due(now, has_unusable);
        let links = self.queue.links();
        if !is_due || links.iter().any(|link| link.is_outdated()) {
            return;
        }
        let first = links
            .iter()
            .min_by_key(|link| (link.found().wrap.len(), link.generation()));
        if let Some(first) = first {
            first.outdate();
        }
    }

    /// Lets the state machine handle outdated workers immediately, without waiting for the next tick.
    fn start_if_needed(&self) {
        self.apply(&mut self.decider(), super::Event::Tick);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A worker that refused a key because of a forged row checks the corrected row at once.
    #[test]
    fn only_an_unusable_key_with_another_proof_is_checked_again() {
        let supervisor = super::super::testing::idle("a", &[WrappingKeyId::from_bytes([1; 16])]);
        let before = supervisor.expected();
        let mut corrected = before.to_vec();
        corrected[0].proofs = vec![keybroker_worker_protocol::Proof {
            message: vec![1],
            mac: [2; 32],
        }];
        let refused = [UnusableKey {
            id: before[0].id,
            problem: KeyProblem::Untrusted("a forged row".to_owned()),
        }];
        assert!(are_same(&before, &corrected));
        assert!(has_new_proof(&before, &corrected, &refused));
        assert!(!has_new_proof(&before, &corrected, &[]));
        assert!(!has_new_proof(&before, &before, &refused));
    }

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_key_is_searched_for_less_and_less_often_until_it_is_there() {
        let mut recheck = Recheck::default();
        let mut searches = Vec::new();
        for second in 0..200 {
            if recheck.is_due(SECOND * second, true) {
                searches.push(second);
            }
        }
        assert_eq!(searches, [2, 6, 14, 30, 62, 122, 182]);
        assert!(!recheck.is_due(SECOND * 1_000, false));
        assert!(!recheck.is_due(SECOND * 1_001, true), "at once");
        assert!(recheck.is_due(SECOND * 1_003, true));
    }
}
