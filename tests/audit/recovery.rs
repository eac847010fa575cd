//! Intents without an outcome: found at the next start, with all that the closing entry must say.

use std::fs;

use keybroker_audit::{AuditLog, Entry, EntryKind, Outcome, open_intents, verify};
use keybroker_core::{
    call::{CallId, RequestId},
    key::{KeyName, RecordId, Revision, Tenant, UserId, WrappingKeyId},
};

use crate::{SEGMENT, assert_whole, decision, entry, folder, open, segments};

/// The disk was full, or the machine went down, between the making of the log's id and its writing.
#[tokio::test]
async fn a_log_that_was_never_begun_is_begun() {
    let (_folder, path) = folder();
    open(&path).close();
    for segment in segments(&path) {
        fs::remove_file(segment).unwrap();
    }
    fs::write(path.join("log-id"), "").unwrap();
    let log = open(&path);
    log.append(decision()).await.unwrap();
    log.close();
    assert_whole(&path);
    // An id that is gone from a log with entries is no such moment.
    fs::write(path.join("log-id"), "").unwrap();
    assert!(AuditLog::open(&path, SEGMENT).is_err());
}

#[tokio::test]
async fn intents_without_an_outcome_are_found() {
    let (_folder, path) = folder();
    let log = open(&path);
    let (open_call, closed, recovered) = (CallId::fresh(), CallId::fresh(), CallId::fresh());
    for (kind, call) in [
        (EntryKind::Intent, open_call),
        (EntryKind::Intent, closed),
        (EntryKind::Outcome, closed),
        (EntryKind::Intent, recovered),
        (EntryKind::Recovered, recovered),
    ] {
        log.append(entry(kind, call)).await.unwrap();
    }
    log.close();
    // An intent stays open until it is resolved, however often the log is opened meanwhile.
    for _ in 0..3 {
        let (log, open) = AuditLog::open(&path, SEGMENT).unwrap();
        let calls: Vec<_> = open.iter().map(|intent| intent.call).collect();
        assert_eq!(calls, [open_call]);
        assert_eq!(open[0].intent.action, "user_key.create");
        log.close();
    }
    let log = open(&path);
    log.append(entry(EntryKind::Recovered, open_call))
        .await
        .unwrap();
    log.close();
    let (log, open) = AuditLog::open(&path, SEGMENT).unwrap();
    assert!(open.is_empty());
    log.close();
}

fn full_intent(call: CallId) -> Entry {
    let mut intent = entry(EntryKind::Intent, call);
    intent.principal = Some("URI:spiffe://example/ada \"x\"".to_owned());
    intent.tenant = Some(Tenant::parse("acme").unwrap());
    intent.user = Some(UserId::parse("Zoë").unwrap());
    intent.key_name = Some(KeyName::parse("vault").unwrap());
    intent.record_id = Some(RecordId::from_bytes([7; 16]));
    intent.revision = Revision::new(3);
    intent.wrapping_key = Some(WrappingKeyId::from_bytes([9; 16]));
    intent.policy = Some("role".into());
    intent.request_id = RequestId::parse("7d444840-9dc0-11d1-b245-5ffdce74fad2").unwrap();
    intent.peer = Some("127.0.0.1:1".to_owned());
    intent
}

/// A `recovered` entry says who wanted what of which record: the intent may lie in a segment that was shipped long ago.
#[tokio::test]
async fn a_recovered_entry_names_principal_and_record() {
    let (_folder, path) = folder();
    let log = open(&path);
    let call = CallId::fresh();
    log.append(full_intent(call)).await.unwrap();
    drop(log);
    let (log, open) = crate::until("the writer to end", || AuditLog::open(&path, SEGMENT).ok());
    let [intent] = &open[..] else {
        panic!("{open:?}")
    };
    assert_eq!(intent.intent, full_intent(call));
    log.append(intent.recovered(Outcome::Failed)).await.unwrap();
    let line = log.tail(1).unwrap().remove(0);
    for field in [
        r#""kind":"recovered""#,
        r#""outcome":"failed""#,
        r#""principal":"URI:spiffe://example/ada \"x\"""#,
        r#""tenant":"acme""#,
        r#""user":"Zoë""#,
        r#""key_name":"vault""#,
        r#""record_id":"07070707070707070707070707070707""#,
        r#""revision":3"#,
        r#""wrapping_key":"09090909090909090909090909090909""#,
        r#""request_id":"7d444840-9dc0-11d1-b245-5ffdce74fad2""#,
    ] {
        assert!(line.contains(field), "{field}: {line}");
    }
    log.close();
    assert_eq!(verify(&path).unwrap().open_intents, 0);
}

/// Found without a lock and without a trace, also beside a process that writes.
#[tokio::test]
async fn open_intents_are_found_without_opening_the_log() {
    let (_folder, path) = folder();
    let log = open(&path);
    let call = CallId::fresh();
    log.append(full_intent(call)).await.unwrap();
    let found = open_intents(&path).unwrap();
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].intent, full_intent(call));
    assert_eq!(verify(&path).unwrap().open_intents, 1);
    log.close();
    let report = verify(&path).unwrap();
    assert_eq!((report.entries, report.open_intents), (4, 1));
    assert_whole(&path);
}

/// An intent that was given up may not be in the log at all.
#[tokio::test]
async fn nothing_is_recovered_that_is_not_open() {
    let (_folder, path) = folder();
    let log = open(&path);
    let before = log
        .append(entry(EntryKind::Decision, CallId::fresh()))
        .await
        .unwrap();
    let moot = log
        .append(entry(EntryKind::Recovered, CallId::fresh()))
        .await
        .unwrap();
    assert_eq!(moot, before);
    assert!(!log.tail(10).unwrap().join("\n").contains("recovered"));
    log.close();
    assert_whole(&path);
}

/// However many segments lie between, and whatever began them.
#[tokio::test]
async fn an_intent_is_found_across_segments() {
    let (_folder, path) = folder();
    let call = CallId::fresh();
    let (log, _) = AuditLog::open(&path, 1).unwrap();
    log.append(full_intent(call)).await.unwrap();
    for _ in 0..5 {
        log.append(entry(EntryKind::Decision, CallId::fresh()))
            .await
            .unwrap();
    }
    log.close();
    assert!(segments(&path).len() > 5);
    let (log, open) = AuditLog::open(&path, 1).unwrap();
    assert_eq!(open.len(), 1);
    log.append(open[0].recovered(Outcome::Ok)).await.unwrap();
    log.close();
    assert!(open_intents(&path).unwrap().is_empty());
    assert_whole(&path);
}
