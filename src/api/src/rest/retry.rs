//! Retries calls during short outages, because a Bitwarden client logs its user out after an error.

use std::time::{Duration, Instant};

use keybroker_core::{
    call::{Call, CallId, Deadline},
    error::{Error, Reason},
    metrics,
};

use super::places::RetryPlaces;

/// Longest time for all retries of one request. Clients and proxies wait at least half a minute for
/// an answer.
const RETRY_TIME_MAX: Duration = Duration::from_secs(8);
/// Maximum number of retries of one request, over all calls that the request needs.
const REPETITIONS_MAX: u32 = 5;
/// Time limit of one attempt. The next attempt may use another worker or another database connection.
const TRY: Duration = Duration::from_secs(5);
/// Pause before the first retry. The pause doubles before each further retry. The sum of all pauses is slightly less than
/// [`RETRY_TIME_MAX`].
const FIRST_PAUSE: Duration = Duration::from_millis(250);
/// Minimum time for an attempt; if less time is left, no attempt begins.
const LEFT_FOR_A_TRY: Duration = Duration::from_millis(500);

/// The state of the retries of one request. A request may need several calls, which share the time and the number of retries.
///
/// Each attempt is a separate call in the audit log. Therefore an audit entry with an unknown
/// outcome belongs to exactly one change.
pub(super) struct Retry<'p> {
    request: Call,
    until: Instant,
    repetitions: u32,
    places: RetryPlaces,
    /// The name of the principal of the request.
    principal: &'p str,
    /// The id of the last call; `None` before the first call.
    last: Option<CallId>,
}

impl<'p> Retry<'p> {
    /// Prepares the retries of a request by `principal`. The first call has the id of the request.
    pub(super) fn new(request: Call, places: RetryPlaces, principal: &'p str) -> Self {
        let until = Instant::now() + RETRY_TIME_MAX;
        Self {
            until: request.deadline.instant().min(until),
            request,
            repetitions: 0,
            places,
            principal,
            last: None,
        }
    }

    /// Returns the id of the last call. The result of the last call determines the answer to the request.
    pub(super) fn last(&self) -> CallId {
        self.last.unwrap_or(self.request.id)
    }

    /// Makes a call, and repeats the call while its error is transient and a further retry is permitted.
    pub(super) async fn ask<T, F>(&mut self, mut attempt: impl FnMut(Call) -> F) -> Result<T, Error>
    where
        F: Future<Output = Result<T, Error>>,
    {
        let mut is_outcome_unknown = false;
        loop {
            let mut error = match attempt(self.next()).await {
                Ok(answer) => return Ok(answer),
                Err(error) => error,
            };
            // If an earlier attempt may have made the change, the outcome stays unknown even if a later attempt is refused.
            is_outcome_unknown |= error.is_outcome_unknown();
            if is_outcome_unknown {
                error = error.outcome_unknown();
            }
            let Some(pause) = self.pause(&error) else {
                return Err(error);
            };
            let Some(_place) = self.places.take(self.principal) else {
                metrics::REST_RETRIES_REFUSED.increment();
                return Err(error);
            };
            let (first, id) = (self.request.id, self.last());
            tracing::info!(request = %first, call_id = %id, %error, "retrying after a short outage");
            metrics::REST_RETRIES
                .with([error.reason().as_str()])
                .increment(1);
            let _counted = Paused::new();
            tokio::time::sleep(pause).await;
        }
    }

    /// Returns the call for the next attempt.
    fn next(&mut self) -> Call {
        let id = match self.last {
            None => self.request.id,
            Some(_) => CallId::fresh(),
        };
        if self.last.is_some() {
            tracing::debug!(
                request = %self.request.id, call_id = %id,
                "the broker tries the REST request again with a new call id"
            );
        }
        self.last = Some(id);
        let deadline = self.request.deadline.instant();
        Call {
            id,
            deadline: Deadline::at(deadline.min(Instant::now() + TRY)),
            ..self.request.clone()
        }
    }

