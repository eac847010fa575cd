//! Notices to members: signed messages to a real HTTPS receiver, which may be slow, gone or refuse them.

use std::{
    collections::BTreeMap,
    os::unix::fs::PermissionsExt as _,
    time::{Duration, Instant},
};

use keybroker_proto::{self as proto, AccessApprover, AccessRequestState};

use crate::{
    identity::{Identity, Options},
    process::{Broker, until},
    tokens::{ADA, BOB, start, start_sealed},
    wire::get,
};

use super::{
    approvers::{CAROL, approver, mappings},
    for_members::{asks, heard},
    member::{App, CODE, Member},
    receiver::{Answer, Received, Receiver},
};

/// A call of a member takes far less, also on a busy machine, and a call that waits for the receiver takes longer.
const PROMPT: Duration = Duration::from_secs(30);

fn count(broker: &Broker, series: &str) -> u64 {
    let metrics = get(broker.status, "/metrics");
    let line = metrics.lines().find_map(|line| line.strip_prefix(series));
    let value = line.unwrap_or_else(|| panic!("{series}: {metrics}"));
    value.trim().parse().unwrap()
}

fn results(broker: &Broker, result: &str) -> u64 {
    let series = format!("keybroker_notices_total{{result=\"{result}\"}}");
    count(broker, &series)
}

fn reaches(what: &str, wanted: u64, count: impl Fn() -> u64) {
    until(what, || (count() >= wanted).then_some(()));
}

fn of_type<'r>(received: &'r [Received], kind: &str) -> Vec<&'r Received> {
    let all = received.iter();
    all.filter(|one| one.body["type"] == kind).collect()
}

