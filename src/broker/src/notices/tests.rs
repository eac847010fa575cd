//! Tests of the queue.

use super::*;

/// The size of the queue in the tests. One member can take ten places.
const NOTICES_MAX: usize = 100;

fn notice(user: &str, event: NoticeEvent) -> Notice {
    Notice {
        event,
        at: Timestamp::from_micros(1),
        call: CallId::fresh(),
        tenant: Tenant::default(),
        user: UserId::parse(user).unwrap(),
        principal: String::new(),
        peer: String::new(),
        place: String::new(),
        device: None,
        request: None,
        expires: None,
        key: None,
    }
}

fn offer(queue: &NoticeQueue, user: &str) {
    queue.offer(notice(user, NoticeEvent::DeviceTrusted));
}

/// Takes everything from the queue. The caller decides when the places are free again.
fn taken(waiting: &mut mpsc::Receiver<QueuedNotice>) -> Vec<QueuedNotice> {
    std::iter::from_fn(|| waiting.try_recv().ok()).collect()
}

fn users(queued: &[QueuedNotice]) -> Vec<&str> {
    let queued = queued.iter();
    queued.map(|(notice, _)| notice.user.as_str()).collect()
}

#[test]
fn one_member_cannot_fill_the_queue() {
    let (queue, mut waiting) = NoticeQueue::new(NoticeEvent::ALL.into(), NOTICES_MAX);
    for _ in 0..NOTICES_MAX {
        offer(&queue, "ada");
    }
    offer(&queue, "bob");
    let mut queued = taken(&mut waiting);
    assert_eq!(users(&queued), [["ada"; 10].as_slice(), &["bob"]].concat());
    // A notice that is being delivered, or that waits for its next attempt, still has its places.
    offer(&queue, "ada");
    assert!(taken(&mut waiting).is_empty());
    // The member of another tenant with the same id is another member.
    let mut other = notice("ada", NoticeEvent::DeviceTrusted);
    other.tenant = Tenant::parse("other").unwrap();
    queue.offer(other);
    assert_eq!(users(&taken(&mut waiting)), ["ada"]);
    // The delivery of one notice ended.
    drop(queued.remove(0));
    for _ in 0..2 {
        offer(&queue, "ada");
    }
    assert_eq!(users(&taken(&mut waiting)), ["ada"]);
}

/// A person with an access token of a member cannot fill the places of the member with requests, and so prevent the notice that the
/// member needs.
#[test]
fn requests_leave_places_for_the_other_notices_of_a_member() {
    let (queue, mut waiting) = NoticeQueue::new(NoticeEvent::ALL.into(), NOTICES_MAX);
    for _ in 0..NOTICES_MAX {
        queue.offer(notice("ada", NoticeEvent::AccessRequested));
        queue.offer(notice("ada", NoticeEvent::AccessDenied));
    }
    let queued = taken(&mut waiting);
    assert_eq!(queued.len(), 5);
    for _ in 0..NOTICES_MAX {
        queue.offer(notice("ada", NoticeEvent::DeviceTrusted));
    }
    let others = taken(&mut waiting);
    assert_eq!(others.len(), 5);
}

#[test]
fn the_queue_is_bounded_until_deliveries_end() {
    let (queue, mut waiting) = NoticeQueue::new(NoticeEvent::ALL.into(), 2);
    for user in ["ada", "bob", "carol"] {
        offer(&queue, user);
    }
    let queued = taken(&mut waiting);
    assert_eq!(users(&queued), ["ada", "bob"]);
    offer(&queue, "carol");
    assert!(taken(&mut waiting).is_empty());
    drop(queued);
    offer(&queue, "carol");
    assert_eq!(users(&taken(&mut waiting)), ["carol"]);
}

/// The notices of changes with an unknown outcome are limited for each member, like those in the queue.
#[test]
fn the_unknown_outcomes_of_one_member_displace_no_notice_of_another() {
    let (queue, mut waiting) = NoticeQueue::new(NoticeEvent::ALL.into(), NOTICES_MAX);
    let calls: Vec<CallId> = (0..2 * NOTICES_MAX).map(|_| CallId::fresh()).collect();
    let keep = |call, user| {
        queue.hold(call, vec![notice(user, NoticeEvent::DeviceTrusted)]);
        queue.keep(call);
    };
    for call in &calls {
        keep(*call, "ada");
    }
    let of_bob = CallId::fresh();
    keep(of_bob, "bob");
    assert_eq!(queue.held().len(), NOTICES_MAX / MEMBER_DIVISOR + 1);
    queue.settle(of_bob, true);
    assert_eq!(users(&taken(&mut waiting)), ["bob"]);
}

#[test]
fn a_member_without_a_waiting_notice_is_forgotten() {
    let (queue, mut waiting) = NoticeQueue::new(NoticeEvent::ALL.into(), NOTICES_MAX);
    for number in 0..10_000 {
        offer(&queue, &format!("member-{number}"));
        assert_eq!(taken(&mut waiting).len(), 1, "{number}");
    }
    let members = queue.places.of_members.lock().unwrap();
    let remembered = members.of_members.len();
    assert!(remembered < 100, "{remembered}");
}

#[test]
fn the_notices_of_a_change_wait_for_its_outcome() {
    let wanted = [NoticeEvent::DeviceTrusted, NoticeEvent::DeviceLost].into();
    let (queue, mut waiting) = NoticeQueue::new(wanted, NOTICES_MAX);
    let all = || Vec::from(NoticeEvent::ALL.map(|event| notice("ada", event)));
    let (committed, failed) = (CallId::fresh(), CallId::fresh());
    for call in [committed, failed] {
        queue.hold(call, all());
        queue.keep(call);
    }
    assert!(taken(&mut waiting).is_empty());
    queue.settle(failed, false);
    queue.settle(committed, true);
    // A second report about the outcome sends nothing again.
    queue.settle(committed, true);
    queue.settle(failed, true);
    let queued = taken(&mut waiting);
    let events: Vec<NoticeEvent> = queued.iter().map(|(notice, _)| notice.event).collect();
    assert_eq!(
        events,
        [NoticeEvent::DeviceTrusted, NoticeEvent::DeviceLost]
    );
    assert!(queue.held().is_empty());
}

#[test]
fn the_notices_that_wait_for_an_outcome_are_bounded() {
    let (queue, mut waiting) = NoticeQueue::new(NoticeEvent::ALL.into(), 2);
    let calls: Vec<CallId> = (0..3).map(|_| CallId::fresh()).collect();
    for (call, user) in calls.iter().zip(["ada", "bob", "carol"]) {
        queue.hold(*call, vec![notice(user, NoticeEvent::DeviceTrusted)]);
        queue.keep(*call);
    }
    for call in calls {
        queue.settle(call, true);
    }
    assert_eq!(users(&taken(&mut waiting)), ["ada", "bob"]);
}
