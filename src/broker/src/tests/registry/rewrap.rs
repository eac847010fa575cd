//! Tests which wrapping keys a re-wrap uses.

use keybroker_store::{RunId, RunRow, RunState};
use tokio_util::sync::CancellationToken;

use super::*;

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
    let run = RunRow {
        id: RunId::from_bytes([1; 16]),
        state: RunState::Running,
        rate: 0,
        source: None,
        document: b"{}".to_vec(),
        holder: String::new(),
        lease: Timestamp::from_micros(0),
        started: Timestamp::now(),
    };
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
