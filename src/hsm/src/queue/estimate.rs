//! Estimates the time of a job on the token: a moving average and its deviation, for each key and kind of job.

use std::{collections::HashMap, time::Duration};

use keybroker_core::key::WrappingKeyId;
use keybroker_worker_protocol::{Work, wire::request::Job};

/// Assumed cost of a job before its kind has been measured.
const UNKNOWN: Duration = Duration::from_millis(1);
/// The weight of a new value is 1/16 in the average and 1/8 in the deviation. The deviation reacts twice as fast as the
/// average (as in RFC 6298).
const AVERAGE_PARTS: u32 = 16;
const DEVIATION_PARTS: u32 = 8;
/// Largest number of kinds of jobs that are measured separately. The limit is rarely reached, because a registry has
/// few keys. Kinds of jobs beyond the limit get the assumed cost.
const KEYS_MAX: usize = 1_024;

/// The kind of job that a caller plans, before the record determines the key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Planned {
    /// An unwrap or a sealed release.
    Unwrap,
    /// Jobs of any kind.
    Any,
}

/// The operations whose times differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Operation {
    /// The job uses only the integrity key.
    Mac,
    /// The job uses the RSA key in addition to the integrity key.
    Unwrap,
    /// The job makes a sealed release.
    Release,
    /// The job unwraps the key material and wraps it again.
    Rewrap,
}

/// The kind of a job: its key and its operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Kind {
    operation: Operation,
    key: WrappingKeyId,
}

impl Kind {
    /// Returns the kind of a job for this wrapping key. For a re-wrap, `key` is the old wrapping key.
    pub(crate) const fn new(key: WrappingKeyId, operation: Operation) -> Self {
        Self { operation, key }
    }

    /// The wrapping key of the job.
    pub(crate) const fn key(self) -> WrappingKeyId {
        self.key
    }

    /// Returns the kind of a job, or `None` for a self-test or a malformed request.
    pub(super) fn of(work: &Work) -> Option<Self> {
        let (operation, key) = match work.job()? {
            Job::Unwrap(job) => (Operation::Unwrap, &job.key_id),
            Job::Release(job) => (Operation::Release, &job.envelope.as_ref()?.key_id),
            Job::Mac(job) => (Operation::Mac, &job.key_id),
            Job::VerifyMac(job) => (Operation::Mac, &job.key_id),
            Job::Rebind(job) => (Operation::Mac, &job.key_id),
            Job::Rewrap(job) => (Operation::Rewrap, &job.envelope.as_ref()?.key_id),
            _ => return None,
        };
        let key = WrappingKeyId::from_bytes(key.as_slice().try_into().ok()?);
        Some(Self { operation, key })
    }

    fn is_unwrap(self) -> bool {
        matches!(self.operation, Operation::Unwrap | Operation::Release)
    }
}

/// The estimated time of one kind of job.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Estimate {
    pub(super) mean: Duration,
    deviation: Duration,
}

impl Estimate {
    pub(super) fn first(spent: Duration) -> Self {
        Self {
            mean: spent,
            deviation: spent / 2,
        }
    }

    pub(super) fn add(&mut self, spent: Duration) {
        let apart = spent.abs_diff(self.mean);
        self.deviation = (self.deviation * (DEVIATION_PARTS - 1) + apart) / DEVIATION_PARTS;
        self.mean = (self.mean * (AVERAGE_PARTS - 1) + spent) / AVERAGE_PARTS;
    }

    /// Returns an upper estimate of the time, which only few jobs exceed.
    pub(super) fn upper(&self) -> Duration {
        self.mean + self.deviation * 2
    }
}

/// The estimates for all kinds of jobs.
#[derive(Debug, Default)]
pub(super) struct Estimates(HashMap<Kind, Estimate>);

impl Estimates {
    /// Records the time for which a job occupied a session.
    pub(super) fn add(&mut self, kind: Kind, spent: Duration) {
        if let Some(known) = self.0.get_mut(&kind) {
            known.add(spent);
        } else if self.0.len() < KEYS_MAX {
            self.0.insert(kind, Estimate::first(spent));
        }
    }

