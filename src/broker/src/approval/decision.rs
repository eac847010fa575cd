//! The decision of a second person about a request for approval.

use std::{fmt, sync::Arc};

use keybroker_core::{
    approval::ApprovalState,
    call::{Call, Timestamp},
    error::{Error, Reason},
    key::{ApprovalId, WrappingKeyId},
    principal::{Action, Principal},
};
use keybroker_store as store;
use keybroker_store::{ApprovalChange, ApprovalRow, Decision, PersonOfPrincipal, RemovedApproval};

use crate::{Broker, commit::Settled, journal::Draft};

use super::{ApprovalView, RULE, Unverified, change::About, damaged, refused, wrong_state};

/// What a person decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The change may be made once. The digest is that of the request that the person has read.
    Approve {
        /// The digest of the request.
        digest: [u8; 32],
    },
    /// The change must not be made, also if it was approved before and not made yet. A row that cannot be rejected is removed
    /// ([`Removal`]).
    Reject,
}

impl Verdict {
    /// Returns the action that the policy evaluates.
    pub const fn action(self) -> Action {
        match self {
            Self::Approve { .. } => Action::Approve,
            Self::Reject => Action::RejectApproval,
        }
    }

    const fn state(self) -> ApprovalState {
        match self {
            Self::Approve { .. } => ApprovalState::Approved,
            Self::Reject => ApprovalState::Rejected,
        }
    }
}

/// The result of a decision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decided {
    /// The request after the decision.
    Changed(Box<ApprovalView>),
    /// The request was rejected, and its row was removed.
    Removed(Removal),
}

/// Why the row of a rejected request was removed. A row that the token did not verify gets no new MAC, because the MAC would make
/// the content of the row authentic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Removal {
    /// The row cannot be decoded.
    Unreadable,
    /// No broker wrote the row as it is.
    Altered,
    /// The state of this wrapping key forbids the verification of the row.
    KeyState(WrappingKeyId),
}

impl Removal {
    /// The cause in the audit log.
    const fn as_str(self) -> &'static str {
        match self {
            Self::Unreadable => "unreadable",
            Self::Altered => "altered",
            Self::KeyState(_) => "key-state",
        }
    }

    /// Adds the cause to the audit entry.
    fn describe(self, draft: &mut Draft) {
        draft.cause(self.as_str());
        if let Self::KeyState(signer) = self {
            draft.wrapping_key(signer);
        }
    }
}

/// The cause for a person, as a clause.
impl fmt::Display for Removal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unreadable => {
                f.write_str("its row could not be read; find out who can write to the database")
            }
            Self::Altered => f.write_str(
                "it was altered in the database; find out who can write to the database",
            ),
            Self::KeyState(signer) => write!(
                f,
                "it could not be verified any more, because of the state of wrapping key {signer}; this does not mean that it was altered"
            ),
        }
    }
}

/// The effect of a decision on the stored row.
enum Effect {
    Change(Box<ApprovalChange>),
    Remove(RemovedApproval, Removal),
}

impl Effect {
    /// The error for a request that was decided or changed at the same moment.
    fn too_late(&self) -> Error {
        wrong_state(match self {
            Self::Change(_) => {
                "another person decided about the request, or the change was made, at the same moment; `keybroker approval list --all` \
                 shows which"
            }
            Self::Remove(..) => {
                "the request was changed or removed at the same moment, so nothing was removed; `keybroker approval list --all` shows \
                 the present request"
            }
        })
    }
}

impl Broker {
    /// Decides about a request. Of two decisions at the same moment, only one takes effect.
    pub async fn decide_approval(
        self: &Arc<Self>,
        principal: &Principal,
        call: &Call,
        id: ApprovalId,
        verdict: Verdict,
    ) -> Result<Decided, Error> {
        let (broker, principal, owned) = (Arc::clone(self), principal.clone(), call.clone());
        self.run_change(verdict.action(), call.clone(), async move {
            broker.run_decision(&principal, &owned, id, verdict).await
        })
        .await
    }

    async fn run_decision(
        &self,
        principal: &Principal,
        call: &Call,
        id: ApprovalId,
        verdict: Verdict,
    ) -> Result<Decided, Error> {
        let mut draft = self
            .begin_control_change(principal, call, verdict.action())
            .await?;
        draft.approval(id);
        let effect = self
            .plan_decision(principal, call, id, verdict, &mut draft)
            .await;
        let effect = self.or_record(&draft, effect).await?;
        if let Effect::Remove(_, why) = &effect {
            why.describe(&mut draft);
        }
        let at = Timestamp::now();
        let commit = async {
            match &effect {
                Effect::Change(change) => self.store.decide_approval(change, call.id, at).await,
                Effect::Remove(removed, _) => {
                    self.store.remove_approval(removed, call.id, at).await
                }
            }
        };
        let Settled { intent, result } = self.commit_with_intent(&draft, at, commit).await?;
        let result = result.map_err(|error| match error {
            store::Error::Conflict | store::Error::NotFound => effect.too_late(),
            other => other.into(),
        });
        self.close_intent(intent, &draft, result).await?;
        Ok(match effect {
            Effect::Change(change) => {
                Decided::Changed(Box::new(ApprovalView::verified(change.row)))
            }
            Effect::Remove(_, why) => Decided::Removed(why),
        })
    }

