//! Lists of requests that many requests cannot fill, rows that block a member until an administrator clears them, and overload.

use std::{sync::Arc, time::Duration};

use tokio::task::JoinSet;
use tonic::Status;

use keybroker_proto::{self as proto, AccessApprover, DeviceState};

use crate::{
    client::{reason, refused},
    client_commands::calling,
    faulty::{Fault, code},
    faulty_token::behind_faults,
    identity::{Identity, Options},
    process::{Broker, until},
    tokens::{ADA, BOB, site, start, start_on},
    wire::get,
};

use super::{
    approvers::{Command, approver, mappings, token},
    member::{App, CODE, Member},
};

/// Copies of Ada's request for so many other members, all newer.
fn flood(broker: &Broker, members: usize) {
    broker.site.sql(&format!(
        "CREATE TABLE copied AS SELECT * FROM access_requests WHERE user = '{ADA}';
         WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {members})
         INSERT INTO access_requests SELECT randomblob(16), signer_key_id, state, road, tenant, 'member-' || i, key_name, device_id,
         device_name, device_kind, verification_key, public_key, code_mac, code_key_id, requested_by, peer, requested_us + 1000000 * i,
         expires_us, tries, first_approved_by, decided_by, decided_device, decided_us, answer, answer_form, fetched_us, closed_us, mac,
         answer_revision, wrong_words FROM copied, n;
         DROP TABLE copied;"
    ));
}

#[tokio::test(flavor = "multi_thread")]
async fn many_requests_hide_no_other() {
    let service = Identity::start(Options::default());
    let broker = start(&service, &mappings());
    let (ada, _) = Member::with_first_device(&broker, &service, ADA).await;
    let (bob, _) = Member::with_first_device(&broker, &service, BOB).await;
    for member in [&ada, &bob] {
        let asked = member
            .asks(&App::new(2), AccessApprover::Administrator)
            .await;
        asked.unwrap();
    }
    flood(&broker, 450);
    // The requests of members whom the approver does not cover take no place.
    let of_bob = approver(&broker, &service, "approvers-of-bob");
    for show_all in [false, true] {
        let listed = of_bob.list_access_requests(proto::ListAccessRequestsRequest {
            show_all,
            ..proto::ListAccessRequestsRequest::default()
        });
        let listed = listed.await.unwrap();
        let users: Vec<_> = listed
            .access_requests
            .iter()
            .map(|one| &*one.user)
            .collect();
        assert_eq!(users, [BOB]);
        assert!(listed.next_page_token.is_empty());
    }
    // An approver of all members reads page after page.
    let carol = approver(&broker, &service, "approvers");
    let mut wanted = proto::ListAccessRequestsRequest::default();
    let (mut pages, mut users) = (0, Vec::new());
    loop {
        let page = carol.list_access_requests(wanted.clone()).await.unwrap();
        assert!(page.access_requests.len() <= 100);
        users.extend(page.access_requests.into_iter().map(|one| one.user));
        pages += 1;
        if page.next_page_token.is_empty() {
            break;
        }
        wanted.page_token = page.next_page_token;
    }
    assert_eq!((pages, users.len()), (5, 452));
    users.sort();
    users.dedup();
    assert_eq!(users.len(), 452);
    let commands = Command::of(
        &broker,
        &token(&service, super::approvers::CAROL, "approvers"),
    );
    let rows = commands.json(&["device", "requests"]);
    assert_eq!(rows.as_array().unwrap().len(), 452);
    wanted.page_token = "AAAA".to_owned();
    refused(carol.list_access_requests(wanted.clone()).await, "REQUEST");
    wanted.page_size = 201;
    refused(carol.list_access_requests(wanted).await, "REQUEST");

    // An approver cannot approve the own request, so the list of pending requests does not show it.
    let own = Member::with_token(&broker, ADA, &token(&service, ADA, "approvers"));
    let pending = proto::ListAccessRequestsRequest {
        page_size: 200,
        ..proto::ListAccessRequestsRequest::default()
    };
    let pending = own.list_access_requests(pending).await.unwrap();
    // The copies name Ada's principal, too.
    let users: Vec<_> = pending
        .access_requests
        .iter()
        .map(|one| &*one.user)
        .collect();
    assert_eq!(users, [BOB]);
}

