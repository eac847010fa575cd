//! Tests of the events of changes.

use std::time::Duration;

use keybroker_core::call::{Call, CallId, Deadline};

use crate::testing;

use super::*;

fn draft(action: Action) -> Draft {
    let principal = testing::service("URI:ada", &[]);
    let call = Call::start("192.0.2.1:1", Deadline::after(Duration::from_secs(1)));
    Draft::new(&principal, &call, action)
}

#[test]
fn the_action_and_the_state_decide_the_event_of_a_device() {
    use DeviceState::{Lost, Trusted, Untrusted};
    for (action, state, is_last, expected) in [
        (
            Action::EstablishDevice,
            Trusted,
            true,
            Some(NoticeEvent::DeviceTrusted),
        ),
        // The device that signed.
        (Action::EstablishDevice, Trusted, false, None),
        (Action::ApproveAccess, Trusted, true, None),
        (Action::UntrustDevice, Trusted, true, None),
        (Action::DenyAccess, Trusted, true, None),
        (Action::RotateDevices, Trusted, true, None),
        (
            Action::UntrustDevice,
            Untrusted,
            false,
            Some(NoticeEvent::DeviceUntrusted),
        ),
        (
            Action::UntrustDevice,
            Lost,
            true,
            Some(NoticeEvent::DeviceLost),
        ),
        (
            Action::DenyAccess,
            Untrusted,
            true,
            Some(NoticeEvent::DeviceUntrusted),
        ),
        (
            Action::RotateDevices,
            Untrusted,
            true,
            Some(NoticeEvent::DeviceUntrusted),
        ),
        (
            Action::ReportDevice,
            Trusted,
            true,
            Some(NoticeEvent::DeviceLost),
        ),
        (
            Action::ReportDevice,
            Untrusted,
            true,
            Some(NoticeEvent::DeviceLost),
        ),
        (Action::RenameDevice, Trusted, true, None),
        (Action::RenameDevice, Untrusted, true, None),
        (Action::RenameDevice, Lost, true, None),
    ] {
        let found = event_of_device(&draft(action), state, is_last);
        assert_eq!(found, expected, "{action:?} {state} {is_last}");
    }
}

#[test]
fn the_action_and_the_state_decide_the_event_of_a_request() {
    use AccessState::{Approved, Consumed, Denied, Pending, Revoked};
    let created = event_of_request(&draft(Action::RequestAccess), Pending, true);
    assert_eq!(created, Some(NoticeEvent::AccessRequested));
    for (action, state, expected) in [
        (
            Action::ApproveAccess,
            Approved,
            Some(NoticeEvent::AccessApproved),
        ),
        (
            Action::ApproveForMember,
            Approved,
            Some(NoticeEvent::AccessApprovedForMember),
        ),
        // The first of two approvals.
        (Action::ApproveForMember, Pending, None),
        (Action::DenyAccess, Denied, Some(NoticeEvent::AccessDenied)),
        (Action::DenyAccess, Revoked, Some(NoticeEvent::AccessDenied)),
        // The answer was fetched at the time of the approval.
        (Action::FetchAccess, Approved, None),
        (Action::FetchAccess, Consumed, None),
    ] {
        let found = event_of_request(&draft(action), state, false);
        assert_eq!(found, expected, "{action:?} {state}");
    }
}

/// A wrong guess is counted within a call for another action. Only the last wrong guess has an event.
#[test]
fn a_counted_wrong_guess_is_no_approval() {
    use AccessState::{Approved, Denied, Pending, Revoked};
    for (action, counted, state, expected) in [
        (
            Action::ApproveForMember,
            "access_request.wrong_words",
            Pending,
            None,
        ),
        (
            Action::ApproveForMember,
            "access_request.wrong_words",
            Denied,
            Some(NoticeEvent::AccessDenied),
        ),
        (
            Action::FetchAccess,
            "access_request.wrong_code",
            Approved,
            None,
        ),
        (
            Action::FetchAccess,
            "access_request.wrong_code",
            Revoked,
            Some(NoticeEvent::AccessDenied),
        ),
    ] {
        let draft = draft(action).of_wrong_guess(counted, CallId::fresh());
        assert_eq!(event_of_request(&draft, state, false), expected, "{state}");
    }
}
