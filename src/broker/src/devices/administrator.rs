//! An approver approves a request for access of a member: the token encrypts the member's user key to the public key of the request,
//! in a sealed release. Neither the approver nor this process ever has the user key.
//!
//! Mitigation: M27 of `THREAT_MODEL.md`.

use std::sync::Arc;

use keybroker_core::{
    call::{Call, Timestamp},
    device::{AccessApprover, AccessState, PHRASE_TRIES_MAX},
    envelope::Algorithm,
    error::{Error, Reason},
    key::{AccessRequestId, KeyAddress},
    principal::{Action, Principal},
};
use keybroker_hsm::{Recipient, RecipientKey};
use keybroker_policy::{KeyPermit, Question, Release};
use keybroker_store::{AccessDecision, AccessRow, Answer, DeviceChange};

use crate::{Broker, SealedUserKey, caller, journal::Draft};

use super::{
    AccessView, after,
    decision::check_pending,
    list::{hidden_words, phrase},
    wrong_state,
};

/// The approval by an approver.
#[derive(Clone, Debug)]
pub struct AdministratorApproval {
    /// The request.
    pub id: AccessRequestId,
    /// The two hidden words of the phrase, in their order, as the approver heard them from the member.
    pub words: [String; 2],
}

impl Broker {
    /// Approves a request for access as an approver. If two approvers are needed, the first approval is only recorded.
    pub async fn approve_for_member(
        self: &Arc<Self>,
        principal: &Principal,
        call: &Call,
        approval: AdministratorApproval,
    ) -> Result<AccessView, Error> {
        let (broker, principal, call) = (Arc::clone(self), principal.clone(), call.clone());
        self.run_change(Action::ApproveForMember, call.clone(), async move {
            Box::pin(broker.run_approval_for_member(&principal, &call, approval)).await
        })
        .await
    }

    async fn run_approval_for_member(
        &self,
        principal: &Principal,
        call: &Call,
        approval: AdministratorApproval,
    ) -> Result<AccessView, Error> {
        let action = Action::ApproveForMember;
        let token = caller(principal, call);
        self.check_admission(&token, principal, call, action)
            .await?;
        let row = self
            .found_request(principal, call, action, approval.id)
            .await?;
        let (permit, recipient, mut draft) = self.permit_for_member(principal, call, &row).await?;
        let now = Timestamp::now();
        let checked = async {
            self.verify_access(&token, &row).await?;
            self.check_approver(principal, &row, now)
        };
        let checked: Result<(), Error> = checked.await;
        self.or_record(&draft, checked).await?;
        self.check_words(principal, call, &draft, &row, &approval)
            .await?;
        let is_first = self.device_rules.approvers_needed > 1 && row.first_approved_by.is_none();
        let (approved, released) = if is_first {
            draft.cause("first-approval");
            let approved = AccessRow {
                first_approved_by: Some(principal.name().to_owned()),
                ..row.clone()
            };
            (approved, None)
        } else {
            draft.release(permit.release());
            let sealed = self.seal_record(principal, &permit, call, &recipient, &mut draft);
            let sealed = Box::pin(sealed).await;
            let sealed = self.or_record(&draft, sealed).await?;
            let approved = self.sealed_answer(principal, &row, &sealed, now);
            (approved, Some((sealed.record(), sealed.revision())))
        };
        let guards = DeviceChange {
            requires: released,
            ..DeviceChange::default()
        };
        let rows = (&row, approved.clone());
        self.commit_access(principal, call, &draft, rows, guards, now)
            .await?;
        if let Some((record, _)) = released {
            self.uses.note(record);
            let user = row.device.address.user.as_str();
            if self.limits.note_release(principal, user) {
                self.alert_of_bulk_release(principal, call).await;
            }
        }
        self.watch_approvals(principal, call).await;
        Ok(self.access_view(approved).for_approver())
    }

