//! Handles every request of the page: finds the page, requires a session, and runs the request until its deadline.
//!
//! Mitigation: M30 of `THREAT_MODEL.md`.

use std::sync::Arc;

use axum::{
    body::Body,
    extract::{Request, State},
    http::{Method, Response, StatusCode},
};
use tracing::Instrument as _;

use keybroker_core::{
    call::{Call, CallId, Deadline, caller::Caller, in_progress::CallInProgress},
    error::{Error, Reason},
};

use crate::request::{self, Unanswered};

use super::{
    Context, answer,
    answer::Failure,
    decide, devices,
    forms::{self, Fields},
    pages,
    paths::Place,
    sessions::Session,
    sign_in,
    visit::{Answer, Visit},
};

const STYLE: &str = include_str!("../../assets/console.css");
const SCRIPT: &str = include_str!("../../assets/console.js");

/// Answers a request.
pub(super) async fn serve(State(context): State<Context>, request: Request) -> Response<Body> {
    let answered = context.enter(request).await;
    answered.unwrap_or_else(|failure| failure.answer())
}

impl Context {
    /// Answers what needs no session, and runs every other request in a separate task, so that a browser that disconnects
    /// cannot interrupt a decision.
    async fn enter(self, mut request: Request) -> Answer {
        let Some(place) = Place::parse(request.uri().path()) else {
            return Err(Failure::new(
                StatusCode::NOT_FOUND,
                "There is no such page",
                "Check the address.",
            ));
        };
        if !place.allows(request.method()) {
            return Err(Failure::no_method(place.methods()));
        }
        match place {
            Place::Style => return Ok(answer::text(StatusCode::OK, "text/css", STYLE)),
            Place::Script => return Ok(answer::text(StatusCode::OK, "text/javascript", SCRIPT)),
            _ => {}
        }
        let id = CallId::fresh();
        let Some(caller) = request.extensions_mut().remove::<Caller>() else {
            let error = Error::new(Reason::Bug, "the request has no connection data");
            return Err(Failure::of(&error, id));
        };
        let call = Call {
            id,
            peer: caller.peer().to_string(),
            deadline: Deadline::after(self.call_timeout_max),
        };
        let session = request.extensions_mut().remove::<Session>();
        let principal = session.as_ref().map(|session| &**session.principal());
        let span = request::span(id, None, principal);
        let deadline = call.deadline;
        let (places, calls) = (Arc::clone(caller.calls()), self.calls.clone());
        let work = Box::pin(async move {
            let _in_progress = CallInProgress::new();
            let answered = self.answer(request, place, session, &caller, call).await;
            answered.unwrap_or_else(|failure| failure.answer())
        });
        let running = request::run(&places, deadline, &calls, work);
        match running.instrument(span).await {
            Ok(response) => Ok(response),
            Err(Unanswered::NotBegun(error) | Unanswered::Ended(error)) => {
                Err(Failure::of(&error, id))
            }
        }
    }

    async fn answer(
        self,
        request: Request,
        place: Place,
        session: Option<Session>,
        caller: &Caller,
        call: Call,
    ) -> Answer {
        let (head, body) = request.into_parts();
        match place {
            Place::SignIn => return sign_in::begin(&self, &head, session, caller, &call).await,
            Place::Callback => return sign_in::finish(&self, &head, caller, &call).await,
            _ => {}
        }
        let is_form = head.method == Method::POST;
        if is_form {
            forms::check_origin(&head.headers, &self.settings.origin)?;
        }
        let Some(session) = session else {
            return signed_out(place, is_form);
        };
        // The session exists, so an error means that the approver has reached a limit.
        if let Err(error) = caller.principal() {
            return Err(Failure::of(error, call.id));
        }
        let fields = if is_form {
            forms::read(&head.headers, body).await?
        } else {
            Fields::parse(head.uri.query().unwrap_or_default().as_bytes())
        };
        let visit = Visit {
            session,
            call,
            fields,
            is_form,
        };
        self.visit(place, visit).await
    }

    async fn visit(self, place: Place, visit: Visit) -> Answer {
        match place {
            Place::Pending => decide::pending(&self, &visit).await,
            Place::Request(id) => decide::request(&self, &visit, id).await,
            Place::Approve(id) => Box::pin(decide::approve(&self, &visit, id)).await,
            Place::Deny(id) => Box::pin(decide::deny(&self, &visit, id)).await,
            Place::Decisions => decide::decisions(&self, &visit).await,
            Place::Devices => devices::list(&self, &visit).await,
            Place::EndTrust => Box::pin(devices::end_trust(&self, &visit)).await,
            Place::SignOut => sign_in::sign_out(&self, &visit),
            Place::Style | Place::Script | Place::SignIn | Place::Callback => {
                let error = Error::new(Reason::Bug, "a page that needs no session");
                Err(Failure::of(&error, visit.call.id))
            }
        }
    }
}

/// The answer to a browser without a session, or whose session has ended.
fn signed_out(place: Place, is_form: bool) -> Answer {
    let link = sign_in::address(place.request());
    if !is_form {
        return Ok(answer::page(StatusCode::OK, &pages::SignIn { link }));
    }
    let text = "You are not signed in, or your session has ended. Nothing was changed.";
    let failure = Failure::new(StatusCode::FORBIDDEN, "Sign in again", text);
    Err(failure.with_link(link, "Sign in"))
}
