//! The attempts to run one job on several tokens.

use std::{
    future::poll_fn,
    pin::Pin,
    task::Poll,
    time::{Duration, Instant},
};

use keybroker_core::call::Deadline;

use crate::{Error, job::Output};

/// A token counts as late only after this time or after a third of the job's remaining time,
/// whichever is shorter.
const PATIENCE_MIN: Duration = Duration::from_millis(250);
const PATIENCE_MIN_PARTS: u32 = 3;
/// A token counts as late if its answer takes longer than the expected time multiplied by this
/// factor.
const PATIENCE_FACTOR: u32 = 4;
/// Half of the remaining time is reserved for another token, unless the expected time is longer.
const PATIENCE_MAX_PARTS: u32 = 2;
/// Interval at which a waiting job looks for another token.
pub(super) const AGAIN: Duration = Duration::from_millis(50);

type Running<'a> = Pin<Box<dyn Future<Output = Result<Output, Error>> + Send + 'a>>;

/// The attempts of one job.
#[derive(Default)]
pub(super) struct Attempts<'a> {
    /// The tokens that were given the job, in the order of the attempts.
    tried: Vec<usize>,
    running: Vec<(usize, Running<'a>)>,
    /// The failure to report if no token does the job.
    error: Option<Error>,
}

/// The result of an attempt.
#[derive(Debug)]
pub(super) enum Done {
    /// The attempt has a result for the caller.
    Answered(Result<Output, Error>),
    /// The token could not do the job, and another token may be able to do it.
    Failed(usize, Error),
    /// The token that was tried last has not answered in time.
    Late(usize),
}

impl<'a> Attempts<'a> {
    pub(super) fn tried(&self) -> &[usize] {
        &self.tried
    }

    pub(super) fn begin(&mut self, member: usize) {
        self.tried.push(member);
    }

    pub(super) fn run(&mut self, member: usize, job: Running<'a>) {
        self.running.push((member, job));
    }

    pub(super) fn are_running(&self) -> bool {
        !self.running.is_empty()
    }

    /// Returns the token that was tried last.
    pub(super) fn latest(&self) -> usize {
        self.tried.last().copied().unwrap_or_default()
    }

    /// Waits until an attempt ends.
    pub(super) async fn first_done(&mut self) -> Done {
        poll_fn(|context| {
            for at in 0..self.running.len() {
                let Poll::Ready(result) = self.running[at].1.as_mut().poll(context) else {
                    continue;
                };
                let (member, _) = self.running.swap_remove(at);
                return Poll::Ready(match result {
                    Err(error) if is_of_the_token(&error) => Done::Failed(member, error),
                    result => Done::Answered(result),
                });
            }
            Poll::Pending
        })
        .await
    }

    /// Stores the failure if it is more informative for the caller than the stored failure. A caller can usefully retry
    /// after a full queue or an unavailable token.
    pub(super) fn fail(&mut self, error: Error) {
        let rank = |error: &Error| match error {
            Error::QueueFull { .. } => 3,
            Error::Down { .. } => 2,
            Error::Untrusted(_) => 1,
            _ => 0,
        };
        let is_better = self
            .error
            .as_ref()
            .is_none_or(|kept| rank(&error) > rank(kept));
        if is_better {
            self.error = Some(error);
        }
    }

    /// Returns the error for the caller after every attempt has failed.
    pub(super) fn error(self) -> Error {
        self.error.unwrap_or(Error::Deadline)
    }
}

/// Whether another token may do the job although this token failed. The other errors concern the job itself.
fn is_of_the_token(error: &Error) -> bool {
    match error {
        Error::QueueFull { .. }
        | Error::Down { .. }
        | Error::Untrusted(_)
        | Error::KeyMissing { .. }
        | Error::UnknownKey(_) => true,
        Error::MacRefused
        | Error::Damaged(_)
        | Error::Recipient(_)
        | Error::RecipientAlgorithm(_)
        | Error::Deadline => false,
    }
}

/// Returns the time that a job waits for one token before another token also gets the job. `expected` is `None` if the
/// job waits for a worker.
pub(super) fn patience(expected: Option<Duration>, deadline: Deadline) -> Duration {
    let Some(expected) = expected else {
        return AGAIN;
    };
    let left = deadline.instant().saturating_duration_since(Instant::now());
    let least = PATIENCE_MIN.min(left / PATIENCE_MIN_PARTS);
    // A token does not count as late only because its expected time is long, even if little time remains for another
    // token.
    let most = (left / PATIENCE_MAX_PARTS).max(expected + expected / 2);
    (expected * PATIENCE_FACTOR).min(most).max(least)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn patience_follows_the_expected_time_and_the_deadline() {
        for (expected, left, patience_ms) in [
            // A fast token also gets the minimum time.
            (10, 5_000, 250..=250),
            // A short deadline leaves time for another token.
            (10, 300, 90..=100),
            (500, 5_000, 1_990..=2_000),
            (1_000, 5_000, 2_490..=2_500),
            // A long wait in the queue alone does not give the job to two tokens.
            (4_000, 5_000, 6_000..=6_000),
        ] {
            let deadline = Deadline::after(MS * left);
            let found = patience(Some(MS * expected), deadline).as_millis();
            assert!(
                patience_ms.contains(&found),
                "{expected} of {left}: {found}"
            );
        }
        assert_eq!(patience(None, Deadline::after(MS * 5_000)), AGAIN);
    }

    #[test]
    fn the_failure_that_passes_soonest_is_reported() {
        let mut attempts = Attempts::default();
        attempts.fail(Error::Untrusted("a".to_owned()));
        attempts.fail(Error::QueueFull { retry_after: MS });
        attempts.fail(Error::Down {
            cause: "b".to_owned(),
            retry_after: MS,
        });
        assert!(matches!(attempts.error(), Error::QueueFull { .. }));
    }
}
