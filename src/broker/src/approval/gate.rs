//! The check before a change that needs an approval: either the request for approval is stored, or the approval is used.

use keybroker_core::{
    approval::ApprovalState,
    call::{Call, Timestamp},
    error::{Error, Reason},
    key::{ApprovalId, ID_BYTES, WrappingKeyId},
    principal::Principal,
};
use keybroker_store as store;
use keybroker_store::{
    APPROVAL_DOCUMENT_BYTES_MAX, ApprovalChange, ApprovalRow, PersonOfPrincipal,
};

use crate::{Broker, commit::Settled, journal::Draft};

use super::{Asked, OPEN_MAX, UNEXPIRED_MAX, Unverified, damaged};

/// The request that an earlier call left for the same change.
enum Earlier {
    /// There is none, or it is over. The text says how it ended; empty if there is nothing to say.
    Over(String),
    Pending,
    Approved,
}

impl Broker {
    /// Returns the use of the approval that permits a change, which must be committed together with the change. `None` if the
    /// change needs no approval. If no second person has approved the change yet, stores a request and returns `APPROVAL_NEEDED`.
    /// A new request gets the id `fresh`.
    pub(crate) async fn approved(
        &self,
        principal: &Principal,
        call: &Call,
        draft: &mut Draft,
        asked: &Asked,
        fresh: ApprovalId,
    ) -> Result<Option<ApprovalChange>, Error> {
        if !self.approvals.rules.cover(asked.action) {
            return Ok(None);
        }
        let requester = self.person_of(principal, draft)?;
        let digest = asked.digest(&requester.person);
        draft.change_digest(&digest);
        let _turn = self.approval_turn(call).await?;
        let found = match self.store.approval_of(&digest).await {
            Err(store::Error::Corrupt(detail)) => {
                return Err(unreadable(&detail.to_string()));
            }
            found => found?,
        };
        let (earlier, now) = match &found {
            None => (Earlier::Over(String::new()), Timestamp::now()),
            Some(row) => {
                draft.approval(row.id);
                self.examine_approval(row, asked).await?
            }
        };
        match (earlier, found) {
            (Earlier::Pending, Some(row)) => Err(self.approval_needed(&row, "")),
            (Earlier::Approved, Some(row)) => {
                if let Some(decision) = &row.decision {
                    draft.approved_by(&decision.by);
                }
                let used = ApprovalRow {
                    state: ApprovalState::Used,
                    used: Some(now),
                    ..row.clone()
                };
                Ok(Some(ApprovalChange {
                    row: self.with_approval_mac(used).await?,
                    expected: row.mac,
                }))
            }
            (Earlier::Over(ended), found) => {
                let wanted = Wanted {
                    asked,
                    id: fresh,
                    digest,
                    requester,
                };
                let row = self
                    .request_approval(call, draft, wanted, found.as_ref())
                    .await?;
                Err(self.approval_needed(&row, &ended))
            }
            (_, None) => Err(Error::new(Reason::Bug, "a request without a row is open")),
        }
    }

