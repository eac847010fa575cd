//! Refuses calls that cannot finish before their deadline, and limits how many releases use the processors
//! concurrently.
//!
//! Mitigation: M8 of `THREAT_MODEL.md`.

use std::time::Instant;

use keybroker_core::{
    call::Call,
    error::Error,
    principal::{Action, Principal},
};
use keybroker_hsm as hsm;
use keybroker_hsm::{Caller, Entered, Planned};

use super::{Broker, journal::Draft, observe, overload::is_overload};

impl Broker {
    /// Refuses a release before its message is read, if the token certainly cannot finish the release in time.
    pub fn check_arrival(&self, principal: &Principal, call: &Call) -> Result<(), Error> {
        let started = Instant::now();
        let checked = self
            .token
            .check_admission(&self.releaser(principal, call), Planned::Unwrap)
            .map_err(Error::from);
        match checked {
            Err(error) if is_overload(&error) => {
                self.note_overload(principal, Action::Unwrap, &error);
                let refused = Err(error);
                observe(Action::Unwrap, call, started.elapsed(), &refused);
                refused
            }
            // A call whose deadline has passed gets its own audit entry later, like every other failed call.
            Ok(()) | Err(_) => Ok(()),
        }
    }

    /// Refuses a call that the token certainly cannot serve in time. The broker makes the admission
    /// check before it evaluates the policy and reads the store, so that a refusal costs little.
    pub(super) async fn check_admission(
        &self,
        caller: &Caller,
        principal: &Principal,
        call: &Call,
        action: Action,
    ) -> Result<(), Error> {
        let planned = if action == Action::Unwrap {
            Planned::Unwrap
        } else {
            Planned::Any
        };
        let checked = self.token.check_admission(caller, planned);
        self.admitted(checked, principal, call, action).await
    }

    /// Waits until the front can work on a call. Refuses a call that cannot finish before its deadline.
    pub(super) async fn enter(
        &self,
        principal: &Principal,
        call: &Call,
        action: Action,
    ) -> Result<Entered, Error> {
        let entered = self.calls.enter(&self.releaser(principal, call)).await;
        self.admitted(entered, principal, call, action).await
    }

    /// Records a refusal.
    async fn admitted<T>(
        &self,
        result: Result<T, hsm::Error>,
        principal: &Principal,
        call: &Call,
        action: Action,
    ) -> Result<T, Error> {
        let error = match result {
            Ok(admitted) => return Ok(admitted),
            Err(refusal) => Error::from(refusal),
        };
        if is_overload(&error) {
            self.note_overload(principal, action, &error);
        } else {
            let draft = Draft::new(principal, call, action);
            self.record_failure(draft, &error).await?;
        }
        Err(error)
    }

    fn note_overload(&self, principal: &Principal, action: Action, error: &Error) {
        let name = (principal.name().to_owned(), principal.tenant().clone());
        self.overload.note(Some(name), action.as_str(), error);
    }

    /// Returns the caller of a release, with an earlier deadline for the token. The remaining time is for the audit
    /// entry and the answer.
    pub(super) fn releaser(&self, principal: &Principal, call: &Call) -> Caller {
        Caller::principal(principal.name(), self.calls.job_deadline(call.deadline))
    }
}