    /// Returns the estimate for one kind of job.
    pub(super) fn of(&self, kind: Option<Kind>) -> Estimate {
        kind.and_then(|kind| self.0.get(&kind))
            .copied()
            .unwrap_or(Estimate {
                mean: UNKNOWN,
                deviation: Duration::ZERO,
            })
    }

    /// Returns the lowest mean time and the lowest upper time of all jobs that the caller may plan. A job that would
    /// miss its deadline with this estimate would miss its deadline with every estimate. Re-wraps are ignored, because
    /// callers do not plan them.
    ///
    /// For a planned unwrap, the function uses only measured unwraps, if an unwrap was measured. The cost that is
    /// assumed for a kind of job without measurements is lower. With this lower cost, the check on arrival would accept
    /// nearly every call that the queue refuses later.
    pub(super) fn least(&self, planned: Planned) -> Estimate {
        let unknown = self.of(None);
        let unwraps = || self.0.iter().filter(|(kind, _)| kind.is_unwrap());
        let only_unwraps = planned == Planned::Unwrap && unwraps().next().is_some();
        let known = || {
            let all = self
                .0
                .iter()
                .filter(|(kind, _)| kind.is_unwrap() || !only_unwraps);
            let unknown = (!only_unwraps).then_some(&unknown);
            all.map(|(_, known)| known).chain(unknown)
        };
        let mean = known().map(|known| known.mean).min().unwrap_or_default();
        let upper = known().map(Estimate::upper).min().unwrap_or_default();
        Estimate {
            mean,
            deviation: upper.saturating_sub(mean) / 2,
        }
    }

    /// Returns the mean time of the most expensive kind of job.
    pub(super) fn most(&self) -> Duration {
        let means = self.0.values().map(|known| known.mean);
        means.max().unwrap_or_default().max(UNKNOWN)
    }
}

#[cfg(test)]
mod tests {
    use keybroker_worker_protocol::wire::{SelfTest, Unwrap, VerifyMac};

    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn unwrap(key: u8) -> Work {
        Work::new(Job::Unwrap(Unwrap {
            key_id: vec![key; 16],
            ..Unwrap::default()
        }))
    }

    #[test]
    fn each_key_and_kind_has_its_own_average() {
        let mac = Work::new(Job::VerifyMac(VerifyMac {
            key_id: vec![1; 16],
            ..VerifyMac::default()
        }));
        let mut estimates = Estimates::default();
        for _ in 0..200 {
            estimates.add(Kind::of(&unwrap(1)).unwrap(), MS * 20);
            estimates.add(Kind::of(&unwrap(2)).unwrap(), MS * 4);
            estimates.add(Kind::of(&mac).unwrap(), MS * 2);
        }
        let mean = |work: &Work| estimates.of(Kind::of(work)).mean.as_millis();
        assert_eq!((mean(&unwrap(1)), mean(&unwrap(2)), mean(&mac)), (20, 4, 2));
        assert_eq!(estimates.of(Kind::of(&unwrap(3))).mean, UNKNOWN);
        // The lower bound of any job includes keys without an estimate.
        assert_eq!(estimates.least(Planned::Any).mean, UNKNOWN);
        assert_eq!(estimates.least(Planned::Unwrap).mean.as_millis(), 4);
        let nothing = Estimates::default();
        assert_eq!(nothing.least(Planned::Unwrap).mean, UNKNOWN);
        assert_eq!(estimates.most().as_millis(), 20);
    }

    #[test]
    fn the_upper_time_follows_the_deviation_and_returns() {
        let mut estimate = Estimate::first(MS * 20);
        for _ in 0..100 {
            estimate.add(MS * 20);
        }
        assert!(estimate.upper() < MS * 21, "{estimate:?}");
        // One outlier increases the average only a little, but the upper time a lot.
        estimate.add(MS * 500);
        assert!(
            estimate.mean < MS * 51 && estimate.upper() > MS * 100,
            "{estimate:?}"
        );
        for _ in 0..100 {
            estimate.add(MS * 20);
        }
        assert!(estimate.upper() < MS * 25, "{estimate:?}");
    }

    #[test]
    fn a_self_test_and_a_malformed_request_have_no_kind() {
        assert_eq!(Kind::of(&Work::new(Job::SelfTest(SelfTest {}))), None);
        assert_eq!(Kind::of(&Work::new(Job::Unwrap(Unwrap::default()))), None);
    }
}