    async fn plan_decision(
        &self,
        principal: &Principal,
        call: &Call,
        id: ApprovalId,
        verdict: Verdict,
        draft: &mut Draft,
    ) -> Result<Effect, Error> {
        call.deadline.check()?;
        self.check_acknowledged()?;
        if !self.approvals.rules.are_on() {
            return Err(wrong_state(
                "no change needs an approval, because the configuration of the broker has no [[approvals.person]]",
            ));
        }
        let by = self.person_of(principal, draft)?;
        let row = match self.store.approval(id).await {
            Ok(Some(row)) => row,
            Ok(None) => return Err(unknown(id)),
            Err(store::Error::Corrupt(_)) if verdict == Verdict::Reject => {
                let removed = RemovedApproval::Unreadable(id);
                return Ok(Effect::Remove(removed, Removal::Unreadable));
            }
            Err(store::Error::Corrupt(detail)) => return Err(damaged(id, &detail.to_string())),
            Err(other) => return Err(other.into()),
        };
        let about = About::of(&row.document);
        if about
            .tenant
            .is_some_and(|tenant| tenant != *principal.tenant())
        {
            return Err(unknown(id));
        }
        match (self.verify_approval(&row).await, verdict) {
            (Ok(()), _) => {}
            (Err(unverified), Verdict::Reject) => return removal(row, unverified),
            (Err(Unverified::KeyState(_)), Verdict::Approve { .. }) => {
                return Err(wrong_state(&format!(
                    "the request cannot be verified any more, because of the state of wrapping key {}; the requesting person has to \
                     run the command again",
                    row.signer
                )));
            }
            (Err(unverified), _) => return Err(unverified.into()),
        }
        // Only an authentic row states facts for the audit log.
        draft.requested_by(&row.requested_by);
        draft.change_digest(&row.digest);
        if let Some(key) = about.wrapping_key {
            draft.wrapping_key(key);
        }
        self.decided_approval(row, by, verdict, draft).await
    }

    /// The row after the decision of a person.
    async fn decided_approval(
        &self,
        row: ApprovalRow,
        by: PersonOfPrincipal,
        verdict: Verdict,
        draft: &mut Draft,
    ) -> Result<Effect, Error> {
        let now = Timestamp::now();
        let state = row.state_at(now);
        if !state.may_become(verdict.state()) {
            return Err(wrong_state(&described(&row, state)));
        }
        if let Verdict::Approve { digest } = verdict {
            if digest != row.digest {
                let what = "the digest of the request as `keybroker approval list` shows it; the stored request is about another change";
                return Err(Error::violation("digest", what));
            }
            self.check_persons(&row, &by, draft)?;
        }
        let expected = row.mac;
        let row = ApprovalRow {
            state: verdict.state(),
            decision: Some(Decision { by, at: now }),
            ..row
        };
        let row = self.with_approval_mac(row).await?;
        Ok(Effect::Change(Box::new(ApprovalChange { row, expected })))
    }

    /// Checks that the request is of another person who may still request changes.
    fn check_persons(
        &self,
        row: &ApprovalRow,
        by: &PersonOfPrincipal,
        draft: &mut Draft,
    ) -> Result<(), Error> {
        let requester = &row.requested_by;
        if !self.approvals.rules.is_still(requester) {
            draft.policy(RULE);
            return Err(refused(&format!(
                "the principal {:?}, which requested the change, no longer belongs to {} in the configuration of the broker, so the \
                 request cannot be approved",
                requester.principal, requester.person
            )));
        }
        if requester.person == by.person {
            draft.policy(RULE);
            return Err(refused(&format!(
                "{} requested the change, so another person has to approve it: {}. Another credential of the same person does not count",
                by.person,
                self.approvals.rules.approvers(&by.person)
            )));
        }
        Ok(())
    }
}

/// The removal of a row that the token did not verify. A row that may be authentic and is not open stays as a record.
fn removal(row: ApprovalRow, unverified: Unverified) -> Result<Effect, Error> {
    let why = match unverified {
        Unverified::Altered(_) => Removal::Altered,
        Unverified::KeyState(_) => {
            let state = row.state_at(Timestamp::now());
            if !state.is_open() {
                return Err(wrong_state(&format!(
                    "the request cannot be verified any more, because of the state of wrapping key {}. Its row says that it is {state}, \
                     so it cannot be rejected",
                    row.signer
                )));
            }
            Removal::KeyState(row.signer)
        }
        Unverified::NotNow(error) => {
            let what = format!(
                "the request cannot be verified with wrapping key {} now, but it may be authentic, so nothing was changed; repeat the \
                 command when the broker can use the wrapping key, or wait until the request expires",
                row.signer
            );
            return Err(error.explained("id", &what));
        }
    };
    Ok(Effect::Remove(RemovedApproval::AsRead(Box::new(row)), why))
}

fn unknown(id: ApprovalId) -> Error {
    let what = format!(
        "there is no request for approval {id}; `keybroker approval list --all` shows the requests"
    );
    Error::new(Reason::KeyNotFound, what.clone()).explained("id", &what)
}

/// Returns the reason why no person can decide about a request any more.
fn described(row: &ApprovalRow, state: ApprovalState) -> String {
    let requester = &row.requested_by.person;
    match (state, &row.decision) {
        (ApprovalState::Expired, _) => format!(
            "the request expired at {}; {requester} can request the change again with the same command",
            row.expires
        ),
        (_, Some(decision)) => format!(
            "{} {} the request at {}, and {}",
            decision.by.person,
            if state == ApprovalState::Rejected {
                "rejected"
            } else {
                "approved"
            },
            decision.at,
            match state {
                ApprovalState::Approved => "an approval is not repeated, only withdrawn",
                ApprovalState::Used => "the change was made",
                _ => "a rejection is not changed",
            }
        ),
        (_, None) => format!("the request is {state}"),
    }
}