    /// Asks the policy for the sealed release of a member's user key to the public key of a request. The policy sees the request and
    /// the approver.
    async fn permit_for_member(
        &self,
        principal: &Principal,
        call: &Call,
        row: &AccessRow,
    ) -> Result<(KeyPermit, Recipient, Draft), Error> {
        let action = Action::ApproveForMember;
        let at = &row.device.address;
        let resource = self.access_resource(row);
        let key = match RecipientKey::from_spki(&row.public_key) {
            Ok(key) => key,
            Err(error) => {
                let draft = Draft::of(principal, call, action, resource);
                let error = Error::caused(Reason::RecordDamaged, error);
                return self.or_record(&draft, Err(error)).await;
            }
        };
        let question = Question {
            principal,
            action,
            resource,
            release: Release::Sealed(key.fingerprint()),
            call,
        };
        let address = KeyAddress {
            tenant: at.tenant.clone(),
            user: at.user.clone(),
            name: row.key_name.clone(),
        };
        match self.policy.decide_for_member(&question, address) {
            Ok(permit) => {
                let mut draft = Draft::permitted(principal, call, &permit);
                draft.access_request(row, self.policy.place_of(&row.peer));
                // Nothing is released yet.
                draft.release(Release::Plain);
                let recipient = Recipient {
                    key,
                    algorithm: None,
                };
                Ok((permit, recipient, draft))
            }
            Err(denied) => {
                let draft = Draft::of(principal, call, action, resource);
                Err(self.refuse(draft, &denied).await)
            }
        }
    }

    /// Checks who approves, and the state of the request.
    fn check_approver(
        &self,
        principal: &Principal,
        row: &AccessRow,
        now: Timestamp,
    ) -> Result<(), Error> {
        if self.is_same_person(principal.name(), &row.requested_by) {
            let what = "the approver made this request, so another person has to approve it";
            return Err(Error::new(Reason::Policy, what).explained("principal", what));
        }
        check_pending(row, now)?;
        if row.approver != AccessApprover::Administrator {
            let what =
                "the request asks for another device of the member, and not for an administrator";
            return Err(wrong_state("access_request_id", what));
        }
        let first = row.first_approved_by.as_deref();
        if first.is_some_and(|first| self.is_same_person(principal.name(), first)) {
            let what =
                "the approver approved the request before, so a second person has to approve it";
            return Err(wrong_state("access_request_id", what));
        }
        Ok(())
    }

    /// Checks the two words that the approver heard. Wrong words count as failed attempts of the approver, and for the request: after too
    /// many, the request is denied.
    async fn check_words(
        &self,
        principal: &Principal,
        call: &Call,
        draft: &Draft,
        row: &AccessRow,
        approval: &AdministratorApproval,
    ) -> Result<(), Error> {
        let all = phrase(row);
        let expected = hidden_words(&row.code).map(|place| all.words()[place]);
        let is_right = approval
            .words
            .iter()
            .zip(expected)
            .all(|(word, expected)| word.trim().eq_ignore_ascii_case(expected));
        if is_right {
            return Ok(());
        }
        // An error here means that the limit is reached: then the next calls of the principal are refused.
        let _is_counted = self.limits.fail_principal(principal.name());
        let now = Timestamp::now();
        let mut counted = AccessRow {
            wrong_words: row.wrong_words.saturating_add(1),
            ..row.clone()
        };
        if counted.wrong_words >= PHRASE_TRIES_MAX {
            counted.state = AccessState::Denied;
            counted.decision = Some(AccessDecision {
                by: principal.name().to_owned(),
                device: None,
                at: now,
            });
        }
        self.count_wrong_guess(
            principal,
            call,
            draft,
            (row, counted),
            "access_request.wrong_words",
            now,
        )
        .await?;
        let what = "the two hidden words of the phrase that the member sees on the new device; deny the request if the words of \
                    the member differ";
        self.or_record(draft, Err(Error::violation("phrase_words", what)))
            .await
    }

    fn sealed_answer(
        &self,
        principal: &Principal,
        row: &AccessRow,
        sealed: &SealedUserKey,
        now: Timestamp,
    ) -> AccessRow {
        let form = match sealed.algorithm() {
            Algorithm::RsaOaepSha256 => "rsa-oaep-sha256",
            Algorithm::RsaOaepSha1 => "rsa-oaep-sha1",
        };
        AccessRow {
            state: AccessState::Approved,
            expires: after(now, self.device_rules.answer_lifetime),
            decision: Some(AccessDecision {
                by: principal.name().to_owned(),
                device: None,
                at: now,
            }),
            answer: Some(Answer {
                bytes: sealed.ciphertext().to_vec(),
                form: form.to_owned(),
            }),
            answer_revision: Some(sealed.revision()),
            ..row.clone()
        }
    }
}
