//! Trusted devices of members, and requests of new devices for access.
//!
//! The keys belong to the apps on the devices. The broker keeps three encrypted values for each device and cannot open them. It
//! decides who may read, replace or remove them, and binds them to tenant, member and device with a MAC.
//!
//! An access token of a member alone must not lock the member out. Therefore, a change that ends or replaces trust needs the
//! signature of a key that was registered when the trust of a device was established ([`signed`]). A member without any trusted
//! device can establish the first one, because nothing can be lost then.
//!
//! A change has the same steps as every change of the broker: policy, rows with verified MACs, durable intent, one transaction, durable
//! outcome, answer.
//!
//! Mitigation: M27 of `THREAT_MODEL.md`.

use std::{net::IpAddr, time::Duration};

use keybroker_core::{
    call::{Call, Timestamp},
    envelope::{Mac, mac::MacMessage},
    error::{Error, Reason},
    key::{ID_BYTES, KeyUse, UserId, WrappingKeyId},
    principal::{Action, Principal},
};
use keybroker_hsm as hsm;
use keybroker_policy::Resource;
use keybroker_store as store;
use keybroker_store::{AccessRow, Changed, DeviceChange, DeviceRow, RecordInfo};

use super::{Broker, Registry, caller, commit::Settled, journal::Draft, within};

mod administrator;
mod answer;
mod decision;
mod establish;
mod list;
mod request;
mod rotation;
mod signed;
mod untrust;
mod watch;

pub use administrator::AdministratorApproval;
pub use answer::AccessAnswer;
pub use decision::{AccessDenial, DeviceApproval};
pub use establish::NewDevice;
pub use list::{AccessList, AccessPage, AccessView, DeviceList, DeviceView, PhraseView};
pub use request::NewAccessRequest;
pub use rotation::{RotatedDevice, Rotation as DeviceRotation};
pub use untrust::{Untrusted, Which};

/// The `[devices]` settings of the broker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceRules {
    /// Largest number of trusted devices of one member.
    pub trusted_max: u32,
    /// How long another device of the member can approve a request.
    pub request_lifetime: Duration,
    /// How long an administrator can approve a request.
    pub administrator_lifetime: Duration,
    /// How long the answer can be fetched after an administrator approved the request.
    pub answer_lifetime: Duration,
    /// How many approvers must approve a request, 1 or 2.
    pub approvers_needed: u32,
    /// How long rows that are over stay in the database.
    pub kept: Duration,
}

impl Default for DeviceRules {
    fn default() -> Self {
        Self {
            trusted_max: 50,
            request_lifetime: Duration::from_mins(15),
            administrator_lifetime: Duration::from_hours(7 * 24),
            answer_lifetime: Duration::from_hours(12),
            approvers_needed: 1,
            kept: Duration::from_hours(30 * 24),
        }
    }
}

impl Broker {
    /// Checks that the token can serve the call in time, asks the policy for an action on the devices of a member, and begins the audit
    /// entry. Without `user`, the member is the principal itself.
    async fn begin_device_action(
        &self,
        principal: &Principal,
        call: &Call,
        action: Action,
        user: Option<&UserId>,
    ) -> Result<(UserId, Draft), Error> {
        self.check_admission(&caller(principal, call), principal, call, action)
            .await?;
        let user = user.or(principal.subject());
        let resource = Resource::Devices {
            tenant: principal.tenant(),
            user,
        };
        let permit = self.permit(principal, call, action, resource).await?;
        let mut draft = Draft::of(principal, call, action, resource);
        draft.policy(permit.policy());
        if let Some(user) = user {
            return Ok((user.clone(), draft));
        }
        let error = Error::new(Reason::Policy, "the principal is not a member");
        self.or_record(&draft, Err(error)).await
    }

