//! Log lines below a call carry its call id, action and principal, also those of tasks that do a part of its work.

use rustix::process::Signal;
use serde_json::Value;

use crate::{
    client::{Caller, refused},
    process::{Broker, freeze, send, until},
    site::{Options, WriteLock},
    wire::get,
};

const MATERIAL: &[u8] = b"material of this user";

/// The first log line with this message.
fn line(broker: &Broker, message: &str) -> Value {
    until(message, || {
        let log = broker.site.log();
        let mut lines = log
            .lines()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok());
        lines.find(|line| line["message"] == message)
    })
}

/// The audit entry of the call that the line is about.
fn entry_of(broker: &Broker, line: &Value) -> Value {
    let call = line["span"]["call_id"].as_str().unwrap().to_owned();
    until("the audit entry", || {
        let audit = broker.site.audit();
        let mut entries = audit
            .lines()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok());
        entries.find(|entry| entry["call_id"] == call.as_str() && entry["kind"] != "intent")
    })
}

fn assert_is_about(broker: &Broker, line: &Value, action: &str, client: &str) {
    let span = &line["span"];
    assert_eq!(span["action"], action, "{line}");
    let principal = span["principal"].as_str().unwrap();
    assert!(principal.ends_with(&format!("/{client}")), "{line}");
    let entry = entry_of(broker, line);
    assert_eq!(entry["action"], action, "{entry}");
    assert_eq!(entry["principal"], principal, "{entry}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_line_about_a_job_of_the_token_names_its_call() {
    let broker = Broker::start(Options {
        workers: 2,
        ..Options::default()
    });
    let enroller = Caller::of(&broker, "enroller");
    enroller.create("ada", MATERIAL).await.unwrap();
    let releaser = Caller::of(&broker, "releaser");
    let workers = broker.workers();
    for pid in &workers {
        freeze(*pid);
    }
    let call = tokio::spawn(async move { releaser.unwrap("ada").await });
    until("the call to begin", || {
        get(broker.status, "/metrics")
            .contains("keybroker_calls_in_progress 1")
            .then_some(())
    });
    // Whichever of the two holds the job.
    for pid in workers {
        send(pid, Signal::KILL);
    }
    let repeated = line(&broker, "a job is repeated: its token worker was lost");
    // The replacements do the job, or report that there was no worker.
    drop(call.await.unwrap());
    assert_is_about(&broker, &repeated, "user_key.unwrap", "releaser");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_line_about_a_failed_change_names_its_call() {
    let broker = Broker::start(Options::default());
    let lock = WriteLock::take(&broker.site.database());
    let enroller = Caller::of(&broker, "enroller");
    refused(enroller.create("ada", MATERIAL).await, "STORE_DOWN");
    lock.release();
    // A change runs in a separate task, whose lines are those of its call, too.
    let failed = line(&broker, "call failed");
    assert_is_about(&broker, &failed, "user_key.create", "enroller");
}
