//! The place of a request: the name of the network of its address, for approvers, policies and the audit log.

use serde_json::Value;

use crate::{
    client::refused,
    identity::{Identity, Options},
    site::policy_section,
    tokens::{ADA, start_sealed},
};

use super::{
    approvers::{CAROL, Command, approver, mappings, token},
    for_members::{asks, heard},
    member::{App, Member},
};

const OFFICE_ONLY: &str = r#"
@id("office-only")
forbid (principal, action == Keybroker::Action::"access_request.approve_for_member", resource)
unless { context.place == "office" && resource.requestPlace == "office" };
"#;

/// Networks, the most specific of which contains the addresses of this machine.
fn networks(name: &str) -> String {
    format!(
        "\n[[network]]\nname = \"wide\"\nranges = [\"0.0.0.0/0\", \"::/0\"]\n\
         \n[[network]]\nname = \"{name}\"\nranges = [\"127.0.0.0/8\"]\n"
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn approvers_policies_and_the_audit_log_see_the_place() {
    let service = Identity::start(Options::default());
    let policies = tempfile::tempdir().unwrap();
    std::fs::write(policies.path().join("office.cedar"), OFFICE_ONLY).unwrap();
    let with = |name: &str| {
        let lines = [mappings(), networks(name), policy_section(policies.path())];
        start_sealed(&service, &lines.concat())
    };
    let broker = with("office");
    let (ada, _) = Member::with_first_device(&broker, &service, ADA).await;
    let (asked, _) = asks(&ada, &App::new(2)).await;
    assert_eq!(asked.place, "office");
    let carol = approver(&broker, &service, "approvers");
    assert_eq!(carol.requests().await[0].place, "office");
    let command = Command::of(&broker, &token(&service, CAROL, "approvers"));
    assert_eq!(command.json(&["device", "requests"])[0]["place"], "office");
    let right = heard(&carol, &asked).await;
    let approved = carol.approve_for_member(right).await.unwrap();
    assert_eq!(approved.access_request.unwrap().place, "office");
    let audit = broker.site.audit();
    let entries = audit
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap())
        .filter(|entry| entry["access_request"].is_string());
    let places: Vec<_> = entries.map(|entry| entry["place"].clone()).collect();
    assert!(places.len() >= 3, "{places:?}");
    assert!(places.iter().all(|place| place == "office"), "{places:?}");

    // `policy explain` knows the networks of the configuration.
    let decided = |peer: &str, more: &[&str]| {
        let question = [
            "policy",
            "explain",
            "-o",
            "json",
            "--name",
            "carol",
            "--role",
            "approver",
            "--action",
            "access_request.approve_for_member",
            "--user",
            ADA,
            "--recipient",
            &"0".repeat(64),
            "--request-peer",
            "127.0.0.1",
            "--peer",
            peer,
        ];
        let text = broker.site.expect_ok(&[&question, more].concat());
        let answer: Value = serde_json::from_str(&text).unwrap();
        answer["policy"].as_str().unwrap().to_owned()
    };
    assert_eq!(decided("127.0.0.9", &[]), "approver-approve");
    assert_eq!(decided("192.0.2.1", &[]), "office-only");
    assert_eq!(
        decided("192.0.2.1", &["--place", "office"]),
        "approver-approve"
    );
    assert_eq!(
        decided("127.0.0.9", &["--request-place", "home"]),
        "office-only"
    );

    let broker = with("home");
    let (ada, _) = Member::with_first_device(&broker, &service, ADA).await;
    let (asked, _) = asks(&ada, &App::new(2)).await;
    assert_eq!(asked.place, "home");
    let carol = approver(&broker, &service, "approvers");
    let right = heard(&carol, &asked).await;
    refused(carol.approve_for_member(right).await, "POLICY");
    assert!(broker.site.audit().contains(r#""policy":"office-only""#));
}
