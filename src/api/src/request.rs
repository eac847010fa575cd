//! Runs one call. The call takes one of the places of its connection, ends at its deadline, and runs in a separate task. Its span
//! adds the call id to every log line.
//!
//! Because of the separate task, a call still writes its audit entry if its caller disconnects or its deadline passes. The call
//! keeps its place until then, so a caller cannot exceed its concurrent calls by disconnecting.
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

/// Why a call has no answer from its handler.
#[derive(Debug)]
pub(crate) enum Unanswered {
    /// The call did not begin, and has no audit entry yet.
    NotBegun(Error),
    /// The call began. Its audit entry is or will be in the log.
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
    // A call whose deadline has passed does not begin, even if a place was free.
    let Some(place) = place.ok().filter(|_| Instant::now() < deadline) else {
        let error = Error::new(
            Reason::Deadline,
            "the deadline passed before the call began",
        );
        return Err(Unanswered::NotBegun(error));
    };
    let running = async move {
        let response = work.await;
        // The call keeps its place until the answer is sent. Otherwise its connection would look idle and could be closed.
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

/// A body that keeps a value until the body was sent or dropped.
fn held(body: Body, what: impl Send + 'static) -> Body {
    Body::new(body.map_frame(move |frame| {
        let _ = &what;
        frame
    }))
}
