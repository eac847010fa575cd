//! Tests the registry while tokens are unavailable: when a row can be verified, and when it cannot.

use keybroker_core::key::KeyUse;
use keybroker_store::{RegistryChange, RegistryUpdate};

use crate::key_change::KeyChange;

use super::*;

mod copies;
mod destruction;
mod rewrap;

const A: WrappingKeyId = WrappingKeyId::from_bytes([10; 16]);
const B: WrappingKeyId = WrappingKeyId::from_bytes([11; 16]);
const C: WrappingKeyId = WrappingKeyId::from_bytes([12; 16]);

/// A row with a MAC by the integrity key of the wrapping key that the row describes.
fn authentic(id: WrappingKeyId, state: WrappingKeyState, sequence: u64) -> RegistryRow {
    let row = registered(id, state, sequence);
    RegistryRow {
        mac: mac_by(id, &row.mac_message()),
        ..row
    }
}

/// The row of a destroyed key, which the integrity key of `signer` authenticates.
fn tombstone(id: WrappingKeyId, signer: WrappingKeyId, sequence: u64) -> RegistryRow {
    let row = registered(id, WrappingKeyState::Destroyed, sequence);
    RegistryRow {
        mac: mac_by(signer, &row.tombstone_message()),
        ..row
    }
}

/// Replaces rows in the database, as another broker does.
async fn replace(broker: &Broker, rows: &[RegistryRow]) {
    let stored = broker.store.registry().await.unwrap();
    let updates = rows.iter().map(|row| RegistryUpdate {
        row: row.clone(),
        expected: stored.iter().find(|one| one.id == row.id).unwrap().mac,
    });
    let change = RegistryChange {
        updates: updates.collect(),
        ..RegistryChange::default()
    };
    let at = Timestamp::now();
    let changed = broker.store.change_registry(&change, CallId::fresh(), at);
    changed.await.unwrap();
}

async fn change(
    broker: &Arc<Broker>,
    id: WrappingKeyId,
    change: KeyChange,
) -> Result<WrappingKeyState, Error> {
    let admin = testing::service("URI:admin", &[Role::Admin]);
    let call = Call::start("127.0.0.1:1", Deadline::after(Duration::from_secs(5)));
    let view = broker.change_key_state(&admin, &call, id, change).await?;
    Ok(view.state)
}

fn state_in(broker: &Broker, id: WrappingKeyId) -> WrappingKeyState {
    broker.registry().unwrap().row(id).unwrap().state
}

/// If the token of a row is down, a change of this row is applied later. The changes of other rows are applied
/// immediately.
#[tokio::test]
async fn a_token_that_is_down_delays_no_change_of_another_key() {
    use WrappingKeyState::{Active, Compromised, Deactivated, Suspended};
    let folder = tempfile::tempdir().unwrap();
    let tokens = Tokens::with(&[A, B]);
    let rows = [authentic(A, Deactivated, 1), authentic(B, Active, 2)];
    let broker = broker_with(folder.path(), tokens.clone(), &rows).await;

    tokens.are_down(&[A]);
    let rows = [authentic(A, Suspended, 3), authentic(B, Compromised, 4)];
    replace(&broker, &rows).await;
    broker.refresh_registry().await.unwrap();
    assert_eq!(state_in(&broker, A), Deactivated);
    assert_eq!(state_in(&broker, B), Compromised);
    let problems = broker.registry().unwrap().problems().join("\n");
    assert!(problems.contains("cannot verify"), "{problems}");

    tokens.are_down(&[]);
    broker.refresh_registry().await.unwrap();
    assert_eq!(state_in(&broker, A), Suspended);
    assert_eq!(broker.registry().unwrap().problems(), [""; 0]);
}

/// Another broker recorded the loss of a key, but a token of this broker still has the key. The key must not wrap any
/// more user keys.
#[tokio::test]
async fn a_recorded_loss_is_followed_where_the_key_is_still_shown() {
    use WrappingKeyState::{Active, Deactivated, Destroyed};
    let folder = tempfile::tempdir().unwrap();
    let tokens = Tokens::with(&[A, B]);
    let rows = [authentic(A, Active, 2), authentic(B, Deactivated, 1)];
    let broker = broker_with(folder.path(), tokens.clone(), &rows).await;

    // A row that the lost key itself authenticates does not record the loss, because an attacker with only this key can
    // forge the row.
    replace(&broker, &[tombstone(A, C, 3)]).await;
    broker.refresh_registry().await.unwrap();
    assert_eq!(state_in(&broker, A), Active);
    let problems = broker.registry().unwrap().problems().join("\n");
    assert!(
        problems.contains("no integrity key authenticates"),
        "{problems}"
    );

    replace(&broker, &[tombstone(A, B, 3)]).await;
    broker.refresh_registry().await.unwrap();
    assert_eq!(state_in(&broker, A), Destroyed);
    let wrapping = broker.registry().unwrap().wrapping_key();
    assert!(wrapping.is_err(), "{wrapping:?}");
}

