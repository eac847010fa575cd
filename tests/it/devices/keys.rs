//! Devices and the life of wrapping keys: a re-wrap binds their rows to the new key.

use keybroker_proto::AccessApprover;

use crate::{
    client::refused,
    client_commands::calling,
    identity::{Identity, Options},
    process::until,
    tokens::{ADA, start},
};

use super::member::{App, CODE, Member};

#[tokio::test(flavor = "multi_thread")]
async fn a_re_wrap_moves_the_devices() {
    let service = Identity::start(Options::default());
    let broker = start(&service, "");
    let (ada, first) = Member::with_first_device(&broker, &service, ADA).await;
    let second = App::new(2);
    ada.trusts(&second, &first).await.unwrap();
    let request = ada
        .asks(&App::new(3), AccessApprover::Device)
        .await
        .unwrap();
    let admin = |words: &[&str]| {
        let output = calling(&broker, words, "admin", &[]).output().unwrap();
        assert!(output.status.success(), "{words:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let signers = || {
        broker
            .site
            .sql("SELECT DISTINCT hex(signer_key_id) FROM devices")
    };
    let old = signers();
    admin(&["key", "rotate", "--single"]);
    // Both integrity keys serve: rows of the old one verify, and new rows are bound with the new one.
    ada.keys_of(&second).await.unwrap();
    ada.approves(&request, &first).await.unwrap();
    ada.fetches(&request, CODE).await.unwrap();
    refused(
        ada.fetches(&request, b"another code of 25 bytes!").await,
        "ACCESS_CODE",
    );
    admin(&["rewrap", "start"]);
    until("the re-wrap", || {
        admin(&["rewrap", "status"]).contains("done").then_some(())
    });
    let new = signers();
    assert_eq!(new.lines().count(), 1);
    assert_ne!(new, old);
    for app in [&first, &second] {
        let keys = ada.keys_of(app).await.unwrap();
        assert_eq!(keys.keys, Some(app.keys()));
    }
    let audit = broker.site.audit();
    assert!(audit.contains("wrapping_key.rewrap_batch"));
    let (site, _) = broker.stop();
    let checked = site.run(&["store", "check"]);
    assert_eq!(checked.code, Some(0), "{checked:#?}");
}