    /// Returns the pause before the next attempt, or `None` if no further attempt is permitted.
    /// After `QUEUE_FULL`, the pause is at least as long as the broker's retry delay if enough time
    /// is left.
    fn pause(&mut self, error: &Error) -> Option<Duration> {
        if !is_transient(error.reason()) || self.repetitions == REPETITIONS_MAX {
            return None;
        }
        let left = self.until.saturating_duration_since(Instant::now());
        let longest = left.checked_sub(LEFT_FOR_A_TRY)?;
        let pause = FIRST_PAUSE * (1 << self.repetitions);
        self.repetitions += 1;
        let asked = match error.reason() {
            Reason::QueueFull => error.retry_delay().unwrap_or_default(),
            _ => Duration::ZERO,
        };
        Some(jittered(pause).max(asked).min(longest))
    }
}

/// A request counts as waiting until this value is dropped. The value is also dropped if the task
/// of the request ends.
struct Paused;

impl Paused {
    fn new() -> Self {
        metrics::REST_RETRIES_WAITING.handle().increment(1.0);
        Self
    }
}

impl Drop for Paused {
    fn drop(&mut self) {
        metrics::REST_RETRIES_WAITING.handle().decrement(1.0);
    }
}

/// Chooses a random pause between four fifths of `pause` and the full `pause`. Because the pause is
/// random, callers that failed at the same time retry at different times.
fn jittered(pause: Duration) -> Duration {
    let [.., random] = *CallId::fresh().as_bytes();
    pause * 4 / 5 + pause * u32::from(random) / (5 * 256)
}

