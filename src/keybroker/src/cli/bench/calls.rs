//! One call of a measurement, and the outcomes of many calls.

use std::time::{Duration, Instant};

use keybroker_client::{Client, Error, ErrorKind, Reason};

use crate::cli::client::refusal;

use super::{latencies::Latencies, users::User};

/// The outcome of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// The enrolled key was released before the deadline.
    InTime,
    /// No answer arrived before the deadline.
    Late,
    /// The broker refused the call because of its load, or because the caller made too many calls.
    Refused,
    /// The call failed for a reason other than load or its deadline.
    Failed,
}

/// A finished call.
#[derive(Clone, Debug)]
pub(super) struct Done {
    pub(super) outcome: Outcome,
    /// Time since the call was due.
    pub(super) took: Duration,
    /// Delay between the due time of the call and the time when the call was sent.
    pub(super) dispatch: Duration,
    pub(super) at: Instant,
    /// The error of a call that did not release the key in time.
    pub(super) error: Option<String>,
}

/// Releases the key of a user. The deadline and the measured duration count from the time when the
/// call was due. Therefore, a call that could not be sent in time counts as a slow call.
pub(super) async fn unwrap(client: &Client, user: &User, due: Instant, deadline: Duration) -> Done {
    let dispatch = due.elapsed();
    let answer = release(client, user, deadline.saturating_sub(dispatch)).await;
    let at = Instant::now();
    let took = at.saturating_duration_since(due);
    let (outcome, error) = match answer {
        Ok(false) => (
            Outcome::Failed,
            Some("a released key differs from the enrolled key".to_owned()),
        ),
        Ok(_) if took <= deadline => (Outcome::InTime, None),
        Ok(_) => (Outcome::Late, Some("an answer came too late".to_owned())),
        Err(error) => (outcome(&error), Some(refusal::failure(&error).message)),
    };
    Done {
        outcome,
        took,
        dispatch,
        at,
        error,
    }
}

/// Releases the key, sealed if there is a recipient. Returns whether the enrolled key was released.
async fn release(client: &Client, user: &User, deadline: Duration) -> Result<bool, Error> {
    let Some(recipient) = &user.recipient else {
        let released = client.unwrap_user_key(&user.key).deadline(deadline).await?;
        return Ok(released.key_material.expose() == user.material.expose());
    };
    let sealed = client
        .unwrap_user_key_for(&user.key, recipient.public_key())
        .deadline(deadline)
        .await?;
    Ok(recipient.opens(&sealed, &user.material))
}

fn outcome(error: &Error) -> Outcome {
    if error.kind() == ErrorKind::DeadlineExceeded {
        return Outcome::Late;
    }
    match error.reason() {
        Some(Reason::QueueFull | Reason::Rate) => Outcome::Refused,
        Some(Reason::Deadline) => Outcome::Late,
        _ => Outcome::Failed,
    }
}

/// The outcomes of many calls. Every call is counted once.
#[derive(Clone, Debug)]
pub(super) struct Tally {
    pub(super) in_time: u64,
    pub(super) late: u64,
    pub(super) refused: u64,
    pub(super) failed: u64,
    /// The error of the first call whose outcome is not [`Outcome::InTime`].
    pub(super) first_error: String,
    /// The error of the first call with the outcome [`Outcome::Failed`].
    pub(super) first_failure: String,
    /// Durations of the calls with the outcome [`Outcome::InTime`].
    pub(super) answers: Latencies,
    /// Durations of the refused calls.
    pub(super) refusals: Latencies,
    /// Delays between the due times of the calls and the times when the calls were sent.
    pub(super) dispatch: Latencies,
}

impl Tally {
    pub(super) fn new() -> Self {
        Self {
            in_time: 0,
            late: 0,
            refused: 0,
            failed: 0,
            first_error: String::new(),
            first_failure: String::new(),
            answers: Latencies::new(),
            refusals: Latencies::new(),
            dispatch: Latencies::new(),
        }
    }

    /// Counts a call.
    pub(super) fn count(&mut self, done: Done) {
        self.dispatch.record(done.dispatch);
        match done.outcome {
            Outcome::InTime => {
                self.in_time += 1;
                self.answers.record(done.took);
            }
            Outcome::Late => self.late += 1,
            Outcome::Refused => {
                self.refused += 1;
                self.refusals.record(done.took);
            }
            Outcome::Failed => self.failed += 1,
        }
        let Some(error) = done.error else { return };
        if done.outcome == Outcome::Failed && self.first_failure.is_empty() {
            self.first_failure.clone_from(&error);
        }
        if self.first_error.is_empty() {
            self.first_error = error;
        }
    }

    /// Adds the counts of another tally.
    pub(super) fn add(&mut self, other: &Self) {
        self.in_time += other.in_time;
        self.late += other.late;
        self.refused += other.refused;
        self.failed += other.failed;
        for (ours, theirs) in [
            (&mut self.first_error, &other.first_error),
            (&mut self.first_failure, &other.first_failure),
        ] {
            if ours.is_empty() {
                ours.clone_from(theirs);
            }
        }
        self.answers.add(&other.answers);
        self.refusals.add(&other.refusals);
        self.dispatch.add(&other.dispatch);
    }

    /// The number of calls.
    pub(super) fn calls(&self) -> u64 {
        self.answered() + self.errors()
    }

    /// The number of calls that were answered in time.
    pub(super) fn answered(&self) -> u64 {
        self.in_time
    }

    /// The number of calls that were not answered in time.
    pub(super) fn errors(&self) -> u64 {
        self.late + self.refused + self.failed
    }

    /// An error message if calls failed for a reason other than load.
    pub(super) fn failure(&self) -> Option<String> {
        let (count, first) = (self.failed, &self.first_failure);
        (count > 0)
            .then(|| format!("{count} calls failed; the error of the first failed call: {first}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn done(outcome: Outcome, milliseconds: u64, error: Option<&str>) -> Done {
        Done {
            outcome,
            took: Duration::from_millis(milliseconds),
            dispatch: Duration::ZERO,
            at: Instant::now(),
            error: error.map(str::to_owned),
        }
    }

    #[test]
    fn every_call_is_counted_once_and_only_answers_in_time_are_latencies() {
        let mut tally = Tally::new();
        tally.count(done(Outcome::InTime, 10, None));
        tally.count(done(Outcome::Late, 900, Some("late")));
        tally.count(done(Outcome::Refused, 2, Some("QUEUE_FULL")));
        tally.count(done(Outcome::Failed, 3, Some("BUG")));
        let mut all = Tally::new();
        all.add(&tally);
        all.add(&tally);
        assert_eq!((all.calls(), all.answered(), all.errors()), (8, 2, 6));
        assert_eq!((all.answers.count(), all.refusals.count()), (2, 2));
        assert!(all.answers.max_ms().is_some_and(|ms| ms < 11.0));
        assert_eq!(all.first_error, "late");
        assert_eq!(
            all.failure().unwrap(),
            "2 calls failed; the error of the first failed call: BUG"
        );
        assert_eq!(Tally::new().failure(), None);
    }
}
