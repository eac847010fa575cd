//! Trusted devices of members, and requests for access of new devices. The store does not interpret the encrypted keys.

use async_trait::async_trait;

use keybroker_core::{
    call::{CallId, Timestamp},
    device::{AccessApprover, AccessState, DeviceState},
    envelope::{Mac, mac::MacMessage},
    key::{AccessRequestId, DeviceId, KeyName, RecordId, Revision, Tenant, UserId, WrappingKeyId},
    principal::Reach,
};

use super::{
    error::Error,
    record::{NewRevision, RecordInfo, Stamp},
};

/// Highest number of devices of one member that one query returns. A member cannot have more rows.
pub const DEVICES_MAX: u32 = 200;
/// Highest number of requests for access on one page.
pub const ACCESS_REQUESTS_LISTED_MAX: u32 = 200;
/// Longest name of the form of an answer, in bytes.
pub const ANSWER_FORM_BYTES_MAX: usize = 32;
/// Longest network address, in bytes.
pub const PEER_BYTES_MAX: usize = 64;

/// The address of a device: tenant, member and id.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct DeviceAddress {
    /// The tenant of the member.
    pub tenant: Tenant,
    /// The member.
    pub user: UserId,
    /// The device.
    pub device: DeviceId,
}

/// The encrypted keys of a device, which the broker cannot open.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SealedKeys {
    /// The user key, encrypted to the public key of the device.
    pub user_key: Vec<u8>,
    /// The public key of the device, encrypted with the user key.
    pub public_key: Vec<u8>,
    /// The private key of the device, encrypted with its device key.
    pub private_key: Vec<u8>,
}

/// A device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceRow {
    /// Its address.
    pub address: DeviceAddress,
    /// The wrapping key whose integrity key made the MAC.
    pub signer: WrappingKeyId,
    /// The state.
    pub state: DeviceState,
    /// The name that the member gave the device.
    pub name: String,
    /// The type of the device, as its app states it.
    pub kind: String,
    /// The public key of the signatures of the device.
    pub verification_key: Vec<u8>,
    /// The name of the user key that the device opens.
    pub key_name: KeyName,
    /// The revision of the user key that the device opens.
    pub revision: Revision,
    /// The encrypted keys; empty unless the device is trusted.
    pub keys: SealedKeys,
    /// When the trust was established.
    pub trusted: Timestamp,
    /// When the row was last changed.
    pub changed: Timestamp,
    /// The time of the last signature of the device that was accepted.
    pub signed: Timestamp,
    /// When the device was reported as lost.
    pub lost: Option<Timestamp>,
    /// When the device last fetched its keys. The MAC does not cover this time, so that a read does not need a new MAC.
    pub used: Option<Timestamp>,
    /// A MAC over all fields above, except `signer` and `used`, by the integrity key of `signer`.
    pub mac: Mac,
}

impl DeviceRow {
    /// The message that the row's MAC must cover. It does not contain the signer, so that a re-wrap keeps the message.
    pub fn mac_message(&self) -> MacMessage {
        let times = [
            self.trusted.micros(),
            self.changed.micros(),
            self.signed.micros(),
            self.lost.map_or(0, Timestamp::micros),
        ]
        .map(i64::to_be_bytes);
        let [trusted, changed, signed, lost] = &times;
        MacMessage::device(&[
            self.address.tenant.as_str().as_bytes(),
            self.address.user.as_str().as_bytes(),
            self.address.device.as_bytes(),
            self.state.as_str().as_bytes(),
            self.name.as_bytes(),
            self.kind.as_bytes(),
            &self.verification_key,
            self.key_name.as_str().as_bytes(),
            &self.revision.get().to_be_bytes(),
            &self.keys.user_key,
            &self.keys.public_key,
            &self.keys.private_key,
            trusted,
            changed,
            signed,
            lost,
        ])
    }
}

/// A row of a device that cannot be decoded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DamagedDevice {
    /// The address of the device, if it can be read.
    pub address: Option<DeviceAddress>,
    /// The column that cannot be decoded.
    pub detail: String,
}

