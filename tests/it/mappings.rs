//! Several kinds of principals from one identity provider, by the claims of their access tokens, at the real broker.

use serde_json::{Value, json};
use tonic::Status;

use keybroker_proto::{
    ApproveChangeRequest, CreateClientCredentialRequest, ListApprovalsRequest,
    ListWrappingKeysRequest, TailAuditLogRequest,
};

use crate::{
    client::refused,
    identity::{Identity, Options as IdentityOptions, user},
    process::Broker,
    site::policy_section,
    tokens::{ADA, BOB, Holder, assert_is_counted, start},
};

const ERIN: &str = "7d444840-9dc0-11d1-b245-5ffdce74fad2";

const MAPPINGS: &str = r#"
[[issuer.mapping]]
name = "auditors"
when = [{ claim = "groups", any_of = ["keybroker-auditors"] }]
roles = ["auditor"]

[[issuer.mapping]]
name = "administrators"
when = [
    { claim = ["realm_access", "roles"], any_of = ["keybroker-admin"] },
    { claim = "azp", any_of = ["keybroker-cli"] },
]
roles = ["admin"]
"#;

fn token(service: &Identity, sub: &str, claims: &Value) -> String {
    let mut all = user(sub);
    for (name, value) in claims.as_object().unwrap() {
        all[name] = value.clone();
    }
    service.mint(all, json!({}))
}

fn holder(broker: &Broker, service: &Identity, sub: &str, claims: &Value) -> Holder {
    Holder::of(broker, &token(service, sub, claims))
}

fn auditor() -> Value {
    json!({ "groups": ["staff", "keybroker-auditors"] })
}

fn administrator() -> Value {
    json!({ "realm_access": { "roles": ["offline_access", "keybroker-admin"] }, "azp": "keybroker-cli" })
}

impl Holder {
    async fn wrapping_keys(&self) -> Result<(), Status> {
        let request = self.request(ListWrappingKeysRequest {});
        let listed = self.control.clone().list_wrapping_keys(request).await;
        listed.map(drop)
    }