/// The key that authenticated a tombstone is lost, too. A broker that starts afterwards still believes both tombstones.
#[tokio::test(flavor = "multi_thread")]
async fn a_tombstone_survives_the_loss_of_its_signer() {
    use WrappingKeyState::{Active, Deactivated, Destroyed};
    let folder = tempfile::tempdir().unwrap();
    let tokens = Tokens::with(&[B, C]);
    let rows = [
        tombstone(A, B, 3),
        authentic(B, Deactivated, 1),
        authentic(C, Active, 2),
    ];
    let broker = broker_with(folder.path(), tokens.clone(), &rows).await;
    tokens.shows(&[C]);
    broker.refresh_registry().await.unwrap();
    assert_eq!(
        change(&broker, B, KeyChange::Lose).await.unwrap(),
        Destroyed
    );

    broker.registry.store(None);
    let deadline = Deadline::after(Duration::from_secs(1));
    broker.load_registry(deadline).await.unwrap();
    assert_eq!(broker.registry().unwrap().problems(), [""; 0]);
    assert_eq!(state_in(&broker, A), Destroyed);
}

/// An activation moves the tombstones to the new key. A tombstone without a signer can be recorded again.
#[tokio::test(flavor = "multi_thread")]
async fn an_activation_authenticates_the_tombstones_again() {
    use WrappingKeyState::{Active, Deactivated, Destroyed};
    let folder = tempfile::tempdir().unwrap();
    let tokens = Tokens::with(&[B, C]);
    let rows = [
        tombstone(A, B, 3),
        authentic(B, Active, 2),
        authentic(C, Deactivated, 1),
    ];
    let broker = broker_with(folder.path(), tokens.clone(), &rows).await;
    let activate = KeyChange::Activate {
        backup_confirmed: false,
        without_backup: true,
    };
    assert_eq!(change(&broker, C, activate).await.unwrap(), Active);
    let moved = broker.registry().unwrap().row(A).unwrap().clone();
    assert_eq!(moved.mac, mac_by(C, &moved.tombstone_message()));
    let again = change(&broker, A, KeyChange::Lose).await.unwrap_err();
    assert!(again.detail().contains("already destroyed"), "{again:?}");

    // No key authenticates the row any more. While a token shows the key, its loss cannot be recorded again.
    replace(&broker, &[tombstone(A, KEY, moved.sequence + 10)]).await;
    tokens.shows(&[A, B, C]);
    broker.registry.store(None);
    let deadline = Deadline::after(Duration::from_secs(1));
    broker.load_registry(deadline).await.unwrap();
    let problems = broker.registry().unwrap().problems().join("\n");
    assert!(
        problems.contains("no integrity key authenticates"),
        "{problems}"
    );
    let refused = change(&broker, A, KeyChange::Lose).await.unwrap_err();
    let detail = refused.detail();
    assert!(detail.contains("the key is on the token"), "{refused:?}");
    tokens.shows(&[B, C]);
    let lost = change(&broker, A, KeyChange::Lose).await.unwrap();
    assert_eq!(lost, Destroyed);
    assert_eq!(broker.registry().unwrap().problems(), [""; 0]);
}

/// The token of the active key dies. A key of another token can be activated, and wraps new user keys from then on.
#[tokio::test(flavor = "multi_thread")]
async fn a_key_of_another_token_takes_over_from_a_dead_token() {
    use WrappingKeyState::{Active, Deactivated};
    let folder = tempfile::tempdir().unwrap();
    let tokens = Tokens::with(&[A, B]);
    let rows = [authentic(A, Active, 2), authentic(B, Deactivated, 1)];
    let broker = broker_with(folder.path(), tokens.clone(), &rows).await;
    tokens.are_down(&[A]);
    broker.refresh_registry().await.unwrap();
    let activate = KeyChange::Activate {
        backup_confirmed: false,
        without_backup: true,
    };
    assert_eq!(change(&broker, B, activate).await.unwrap(), Active);
    assert_eq!(
        state_in(&broker, A),
        Active,
        "its own key must sign a change"
    );
    assert_eq!(broker.registry().unwrap().wrapping_key().unwrap(), B);

    // The dead token returns. The key of this token never wraps a user key again, even while the other token is down
    // for a moment.
    tokens.are_down(&[B]);
    broker.refresh_registry().await.unwrap();
    let registry = broker.registry().unwrap();
    assert_eq!(registry.wrapping_key().unwrap(), B);
    let problems = registry.problems().join("\n");
    assert!(problems.contains("still active"), "{problems}");
}

