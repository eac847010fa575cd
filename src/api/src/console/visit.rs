//! A request of an approver who signed in.
//!
//! Mitigation: M30 of `THREAT_MODEL.md`.

use axum::{
    body::Body,
    http::{Response, StatusCode},
};

use keybroker_core::{call::Call, error::Error, principal::Principal};

use super::{Context, answer::Failure, forms::Fields, pages::Frame, sessions::Session};

/// An answer, or the page that says why there is none.
pub(super) type Answer = Result<Response<Body>, Box<Failure>>;

/// A request of an approver who signed in.
pub(super) struct Visit {
    pub(super) session: Session,
    pub(super) call: Call,
    /// The form, or the query of a request without a form.
    pub(super) fields: Fields,
    /// Whether the request is a form, with which the approver decides.
    pub(super) is_form: bool,
}

impl Visit {
    pub(super) fn principal(&self) -> &Principal {
        self.session.principal()
    }

    pub(super) fn frame(&self, at: &'static str) -> Frame {
        Frame::new(&self.session, at)
    }

    /// Refuses a form without its token.
    pub(super) fn check_token(&self, purpose: &str) -> Result<(), Box<Failure>> {
        self.fields.check_token(&self.session, purpose)
    }

    /// Whether the provider confirmed recently that the person is there. Without a recent confirmation, a person at an unattended browser,
    /// or one whose role was taken away meanwhile, can only read and deny.
    pub(super) fn is_recent(&self, context: &Context) -> bool {
        self.session
            .is_authenticated_within(context.settings.reauthentication)
    }

    /// Refuses an action that needs a recent confirmation.
    pub(super) fn check_recent(
        &self,
        context: &Context,
        sign_in: &str,
    ) -> Result<(), Box<Failure>> {
        if self.is_recent(context) {
            return Ok(());
        }
        let text = "Your last sign-in is too old for this action. Sign in again, and then repeat the action. Nothing was changed.";
        let failure = Failure::new(StatusCode::FORBIDDEN, "Sign in again", text);
        Err(failure.with_link(sign_in.to_owned(), "Sign in again"))
    }

    pub(super) fn failure(&self, error: &Error) -> Box<Failure> {
        Failure::of(error, self.call.id)
    }
}