/// Whether a call that failed for this reason may soon succeed on a retry. `RATE` is not transient,
/// because the caller itself must send fewer requests. `DEADLINE` is transient, because perhaps
/// only the time limit of one attempt has passed.
#[deny(clippy::wildcard_enum_match_arm)]
const fn is_transient(reason: Reason) -> bool {
    match reason {
        Reason::QueueFull
        | Reason::TokenDown
        | Reason::StoreDown
        | Reason::AuditDown
        | Reason::IdentityDown
        | Reason::Deadline => true,
        Reason::Request
        | Reason::RequestIdReused
        | Reason::Credential
        | Reason::Policy
        | Reason::KeyNotFound
        | Reason::KeyExists
        | Reason::Revision
        | Reason::RecordDamaged
        | Reason::EnvelopeRejected
        | Reason::KeyState
        | Reason::ReleaseForm
        | Reason::ApprovalNeeded
        | Reason::ApprovalState
        | Reason::DeviceNotFound
        | Reason::DeviceState
        | Reason::DeviceSignature
        | Reason::AccessCode
        | Reason::Limit
        | Reason::Rate
        | Reason::FailureBudget
        | Reason::TokenUntrusted
        | Reason::Bug => false,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    fn call(timeout: Duration) -> Call {
        Call::start("127.0.0.1:1", Deadline::after(timeout))
    }

    fn places() -> RetryPlaces {
        RetryPlaces::new(8)
    }

    fn queue_full() -> Error {
        Error::new(Reason::QueueFull, "").retry_after(Duration::from_millis(1))
    }

    fn retry(timeout: Duration) -> Retry<'static> {
        Retry::new(call(timeout), places(), "alice")
    }

    #[tokio::test]
    async fn a_short_outage_is_waited_out_with_an_id_for_each_try() {
        let mut ids = HashSet::new();
        let request = call(Duration::from_secs(30));
        let mut retry = Retry::new(request.clone(), places(), "alice");
        let answer = retry.ask(|call| {
            ids.insert(call.id);
            let outage = (ids.len() < 4).then(|| Error::new(Reason::StoreDown, "unavailable"));
            async { outage.map_or(Ok(7), Err) }
        });
        assert_eq!(answer.await.unwrap(), 7);
        assert_eq!(ids.len(), 4);
        assert!(ids.contains(&request.id));
        assert!(ids.contains(&retry.last()) && retry.last() != request.id);
    }

    #[tokio::test]
    async fn an_unknown_outcome_of_an_earlier_try_is_not_forgotten() {
        for is_unknown in [true, false] {
            let mut tries = 0;
            let mut retry = retry(Duration::from_secs(30));
            let answer = retry.ask(|_| {
                tries += 1;
                let error = match tries {
                    1 if is_unknown => Error::new(Reason::StoreDown, "").outcome_unknown(),
                    1 => Error::new(Reason::StoreDown, ""),
                    _ => Error::new(Reason::TokenUntrusted, ""),
                };
                async { Err::<(), _>(error) }
            });
            let error = answer.await.unwrap_err();
            assert_eq!(error.reason(), Reason::TokenUntrusted);
            assert_eq!(error.is_outcome_unknown(), is_unknown);
        }
    }

    /// Each step is a separate call, even if no attempt fails.
    #[tokio::test]
    async fn every_step_has_an_id_and_a_deadline_of_its_own() {
        let request = call(Duration::from_secs(30));
        let mut retry = Retry::new(request.clone(), places(), "alice");
        let mut ids = HashSet::new();
        for _ in 0..4 {
            let step = retry.ask(|call| async { Ok(call) }).await.unwrap();
            assert!(ids.insert(step.id));
            assert!(step.deadline.remaining() <= TRY);
        }
        assert!(ids.contains(&request.id));
        let short = call(Duration::from_secs(1));
        let step = Retry::new(short.clone(), places(), "alice").next();
        assert_eq!(step.deadline, short.deadline);
    }

    #[tokio::test]
    async fn what_waiting_does_not_change_is_answered_at_once() {
        for reason in Reason::ALL {
            let mut tries = 0;
            let mut retry = retry(Duration::from_secs(30));
            let answer = retry.ask(|_| {
                tries += 1;
                let first = (tries == 1).then(|| Error::new(reason, ""));
                async { first.map_or(Ok(()), Err) }
            });
            assert_eq!(answer.await.is_ok(), is_transient(reason), "{reason}");
        }
    }

    /// The limit of retries applies to all steps of a request together.
    #[test]
    fn repetitions_are_counted() {
        let mut retry = retry(Duration::from_secs(30));
        let pauses: Vec<Duration> = std::iter::from_fn(|| retry.pause(&queue_full())).collect();
        assert_eq!(pauses.len(), 5);
        assert!(pauses.is_sorted());
        assert_eq!(retry.pause(&Error::new(Reason::Deadline, "")), None);
    }

    #[tokio::test]
    async fn an_outage_that_lasts_is_answered_before_the_deadline() {
        for reason in [Reason::TokenDown, Reason::Deadline] {
            let call = call(Duration::from_millis(900));
            let mut retry = Retry::new(call.clone(), places(), "alice");
            let answer = retry.ask(|_| async { Err::<(), _>(Error::new(reason, "unavailable")) });
            assert_eq!(answer.await.unwrap_err().reason(), reason);
            assert!(!call.deadline.remaining().is_zero());
        }
    }

    #[test]
    fn pauses_fill_the_retry_time_and_differ() {
        let all: Duration = (0..REPETITIONS_MAX)
            .map(|round| FIRST_PAUSE * (1 << round))
            .sum();
        assert!(all < RETRY_TIME_MAX && all + LEFT_FOR_A_TRY >= RETRY_TIME_MAX);
        let pauses: HashSet<Duration> = (0..64).map(|_| jittered(FIRST_PAUSE)).collect();
        assert!(pauses.len() > 8);
        for pause in pauses {
            assert!((FIRST_PAUSE * 4 / 5..FIRST_PAUSE).contains(&pause));
        }
    }

    /// A request that gets no place is answered with the error of its first attempt.
    #[tokio::test]
    async fn waiting_requests_cannot_fill_the_broker() {
        let places = RetryPlaces::new(1);
        let mut taken = places.take("bob");
        assert!(taken.is_some());
        for is_free in [false, true] {
            let mut tries = 0;
            let mut retry = Retry::new(call(Duration::from_secs(30)), places.clone(), "alice");
            let answer = retry.ask(|_| {
                tries += 1;
                let full = (tries == 1).then(queue_full);
                async { full.map_or(Ok(()), Err) }
            });
            assert_eq!(answer.await.is_ok(), is_free);
            assert_eq!(tries, if is_free { 2 } else { 1 });
            taken = None;
        }
        assert!(taken.is_none() && places.take("bob").is_some());
    }

    /// The pause is at least as long as the broker's retry delay.
    #[test]
    fn a_full_queue_is_left_alone_for_as_long_as_it_asks() {
        let mut retry = retry(Duration::from_secs(30));
        let asked = Duration::from_secs(2);
        let error = Error::new(Reason::QueueFull, "").retry_after(asked);
        assert!(retry.pause(&error).unwrap() >= asked);
    }
}