/// A compromised key must not authenticate the destruction of another key, because others may know the integrity key of
/// the compromised key.
#[tokio::test(flavor = "multi_thread")]
async fn a_compromised_key_destroys_no_other_key() {
    use WrappingKeyState::{Active, Compromised, Deactivated, Destroyed};
    let folder = tempfile::tempdir().unwrap();
    let tokens = Tokens::with(&[A, B]);
    let rows = [
        authentic(A, Deactivated, 1),
        authentic(B, Active, 2),
        tombstone(C, A, 3),
    ];
    let broker = broker_with(folder.path(), tokens.clone(), &rows).await;
    let compromised = change(&broker, A, KeyChange::Compromise).await.unwrap();
    assert_eq!(compromised, Compromised);
    // The row that the key had authenticated is authenticated by the other key now.
    let moved = broker.registry().unwrap().row(C).unwrap().clone();
    assert_eq!(moved.mac, mac_by(B, &moved.tombstone_message()));

    replace(&broker, &[tombstone(B, A, 20)]).await;
    broker.refresh_registry().await.unwrap();
    assert_eq!(state_in(&broker, B), Active);
    let problems = broker.registry().unwrap().problems().join("\n");
    assert!(
        problems.contains("cannot verify the changed row"),
        "{problems}"
    );
    assert_eq!(state_in(&broker, C), Destroyed);
}

/// After a forged row of a destroyed key, the broker still remembers the previous row, so an attacker cannot restore an
/// earlier state.
#[tokio::test]
async fn a_forged_row_is_no_step_back_to_a_former_state() {
    use WrappingKeyState::{Active, Compromised, Deactivated, Destroyed};
    let folder = tempfile::tempdir().unwrap();
    let tokens = Tokens::with(&[A, B]);
    let rows = [
        authentic(A, Compromised, 5),
        authentic(B, Active, 6),
        tombstone(C, B, 7),
    ];
    let broker = broker_with(folder.path(), tokens.clone(), &rows).await;
    for (key, former) in [
        (C, authentic(C, Deactivated, 3)),
        (A, authentic(A, Active, 3)),
    ] {
        let expected = state_in(&broker, key);
        replace(&broker, &[tombstone(key, KEY, 30)]).await;
        broker.refresh_registry().await.unwrap();
        assert_eq!(state_in(&broker, key), expected);
        tokens.shows(&[A, B, C]);
        replace(&broker, &[former]).await;
        broker.refresh_registry().await.unwrap();
        assert_eq!(state_in(&broker, key), expected);
    }
    assert_eq!(state_in(&broker, C), Destroyed);

    // The same applies while the token of the key is unavailable: an unverified row does not permit an earlier state.
    tokens.shows(&[B]);
    broker.refresh_registry().await.unwrap();
    replace(&broker, &[registered(A, Active, 40)]).await;
    broker.refresh_registry().await.unwrap();
    tokens.shows(&[A, B]);
    broker.refresh_registry().await.unwrap();
    replace(&broker, &[authentic(A, Active, 3)]).await;
    broker.refresh_registry().await.unwrap();
    assert!(broker.registry().unwrap().check(A, KeyUse::Wrap).is_err());
}

/// A forged row with the largest number that counts does not stop the numbers of the other rows from growing. Otherwise, a change would
/// have no effect on the brokers, and a cancelled schedule or a used approval would be valid again.
#[tokio::test(flavor = "multi_thread")]
async fn a_forged_number_does_not_stop_the_numbers_from_growing() {
    use WrappingKeyState::{Active, Compromised, Deactivated, Suspended};
    let folder = tempfile::tempdir().unwrap();
    let tokens = Tokens::with(&[A, B]);
    let rows = [
        authentic(A, Deactivated, 1),
        authentic(B, Active, 2),
        registered(C, Suspended, store::SEQUENCE_LIMIT - 1),
    ];
    let broker = broker_with(folder.path(), tokens.clone(), &rows).await;
    let mut number = 1;
    for (next, expected) in [
        (KeyChange::Suspend, Suspended),
        (KeyChange::Resume, Deactivated),
        (KeyChange::Suspend, Suspended),
        (KeyChange::Compromise, Compromised),
    ] {
        assert_eq!(change(&broker, A, next).await.unwrap(), expected);
        let row = broker.registry().unwrap().row(A).unwrap().clone();
        assert!(row.sequence > number, "{} after {number}", row.sequence);
        number = row.sequence;
    }
}

