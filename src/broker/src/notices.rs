//! Notices: what happened to the devices and the user key of a member, for a receiver that tells the member.
//!
//! A notice is derived from a change that the database has committed. The broker puts it into a bounded queue, from which another
//! part of the program delivers it. A full queue drops the notice: a receiver that is slow or gone neither delays nor fails a call.
//!
//! A notice contains neither keys nor the words of a fingerprint phrase, nor the fingerprint of a public key, from which the words
//! could be computed.
//!
//! Mitigation: M29 of `THREAT_MODEL.md`.

use std::{
    collections::BTreeSet,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use tokio::sync::mpsc;

use keybroker_core::{
    call::{CallId, Timestamp},
    device::{AccessState, DeviceState},
    key::{AccessRequestId, DeviceId, KeyName, Revision, Tenant, UserId},
    metrics,
    principal::Action,
};
use keybroker_store::{AccessRow, DeviceChange, DeviceRow, RecordInfo};

use super::{Broker, journal::Draft};

/// Shortest time between two log lines about dropped notices.
const LOG_INTERVAL: Duration = Duration::from_mins(1);

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

/// The queue of notices that wait for their delivery.
#[derive(Debug)]
pub struct NoticeQueue {
    events: BTreeSet<NoticeEvent>,
    queue: mpsc::Sender<Notice>,
    dropped: Mutex<Dropped>,
}

/// The notices that were dropped since the last log line about them.
#[derive(Debug, Default)]
struct Dropped {
    count: u64,
    logged: Option<Instant>,
}

impl NoticeQueue {
    /// A queue for notices about these events, and the end from which they are delivered. If `notices_max` notices wait, further
    /// notices are dropped.
    pub fn new(
        events: BTreeSet<NoticeEvent>,
        notices_max: usize,
    ) -> (Self, mpsc::Receiver<Notice>) {
        let (queue, waiting) = mpsc::channel(notices_max);
        let new = Self {
            events,
            queue,
            dropped: Mutex::default(),
        };
        (new, waiting)
    }

    /// Puts a notice into the queue, or drops it.
    fn offer(&self, notice: Notice) {
        if !self.events.contains(&notice.event) || self.queue.try_send(notice).is_ok() {
            return;
        }
        metrics::NOTICES.with(["dropped"]).increment(1);
        let mut dropped = self.dropped.lock().unwrap_or_else(PoisonError::into_inner);
        dropped.count += 1;
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
}

impl Broker {
    /// Offers the notices about a change of devices that was committed.
    pub(super) fn notify(
        &self,
        draft: &Draft,
        change: &DeviceChange,
        replaced: Option<&RecordInfo>,
        now: Timestamp,
    ) {
        let Some(notices) = &self.notices else { return };
        let devices = change.devices.iter().map(|changed| &changed.row);
        for row in devices {
            if let Some(event) = event_of_device(row, draft, now) {
                notices.offer(Notice {
                    device: Some(NoticeDevice {
                        id: row.address.device,
                        name: row.name.clone(),
                        kind: row.kind.clone(),
                    }),
                    ..self.notice(draft, event, &row.address.tenant, &row.address.user, now)
                });
            }
        }
        if let Some(changed) = &change.request
            && let Some(event) = event_of_request(&changed.row, changed.expected.is_none(), now)
        {
            notices.offer(self.notice_of_request(draft, event, &changed.row, now));
        }
        if let Some(RecordInfo {
            address, revision, ..
        }) = replaced
        {
            let event = NoticeEvent::UserKeyRotated;
            notices.offer(Notice {
                key: Some((address.name.clone(), *revision)),
                ..self.notice(draft, event, &address.tenant, &address.user, now)
            });
        }
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

/// The event of a changed device. A device that was renamed, or that only signed another change, has none.
fn event_of_device(row: &DeviceRow, draft: &Draft, now: Timestamp) -> Option<NoticeEvent> {
    if draft.is_of(Action::RenameDevice) {
        return None;
    }
    match row.state {
        _ if row.lost == Some(now) => Some(NoticeEvent::DeviceLost),
        DeviceState::Trusted if row.trusted == now => Some(NoticeEvent::DeviceTrusted),
        DeviceState::Trusted => None,
        DeviceState::Lost => Some(NoticeEvent::DeviceLost),
        DeviceState::Untrusted => Some(NoticeEvent::DeviceUntrusted),
    }
}

/// The event of a changed request for access. A first of two approvals, a fetched answer and a confirmation have none.
fn event_of_request(row: &AccessRow, is_new: bool, now: Timestamp) -> Option<NoticeEvent> {
    if is_new {
        return Some(NoticeEvent::AccessRequested);
    }
    let decision = row.decision.as_ref();
    let is_over_now = row.closed == Some(now);
    match row.state {
        AccessState::Approved => {
            let decision = decision.filter(|decision| decision.at == now)?;
            Some(match decision.device {
                Some(_) => NoticeEvent::AccessApproved,
                None => NoticeEvent::AccessApprovedForMember,
            })
        }
        AccessState::Denied if is_over_now || decision.is_some_and(|it| it.at == now) => {
            Some(NoticeEvent::AccessDenied)
        }
        AccessState::Revoked if is_over_now => Some(NoticeEvent::AccessDenied),
        _ => None,
    }
}
