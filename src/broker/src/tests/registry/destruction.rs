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

async fn stored(broker: &Broker) -> Vec<DestructionRow> {
    broker.store.destructions().await.unwrap().rows
}

/// Removes the row of a schedule, as a person with access to the database does.
async fn remove_row(broker: &Broker, key: WrappingKeyId) {
    let change = RegistryChange {
        destruction: Some(DestructionChange::Remove(key)),
        ..RegistryChange::default()
    };
    let at = Timestamp::now();
    let changed = broker.store.change_registry(&change, CallId::fresh(), at);
    changed.await.unwrap();
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
    assert_eq!(stored(&broker).await, []);
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
    broker.accept_schedule(&schedule(3)).await;
    assert_eq!(said_about(&broker, &schedule(3)).await, "");
    assert_eq!(state_in(&broker, B), WrappingKeyState::Destroyed);
    let marked = stored(&broker).await.remove(0);
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
        broker.accept_schedule(&row).await;
        if state == Destroyed {
            row.mac = mac_by(A, &row.removal_message());
        }
        let said = said_about(&broker, &row).await;
        assert!(
            said.contains("token hsm-b, which is not in the configuration"),
            "{said}"
        );
        assert_eq!(state_in(&broker, B), state);
        assert_eq!(stored(&broker).await, [row]);
    }
}

/// A person removes the row of the schedule after the mark, or moves its time. The registry row says under its MAC that the objects must
/// still be removed, also after another key authenticates it.
#[tokio::test]
async fn the_row_of_a_destroyed_key_says_that_its_objects_must_be_removed() {
    use WrappingKeyState::{Active, Deactivated};
    let folder = tempfile::tempdir().unwrap();
    let tokens = Tokens::with(&[A, B, C]);
    let rows_before = [
        authentic(C, Deactivated, 1),
        authentic(A, Active, 2),
        authentic(B, Deactivated, 3),
    ];
    let broker = broker_with(folder.path(), tokens, &rows_before).await;
    broker.accept_schedule(&schedule(3)).await;
    assert_eq!(said_about(&broker, &schedule(3)).await, "");
    let marked = broker.registry().unwrap().row(B).unwrap().clone();
    assert_eq!(marked.mac, mac_by(A, &marked.unremoved_message()));

    let activate = KeyChange::Activate {
        backup_confirmed: false,
        without_backup: true,
    };
    change(&broker, C, activate).await.unwrap();
    let moved = broker.registry().unwrap().row(B).unwrap().clone();
    assert_eq!(moved.mac, mac_by(C, &moved.unremoved_message()));

    remove_row(&broker, B).await;
    // A broker that starts knows of the removal only from the database.
    broker.registry.store(None);
    let deadline = Deadline::after(Duration::from_secs(1));
    broker.load_registry(deadline).await.unwrap();
    broker.scheduled.forget(B);
    broker.follow_destructions().await;
    let again = stored(&broker).await.remove(0);
    assert_eq!(again.mac, mac_by(C, &again.removal_message()));

    let far = DestructionRow {
        due: Timestamp::from_micros(i64::MAX),
        ..again
    };
    let said = said_about(&broker, &far).await;
    assert!(said.contains("not in the configuration"), "{said}");

    // Even if the row is removed again and again, the removal begins as soon as the row is written.
    broker.scheduled.pass_notice(B);
    broker.scheduled.forget(B);
    remove_row(&broker, B).await;
    broker.follow_destructions().await;
    let said = broker.scheduled.notes().join("\n");
    assert!(said.contains("not in the configuration"), "{said}");

    // The removal is given up, and the row says so.
    change(&broker, B, KeyChange::Lose).await.unwrap();
    let ended = broker.registry().unwrap().row(B).unwrap().clone();
    assert_eq!(ended.mac, mac_by(C, &ended.tombstone_message()));
    broker.follow_destructions().await;
    assert_eq!(stored(&broker).await, []);
}

