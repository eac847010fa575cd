//! Runs one call: within a place among the calls of its connection, within its deadline, in a separate task, and in a span that
//! every log line below it carries.
//!
//! The task lets a call whose caller disconnects, or whose deadline passes, still reach its audit entry. The call keeps
//! its place until then, so that disconnecting does not let a caller start more calls at once.
//!
//! Mitigation: M3 of `THREAT_MODEL.md`.

use std::{pin::Pin, sync::Arc, time::Instant};

use axum::{body::Body, http::Response};
use http_body_util::BodyExt as _;
use tokio::sync::Semaphore;
use tokio_util::task::TaskTracker;
use tracing::{Instrument as _, Span};

use keybroker_core::{
    call::{CallId, Deadline},
    error::{Error, Reason},
    principal::{Action, Principal},
};

/// Why a call ended without an answer from its handler.
#[derive(Debug)]
pub(crate) enum Unanswered {
    /// It was not begun, and is not in the audit log yet.
    NotBegun(Error),
    /// It was begun: its entry is, or will be, in the audit log.
    Ended(Error),
}

/// The span of a call. Enabled whatever the filter lets through, so that no line goes without it.
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
    // A call whose deadline has passed is not begun, also where a place was free at once.
    let Some(place) = place.ok().filter(|_| Instant::now() < deadline) else {
        let error = Error::new(
            Reason::Deadline,
            "the deadline passed before the call began",
        );
        return Err(Unanswered::NotBegun(error));
    };
    let running = async move {
        let response = work.await;
        // Until the answer is sent, or a connection that ends could take the call for finished.
        response.map(|body| held(body, place))
    };
    let task = calls.spawn(running.in_current_span());
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

/// A body that keeps something until it was sent or given up.
fn held(body: Body, what: impl Send + 'static) -> Body {
    Body::new(body.map_frame(move |frame| {
        let _ = &what;
        frame
    }))
}
