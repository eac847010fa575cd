//! Tests of the notices about changes of devices: changes whose outcome is known only later, damaged rows, and equal times.

use keybroker_core::{
    device::DeviceState,
    key::{DeviceId, Revision},
};
use keybroker_store::{Changed, DeviceAddress, DeviceChange, SealedKeys};
use tokio::sync::mpsc;

use crate::{Notice, NoticeEvent, NoticeQueue, QueuedNotice, commit::Settled, journal::Draft};

use super::*;

type Waiting = mpsc::Receiver<QueuedNotice>;

async fn broker_with_notices(folder: &std::path::Path) -> (Arc<Broker>, Waiting) {
    let mut broker = broker(folder).await;
    let (queue, waiting) = NoticeQueue::new(NoticeEvent::ALL.into(), 100);
    Arc::get_mut(&mut broker).unwrap().notices = Some(queue);
    (broker, waiting)
}

fn call() -> Call {
    Call::start("192.0.2.1:1", Deadline::after(Duration::from_secs(10)))
}

fn draft(call: &Call, action: Action) -> Draft {
    Draft::new(
        &testing::service("URI:carol", &[Role::Approver]),
        call,
        action,
    )
}

fn address(number: u8) -> DeviceAddress {
    DeviceAddress {
        tenant: Tenant::default(),
        user: UserId::parse("ada").unwrap(),
        device: DeviceId::from_bytes([number; 16]),
    }
}

/// The removal of two rows that cannot be read.
fn removal() -> DeviceChange {
    DeviceChange {
        removes: vec![address(1), address(2)],
        ..DeviceChange::default()
    }
}

fn lost_connection() -> store::Error {
    store::Error::OutcomeUnknown("the connection was lost during the commit".into())
}

/// The devices of the notices that wait, in the order of the queue. Each notice must be about the end of the trust.
fn ended(waiting: &mut Waiting) -> Vec<DeviceId> {
    let notices = std::iter::from_fn(|| waiting.try_recv().ok());
    let device = |notice: Notice| {
        assert_eq!(notice.event, NoticeEvent::DeviceUntrusted);
        assert_eq!(notice.principal, "URI:carol");
        notice.device.unwrap().id
    };
    notices.map(|(notice, _)| device(notice)).collect()
}

fn both() -> Vec<DeviceId> {
    vec![address(1).device, address(2).device]
}

/// Rows that cannot be read may be those of trusted devices, so the member learns of their removal.
#[tokio::test]
async fn a_committed_change_is_told_once() {
    let folder = tempfile::tempdir().unwrap();
    let (broker, mut waiting) = broker_with_notices(folder.path()).await;
    let (call, now, change) = (call(), Timestamp::now(), removal());
    let draft = draft(&call, Action::UntrustDevice);
    let commit = broker.store.change_devices(&change, call.id, now);
    let settled = broker.commit_with_notices(&draft, &change, now, commit);
    let Settled { intent, result } = settled.await.unwrap();
    assert_eq!(result.unwrap(), None);
    assert_eq!(ended(&mut waiting), both());
    // The outcome could not be recorded at once.
    broker.resolve_later(intent);
    broker.resolve_intents().await;
    assert!(ended(&mut waiting).is_empty());
}

#[tokio::test]
async fn a_change_with_an_unknown_outcome_is_told_when_it_is_found_in_the_database() {
    let folder = tempfile::tempdir().unwrap();
    let (broker, mut waiting) = broker_with_notices(folder.path()).await;
    let (call, now, change) = (call(), Timestamp::now(), removal());
    let draft = draft(&call, Action::UntrustDevice);
    let commit = async {
        let changed = broker.store.change_devices(&change, call.id, now).await;
        changed.unwrap();
        Err::<(), _>(lost_connection())
    };
    let settled = broker.commit_with_notices(&draft, &change, now, commit);
    assert!(settled.await.is_err());
    assert!(ended(&mut waiting).is_empty());
    broker.resolve_intents().await;
    assert_eq!(ended(&mut waiting), both());
    broker.resolve_intents().await;
    assert!(ended(&mut waiting).is_empty());
}

#[tokio::test]
async fn a_change_that_was_not_made_is_not_told() {
    let folder = tempfile::tempdir().unwrap();
    let (broker, mut waiting) = broker_with_notices(folder.path()).await;
    for error in [lost_connection(), store::Error::Conflict] {
        let is_known = matches!(error, store::Error::Conflict);
        let (call, now, change) = (call(), Timestamp::now(), removal());
        let draft = draft(&call, Action::UntrustDevice);
        let commit = async { Err::<(), _>(error) };
        let settled = broker.commit_with_notices(&draft, &change, now, commit);
        assert_eq!(settled.await.is_ok(), is_known);
        assert_eq!(broker.is_unresolved(call.id), !is_known);
        broker.resolve_intents().await;
        assert!(!broker.is_unresolved(call.id));
        assert!(ended(&mut waiting).is_empty());
    }
}

fn trusted(number: u8, at: Timestamp) -> Changed<DeviceRow> {
    let row = DeviceRow {
        address: address(number),
        signer: KEY,
        state: DeviceState::Trusted,
        name: format!("device {number}"),
        kind: "phone".to_owned(),
        verification_key: Vec::new(),
        key_name: KeyName::parse("vault").unwrap(),
        revision: Revision::FIRST,
        keys: SealedKeys::default(),
        trusted: at,
        changed: at,
        signed: at,
        lost: None,
        used: None,
        mac: [0; 32],
    };
    Changed {
        row,
        expected: None,
    }
}

/// The device that signs was trusted in the same microsecond as the new device, or its loss was reported then, or the clock was set back.
#[tokio::test]
async fn equal_times_do_not_change_the_events() {
    let folder = tempfile::tempdir().unwrap();
    let (broker, _waiting) = broker_with_notices(folder.path()).await;
    let (call, now) = (call(), Timestamp::now());
    for at in [now, Timestamp::from_micros(now.micros() + 1)] {
        let mut signer = trusted(1, at);
        signer.row.lost = Some(at);
        let change = DeviceChange {
            devices: vec![signer, trusted(2, at)],
            ..DeviceChange::default()
        };
        let events = |action| {
            let notices = broker.notices_about(&draft(&call, action), &change, now);
            let found = notices.into_iter();
            found
                .map(|notice| (notice.event, notice.device.unwrap().name))
                .collect::<Vec<_>>()
        };
        let expected = (NoticeEvent::DeviceTrusted, "device 2".to_owned());
        assert_eq!(events(Action::EstablishDevice), [expected]);
        assert!(events(Action::RotateDevices).is_empty());
        assert!(events(Action::UntrustDevice).is_empty());
    }
}
