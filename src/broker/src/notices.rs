//! Notices: what happened to the devices and the user key of a member, for a receiver that tells the member.
//!
//! A notice is derived from a change of devices. After the database has committed the change, the broker puts the notice into a bounded
//! queue, from which another part of the program delivers it. A full queue drops the notice: a receiver that is slow or gone neither
//! delays nor fails a call. One member can take only a share of the queue, so that the notices of one member do not displace those of
//! the others.
//!
//! If the outcome of a change is unknown, its notices wait until the open intent of the change is resolved.
//!
//! A notice contains neither keys nor the words of a fingerprint phrase, nor the fingerprint of a public key, from which the words
//! could be computed.
//!
//! Mitigation: M29 of `THREAT_MODEL.md`.

use std::{
    collections::{BTreeSet, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use keybroker_core::{
    call::{CallId, Timestamp},
    device::{AccessState, DeviceState},
    error::Error,
    key::{AccessRequestId, DeviceId, KeyName, Revision, Tenant, UserId},
    metrics,
    principal::Action,
};
use keybroker_store as store;
use keybroker_store::{AccessRow, DeviceChange, Replacement};

use super::{Broker, commit::Settled, journal::Draft};

mod members;
#[cfg(test)]
mod tests;

pub use members::MemberSemaphores;

/// Shortest time between two log lines about dropped notices.
const LOG_INTERVAL: Duration = Duration::from_mins(1);
/// One member can take this part of the queue: one tenth.
const MEMBER_DIVISOR: usize = 10;

/// What a notice is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum NoticeEvent {
    /// A new device of the member asks for access.
    AccessRequested,
    /// Another device of the member approved a request.
    AccessApproved,
    /// An administrator approved a request.
    AccessApprovedForMember,
    /// A request was denied, or its approval withdrawn.
    AccessDenied,
    /// The trust of a device was established.
    DeviceTrusted,
    /// The trust of a device was ended.
    DeviceUntrusted,
    /// A device was reported as lost, or its trust was ended because it was lost.
    DeviceLost,
    /// The user key was rotated, together with the keys of all devices.
    UserKeyRotated,
}

impl NoticeEvent {
    /// Every event, in the order of the documentation.
    pub const ALL: [Self; 8] = [
        Self::AccessRequested,
        Self::AccessApproved,
        Self::AccessApprovedForMember,
        Self::AccessDenied,
        Self::DeviceTrusted,
        Self::DeviceUntrusted,
        Self::DeviceLost,
        Self::UserKeyRotated,
    ];

    /// Name in the configuration and in the message.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::AccessRequested => "access_request.created",
            Self::AccessApproved => "access_request.approved",
            Self::AccessApprovedForMember => "access_request.approved_for_member",
            Self::AccessDenied => "access_request.denied",
            Self::DeviceTrusted => "device.trusted",
            Self::DeviceUntrusted => "device.untrusted",
            Self::DeviceLost => "device.lost",
            Self::UserKeyRotated => "user_key.rotated",
        }
    }

    /// The event with this name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|event| event.as_str() == name)
    }
}

/// The device of a notice. Name and type are texts of the app.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NoticeDevice {
    /// The id.
    pub id: DeviceId,
    /// The name.
    pub name: String,
    /// The type.
    pub kind: String,
}

/// What happened to a member.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notice {
    /// What happened.
    pub event: NoticeEvent,
    /// When.
    pub at: Timestamp,
    /// The call that did it.
    pub call: CallId,
    /// The tenant of the member.
    pub tenant: Tenant,
    /// The member.
    pub user: UserId,
    /// The principal of the call.
    pub principal: String,
    /// The address from which the request for access came or, for the other events, the address of the call.
    pub peer: String,
    /// The name of the network of this address, or an empty string.
    pub place: String,
    /// The device that asks, or whose trust changed.
    pub device: Option<NoticeDevice>,
    /// The request for access.
    pub request: Option<AccessRequestId>,
    /// When the request for access or its answer expires.
    pub expires: Option<Timestamp>,
    /// The user key that was rotated, and its new revision.
    pub key: Option<(KeyName, Revision)>,
}

/// A notice with its two places: one of the whole queue, and one of its member. The places are free again when they are dropped.
pub type QueuedNotice = (Notice, [OwnedSemaphorePermit; 2]);

/// The queue of notices that wait for their delivery.
#[derive(Debug)]
pub struct NoticeQueue {
    events: BTreeSet<NoticeEvent>,
    queue: mpsc::Sender<QueuedNotice>,
    places: Places,
    notices_max: usize,
    /// The notices of the changes whose outcome is not known yet.
    held: Mutex<HashMap<CallId, Vec<Notice>>>,
    dropped: Mutex<Dropped>,
}

/// The notices that were dropped since the last log line about them.
#[derive(Debug, Default)]
struct Dropped {
    count: u64,
    logged: Option<Instant>,
}

/// The places of the queue. A notice has its places until its delivery has ended.
#[derive(Debug)]
struct Places {
    all: Arc<Semaphore>,
    of_members: Mutex<MemberSemaphores>,
    member_max: usize,
}