/// The answer to a request for access.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The user key, encrypted to the public key of the request.
    pub bytes: Vec<u8>,
    /// How it is encrypted, at most [`ANSWER_FORM_BYTES_MAX`] bytes.
    pub form: String,
}

/// Who decided about a request for access.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AccessDecision {
    /// The principal that decided.
    pub by: String,
    /// The device that approved, unless an administrator decided.
    pub device: Option<DeviceId>,
    /// When.
    pub at: Timestamp,
}

/// The device that asks for access.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AskingDevice {
    /// Its address.
    pub address: DeviceAddress,
    /// Its name.
    pub name: String,
    /// Its type, as its app states it.
    pub kind: String,
    /// The public key of its signatures.
    pub verification_key: Vec<u8>,
}

/// A request for access.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AccessRow {
    /// The id of the request.
    pub id: AccessRequestId,
    /// The wrapping key whose integrity key made the MAC.
    pub signer: WrappingKeyId,
    /// The stored state, which is never [`AccessState::Expired`].
    pub state: AccessState,
    /// Who is asked to approve.
    pub approver: AccessApprover,
    /// The device that asks.
    pub device: AskingDevice,
    /// The name of the requested user key.
    pub key_name: KeyName,
    /// The public key to which the answer is encrypted.
    pub public_key: Vec<u8>,
    /// The MAC of the access code.
    pub code: Mac,
    /// The wrapping key whose integrity key made the MAC of the access code.
    pub code_key: WrappingKeyId,
    /// The principal that made the request.
    pub requested_by: String,
    /// The network address from which the request came.
    pub peer: String,
    /// When the request was made.
    pub requested: Timestamp,
    /// When the request, or after an approval its answer, expires.
    pub expires: Timestamp,
    /// How many wrong access codes the requesting principal sent.
    pub tries: u32,
    /// The first of two approving administrators; `None` before, or if one is sufficient.
    pub first_approved_by: Option<String>,
    /// The decision; `None` for a pending request.
    pub decision: Option<AccessDecision>,
    /// The answer; `None` unless the request is approved.
    pub answer: Option<Answer>,
    /// When the answer was first fetched.
    pub fetched: Option<Timestamp>,
    /// When the answer was confirmed, or the approval withdrawn.
    pub closed: Option<Timestamp>,
    /// The revision of the user key that the answer opens; `None` unless the request was approved.
    pub answer_revision: Option<Revision>,
    /// How many approvals had wrong words of the fingerprint phrase.
    pub wrong_words: u32,
    /// A MAC over all fields above, except `signer`, by the integrity key of `signer`.
    pub mac: Mac,
}

impl AccessRow {
    /// The state at a time.
    pub fn state_at(&self, now: Timestamp) -> AccessState {
        self.state.at(self.expires, self.fetched, now)
    }

    /// The message that the row's MAC must cover.
    pub fn mac_message(&self) -> MacMessage {
        let decision = self.decision.as_ref();
        let times = [
            self.requested.micros(),
            self.expires.micros(),
            decision.map_or(0, |decision| decision.at.micros()),
            self.fetched.map_or(0, Timestamp::micros),
            self.closed.map_or(0, Timestamp::micros),
        ]
        .map(i64::to_be_bytes);
        let [requested, expires, decided, fetched, closed] = &times;
        let address = &self.device.address;
        let approved_by = decision.and_then(|decision| decision.device);
        let revision = self.answer_revision.map_or(0, Revision::get).to_be_bytes();
        MacMessage::access_request(&[
            address.tenant.as_str().as_bytes(),
            address.user.as_str().as_bytes(),
            address.device.as_bytes(),
            self.id.as_bytes(),
            self.state.as_str().as_bytes(),
            self.approver.as_str().as_bytes(),
            self.key_name.as_str().as_bytes(),
            self.device.name.as_bytes(),
            self.device.kind.as_bytes(),
            &self.device.verification_key,
            &self.public_key,
            &self.code,
            self.code_key.as_bytes(),
            self.requested_by.as_bytes(),
            self.peer.as_bytes(),
            requested,
            expires,
            &self.tries.to_be_bytes(),
            self.first_approved_by
                .as_deref()
                .unwrap_or_default()
                .as_bytes(),
            decision.map_or(&[][..], |decision| decision.by.as_bytes()),
            approved_by.as_ref().map_or(&[][..], |id| id.as_bytes()),
            decided,
            self.answer.as_ref().map_or(&[][..], |answer| &answer.bytes),
            self.answer
                .as_ref()
                .map_or(&[][..], |answer| answer.form.as_bytes()),
            fetched,
            closed,
            &revision,
            &self.wrong_words.to_be_bytes(),
        ])
    }
}

