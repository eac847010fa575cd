//! A request of an approver who signed in.

use axum::{body::Body, http::Response};

use keybroker_core::{call::Call, error::Error, principal::Principal};

use super::{answer::Failure, forms::Fields, pages::Frame, sessions::Session};

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

    pub(super) fn failure(&self, error: &Error) -> Box<Failure> {
        Failure::of(error, self.call.id)
    }
}
