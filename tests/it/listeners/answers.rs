//! Answers to calls that fail: the same cause gives the same bytes, nobody unknown learns anything, and every refusal of
//! a known caller is in the audit log.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use keybroker_proto::{
    CreateUserKeyRequest, ListUserKeysRequest, UnwrapUserKeyRequest, UnwrapUserKeyResponse,
};
use prost::Message as _;
use rustix::process::Signal;
use tonic::{Code, Request};
use tonic_types::StatusExt as _;

use super::{
    methods::METHODS,
    raw::{Answer, Raw, frame},
};
use crate::{
    client::{Caller, NAME, refused},
    pki,
    process::{Broker, freeze, send, until},
    site::{Options, Site},
    wire::get,
};

const UNWRAP: &str = "/keybroker.v1.UserKeyService/UnwrapUserKey";
const CREATE: &str = "/keybroker.v1.UserKeyService/CreateUserKey";
const MATERIAL: &[u8] = b"material of this user";

fn unwrap_of(user: &str) -> UnwrapUserKeyRequest {
    UnwrapUserKeyRequest {
        user: user.to_owned(),
        key_name: NAME.to_owned(),
        recipient: None,
    }
}

/// Everything that a caller sees, with the call id taken out.
fn shown(answer: &Answer) -> String {
    let status = answer.status();
    let info = status.get_details_error_info();
    let id = info.and_then(|info| info.metadata.get("call_id").cloned());
    let mut headers = answer.headers.clone();
    headers.remove("date");
    headers.remove("grpc-status-details-bin");
    let text = format!(
        "{headers:?} {:?} {}",
        answer.body,
        String::from_utf8_lossy(status.details())
    );
    id.map_or(text.clone(), |id| text.replace(&id, "<call>"))
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_cause_gives_the_same_bytes() {
    let broker = Broker::start(Options::default());
    let enroller = Caller::of(&broker, "enroller");
    for user in ["ada", "a much longer name of a user"] {
        enroller.create(user, MATERIAL).await.unwrap();
    }
    let lifecycle = Caller::of(&broker, "lifecycle");
    lifecycle.delete("ada", 1).await.unwrap();
    let releaser = Raw::connect(&broker.site.pki, Some("releaser"), broker.grpc).await;
    // Never there, deleted, and never there under another name.
    let mut answers = Vec::new();
    for user in ["nobody", "ada", "another nobody with a longer name"] {
        let answer = releaser.call(UNWRAP, &unwrap_of(user)).await;
        assert_eq!(answer.status().code(), Code::NotFound);
        answers.push(shown(&answer));
    }
    assert!(answers[0].contains("<call>"), "{}", answers[0]);
    assert!(answers.iter().all(|one| *one == answers[0]), "{answers:#?}");

    // What an enroller may not ask, it is told of keys that are there and of those that are not alike.
    let enroller = Raw::connect(&broker.site.pki, Some("enroller"), broker.grpc).await;
    let mut answers = Vec::new();
    for user in ["nobody", "a much longer name of a user"] {
        let answer = enroller.call(UNWRAP, &unwrap_of(user)).await;
        assert_eq!(answer.status().code(), Code::PermissionDenied);
        answers.push(shown(&answer));
    }
    assert_eq!(answers[0], answers[1]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_caller_learns_nothing() {
    let broker = Broker::start(Options::default());
    let unknown = Raw::connect(&broker.site.pki, Some(pki::UNKNOWN), broker.grpc).await;
    let bodies = [frame(b""), frame(&[0xff; 40]), frame(&vec![0x42; 70_000])];
    let mut answers = Vec::new();
    for (path, _) in METHODS {
        for body in &bodies {
            answers.push(unknown.post(path, body.clone(), &[]).await.unwrap());
        }
    }
    for path in [
        "/keybroker.v1.UserKeyService/NoSuchMethod",
        "/no.such.Service/Method",
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    ] {
        answers.push(unknown.post(path, frame(b""), &[]).await.unwrap());
    }
    let first = shown(&answers[0]);
    assert!(first.contains("CREDENTIAL"), "{first}");
    for answer in &answers {
        assert_eq!(answer.status().code(), Code::Unauthenticated);
        assert_eq!(shown(answer), first);
    }
    let (site, _) = broker.stop();
    let refusals: Vec<_> = site
        .audit()
        .lines()
        .filter(|line| line.contains("connection.refused"))
        .map(str::to_owned)
        .collect();
    assert_eq!(
        refusals.len(),
        1,
        "counted, not written one by one: {refusals:?}"
    );
    let count = format!("\"count\":{}", answers.len());
    assert!(refusals[0].contains(&count), "{count}: {refusals:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_that_do_not_parse_are_refused_and_audited() {
    let broker = Broker::start(Options::default());
    let enroller = Raw::connect(&broker.site.pki, Some("enroller"), broker.grpc).await;
    let announced = [&[0][..], &u32::MAX.to_be_bytes(), b"short"].concat();
    let wrong_utf8 = frame(&[0x0a, 2, 0xff, 0xfe]);
    let cases = [
        ("garbage", frame(&[0xff; 100])),
        ("wrong UTF-8", wrong_utf8),
        ("too long", frame(&vec![0x42; 65 * 1024])),
        ("announced too long", announced),
        ("no message", Vec::new()),
        ("an unknown flag", [&[9][..], &[0; 4]].concat()),
    ];
    for (what, body) in &cases {
        let answer = enroller.post(CREATE, body.clone(), &[]).await.unwrap();
        let status = answer.status();
        assert_eq!(status.code(), Code::InvalidArgument, "{what}: {status:?}");
        let status = refused(Err::<(), _>(status), "REQUEST");
        let violations = status.get_details_bad_request().unwrap().field_violations;
        assert_eq!(violations[0].field, "message", "{what}");
    }
    let audited = broker
        .site
        .audit()
        .lines()
        .filter(|line| line.contains("user_key.create") && line.contains("\"REQUEST\""))
        .count();
    assert_eq!(audited, cases.len(), "{}", broker.site.audit());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_passed_deadline_is_answered_and_audited() {
    let broker = Broker::start(Options {
        limits: "call_timeout_max_ms = 400".to_owned(),
        ..Options::default()
    });
    Caller::of(&broker, "enroller")
        .create("ada", MATERIAL)
        .await
        .unwrap();
    let raw = Raw::connect(&broker.site.pki, Some("releaser"), broker.grpc).await;
    let message = frame(&unwrap_of("ada").encode_to_vec());
    for pid in broker.workers() {
        freeze(pid);
    }
    // The caller's own limit, none, and one beyond the broker's.
    for (header, at_least, at_most) in [
        (&[("grpc-timeout", "150m")][..], 150, 400),
        (&[], 400, 1_000),
        (&[("grpc-timeout", "1H")], 400, 1_000),
    ] {
        let started = Instant::now();
        let answer = raw.post(UNWRAP, message.clone(), header).await.unwrap();
        let took = started.elapsed();
        let status = refused(Err::<(), _>(answer.status()), "DEADLINE");
        assert_eq!(status.code(), Code::DeadlineExceeded);
        let range = Duration::from_millis(at_least)..Duration::from_millis(at_most);
        assert!(range.contains(&took), "{header:?}: {took:?}");
    }
    for pid in broker.workers() {
        send(pid, Signal::CONT);
    }
    until("each passed deadline to be audited", || {
        let audit = broker.site.audit();
        let entries = audit
            .lines()
            .filter(|line| line.contains("user_key.unwrap") && line.contains("\"DEADLINE\""));
        (entries.count() == 3).then_some(())
    });
    let counted = r#"keybroker_calls_total{action="user_key.unwrap",reason="DEADLINE"} 3"#;
    until("each to be counted", || {
        get(broker.status, "/metrics")
            .contains(counted)
            .then_some(())
    });

    let malformed = ["", "1", "m", "123456789m", "-1S", "1.5S", "1x"];
    for wrong in malformed {
        let answer = raw
            .post(UNWRAP, message.clone(), &[("grpc-timeout", wrong)])
            .await
            .unwrap();
        refused(Err::<(), _>(answer.status()), "REQUEST");
    }
    let audited = broker.site.audit().matches("\"REQUEST\"").count();
    assert_eq!(audited, malformed.len());
}

/// A caller that hangs up cannot make its call unseen.
#[tokio::test(flavor = "multi_thread")]
async fn a_caller_that_disconnects_is_audited_all_the_same() {
    let broker = Broker::start(Options::default());
    Caller::of(&broker, "enroller")
        .create("ada", MATERIAL)
        .await
        .unwrap();
    let releaser = Caller::of(&broker, "releaser");
    // The connection is there, so that the call is the next thing that arrives.
    refused(releaser.unwrap("nobody").await, "KEY_NOT_FOUND");
    for pid in broker.workers() {
        freeze(pid);
    }
    let call = tokio::spawn(async move { releaser.unwrap("ada").await });
    until("the call to reach the token", || {
        get(broker.status, "/metrics")
            .lines()
            .any(|line| line.starts_with("keybroker_calls_in_progress") && line.ends_with(" 1"))
            .then_some(())
    });
    call.abort();
    assert!(call.await.unwrap_err().is_cancelled());
    tokio::time::sleep(Duration::from_millis(100)).await;
    for pid in broker.workers() {
        send(pid, Signal::CONT);
    }
    until("the call to be audited", || {
        let audit = broker.site.audit();
        audit
            .lines()
            .any(|line| line.contains("user_key.unwrap") && line.contains("\"user\":\"ada\""))
            .then_some(())
    });
}

/// What hangs up keeps its place until it is done; who waits for one for too long is told so, and audited.
#[tokio::test(flavor = "multi_thread")]
async fn waiting_for_a_place_is_audited_too() {
    let broker = Broker::start(Options {
        limits: "streams_per_connection_max = 1".to_owned(),
        ..Options::default()
    });
    let enroller = Caller::of(&broker, "enroller");
    enroller.create("ada", MATERIAL).await.unwrap();
    let raw = Raw::connect(&broker.site.pki, Some("releaser"), broker.grpc).await;
    let workers = broker.workers();
    for pid in &workers {
        freeze(*pid);
    }
    let message = frame(&unwrap_of("ada").encode_to_vec());
    let hanging_up = tokio::time::timeout(
        Duration::from_millis(200),
        raw.post(UNWRAP, message.clone(), &[]),
    );
    assert!(hanging_up.await.is_err());
    let waiting = raw.post(UNWRAP, message, &[("grpc-timeout", "200m")]).await;
    refused(Err::<(), _>(waiting.unwrap().status()), "DEADLINE");
    let audit = broker.site.audit();
    let waited = audit.lines().find(|line| line.contains("\"DEADLINE\""));
    let waited = waited.unwrap_or_else(|| panic!("{audit}"));
    assert!(
        waited.contains("user_key.unwrap") && !waited.contains("\"user\""),
        "{waited}"
    );
    for pid in workers {
        send(pid, Signal::CONT);
    }
}

/// One principal without the role costs one entry, however many items it asks for.
#[tokio::test(flavor = "multi_thread")]
async fn a_denied_batch_is_one_refusal() {
    let broker = Broker::start(Options::default());
    let enroller = Caller::of(&broker, "enroller");
    refused(enroller.batch(&["ada"; 64]).await, "POLICY");
    let (site, _) = broker.stop();
    assert_eq!(
        site.audit().matches("\"POLICY\"").count(),
        1,
        "{}",
        site.audit()
    );
}

/// Pages keep the limit of every message, however long the names are; nothing is left out or said twice.
#[tokio::test(flavor = "multi_thread")]
async fn a_page_is_never_longer_than_a_message_may_be() {
    let broker = Broker::start(Options::default());
    let enroller = Caller::of(&broker, "enroller");
    let mut users: Vec<_> = (0..180)
        .map(|number| format!("{number:03}{}", "x".repeat(252)))
        .collect();
    for user in &users {
        let request = CreateUserKeyRequest {
            user: user.clone(),
            key_name: "n".repeat(64),
            key_material: MATERIAL.to_vec(),
            request_id: String::new(),
        };
        let mut keys = enroller.keys.clone();
        keys.create_user_key(Request::new(request)).await.unwrap();
    }
    let mut keys = Caller::of(&broker, "releaser").keys;
    let mut token = String::new();
    let mut listed = Vec::new();
    loop {
        let request = ListUserKeysRequest {
            page_size: 1_000,
            page_token: token,
            ..Default::default()
        };
        let page = keys.list_user_keys(request).await.unwrap().into_inner();
        assert!(
            page.encoded_len() <= 64 * 1024,
            "{} bytes",
            page.encoded_len()
        );
        listed.extend(page.user_keys.into_iter().map(|key| key.user));
        token = page.next_page_token;
        if token.is_empty() {
            break;
        }
    }
    users.sort();
    assert_eq!(listed, users);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_method_of_an_api_that_the_listener_does_not_serve_is_unimplemented() {
    let site = Site::fresh(Options::default());
    site.write_configuration(|text| {
        *text = text.replace(r#"apis = ["grpc", "admin"]"#, r#"apis = ["grpc"]"#);
    });
    let broker = Broker::start_on(Arc::new(site));
    let admin = Raw::connect(&broker.site.pki, Some("admin"), broker.grpc).await;
    let mut answers = Vec::new();
    for path in [
        "/keybroker.v1.ControlService/GetTokenState",
        "/keybroker.v1.UserKeyService/NoSuchMethod",
        "/no.such.Service/Method",
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        "/",
    ] {
        let answer = admin.post(path, frame(b""), &[]).await.unwrap();
        let status = answer.status();
        assert_eq!(status.code(), Code::Unimplemented, "{path}");
        let (text, id) = status.message().split_once(" (call ").unwrap();
        uuid::Uuid::try_parse(id.trim_end_matches(')')).unwrap();
        answers.push(text.to_owned());
    }
    assert!(
        answers.iter().all(|text| *text == answers[0]),
        "{answers:?}"
    );
    // The API that this listener serves is.
    let releaser = Raw::connect(&broker.site.pki, Some("releaser"), broker.grpc).await;
    let answer = releaser.call(UNWRAP, &unwrap_of("nobody")).await;
    assert_eq!(answer.status().code(), Code::NotFound);
    UnwrapUserKeyResponse::decode(&answer.body[..]).unwrap();
}