/// The integrity key of a compromised key may be known to others, so a row with a higher number and a good MAC does not make the key
/// usable again: neither while the broker runs nor at the next start.
#[tokio::test(flavor = "multi_thread")]
async fn no_row_makes_a_compromised_key_usable_again() {
    use WrappingKeyState::{Active, Compromised};
    let folder = tempfile::tempdir().unwrap();
    let tokens = Tokens::with(&[A, B]);
    let rows = [authentic(A, Compromised, 1), authentic(B, Active, 2)];
    let broker = broker_with(folder.path(), tokens.clone(), &rows).await;
    broker.remember_registry().await;
    replace(&broker, &[authentic(A, Active, 1_000)]).await;
    broker.refresh_registry().await.unwrap();
    assert_eq!(state_in(&broker, A), Compromised);
    assert_eq!(broker.registry().unwrap().wrapping_key().unwrap(), B);

    drop(broker);
    let broker = broker_with(folder.path(), tokens, &[]).await;
    let registry = broker.registry().unwrap();
    assert!(registry.check(A, KeyUse::Unwrap).is_err());
    assert_eq!(registry.wrapping_key().unwrap(), B);
}

/// At the start, a row of a compromised key that was put back authenticates no row of a destroyed key.
#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_was_put_back_destroys_no_other_key() {
    use WrappingKeyState::{Active, Compromised, Deactivated};
    let folder = tempfile::tempdir().unwrap();
    let tokens = Tokens::with(&[A, B, C]);
    let rows = [
        authentic(A, Deactivated, 1),
        authentic(B, Active, 2),
        authentic(C, Deactivated, 3),
    ];
    let broker = broker_with(folder.path(), tokens.clone(), &rows).await;
    let compromised = change(&broker, A, KeyChange::Compromise).await.unwrap();
    assert_eq!(compromised, Compromised);
    replace(&broker, &[rows[0].clone(), tombstone(C, A, 20)]).await;

    drop(broker);
    let broker = broker_with(folder.path(), tokens, &[]).await;
    let registry = broker.registry().unwrap();
    for key in [A, C] {
        assert!(registry.verified(key).is_err(), "{key}");
    }
    assert_eq!(registry.wrapping_key().unwrap(), B);
}

/// The row of a destroyed key that was deleted or put back in the database does not prevent a rotation.
#[tokio::test(flavor = "multi_thread")]
async fn an_old_row_of_a_destroyed_key_blocks_no_activation() {
    use WrappingKeyState::{Active, Deactivated};
    let folder = tempfile::tempdir().unwrap();
    let tokens = Tokens::with(&[B, C]);
    let rows = [
        tombstone(A, B, 5),
        authentic(B, Active, 2),
        authentic(C, Deactivated, 1),
    ];
    let broker = broker_with(folder.path(), tokens.clone(), &rows).await;
    replace(&broker, &[tombstone(A, B, 3)]).await;
    let activate = KeyChange::Activate {
        backup_confirmed: false,
        without_backup: true,
    };
    assert_eq!(change(&broker, C, activate).await.unwrap(), Active);
}

/// The broker waits for a registered key if no token was asked for the key yet. It is not reported as missing.
#[tokio::test]
async fn a_key_that_was_just_registered_is_not_missing() {
    use WrappingKeyState::{Active, PreActive};
    let folder = tempfile::tempdir().unwrap();
    let tokens = Tokens::with(&[A]);
    let rows = [authentic(A, Active, 1)];
    let broker = broker_with(folder.path(), tokens.clone(), &rows).await;
    let new = authentic(B, PreActive, 2);
    broker.store.register(&new).await.unwrap();
    broker.refresh_registry().await.unwrap();
    let refusal = broker.registry().unwrap().check_examined(B);
    assert!(refusal.is_err(), "the key counts as examined");
    assert!(broker.registry().unwrap().check_examined(A).is_ok());

    // No worker looks for the key any more, and no token has it.
    broker.refresh_registry().await.unwrap();
    let problems = broker.registry().unwrap().problems().join("\n");
    assert!(problems.contains("no token with the key"), "{problems}");
    tokens.shows(&[A, B]);
    broker.refresh_registry().await.unwrap();
    assert_eq!(broker.registry().unwrap().problems(), [""; 0]);
}
