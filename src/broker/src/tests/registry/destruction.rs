//! Tests which rows of scheduled destructions a broker believes.

use keybroker_core::key::ObjectIds;
use keybroker_store::{DestructionChange, DestructionRow, PlaceRow};

use super::*;

/// A schedule for `B` by the integrity key of `A`, whose time has come.
fn schedule(sequence: u64) -> DestructionRow {
    let row = DestructionRow {
        key: B,
        signer: A,
        sequence,
        requested: Timestamp::from_micros(1),
        due: Timestamp::from_micros(2),
        requested_by: "URI:admin".to_owned(),
        mac: [0; 32],
    };
    DestructionRow {
        mac: mac_by(A, &row.mac_message()),
        ..row
    }
}

/// Writes a row, as a person with access to the database does.
async fn put(broker: &Broker, row: &DestructionRow) {
    let change = RegistryChange {
        destruction: Some(DestructionChange::Schedule(row.clone())),
        ..RegistryChange::default()
    };
    let at = Timestamp::now();
    let changed = broker.store.change_registry(&change, CallId::fresh(), at);
    changed.await.unwrap();
}

/// What the broker says about the row.
async fn said_about(broker: &Broker, row: &DestructionRow) -> String {
    put(broker, row).await;
    broker.scheduled.forget(row.key);
    broker.follow_destructions().await;
    broker.scheduled.notes().join("\n")
}

/// The key was recorded as lost, so no broker marked it because of a schedule.
#[tokio::test]
async fn only_the_row_of_the_mark_permits_the_removal() {
    let folder = tempfile::tempdir().unwrap();
    let tokens = Tokens::with(&[A]);
    let rows = [
        authentic(A, WrappingKeyState::Active, 2),
        tombstone(B, A, 3),
    ];
    let broker = broker_with(folder.path(), tokens, &rows).await;
    let genuine = schedule(1);
    let forged = DestructionRow {
        mac: [7; 32],
        ..genuine.clone()
    };
    for row in [&forged, &genuine] {
        let said = said_about(&broker, row).await;
        assert!(said.contains("MAC does not verify"), "{said}");
    }
    let marked = DestructionRow {
        mac: mac_by(A, &genuine.removal_message()),
        ..genuine
    };
    let said = said_about(&broker, &marked).await;
    assert!(said.contains("not in the configuration"), "{said}");

    // A client was created with the key after the mark.
    let client = client_row(1, B, client_document().to_bytes().unwrap());
    let inserted = broker.store.insert_client(&client, CallId::fresh());
    inserted.await.unwrap();
    let said = said_about(&broker, &marked).await;
    assert!(said.contains("1 API clients"), "{said}");

    // The token does not exist any more, so the removal never ends by itself.
    change(&broker, B, KeyChange::Lose).await.unwrap();
    assert_eq!(broker.store.destructions().await.unwrap(), []);
    assert_eq!(state_in(&broker, B), WrappingKeyState::Destroyed);
    let again = change(&broker, B, KeyChange::Lose).await.unwrap_err();
    assert!(again.detail().contains("already destroyed"), "{again}");
}

#[tokio::test]
async fn a_mark_permits_the_removal_after_a_notice() {
    use WrappingKeyState::{Active, Deactivated};
    let folder = tempfile::tempdir().unwrap();
    let tokens = Tokens::with(&[A, B]);
    let rows = [authentic(A, Active, 2), authentic(B, Deactivated, 3)];
    let broker = broker_with(folder.path(), tokens, &rows).await;
    let before = Timestamp::now();
    assert_eq!(said_about(&broker, &schedule(3)).await, "");
    assert_eq!(state_in(&broker, B), WrappingKeyState::Destroyed);
    let marked = broker.store.destructions().await.unwrap().remove(0);
    assert_eq!(marked.mac, mac_by(A, &marked.removal_message()));
    assert!(marked.due.micros() >= before.micros() + 5_000_000);
}

/// A broker whose configuration lacks a token of the key does not destroy the key.
#[tokio::test]
async fn a_broker_without_a_token_of_the_key_does_not_destroy_it() {
    use WrappingKeyState::{Active, Deactivated, Destroyed};
    let place = PlaceRow {
        key: B,
        token: "hsm-b".to_owned(),
        token_serial: "0002".to_owned(),
        objects: ObjectIds::default(),
        registered: Timestamp::from_micros(1),
        backup_confirmed: None,
        mac: [0; 32],
    };
    for state in [Deactivated, Destroyed] {
        let folder = tempfile::tempdir().unwrap();
        let tokens = Tokens::with(&[A, B]);
        let of_b = if state == Destroyed {
            tombstone(B, A, 3)
        } else {
            authentic(B, state, 3)
        };
        let rows = [authentic(A, Active, 2), of_b];
        let broker = broker_with(folder.path(), tokens, &rows).await;
        broker.store.add_place(&place).await.unwrap();
        let mut row = schedule(3);
        if state == Destroyed {
            row.mac = mac_by(A, &row.removal_message());
        }
        let said = said_about(&broker, &row).await;
        assert!(
            said.contains("token hsm-b, which is not in the configuration"),
            "{said}"
        );
        assert_eq!(state_in(&broker, B), state);
        assert_eq!(broker.store.destructions().await.unwrap(), [row]);
    }
}
