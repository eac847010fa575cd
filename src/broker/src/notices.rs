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
    key::{AccessRequestId, DeviceId, KeyName, Revision, Tenant, UserId},
    metrics,
};

mod changes;
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

    /// Keeps the notices of a change with an unknown outcome. Drops them if too many notices are held, also of changes in progress, or
    /// if the other changes of the member already have the member's part.
    fn keep(&self, call: CallId) {
        let mut held = self.held();
        let Some(notices) = held.get(&call) else {
            return;
        };
        let count = notices.len();
        let is_of_member = |other: &&Notice| {
            notices
                .first()
                .is_some_and(|one| one.tenant == other.tenant && one.user == other.user)
        };
        let total: usize = held.values().map(Vec::len).sum();
        let of_member = held.values().flatten().filter(is_of_member).count();
        if total > self.notices_max || of_member - count >= self.places.member_max {
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
