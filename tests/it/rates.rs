//! Limits of callers: rates, failure budgets, and the alerts about bulk releases and frequent replacements, with the real broker.

use std::time::{Duration, Instant};

use tonic::{Code, Request, Status, metadata::MetadataValue};
use tonic_types::StatusExt as _;

use keybroker_proto::{
    UnwrapUserKeyRequest, UnwrapUserKeyResponse, user_key_service_client::UserKeyServiceClient,
};

use crate::{
    client::{Caller, NAME, channel, reason, refused},
    process::{Broker, until},
    site::Options,
    wire::get,
};

const MATERIAL: &[u8] = b"material of this user";

fn with_rates(rates: &str) -> Options {
    Options {
        limits: format!("\n[rates]\n{rates}"),
        ..Options::default()
    }
}

fn retry_delay(status: &Status) -> Duration {
    let info = status.get_details_retry_info().unwrap();
    info.retry_delay.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_over_its_rate_is_told_when_to_come_again() {
    let broker = Broker::start(with_rates("service_calls_per_minute = 12"));
    let enroller = Caller::of(&broker, "enroller");
    enroller.create("ada", MATERIAL).await.unwrap();
    let releaser = Caller::of(&broker, "releaser");
    for _ in 0..12 {
        releaser.unwrap("ada").await.unwrap();
    }
    let status = refused(releaser.unwrap("ada").await, "RATE");
    assert_eq!(status.code(), Code::ResourceExhausted);
    let delay = retry_delay(&status);
    assert!(
        // A place every five seconds, and up to half as much at random, so that callers do not come back together.
        delay > Duration::ZERO && delay <= Duration::from_millis(7_500),
        "{delay:?}"
    );
    // A malformed call is a call, too, and leaves no separate entry.
    refused(releaser.unwrap("").await, "RATE");
    // Neither another principal nor health pays for it.
    Caller::of(&broker, "other-releaser")
        .unwrap("ada")
        .await
        .unwrap();
    // The promise of the delay holds.
    tokio::time::sleep(delay).await;
    releaser.unwrap("ada").await.unwrap();
    let metrics = get(broker.status, "/metrics");
    assert!(
        metrics.contains("keybroker_refusals_total{reason=\"RATE\"} 2"),
        "{metrics}"
    );
    let (site, _) = broker.stop();
    let audit = site.audit();
    let entry = audit
        .lines()
        .find(|line| line.contains("\"RATE\""))
        .unwrap();
    assert!(entry.contains("\"count\":2"), "{entry}");
}

/// A call with its own credential, over a connection without a certificate.
async fn presenting(
    client: &UserKeyServiceClient<tonic::transport::Channel>,
    authorization: &str,
) -> Result<UnwrapUserKeyResponse, Status> {
    let mut request = Request::new(UnwrapUserKeyRequest {
        user: "ada".to_owned(),
        key_name: NAME.to_owned(),
        recipient: None,
    });
    let value: MetadataValue<_> = authorization.parse().unwrap();
    request.metadata_mut().insert("authorization", value);
    let answer = client.clone().unwrap_user_key(request).await?;
    Ok(answer.into_inner())
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_credentials_use_up_the_budget_of_their_own_address_alone() {
    let broker = Broker::start(with_rates("failures_per_minute = 4"));
    Caller::of(&broker, "enroller")
        .create("ada", MATERIAL)
        .await
        .unwrap();
    let with_certificate = channel(&broker.site.pki, Some("releaser"), broker.grpc);
    let client = UserKeyServiceClient::new(with_certificate);
    for _ in 0..4 {
        // The header stands in the place of the certificate: nobody falls back to it.
        refused(presenting(&client, "Bearer nonsense").await, "CREDENTIAL");
    }
    let status = refused(
        presenting(&client, "Bearer nonsense").await,
        "FAILURE_BUDGET",
    );
    assert_eq!(status.code(), Code::ResourceExhausted);
    assert!(retry_delay(&status) <= Duration::from_millis(22_500));
    // A flood of it is answered at once.
    let started = Instant::now();
    for _ in 0..200 {
        let status = presenting(&client, "Basic bm9ib2R5Om5vdGhpbmc=")
            .await
            .unwrap_err();
        assert_eq!(reason(&status), "FAILURE_BUDGET");
    }
    assert!(
        started.elapsed() < Duration::from_secs(5),
        "{:?}",
        started.elapsed()
    );
    // Good credentials from that address are good.
    Caller::of(&broker, "releaser").unwrap("ada").await.unwrap();
    let log = broker.site.log();
    assert!(log.contains("call refused"), "{log}");
    // 205 refusals: a network has 60 lines a minute, and what was suppressed is counted.
    let lines = log
        .lines()
        .filter(|line| line.contains("refused\""))
        .count();
    assert!(lines <= 70, "{lines} lines: {log}");
    let metrics = get(broker.status, "/metrics");
    let suppressed = metrics
        .lines()
        .find_map(|line| line.strip_prefix("keybroker_log_lines_suppressed_total "))
        .unwrap();
    assert!(suppressed.parse::<u64>().unwrap() > 130, "{suppressed}");
}

#[tokio::test(flavor = "multi_thread")]
async fn releasing_the_keys_of_too_many_users_raises_an_alert() {
    let broker = Broker::start(with_rates("released_users_per_hour = 3"));
    let (enroller, releaser) = (
        Caller::of(&broker, "enroller"),
        Caller::of(&broker, "releaser"),
    );
    let users = ["ada", "bob", "carl", "dora", "eve"];
    for user in users {
        enroller.create(user, MATERIAL).await.unwrap();
    }
    for user in ["ada", "bob", "carl", "ada", "bob"] {
        releaser.unwrap(user).await.unwrap();
    }
    assert!(!broker.site.log().contains("bulk-release"));
    // The alert refuses nothing: the release was permitted.
    for user in ["dora", "eve"] {
        assert_eq!(releaser.unwrap(user).await.unwrap().key_material, MATERIAL);
    }
    Caller::of(&broker, "other-releaser")
        .unwrap("ada")
        .await
        .unwrap();
    until("the alert", || {
        broker.site.log().contains("bulk-release").then_some(())
    });
    assert!(get(broker.status, "/metrics").contains("keybroker_bulk_releases_total 1"));
    let (site, _) = broker.stop();
    let audit = site.audit();
    let alerts: Vec<_> = audit
        .lines()
        .filter(|line| line.contains("alarm.bulk_release"))
        .collect();
    assert_eq!(alerts.len(), 1, "{alerts:?}");
    assert!(alerts[0].contains("/releaser"), "{alerts:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn replacing_a_record_too_often_raises_one_alert_and_refuses_nothing() {
    let broker = Broker::start(with_rates("replacements_per_hour = 3"));
    let enroller = Caller::of(&broker, "enroller");
    enroller.create("ada", MATERIAL).await.unwrap();
    enroller.create("bob", MATERIAL).await.unwrap();
    let replace = async |user: &str, revision: u64| {
        let changed = enroller.replace(user, MATERIAL, revision, "").await;
        assert_eq!(changed.unwrap().revision, revision + 1);
    };
    for revision in 1..=3 {
        replace("ada", revision).await;
        replace("bob", revision).await;
    }
    assert!(!broker.site.log().contains("frequent-replacement"));
    for revision in 4..=8 {
        replace("ada", revision).await;
    }
    let raised = "keybroker_alerts_total{alert=\"frequent-replacement\"} 1";
    let metrics = get(broker.status, "/metrics");
    assert!(metrics.contains(raised), "{metrics}");
    let (site, _) = broker.stop();
    let log = site.log();
    let lines: Vec<_> = log
        .lines()
        .filter(|line| line.contains("\"frequent-replacement\""))
        .collect();
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert!(lines[0].contains("/enroller"), "{lines:?}");
    let audit = site.audit();
    let entries: Vec<_> = audit
        .lines()
        .filter(|line| line.contains("alarm.frequent_replacement"))
        .collect();
    assert_eq!(entries.len(), 1, "{entries:?}");
    assert!(entries[0].contains("\"revision\":5"), "{entries:?}");
}

/// The times are those of the database, so that a restart, or a change of the broker, does not begin a new count.
#[tokio::test(flavor = "multi_thread")]
async fn replacements_before_a_restart_count_and_old_ones_do_not() {
    let broker = Broker::start(with_rates("replacements_per_hour = 3"));
    let enroller = Caller::of(&broker, "enroller");
    for user in ["ada", "bob"] {
        enroller.create(user, MATERIAL).await.unwrap();
        for revision in 1..=3 {
            enroller
                .replace(user, MATERIAL, revision, "")
                .await
                .unwrap();
        }
    }
    let (site, _) = broker.stop();
    let hour = 3_600 * 1_000_000_u64;
    site.sql(&format!(
        "UPDATE revisions SET created_us = created_us - {hour} WHERE record_id IN \
         (SELECT record_id FROM records WHERE user = 'bob')"
    ));
    let broker = Broker::start_on(site);
    let enroller = Caller::of(&broker, "enroller");
    enroller.replace("bob", MATERIAL, 4, "").await.unwrap();
    assert!(!broker.site.log().contains("frequent-replacement"));
    enroller.replace("ada", MATERIAL, 4, "").await.unwrap();
    assert!(broker.site.log().contains("frequent-replacement"));
}