/// A row of a request for access that cannot be decoded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DamagedAccess {
    /// The id of the request, if it can be read.
    pub id: Option<AccessRequestId>,
    /// The column that cannot be decoded.
    pub detail: String,
}

/// The position of a request for access in a list: the newest first, and those of one moment in the order of their ids.
pub type AccessCursor = (Timestamp, AccessRequestId);

/// Which requests for access are wanted, and which page of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AccessQuery {
    /// The tenant of the members.
    pub tenant: Tenant,
    /// The members.
    pub users: Reach<UserId>,
    /// If set, only requests that are pending are wanted.
    pub pending: Option<PendingOnly>,
    /// The last position of the page before.
    pub after: Option<AccessCursor>,
    /// The number of requests, at most [`ACCESS_REQUESTS_LISTED_MAX`].
    pub limit: u32,
}

/// The requests that are pending at a time. A row whose state is none that a broker writes counts as pending, so that it is noticed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PendingOnly {
    /// The time.
    pub now: Timestamp,
    /// The requests of this principal are not wanted; empty if all are.
    pub except: String,
}

/// The number of requests for access of one member that have not expired.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AccessCounts {
    /// Pending requests.
    pub pending: u64,
    /// All requests, also those that were decided.
    pub unexpired: u64,
}

/// A row before and after a change. The change is refused unless the stored row still has the expected MAC.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Changed<R> {
    /// The row after the change.
    pub row: R,
    /// The MAC of the row before the change; `None` for a new row.
    pub expected: Option<Mac>,
}

/// A new revision of a user key together with its stamp.
#[derive(Clone, Debug)]
pub struct Replacement {
    /// The new revision.
    pub new: NewRevision,
    /// The stamp of the change.
    pub stamp: Stamp,
}

/// The trusted devices of a member, each with the MAC of its row.
pub type TrustedSet = (Tenant, UserId, Vec<(DeviceId, Mac)>);

/// A change of devices and of at most one request for access, in one transaction.
#[derive(Clone, Debug, Default)]
pub struct DeviceChange {
    /// The devices that are added or changed.
    pub devices: Vec<Changed<DeviceRow>>,
    /// The damaged devices that are removed. With them, all requests of the member are removed: without the rows, no broker could know that
    /// a trust was ended after their approval.
    pub removes: Vec<DeviceAddress>,
    /// The request that is added or changed.
    pub request: Option<Changed<AccessRow>>,
    /// If set, `request` is new: the earlier pending requests of its device are removed, and the member must have fewer other requests
    /// than these.
    pub fewer_than: Option<AccessCounts>,
    /// A request that must not change until the transaction ends, with its MAC.
    pub unchanged: Option<(AccessRequestId, Mac)>,
    /// The user key that must be active, and the revision that it must have, until the transaction ends.
    pub requires: Option<(RecordId, Revision)>,
    /// The complete set of trusted devices that the member must have until the transaction ends, with their MACs.
    pub trusted: Option<TrustedSet>,
    /// The new revision of the user key.
    pub replaces: Option<Replacement>,
}

impl DeviceChange {
    /// The member whom the change concerns.
    pub(crate) fn member(&self) -> Option<(&Tenant, &UserId)> {
        let devices = self.devices.iter().map(|changed| &changed.row.address);
        let request = self.request.iter().map(|one| &one.row.device.address);
        let mut addresses = devices.chain(&self.removes).chain(request);
        addresses
            .next()
            .map(|address| (&address.tenant, &address.user))
    }
}

/// The swap of the MAC of one device.
#[derive(Clone, Debug)]
pub struct DeviceMove {
    /// The device.
    pub address: DeviceAddress,
    /// The wrapping key whose integrity key made the MAC that the row must still contain.
    pub from: WrappingKeyId,
    /// That MAC.
    pub old: Mac,
    /// The wrapping key whose integrity key made the new MAC.
    pub to: WrappingKeyId,
    /// The new MAC.
    pub new: Mac,
}

