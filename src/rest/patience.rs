//! Short troubles are waited out: a client would log its user out for each.

use std::time::{Duration, Instant};

use crate::{
    call::{Call, CallId},
    error::{Error, Reason},
};

/// How long troubles are waited out, all together. Clients and proxies wait for half a minute and longer.
const PATIENCE: Duration = Duration::from_secs(8);
/// Before the second try; doubled before each other one.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(1);
/// What a try needs at least: none is begun that could not end.
const LEFT_FOR_A_TRY: Duration = Duration::from_millis(500);

/// Asks until there is an answer that waiting does not change, or no patience left. Every try is a call of its own in the
/// audit log: the mark of a change whose fate is unknown must not be that of its repetition.
pub(super) async fn patiently<T, F>(
    call: &Call,
    mut attempt: impl FnMut(Call) -> F,
) -> Result<T, Error>
where
    F: Future<Output = Result<T, Error>>,
{
    let until = call.deadline.instant().min(Instant::now() + PATIENCE);
    let mut pause = FIRST_PAUSE;
    let mut result = attempt(call.clone()).await;
    while let Err(error) = &result {
        let left = until.saturating_duration_since(Instant::now());
        if !passes(error.reason()) || left < pause + LEFT_FOR_A_TRY {
            break;
        }
        let again = Call {
            id: CallId::fresh(),
            ..call.clone()
        };
        tracing::info!(call_id = %call.id, again = %again.id, %error, "waiting out a short trouble");
        metrics::counter!("keybroker_rest_retries_total", "reason" => error.reason().as_str())
            .increment(1);
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(PAUSE_MAX);
        result = attempt(again).await;
    }
    result
}

/// Whether it may be over in a moment. A rate is not: it is the caller's own.
#[deny(clippy::wildcard_enum_match_arm)]
const fn passes(reason: Reason) -> bool {
    match reason {
        Reason::QueueFull | Reason::TokenDown | Reason::StoreDown | Reason::AuditDown => true,
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
        | Reason::Rate
        | Reason::FailureBudget
        | Reason::TokenUntrusted
        | Reason::Deadline
        | Reason::Bug => false,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use crate::call::Deadline;

    use super::*;

    fn call(timeout: Duration) -> Call {
        Call::start("127.0.0.1:1", Deadline::after(timeout))
    }

    #[tokio::test]
    async fn a_short_trouble_is_waited_out_with_an_id_for_each_try() {
        let mut ids = HashSet::new();
        let first = call(Duration::from_secs(30));
        let answer = patiently(&first, |call| {
            ids.insert(call.id);
            let away = (ids.len() < 4).then(|| Error::new(Reason::StoreDown, "away"));
            async { away.map_or(Ok(7), Err) }
        });
        assert_eq!(answer.await.unwrap(), 7);
        assert_eq!(ids.len(), 4);
    }

    #[tokio::test]
    async fn what_waiting_does_not_change_is_answered_at_once() {
        for reason in Reason::ALL {
            let mut tries = 0;
            let call = call(Duration::from_secs(30));
            let answer = patiently(&call, |_| {
                tries += 1;
                let first = (tries == 1).then(|| Error::new(reason, ""));
                async { first.map_or(Ok(()), Err) }
            });
            assert_eq!(answer.await.is_ok(), passes(reason), "{reason}");
        }
    }

    #[tokio::test]
    async fn a_trouble_that_lasts_is_answered_before_the_deadline() {
        let call = call(Duration::from_millis(900));
        let answer = patiently(&call, |_| async {
            Err::<(), _>(Error::new(Reason::TokenDown, "away"))
        });
        assert_eq!(answer.await.unwrap_err().reason(), Reason::TokenDown);
        assert!(!call.deadline.remaining().is_zero());
    }
}
