//! Tokens that come and go beside a running broker.

use std::{fs, sync::Arc, time::Duration};

use rustix::process::Signal;

use crate::{
    client::Caller,
    keys::{changed, key},
    process::{Broker, until},
    site::{Options, Site},
    wire::get,
};

use super::{
    CALLERS, Load, MATERIAL, Two, callers_when_ready, kill_workers, state_of, states,
    until_unusable, until_whole,
};

/// Waits until the broker uses these tokens.
async fn until_tokens(broker: &Broker, names: &[&str]) {
    for _ in 0..600 {
        let states = states(broker).await;
        let found: Vec<&str> = states.iter().map(|token| token.name.as_str()).collect();
        if found == names {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("{:?}", states(broker).await);
}

/// The lines of the log about refused changes of the configuration.
fn refusals(broker: &Broker) -> Vec<String> {
    let log = broker.site.log();
    let alerts = log
        .lines()
        .filter(|line| line.contains(r#""alert":"config-reload""#));
    alerts.map(str::to_owned).collect()
}

#[track_caller]
fn until_refused(broker: &Broker, words: &[&str]) {
    until("the alert", || {
        let found = refusals(broker);
        let is_it = |line: &String| words.iter().all(|word| line.contains(word));
        found.iter().any(is_it).then_some(())
    });
    until("the health names the problem", || {
        let ready = get(broker.status, "/readyz");
        words.iter().all(|word| ready.contains(word)).then_some(())
    });
}

/// The names of the tokens in the entries of an action.
fn audited(site: &Site, action: &str) -> Vec<String> {
    let action = format!("\"action\":\"{action}\"");
    let audit = site.audit();
    let entries = audit.lines().filter(|line| line.contains(&action));
    entries
        .map(|line| {
            let entry: serde_json::Value = serde_json::from_str(line).unwrap();
            assert_eq!(entry["kind"], "system");
            entry["token"].as_str().unwrap().to_owned()
        })
        .collect()
}

/// One of two tokens leaves and returns while there are calls. No call fails, and each part of the broker follows.
#[tokio::test(flavor = "multi_thread")]
async fn a_token_comes_and_goes_without_a_failed_call() {
    let two = Two::fresh(Options::default());
    two.configure_one();
    let broker = Broker::start_on(Arc::clone(&two.site));
    until_tokens(&broker, &["a"]).await;
    Caller::of(&broker, "enroller")
        .create("ada", MATERIAL)
        .await
        .unwrap();
    let load = Load::start(&broker, CALLERS);
    for round in 0..super::rounds(2) {
        two.configure("");
        until_tokens(&broker, &["a", "b"]).await;
        until_whole(&broker, "b", 1).await;
        let before = two.b.count("C_Decrypt ends 0");
        until("the new token does work", || {
            (two.b.count("C_Decrypt ends 0") > before + 10).then_some(())
        });
        if round == 0 {
            let metrics = get(broker.status, "/metrics");
            assert!(metrics.contains("keybroker_token_serving{token=\"b\"} 1"));
        }
        two.configure_one();
        until_tokens(&broker, &["a"]).await;
        until("the workers of the removed token end", || {
            let metrics = get(broker.status, "/metrics");
            let is_gone = metrics.contains("keybroker_token_serving{token=\"b\"} NaN");
            (is_gone && broker.workers().len() == 1).then_some(())
        });
    }
    let (calls, failed, slowest) = load.end().await;
    println!("{failed} of {calls} calls failed, the slowest took {slowest:?}");
    assert!(calls > 0 && failed == 0, "{failed} of {calls}");
    assert!(get(broker.status, "/readyz").ends_with("ready\n"));
    let (site, status) = broker.stop();
    assert!(status.success(), "{status}");
    for action in ["token.added", "token.removed"] {
        assert_eq!(audited(&site, action), vec!["b"; super::rounds(2)]);
    }
    for alert in ["token-down", "token-untrusted", "registry", "bug"] {
        let raised = format!(r#""alert":"{alert}""#);
        assert!(!site.log().contains(&raised), "{alert}");
    }
}

/// A token is added beside a running broker, and the copy of the key on it is registered. Afterwards it does the work of the other
/// token.
#[tokio::test(flavor = "multi_thread")]
async fn a_new_token_is_used_after_its_copy_is_registered() {
    let two = Two::unregistered(Options::default());
    let id = two.key();
    two.configure_one();
    let broker = Broker::start_on(Arc::clone(&two.site));
    let enroller = Caller::of(&broker, "enroller");
    enroller.create("ada", MATERIAL).await.unwrap();
    two.configure("priority = 50");
    broker.signal(Signal::HUP);
    until("the token without a key is shown", || {
        let ready = get(broker.status, "/readyz");
        ready.contains("token b is not used").then_some(())
    });
    let found = changed(&broker, &["find-copies", &id]);
    assert_eq!(found["tokens"], "a, b");
    until_whole(&broker, "b", 1).await;
    assert_eq!(state_of(&broker, "b").await.priority, 50);
    two.a.behave("[token]\nabsent = true\n");
    kill_workers(&broker, "a").await;
    until_unusable(&broker, "a").await;
    let releaser = Caller::of(&broker, "releaser");
    releaser.unwrap("ada").await.unwrap();
    two.a.behave("");
    until_whole(&broker, "a", 1).await;

    two.configure("priority = 200");
    for _ in 0..600 {
        if states(&broker).await[0].name == "b" {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let order: Vec<_> = states(&broker).await;
    assert_eq!((order[0].name.as_str(), order[0].priority), ("b", 200));
    let (site, _) = broker.stop();
    assert_eq!(audited(&site, "token.added"), ["b"]);
    assert_eq!(audited(&site, "token.priority_changed"), ["b"]);
    let broker = Broker::start_on(site);
    callers_when_ready(&broker).await;
}

/// A token that is added while no token serves does the work of the failed token.
#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_is_added_during_an_outage_serves() {
    let two = Two::fresh(Options::default());
    two.configure_one();
    let broker = Broker::start_on(Arc::clone(&two.site));
    until_tokens(&broker, &["a"]).await;
    let enroller = Caller::of(&broker, "enroller");
    enroller.create("ada", MATERIAL).await.unwrap();
    two.a.behave("[token]\nabsent = true\n");
    kill_workers(&broker, "a").await;
    until_unusable(&broker, "a").await;
    two.configure("");
    until_tokens(&broker, &["a", "b"]).await;
    until_whole(&broker, "b", 1).await;
    Caller::of(&broker, "releaser").unwrap("ada").await.unwrap();
}

/// A change that cannot be applied changes nothing, and the alert and the health say why.
#[tokio::test(flavor = "multi_thread")]
async fn a_change_that_needs_a_restart_changes_nothing() {
    let two = Two::fresh(Options::default());
    let broker = Broker::start_on(Arc::clone(&two.site));
    let (enroller, releaser) = callers_when_ready(&broker).await;
    enroller.create("ada", MATERIAL).await.unwrap();
    let file = two.site.configuration_file();
    let good = fs::read_to_string(&file).unwrap();

    two.configure("queue_length_max = 7");
    until_refused(&broker, &["queue_length_max", "restart"]);
    fs::write(&file, "[[token]\n").unwrap();
    until_refused(&broker, &["line 1"]);
    fs::write(&file, good.replace("name = \"b\"", "name = \"B\"")).unwrap();
    until_refused(&broker, &["1 to 64 bytes of [a-z0-9._-]"]);
    assert_eq!(states(&broker).await.len(), 2);
    releaser.unwrap("ada").await.unwrap();
    for action in ["token.added", "token.removed", "token.priority_changed"] {
        assert!(audited(&two.site, action).is_empty(), "{action}");
    }

    fs::write(&file, &good).unwrap();
    until("the health without a problem", || {
        get(broker.status, "/readyz")
            .ends_with("ready\n")
            .then_some(())
    });
    // Another section takes effect at the next start.
    fs::write(
        &file,
        format!("{good}\n[wrapping_keys]\nrotate_after_days = 1\n"),
    )
    .unwrap();
    until("the note in the log", || {
        let log = broker.site.log();
        (log.contains("only at the next start") && log.contains("wrapping_keys")).then_some(())
    });
    assert!(get(broker.status, "/readyz").ends_with("ready\n"));
}

/// A token with the only copy of a key stays while it serves. A token that does not serve can be removed.
#[tokio::test(flavor = "multi_thread")]
async fn a_token_with_the_only_copy_of_a_key_stays() {
    let two = Two::unregistered(Options::default());
    two.replace_b();
    let broker = Broker::start_on(Arc::clone(&two.site));
    let enroller = Caller::of(&broker, "enroller");
    enroller.create("first", MATERIAL).await.unwrap();
    broker.stop();
    let made = two.site.expect_ok(&[
        "-o", "json", "--token", "b", "key", "generate", "--bits", "2048",
    ]);
    let made: serde_json::Value = serde_json::from_str(&made).unwrap();
    let other = made["id"].as_str().unwrap();
    let broker = Broker::start_on(Arc::clone(&two.site));
    let (enroller, releaser) = callers_when_ready(&broker).await;
    enroller.create("second", MATERIAL).await.unwrap();
    two.configure_one();
    until_refused(&broker, &[other, "no other token serves"]);
    releaser.unwrap("second").await.unwrap();
    until_tokens(&broker, &["a", "b"]).await;

    two.b.behave("[token]\nabsent = true\n");
    kill_workers(&broker, "b").await;
    // The broker tries the refused change again without SIGHUP, as soon as the token does not serve.
    until_tokens(&broker, &["a"]).await;
    releaser.unwrap("first").await.unwrap();
    // The workers of the remaining token search for the key first.
    let lost = until("the key is recorded as lost", || {
        let lost = key(&broker, "admin", &["lost", other, "--yes"]);
        (lost.code == Some(0)).then_some(lost.stdout)
    });
    assert!(lost.contains("destroyed"), "{lost}");
}