/// Rows under a compromised key, or that a writer of the database damaged, do not lock a member out for ever.
#[tokio::test(flavor = "multi_thread")]
async fn an_administrator_clears_rows_that_cannot_be_verified() {
    let service = Identity::start(Options::default());
    let broker = start(&service, &mappings());
    let (ada, first) = Member::with_first_device(&broker, &service, ADA).await;
    let [second, third] = [2, 3].map(App::new);
    ada.trusts(&second, &first).await.unwrap();
    let old = broker
        .site
        .sql("SELECT DISTINCT lower(hex(key_id)) FROM wrapping_keys");
    let admin = |words: &[&str]| {
        let output = calling(&broker, words, "admin", &[]).output().unwrap();
        assert!(output.status.success(), "{words:?}: {output:?}");
    };
    admin(&["key", "rotate", "--single"]);
    ada.trusts(&third, &first).await.unwrap();
    let asked = ada
        .asks(&App::new(4), AccessApprover::Device)
        .await
        .unwrap();
    admin(&["key", "compromise", old.trim()]);
    broker.site.sql(
        "UPDATE devices SET revision = 0 WHERE device_id = x'03030303030303030303030303030303'",
    );
    let all = |signer| ada.end(&[], false, signer);
    refused(ada.untrust_devices(all(Some(&first))).await, "KEY_STATE");
    refused(ada.trusts(&third, &first).await, "KEY_STATE");
    let carol = approver(&broker, &service, "approvers");
    let end = |user: &str| proto::UntrustDevicesRequest {
        user: user.to_owned(),
        all: true,
        ..proto::UntrustDevicesRequest::default()
    };
    // Only the end of all trust clears rows.
    let one = proto::UntrustDevicesRequest {
        all: false,
        device_ids: vec![first.id.clone()],
        ..end(ADA)
    };
    refused(carol.untrust_devices(one).await, "KEY_STATE");
    let ended = carol.untrust_devices(end(ADA)).await.unwrap();
    assert!(ended.devices.len() <= 1, "{ended:?}");
    let audit = broker.site.audit();
    let entry = audit.lines().find(|line| line.contains("damaged-removed"));
    let entry = entry.unwrap();
    assert!(
        entry.contains("\"device.untrust\"") && entry.contains(ADA),
        "{entry}"
    );
    assert!(entry.contains("\"count\":3"), "{entry}");
    let listed = ada.list_devices(proto::ListDevicesRequest::default());
    let listed = listed.await.unwrap();
    assert!(listed.damaged_device_ids.is_empty());
    refused(ada.fetches(&asked, CODE).await, "DEVICE_NOT_FOUND");
    assert!(
        listed
            .devices
            .iter()
            .all(|one| one.verified && one.state() != DeviceState::Trusted)
    );
    // The member begins again.
    let trust = second.trust(ADA, 1, &second);
    ada.establish_trust(trust).await.unwrap();
    ada.keys_of(&second).await.unwrap();
}

/// Calls that cannot be in time are refused when they come, and many calls of one member do not delay another member.
#[tokio::test(flavor = "multi_thread")]
async fn device_calls_wait_in_the_queue_of_their_member() {
    let service = Identity::start(Options::default());
    let site = site(&service, "");
    let faulty = behind_faults(&site);
    let broker = start_on(site);
    let (ada, of_ada) = Member::with_first_device(&broker, &service, ADA).await;
    let (bob, of_bob) = Member::with_first_device(&broker, &service, BOB).await;
    // Without a certificate, a connection has only a few calls at once. All connections are open before the token is slow.
    let connections = [(); 6].map(|()| Arc::new(Member::of(&broker, &service, BOB)));
    let long = Duration::from_mins(1);
    for bob in &connections {
        fetch(bob, &of_bob.id, long).await.unwrap();
    }
    // The self-test of the worker verifies as well, and fails after two seconds.
    let slow = Fault {
        milliseconds: 300,
        ..Fault::always(code::LATE)
    };
    faulty.set("C_Verify", &slow);
    // The broker has to know how long a job takes now.
    for _ in 0..8 {
        let (one, two) = tokio::join!(bob.keys_of(&of_bob), bob.keys_of(&of_bob));
        one.unwrap();
        two.unwrap();
    }
    let mut waiting = JoinSet::new();
    for bob in connections.iter().cycle().take(100) {
        let (bob, id) = (Arc::clone(bob), of_bob.id.clone());
        waiting.spawn(async move { fetch(&bob, &id, long).await.is_ok() });
    }
    until("the calls to wait", || {
        // Some wait for the token, and the others for a place in the front.
        let metrics = get(broker.status, "/metrics");
        let number = |series: &str| -> usize {
            let line = metrics.lines().find_map(|line| line.strip_prefix(series));
            line.map_or(0, |value| value.trim().parse().unwrap())
        };
        let waiting = number("keybroker_token_queue_length{token=\"default\"}")
            + number("keybroker_calls_waiting");
        (waiting > 60).then_some(())
    });
    // Two sessions need nine seconds for 60 calls, and far less than this time for one call.
    let short = Duration::from_secs(5);
    let late = fetch(&bob, &of_bob.id, short).await.unwrap_err();
    assert_eq!(reason(&late), "QUEUE_FULL", "{late:?}");
    fetch(&ada, &of_ada.id, short).await.unwrap();
    faulty.clear("C_Verify");
    let served = waiting.join_all().await;
    assert!(served.iter().all(|served| *served), "{served:?}");
}

async fn fetch(member: &Member, device: &[u8], deadline: Duration) -> Result<(), Status> {
    let mut request = member.holder.request(proto::GetDeviceKeysRequest {
        device_id: device.to_vec(),
    });
    request.set_timeout(deadline);
    member.client().get_device_keys(request).await.map(drop)
}