/// A schedule in a copy of the database is authentic, but the instance on the copy did not accept it.
#[tokio::test]
async fn an_instance_that_did_not_accept_a_schedule_asks_for_a_confirmation() {
    use WrappingKeyState::{Active, Deactivated};
    let folder = tempfile::tempdir().unwrap();
    let tokens = Tokens::with(&[A, B]);
    let registered = [authentic(A, Active, 2), authentic(B, Deactivated, 3)];
    let broker = broker_with(folder.path(), tokens, &registered).await;
    let refused = change(&broker, B, KeyChange::ConfirmDestruction).await;
    assert!(refused.unwrap_err().detail().contains("nothing to confirm"));
    let forged = DestructionRow {
        mac: [7; 32],
        ..schedule(3)
    };
    put(&broker, &forged).await;
    let refused = change(&broker, B, KeyChange::ConfirmDestruction).await;
    assert!(refused.unwrap_err().detail().contains("nothing to confirm"));

    let said = said_about(&broker, &schedule(3)).await;
    assert!(said.contains("--confirm-schedule"), "{said}");
    assert_eq!(state_in(&broker, B), Deactivated);
    let just_due = DestructionRow {
        due: Timestamp::now(),
        ..schedule(3)
    };
    let just_due = DestructionRow {
        mac: mac_by(A, &just_due.mac_message()),
        ..just_due
    };
    // The instance that accepted the schedule may be about to carry it out.
    assert_eq!(said_about(&broker, &just_due).await, "");
    assert_eq!(state_in(&broker, B), Deactivated);

    put(&broker, &schedule(3)).await;
    let before = Timestamp::now();
    change(&broker, B, KeyChange::ConfirmDestruction)
        .await
        .unwrap();
    let confirmed = stored(&broker).await.remove(0);
    assert_eq!(confirmed.mac, mac_by(A, &confirmed.mac_message()));
    assert!(confirmed.due.micros() >= before.micros() + 15_000_000);
    let due = DestructionRow {
        due: Timestamp::from_micros(2),
        ..confirmed
    };
    let due = DestructionRow {
        mac: mac_by(A, &due.mac_message()),
        ..due
    };
    broker.accept_schedule(&due).await;
    assert_eq!(said_about(&broker, &due).await, "");
    assert_eq!(state_in(&broker, B), WrappingKeyState::Destroyed);
}

/// A row that no broker made is reported before its time, and blocks no change of the key.
#[tokio::test]
async fn a_row_that_no_broker_made_blocks_nothing() {
    use WrappingKeyState::{Active, Deactivated, Suspended};
    let folder = tempfile::tempdir().unwrap();
    let tokens = Tokens::with(&[A, B]);
    let registered = [authentic(A, Active, 2), authentic(B, Deactivated, 3)];
    let broker = broker_with(folder.path(), tokens.clone(), &registered).await;
    let forged = DestructionRow {
        due: Timestamp::from_micros(i64::MAX),
        ..schedule(3)
    };
    let said = said_about(&broker, &forged).await;
    assert!(said.contains("was not made by a broker"), "{said}");
    assert_eq!(view_due(&broker, B), None);
    assert_eq!(
        change(&broker, B, KeyChange::Suspend).await.unwrap(),
        Suspended
    );

    // While no token can tell, the row counts, because a change of the state would cancel a schedule.
    let resumed = change(&broker, B, KeyChange::Resume).await.unwrap();
    assert_eq!(resumed, Deactivated);
    let sequence = broker.registry().unwrap().row(B).unwrap().sequence;
    put(&broker, &DestructionRow { sequence, ..forged }).await;
    tokens.are_down(&[A]);
    let refused = change(&broker, B, KeyChange::Suspend).await.unwrap_err();
    assert!(refused.detail().contains("--cancel"), "{refused}");
    tokens.are_down(&[]);
    assert_eq!(
        change(&broker, B, KeyChange::Suspend).await.unwrap(),
        Suspended
    );
}

/// When the lists of keys show that a key will be destroyed.
fn view_due(broker: &Broker, id: WrappingKeyId) -> Option<Timestamp> {
    let registry = broker.registry().unwrap();
    broker.scheduled.due(registry.row(id).unwrap())
}
