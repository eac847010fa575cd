//! Tests of approvals with a token in memory: expired requests, rows of other people, and decisions at the same moment.

use std::collections::BTreeSet;

use keybroker_core::{approval::ApprovalState, key::ApprovalId};
use keybroker_store::{ApprovalChange, ApprovalRow, Decision, PersonOfPrincipal};

use crate::{ApprovalRules, Decided, KeyChange, Person, Removal, Verdict, Wait};

use super::*;

const OLD: WrappingKeyId = WrappingKeyId::from_bytes([20; 16]);
const NEW: WrappingKeyId = WrappingKeyId::from_bytes([21; 16]);
const ADA: &str = "URI:ada";
const BOB: &str = "URI:bob";
const EVE: &str = "URI:eve";

fn rules(expire_after: Duration) -> ApprovalRules {
    let person = |name: &str, principals: &[&str]| Person {
        name: name.to_owned(),
        principals: principals.iter().map(|&name| name.to_owned()).collect(),
    };
    ApprovalRules {
        actions: BTreeSet::from(ApprovalRules::ACTIONS),
        expire_after,
        persons: vec![
            person("Ada", &[ADA, "URI:ada-2"]),
            person("Bob", &[BOB]),
            person("Carol", &["URI:carol"]),
        ],
        kept: Duration::from_hours(1),
    }
}

fn authentic(id: WrappingKeyId, state: WrappingKeyState, sequence: u64) -> RegistryRow {
    let row = registered(id, state, sequence);
    RegistryRow {
        mac: mac_by(id, &row.mac_message()),
        ..row
    }
}

/// A broker with a deactivated key and a key in use.
async fn broker_of(folder: &std::path::Path, rules: ApprovalRules) -> Arc<Broker> {
    broker_of_tokens(folder, &Tokens::with(&[OLD, NEW]), rules).await
}

async fn broker_of_tokens(
    folder: &std::path::Path,
    tokens: &Arc<Tokens>,
    rules: ApprovalRules,
) -> Arc<Broker> {
    let rows = [
        authentic(OLD, WrappingKeyState::Deactivated, 1),
        authentic(NEW, WrappingKeyState::Active, 2),
    ];
    let tokens = Arc::clone(tokens);
    broker_with_approvals(folder, tokens, &rows, rules).await
}

fn call() -> Call {
    Call::start("127.0.0.1:1", Deadline::after(Duration::from_secs(10)))
}

/// Changes the old key, which must succeed. Returns its state.
async fn change(broker: &Arc<Broker>, admin: &Principal, change: KeyChange) -> WrappingKeyState {
    let changed = broker.change_key_state(admin, &call(), OLD, change).await;
    changed.unwrap().state
}

async fn destroy(broker: &Arc<Broker>, who: &str, days: u32) -> Result<(), Error> {
    let admin = testing::service(who, &[Role::Admin]);
    let change = KeyChange::Destroy(Wait::Days(days));
    let changed = broker.change_key_state(&admin, &call(), OLD, change).await;
    changed.map(drop)
}

/// Requests the destruction, and returns the stored request.
async fn requested(broker: &Arc<Broker>, who: &str, days: u32) -> ApprovalRow {
    let error = destroy(broker, who, days).await.unwrap_err();
    assert_eq!(error.reason(), Reason::ApprovalNeeded, "{error}");
    let id = error.approval().unwrap();
    broker.store.approval(id).await.unwrap().unwrap()
}

async fn decide(
    broker: &Arc<Broker>,
    who: &str,
    id: ApprovalId,
    verdict: Verdict,
) -> Result<Option<ApprovalState>, Error> {
    Ok(match decided(broker, who, id, verdict).await? {
        Decided::Changed(view) => Some(view.state),
        Decided::Removed(_) => None,
    })
}

async fn decided(
    broker: &Arc<Broker>,
    who: &str,
    id: ApprovalId,
    verdict: Verdict,
) -> Result<Decided, Error> {
    let admin = testing::service(who, &[Role::Admin]);
    broker.decide_approval(&admin, &call(), id, verdict).await
}

async fn approve(broker: &Arc<Broker>, who: &str, row: &ApprovalRow) -> Result<(), Error> {
    let verdict = Verdict::Approve { digest: row.digest };
    let state = decide(broker, who, row.id, verdict).await?;
    assert_eq!(state, Some(ApprovalState::Approved));
    Ok(())
}