    /// Waits until no other call of this broker looks up or stores a request. Only until the deadline of the call, because changes of
    /// wrapping keys wait for this call.
    async fn approval_turn(&self, call: &Call) -> Result<tokio::sync::MutexGuard<'_, ()>, Error> {
        let turn = self.approvals.turn.lock();
        let turn = tokio::time::timeout_at(call.deadline.instant().into(), turn).await;
        let turn = turn.map_err(|_| {
            let what = "other requests for approval were in progress until the deadline of the call; run the command again";
            Error::new(Reason::Deadline, what).explained("approval", what)
        })?;
        call.deadline.check()?;
        Ok(turn)
    }

    /// Verifies the request of an earlier call and returns how it stands.
    async fn examine_approval(
        &self,
        row: &ApprovalRow,
        asked: &Asked,
    ) -> Result<(Earlier, Timestamp), Error> {
        match self.verify_approval(row).await {
            Err(Unverified::KeyState(_)) => {
                let ended = format!(
                    "the earlier request {} cannot be verified any more, because of the state of wrapping key {}",
                    row.id, row.signer
                );
                return Ok((Earlier::Over(ended), Timestamp::now()));
            }
            verified => verified?,
        }
        if row.document != asked.bytes() || row.action != asked.action.as_str() {
            return Err(damaged(row.id, "it is about another change"));
        }
        let now = Timestamp::now();
        let rules = &self.approvals.rules;
        let by = row.decision.as_ref().map(|decision| &decision.by);
        let earlier = match row.state_at(now) {
            ApprovalState::Pending => Earlier::Pending,
            ApprovalState::Approved => match by {
                Some(_) if !rules.is_still(&row.requested_by) => Earlier::Over(format!(
                    "the earlier request {} does not count any more, because {:?} no longer belongs to {} in the configuration",
                    row.id, row.requested_by.principal, row.requested_by.person
                )),
                Some(by) if !rules.is_still(by) || by.person == row.requested_by.person => {
                    Earlier::Over(format!(
                        "the approval by {} does not count any more, because {:?} no longer belongs to this person in the \
                         configuration",
                        by.person, by.principal
                    ))
                }
                Some(_) => Earlier::Approved,
                None => return Err(damaged(row.id, "it is approved by no person")),
            },
            ApprovalState::Rejected => Earlier::Over(format!(
                "{} rejected the earlier request {}",
                by.map_or("a person", |by| &by.person),
                row.id
            )),
            ApprovalState::Expired => Earlier::Over(format!(
                "the earlier request {} expired at {}",
                row.id, row.expires
            )),
            ApprovalState::Used => Earlier::Over(String::new()),
        };
        Ok((earlier, now))
    }

    /// Stores a request, with its own intent and outcome in the audit log. `earlier` is a request for the same change that is over.
    async fn request_approval(
        &self,
        call: &Call,
        draft: &mut Draft,
        wanted: Wanted<'_>,
        earlier: Option<&ApprovalRow>,
    ) -> Result<ApprovalRow, Error> {
        let Wanted {
            asked,
            id,
            digest,
            requester,
        } = wanted;
        let document = asked.bytes();
        if document.len() > APPROVAL_DOCUMENT_BYTES_MAX {
            let what = "short enough that the users and key names together have at most 8 KiB, because the change needs an approval";
            return Err(Error::violation("users", what));
        }
        call.deadline.check()?;
        let now = Timestamp::now();
        self.check_requests_of(&requester.person, now).await?;
        let kept = i64::try_from(self.approvals.rules.expire_after.as_micros());
        let expires = now.micros().saturating_add(kept.unwrap_or(i64::MAX));
        let row = ApprovalRow {
            id,
            // The signer and the MAC are set below.
            signer: WrappingKeyId::from_bytes([0; ID_BYTES]),
            state: ApprovalState::Pending,
            action: asked.action.as_str().to_owned(),
            document,
            digest,
            requested_by: requester,
            requested: now,
            expires: Timestamp::from_micros(expires),
            decision: None,
            used: None,
            mac: [0; 32],
        };
        let row = self.with_approval_mac(row).await?;
        draft.approval(row.id);
        let stored = draft.of_request();
        let replaces = earlier.map(|row| &row.mac);
        let commit = async { self.store.request_approval(&row, replaces, call.id).await };
        let Settled { intent, result } = self.commit_with_intent(&stored, now, commit).await?;
        let result = result.map_err(|error| match error {
            store::Error::Conflict | store::Error::Exists => {
                let what = "the same change was requested at the same time; run the command again";
                Error::new(Reason::Revision, what).explained("approval", what)
            }
            other => other.into(),
        });
        self.close_intent(intent, &stored, result).await?;
        Ok(row)
    }

    /// Checks that a person may store another request.
    async fn check_requests_of(&self, person: &str, now: Timestamp) -> Result<(), Error> {
        let counts = self.store.count_approvals(person, now).await?;
        let what = if counts.open >= OPEN_MAX {
            format!(
                "{OPEN_MAX} requests of {person} are pending or approved already; make the approved changes, let a person decide about \
                 the others, or wait until they expire"
            )
        } else if counts.unexpired >= UNEXPIRED_MAX {
            format!(
                "{UNEXPIRED_MAX} requests of {person} have not expired yet, including those that were rejected or used; wait until \
                 the first of them expires"
            )
        } else {
            return Ok(());
        };
        Err(Error::new(Reason::Limit, what.clone()).explained("approval", &what))
    }

    /// The error for a change that waits for an approval. `ended` says how an earlier request ended; empty if there was none.
    fn approval_needed(&self, row: &ApprovalRow, ended: &str) -> Error {
        let separator = if ended.is_empty() { "" } else { ". " };
        let person = &row.requested_by.person;
        let text = format!(
            "{ended}{separator}nothing was changed. The request {} of {person} waits until {} for the approval of {}",
            row.id,
            row.expires,
            self.approvals.rules.approvers(person)
        );
        Error::new(Reason::ApprovalNeeded, text.clone())
            .waiting_for(row.id)
            .explained("approval", &text)
    }
}

/// A request that is to be stored.
struct Wanted<'a> {
    asked: &'a Asked,
    id: ApprovalId,
    digest: [u8; 32],
    requester: PersonOfPrincipal,
}

fn unreadable(detail: &str) -> Error {
    let what = format!(
        "the request for approval of this change cannot be read from the database ({detail}). `keybroker approval list` shows its id, and `--all` also \
         the ids of requests that are over; remove it with `keybroker approval reject ID`"
    );
    Error::new(Reason::RecordDamaged, what.clone()).explained("approval", &what)
}
