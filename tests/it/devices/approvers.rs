//! Approvers: they see and deny the requests of the users they cover, and end the trust of lost devices, and nothing else.

use serde_json::{Value, json};

use keybroker_proto::{self as proto, AccessApprover, AccessRequestState, DeviceState};

use crate::{
    client::refused,
    identity::{Identity, Options, user},
    process::Broker,
    site::Finished,
    tokens::{ADA, BOB, start},
};

use super::member::{App, CODE, Member};

pub(super) const CAROL: &str = "2c5ea4c0-4067-11e9-8bad-9b1deb4d3b7d";

/// Approvers of one member and of all members, by the claims of their access tokens.
pub(super) fn mappings() -> String {
    format!(
        r#"
[[issuer.mapping]]
name = "approvers"
when = [{{ claim = "groups", any_of = ["approvers"] }}]
roles = ["approver"]
users = ["*"]

[[issuer.mapping]]
name = "approvers-of-ada"
when = [{{ claim = "groups", any_of = ["approvers-of-ada"] }}]
roles = ["approver"]
users = ["{ADA}"]

[[issuer.mapping]]
name = "approvers-of-bob"
when = [{{ claim = "groups", any_of = ["approvers-of-bob"] }}]
roles = ["approver"]
users = ["{BOB}"]
"#
    )
}

pub(super) fn token(service: &Identity, sub: &str, group: &str) -> String {
    let mut claims = user(sub);
    claims["groups"] = json!([group]);
    service.mint(claims, json!({}))
}

pub(super) fn approver(broker: &Broker, service: &Identity, group: &str) -> Member {
    Member::with_token(broker, CAROL, &token(service, CAROL, group))
}

