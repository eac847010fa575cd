//! The decision about a request for access: another device of the member approves it, or the member or an approver denies it.

use std::sync::Arc;

use keybroker_core::{
    call::{Call, Timestamp},
    device::{AccessState, DeviceSignature, StatementKind},
    error::{Error, Reason},
    key::AccessRequestId,
    principal::{Action, Kind, Principal},
};
use keybroker_store::{AccessDecision, AccessRow, Answer, DeviceChange};

use crate::{Broker, journal::Draft, within};

use super::{
    AccessView,
    signed::{Signed, refused, trusted},
    unknown, wrong_state,
};

/// The approval by another device.
#[derive(Clone, Debug)]
pub struct DeviceApproval {
    /// The request.
    pub id: AccessRequestId,
    /// The user key, encrypted to the public key of the request.
    pub answer: Answer,
    /// The signature of the approving device.
    pub signature: DeviceSignature,
}

impl Broker {
    /// Approves a request for access with another trusted device of the same member.
    pub async fn approve_access(
        self: &Arc<Self>,
        principal: &Principal,
        call: &Call,
        approval: DeviceApproval,
    ) -> Result<AccessView, Error> {
        let (broker, principal, call) = (Arc::clone(self), principal.clone(), call.clone());
        self.run_change(Action::ApproveAccess, call.clone(), async move {
            let action = Action::ApproveAccess;
            let (row, draft) = broker
                .request_to_decide(&principal, &call, action, approval.id)
                .await?;
            let now = Timestamp::now();
            let plan = broker.plan_approval(&principal, &call, &row, approval, now);
            let change = broker.or_record(&draft, Box::pin(plan).await).await?;
            broker.commit_devices(&call, &draft, &change, now).await?;
            let row = change.request.map(|changed| changed.row);
            let row =
                row.ok_or_else(|| Error::new(Reason::Bug, "an approval without a request"))?;
            Ok(broker.access_view(row))
        })
        .await
    }

    async fn plan_approval(
        &self,
        principal: &Principal,
        call: &Call,
        row: &AccessRow,
        approval: DeviceApproval,
        now: Timestamp,
    ) -> Result<DeviceChange, Error> {
        self.check_pending(call, row, now).await?;
        let address = &row.device.address;
        if approval.signature.device == address.device {
            return Err(refused("a device cannot approve its own request"));
        }
        let devices = self
            .verified_devices(principal, call, &address.user)
            .await?;
        let fields: [&[u8]; 4] = [
            row.id.as_bytes(),
            &row.public_key,
            &approval.answer.bytes,
            approval.answer.form.as_bytes(),
        ];
        let signed = Signed {
            kind: StatementKind::Approve,
            tenant: principal.tenant(),
            user: &address.user,
            signature: &approval.signature,
            fields: &fields,
        };
        let signer = signed.by_trusted(&devices, now)?;
        let before = trusted(&devices, signer.address.device);
        let approved = AccessRow {
            state: AccessState::Approved,
            decision: Some(AccessDecision {
                by: principal.name().to_owned(),
                device: Some(signer.address.device),
                at: now,
            }),
            answer: Some(approval.answer),
            ..row.clone()
        };
        Ok(DeviceChange {
            devices: vec![self.changed_device(signer, before, now).await?],
            request: Some(self.changed_access(approved, Some(row)).await?),
            ..DeviceChange::default()
        })
    }

    /// Denies a pending request for access, or withdraws an approval whose answer was not consumed yet.
    pub async fn deny_access(
        self: &Arc<Self>,
        principal: &Principal,
        call: &Call,
        id: AccessRequestId,
    ) -> Result<AccessView, Error> {
        let (broker, principal, call) = (Arc::clone(self), principal.clone(), call.clone());
        self.run_change(Action::DenyAccess, call.clone(), async move {
            let action = Action::DenyAccess;
            let (row, draft) = broker
                .request_to_decide(&principal, &call, action, id)
                .await?;
            let now = Timestamp::now();
            let denied = broker
                .or_record(&draft, denied(&row, &principal, now))
                .await?;
            broker
                .commit_access(&call, &draft, &row, denied.clone(), now)
                .await?;
            let view = broker.access_view(denied);
            Ok(match principal.kind() {
                Kind::User => view,
                Kind::Service => view.for_approver(),
            })
        })
        .await
    }

    /// Reads a request about which a principal wants to decide, and asks the policy. A request of another member is not found for a
    /// member.
    pub(super) async fn request_to_decide(
        &self,
        principal: &Principal,
        call: &Call,
        action: Action,
        id: AccessRequestId,
    ) -> Result<(AccessRow, Draft), Error> {
        let row = self.found_request(principal, call, action, id).await?;
        let draft = self.begin_decision(principal, call, action, &row).await?;
        let verified = self.verify_access(&row).await;
        self.or_record(&draft, verified).await?;
        Ok((row, draft))
    }

    /// Reads a request about which a principal wants to decide. A request of another member is not found for a member.
    pub(super) async fn found_request(
        &self,
        principal: &Principal,
        call: &Call,
        action: Action,
        id: AccessRequestId,
    ) -> Result<AccessRow, Error> {
        let found = async {
            self.check_acknowledged()?;
            let row = within(call, self.store.access_request(id)).await?;
            let is_shown = |row: &AccessRow| {
                let address = &row.device.address;
                let is_own = principal.subject() == Some(&address.user);
                address.tenant == *principal.tenant()
                    && (is_own || principal.kind() == Kind::Service)
            };
            row.filter(is_shown)
                .ok_or_else(|| unknown("access_request_id"))
        };
        match found.await {
            Ok(row) => Ok(row),
            Err(error) => {
                let draft = Draft::new(principal, call, action);
                self.or_record(&draft, Err(error)).await
            }
        }
    }

    /// Checks that a request can be approved: it is pending, and the newest of its device.
    pub(super) async fn check_pending(
        &self,
        call: &Call,
        row: &AccessRow,
        now: Timestamp,
    ) -> Result<(), Error> {
        let state = row.state_at(now);
        if state != AccessState::Pending {
            let what = format!("the request is {state}; a decision does not change");
            return Err(wrong_state("access_request_id", &what));
        }
        let newest = self.store.newest_pending(&row.device.address);
        match within(call, newest).await? {
            Some(newest) if newest.id != row.id && newest.requested >= row.requested => {
                let what =
                    "the device has made a newer request, and only the newest can be approved";
                Err(wrong_state("access_request_id", what))
            }
            _ => Ok(()),
        }
    }
}

/// The request after it was denied, or after its approval was withdrawn.
fn denied(row: &AccessRow, principal: &Principal, now: Timestamp) -> Result<AccessRow, Error> {
    match row.state_at(now) {
        AccessState::Pending => Ok(AccessRow {
            state: AccessState::Denied,
            decision: Some(AccessDecision {
                by: principal.name().to_owned(),
                device: None,
                at: now,
            }),
            ..row.clone()
        }),
        AccessState::Approved => Ok(AccessRow {
            state: AccessState::Revoked,
            answer: None,
            closed: Some(now),
            ..row.clone()
        }),
        state => {
            let what = format!("the request is {state}, which does not change");
            Err(wrong_state("access_request_id", &what))
        }
    }
}
