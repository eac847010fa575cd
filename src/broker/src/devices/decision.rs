//! The decision about a request for access: another device of the member approves it, or the member or an approver denies it.

use std::sync::Arc;

use keybroker_core::{
    call::{Call, Timestamp},
    device::{AccessState, DeviceSignature, DeviceState, StatementKind},
    error::{Error, Reason},
    key::AccessRequestId,
    principal::{Action, Kind, Principal},
};
use keybroker_policy::Resource;
use keybroker_store::{AccessDecision, AccessRow, Answer, DeviceChange, DeviceRow};

use crate::{Broker, caller, journal::Draft, within};

use super::{
    AccessView, Untrusted, Which,
    establish::{count, trusted_set},
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

/// The denial of a request, or the end of its approval.
#[derive(Clone, Debug)]
pub struct AccessDenial {
    /// The request.
    pub id: AccessRequestId,
    /// The signature of a trusted device. A member needs it to end the trust that followed from an approval.
    pub signature: Option<DeviceSignature>,
    /// Whether only a pending request is denied. The withdrawal of an approval is refused.
    pub only_pending: bool,
}

impl From<AccessRequestId> for AccessDenial {
    fn from(id: AccessRequestId) -> Self {
        Self {
            id,
            signature: None,
            only_pending: false,
        }
    }
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
        check_pending(row, now)?;
        let address = &row.device.address;
        if approval.signature.device == address.device {
            return Err(refused("a device cannot approve its own request"));
        }
        let record = self
            .record_of(principal, call, &address.user, &row.key_name)
            .await?;
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
            answer_revision: Some(record.revision),
            ..row.clone()
        };
        let token = caller(principal, call);
        Ok(DeviceChange {
            devices: vec![self.changed_device(&token, signer, before, now).await?],
            request: Some(self.changed_access(&token, approved, Some(row)).await?),
            requires: Some((record.id, record.revision)),
            ..DeviceChange::default()
        })
    }

    /// Denies a pending request for access, or withdraws an approval. If a device was trusted because of the approval, its trust is
    /// ended, too.
    pub async fn deny_access(
        self: &Arc<Self>,
        principal: &Principal,
        call: &Call,
        denial: impl Into<AccessDenial>,
    ) -> Result<AccessView, Error> {
        let (broker, principal, call) = (Arc::clone(self), principal.clone(), call.clone());
        let denial = denial.into();
        self.run_change(Action::DenyAccess, call.clone(), async move {
            let action = Action::DenyAccess;
            let (row, mut draft) = broker
                .request_to_decide(&principal, &call, action, denial.id)
                .await?;
            let now = Timestamp::now();
            let plan = broker.plan_denial(&principal, &call, &row, denial, now);
            let mut change = broker.or_record(&draft, Box::pin(plan).await).await?;
            let ended = change.devices.iter();
            let ended = ended.filter(|one| one.row.state != DeviceState::Trusted);
            let ended = ended.count();
            if ended > 0 {
                count(&mut draft, ended);
            }
            broker.commit_devices(&call, &draft, &change, now).await?;
            let denied = change.request.take();
            let denied =
                denied.ok_or_else(|| Error::new(Reason::Bug, "a denial without a request"))?;
            Ok(broker.access_view(denied.row).for_principal(&principal))
        })
        .await
    }

    async fn plan_denial(
        &self,
        principal: &Principal,
        call: &Call,
        row: &AccessRow,
        denial: AccessDenial,
        now: Timestamp,
    ) -> Result<DeviceChange, Error> {
        let denied = denied(row, principal, &denial, now)?;
        let mut change = match row.state_at(now) {
            AccessState::Pending => DeviceChange::default(),
            _ => {
                self.plan_end_of_approval(principal, call, row, denial, now)
                    .await?
            }
        };
        let token = caller(principal, call);
        change.request = Some(self.changed_access(&token, denied, Some(row)).await?);
        Ok(change)
    }

    /// Ends the trust that followed from an approval, like an end of trust without a request. If none followed, none may follow until the
    /// transaction ends.
    async fn plan_end_of_approval(
        &self,
        principal: &Principal,
        call: &Call,
        row: &AccessRow,
        denial: AccessDenial,
        now: Timestamp,
    ) -> Result<DeviceChange, Error> {
        let address = &row.device.address;
        let user = &address.user;
        let devices = self.verified_devices(principal, call, user).await?;
        if !devices.iter().any(|device| followed(device, row)) {
            return Ok(DeviceChange {
                trusted: Some(trusted_set(principal, user, &devices)),
                ..DeviceChange::default()
            });
        }
        let resource = Resource::Devices {
            tenant: &address.tenant,
            user: Some(user),
        };
        self.permit(principal, call, Action::UntrustDevice, resource)
            .await?;
        let ended = Untrusted {
            user: Some(user.clone()),
            which: Which::These(vec![address.device]),
            are_lost: false,
            signature: denial.signature,
        };
        self.plan_end_of_trust(principal, call, user, &ended, now)
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
        let token = caller(principal, call);
        self.check_admission(&token, principal, call, action)
            .await?;
        let row = self.found_request(principal, call, action, id).await?;
        let draft = self.begin_decision(principal, call, action, &row).await?;
        let verified = self.verify_access(&token, &row).await;
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
        match self.stored_request(principal, call, id).await {
            Ok(row) => Ok(row),
            Err(error) => {
                let draft = Draft::new(principal, call, action);
                self.or_record(&draft, Err(error)).await
            }
        }
    }

    /// Reads a request, without an audit entry if it is not found.
    pub(super) async fn stored_request(
        &self,
        principal: &Principal,
        call: &Call,
        id: AccessRequestId,
    ) -> Result<AccessRow, Error> {
        self.check_acknowledged()?;
        let row = within(call, self.store.access_request(id)).await?;
        let is_shown = |row: &AccessRow| {
            let address = &row.device.address;
            let is_own = principal.subject() == Some(&address.user);
            address.tenant == *principal.tenant() && (is_own || principal.kind() == Kind::Service)
        };
        row.filter(is_shown)
            .ok_or_else(|| unknown("access_request_id"))
    }
}