    /// Asks the policy for a decision about a request for access, and begins the audit entry.
    async fn begin_decision(
        &self,
        principal: &Principal,
        call: &Call,
        action: Action,
        row: &AccessRow,
    ) -> Result<Draft, Error> {
        let resource = self.access_resource(row);
        let permit = self.permit(principal, call, action, resource).await?;
        let mut draft = Draft::of(principal, call, action, resource);
        draft.policy(permit.policy());
        draft.access_request(row, self.policy.place_of(&row.peer));
        Ok(draft)
    }

    /// A request for access as policies see it.
    fn access_resource<'a>(&'a self, row: &'a AccessRow) -> Resource<'a> {
        let address = &row.device.address;
        Resource::AccessRequest {
            tenant: &address.tenant,
            user: &address.user,
            requested_by: &row.requested_by,
            device_type: &row.device.kind,
            peer: address_of(&row.peer),
            place: self.policy.place_of(&row.peer),
        }
    }

    /// A request for access that this broker has just written or verified, for the member.
    fn access_view(&self, row: AccessRow) -> AccessView {
        let place = self.policy.place_of(&row.peer).to_owned();
        AccessView::verified(row, place)
    }

    /// Commits a prepared change. The deadline of the caller is checked only at the start.
    async fn commit_devices(
        &self,
        call: &Call,
        draft: &Draft,
        change: &DeviceChange,
        now: Timestamp,
    ) -> Result<Option<RecordInfo>, Error> {
        self.or_record(draft, call.deadline.check()).await?;
        let commit = self.store.change_devices(change, call.id, now);
        let commit = self.commit_with_notices(draft, change, now, commit);
        let Settled { intent, result } = Box::pin(commit).await?;
        self.close_intent(intent, draft, result.map_err(from_commit))
            .await
    }

    /// Verifies that a broker wrote a row, as a job of this caller.
    async fn verify_row(
        &self,
        token: &hsm::Caller,
        signer: WrappingKeyId,
        message: &MacMessage,
        mac: &Mac,
        what: &str,
    ) -> Result<(), Error> {
        self.check_key(token.deadline(), signer, KeyUse::VerifyMac)
            .await?;
        match self.token.verify_mac(signer, message, mac, token).await {
            Ok(()) => Ok(()),
            Err(hsm::Error::MacRefused) => {
                let detail = format!("{what} was altered in the database: its MAC does not verify");
                Err(Error::new(Reason::RecordDamaged, detail))
            }
            Err(other) => Err(other.into()),
        }
    }

    async fn verify_device(&self, token: &hsm::Caller, row: &DeviceRow) -> Result<(), Error> {
        let what = format!("device {}", row.address.device);
        self.verify_row(token, row.signer, &row.mac_message(), &row.mac, &what)
            .await
    }

    async fn verify_access(&self, token: &hsm::Caller, row: &AccessRow) -> Result<(), Error> {
        let what = format!("request for access {}", row.id);
        self.verify_row(token, row.signer, &row.mac_message(), &row.mac, &what)
            .await
    }

    /// Makes a MAC with the integrity key that is in use, as a job of this caller.
    async fn fresh_mac(
        &self,
        token: &hsm::Caller,
        message: &MacMessage,
    ) -> Result<(WrappingKeyId, Mac), Error> {
        let signer = self
            .ask_registry(token.deadline(), Registry::integrity_key)
            .await?;
        let mac = self.token.mac(signer, message, token).await?;
        Ok((signer, mac))
    }

    /// A device with a new MAC, as a change of the row `before`.
    async fn changed_device(
        &self,
        token: &hsm::Caller,
        mut row: DeviceRow,
        before: Option<&DeviceRow>,
        now: Timestamp,
    ) -> Result<Changed<DeviceRow>, Error> {
        row.changed = now;
        (row.signer, row.mac) = self.fresh_mac(token, &row.mac_message()).await?;
        Ok(Changed {
            row,
            expected: before.map(|before| before.mac),
        })
    }

