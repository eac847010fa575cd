//! The retry rule of `docs/errors.md`.

use std::time::{Duration, Instant};

use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use keybroker_core::{call::spread, error::Reason};

/// How long a call is tried, from its first attempt on.
const TRY_FOR: Duration = Duration::from_secs(10);
const PAUSE_MIN: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(1);
/// Further attempts after the connection ended. It also ends for a certificate that the broker does not accept, which no
/// attempt changes.
const CONNECTIONS_MAX: u32 = 2;

/// One call and its further attempts.
#[derive(Debug)]
pub(super) struct Retry {
    until: Instant,
    pause: Duration,
    connections: u32,
}

impl Retry {
    /// Begins now; `timeout` is what the person allows for the call and its further attempts.
    pub(super) fn begin(timeout: Duration) -> Self {
        Self {
            until: Instant::now() + timeout.min(TRY_FOR),
            pause: PAUSE_MIN,
            connections: 0,
        }
    }

    /// Returns the pause before the next attempt, or nothing when the status is final or the time does not suffice.
    pub(super) fn pause(&mut self, status: &Status) -> Option<Duration> {
        let details = status.get_error_details();
        match details.error_info() {
            Some(info) if is_passing(&info.reason) => {}
            Some(_) => return None,
            None => {
                self.connections += 1;
                if self.connections > CONNECTIONS_MAX || !is_of_connection(status) {
                    return None;
                }
            }
        }
        let asked = details.retry_info().and_then(|info| info.retry_delay);
        // Half to one and a half of it.
        let own = spread(self.pause / 2, self.pause);
        let pause = own.max(asked.unwrap_or_default());
        self.pause = (self.pause * 2).min(PAUSE_MAX);
        (Instant::now() + pause < self.until).then_some(pause)
    }
}

fn is_passing(reason: &str) -> bool {
    [
        Reason::QueueFull,
        Reason::Rate,
        Reason::TokenDown,
        Reason::StoreDown,
        Reason::AuditDown,
        Reason::IdentityDown,
        Reason::Deadline,
    ]
    .iter()
    .any(|passing| passing.as_str() == reason)
}

/// Not when the time of the call itself has run out.
fn is_of_connection(status: &Status) -> bool {
    match status.code() {
        Code::Unavailable | Code::Unknown => true,
        Code::Internal => status.message().contains("h2 protocol error"),
        Code::Cancelled => !status.message().contains("Timeout expired"),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use tonic_types::ErrorDetails;

    use super::*;

    const LONG: Duration = Duration::from_mins(1);

    fn status(reason: Reason, delay: Option<Duration>) -> Status {
        let mut details =
            ErrorDetails::with_error_info(reason.as_str(), "keybroker.v1", HashMap::new());
        details.set_retry_info(delay);
        Status::with_error_details(Code::Unavailable, "text", details)
    }

    #[test]
    fn reasons_that_pass_are_tried_again_and_others_are_not() {
        let tried = |reason| Retry::begin(LONG).pause(&status(reason, None)).is_some();
        let passing: Vec<_> = Reason::ALL
            .into_iter()
            .filter(|reason| tried(*reason))
            .collect();
        assert_eq!(
            passing,
            [
                Reason::QueueFull,
                Reason::Rate,
                Reason::TokenDown,
                Reason::StoreDown,
                Reason::AuditDown,
                Reason::IdentityDown,
                Reason::Deadline,
            ]
        );
    }

    /// The documented rule outlasts the replacement of a worker, which takes tenths of a second.
    #[test]
    fn pauses_grow_and_last_for_seconds() {
        let mut retry = Retry::begin(LONG);
        let mut sum = Duration::ZERO;
        for attempt in 0..12 {
            let pause = retry.pause(&status(Reason::TokenDown, None)).unwrap();
            let planned = (PAUSE_MIN * (1 << attempt.min(10))).min(PAUSE_MAX);
            assert!(
                pause >= planned / 2 && pause <= planned * 3 / 2,
                "{pause:?}"
            );
            sum += pause;
        }
        assert!(sum > Duration::from_secs(4), "{sum:?}");
    }

    #[test]
    fn the_broker_may_ask_for_more_but_not_for_more_than_there_is() {
        let delay = Duration::from_secs(2);
        let asked = status(Reason::TokenDown, Some(delay));
        assert_eq!(Retry::begin(LONG).pause(&asked), Some(delay));
        assert_eq!(Retry::begin(Duration::from_secs(1)).pause(&asked), None);
    }

    #[test]
    fn a_connection_is_tried_twice_more() {
        let mut retry = Retry::begin(LONG);
        let ended = Status::unavailable("connection closed");
        let pauses = (0..5).filter_map(|_| retry.pause(&ended)).count();
        assert_eq!(pauses, 2);
        let ours = Status::cancelled("Timeout expired");
        assert_eq!(Retry::begin(LONG).pause(&ours), None);
    }
}