impl Places {
    fn new(notices_max: usize) -> Self {
        let member_max = notices_max.div_ceil(MEMBER_DIVISOR);
        Self {
            all: Arc::new(Semaphore::new(notices_max)),
            of_members: Mutex::new(MemberSemaphores::new(member_max)),
            member_max,
        }
    }

    /// Takes the places of a notice; `None` if all places, or all places of the member, are taken.
    fn take(&self, notice: &Notice) -> Option<[OwnedSemaphorePermit; 2]> {
        let of_all = Arc::clone(&self.all).try_acquire_owned().ok()?;
        let mut members = self
            .of_members
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let places = members.of(notice);
        // An access token alone is enough to repeat these events, so they leave half of the places to the others.
        let is_repeatable = matches!(
            notice.event,
            NoticeEvent::AccessRequested | NoticeEvent::AccessDenied
        );
        if is_repeatable && places.available_permits() <= self.member_max / 2 {
            return None;
        }
        let of_member = Arc::clone(places).try_acquire_owned().ok()?;
        Some([of_all, of_member])
    }
}

impl NoticeQueue {
    /// A queue for notices about these events, and the end from which they are delivered. The receiver drops the places of a notice when
    /// its delivery has ended. If `notices_max` notices have places, or a tenth of them for one member, further notices are dropped.
    pub fn new(
        events: BTreeSet<NoticeEvent>,
        notices_max: usize,
    ) -> (Self, mpsc::Receiver<QueuedNotice>) {
        let (queue, waiting) = mpsc::channel(notices_max);
        let new = Self {
            events,
            queue,
            places: Places::new(notices_max),
            notices_max,
            held: Mutex::default(),
            dropped: Mutex::default(),
        };
        (new, waiting)
    }

    /// Puts a notice into the queue, or drops it.
    fn offer(&self, notice: Notice) {
        if !self.events.contains(&notice.event) {
            return;
        }
        let places = self.places.take(&notice);
        let is_queued = places.is_some_and(|places| self.queue.try_send((notice, places)).is_ok());
        if !is_queued {
            self.count_dropped(1);
        }
    }

    fn count_dropped(&self, count: usize) {
        let count = u64::try_from(count).unwrap_or(u64::MAX);
        metrics::NOTICES.with(["dropped"]).increment(count);
        let mut dropped = self.dropped.lock().unwrap_or_else(PoisonError::into_inner);
        dropped.count = dropped.count.saturating_add(count);
        let is_recent = |at: Instant| at.elapsed() < LOG_INTERVAL;
        if dropped.logged.is_some_and(is_recent) {
            return;
        }
        let count = std::mem::take(&mut dropped.count);
        dropped.logged = Some(Instant::now());
        drop(dropped);
        tracing::warn!(
            count,
            "notices were dropped, because too many notices wait for their delivery"
        );
    }

    fn held(&self) -> MutexGuard<'_, HashMap<CallId, Vec<Notice>>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Holds the notices of a change back until its outcome is known.
    fn hold(&self, call: CallId, mut notices: Vec<Notice>) {
        notices.retain(|notice| self.events.contains(&notice.event));
        if !notices.is_empty() {
            self.held().insert(call, notices);
        }
    }

    /// Keeps the notices of a change with an unknown outcome, or drops them if too many notices are kept.
    fn keep(&self, call: CallId) {
        let mut held = self.held();
        let Some(count) = held.get(&call).map(Vec::len) else {
            return;
        };
        let total: usize = held.values().map(Vec::len).sum();
        if total > self.notices_max {
            held.remove(&call);
            drop(held);
            self.count_dropped(count);
            return;
        }
        drop(held);
        tracing::info!(
            call_id = %call,
            count,
            "the outcome of a change is unknown, so its notices wait for the outcome"
        );
    }

    /// Queues the notices of a change that was committed, or forgets those of a change that was not. A further report about the same
    /// change has no effect.
    pub(super) fn settle(&self, call: CallId, is_committed: bool) {
        let notices = self.held().remove(&call).unwrap_or_default();
        if is_committed {
            for notice in notices {
                self.offer(notice);
            }
        }
    }
}

impl Broker {
    /// Commits a change of devices like [`Broker::commit_with_intent`], and queues its notices if the change was committed. If the outcome
    /// is unknown, the notices wait until `maintain` resolves the intent.
    pub(super) async fn commit_with_notices<T>(
        &self,
        draft: &Draft,
        change: &DeviceChange,
        now: Timestamp,
        commit: impl Future<Output = Result<T, store::Error>>,
    ) -> Result<Settled<T>, Error> {
        let Some(queue) = &self.notices else {
            return self.commit_with_intent(draft, now, commit).await;
        };
        let call = draft.call();
        // The notices are held before the commit, because `maintain` may resolve the intent as soon as the intent is left open.
        queue.hold(call, self.notices_about(draft, change, now));
        let settled = self.commit_with_intent(draft, now, commit).await;
        match &settled {
            Ok(settled) => queue.settle(call, settled.result.is_ok()),
            Err(_) if self.is_unresolved(call) => queue.keep(call),
            // The change was not started, or the intent was resolved meanwhile together with its notices.
            Err(_) => queue.settle(call, false),
        }
        settled
    }