/// Writes a row with a MAC by a key of the token, as an earlier state of the database has it.
async fn put(broker: &Broker, row: ApprovalRow) -> ApprovalRow {
    let stored = broker.store.approval(row.id).await.unwrap().unwrap();
    let row = ApprovalRow {
        mac: mac_by(row.signer, &row.mac_message()),
        ..row
    };
    let change = ApprovalChange {
        row: row.clone(),
        expected: stored.mac,
    };
    let written = broker
        .store
        .decide_approval(&change, CallId::fresh(), Timestamp::now());
    written.await.unwrap();
    row
}

#[track_caller]
fn is_refused<T: std::fmt::Debug>(result: Result<T, Error>, reason: Reason, word: &str) {
    let error = result.unwrap_err();
    assert_eq!(error.reason(), reason, "{error}");
    assert!(error.detail().contains(word), "{word}: {error}");
    assert!(
        !error.violations().is_empty(),
        "the caller is told: {error}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn one_approval_of_another_person_permits_one_change() {
    let folder = tempfile::tempdir().unwrap();
    let broker = broker_of(folder.path(), rules(Duration::from_hours(24))).await;
    let row = requested(&broker, ADA, 30).await;
    // The same change is one request, also with another credential of the same person.
    assert_eq!(requested(&broker, ADA, 30).await, row);
    assert_eq!(requested(&broker, "URI:ada-2", 30).await, row);
    // Another change, and another person, are other requests.
    let longer = requested(&broker, ADA, 31).await;
    let of_bob = requested(&broker, BOB, 30).await;
    assert!(longer.id != row.id && of_bob.id != row.id);
    for who in [ADA, "URI:ada-2"] {
        let own = approve(&broker, who, &row).await;
        is_refused(own, Reason::Policy, "another person");
    }
    is_refused(
        approve(&broker, EVE, &row).await,
        Reason::Policy,
        "belongs to no",
    );
    is_refused(
        destroy(&broker, EVE, 30).await,
        Reason::Policy,
        "belongs to no",
    );
    let other = Verdict::Approve {
        digest: longer.digest,
    };
    let other = decide(&broker, BOB, row.id, other).await;
    is_refused(other, Reason::Request, "digest");

    approve(&broker, BOB, &row).await.unwrap();
    is_refused(
        approve(&broker, BOB, &row).await,
        Reason::ApprovalState,
        "approved",
    );
    // The approval is for this change of this person.
    for (who, days) in [(ADA, 31), (BOB, 30)] {
        let other = destroy(&broker, who, days).await;
        assert_eq!(other.unwrap_err().reason(), Reason::ApprovalNeeded);
    }
    destroy(&broker, ADA, 30).await.unwrap();
    let used = broker.store.approval(row.id).await.unwrap().unwrap();
    assert_eq!(used.state, ApprovalState::Used);
    assert!(used.used.is_some() && used.decision.is_some());

    // An administrator cancels the destruction. The used approval and its earlier state permit nothing any more.
    let admin = testing::service(ADA, &[Role::Admin]);
    change(&broker, &admin, KeyChange::Keep).await;
    let again = ApprovalRow {
        state: ApprovalState::Approved,
        used: None,
        ..used
    };
    put(&broker, again).await;
    let replayed = destroy(&broker, ADA, 30).await;
    assert_eq!(replayed.unwrap_err().reason(), Reason::ApprovalNeeded);
}

/// The audit log has both persons and both principals, in the request, in the decision and in the change.
#[tokio::test(flavor = "multi_thread")]
async fn the_audit_log_names_both_persons() {
    let folder = tempfile::tempdir().unwrap();
    let broker = broker_of(folder.path(), rules(Duration::from_hours(24))).await;
    let row = requested(&broker, "URI:ada-2", 30).await;
    approve(&broker, BOB, &row).await.unwrap();
    destroy(&broker, ADA, 30).await.unwrap();
    let lines = broker.audit.tail(100).unwrap();
    let expect = |action: &str, kind: &str, fields: &[&str]| {
        let is_it = |line: &&String| {
            line.contains(&format!("\"action\":\"{action}\""))
                && line.contains(&format!("\"kind\":\"{kind}\""))
        };
        let line = lines
            .iter()
            .rfind(is_it)
            .unwrap_or_else(|| panic!("{action} {kind}"));
        let id = format!("\"approval\":\"{}\"", row.id);
        let digest = format!("\"digest\":\"{}\"", digests::hex_of(row.digest));
        for field in [&[id.as_str(), &digest], fields].concat() {
            assert!(line.contains(field), "{field}: {line}");
        }
    };
    let of_ada = [r#""person":"Ada""#, r#""principal":"URI:ada-2""#];
    expect("wrapping_key.destroy", "decision", &of_ada);
    for kind in ["intent", "outcome"] {
        expect("approval.request", kind, &of_ada);
        let by_bob = [
            r#""person":"Bob""#,
            r#""principal":"URI:bob""#,
            r#""requested_by":"URI:ada-2""#,
            r#""requested_by_person":"Ada""#,
        ];
        expect("approval.approve", kind, &by_bob);
        let change = [
            r#""person":"Ada""#,
            r#""principal":"URI:ada""#,
            r#""approved_by":"URI:bob""#,
            r#""approved_by_person":"Bob""#,
        ];
        expect("wrapping_key.destroy", kind, &change);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_expired_request_is_neither_approved_nor_used() {
    let folder = tempfile::tempdir().unwrap();
    let broker = broker_of(folder.path(), rules(Duration::ZERO)).await;
    let row = requested(&broker, ADA, 30).await;
    let late = approve(&broker, BOB, &row).await;
    is_refused(late, Reason::ApprovalState, "with the same command");
    let late = decide(&broker, BOB, row.id, Verdict::Reject).await;
    is_refused(late, Reason::ApprovalState, "expired");
    // The same change begins a new request.
    let error = destroy(&broker, ADA, 30).await.unwrap_err();
    assert!(error.detail().contains("expired at"), "{error}");
    assert_ne!(error.approval(), Some(row.id));
    assert_eq!(broker.store.approval(row.id).await.unwrap(), None);

    let folder = tempfile::tempdir().unwrap();
    let broker = broker_of(folder.path(), rules(Duration::from_hours(1))).await;
    let row = requested(&broker, ADA, 30).await;
    approve(&broker, BOB, &row).await.unwrap();
    let approved = broker.store.approval(row.id).await.unwrap().unwrap();
    let expired = ApprovalRow {
        expires: Timestamp::now(),
        ..approved
    };
    put(&broker, expired).await;
    let late = destroy(&broker, ADA, 30).await.unwrap_err();
    assert_eq!(late.reason(), Reason::ApprovalNeeded);
    assert!(late.detail().contains("expired at"), "{late}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rejected_request_is_over_and_may_be_made_again() {
    let folder = tempfile::tempdir().unwrap();
    let broker = broker_of(folder.path(), rules(Duration::from_hours(1))).await;
    let row = requested(&broker, ADA, 30).await;
    let rejected = decide(&broker, BOB, row.id, Verdict::Reject).await;
    assert_eq!(rejected.unwrap(), Some(ApprovalState::Rejected));
    is_refused(
        approve(&broker, BOB, &row).await,
        Reason::ApprovalState,
        "Bob rejected",
    );
    let again = destroy(&broker, ADA, 30).await.unwrap_err();
    assert!(again.detail().contains("Bob rejected"), "{again}");
    assert_ne!(again.approval(), Some(row.id));
    // A person may withdraw their own request.
    let own = again.approval().unwrap();
    let withdrawn = decide(&broker, ADA, own, Verdict::Reject).await;
    assert_eq!(withdrawn.unwrap(), Some(ApprovalState::Rejected));
    is_refused(
        decide(
            &broker,
            BOB,
            ApprovalId::from_bytes([1; 16]),
            Verdict::Reject,
        )
        .await,
        Reason::KeyNotFound,
        "no request",
    );
}

/// Two colleagues decide at the same moment.
#[tokio::test(flavor = "multi_thread")]
async fn of_two_decisions_one_takes_effect() {
    let folder = tempfile::tempdir().unwrap();
    let broker = broker_of(folder.path(), rules(Duration::from_hours(1))).await;
    for days in 30..40 {
        let row = requested(&broker, ADA, days).await;
        let by = |who| {
            let (broker, row) = (Arc::clone(&broker), row.clone());
            async move { approve(&broker, who, &row).await }
        };
        let reject = decide(&broker, "URI:carol", row.id, Verdict::Reject);
        let (bob, carol, rejected) = tokio::join!(by(BOB), by("URI:carol"), reject);
        let done = [bob.is_ok(), carol.is_ok(), rejected.is_ok()];
        // Only one approval takes effect. The rejection takes effect alone, or withdraws the approval.
        let approvals = done[..2].iter().filter(|done| **done).count();
        assert!(approvals <= 1 && (approvals == 1 || done[2]), "{done:?}");
        let stored = broker.store.approval(row.id).await.unwrap().unwrap();
        let is_rejected = stored.state == ApprovalState::Rejected;
        assert_eq!(is_rejected, done[2], "{done:?}");
        for error in [bob.err(), carol.err(), rejected.err()]
            .into_iter()
            .flatten()
        {
            assert_eq!(error.reason(), Reason::ApprovalState, "{error}");
        }
    }
}

/// A writer of SQL can neither approve a request, nor change what was approved, nor who approved it.
#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_no_broker_wrote_is_refused_and_can_be_removed() {
    let folder = tempfile::tempdir().unwrap();
    let broker = broker_of(folder.path(), rules(Duration::from_hours(1))).await;
    let row = requested(&broker, ADA, 30).await;
    let by = PersonOfPrincipal {
        person: "Bob".to_owned(),
        principal: BOB.to_owned(),
    };
    let at = Timestamp::now();
    let forged = ApprovalRow {
        state: ApprovalState::Approved,
        decision: Some(Decision { by, at }),
        ..row.clone()
    };
    let change = ApprovalChange {
        row: forged,
        expected: row.mac,
    };
    let written = broker.store.decide_approval(&change, CallId::fresh(), at);
    written.await.unwrap();
    is_refused(
        destroy(&broker, ADA, 30).await,
        Reason::RecordDamaged,
        "was altered",
    );
    is_refused(
        approve(&broker, BOB, &row).await,
        Reason::RecordDamaged,
        "was altered",
    );
    let admin = testing::service(BOB, &[Role::Admin]);
    let listed = broker.approvals(&admin, &call(), true, None).await.unwrap();
    assert!(!listed.approvals[0].is_verified);
    assert!(listed.approvals[0].problem.is_some());
    let removed = decided(&broker, BOB, row.id, Verdict::Reject).await;
    assert_eq!(removed.unwrap(), Decided::Removed(Removal::Altered));
    assert_eq!(broker.store.approval(row.id).await.unwrap(), None);
    let line = broker.audit.tail(1).unwrap().remove(0);
    assert!(line.contains(r#""cause":"altered""#), "{line}");
    let row = requested(&broker, ADA, 30).await;
    // No wrapping key of the registry made this row.
    let signer = WrappingKeyId::from_bytes([9; 16]);
    put(
        &broker,
        ApprovalRow {
            signer,
            ..row.clone()
        },
    )
    .await;
    let removed = decided(&broker, BOB, row.id, Verdict::Reject).await;
    assert_eq!(removed.unwrap(), Decided::Removed(Removal::Altered));
}

/// A request whose wrapping key was suspended may be authentic, so the answer and the audit log do not say that it was altered.
#[tokio::test(flavor = "multi_thread")]
async fn a_request_under_a_suspended_key_is_removed_without_blame() {
    let folder = tempfile::tempdir().unwrap();
    let broker = broker_of(folder.path(), rules(Duration::from_hours(1))).await;
    let row = requested(&broker, ADA, 30).await;
    let over = requested(&broker, ADA, 31).await;
    for row in [
        row.clone(),
        ApprovalRow {
            state: ApprovalState::Used,
            ..over.clone()
        },
    ] {
        put(&broker, ApprovalRow { signer: OLD, ..row }).await;
    }
    let admin = testing::service(ADA, &[Role::Admin]);
    change(&broker, &admin, KeyChange::Suspend).await;
    let approved = approve(&broker, BOB, &row).await;
    is_refused(
        approved,
        Reason::ApprovalState,
        "cannot be verified any more",
    );
    let removed = decided(&broker, BOB, row.id, Verdict::Reject)
        .await
        .unwrap();
    assert_eq!(removed, Decided::Removed(Removal::KeyState(OLD)));
    assert_eq!(broker.store.approval(row.id).await.unwrap(), None);
    let line = broker.audit.tail(1).unwrap().remove(0);
    let key = format!(r#""wrapping_key":"{OLD}""#);
    for field in [r#""cause":"key-state""#, r#""outcome":"ok""#, &key] {
        assert!(line.contains(field), "{field}: {line}");
    }
    // The record of a used request stays.
    let kept = decide(&broker, BOB, over.id, Verdict::Reject).await;
    is_refused(kept, Reason::ApprovalState, "says that it is used");
    assert!(broker.store.approval(over.id).await.unwrap().is_some());
}

/// A request that cannot be verified for the moment stays, because it may be authentic.
#[tokio::test(flavor = "multi_thread")]
async fn a_request_stays_while_its_token_is_not_available() {
    let folder = tempfile::tempdir().unwrap();
    let tokens = Tokens::with(&[OLD, NEW]);
    let broker = broker_of_tokens(folder.path(), &tokens, rules(Duration::from_hours(1))).await;
    let row = requested(&broker, ADA, 30).await;
    tokens.are_down(&[NEW]);
    let refused = decide(&broker, BOB, row.id, Verdict::Reject).await;
    let error = refused.unwrap_err();
    assert_eq!(error.reason(), Reason::TokenDown, "{error}");
    let explained = &error.violations()[0].description;
    assert!(explained.contains("nothing was changed"), "{explained}");
    tokens.are_down(&[]);
    let rejected = decide(&broker, BOB, row.id, Verdict::Reject).await;
    assert_eq!(rejected.unwrap(), Some(ApprovalState::Rejected));
}

/// A row that changes after it was found to be altered is not removed: the changed row may be authentic.
#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_changes_during_its_removal_stays() {
    let folder = tempfile::tempdir().unwrap();
    let tokens = Tokens::with(&[OLD, NEW]);
    let broker = broker_of_tokens(folder.path(), &tokens, rules(Duration::from_hours(1))).await;
    let row = requested(&broker, ADA, 30).await;
    let altered = ApprovalChange {
        row: ApprovalRow {
            state: ApprovalState::Approved,
            ..row.clone()
        },
        expected: row.mac,
    };
    let at = Timestamp::now();
    let written = broker.store.decide_approval(&altered, CallId::fresh(), at);
    written.await.unwrap();
    let restored = tokens.during_verification(async {
        put(&broker, row.clone()).await;
    });
    let rejected = decide(&broker, BOB, row.id, Verdict::Reject);
    let ((), rejected) = tokio::join!(restored, rejected);
    is_refused(rejected, Reason::ApprovalState, "nothing was removed");
    assert_eq!(broker.store.approval(row.id).await.unwrap(), Some(row));
}

/// A request whose signer the token cannot use does not prevent the verification of other requests.
#[tokio::test(flavor = "multi_thread")]
async fn the_signer_of_one_row_does_not_decide_about_other_rows() {
    let folder = tempfile::tempdir().unwrap();
    let broker = broker_of(folder.path(), rules(Duration::from_hours(1))).await;
    let good = requested(&broker, ADA, 30).await;
    let newer = requested(&broker, ADA, 31).await;
    let admin = testing::service(BOB, &[Role::Admin]);
    let mut failed = BTreeSet::from([OLD]);
    let moved = ApprovalRow {
        signer: OLD,
        ..newer.clone()
    };
    let view = broker
        .listed_approval(moved, ApprovalState::Pending, &mut failed)
        .await;
    assert!(!view.is_verified);
    let view = broker
        .listed_approval(good, ApprovalState::Pending, &mut failed)
        .await;
    assert!(view.is_verified);
    // The stored document is another one than the document of the digest, with a MAC that fits the row.
    let other = ApprovalRow {
        document: br#"{"after_days":99}"#.to_vec(),
        ..newer
    };
    put(&broker, other).await;
    let listed = broker
        .approvals(&admin, &call(), false, None)
        .await
        .unwrap();
    let wrong = listed.approvals.iter().filter(|view| !view.is_verified);
    assert_eq!(wrong.count(), 1);
}

/// An approval can be withdrawn until the change is made, also by the requesting person.
#[tokio::test(flavor = "multi_thread")]
async fn an_approval_is_withdrawn_until_it_is_used() {
    let folder = tempfile::tempdir().unwrap();
    let broker = broker_of(folder.path(), rules(Duration::from_hours(1))).await;
    for who in [ADA, BOB, "URI:carol"] {
        let row = requested(&broker, ADA, 30).await;
        approve(&broker, BOB, &row).await.unwrap();
        let withdrawn = decide(&broker, who, row.id, Verdict::Reject).await;
        assert_eq!(withdrawn.unwrap(), Some(ApprovalState::Rejected));
        let again = destroy(&broker, ADA, 30).await.unwrap_err();
        assert_eq!(again.reason(), Reason::ApprovalNeeded, "{again}");
    }
    let row = requested(&broker, ADA, 31).await;
    approve(&broker, BOB, &row).await.unwrap();
    destroy(&broker, ADA, 31).await.unwrap();
    let late = decide(&broker, BOB, row.id, Verdict::Reject).await;
    is_refused(late, Reason::ApprovalState, "the change was made");
}

/// The holder of a secret of Bob's API client approves as Bob, so no other person can make such a secret.
#[tokio::test(flavor = "multi_thread")]
async fn only_the_owner_makes_a_further_secret_of_the_own_api_client() {
    let folder = tempfile::tempdir().unwrap();
    let mut rules = rules(Duration::from_hours(1));
    rules.persons.clear();
    let broker = broker_of(folder.path(), rules.clone()).await;
    let admin = testing::service(ADA, &[Role::Admin]);
    let new = new_client(&[Role::Admin], None);
    let made = broker.create_client(&admin, &call(), new).await.unwrap();
    let client = made.client.id;
    let row = broker.store.client(client).await.unwrap().unwrap();

    rules = self::rules(Duration::from_hours(1));
    rules.persons[1]
        .principals
        .insert(format!("client:{client}"));
    let other = tempfile::tempdir().unwrap();
    let broker = broker_of(other.path(), rules).await;
    let inserted = broker.store.insert_client(&row, CallId::fresh());
    inserted.await.unwrap();
    let add = |who: &str| {
        let (broker, admin) = (Arc::clone(&broker), testing::service(who, &[Role::Admin]));
        async move {
            let call = call();
            let added = broker.add_client_secret(&admin, &call, client, None);
            added.await.map(|made| made.number)
        }
    };
    is_refused(add(ADA).await, Reason::Policy, "belongs to Bob");
    let waiting = add(BOB).await.unwrap_err();
    assert_eq!(waiting.reason(), Reason::ApprovalNeeded, "{waiting}");
}

/// The loss of a key counts as its destruction, so one person is not enough.
#[tokio::test(flavor = "multi_thread")]
async fn the_loss_of_a_key_is_recorded_by_two_persons() {
    let folder = tempfile::tempdir().unwrap();
    let rows = [
        authentic(OLD, WrappingKeyState::Deactivated, 1),
        authentic(NEW, WrappingKeyState::Active, 2),
    ];
    let tokens = Tokens::with(&[OLD, NEW]);
    let rules = rules(Duration::from_hours(1));
    let broker = broker_with_approvals(folder.path(), tokens.clone(), &rows, rules).await;
    tokens.shows(&[NEW]);
    broker.refresh_registry().await.unwrap();
    let lose = |who: &str| {
        let (broker, admin) = (Arc::clone(&broker), testing::service(who, &[Role::Admin]));
        async move {
            let call = call();
            let lost = broker.change_key_state(&admin, &call, OLD, KeyChange::Lose);
            lost.await.map(|view| view.state)
        }
    };
    let waiting = lose(ADA).await.unwrap_err();
    assert_eq!(waiting.reason(), Reason::ApprovalNeeded, "{waiting}");
    is_refused(lose(EVE).await, Reason::Policy, "belongs to no");
    let row = broker.store.approval(waiting.approval().unwrap()).await;
    let row = row.unwrap().unwrap();
    assert_eq!(row.action, "wrapping_key.lost");
    approve(&broker, BOB, &row).await.unwrap();
    assert_eq!(lose(ADA).await.unwrap(), WrappingKeyState::Destroyed);
    let used = broker.store.approval(row.id).await.unwrap().unwrap();
    assert_eq!(used.state, ApprovalState::Used);
}

/// A person who left the configuration neither requests nor counts as an approver.
#[tokio::test(flavor = "multi_thread")]
async fn only_persons_of_the_present_configuration_count() {
    let folder = tempfile::tempdir().unwrap();
    let broker = broker_of(folder.path(), rules(Duration::from_hours(1))).await;
    let pending = requested(&broker, ADA, 31).await;
    let row = requested(&broker, BOB, 30).await;
    approve(&broker, ADA, &row).await.unwrap();
    let mut later = rules(Duration::from_hours(1));
    later.persons.remove(0);
    let other = tempfile::tempdir().unwrap();
    let rows = [
        pending.clone(),
        broker.store.approval(row.id).await.unwrap().unwrap(),
    ];
    let broker = broker_of(other.path(), later).await;
    for row in &rows {
        let copied = broker.store.request_approval(row, None, CallId::fresh());
        copied.await.unwrap();
    }
    is_refused(
        destroy(&broker, ADA, 31).await,
        Reason::Policy,
        "belongs to no",
    );
    let of_nobody = approve(&broker, BOB, &pending).await;
    is_refused(of_nobody, Reason::Policy, "no longer belongs to Ada");
    let again = destroy(&broker, BOB, 30).await.unwrap_err();
    assert_eq!(again.reason(), Reason::ApprovalNeeded);
    assert!(
        again.detail().contains("does not count any more"),
        "{again}"
    );
}

/// An approval is bound to the state of the key that the second person saw.
#[tokio::test(flavor = "multi_thread")]
async fn a_change_of_the_key_makes_an_approval_useless() {
    let folder = tempfile::tempdir().unwrap();
    let broker = broker_of(folder.path(), rules(Duration::from_hours(1))).await;
    let row = requested(&broker, ADA, 30).await;
    approve(&broker, BOB, &row).await.unwrap();
    let admin = testing::service(ADA, &[Role::Admin]);
    for change in [KeyChange::Suspend, KeyChange::Deactivate] {
        self::change(&broker, &admin, change).await;
    }
    let later = requested(&broker, ADA, 30).await;
    assert_ne!(later.id, row.id);
}

/// To stop the use of a compromised key, one person is always enough.
#[tokio::test(flavor = "multi_thread")]
async fn a_compromise_needs_no_approval_and_no_person() {
    let folder = tempfile::tempdir().unwrap();
    let broker = broker_of(folder.path(), rules(Duration::from_hours(1))).await;
    let admin = testing::service(EVE, &[Role::Admin]);
    let state = change(&broker, &admin, KeyChange::Compromise).await;
    assert_eq!(state, WrappingKeyState::Compromised);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_person_has_a_limited_number_of_pending_requests() {
    let folder = tempfile::tempdir().unwrap();
    let broker = broker_of(folder.path(), rules(Duration::from_hours(1))).await;
    for days in 30..50 {
        requested(&broker, ADA, days).await;
    }
    is_refused(
        destroy(&broker, ADA, 50).await,
        Reason::Limit,
        "20 requests",
    );
    let of_bob = requested(&broker, BOB, 50).await;
    // An approved request is still open, and a rejected one is not.
    let admin = testing::service(BOB, &[Role::Admin]);
    let open = broker
        .approvals(&admin, &call(), false, None)
        .await
        .unwrap();
    let of_ada = open.approvals.iter().map(|view| &view.row);
    let of_ada: Vec<_> = of_ada.filter(|row| row.id != of_bob.id).collect();
    approve(&broker, BOB, of_ada[0]).await.unwrap();
    is_refused(
        destroy(&broker, ADA, 50).await,
        Reason::Limit,
        "20 requests",
    );
    decide(&broker, BOB, of_ada[1].id, Verdict::Reject)
        .await
        .unwrap();
    requested(&broker, ADA, 50).await;
}

/// Requests that are rejected at once do not fill the database.
#[tokio::test(flavor = "multi_thread")]
async fn a_person_has_a_limited_number_of_unexpired_requests() {
    let folder = tempfile::tempdir().unwrap();
    let broker = broker_of(folder.path(), rules(Duration::from_hours(1))).await;
    let first = requested(&broker, ADA, 30).await;
    for number in 1..200_u8 {
        let rejected = ApprovalRow {
            id: ApprovalId::from_bytes([number; 16]),
            digest: [number; 32],
            state: ApprovalState::Rejected,
            ..first.clone()
        };
        let added = broker
            .store
            .request_approval(&rejected, None, CallId::fresh());
        added.await.unwrap();
    }
    is_refused(
        destroy(&broker, ADA, 31).await,
        Reason::Limit,
        "have not expired yet",
    );
    requested(&broker, BOB, 31).await;
}

/// A person can read a request by its id, also after it was decided.
#[tokio::test(flavor = "multi_thread")]
async fn one_request_is_found_by_its_id() {
    let folder = tempfile::tempdir().unwrap();
    let broker = broker_of(folder.path(), rules(Duration::from_hours(1))).await;
    let row = requested(&broker, ADA, 30).await;
    requested(&broker, ADA, 31).await;
    decide(&broker, BOB, row.id, Verdict::Reject).await.unwrap();
    let admin = testing::service(BOB, &[Role::Admin]);
    let found = async |id| {
        let listed = broker.approvals(&admin, &call(), false, Some(id)).await;
        let approvals = listed.unwrap().approvals;
        approvals
            .into_iter()
            .map(|view| (view.row.id, view.state))
            .collect::<Vec<_>>()
    };
    assert_eq!(found(row.id).await, [(row.id, ApprovalState::Rejected)]);
    assert!(found(ApprovalId::from_bytes([1; 16])).await.is_empty());
}

fn new_client(roles: &[Role], days: Option<i64>) -> NewClient {
    let expires = days.map(|days| {
        let after = days * 24 * 3_600 * 1_000_000;
        Timestamp::from_micros(Timestamp::now().micros() + after)
    });
    NewClient {
        label: "deploy".to_owned(),
        roles: roles.iter().copied().collect(),
        users: None,
        key_names: None,
        expires,
    }
}

/// An API client with the role `admin`, and each further secret of it, need an approval; other API clients do not.
#[tokio::test(flavor = "multi_thread")]
async fn an_api_client_becomes_an_administrator_only_with_an_approval() {
    let folder = tempfile::tempdir().unwrap();
    let broker = broker_of(folder.path(), rules(Duration::from_hours(1))).await;
    let admin = testing::service(ADA, &[Role::Admin]);
    let create = |new| {
        let (broker, admin) = (Arc::clone(&broker), admin.clone());
        async move { broker.create_client(&admin, &call(), new).await }
    };
    create(new_client(&[Role::Auditor], None)).await.unwrap();
    let waiting = create(new_client(&[Role::Admin], Some(30)))
        .await
        .unwrap_err();
    let id = waiting.approval().unwrap();
    let row = broker.store.approval(id).await.unwrap().unwrap();
    let document = String::from_utf8(row.document.clone()).unwrap();
    assert!(
        document.contains(r#""roles":["admin"],"secret_days":30"#),
        "{document}"
    );
    approve(&broker, BOB, &row).await.unwrap();
    // A secret that does not expire is another request.
    let other = create(new_client(&[Role::Admin], None)).await.unwrap_err();
    assert_ne!(other.approval(), Some(id));
    let made = create(new_client(&[Role::Admin], Some(30))).await.unwrap();
    assert_eq!(made.client.id.as_bytes(), id.as_bytes());

    let add = |expires| {
        let (broker, admin, client) = (Arc::clone(&broker), admin.clone(), made.client.id);
        async move {
            let call = call();
            let added = broker.add_client_secret(&admin, &call, client, expires);
            added.await
        }
    };
    let waiting = add(None).await.unwrap_err();
    let row = broker.store.approval(waiting.approval().unwrap()).await;
    let row = row.unwrap().unwrap();
    approve(&broker, BOB, &row).await.unwrap();
    assert_eq!(add(None).await.unwrap().number, 2);
    // The used request put back permits no third secret, and the used request for the client creates no second client.
    let again = call();
    let revoked = broker.revoke_client(&admin, &again, made.client.id, Some(1));
    revoked.await.unwrap();
    let again = ApprovalRow {
        state: ApprovalState::Approved,
        ..broker.store.approval(row.id).await.unwrap().unwrap()
    };
    put(&broker, again).await;
    assert_eq!(
        add(None).await.unwrap_err().reason(),
        Reason::ApprovalNeeded
    );
    let first = broker.store.approval(id).await.unwrap().unwrap();
    let again = ApprovalRow {
        state: ApprovalState::Approved,
        used: None,
        ..first
    };
    put(&broker, again).await;
    let second = create(new_client(&[Role::Admin], Some(30))).await;
    assert_eq!(second.unwrap_err().reason(), Reason::KeyExists);
}
