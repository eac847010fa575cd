//! Calls that were refused because the token or the database cannot do the work in time. An
//! overload causes so many refusals that the broker cannot write an audit entry and a log line for
//! each refusal. Therefore the refusals are counted for each principal and action, and the counts
//! are recorded once a second. A refused call does not release or change anything.
//!
//! A broker that is killed loses the counts of the last second.
//!
//! Mitigation: M8 of `THREAT_MODEL.md`.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use futures_util::future::join_all;

use keybroker_audit::{Entry, EntryKind, Outcome};
use keybroker_core::{
    error::{Error, Reason},
    key::Tenant,
};

use super::Broker;

/// Largest number of pairs of principal and action that are counted separately within a second.
/// When this number is reached, all further principals share one audit entry for each action. An
/// audit entry has about 300 bytes, so an hour of overload by many principals adds less than 80 MB
/// to the audit log.
const CALLERS_MAX: usize = 64;

/// The principal and action of refused calls. The principal is `None` in a count that several principals share.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Refused {
    principal: Option<(String, Tenant)>,
    action: String,
}

/// The refusals of the current second.
#[derive(Debug, Default)]
pub(super) struct Overload(Mutex<HashMap<Refused, Count>>);

#[derive(Debug)]
struct Count {
    calls: u64,
    /// The reason why the first of the counted calls was refused.
    cause: String,
}

impl Overload {
    fn counts(&self) -> MutexGuard<'_, HashMap<Refused, Count>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn note(&self, principal: Option<(String, Tenant)>, action: &str, error: &Error) {
        let refused = Refused {
            principal,
            action: action.to_owned(),
        };
        self.add(refused, 1, || error.to_string());
    }

    fn add(&self, mut refused: Refused, calls: u64, cause: impl FnOnce() -> String) {
        let mut counts = self.counts();
        if counts.len() >= CALLERS_MAX && !counts.contains_key(&refused) {
            refused.principal = None;
        }
        let count = counts.entry(refused).or_insert_with(|| Count {
            calls: 0,
            cause: cause(),
        });
        count.calls = count.calls.saturating_add(calls);
    }

    fn take(&self) -> HashMap<Refused, Count> {
        std::mem::take(&mut self.counts())
    }
}

/// Whether refusals with this error are counted and not recorded individually.
pub(super) fn is_overload(error: &Error) -> bool {
    error.reason() == Reason::QueueFull
}

impl Broker {
    /// Writes one entry for each principal and action, and one log line with the principal that had the most refused
    /// calls. Counts that cannot be written are kept for the next attempt.
    pub(super) async fn flush_overload(&self) {
        let refused = self.overload.take();
        let Some((most, Count { cause, .. })) = refused.iter().max_by_key(|(_, count)| count.calls)
        else {
            return;
        };
        let calls: u64 = refused.values().map(|count| count.calls).sum();
        let principal = most.principal.as_ref().map_or("others", |(name, _)| name);
        tracing::warn!(
            calls,
            principal,
            action = most.action,
            cause,
            "calls were refused: the token or the database cannot do the work in time"
        );
        join_all(refused.into_iter().map(async |(refused, count)| {
            let Count { calls, cause } = count;
            let (name, tenant) = refused.principal.clone().unzip();
            let mut entry =
                Entry::new(EntryKind::Decision, refused.action.clone(), Outcome::Failed);
            entry.reason = Some(Reason::QueueFull);
            entry.principal = name;
            entry.tenant = tenant;
            entry.count = Some(calls);
            if self.audit.append(entry).await.is_err() {
                self.overload.add(refused, calls, || cause);
            }
        }))
        .await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn callers_beyond_the_limit_share_a_count() {
        let overload = Overload::default();
        let error = Error::new(Reason::QueueFull, "busy");
        for number in 0..CALLERS_MAX + 40 {
            for _ in 0..2 {
                let principal = (format!("principal{number}"), Tenant::default());
                overload.note(Some(principal), "user_key.unwrap", &error);
            }
        }
        let counts = overload.take();
        assert_eq!(counts.len(), CALLERS_MAX + 1);
        let others = counts
            .iter()
            .find(|(refused, _)| refused.principal.is_none());
        assert_eq!(others.unwrap().1.calls, 80);
        let total: u64 = counts.values().map(|count| count.calls).sum();
        assert_eq!(total, 2 * (u64::try_from(CALLERS_MAX).unwrap() + 40));
        assert!(overload.take().is_empty());
    }
}
