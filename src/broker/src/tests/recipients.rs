//! Tests of sealed releases whose recipient the token refuses.

use aws_lc_rs::{
    encoding::AsDer as _,
    rsa::{KeySize, PrivateDecryptingKey},
};
use keybroker_core::key::Purpose;

use super::*;

fn call() -> Call {
    Call::start("127.0.0.1:1", Deadline::after(Duration::from_secs(10)))
}

fn recipient() -> Recipient {
    let key = PrivateDecryptingKey::generate(KeySize::Rsa2048)
        .unwrap()
        .public_key();
    let spki = key.as_der().unwrap();
    Recipient {
        key: RecipientKey::from_spki(spki.as_ref()).unwrap(),
        algorithm: None,
    }
}

/// A broker whose only wrapping key is a sealed one. Its token refuses every recipient.
async fn sealed_broker(folder: &std::path::Path) -> Arc<Broker> {
    let row = RegistryRow {
        purpose: Purpose::Sealed,
        ..registered(KEY, WrappingKeyState::Active, 1)
    };
    let row = RegistryRow {
        mac: mac_by(KEY, &row.mac_message()),
        ..row
    };
    broker_with(folder, Tokens::with(&[KEY]), &[row]).await
}

/// The worker repeats a refused job, so a principal must not send such jobs without limit. A service that passes on the recipients of
/// its users keeps its other calls.
#[tokio::test(flavor = "multi_thread")]
async fn recipients_that_the_token_refuses_cost_a_principal_its_sealed_releases() {
    let folder = tempfile::tempdir().unwrap();
    let broker = sealed_broker(folder.path()).await;
    let key = UserKeyRef {
        user: UserId::parse("ada").unwrap(),
        name: KeyName::parse("vault").unwrap(),
    };
    let enroller = testing::service("URI:enroller", &[Role::Enrol]);
    let material = KeyMaterial::new(vec![1; 32]).unwrap();
    broker
        .create(&enroller, &call(), &key, material, None)
        .await
        .unwrap();
    let recipient = recipient();
    let refusal = async |principal: &Principal| {
        broker
            .unwrap_sealed(principal, &call(), &key, &recipient)
            .await
            .unwrap_err()
    };
    let releaser = testing::service("URI:releaser", &[Role::Release]);
    let attempts = 2 * limits::Settings::default().failures_per_minute;
    let mut limited = None;
    for _ in 0..attempts {
        let error = refusal(&releaser).await;
        if error.reason() == Reason::FailureBudget {
            limited = Some(error);
            break;
        }
        assert_eq!(error.violations()[0].field, "recipient.public_key");
    }
    assert!(limited.unwrap().retry_delay().is_some());
    broker.limits.take_calls(&releaser, 1).unwrap();
    let other = testing::service("URI:other", &[Role::Release]);
    let error = refusal(&other).await;
    assert_eq!(error.violations()[0].field, "recipient.public_key");
}