#[tokio::test(flavor = "multi_thread")]
#[expect(clippy::too_many_lines, reason = "one story")]
async fn a_member_learns_of_every_event_and_each_notice_is_signed() {
    let (service, receiver) = (Identity::start(Options::default()), Receiver::start());
    let network = "\n[[network]]\nname = \"office\"\nranges = [\"127.0.0.0/8\"]\n";
    let lines = [mappings(), receiver.section(""), network.to_owned()].concat();
    let broker = start_sealed(&service, &lines);
    let (ada, first) = Member::with_first_device(&broker, &service, ADA).await;
    // Another device approves, and the member denies.
    let second = App::new(2);
    let asked = ada.asks(&second, AccessApprover::Device).await.unwrap();
    ada.approves(&asked, &first).await.unwrap();
    ada.fetches(&asked, CODE).await.unwrap();
    ada.confirms(&asked).await.unwrap();
    let unwanted = ada
        .asks(&App::new(3), AccessApprover::Device)
        .await
        .unwrap();
    ada.denies(&unwanted).await.unwrap();
    // An administrator approves, and withdraws.
    let carol = approver(&broker, &service, "approvers");
    let (to_administrator, _) = asks(&ada, &App::new(4)).await;
    let right = heard(&carol, &to_administrator).await;
    let words = right.phrase_words.clone();
    let approved = carol.approve_for_member(right).await.unwrap();
    let approved = approved.access_request.unwrap();
    assert_eq!(approved.state(), AccessRequestState::Approved);
    carol.denies(&to_administrator).await.unwrap();
    // Devices: a name is no event.
    let trusted = ada.trusts(&second, &first).await.unwrap();
    let rename = proto::RenameDeviceRequest {
        device_id: trusted.id.clone(),
        name: "Ada's <b>phone</b>".to_owned(),
    };
    ada.rename_device(rename).await.unwrap();
    let rotation = ada.rotation(
        1,
        b"material after the rotation",
        &[&first, &second],
        &[],
        &first,
    );
    ada.rotate_devices(rotation).await.unwrap();
    let report = proto::ReportDeviceLostRequest {
        device_id: second.id.clone(),
    };
    ada.report_device_lost(report).await.unwrap();
    let end = ada.end(&[&second], false, Some(&first));
    ada.untrust_devices(end).await.unwrap();
    let all_lost = proto::UntrustDevicesRequest {
        user: ADA.to_owned(),
        all: true,
        lost: true,
        ..proto::UntrustDevicesRequest::default()
    };
    carol.untrust_devices(all_lost).await.unwrap();

    let expected = BTreeMap::from([
        ("access_request.created", 3),
        ("access_request.approved", 1),
        ("access_request.approved_for_member", 1),
        ("access_request.denied", 2),
        ("device.trusted", 2),
        ("device.untrusted", 1),
        ("device.lost", 2),
        ("user_key.rotated", 1),
    ]);
    let total = expected.values().sum();
    let received = receiver.receives(total);
    let mut kinds = BTreeMap::new();
    for one in &received {
        *kinds.entry(one.body["type"].as_str().unwrap()).or_insert(0) += 1;
    }
    assert_eq!(kinds, expected);
    let ids: std::collections::BTreeSet<&str> =
        received.iter().map(|one| one.id.as_str()).collect();
    assert_eq!(ids.len(), total);

    let created = of_type(&received, "access_request.created");
    let request = hex::encode(&to_administrator.id);
    let data = created
        .iter()
        .map(|one| &one.body["data"])
        .find(|data| data["access_request"] == request.as_str())
        .unwrap();
    assert_eq!(
        (&data["user"], &data["tenant"]),
        (&ADA.into(), &"default".into())
    );
    assert_eq!(data["principal"], format!("token:vault:{ADA}").as_str());
    assert_eq!(
        (&data["device_name"], &data["place"]),
        (&"device 4".into(), &"office".into())
    );
    assert_eq!(data["device"], "04".repeat(16).as_str());
    assert!(data["peer"].as_str().unwrap().starts_with("127.0.0.1:"));
    let approved = &of_type(&received, "access_request.approved_for_member")[0].body["data"];
    assert_eq!(
        approved["principal"],
        format!("token:vault:{CAROL}").as_str()
    );
    let rotated = &of_type(&received, "user_key.rotated")[0].body["data"];
    assert_eq!(
        (&rotated["revision"], &rotated["user"]),
        (&2.into(), &ADA.into())
    );
    for one in &received {
        // The call id finds the audit entry.
        let call = one.body["data"]["call_id"].as_str().unwrap();
        assert!(broker.site.audit().contains(call), "{one:?}");
        // The words of the phrase, and everything from which they could be computed, are secret.
        assert!(
            !words
                .iter()
                .any(|word| one.text.contains(&format!("\"{word}\"")))
        );
        let texts = [&asked, &to_administrator].map(|it| hex::encode(&it.public_key_sha256));
        assert!(!texts.iter().any(|text| one.text.contains(text)), "{one:?}");
        assert!(
            !one.text.contains("phrase") && !one.text.contains("material"),
            "{one:?}"
        );
    }
    let delivered = u64::try_from(total).unwrap();
    reaches("the metric", delivered, || results(&broker, "delivered"));
    assert_eq!(
        (results(&broker, "failed"), results(&broker, "dropped")),
        (0, 0)
    );
    let log = broker.site.log();
    assert_eq!(log.matches("notice delivered").count(), total);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_delivery_is_repeated_and_a_refused_one_is_not() {
    let (service, receiver) = (Identity::start(Options::default()), Receiver::start());
    let lines =
        "events = [\"device.trusted\"]\nretry_after_ms = 10\ntimeout_ms = 5000\nattempts_max = 4";
    let broker = start(&service, &receiver.section(lines));
    receiver.answers(&[
        Answer::Status(500),
        Answer::Status(429),
        Answer::Hang(Duration::from_mins(1)),
        Answer::Status(202),
    ]);
    let (ada, _) = Member::with_first_device(&broker, &service, ADA).await;
    let received = receiver.receives(4);
    for one in &received {
        assert_eq!((&one.id, &one.text), (&received[0].id, &received[0].text));
        assert!(one.time >= received[0].time);
    }
    reaches("the delivery", 1, || results(&broker, "delivered"));
    assert_eq!(count(&broker, "keybroker_notice_retries_total"), 3);
    // The event is not wanted.
    ada.asks(&App::new(2), AccessApprover::Device)
        .await
        .unwrap();

    // The receiver refuses for good, and redirects are not followed.
    for (number, status) in [(1, 400), (2, 410), (3, 308)] {
        let attempts = if status == 308 { 4 } else { 1 };
        receiver.answers(&[Answer::Status(status)].repeat(attempts));
        let before = receiver.received().len();
        let user = format!("7c9e6679-7425-40de-944b-e07fc1f9000{number}");
        Member::with_first_device(&broker, &service, &user).await;
        reaches("the refusal", number, || results(&broker, "failed"));
        assert_eq!(receiver.received().len(), before + attempts, "{status}");
    }
    assert_eq!(results(&broker, "delivered"), 1);
    let log = broker.site.log();
    assert_eq!(log.matches("notice not delivered").count(), 3, "{log}");
    assert!(log.contains("the receiver answered 400"), "{log}");
    assert!(!log.contains("/hook"), "the URL may hold a secret");
}

/// Makes the event of a new member, and the two events of each request that the member denies.
async fn makes_events(broker: &Broker, service: &Identity, user: &str, requests: u8) {
    let (member, _) = Member::with_first_device(broker, service, user).await;
    for number in 2..requests + 2 {
        let started = Instant::now();
        let asked = member.asks(&App::new(number), AccessApprover::Device).await;
        member.denies(&asked.unwrap()).await.unwrap();
        assert!(started.elapsed() < PROMPT, "{:?}", started.elapsed());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_receiver_that_hangs_delays_no_call_and_the_queue_is_bounded() {
    let (service, receiver) = (Identity::start(Options::default()), Receiver::start());
    // Longer than the broker waits, so that no notice is ever delivered.
    receiver.always_answers(Answer::Hang(Duration::from_mins(10)));
    // One member can take ten places, and requests leave five of them free.
    let lines = "timeout_ms = 60000\nwaiting_max = 100";
    let broker = start(&service, &receiver.section(lines));
    makes_events(&broker, &service, ADA, 3).await;
    // Four notices of the member are being sent, and one waits.
    reaches("the dropped notices", 2, || results(&broker, "dropped"));
    assert_eq!(receiver.receives(4).len(), 4);
    // The notice of another member is sent at once.
    Member::with_first_device(&broker, &service, BOB).await;
    let received = receiver.receives(5);
    assert_eq!(received.len(), 5);
    assert_eq!(received[4].body["data"]["user"], BOB);
    assert_eq!(
        (results(&broker, "delivered"), results(&broker, "dropped")),
        (0, 2)
    );
    let log = broker.site.log();
    assert_eq!(
        log.matches("notices were dropped").count(),
        1,
        "once a minute"
    );
    // The stop does not wait for the receiver either, and says what is lost.
    let started = Instant::now();
    let (site, status) = broker.stop();
    assert!(status.success());
    assert!(
        started.elapsed() < Duration::from_secs(20),
        "{:?}",
        started.elapsed()
    );
    let log = site.log();
    let lost = log
        .lines()
        .find(|line| line.contains("before the broker stopped"));
    assert!(lost.unwrap().contains("\"count\":6"), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn notices_that_fail_hold_up_no_notice_of_another_member() {
    let (service, receiver) = (Identity::start(Options::default()), Receiver::start());
    receiver.answers_about(ADA, Answer::Status(429));
    let broker = start(&service, &receiver.section("retry_after_ms = 60000"));
    // More notices than are sent at the same time.
    makes_events(&broker, &service, ADA, 9).await;
    // Each notice was refused once, and waits for its next attempt.
    reaches("the refusals", 19, || {
        count(&broker, "keybroker_notice_retries_total")
    });
    reaches("the waiting notices", 19, || {
        count(&broker, "keybroker_notices_waiting")
    });
    Member::with_first_device(&broker, &service, BOB).await;
    reaches("the delivery", 1, || results(&broker, "delivered"));
    let received = receiver.received();
    assert!(received.iter().any(|one| one.body["data"]["user"] == BOB));
    assert_eq!(
        (results(&broker, "failed"), results(&broker, "dropped")),
        (0, 0)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_receiver_that_is_gone_fails_no_call_and_gets_the_notices_when_it_is_back() {
    let (service, mut receiver) = (Identity::start(Options::default()), Receiver::start());
    let lines = "events = [\"device.trusted\"]\nretry_after_ms = 100\nattempts_max = 10";
    let broker = start(&service, &receiver.section(lines));
    receiver.stop();
    let started = Instant::now();
    Member::with_first_device(&broker, &service, ADA).await;
    assert!(started.elapsed() < PROMPT, "{:?}", started.elapsed());
    reaches("a failed attempt", 1, || {
        count(&broker, "keybroker_notice_retries_total")
    });
    reaches("the waiting notice", 1, || {
        count(&broker, "keybroker_notices_waiting")
    });
    receiver.resume();
    let received = receiver.receives(1);
    assert_eq!(received[0].body["data"]["user"], ADA);
    reaches("the delivery", 1, || results(&broker, "delivered"));

    // Another server at the address of the receiver gets nothing.
    let broker = start(
        &service,
        &receiver.section_trusting("other-ca", "attempts_max = 1"),
    );
    Member::with_first_device(&broker, &service, BOB).await;
    reaches("the failure", 1, || results(&broker, "failed"));
    assert_eq!(receiver.received().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_section_is_refused_with_its_cause() {
    let (service, receiver) = (Identity::start(Options::default()), Receiver::start());
    let broker = start(&service, &receiver.section(""));
    let site = &broker.site;
    let good = std::fs::read_to_string(site.configuration_file()).unwrap();
    let check = |text: &str| {
        std::fs::write(site.configuration_file(), text).unwrap();
        let finished = site.run(&["config", "check"]);
        (finished.code, finished.stdout + &finished.stderr)
    };
    assert_eq!(check(&good).0, Some(0));
    for (from, to, expected) in [
        ("https://localhost", "http://localhost", "plain http"),
        ("secret_file = \"/", "secret_file = \"", "`secret_file` is"),
        ("timeout_ms", "timeout", "timeout"),
    ] {
        let bad = good
            .replace("[notices]", "[notices]\ntimeout_ms = 5")
            .replace(from, to);
        let (code, text) = check(&bad);
        assert_eq!(code, Some(3), "{text}");
        assert!(text.contains(expected), "{text}");
    }
    // A secret that others can read, and one that is none. Neither is shown.
    let secret = receiver.secret_file();
    let modes =
        |mode| std::fs::set_permissions(&secret, std::fs::Permissions::from_mode(mode)).unwrap();
    modes(0o644);
    let (code, text) = check(&good);
    assert_eq!(code, Some(3), "{text}");
    assert!(text.contains("`secret_file`"), "{text}");
    modes(0o600);
    std::fs::write(&secret, "whsec_c2hvcnQ=\n").unwrap();
    let (code, text) = check(&good);
    assert_eq!(code, Some(3), "{text}");
    assert!(text.contains("24 to 64 bytes"), "{text}");
    assert!(!text.contains("c2hvcnQ"), "{text}");
}