/// Checks that a request can be approved.
pub(super) fn check_pending(row: &AccessRow, now: Timestamp) -> Result<(), Error> {
    let state = row.state_at(now);
    if state == AccessState::Pending {
        return Ok(());
    }
    let what = format!("the request for access is already {state}, and cannot be decided again");
    Err(wrong_state("access_request_id", &what))
}

/// Whether a device is trusted because of the approval of a request: it is the device of the request, with the same key, and its trust is
/// not older than the approval.
fn followed(device: &DeviceRow, row: &AccessRow) -> bool {
    let asking = &row.device;
    device.address == asking.address
        && device.state == DeviceState::Trusted
        && device.verification_key == asking.verification_key
        && row
            .decision
            .as_ref()
            .is_some_and(|decision| decision.at <= device.trusted)
}

/// The request after it was denied, or after its approval was withdrawn.
fn denied(
    row: &AccessRow,
    principal: &Principal,
    denial: &AccessDenial,
    now: Timestamp,
) -> Result<AccessRow, Error> {
    let state = row.state_at(now);
    if denial.only_pending && state != AccessState::Pending {
        let what = format!(
            "the request for access is {state}, and no longer pending; nothing was changed"
        );
        return Err(wrong_state("access_request_id", &what));
    }
    match state {
        AccessState::Pending => Ok(AccessRow {
            state: AccessState::Denied,
            decision: Some(AccessDecision {
                by: principal.name().to_owned(),
                device: None,
                at: now,
            }),
            ..row.clone()
        }),
        AccessState::Approved | AccessState::Consumed => Ok(AccessRow {
            state: AccessState::Revoked,
            answer: None,
            closed: Some(now),
            ..row.clone()
        }),
        state => {
            let what = format!(
                "the request for access is {state}; only a pending, approved or consumed request can be denied"
            );
            Err(wrong_state("access_request_id", &what))
        }
    }
}

#[cfg(test)]
mod tests {
    use keybroker_core::{
        device::AccessApprover,
        key::{DeviceId, KeyName, Tenant, UserId, WrappingKeyId},
        principal::Role,
    };
    use keybroker_store::{AskingDevice, DeviceAddress};

    use super::*;

    const NOW: Timestamp = Timestamp::from_micros(1_000);
    const STATES: [AccessState; 5] = [
        AccessState::Pending,
        AccessState::Approved,
        AccessState::Denied,
        AccessState::Consumed,
        AccessState::Revoked,
    ];

    fn row(state: AccessState, expires: i64) -> AccessRow {
        let key = WrappingKeyId::from_bytes([1; 16]);
        AccessRow {
            id: AccessRequestId::from_bytes([2; 16]),
            signer: key,
            state,
            approver: AccessApprover::Administrator,
            device: AskingDevice {
                address: DeviceAddress {
                    tenant: Tenant::default(),
                    user: UserId::parse("ada").unwrap(),
                    device: DeviceId::from_bytes([3; 16]),
                },
                name: "new".to_owned(),
                kind: "phone".to_owned(),
                verification_key: vec![4; 65],
            },
            key_name: KeyName::parse("vault").unwrap(),
            public_key: vec![5; 294],
            code: [6; 32],
            code_key: key,
            requested_by: "token:home:ada".to_owned(),
            peer: "192.0.2.1:5000".to_owned(),
            requested: Timestamp::from_micros(1),
            expires: Timestamp::from_micros(expires),
            tries: 0,
            first_approved_by: None,
            decision: None,
            answer: None,
            fetched: None,
            closed: None,
            answer_revision: None,
            wrong_words: 0,
            mac: [7; 32],
        }
    }

    fn state_after(row: &AccessRow, only_pending: bool) -> Option<AccessState> {
        let approver = crate::testing::service("URI:approver", &[Role::Approver]);
        let denial = AccessDenial {
            only_pending,
            ..AccessDenial::from(row.id)
        };
        match denied(row, &approver, &denial, NOW) {
            Ok(denied) => Some(denied.state),
            Err(error) => {
                assert_eq!(error.reason(), Reason::DeviceState, "{error}");
                None
            }
        }
    }

    /// Another approver can approve a request between the confirmation on the page and the denial.
    #[test]
    fn a_denial_of_a_pending_request_withdraws_no_approval() {
        for state in STATES {
            let expected = (state == AccessState::Pending).then_some(AccessState::Denied);
            let after = state_after(&row(state, 2_000), true);
            assert_eq!(after, expected, "{state}");
        }
        assert_eq!(state_after(&row(AccessState::Pending, 999), true), None);
    }

    #[test]
    fn a_denial_ends_what_is_still_open() {
        for (state, expected) in STATES.into_iter().zip([
            Some(AccessState::Denied),
            Some(AccessState::Revoked),
            None,
            Some(AccessState::Revoked),
            None,
        ]) {
            let after = state_after(&row(state, 2_000), false);
            assert_eq!(after, expected, "{state}");
        }
        assert_eq!(state_after(&row(AccessState::Pending, 999), false), None);
    }
}
