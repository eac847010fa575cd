//! Runs one call in a separate task, until its deadline. Each connection has a limited number of places for concurrent calls, and
//! a call takes one of these places. The tracing span of a call adds the call id to every log line of this call.
//!
//! Because a call runs in a separate task, it writes its audit entry even if the caller cancels the call or the deadline passes.
//! A call keeps its place until its task has ended, so a caller cannot exceed the limit of concurrent calls by cancelling calls.
//!
//! Mitigation: M3 of `THREAT_MODEL.md`.

use std::{pin::Pin, sync::Arc, time::Instant};

use axum::{body::Body, http::Response};
use http_body_util::BodyExt as _;
use tokio::sync::Semaphore;
use tokio_util::task::TaskTracker;
use tracing::{Instrument as _, Span};

use keybroker_core::{
    call::{
        CallId, Deadline,
        abandoned::{Abandoned, StopsWaiting},
    },
    error::{Error, Reason},
    principal::{Action, Principal},
};

/// The reason why a call has no answer from its handler.
#[derive(Debug)]
pub(crate) enum Unanswered {
    /// The call did not begin, and has no audit entry yet.
    NotBegun(Error),
    /// The call began, and its handler has written the audit entry or will write it.
    Ended(Error),
}

/// The span of a call. The span has the level `error`, so that no log filter disables it.
pub(crate) fn span(id: CallId, action: Option<Action>, principal: Option<&Principal>) -> Span {
    tracing::error_span!(
        "call",
        call_id = %id,
        action = action.map(Action::as_str),
        principal = principal.map(tracing::field::display),
    )
}

/// Runs a call in the current span.
pub(crate) async fn run(
    places: &Arc<Semaphore>,
    deadline: Deadline,
    calls: &TaskTracker,
    work: Pin<Box<dyn Future<Output = Response<Body>> + Send>>,
) -> Result<Response<Body>, Unanswered> {
    let deadline = deadline.instant();
    let place = Arc::clone(places).acquire_owned();
    let place = tokio::time::timeout_at(deadline.into(), place).await;
    // A call whose deadline has passed does not begin, even if the connection has a free place.
    let Some(place) = place.ok().filter(|_| Instant::now() < deadline) else {
        let error = Error::new(
            Reason::Deadline,
            "the deadline passed before the call began",
        );
        return Err(Unanswered::NotBegun(error));
    };
    let running = async move {
        let response = work.await;
        // The call keeps its place until the answer is sent. If no place were taken, the connection
        // would count as idle and could be closed.
        response.map(|body| held(body, place))
    };
    let abandoned = Abandoned::default();
    let task = calls.spawn(abandoned.clone().scope(running).in_current_span());
    let _waiting = StopsWaiting(abandoned);
    match tokio::time::timeout_at(deadline.into(), task).await {
        Ok(Ok(response)) => Ok(response),
        Ok(Err(_)) => {
            keybroker_core::alert!(Bug, "a handler panicked");
            let error = Error::new(Reason::Bug, "a handler panicked");
            Err(Unanswered::Ended(error))
        }
        Err(_) => {
            let error = Error::new(Reason::Deadline, "deadline passed");
            Err(Unanswered::Ended(error))
        }
    }
}

/// Wraps a body, so that `what` is dropped together with the body.
fn held(body: Body, what: impl Send + 'static) -> Body {
    Body::new(body.map_frame(move |frame| {
        let _ = &what;
        frame
    }))
}
