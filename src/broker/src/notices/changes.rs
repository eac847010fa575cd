//! The notices of a change of devices, and their way into the queue when the change is committed.

use keybroker_core::{
    call::Timestamp,
    device::{AccessState, DeviceState},
    error::Error,
    key::{Tenant, UserId},
    principal::Action,
};
use keybroker_store as store;
use keybroker_store::{AccessRow, DeviceChange, Replacement};

use crate::{Broker, commit::Settled, journal::Draft};

use super::{Notice, NoticeDevice, NoticeEvent};

#[cfg(test)]
mod tests;

impl Broker {
    /// Commits a change of devices like [`Broker::commit_with_intent`], and queues its notices if the change was committed. If the outcome
    /// is unknown, the notices wait until `maintain` resolves the intent.
    pub(crate) async fn commit_with_notices<T>(
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
    pub(crate) fn notices_about(
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