    async fn audit_log(&self) -> Result<Vec<Value>, Status> {
        let request = self.request(TailAuditLogRequest { limit: 1_000 });
        let tail = self.control.clone().tail_audit_log(request).await?;
        let entries = tail.into_inner().entries;
        let read = |entry: &String| serde_json::from_str(entry).unwrap();
        Ok(entries.iter().map(read).collect())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_claims_decide_what_the_holder_may_do() {
    let service = Identity::start(IdentityOptions::default());
    let broker = start(&service, MAPPINGS);
    let member = holder(&broker, &service, ADA, &json!({ "groups": ["staff"] }));
    member.create(ADA).await.unwrap();
    member.unwrap(ADA).await.unwrap();
    refused(member.wrapping_keys().await, "POLICY");
    refused(member.audit_log().await, "POLICY");

    // The same person gets other rights with other claims, and never the rights of both.
    let audits = holder(&broker, &service, ADA, &auditor());
    audits.audit_log().await.unwrap();
    audits.wrapping_keys().await.unwrap();
    refused(audits.unwrap(ADA).await, "POLICY");
    let administers = holder(&broker, &service, ADA, &administrator());
    administers.wrapping_keys().await.unwrap();
    refused(administers.audit_log().await, "POLICY");
    refused(administers.unwrap(ADA).await, "POLICY");
    // The decisions about one role of the principal are not used for its other roles.
    audits.audit_log().await.unwrap();
    refused(administers.audit_log().await, "POLICY");
    member.unwrap(ADA).await.unwrap();

    // A role needs each condition of its mapping.
    let mut claims = administrator();
    claims["azp"] = json!("another-client");
    let elsewhere = holder(&broker, &service, ADA, &claims);
    refused(elsewhere.wrapping_keys().await, "POLICY");
    elsewhere.unwrap(ADA).await.unwrap();

    let name = format!("token:vault:{ADA}");
    let entries = audits.audit_log().await.unwrap();
    let mapped = |action: &str, outcome: &str| -> Vec<&Value> {
        let of_ada = entries.iter().filter(|entry| {
            entry["principal"] == name.as_str()
                && entry["action"] == action
                && entry["outcome"] == outcome
        });
        of_ada.map(|entry| &entry["mapping"]).collect()
    };
    assert!(
        mapped("audit.read", "ok")
            .iter()
            .all(|one| *one == "auditors")
    );
    assert!(mapped("wrapping_key.read", "ok").contains(&&json!("administrators")));
    assert!(
        mapped("user_key.unwrap", "ok")
            .iter()
            .all(|one| one.is_null())
    );
    let denied = mapped("user_key.unwrap", "denied");
    assert_eq!(denied, [&json!("auditors"), &json!("administrators")]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_can_name_the_mapping() {
    let service = Identity::start(IdentityOptions::default());
    let policies = tempfile::tempdir().unwrap();
    let rule = r#"@id("auditors-only-read-the-log")
        forbid (principal, action == Keybroker::Action::"wrapping_key.read", resource)
        when { principal has mapping && principal.mapping == "auditors" };"#;
    std::fs::write(policies.path().join("mapping.cedar"), rule).unwrap();
    let section = policy_section(policies.path());
    let broker = start(&service, &format!("{MAPPINGS}{section}"));
    let audits = holder(&broker, &service, ADA, &auditor());
    audits.audit_log().await.unwrap();
    refused(audits.wrapping_keys().await, "POLICY");
    let administers = holder(&broker, &service, ADA, &administrator());
    administers.wrapping_keys().await.unwrap();
}

/// A role is never lost without a word, and never replaced by the rights of others.
#[tokio::test(flavor = "multi_thread")]
async fn unclear_claims_are_refused_with_their_cause() {
    let service = Identity::start(IdentityOptions::default());
    let broker = start(&service, &format!("mapping_required = true\n{MAPPINGS}"));
    for (cause, claims) in [
        ("mapping", json!({})),
        ("mapping", json!({ "groups": ["staff"] })),
        ("claim", json!({ "groups": { "keybroker-auditors": true } })),
        ("claim", json!({ "groups": [["keybroker-auditors"]] })),
        ("overage", json!({ "_claim_names": { "groups": "src1" } })),
        ("overage", json!({ "hasgroups": true })),
    ] {
        let holder = holder(&broker, &service, ADA, &claims);
        refused(holder.audit_log().await, "CREDENTIAL");
        assert_is_counted(&broker, cause);
    }
    let audits = holder(&broker, &service, ADA, &auditor());
    audits.audit_log().await.unwrap();
    let log = broker.site.log();
    for words in [
        "no [[issuer.mapping]] applies: ",
        "the `groups` is",
        "the provider left out the claim `groups`",
    ] {
        assert!(log.contains(words), "{words}: {log}");
    }
}

/// Entra ID has a `sub` for each application and one `oid` for each user.
#[tokio::test(flavor = "multi_thread")]
async fn another_claim_can_identify_the_user() {
    let service = Identity::start(IdentityOptions::default());
    let broker = start(&service, "subject_claim = \"oid\"");
    let with = |sub: &str, oid: Value| holder(&broker, &service, sub, &json!({ "oid": oid }));
    let ada = with(BOB, json!(ADA));
    ada.create(ADA).await.unwrap();
    refused(ada.unwrap(BOB).await, "POLICY");
    with(ERIN, json!(ADA)).unwrap(ADA).await.unwrap();
    let audit = broker.site.audit();
    assert!(audit.contains(&format!("token:vault:{ADA}")));
    assert!(!audit.contains(ERIN), "{audit}");
    for oid in [Value::Null, json!(""), json!([ADA]), json!(7), json!("ada")] {
        refused(with(ADA, oid).unwrap(ADA).await, "CREDENTIAL");
    }
    assert_is_counted(&broker, "subject");
}

/// Two administrators whose roles come from claims approve each other's changes, by the names of their principals.
#[tokio::test(flavor = "multi_thread")]
async fn administrators_of_a_provider_are_persons_of_approvals() {
    let service = Identity::start(IdentityOptions::default());
    let persons = format!(
        "{MAPPINGS}\n[client_credentials]\ngrantable_roles = [\"admin\"]\n\n[[approvals.person]]\nname = \"Ada\"\n\
         principals = [\"token:vault:{ADA}\"]\n\n[[approvals.person]]\nname = \"Bob\"\nprincipals = [\"token:vault:{BOB}\"]\n"
    );
    let broker = start(&service, &persons);
    let [ada, bob, erin] =
        [ADA, BOB, ERIN].map(|sub| holder(&broker, &service, sub, &administrator()));
    let create = || {
        let request = ada.request(CreateClientCredentialRequest {
            label: "night shift".to_owned(),
            roles: vec!["admin".to_owned()],
            ..CreateClientCredentialRequest::default()
        });
        let mut control = ada.control.clone();
        async move { control.create_client_credential(request).await }
    };
    refused(create().await, "APPROVAL_NEEDED");
    let request = ada.request(ListApprovalsRequest::default());
    let listed = ada.control.clone().list_approvals(request).await.unwrap();
    let approval = listed.into_inner().approvals.remove(0);
    assert_eq!(approval.requested_by, format!("token:vault:{ADA}"));
    let approve = |who: &Holder| {
        let request = who.request(ApproveChangeRequest {
            id: approval.id.clone(),
            digest: approval.digest.clone(),
        });
        let mut control = who.control.clone();
        async move { control.approve_change(request).await }
    };
    refused(approve(&ada).await, "POLICY");
    // Another access token of the same person does not make another person of Ada.
    let again = holder(&broker, &service, ADA, &administrator());
    refused(approve(&again).await, "POLICY");
    refused(approve(&erin).await, "POLICY");
    // A person without the role cannot approve.
    let reader = holder(&broker, &service, BOB, &auditor());
    refused(approve(&reader).await, "POLICY");
    let member = holder(&broker, &service, BOB, &json!({}));
    refused(approve(&member).await, "POLICY");
    approve(&bob).await.unwrap();
    create().await.unwrap();
}
