//! The main job over mTLS, with real parts: a user key's whole life, separation of duties, and what a start finds after a
//! crash.

use std::{sync::Arc, time::Duration};

use keybroker_proto::{
    GetTokenStateRequest, ListWrappingKeysRequest, TailAuditLogRequest, TokenServing, UserKeyState,
    WrappingKeyState, batch_unwrap_result::Result as BatchResult,
};
use rustix::process::Signal;
use tonic::Code;

use crate::{
    client::{Caller, eventually, reason, refused},
    pki,
    process::{Broker, is_alive, send, until},
    site::Options,
};

const FIRST: &[u8] = b"first material of this user";
const SECOND: &[u8] = b"second material of this user";

#[tokio::test(flavor = "multi_thread")]
async fn a_user_key_lives_its_whole_life() {
    let broker = Broker::start(Options::default());
    let [enroller, releaser, lifecycle] =
        ["enroller", "releaser", "lifecycle"].map(|name| Caller::of(&broker, name));

    let created = enroller.create("ada", FIRST).await.unwrap();
    assert_eq!((created.revision, created.record_id.len()), (1, 16));
    let key = releaser.unwrap("ada").await.unwrap();
    assert_eq!((key.key_material.as_slice(), key.revision), (FIRST, 1));

    let replaced = enroller.replace("ada", SECOND, 1, "").await.unwrap();
    assert_eq!(
        (replaced.revision, &replaced.record_id),
        (2, &created.record_id)
    );
    assert_eq!(releaser.unwrap("ada").await.unwrap().key_material, SECOND);

    let deleted = lifecycle.delete("ada", 2).await.unwrap();
    assert_eq!(deleted.state(), UserKeyState::Deleted);
    refused(releaser.unwrap("ada").await, "KEY_NOT_FOUND");
    refused(enroller.create("ada", SECOND).await, "KEY_EXISTS");
    assert!(releaser.get("ada").await.unwrap().delete_time.is_some());

    let undeleted = lifecycle.undelete("ada").await.unwrap();
    assert_eq!(
        (undeleted.state(), undeleted.revision),
        (UserKeyState::Active, 2)
    );
    assert_eq!(releaser.unwrap("ada").await.unwrap().key_material, SECOND);

    let restored = lifecycle.restore("ada", 1, 2).await.unwrap();
    assert_eq!(restored.revision, 3);
    let key = releaser.unwrap("ada").await.unwrap();
    assert_eq!((key.key_material.as_slice(), key.revision), (FIRST, 3));

    // All of it survives a restart.
    let (site, status) = broker.stop();
    assert!(status.success(), "{status}");
    let broker = Broker::start_on(site);
    let releaser = Caller::of(&broker, "releaser");
    assert_eq!(releaser.unwrap("ada").await.unwrap().key_material, FIRST);

    let audit = broker.site.audit();
    for action in ["create", "replace", "delete", "undelete", "restore"] {
        for kind in ["intent", "outcome"] {
            let lines = audit.lines().filter(|line| {
                line.contains(&format!(r#""action":"user_key.{action}""#))
                    && line.contains(&format!(r#""kind":"{kind}""#))
                    && line.contains(r#""outcome":"ok""#)
            });
            assert_eq!(lines.count(), 1, "{action} {kind}\n{audit}");
        }
    }
    let lines = audit.lines().filter(|line| {
        line.contains(r#""action":"user_key.unwrap""#) && line.contains(r#""outcome":"ok""#)
    });
    assert_eq!(lines.count(), 5, "{audit}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_and_a_list_answer_item_by_item() {
    let broker = Broker::start(Options::default());
    let enroller = Caller::of(&broker, "enroller");
    let releaser = Caller::of(&broker, "releaser");
    for user in ["anna", "berta", "carla"] {
        enroller
            .create(user, format!("material of {user}").as_bytes())
            .await
            .unwrap();
    }

    let results = releaser
        .batch(&["carla", "nobody", "anna"])
        .await
        .unwrap()
        .results;
    let seen: Vec<String> = results
        .into_iter()
        .map(|item| match item.result.unwrap() {
            BatchResult::Released(key) => String::from_utf8(key.key_material).unwrap(),
            BatchResult::Error(error) => error.reason,
        })
        .collect();
    assert_eq!(
        seen,
        ["material of carla", "KEY_NOT_FOUND", "material of anna"]
    );

    let first = releaser.list(2, "").await.unwrap();
    let second = releaser.list(2, &first.next_page_token).await.unwrap();
    let users: Vec<_> = first
        .user_keys
        .iter()
        .chain(&second.user_keys)
        .map(|key| key.user.as_str())
        .collect();
    assert_eq!(users, ["anna", "berta", "carla"]);
    assert_eq!(second.next_page_token, "");
}

/// Who may do what, seen from outside. `-` is `PERMISSION_DENIED` / `POLICY`; a letter is any other answer.
#[tokio::test(flavor = "multi_thread")]
async fn duties_are_separate_over_the_wire() {
    let broker = Broker::start(Options::default());
    // Columns: create unwrap replace get list delete undelete restore, wrapping keys, token, audit
    let matrix = [
        ("releaser", "-u-gl------"),
        ("enroller", "c-rgl------"),
        ("lifecycle", "---gldxs---"),
        ("admin", "--------kt-"),
        ("auditor", "---gl---kta"),
    ];
    for (client, expected) in matrix {
        let caller = Caller::of(&broker, client);
        let mut control = caller.control.clone();
        let user = format!("user of {client}");
        let user = user.as_str();
        let answers = [
            caller.create(user, FIRST).await.err(),
            caller.unwrap(user).await.err(),
            caller.replace(user, SECOND, 1, "").await.err(),
            caller.get(user).await.err(),
            caller.list(1, "").await.err(),
            caller.delete(user, 1).await.err(),
            caller.undelete(user).await.err(),
            caller.restore(user, 1, 1).await.err(),
            control
                .list_wrapping_keys(ListWrappingKeysRequest {})
                .await
                .err(),
            control.get_token_state(GetTokenStateRequest {}).await.err(),
            control
                .tail_audit_log(TailAuditLogRequest { limit: 1 })
                .await
                .err(),
        ];
        let answers = answers.map(|error| {
            error.map_or_else(String::new, |status| {
                let reason = reason(&status);
                assert_eq!(
                    reason == "POLICY",
                    status.code() == Code::PermissionDenied,
                    "{status:?}"
                );
                reason
            })
        });
        let allowed = expected.chars().map(|cell| cell != '-');
        for (column, (answer, allowed)) in answers.iter().zip(allowed).enumerate() {
            assert_eq!(
                answer != "POLICY",
                allowed,
                "{client}, column {column}: {answer}"
            );
        }
    }
    let denied = broker
        .site
        .audit()
        .lines()
        .filter(|line| line.contains(r#""outcome":"denied""#))
        .count();
    let expected: usize = matrix
        .iter()
        .map(|(_, cells)| cells.matches('-').count())
        .sum();
    assert_eq!(denied, expected, "each denial is one audit entry");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_control_plane_shows_keys_token_and_audit() {
    let broker = Broker::start(Options::default());
    let mut control = Caller::of(&broker, "auditor").control;

    let keys = control
        .list_wrapping_keys(ListWrappingKeysRequest {})
        .await
        .unwrap()
        .into_inner()
        .wrapping_keys;
    assert_eq!(keys.len(), 1);
    assert_eq!(
        (keys[0].state(), keys[0].modulus_bits),
        (WrappingKeyState::Active, 2048)
    );

    let token = control
        .get_token_state(GetTokenStateRequest {})
        .await
        .unwrap()
        .into_inner();
    assert_eq!(
        (token.serving(), token.label.as_str()),
        (TokenServing::Up, broker.site.token.label())
    );
    assert!(token.workers.iter().all(|worker| is_alive(worker.pid)) && !token.workers.is_empty());

    let tail = control
        .tail_audit_log(TailAuditLogRequest { limit: 10 })
        .await
        .unwrap()
        .into_inner();
    assert!(
        tail.entries
            .iter()
            .any(|entry| entry.contains(r#""action":"token.read""#)),
        "{tail:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn only_certificates_of_known_principals_are_accepted() {
    let broker = Broker::start(Options::default());
    let status = refused(
        Caller::of(&broker, pki::UNKNOWN).unwrap("ada").await,
        "CREDENTIAL",
    );
    assert_eq!(status.code(), Code::Unauthenticated);
    // These never get past the handshake, so that there is no reason from the broker.
    for client in [pki::EXPIRED, pki::OTHER_CA] {
        let status = Caller::of(&broker, client).unwrap("ada").await.unwrap_err();
        assert!(
            reason(&status).contains("without details"),
            "{client}: {status:?}"
        );
    }
}

/// The front is killed under write load. Workers end with it, nothing acknowledged is lost, and each intent without an
/// outcome is resolved against the store at the next start.
#[tokio::test(flavor = "multi_thread")]
async fn a_killed_front_leaves_nothing_half_done() {
    let broker = Broker::start(Options::default());
    let workers = broker.workers();
    assert!(!workers.is_empty());

    let mut writers = tokio::task::JoinSet::new();
    for writer in 0..8 {
        let enroller = Caller::of(&broker, "enroller");
        writers.spawn(async move {
            let mut acknowledged = Vec::new();
            for turn in 0..10_000 {
                let user = format!("user {writer}-{turn}");
                match enroller
                    .create(&user, format!("material of {user}").as_bytes())
                    .await
                {
                    Ok(_) => acknowledged.push(user),
                    Err(_) => break,
                }
            }
            acknowledged
        });
    }
    tokio::time::sleep(Duration::from_millis(700)).await;
    let site = tokio::task::spawn_blocking(|| broker.kill()).await.unwrap();
    let acknowledged: Vec<String> = writers.join_all().await.into_iter().flatten().collect();
    assert!(acknowledged.len() > 8, "{acknowledged:?}");
    until("the workers to end", || {
        workers.iter().all(|pid| !is_alive(*pid)).then_some(())
    });

    let broker = Broker::start_on(site);
    let releaser = Caller::of(&broker, "releaser");
    for user in &acknowledged {
        let key = releaser.unwrap(user).await.unwrap();
        assert_eq!(key.key_material, format!("material of {user}").as_bytes());
    }
    let site = Arc::clone(&broker.site);
    let of_kind = |kind: &str| {
        let audit = site.audit();
        audit
            .lines()
            .filter(|line| {
                line.contains(&format!(r#""kind":"{kind}""#)) && line.contains("user_key.create")
            })
            .count()
    };
    until("every intent to be closed", || {
        (of_kind("intent") == of_kind("outcome") + of_kind("recovered")).then_some(())
    });
    drop(broker);
    site.expect_ok(&["audit", "verify"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_worker_is_replaced() {
    let broker = Broker::start(Options::default());
    Caller::of(&broker, "enroller")
        .create("ada", FIRST)
        .await
        .unwrap();
    let releaser = Caller::of(&broker, "releaser");
    for _ in 0..3 {
        let old = broker.workers();
        for pid in &old {
            send(*pid, Signal::KILL);
        }
        until("a new worker", || {
            broker
                .workers()
                .iter()
                .any(|pid| !old.contains(pid))
                .then_some(())
        });
        let key = eventually(|| releaser.unwrap("ada")).await;
        assert_eq!(key.key_material, FIRST);
    }
}
