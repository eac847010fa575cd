//! API clients with the real broker: made by an administrator, used with `authorization: Basic`, rotated, revoked; and what
//! nobody can do with them, not even with the database.

use std::{
    fs,
    net::IpAddr,
    os::unix::fs::PermissionsExt as _,
    process::{Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use base64ct::{Base64, Encoding as _};
use keybroker_proto::{
    CreateClientCredentialRequest, CreateUserKeyRequest, ListClientCredentialsRequest,
    UnwrapUserKeyRequest, UnwrapUserKeyResponse, user_key_service_client::UserKeyServiceClient,
};
use prost_types::Timestamp;
use serde_json::Value;
use tonic::{Code, Request, Status, metadata::MetadataValue, transport::Channel};

use crate::{
    client::{Caller, NAME, channel, channel_from, never_in_a_log, reason, refused},
    process::{Broker, until},
    site::{Finished, Options, Site},
    wire::get,
};

const MATERIAL: &[u8] = b"material of this user";

/// A site whose listener asks for a certificate and does without one.
pub(crate) fn site(sections: &str) -> Arc<Site> {
    let site = Site::fresh(Options {
        limits: sections.to_owned(),
        ..Options::default()
    });
    configure(&site, sections);
    Arc::new(site)
}

fn configure(site: &Site, sections: &str) {
    site.write_configuration(|text| {
        let apis = "apis = [\"grpc\", \"admin\"]";
        *text = text.replace(apis, &format!("{apis}\nclient_certificates = \"optional\""));
        let start = text.find("[limits]").unwrap();
        let end = text.find("[[principal]]").unwrap();
        text.replace_range(start..end, &format!("[limits]\n{sections}\n"));
    });
}

const GRANT_RELEASE: &str = "[client_credentials]\ngrantable_roles = [\"enrol\", \"release\"]";

pub(crate) const GRANT_ENROL: &str = "[client_credentials]\ngrantable_roles = [\"enrol\"]";

/// What an API client shows.
#[derive(Clone, Debug)]
pub(crate) struct Basic {
    id: String,
    secret: String,
}

impl Basic {
    fn of(made: &Value) -> Self {
        let text = |field: &str| made[field].as_str().unwrap().to_owned();
        Self::new(&text("id"), &text("secret"))
    }

    /// Neither the secret nor the header may ever be seen in a log.
    fn new(id: &str, secret: &str) -> Self {
        never_in_a_log(secret.as_bytes());
        Self {
            id: id.to_owned(),
            secret: secret.to_owned(),
        }
    }

    fn request<T>(&self, message: T) -> Request<T> {
        let pair = Base64::encode_string(format!("{}:{}", self.id, self.secret).as_bytes());
        let header: MetadataValue<_> = format!("Basic {pair}").parse().unwrap();
        let mut request = Request::new(message);
        request.metadata_mut().insert("authorization", header);
        request.set_timeout(Duration::from_secs(20));
        request
    }

    async fn create(&self, keys: &Keys, user: &str, key_name: &str) -> Result<(), Status> {
        let message = CreateUserKeyRequest {
            user: user.to_owned(),
            key_name: key_name.to_owned(),
            key_material: MATERIAL.to_vec(),
            request_id: String::new(),
        };
        keys.clone().create_user_key(self.request(message)).await?;
        Ok(())
    }

    async fn unwrap(&self, keys: &Keys, user: &str) -> Result<UnwrapUserKeyResponse, Status> {
        self.unwrap_named(keys, user, NAME).await
    }

    async fn unwrap_named(
        &self,
        keys: &Keys,
        user: &str,
        key_name: &str,
    ) -> Result<UnwrapUserKeyResponse, Status> {
        let message = UnwrapUserKeyRequest {
            user: user.to_owned(),
            key_name: key_name.to_owned(),
            recipient: None,
        };
        let answer = keys.clone().unwrap_user_key(self.request(message)).await?;
        Ok(answer.into_inner())
    }
}

type Keys = UserKeyServiceClient<Channel>;

/// Over a connection without a certificate.
fn keys(broker: &Broker) -> Keys {
    UserKeyServiceClient::new(channel(&broker.site.pki, None, broker.grpc))
}

/// The real command, with a certificate or none.
fn command(broker: &Broker, name: &str, certificate: Option<&str>, arguments: &[&str]) -> Finished {
    let pki = &broker.site.pki;
    let mut command = Command::new(env!("CARGO_BIN_EXE_keybroker"));
    command
        .arg(name)
        .arg("--endpoint")
        .arg(format!("https://localhost:{}", broker.grpc.port()))
        .arg("--ca")
        .arg(pki.ca_file());
    if let Some(certificate) = certificate {
        command
            .arg("--cert")
            .arg(pki.certificate_file(certificate))
            .arg("--key")
            .arg(pki.key_file(certificate));
    }
    Finished::from(
        command
            .args(arguments)
            .stdin(Stdio::null())
            .output()
            .unwrap(),
    )
}

/// `keybroker client-credential … -o json`, which must succeed.
#[track_caller]
pub(crate) fn credential(broker: &Broker, who: &str, arguments: &[&str]) -> Value {
    let arguments = [arguments, &["-o", "json"]].concat();
    let finished = command(broker, "client-credential", Some(who), &arguments);
    assert_eq!(finished.code, Some(0), "{arguments:?}: {finished:#?}");
    serde_json::from_str(&finished.stdout).unwrap()
}

/// `keybroker client-credential …`, which the broker must refuse for that reason.
#[track_caller]
fn credential_refused(broker: &Broker, who: &str, arguments: &[&str], expected: &str) -> String {
    let finished = command(broker, "client-credential", Some(who), arguments);
    assert_eq!(finished.code, Some(10), "{arguments:?}: {finished:#?}");
    let message = format!("error: {expected}: ");
    assert!(finished.stderr.starts_with(&message), "{finished:#?}");
    finished.stderr
}

/// An API client that enrols, and releases keys called [`NAME`].
pub(crate) fn made(broker: &Broker) -> Basic {
    let both = ["--role", "enrol", "release", "--key-name", NAME];
    let create = [&["create", "--label", "backup"][..], &both].concat();
    Basic::of(&credential(broker, "admin", &create))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_is_made_used_rotated_and_revoked() {
    let broker = Broker::start_on(site(GRANT_RELEASE));
    let keys = keys(&broker);
    let first = made(&broker);
    first.create(&keys, "ada", NAME).await.unwrap();
    first.create(&keys, "ada", "other").await.unwrap();
    let released = first.unwrap(&keys, "ada").await.unwrap();
    assert_eq!(released.key_material, MATERIAL);
    refused(first.unwrap_named(&keys, "ada", "other").await, "POLICY");

    let added = credential(
        &broker,
        "admin",
        &["add-secret", &first.id, "--expires-days", "7"],
    );
    assert_eq!(added["secret_number"], 2);
    let second = Basic::of(&added);
    assert_ne!(first.secret, second.secret);
    for both in [&first, &second] {
        both.unwrap(&keys, "ada").await.unwrap();
    }
    // Two at once are what a rotation needs, and no more.
    let third = credential_refused(&broker, "admin", &["add-secret", &first.id], "REQUEST");
    assert!(third.contains("two valid"), "{third}");

    let revoked = credential(&broker, "admin", &["revoke", &first.id, "--secret", "1"]);
    assert!(revoked["revoked"].is_null(), "{revoked}");
    refused(first.unwrap(&keys, "ada").await, "CREDENTIAL");
    second.unwrap(&keys, "ada").await.unwrap();
    let listed = until("the last use to be written", || {
        let listed = credential(&broker, "auditor", &["list"]);
        (!listed[0]["secrets"][1]["last_used"].is_null()).then_some(listed)
    });
    assert_eq!(listed.as_array().unwrap().len(), 1);
    let client = &listed[0];
    assert_eq!(
        (&client["id"], &client["label"]),
        (&first.id.clone().into(), &"backup".into())
    );
    assert_eq!(client["roles"], serde_json::json!(["release", "enrol"]));
    assert!(client["secrets"][0]["revoked"].is_string(), "{client}");
    assert!(client["secrets"][1]["expires"].is_string(), "{client}");

    let revoked = credential(&broker, "admin", &["revoke", &first.id]);
    assert!(revoked["revoked"].is_string(), "{revoked}");
    refused(second.unwrap(&keys, "ada").await, "CREDENTIAL");
    // The caller is not told why, and the operator is.
    for reason in [
        "the secret is wrong, expired or revoked",
        "this API client was revoked",
    ] {
        until(reason, || broker.site.log().contains(reason).then_some(()));
    }
    // For ever: no new secret brings it back.
    let dead = credential_refused(&broker, "admin", &["add-secret", &first.id], "REQUEST");
    assert!(dead.contains("revoked"), "{dead}");
    drop(keys);

    let (site, _) = broker.stop();
    let audit = site.audit();
    for action in ["client_credential.create", "client_credential.revoke"] {
        let of_it: Vec<&str> = audit
            .lines()
            .filter(|line| line.contains(action) && line.contains(&first.id))
            .collect();
        for kind in ["intent", "outcome"] {
            let count = of_it.iter().filter(|line| line.contains(kind)).count();
            assert!(count >= 2, "{action} {kind}: {of_it:#?}");
        }
    }
    let name = format!("client:{}", first.id);
    assert!(audit.contains(&name), "the client's own calls are audited");
    site.assert_no_secrets();
}

const SHORT: Duration = Duration::from_secs(4);

#[tokio::test(flavor = "multi_thread")]
async fn unknown_wrong_and_expired_are_refused_alike() {
    let broker = Broker::start_on(site(GRANT_RELEASE));
    let keys = keys(&broker);
    let good = made(&broker);
    good.create(&keys, "ada", NAME).await.unwrap();
    let mut request = CreateClientCredentialRequest {
        label: "short".to_owned(),
        roles: vec!["release".to_owned()],
        key_names: vec!["*".to_owned()],
        ..CreateClientCredentialRequest::default()
    };
    let mut admin = Caller::of(&broker, "admin").control;
    let status = admin.create_client_credential(Request::new(CreateClientCredentialRequest {
        expire_time: Some(moment(Duration::ZERO)),
        ..request.clone()
    }));
    refused(status.await, "REQUEST");
    let started = Instant::now();
    request.expire_time = Some(moment(SHORT));
    let short = admin
        .create_client_credential(request)
        .await
        .unwrap()
        .into_inner();
    let short = Basic::new(&short.client_credential.unwrap().id, &short.secret);
    short.unwrap(&keys, "ada").await.unwrap();
    tokio::time::sleep((SHORT + Duration::from_millis(100)).saturating_sub(started.elapsed()))
        .await;

    let wrong = Basic::new(&good.id, "kbs_AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA");
    let unknown = Basic::new(&"00".repeat(16), &good.secret);
    let no_id = Basic::new("backup", &good.secret);
    let others = Basic::new(&good.id, &short.secret);
    let mut texts = Vec::new();
    for basic in [&wrong, &unknown, &no_id, &others, &short] {
        let status = refused(basic.unwrap(&keys, "ada").await, "CREDENTIAL");
        assert_eq!(status.code(), Code::Unauthenticated);
        let (text, _call) = status.message().split_once(" (call ").unwrap();
        texts.push(text.to_owned());
    }
    texts.dedup();
    assert_eq!(texts.len(), 1, "{texts:?}");
    good.unwrap(&keys, "ada").await.unwrap();
}

/// That long from now.
fn moment(after: Duration) -> Timestamp {
    (std::time::SystemTime::now() + after).into()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_wrong_secrets_is_answered_quickly_and_others_are_served() {
    let broker = Broker::start_on(site(GRANT_RELEASE));
    let quiet = keys(&broker);
    let good = made(&broker);
    good.create(&quiet, "ada", NAME).await.unwrap();
    let wrong = Basic::new(&good.id, "kbs_BBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBB");
    let started = Instant::now();
    let mut flood = tokio::task::JoinSet::new();
    for _ in 0..100 {
        let (keys, wrong) = (keys(&broker), wrong.clone());
        flood.spawn(async move { wrong.unwrap(&keys, "ada").await.unwrap_err() });
    }
    let releaser = Caller::of(&broker, "releaser");
    let mut slowest = Duration::ZERO;
    for _ in 0..20 {
        let asked = Instant::now();
        releaser.unwrap("ada").await.unwrap();
        // Its secret was verified before: it pays nothing for the flood from its own address.
        good.unwrap(&quiet, "ada").await.unwrap();
        slowest = slowest.max(asked.elapsed());
    }
    while let Some(status) = flood.join_next().await {
        let reason = reason(&status.unwrap());
        let known = ["FAILURE_BUDGET", "CREDENTIAL", "RATE"];
        assert!(known.contains(&reason.as_str()), "{reason}");
    }
    // By now the address has nothing left, and its secrets are not looked at any more.
    let mut looked_at = 0;
    for _ in 0..200 {
        match reason(&wrong.unwrap(&quiet, "ada").await.unwrap_err()).as_str() {
            "FAILURE_BUDGET" => {}
            "CREDENTIAL" => looked_at += 1,
            other => panic!("{other}"),
        }
    }
    // All of its budget, if the flood was turned away before it was looked at, and one more every three seconds.
    assert!(looked_at <= 25, "{looked_at}");
    good.unwrap(&quiet, "ada").await.unwrap();
    let elapsed = started.elapsed();
    assert!(elapsed < Duration::from_secs(15), "{elapsed:?}");
    assert!(slowest < Duration::from_secs(5), "{slowest:?}");
}

/// Wrong secrets a second, each from another address.
const WRONG_PER_SECOND: u32 = 100;

/// One wrong secret each ten milliseconds, for a client that exists and for ids that do not, each over its own connection from
/// another address, until this is dropped.
fn flood(broker: &Broker, known: &Basic) -> tokio::task::JoinSet<()> {
    let (site, grpc) = (Arc::clone(&broker.site), broker.grpc);
    let id = known.id.clone();
    let mut flood = tokio::task::JoinSet::new();
    flood.spawn(async move {
        let mut ticks = tokio::time::interval(Duration::from_secs(1) / WRONG_PER_SECOND);
        let mut calls = tokio::task::JoinSet::new();
        for number in 0_u32.. {
            ticks.tick().await;
            while calls.try_join_next().is_some() {}
            let [_, high, middle, low] = (number + 0x01_0001).to_be_bytes();
            let from = IpAddr::from([127, high, middle, low]);
            let keys = UserKeyServiceClient::new(channel_from(&site.pki, None, grpc, Some(from)));
            let id = if number % 2 == 0 {
                id.clone()
            } else {
                format!("{number:032x}")
            };
            let secret = format!("kbs_{number:043}");
            calls.spawn(async move { Basic { id, secret }.unwrap(&keys, "ada").await.is_err() });
        }
    });
    flood
}

/// For the figures of docs/reliability.md: `KEYBROKER_TEST_FLOOD_SECONDS=60`.
#[tokio::test(flavor = "multi_thread")]
async fn clients_stay_accepted_and_new_ones_come_in_under_wrong_secrets_from_changing_addresses() {
    let promised = std::env::var("KEYBROKER_TEST_FLOOD_SECONDS").ok();
    let seconds = promised.as_ref().map_or(4, |text| text.parse().unwrap());
    let broker = Broker::start_on(site(GRANT_RELEASE));
    let quiet = keys(&broker);
    let good = [made(&broker), made(&broker)];
    good[0].create(&quiet, "ada", NAME).await.unwrap();
    good[1].unwrap(&quiet, "ada").await.unwrap();
    let flood = flood(&broker, &good[0]);
    let until = Instant::now() + Duration::from_secs(seconds);
    let calling = good.iter().map(async |client| {
        let mut times = Vec::new();
        while Instant::now() < until {
            let begun = Instant::now();
            client.unwrap(&quiet, "ada").await.unwrap();
            times.push(begun.elapsed());
        }
        times
    });
    let first_contacts = async {
        let mut times = Vec::new();
        while Instant::now() < until {
            // Also a change, after which every client is looked up again.
            let new = tokio::task::block_in_place(|| made(&broker));
            let begun = Instant::now();
            new.unwrap(&quiet, "ada").await.unwrap();
            times.push(begun.elapsed());
        }
        times
    };
    let (known, mut new) = tokio::join!(futures_util::future::join_all(calling), first_contacts);
    drop(flood);
    let mut known = known.concat();
    known.sort_unstable();
    new.sort_unstable();
    let p99 = known[known.len() * 99 / 100];
    let slowest = *new.last().unwrap();
    println!(
        "{} calls of known clients, p99 {p99:?}; {} first contacts, slowest {slowest:?}",
        known.len(),
        new.len()
    );
    let overloaded = get(broker.status, "/metrics");
    assert!(
        !overloaded.contains("keybroker_client_secrets_refused_total 0\n"),
        "the flood did not take all turns"
    );
    if promised.is_some() {
        assert!(p99 < Duration::from_secs(1) && slowest < Duration::from_secs(1));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_was_changed_or_copied_in_the_database_authenticates_no_client() {
    let site = site(GRANT_ENROL);
    let broker = Broker::start_on(site);
    let enrol = ["create", "--label", "backup", "--role", "enrol"];
    let changed = Basic::of(&credential(&broker, "admin", &enrol));
    let copied = Basic::of(&credential(&broker, "admin", &enrol));
    let intact = Basic::of(&credential(&broker, "admin", &enrol));
    intact.create(&keys(&broker), "ada", NAME).await.unwrap();
    let (site, _) = broker.stop();
    let copy = Basic::new(&"ab".repeat(16), &copied.secret);
    let rows = site.sql(&format!(
        r#"UPDATE clients SET document = CAST(replace(CAST(document AS TEXT), '["enrol"]', '["release","enrol"]') AS BLOB)
               WHERE client_id = x'{}' AND CAST(document AS TEXT) LIKE '%["enrol"]%';
           SELECT changes();
           INSERT INTO clients SELECT x'{}', revision, document, mac, key_id, created_us, updated_us
               FROM clients WHERE client_id = x'{}';
           SELECT changes();"#,
        changed.id, copy.id, copied.id
    ));
    assert_eq!(rows.split_whitespace().collect::<Vec<_>>(), ["1", "1"]);

    let broker = Broker::start_on(site);
    let keys = keys(&broker);
    for (forged, user) in [(&changed, "bob"), (&copy, "carl")] {
        refused(forged.create(&keys, user, NAME).await, "CREDENTIAL");
        refused(forged.unwrap(&keys, "ada").await, "CREDENTIAL");
    }
    for good in [&intact, &copied] {
        refused(good.create(&keys, "ada", NAME).await, "KEY_EXISTS");
    }
    for change in [&["revoke", &changed.id][..], &["add-secret", &copy.id]] {
        credential_refused(&broker, "admin", change, "RECORD_DAMAGED");
    }
    let log = broker.site.log();
    assert!(log.contains("client-damaged"), "no alert: {log}");
}

/// Whoever creates a client holds its secret, and so its roles: an administrator alone must not become an auditor, or replace keys.
#[tokio::test(flavor = "multi_thread")]
async fn without_a_setting_an_administrator_grants_no_role() {
    let broker = Broker::start_on(site(""));
    for role in ["release", "enrol", "lifecycle", "admin", "auditor"] {
        let create = ["create", "--label", "x", "--role", role];
        let reach = if role == "release" {
            &["--user", "*"][..]
        } else {
            &[]
        };
        let said = credential_refused(&broker, "admin", &[&create, reach].concat(), "REQUEST");
        assert!(
            said.contains("`client_credentials.grantable_roles`"),
            "{said}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_may_make_list_and_grant_is_limited() {
    let broker = Broker::start_on(site(GRANT_ENROL));
    let enrol = ["create", "--label", "backup", "--role", "enrol"];
    let release = [
        "create",
        "--label",
        "thief",
        "--role",
        "release",
        "--key-name",
        "*",
    ];
    let admin = ["create", "--label", "another", "--role", "admin"];
    let both = [
        "create", "--label", "x", "--role", "auditor", "release", "--user", "*",
    ];
    // Roles that the configuration does not list.
    for ungrantable in [&release[..], &admin, &both] {
        let said = credential_refused(&broker, "admin", ungrantable, "REQUEST");
        assert!(said.contains("; roles: "), "{said}");
        let named = said.contains("may not be granted") && said.contains("which lists enrol");
        // Roles that exclude each other are refused first.
        assert_eq!(named, ungrantable != both, "{said}");
    }
    let id = Basic::of(&credential(&broker, "admin", &enrol)).id;
    for who in ["auditor", "releaser", "enroller", "lifecycle"] {
        credential_refused(&broker, who, &enrol, "POLICY");
        credential_refused(&broker, who, &["add-secret", &id], "POLICY");
        credential_refused(&broker, who, &["revoke", &id], "POLICY");
    }
    for who in ["releaser", "enroller", "lifecycle"] {
        credential_refused(&broker, who, &["list"], "POLICY");
    }
    for who in ["auditor", "admin"] {
        let listed = credential(&broker, who, &["list"]);
        assert_eq!(listed.as_array().unwrap().len(), 1);
    }
    let nobody = "00".repeat(16);
    for unknown in [&["add-secret", &nobody][..], &["revoke", &nobody]] {
        let finished = command(&broker, "client-credential", Some("admin"), unknown);
        assert_eq!(finished.code, Some(10), "{finished:#?}");
        assert!(
            finished.stderr.contains("client-credential list"),
            "{finished:#?}"
        );
    }
    let revoke = ["revoke", "backup"];
    let malformed = command(&broker, "client-credential", Some("admin"), &revoke);
    assert_eq!(malformed.code, Some(2), "{malformed:#?}");
    assert!(
        malformed.stderr.contains("not 32 hexadecimal digits"),
        "{malformed:#?}"
    );
    let audit = broker.site.audit();
    assert!(
        audit.contains("client_credential.create") && audit.contains("\"POLICY\""),
        "{audit}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_follow_each_other() {
    let broker = Broker::start_on(site(GRANT_ENROL));
    let mut ids: Vec<String> = (0..5)
        .map(|n| {
            let label = format!("client {n}");
            let made = credential(
                &broker,
                "admin",
                &["create", "--label", &label, "--role", "enrol"],
            );
            Basic::of(&made).id
        })
        .collect();
    ids.sort();
    let mut auditor = Caller::of(&broker, "auditor").control;
    let (mut seen, mut token) = (Vec::new(), String::new());
    loop {
        let request = ListClientCredentialsRequest {
            page_size: 2,
            page_token: token,
        };
        let page = auditor
            .list_client_credentials(request)
            .await
            .unwrap()
            .into_inner();
        assert!(page.client_credentials.len() <= 2);
        seen.extend(page.client_credentials.into_iter().map(|client| client.id));
        token = page.next_page_token;
        if token.is_empty() {
            break;
        }
    }
    assert_eq!(seen, ids);
    let all = credential(&broker, "auditor", &["list", "--all", "--page-size", "1"]);
    assert_eq!(all.as_array().unwrap().len(), 5);
    for (page_size, page_token) in [(1_001, ""), (1, "nonsense")] {
        let request = ListClientCredentialsRequest {
            page_size,
            page_token: page_token.to_owned(),
        };
        refused(auditor.list_client_credentials(request).await, "REQUEST");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_login_after_the_parameters_were_raised_improves_the_hash() {
    let broker = Broker::start_on(site(GRANT_ENROL));
    let enrol = ["create", "--label", "backup", "--role", "enrol"];
    let client = Basic::of(&credential(&broker, "admin", &enrol));
    client.create(&keys(&broker), "ada", NAME).await.unwrap();
    let (site, _) = broker.stop();
    let document = |site: &Site| site.sql("SELECT CAST(document AS TEXT) FROM clients");
    assert!(
        document(&site).contains("m=19456,t=2,p=1"),
        "{}",
        document(&site)
    );
    configure(
        &site,
        "[client_credentials]\ngrantable_roles = [\"enrol\"]\nargon2_memory_kib = 24576",
    );
    let broker = Broker::start_on(site);
    client.create(&keys(&broker), "bob", NAME).await.unwrap();
    until("the better hash", || {
        let improved = broker
            .site
            .sql("SELECT CAST(document AS TEXT) FROM clients");
        improved.contains("m=24576,t=2,p=1").then_some(())
    });
    // It is the hash of the same secret, and the token vouches for it.
    let (site, _) = broker.stop();
    let broker = Broker::start_on(site);
    client.create(&keys(&broker), "carl", NAME).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_line_keeps_and_uses_secrets_in_files() {
    let broker = Broker::start_on(site(GRANT_RELEASE));
    let folder = broker.site.folder();
    let path = folder.join("client-secret");
    let file = path.to_str().unwrap();
    let create = [
        "create",
        "--label",
        "backup",
        "--role",
        "enrol",
        "--secret-file",
        file,
    ];
    let made = credential(&broker, "admin", &create);
    assert!(made["secret"].is_null(), "{made}");
    assert_eq!(made["secret_file"], file);
    let id = made["id"].as_str().unwrap().to_owned();
    let secret = fs::read_to_string(&path).unwrap();
    never_in_a_log(secret.as_bytes());
    assert!(secret.starts_with("kbs_"), "not a secret");
    assert_eq!(
        fs::metadata(&path).unwrap().permissions().mode() & 0o777,
        0o600
    );
    // Not made at all when it has nowhere to go.
    let again = command(&broker, "client-credential", Some("admin"), &create);
    assert_eq!(again.code, Some(2), "{again:#?}");
    let listed = credential(&broker, "auditor", &["list"]);
    assert_eq!(listed.as_array().unwrap().len(), 1);

    let material = folder.join("material");
    fs::write(&material, MATERIAL).unwrap();
    let enrol = |user: &str| {
        let key = [
            "create",
            "--user",
            user,
            "--material-file",
            material.to_str().unwrap(),
        ];
        let who = ["--client-id", &id, "--client-secret-file", file];
        let arguments: Vec<String> = [&who[..], &key]
            .concat()
            .into_iter()
            .map(str::to_owned)
            .collect();
        arguments
    };
    let run = |certificate, user: &str| {
        let arguments = enrol(user);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        command(&broker, "client", certificate, &arguments)
    };
    // Without a certificate, and in the place of one that may not.
    for (certificate, user) in [(None, "ada"), (Some("releaser"), "bob")] {
        let finished = run(certificate, user);
        assert_eq!(finished.code, Some(0), "{finished:#?}");
    }
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
    let open = run(None, "carl");
    assert_eq!(open.code, Some(2), "{open:#?}");
    assert!(open.stderr.contains("other users can read it"), "{open:#?}");
    let nobody = command(&broker, "client", None, &["get", "--user", "ada"]);
    assert_eq!(nobody.code, Some(10), "{nobody:#?}");
    assert!(
        nobody.stderr.starts_with("error: CREDENTIAL: "),
        "{nobody:#?}"
    );
    let health = command(&broker, "client", None, &["health"]);
    assert_eq!(health.code, Some(0), "{health:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_shows_the_secret_on_a_line_of_its_own() {
    let broker = Broker::start_on(site(GRANT_ENROL));
    let enrol = ["create", "--label", "backup", "--role", "enrol"];
    let table = command(&broker, "client-credential", Some("admin"), &enrol);
    let line = table.stdout.lines().last().unwrap();
    let shown = line.strip_prefix("SECRET, shown only once: ").unwrap();
    never_in_a_log(shown.as_bytes());
    assert!(shown.starts_with("kbs_") && shown.len() == 47, "{shown}");
}

/// A row that does not decode, one that was altered, and a note of a use that does not decode: a list names the rows, raises an
/// alert and shows the other clients.
#[tokio::test(flavor = "multi_thread")]
async fn damaged_clients_are_listed_and_hide_no_others() {
    let site = site(GRANT_ENROL);
    let broker = Broker::start_on(site);
    let enrol = ["create", "--label", "backup", "--role", "enrol"];
    let made = || Basic::of(&credential(&broker, "admin", &enrol));
    let (altered, cut, unreadable, good) = (made(), made(), made(), made());
    good.create(&keys(&broker), "ada", NAME).await.unwrap();
    let (site, _) = broker.stop();
    site.sql(&format!(
        r#"PRAGMA ignore_check_constraints = ON;
           UPDATE clients SET document = CAST(replace(CAST(document AS TEXT), '["enrol"]', '["release","enrol"]') AS BLOB)
               WHERE client_id = x'{}';
           UPDATE clients SET mac = x'01' WHERE client_id = x'{}';
           UPDATE clients SET document = CAST('{{' AS BLOB) WHERE client_id = x'{}';
           INSERT INTO client_uses VALUES (x'{}', -1, 7);"#,
        altered.id, cut.id, unreadable.id, good.id
    ));
    let broker = Broker::start_on(site);
    let mut expected = [
        (altered.id, "mac-refused"),
        (cut.id, "unreadable"),
        (unreadable.id, "unreadable"),
    ];
    expected.sort();
    for size in ["1", "3", "100"] {
        let listed = credential(&broker, "auditor", &["list", "--all", "--page-size", size]);
        let rows = listed.as_array().unwrap();
        let mut damaged = Vec::new();
        for row in rows {
            if let Some(problem) = row["problem"].as_str() {
                damaged.push((row["id"].as_str().unwrap().to_owned(), problem));
            } else {
                assert_eq!(row["id"].as_str(), Some(&good.id[..]));
                assert_eq!(row["verified"], true);
            }
        }
        damaged.sort();
        assert_eq!((rows.len(), &damaged[..]), (4, &expected[..]), "{size}");
    }
    let log = broker.site.log();
    assert!(log.contains("client-damaged"), "no alert: {log}");
}