    /// A request for access with a new MAC, as a change of the row `before`.
    async fn changed_access(
        &self,
        token: &hsm::Caller,
        mut row: AccessRow,
        before: Option<&AccessRow>,
    ) -> Result<Changed<AccessRow>, Error> {
        (row.signer, row.mac) = self.fresh_mac(token, &row.mac_message()).await?;
        Ok(Changed {
            row,
            expected: before.map(|before| before.mac),
        })
    }

    /// Returns all devices of a member, after the token has verified each row. A member with a row that cannot be read or verified
    /// cannot change the trust of devices, because a writer of the database could otherwise hide a trusted device. An administrator can
    /// remove such rows together with all trust of the member.
    async fn verified_devices(
        &self,
        principal: &Principal,
        call: &Call,
        user: &UserId,
    ) -> Result<Vec<DeviceRow>, Error> {
        self.check_acknowledged()?;
        let found = within(call, self.store.devices(principal.tenant(), user)).await?;
        let token = caller(principal, call);
        let mut devices = Vec::with_capacity(found.len());
        for row in found {
            let row = row.map_err(|damaged| {
                let what = format!(
                    "a device cannot be read from the database: {}",
                    damaged.detail
                );
                Error::new(Reason::RecordDamaged, what)
            })?;
            call.deadline.check()?;
            self.verify_device(&token, &row).await?;
            devices.push(row);
        }
        Ok(devices)
    }

    /// Removes devices and requests for access that were over long ago.
    pub(super) async fn forget_device_rows(&self) {
        let kept = i64::try_from(self.device_rules.kept.as_micros()).unwrap_or(i64::MAX);
        let before = Timestamp::now().micros().saturating_sub(kept);
        let before = Timestamp::from_micros(before);
        let requests = self.store.forget_access_requests(before).await;
        let devices = self.store.forget_devices(before).await;
        match requests.and_then(|requests| Ok((requests, devices?))) {
            Ok((requests, devices)) => {
                tracing::debug!(
                    requests,
                    devices,
                    "deleted old requests for access and devices"
                );
            }
            Err(error) => {
                tracing::warn!(%error, "cannot delete old requests for access; the broker tries again later");
            }
        }
    }
}

/// A time after another time.
fn after(at: Timestamp, duration: Duration) -> Timestamp {
    let micros = i64::try_from(duration.as_micros()).unwrap_or(i64::MAX);
    Timestamp::from_micros(at.micros().saturating_add(micros))
}

/// The network address of a peer; the unspecified address if it cannot be parsed.
fn address_of(peer: &str) -> IpAddr {
    let parsed = peer.parse::<std::net::SocketAddr>().map(|peer| peer.ip());
    parsed.unwrap_or(IpAddr::from([0, 0, 0, 0]))
}

/// The key of a row that has no MAC yet.
const UNSIGNED: (WrappingKeyId, Mac) = (WrappingKeyId::from_bytes([0; ID_BYTES]), [0; 32]);

/// The error of a device or request that does not exist for this member.
fn unknown(field: &'static str) -> Error {
    let what =
        "the member has no device or request for access with this id; list the devices or requests";
    Error::new(Reason::DeviceNotFound, what).explained(field, what)
}

/// The error for a state that forbids the operation. Members may read the states of their devices and requests, so the error may tell the state.
fn wrong_state(field: &'static str, what: &str) -> Error {
    Error::new(Reason::DeviceState, what).explained(field, what)
}

/// The error for a limit on the rows of a member.
fn limit(field: &'static str, what: &str) -> Error {
    Error::new(Reason::Limit, what).explained(field, what)
}

/// Converts the error of a commit.
fn from_commit(error: store::Error) -> Error {
    match error {
        store::Error::Conflict | store::Error::Exists => wrong_state(
            "id",
            "the device or the request was changed at the same moment; nothing was changed, so read it and decide again",
        ),
        store::Error::State => Error::new(Reason::KeyNotFound, "the record is deleted"),
        other => other.into(),
    }
}
