//! Tests which tokens need a copy of a key before its activation, and which rows of copies the broker signs.

use keybroker_core::key::ObjectIds;
use keybroker_store::PlaceRow;

use super::*;

/// The row that names the token `hsm-b` for a key, with a MAC by the integrity key of `signer`.
fn place(key: WrappingKeyId, signer: WrappingKeyId) -> PlaceRow {
    let place = PlaceRow {
        key,
        token: "hsm-b".to_owned(),
        token_serial: "0002".to_owned(),
        objects: ObjectIds::default(),
        registered: Timestamp::from_micros(1),
        backup_confirmed: None,
        mac: [0; 32],
    };
    PlaceRow {
        mac: mac_by(signer, &place.mac_message()),
        ..place
    }
}

const fn activation(without_backup: bool) -> KeyChange {
    KeyChange::Activate {
        backup_confirmed: true,
        without_backup,
    }
}

/// A person who can write to the database adds a row. A confirmed backup must not make the row authentic.
#[tokio::test]
async fn a_forged_row_of_a_copy_is_not_signed() {
    use WrappingKeyState::{Active, PreActive};
    for (signer, is_refused) in [(A, true), (B, false)] {
        let folder = tempfile::tempdir().unwrap();
        let rows = [authentic(A, Active, 2), authentic(B, PreActive, 3)];
        let broker = broker_with(folder.path(), Tokens::with(&[A, B]), &rows).await;
        broker.store.add_place(&place(B, signer)).await.unwrap();
        let changed = change(&broker, B, activation(false)).await;
        let places = broker.store.places().await.unwrap();
        assert_eq!(places[0].backup_confirmed.is_none(), is_refused);
        assert_eq!(state_in(&broker, B) == PreActive, is_refused);
        if let Err(error) = changed {
            assert!(error.detail().contains("not authentic"), "{error}");
            assert_eq!(error.reason(), Reason::TokenUntrusted);
        }
    }
}

/// The other token of the previous key is in the configuration of another broker only. This holds too while no token has the previous key.
#[tokio::test]
async fn a_token_outside_the_configuration_needs_a_copy_too() {
    use WrappingKeyState::{Active, PreActive};
    for shown in [&[A, B][..], &[B]] {
        let folder = tempfile::tempdir().unwrap();
        let rows = [authentic(A, Active, 2), authentic(B, PreActive, 3)];
        let broker = broker_with(folder.path(), Tokens::with(shown), &rows).await;
        broker.store.add_place(&place(A, A)).await.unwrap();
        let refused = change(&broker, B, activation(false)).await.unwrap_err();
        let what = "token hsm-b: the token is not in the configuration of this broker";
        assert!(refused.detail().contains(what), "{refused}");
        assert_eq!(state_in(&broker, B), PreActive);
        change(&broker, B, activation(true)).await.unwrap();
        assert_eq!(state_in(&broker, B), Active);
    }
}