/// The operations of a store for devices and requests for access.
#[async_trait]
pub trait Devices: Send + Sync {
    /// Returns a device.
    async fn device(&self, address: &DeviceAddress) -> Result<Option<DeviceRow>, Error>;

    /// Returns the devices of a member in the order of their ids, at most [`DEVICES_MAX`].
    async fn devices(
        &self,
        tenant: &Tenant,
        user: &UserId,
    ) -> Result<Vec<Result<DeviceRow, DamagedDevice>>, Error>;

    /// Returns at most `limit` devices of all members after an address, in the order of their addresses. A row whose address cannot be
    /// read ends the pages with an error.
    async fn devices_after(
        &self,
        after: Option<&DeviceAddress>,
        limit: u32,
    ) -> Result<Vec<(DeviceAddress, Result<DeviceRow, DamagedDevice>)>, Error>;

    /// Changes devices, a request and a user key of one member in one transaction, which also stores the mark of the call. The
    /// transaction first locks the user keys of the member, so that two changes of one member never run at the same time. Returns
    /// [`Error::Exists`] if a new row exists, [`Error::Conflict`] if a row was changed meanwhile, and [`Error::Revision`] if the user
    /// key has another revision than required.
    async fn change_devices(
        &self,
        change: &DeviceChange,
        call: CallId,
        at: Timestamp,
    ) -> Result<Option<RecordInfo>, Error>;

    /// Stores the time at which a device last fetched its keys, if no later time is stored.
    async fn note_device_use(&self, address: &DeviceAddress, at: Timestamp) -> Result<(), Error>;

    /// Swaps the MACs of devices, and stores the mark of the call, like
    /// [`move_clients`](crate::Rewraps::move_clients).
    async fn move_devices(&self, moves: Vec<DeviceMove>, call: CallId) -> Result<Vec<bool>, Error>;

    /// Removes the devices that are not trusted and were last changed before a time, and returns their number.
    async fn forget_devices(&self, before: Timestamp) -> Result<u64, Error>;

    /// Returns the number of devices that are not trusted and were last changed before a time.
    async fn old_devices(&self, before: Timestamp) -> Result<u64, Error>;

    /// Returns a request for access.
    async fn access_request(&self, id: AccessRequestId) -> Result<Option<AccessRow>, Error>;

    /// Returns one page of the wanted requests with their positions, newest first. A row whose position cannot be read ends the page with an
    /// error.
    async fn access_requests(
        &self,
        wanted: &AccessQuery,
    ) -> Result<Vec<(AccessCursor, Result<AccessRow, DamagedAccess>)>, Error>;

    /// Returns the requests with the latest decisions about these users, the latest decision first.
    async fn access_decisions(
        &self,
        tenant: &Tenant,
        users: &Reach<UserId>,
        limit: u32,
    ) -> Result<Vec<Result<AccessRow, DamagedAccess>>, Error>;

    /// Counts the requests of a member that have not expired at a time, except the pending requests of this device of the member.
    /// A request with another verification key is the request of another device.
    async fn count_access_requests(
        &self,
        asking: &AskingDevice,
        now: Timestamp,
    ) -> Result<AccessCounts, Error>;

    /// Counts the requests that a member made after a time.
    async fn recent_access_requests(
        &self,
        tenant: &Tenant,
        user: &UserId,
        after: Timestamp,
    ) -> Result<u64, Error>;

    /// Counts the requests of a tenant that a principal approved for members after a time. As the first of two approvers, the
    /// requests count that were made after this time.
    async fn recent_approvals(
        &self,
        tenant: &Tenant,
        principal: &str,
        after: Timestamp,
    ) -> Result<u64, Error>;

    /// Removes the requests that expired before a time, and returns their number.
    async fn forget_access_requests(&self, before: Timestamp) -> Result<u64, Error>;

    /// Returns the number of requests that expired before a time.
    async fn old_access_requests(&self, before: Timestamp) -> Result<u64, Error>;
}
