//! Rows that a writer of the database changed: the broker refuses them, and `store check` finds them.

use keybroker_proto::AccessApprover;

use crate::{
    client::refused,
    identity::{Identity, Options},
    tokens::{ADA, BOB, start},
};

use super::member::{App, CODE, Member, spki};

#[tokio::test(flavor = "multi_thread")]
#[expect(clippy::too_many_lines, reason = "one story")]
async fn altered_rows_are_refused() {
    let service = Identity::start(Options::default());
    let broker = start(&service, "");
    let (ada, first) = Member::with_first_device(&broker, &service, ADA).await;
    let (bob, of_bob) = Member::with_first_device(&broker, &service, BOB).await;
    let [second, third] = [2, 3].map(App::new);
    ada.trusts(&second, &first).await.unwrap();
    let request = ada.asks(&third, AccessApprover::Device).await.unwrap();
    let of = |user: &str, device: u8| {
        format!(
            "user = '{user}' AND device_id = x'{}'",
            hex::encode([device; 16])
        )
    };
    let original = std::fs::read(broker.site.database()).unwrap();
    assert!(!original.is_empty());
    let edit = |statement: String| broker.site.sql(&statement);

    // A public key of the attacker in place of the one of the device.
    let public_key = hex::encode(spki());
    edit(format!(
        "UPDATE access_requests SET public_key = x'{public_key}'"
    ));
    refused(ada.approves(&request, &first).await, "RECORD_DAMAGED");
    refused(ada.fetches(&request, CODE).await, "RECORD_DAMAGED");
    let listed = ada.requests().await;
    assert!(listed[0].altered && !listed[0].verified);
    let right = hex::encode(&request.public_key);
    edit(format!(
        "UPDATE access_requests SET public_key = x'{right}'"
    ));
    // An approval that nobody gave.
    edit(
        "UPDATE access_requests SET state = 'approved', answer = x'01', answer_form = 'x', decided_by = 'x', decided_us = 1"
            .to_owned(),
    );
    refused(ada.fetches(&request, CODE).await, "RECORD_DAMAGED");
    edit(
        "UPDATE access_requests SET state = 'pending', answer = x'', answer_form = '', decided_by = '', decided_us = NULL"
            .to_owned(),
    );
    // A request of another member with the same content.
    edit(format!("UPDATE access_requests SET user = '{BOB}'"));
    refused(bob.approves(&request, &of_bob).await, "RECORD_DAMAGED");
    edit(format!("UPDATE access_requests SET user = '{ADA}'"));
    ada.fetches(&request, CODE).await.unwrap();

    // Encrypted keys that were exchanged between two devices of a member, and between two members.
    let blobs = "sealed_user_key, sealed_public_key, sealed_private_key, verification_key, mac";
    for (user, device) in [(ADA, 2), (BOB, 1)] {
        let [mine, other] = [of(ADA, 1), of(user, device)];
        edit(format!(
            "CREATE TABLE kept AS SELECT {blobs} FROM devices WHERE {mine}; \
             UPDATE devices SET ({blobs}) = (SELECT {blobs} FROM devices WHERE {other}) WHERE {mine}"
        ));
        refused(ada.keys_of(&first).await, "RECORD_DAMAGED");
        // A row that does not verify hides no device, so nothing can be established beside it.
        refused(ada.trusts(&third, &first).await, "RECORD_DAMAGED");
        edit(format!(
            "UPDATE devices SET ({blobs}) = (SELECT {blobs} FROM kept) WHERE {mine}; DROP TABLE kept"
        ));
        ada.keys_of(&first).await.unwrap();
    }
    // All devices are said to be untrusted, so that the next one could be established without a signature.
    edit(format!(
        "UPDATE devices SET state = 'untrusted' WHERE user = '{ADA}'"
    ));
    refused(ada.trusts(&third, &third).await, "RECORD_DAMAGED");
    edit(format!(
        "UPDATE devices SET state = 'trusted' WHERE user = '{ADA}'"
    ));
    ada.trusts(&third, &first).await.unwrap();

    let (site, _) = broker.stop();
    assert_eq!(site.run(&["store", "check"]).code, Some(0));
    site.sql(&format!(
        "UPDATE devices SET name = 'x' WHERE {}",
        of(ADA, 2)
    ));
    site.sql("UPDATE access_requests SET peer = 'x'");
    let checked = site.run(&["--output", "json", "store", "check"]);
    assert_eq!(checked.code, Some(12), "{checked:#?}");
    for part in ["mac-refused", "device 0202", "request for access"] {
        assert!(checked.stdout.contains(part), "{part}: {}", checked.stdout);
    }
}
