//! Requests for access: a new device of a member asks for the user key, encrypted to a public key that it made.

use std::sync::Arc;

use aws_lc_rs::rand;

use keybroker_core::{
    call::{Call, Timestamp},
    device::{AccessApprover, AccessState, DeviceState, VerificationKey},
    envelope::mac::MacMessage,
    error::{Error, Reason},
    key::{AccessRequestId, DeviceId, ID_BYTES, KeyName, UserId},
    principal::{Action, Principal},
};
use keybroker_hsm::RecipientKey;
use keybroker_store::{
    AccessCounts, AccessRow, AskingDevice, Changed, DeviceAddress, DeviceChange, PEER_BYTES_MAX,
};

use crate::{Broker, caller, within};

use super::{AccessView, UNSIGNED, after, limit};

/// Highest numbers of pending requests of one member, and of requests that have not expired, also of those that were decided. They are
/// bounded so that a person with an access token of the member cannot fill the list that approvers read.
const MOST: AccessCounts = AccessCounts {
    pending: 5,
    unexpired: 50,
};

/// A request for access.
#[derive(Debug)]
pub struct NewAccessRequest {
    /// The id of the device, which the device chooses.
    pub device: DeviceId,
    /// The name of the device.
    pub name: String,
    /// The type of the device, as its app states it.
    pub kind: String,
    /// The public key of the signatures of the device.
    pub verification_key: VerificationKey,
    /// The public key to which the answer is encrypted.
    pub public_key: Vec<u8>,
    /// The access code, which only the device knows.
    pub code: Vec<u8>,
    /// The name of the requested user key.
    pub key_name: KeyName,
    /// Who is asked to approve.
    pub approver: AccessApprover,
}

impl Broker {
    /// Stores a request for access of a new device of the principal. The request replaces an earlier one of the device that is pending.
    /// A request with another verification key is not of the same device, even if it has the id of the device: another person with an
    /// access token of the member cannot remove the request that the member's device made.
    pub async fn request_access(
        self: &Arc<Self>,
        principal: &Principal,
        call: &Call,
        new: NewAccessRequest,
    ) -> Result<AccessView, Error> {
        let (broker, principal, call) = (Arc::clone(self), principal.clone(), call.clone());
        self.run_change(Action::RequestAccess, call.clone(), async move {
            let begun = broker.begin_device_action(&principal, &call, Action::RequestAccess, None);
            let (user, mut draft) = begun.await?;
            draft.device(new.device);
            let now = Timestamp::now();
            let plan = broker.plan_request(&principal, &call, &user, new, now);
            let changed = broker.or_record(&draft, Box::pin(plan).await).await?;
            draft.access_request(&changed.row, broker.policy.place_of(&changed.row.peer));
            let row = changed.row.clone();
            let change = DeviceChange {
                request: Some(changed),
                fewer_than: Some(MOST),
                ..DeviceChange::default()
            };
            let committed = broker.commit_devices(&call, &draft, &change, now).await;
            if let Err(error) = &committed
                && error.reason() == Reason::DeviceState
            {
                // Another request at the same moment can have been the last one that the limits permit.
                broker
                    .check_requests_of_member(&call, &row.device, now)
                    .await?;
            }
            committed?;
            broker.watch_requests(&principal, &call, &user).await;
            Ok(broker.access_view(row))
        })
        .await
    }

    async fn plan_request(
        &self,
        principal: &Principal,
        call: &Call,
        user: &UserId,
        new: NewAccessRequest,
        now: Timestamp,
    ) -> Result<Changed<AccessRow>, Error> {
        RecipientKey::from_spki(&new.public_key)
            .map_err(|error| Error::violation("public_key", error.to_string()))?;
        self.record_of(principal, call, user, &new.key_name).await?;
        let address = DeviceAddress {
            tenant: principal.tenant().clone(),
            user: user.clone(),
            device: new.device,
        };
        if let Some(known) = within(call, self.store.device(&address)).await?
            && known.state == DeviceState::Trusted
        {
            let what = "the device is trusted, so it needs no request";
            return Err(super::wrong_state("device_id", what));
        }
        let asking = AskingDevice {
            address,
            name: new.name,
            kind: new.kind,
            verification_key: new.verification_key.as_bytes().to_vec(),
        };
        self.check_requests_of_member(call, &asking, now).await?;
        let id = fresh_id()?;
        let lifetime = match new.approver {
            AccessApprover::Device => self.device_rules.request_lifetime,
            AccessApprover::Administrator => self.device_rules.administrator_lifetime,
        };
        let token = caller(principal, call);
        let (code_key, code) = self
            .fresh_mac(&token, &MacMessage::access_code(id, &new.code))
            .await?;
        let (signer, mac) = UNSIGNED;
        let row = AccessRow {
            id,
            signer,
            state: AccessState::Pending,
            approver: new.approver,
            device: asking,
            key_name: new.key_name,
            public_key: new.public_key,
            code,
            code_key,
            requested_by: principal.name().to_owned(),
            peer: call.peer[..call.peer.floor_char_boundary(PEER_BYTES_MAX)].to_owned(),
            requested: now,
            expires: after(now, lifetime),
            tries: 0,
            first_approved_by: None,
            decision: None,
            answer: None,
            fetched: None,
            closed: None,
            answer_revision: None,
            wrong_words: 0,
            mac,
        };
        self.changed_access(&token, row, None).await
    }

    async fn check_requests_of_member(
        &self,
        call: &Call,
        asking: &AskingDevice,
        now: Timestamp,
    ) -> Result<(), Error> {
        let counts = self.store.count_access_requests(asking, now);
        let counts = within(call, counts).await?;
        let what = if counts.pending >= MOST.pending {
            format!(
                "{} requests of other devices of the member are pending; deny them, or wait until they expire",
                MOST.pending
            )
        } else if counts.unexpired >= MOST.unexpired {
            format!(
                "{} requests of the member have not expired yet; wait until the first of them expires",
                MOST.unexpired
            )
        } else {
            return Ok(());
        };
        Err(limit("device_id", &what))
    }
}

fn fresh_id() -> Result<AccessRequestId, Error> {
    let mut bytes = [0; ID_BYTES];
    rand::fill(&mut bytes).map_err(|_| Error::new(Reason::Bug, "no random bytes"))?;
    Ok(AccessRequestId::from_bytes(bytes))
}