#[tokio::test(flavor = "multi_thread")]
#[expect(clippy::too_many_lines, reason = "one story")]
async fn an_approver_sees_two_blanks_and_denies() {
    let service = Identity::start(Options::default());
    let broker = start(&service, &mappings());
    let (ada, _) = Member::with_first_device(&broker, &service, ADA).await;
    let (bob, _) = Member::with_first_device(&broker, &service, BOB).await;
    let [of_ada, of_bob] = [
        ada.asks(&App::new(2), AccessApprover::Administrator)
            .await
            .unwrap(),
        bob.asks(&App::new(2), AccessApprover::Administrator)
            .await
            .unwrap(),
    ];
    let carol = approver(&broker, &service, "approvers");
    let pending = proto::ListAccessRequestsRequest::default();
    let listed = carol
        .list_access_requests(pending)
        .await
        .unwrap()
        .access_requests;
    assert_eq!(listed.len(), 2);
    for (shown, asked) in listed.iter().zip([&of_bob, &of_ada]) {
        assert_eq!(shown.id, asked.id);
        assert!(shown.public_key.is_empty());
        assert_eq!(
            (
                shown.public_key.as_slice(),
                shown.public_key_sha256.as_slice()
            ),
            (&[][..], &[][..]),
            "the hidden words could be computed from either"
        );
        let hidden = shown.phrase.iter().filter(|word| word.is_empty()).count();
        assert_eq!((shown.phrase.len(), hidden), (5, 2));
        let pairs = shown.phrase.iter().zip(&asked.phrase);
        assert!(
            pairs
                .clone()
                .all(|(shown, asked)| shown.is_empty() || shown == asked)
        );
        assert!(shown.peer.starts_with("127.0.0.1:"), "{}", shown.peer);
    }
    let denied = carol.denies(&of_bob).await.unwrap();
    assert_eq!(denied.state(), AccessRequestState::Denied);
    assert_eq!(denied.decided_by, format!("token:vault:{CAROL}"));
    refused(bob.fetches(&of_bob, CODE).await, "DEVICE_STATE");

    // An approver of Ada alone.
    let limited = approver(&broker, &service, "approvers-of-ada");
    let ids: Vec<_> = limited
        .requests()
        .await
        .into_iter()
        .map(|one| one.id)
        .collect();
    assert_eq!(ids, std::slice::from_ref(&of_ada.id));
    let again = bob
        .asks(&App::new(3), AccessApprover::Administrator)
        .await
        .unwrap();
    refused(limited.denies(&again).await, "POLICY");
    limited.denies(&of_ada).await.unwrap();

    let commands = Command::of(&broker, &token(&service, CAROL, "approvers"));
    let rows: Value = commands.json(&["device", "requests", "--all"]);
    assert_eq!(rows.as_array().unwrap().len(), 3);
    assert!(
        rows[0]["phrase"].as_str().unwrap().contains("____"),
        "{rows}"
    );
    let id = hex::encode(&again.id);
    let denied = commands.json(&["device", "deny", &id]);
    assert_eq!(denied["state"], "denied");
    let refused = commands.run(&["device", "deny", &id]);
    assert_eq!(refused.code, Some(10), "{refused:#?}");
    assert!(
        refused.stderr.contains("DEVICE_STATE"),
        "{}",
        refused.stderr
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_approver_ends_the_trust_of_a_covered_member_and_uses_no_device() {
    let service = Identity::start(Options::default());
    let broker = start(&service, &mappings());
    let (ada, first) = Member::with_first_device(&broker, &service, ADA).await;
    let (bob, _) = Member::with_first_device(&broker, &service, BOB).await;
    let limited = approver(&broker, &service, "approvers-of-ada");
    let of = |user: &str| proto::UntrustDevicesRequest {
        user: user.to_owned(),
        all: true,
        lost: true,
        ..proto::UntrustDevicesRequest::default()
    };
    refused(limited.untrust_devices(of(BOB)).await, "POLICY");
    let list = |user: &str| proto::ListDevicesRequest {
        user: user.to_owned(),
    };
    refused(limited.list_devices(list(BOB)).await, "POLICY");
    refused(limited.list_devices(list("")).await, "POLICY");
    assert_eq!(
        limited.list_devices(list(ADA)).await.unwrap().devices.len(),
        1
    );

    // Everything that uses a device.
    let own = App::new(7);
    refused(limited.trusts(&own, &own).await, "POLICY");
    refused(limited.keys_of(&first).await, "POLICY");
    refused(limited.asks(&own, AccessApprover::Device).await, "POLICY");
    let request = ada.asks(&own, AccessApprover::Device).await.unwrap();
    refused(limited.approves(&request, &first).await, "POLICY");
    refused(limited.fetches(&request, CODE).await, "POLICY");
    refused(limited.confirms(&request).await, "POLICY");
    let rotation = limited.rotation(1, b"of an approver", &[], &[], &first);
    refused(limited.rotate_devices(rotation).await, "POLICY");
    let report = proto::ReportDeviceLostRequest {
        device_id: first.id.clone(),
    };
    refused(limited.report_device_lost(report).await, "POLICY");
    refused(limited.holder.unwrap(ADA).await, "POLICY");

    let commands = Command::of(&broker, &token(&service, CAROL, "approvers-of-ada"));
    let ended = commands.json(&["device", "untrust", "--user", ADA, "--all", "--lost"]);
    assert_eq!(ended[0]["state"], "lost");
    let own = commands.run(&["device", "list"]);
    assert!(own.stderr.contains("with --user"), "{own:#?}");
    let devices = commands.json(&["device", "list", "--user", ADA]);
    assert_eq!(devices[0]["name"], "device 1");
    assert_eq!(ada.devices().await[0].state(), DeviceState::Lost);
    assert_eq!(bob.devices().await[0].state(), DeviceState::Trusted);
}

/// The client commands with an access token.
pub(super) struct Command<'b> {
    broker: &'b Broker,
    token: std::path::PathBuf,
}

impl<'b> Command<'b> {
    pub(super) fn of(broker: &'b Broker, token: &str) -> Self {
        let file = broker.site.folder().join("approver.token");
        crate::softhsm::write_private(&file, token);
        Self {
            broker,
            token: file,
        }
    }

    pub(super) fn run(&self, words: &[&str]) -> Finished {
        let broker = self.broker;
        let mut command = broker.site.command(&["--output", "json"]);
        command
            .args(words)
            .arg("--endpoint")
            .arg(format!("https://localhost:{}", broker.grpc.port()))
            .arg("--ca")
            .arg(broker.site.pki.ca_file())
            .arg("--token-file")
            .arg(&self.token);
        Finished::from(command.output().unwrap())
    }

    pub(super) fn json(&self, words: &[&str]) -> Value {
        let finished = self.run(words);
        assert_eq!(finished.code, Some(0), "{words:?}: {finished:#?}");
        serde_json::from_str(&finished.stdout).unwrap()
    }
}