    /// The notices about a change of devices.
    pub(super) fn notices_about(
        &self,
        draft: &Draft,
        change: &DeviceChange,
        now: Timestamp,
    ) -> Vec<Notice> {
        let mut notices = Vec::new();
        let mut devices = change.devices.iter().map(|changed| &changed.row).peekable();
        while let Some(row) = devices.next() {
            let is_last = devices.peek().is_none();
            if let Some(event) = event_of_device(draft, row.state, is_last) {
                notices.push(Notice {
                    device: Some(NoticeDevice {
                        id: row.address.device,
                        name: row.name.clone(),
                        kind: row.kind.clone(),
                    }),
                    ..self.notice(draft, event, &row.address.tenant, &row.address.user, now)
                });
            }
        }
        for removed in &change.removes {
            let event = NoticeEvent::DeviceUntrusted;
            notices.push(Notice {
                // The name and the type of a damaged row are unknown.
                device: Some(NoticeDevice {
                    id: removed.device,
                    name: String::new(),
                    kind: String::new(),
                }),
                ..self.notice(draft, event, &removed.tenant, &removed.user, now)
            });
        }
        if let Some(changed) = &change.request
            && let Some(event) =
                event_of_request(draft, changed.row.state, changed.expected.is_none())
        {
            notices.push(self.notice_of_request(draft, event, &changed.row, now));
        }
        if let Some(Replacement { new, .. }) = &change.replaces {
            let event = NoticeEvent::UserKeyRotated;
            notices.push(Notice {
                key: Some((new.address.name.clone(), new.revision)),
                ..self.notice(draft, event, &new.address.tenant, &new.address.user, now)
            });
        }
        notices
    }

    fn notice(
        &self,
        draft: &Draft,
        event: NoticeEvent,
        tenant: &Tenant,
        user: &UserId,
        at: Timestamp,
    ) -> Notice {
        let (principal, peer) = draft.caller();
        Notice {
            event,
            at,
            call: draft.call(),
            tenant: tenant.clone(),
            user: user.clone(),
            principal: principal.to_owned(),
            peer: peer.to_owned(),
            place: self.policy.place_of(peer).to_owned(),
            device: None,
            request: None,
            expires: None,
            key: None,
        }
    }

    fn notice_of_request(
        &self,
        draft: &Draft,
        event: NoticeEvent,
        row: &AccessRow,
        at: Timestamp,
    ) -> Notice {
        let address = &row.device.address;
        Notice {
            peer: row.peer.clone(),
            place: self.policy.place_of(&row.peer).to_owned(),
            device: Some(NoticeDevice {
                id: address.device,
                name: row.device.name.clone(),
                kind: row.device.kind.clone(),
            }),
            request: Some(row.id),
            expires: Some(row.expires),
            ..self.notice(draft, event, &address.tenant, &address.user, at)
        }
    }
}

/// The event of a changed device, from the action and the new state. A device that was renamed, or that only signed another change, has
/// none. Times are not compared: two changes can have the same time, and a clock can be set back.
///
/// Only a trusted device signs, so a device with another state was not changed as a signer. In a change that establishes trust, the last
/// device is the one whose trust is established.
fn event_of_device(draft: &Draft, state: DeviceState, is_last: bool) -> Option<NoticeEvent> {
    if draft.is_of(Action::RenameDevice) {
        return None;
    }
    if draft.is_of(Action::ReportDevice) {
        return Some(NoticeEvent::DeviceLost);
    }
    match state {
        DeviceState::Trusted if is_last && draft.is_of(Action::EstablishDevice) => {
            Some(NoticeEvent::DeviceTrusted)
        }
        DeviceState::Trusted => None,
        DeviceState::Lost => Some(NoticeEvent::DeviceLost),
        DeviceState::Untrusted => Some(NoticeEvent::DeviceUntrusted),
    }
}

/// The event of a changed request for access, from the action and the new state. A first of two approvals, a counted wrong guess, a
/// fetched answer and a confirmation have none.
fn event_of_request(draft: &Draft, state: AccessState, is_new: bool) -> Option<NoticeEvent> {
    if is_new {
        return Some(NoticeEvent::AccessRequested);
    }
    match state {
        AccessState::Approved if draft.is_of(Action::ApproveAccess) => {
            Some(NoticeEvent::AccessApproved)
        }
        AccessState::Approved if draft.is_of(Action::ApproveForMember) => {
            Some(NoticeEvent::AccessApprovedForMember)
        }
        // These states are final, so the request has just got its state.
        AccessState::Denied | AccessState::Revoked => Some(NoticeEvent::AccessDenied),
        AccessState::Approved
        | AccessState::Pending
        | AccessState::Consumed
        | AccessState::Expired => None,
    }
}
