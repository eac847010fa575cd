//! The middleware of every gRPC call. The middleware sets the call id, the caller and the deadline, and replaces the statuses
//! that tonic itself creates.
//!
//! Mitigation: M3 of `THREAT_MODEL.md`.

use std::{sync::Arc, time::Duration};

use axum::{
    Router,
    body::Body,
    extract::Request,
    http::Response,
    middleware::{self, Next},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::{Code, Status};
use tracing::Instrument as _;

use keybroker_broker::Broker;
use keybroker_core::{
    call::{Call, CallId, Deadline, caller::Caller, in_progress::CallInProgress},
    error::{Error, Reason},
    principal::Principal,
};

use crate::{
    discard::discard,
    request::{self, Unanswered},
};

use super::{AuthenticatedCall, Memory, method, status, stream_end, timeout};

/// Largest part of the message of a refused call that is discarded, in bytes.
const DISCARDED_BYTES_MAX: usize = 16 * 1_024;

/// Longest time for a call without a principal.
const UNAUTHENTICATED_TIMEOUT_MAX: Duration = Duration::from_secs(10);

const STATUS_HEADER: &str = "grpc-status";
const MESSAGE_HEADER: &str = "grpc-message";
const DETAILS_HEADER: &str = "grpc-status-details-bin";

/// The state that all calls of the gRPC API share.
#[derive(Clone, Debug)]
pub struct Context {
    /// The broker that handles every call.
    pub broker: Arc<Broker>,
    /// Longest time for a call, and the time limit of a call that sets no deadline.
    pub call_timeout_max: Duration,
    /// The calls in progress, including those whose callers have disconnected.
    pub calls: TaskTracker,
    /// The signal that ends open streams when the broker stops.
    pub stop: CancellationToken,
    /// Limits the memory of messages in progress.
    pub memory: Memory,
}

pub(super) fn wrap(routes: Router, context: Context) -> Router {
    let layer = middleware::from_fn(move |request, next| {
        let context = context.clone();
        async move { context.run(request, next).await }
    });
    // The layer applies to a single fallback route. With separate routes, unauthenticated callers
    // could find out which routes exist, because axum would add a header only to the answers of
    // known routes.
    Router::new().fallback_service(routes).layer(layer)
}

/// A call after its headers were read.
struct Arrived {
    caller: Caller,
    /// `None` for a health check.
    principal: Option<Arc<Principal>>,
    call: Call,
    /// The error if the caller's timeout could not be read.
    timeout: Result<(), Error>,
}

impl Context {
    async fn run(self, mut request: Request, next: Next) -> Response<Body> {
        let id = CallId::fresh();
        let Some(caller) = request.extensions_mut().remove::<Caller>() else {
            return answer(
                &Error::new(Reason::Bug, "the call has no connection data"),
                id,
            );
        };
        // Health checks are for load balancers, which have no principal. All methods except health
        // checks require an authenticated caller. Therefore unauthenticated callers do not learn
        // which methods exist.
        let principal = match caller.principal() {
            Ok(principal) => Some(Arc::clone(principal)),
            Err(_) if method::is_health(request.uri().path()) => None,
            Err(error) => return self.refuse(&caller, error, id),
        };
        let wanted = timeout::take(request.headers_mut());
        let timeout = wanted.as_ref().ok().copied().flatten();
        let mut timeout = timeout.unwrap_or(self.call_timeout_max);
        if principal.is_none() {
            timeout = timeout.min(UNAUTHENTICATED_TIMEOUT_MAX);
        }
        let call = Call {
            id,
            peer: caller.peer().to_string(),
            deadline: Deadline::after(timeout.min(self.call_timeout_max)),
        };
        let path = request.uri().path();
        if let Some(principal) = &principal
            && wanted.is_ok()
            && method::is_unwrap(path)
            && let Err(error) = self.broker.check_arrival(principal, &call)
        {
            // The broker reads the message before it answers. If the broker answered earlier,
            // HTTP/2 would count the stream as an error of the broker. After a thousand errors of
            // this kind, HTTP/2 closes the connection with all its calls.
            discard(request.body_mut(), DISCARDED_BYTES_MAX).await;
            return answer(&error, id);
        }
        let span = request::span(id, method::action(path), principal.as_deref());
        let arrived = Arrived {
            caller,
            principal,
            call,
            timeout: wanted.map(drop),
        };
        self.run_known(request, next, arrived)
            .instrument(span)
            .await
    }

    /// Runs a call of an authenticated caller, or a health check.
    async fn run_known(self, request: Request, next: Next, arrived: Arrived) -> Response<Body> {
        let Arrived {
            caller,
            principal,
            call,
            timeout,
        } = arrived;
        let (id, call_end) = (call.id, call.deadline);
        let entered = principal.map(|principal| AuthenticatedCall { principal, call });
        if let Err(error) = timeout {
            let error = self.unserved(entered.as_ref(), request.uri().path(), error);
            return answer(&error.await, id);
        }
        let path = request.uri().path();
        let places = if method::is_watch(path) {
            caller.health_watches()
        } else if method::is_health(path) {
            caller.health_checks()
        } else {
            caller.calls()
        };
        let path = path.to_owned();
        let serving = self
            .clone()
            .serve(request, next, entered.clone(), call_end, id);
        match request::run(places, call_end, &self.calls, Box::pin(serving)).await {
            Ok(response) => response,
            Err(Unanswered::NotBegun(error)) => {
                let error = self.unserved(entered.as_ref(), &path, error).await;
                answer(&error, id)
            }
            Err(Unanswered::Ended(error)) => answer(&error, id),
        }
    }

    fn refuse(&self, caller: &Caller, error: &Error, id: CallId) -> Response<Body> {
        let peer = caller.peer();
        self.broker
            .refuse_unauthenticated(peer, peer.ip(), error, id);
        answer(error, id)
    }

    async fn serve(
        self,
        request: Request,
        next: Next,
        entered: Option<AuthenticatedCall>,
        deadline: Deadline,
        id: CallId,
    ) -> Response<Body> {
        let _in_progress = CallInProgress::new();
        let path = request.uri().path().to_owned();
        let principal = entered.as_ref().map(|entered| entered.principal.name());
        let received = self
            .memory
            .receive(request, principal, deadline.instant())
            .await;
        // The call keeps its share of the memory until the handler has returned an answer.
        let (mut request, _share) = match received {
            Ok(received) => received,
            Err(error) => {
                return answer(&self.unserved(entered.as_ref(), &path, error).await, id);
            }
        };
        if let Some(entered) = &entered {
            request.extensions_mut().insert(entered.clone());
        }
        let response = next.run(request).await;
        if method::is_stream(&path) && !response.headers().contains_key(STATUS_HEADER) {
            return response.map(|body| stream_end::at_stop(body, self.stop));
        }
        match Own::of(&response) {
            Own::No => response,
            Own::NoMethod => {
                let text = format!(
                    "this listener does not serve the called method: the gRPC API and the admin API may have separate \
                     listeners (call {id})"
                );
                Status::unimplemented(text).into_http()
            }
            Own::Malformed(what) => {
                let error = Error::violation("message", what);
                answer(&self.unserved(entered.as_ref(), &path, error).await, id)
            }
        }
    }

    /// Refuses a call that reached no handler. If the caller has a principal, the broker writes an audit entry for the refusal.
    async fn unserved(
        &self,
        entered: Option<&AuthenticatedCall>,
        path: &str,
        error: Error,
    ) -> Error {
        let (Some(entered), Some(action)) = (entered, method::action(path)) else {
            return error;
        };
        let AuthenticatedCall { principal, call } = entered;
        self.broker.unserved(principal, call, action, error).await
    }
}

fn answer(error: &Error, id: CallId) -> Response<Body> {
    status::to_status(error, id).into_http()
}

/// Classifies a status that tonic created before a handler ran. A status of tonic has no details, unlike a status of this crate.
enum Own {
    No,
    NoMethod,
    Malformed(&'static str),
}

impl Own {
    fn of(response: &Response<Body>) -> Self {
        let headers = response.headers();
        let Some(code) = headers.get(STATUS_HEADER) else {
            return Self::No;
        };
        if headers.contains_key(DETAILS_HEADER) {
            return Self::No;
        }
        match Code::from_bytes(code.as_bytes()) {
            Code::OutOfRange | Code::ResourceExhausted => Self::Malformed("at most 64 KiB"),
            Code::Internal | Code::InvalidArgument | Code::Unknown => {
                Self::Malformed("a protobuf message of this method")
            }
            // If tonic's status `UNIMPLEMENTED` has a message, the cause is an unsupported
            // compression, and the message lists the supported compressions.
            Code::Unimplemented if !headers.contains_key(MESSAGE_HEADER) => Self::NoMethod,
            _ => Self::No,
        }
    }
}
