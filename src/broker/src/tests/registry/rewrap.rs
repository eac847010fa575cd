//! Tests which wrapping keys a re-wrap uses.

use keybroker_core::key::{KeyAddress, KeyName, RecordId, Revision, UserId};
use keybroker_store::{NewRevision, RunId, RunRow, RunState};
use tokio_util::sync::CancellationToken;

use super::*;

/// Returns a re-wrap of all rows that an administrator requested and no broker has begun.
fn wanted() -> RunRow {
    RunRow {
        id: RunId::from_bytes([1; 16]),
        state: RunState::Running,
        rate: 0,
        source: None,
        document: b"{}".to_vec(),
        holder: String::new(),
        lease: Timestamp::from_micros(0),
        started: Timestamp::now(),
    }
}

/// The token cannot say anything about the algorithm of the row, but the MAC shows that the row was altered.
#[tokio::test]
async fn an_altered_row_that_no_token_tries_does_not_stop_a_rewrap() {
    use WrappingKeyState::{Active, Deactivated};
    let folder = tempfile::tempdir().unwrap();
    let rows = [authentic(A, Deactivated, 1), authentic(B, Active, 2)];
    let broker = broker_with(folder.path(), Tokens::with(&[A, B]), &rows).await;
    let address = KeyAddress {
        tenant: Tenant::default(),
        user: UserId::parse("ada").unwrap(),
        name: KeyName::parse("vault").unwrap(),
    };
    let record = RecordId::from_bytes([5; 16]);
    let context = Context::Record {
        address: &address,
        record_id: record,
        revision: Revision::FIRST,
    };
    let unsealed = Unsealed::new(Algorithm::RsaOaepSha1, A, vec![1; 256]).unwrap();
    let altered = NewRevision {
        envelope: unsealed.seal(&context, [9; 32]).to_bytes(),
        address: address.clone(),
        record,
        revision: Revision::FIRST,
        wrapping_key: A,
    };
    let stored = broker
        .store
        .create_many(vec![altered], Timestamp::now())
        .await;
    stored.unwrap();
    let started = broker.store.start_rewrap(&wanted(), CallId::fresh()).await;
    started.unwrap();
    broker.rewrap_if_wanted(&CancellationToken::new()).await;
    let run = broker.store.rewrap_run().await.unwrap().unwrap();
    assert_eq!(run.state, RunState::Done);
    let document = String::from_utf8(run.document).unwrap();
    assert!(document.contains("mac-refused"), "{document}");
}

/// A broker that has not followed a rotation of another broker yet takes the re-wrap. It moves the rows to the new key, or waits.
#[tokio::test]
async fn a_rewrap_reads_the_registry_before_it_begins() {
    use WrappingKeyState::{Active, Deactivated};
    let folder = tempfile::tempdir().unwrap();
    let tokens = Tokens::with(&[A]);
    let broker = broker_with(folder.path(), tokens.clone(), &[authentic(A, Active, 1)]).await;
    replace(&broker, &[authentic(A, Deactivated, 2)]).await;
    let new = authentic(B, Active, 3);
    broker.store.register(&new).await.unwrap();
    assert_eq!(broker.registry().unwrap().wrapping_key().unwrap(), A);
    let run = wanted();
    let started = broker.store.start_rewrap(&run, CallId::fresh());
    started.await.unwrap();
    let stop = CancellationToken::new();
    let ended = async |broker: &Broker| {
        broker.rewrap_if_wanted(&stop).await;
        let run = broker.store.rewrap_run().await.unwrap().unwrap();
        let last = broker.audit.tail(1).unwrap().remove(0);
        (run.state, last)
    };
    // The workers have not checked the new key yet.
    let (state, _) = ended(&broker).await;
    assert_eq!(state, RunState::Running);
    tokens.shows(&[A, B]);
    let (state, last) = ended(&broker).await;
    assert_eq!(state, RunState::Done);
    assert!(last.contains("wrapping_key.rewrap_end"), "{last}");
    let target = format!("\"wrapping_key\":\"{B}\"");
    assert!(last.contains(&target), "{last}");
}
