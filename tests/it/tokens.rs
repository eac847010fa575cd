//! Bearer tokens at the real broker, with an identity service on loopback: who they are, what they reach, and every bad one.

use std::{fmt::Write as _, process::Command, sync::Arc};

use serde_json::{Value, json};
use tonic::{Request, Status, metadata::MetadataValue};

use keybroker_proto::{
    CreateUserKeyRequest, ListUserKeysRequest, ListWrappingKeysRequest, ReplaceUserKeyRequest,
    UnwrapUserKeyRequest, control_service_client::ControlServiceClient,
    user_key_service_client::UserKeyServiceClient,
};

use crate::{
    client::{Caller, NAME, channel, eventually, refused},
    identity::{Identity, Options as IdentityOptions, now, user},
    process::{Broker, until},
    sealed::make_sealed_key,
    site::{Finished, Options, Site},
    softhsm::write_private,
    wire::get,
};

pub(crate) const ADA: &str = "4c2f1f2e-6d0b-4d9c-9b55-3f6a8f1e7d10";
pub(crate) const BOB: &str = "9b1deb4d-3b7d-4bad-9bdd-2b0d7b3dcb6d";
const MATERIAL: &[u8] = b"material of this user";

/// A site that believes an identity service, over connections with and without certificates.
pub(crate) fn site(service: &Identity, lines: &str) -> Arc<Site> {
    believing(Site::fresh(options()), service, lines)
}

fn options() -> Options {
    // No table of bad tokens fits into the budget of one address.
    Options {
        limits: "[rates]\nfailures_per_minute = 100000\nuser_calls_per_minute = 100000".to_owned(),
        ..Options::default()
    }
}

fn believing(site: Site, service: &Identity, lines: &str) -> Arc<Site> {
    site.write_configuration(|text| {
        let apis = "apis = [\"grpc\", \"admin\"]";
        let optional = format!("{apis}\nclient_certificates = \"optional\"");
        *text = text.replace(apis, &optional);
        let issuer = service.issuer();
        write!(
            text,
            "\n[[issuer]]\nname = \"vault\"\nissuer = \"{issuer}\"\nprofile = \"bitwarden\"\nallow_http = true\n{lines}\n"
        )
        .unwrap();
    });
    Arc::new(site)
}

/// A broker on such a site, that has its keys.
pub(crate) fn start(service: &Identity, lines: &str) -> Broker {
    start_on(site(service, lines))
}

/// A broker whose only wrapping key is a sealed one.
pub(crate) fn start_sealed(service: &Identity, lines: &str) -> Broker {
    start_on(sealed_site(service, lines))
}

/// A broker whose only wrapping key is a sealed one, with more lines for the `[rates]` section.
pub(crate) fn start_sealed_with(service: &Identity, rates: &str, lines: &str) -> Broker {
    start_on(sealed_site_with(service, rates, |_| lines.to_owned()))
}

/// The same, with lines that name files of the site.
pub(crate) fn start_sealed_on(service: &Identity, lines: impl FnOnce(&Site) -> String) -> Broker {
    start_on(sealed_site_with(service, "", lines))
}

/// A site whose only wrapping key is a sealed one.
pub(crate) fn sealed_site(service: &Identity, lines: &str) -> Arc<Site> {
    sealed_site_with(service, "", |_| lines.to_owned())
}

fn sealed_site_with(
    service: &Identity,
    rates: &str,
    lines: impl FnOnce(&Site) -> String,
) -> Arc<Site> {
    let mut options = options();
    write!(options.limits, "\n{rates}").unwrap();
    let site = Site::without_keys(options);
    site.expect_ok(&["store", "migrate"]);
    make_sealed_key(&site);
    let lines = lines(&site);
    believing(site, service, &lines)
}

/// A broker on a site that can have been used before, once this run of the broker has the keys of the issuer.
pub(crate) fn start_on(site: Arc<Site>) -> Broker {
    start_as(site, Site::serve)
}

/// Like [`start_on`], by another command than [`Site::serve`].
pub(crate) fn start_as(site: Arc<Site>, command: impl FnOnce(&Site) -> Command) -> Broker {
    // The log has the lines of all runs.
    let key_sets = |site: &Site| site.log().matches("key set taken over").count();
    let before = key_sets(&site);
    let broker = Broker::start_as(site, command);
    until("the key set", || {
        (key_sets(&broker.site) > before).then_some(())
    });
    broker
}

/// Calls with these `authorization` headers, over a connection with that certificate or none.
pub(crate) struct Holder {
    keys: UserKeyServiceClient<tonic::transport::Channel>,
    pub(crate) control: ControlServiceClient<tonic::transport::Channel>,
    headers: Vec<String>,
}

impl Holder {
    pub(crate) fn of(broker: &Broker, token: &str) -> Self {
        Self::presenting(broker, None, &[&format!("Bearer {token}")])
    }

    fn presenting(broker: &Broker, certificate: Option<&str>, headers: &[&str]) -> Self {
        let channel = channel(&broker.site.pki, certificate, broker.grpc);
        Self {
            keys: UserKeyServiceClient::new(channel.clone()),
            control: ControlServiceClient::new(channel),
            headers: headers.iter().map(ToString::to_string).collect(),
        }
    }

    pub(crate) fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        for header in &self.headers {
            let value: MetadataValue<_> = header.parse().unwrap();
            request.metadata_mut().append("authorization", value);
        }
        request
    }

    pub(crate) async fn create(&self, user: &str) -> Result<(), Status> {
        let request = self.request(CreateUserKeyRequest {
            user: user.to_owned(),
            key_name: NAME.to_owned(),
            key_material: MATERIAL.to_vec(),
            request_id: String::new(),
        });
        self.keys.clone().create_user_key(request).await.map(drop)
    }

    pub(crate) async fn replace(&self, user: &str, expected_revision: u64) -> Result<(), Status> {
        let request = self.request(ReplaceUserKeyRequest {
            user: user.to_owned(),
            key_name: NAME.to_owned(),
            key_material: MATERIAL.to_vec(),
            expected_revision,
            request_id: String::new(),
        });
        self.keys.clone().replace_user_key(request).await.map(drop)
    }

    pub(crate) async fn unwrap(&self, user: &str) -> Result<Vec<u8>, Status> {
        let request = self.request(UnwrapUserKeyRequest {
            user: user.to_owned(),
            key_name: NAME.to_owned(),
            recipient: None,
        });
        let answer = self.keys.clone().unwrap_user_key(request).await?;
        Ok(answer.into_inner().key_material)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_reaches_only_their_own_keys() {
    let service = Identity::start(IdentityOptions::default());
    let broker = start(&service, "");
    let ada = Holder::of(&broker, &service.user_token(ADA));
    let bob = Holder::of(&broker, &service.user_token(BOB));
    ada.create(ADA).await.unwrap();
    assert_eq!(ada.unwrap(ADA).await.unwrap(), MATERIAL);
    bob.create(BOB).await.unwrap();

    // A token that is replayed by another user, or for another one.
    refused(ada.unwrap(BOB).await, "POLICY");
    refused(bob.unwrap(ADA).await, "POLICY");
    refused(ada.create(BOB).await, "POLICY");
    refused(ada.unwrap("nobody").await, "POLICY");
    let all = ada.request(ListUserKeysRequest::default());
    refused(ada.keys.clone().list_user_keys(all).await, "POLICY");
    let control = ada.request(ListWrappingKeysRequest {});
    refused(
        ada.control.clone().list_wrapping_keys(control).await,
        "POLICY",
    );

    // The same key for a service with a certificate that may release it.
    let key = Caller::of(&broker, "releaser").unwrap(ADA).await.unwrap();
    assert_eq!(key.key_material, MATERIAL);
    // The audit log names who asked, and neither log shows a token.
    let audit = broker.site.audit();
    assert!(audit.contains(&format!("token:vault:{ADA}")), "{audit}");
    for header in ada.headers.iter().chain(&bob.headers) {
        let signature = header.rsplit('.').next().unwrap();
        assert!(!broker.site.log().contains(signature));
        assert!(!audit.contains(signature));
    }
}

/// The metric of refused tokens counts the cause.
pub(crate) fn assert_is_counted(broker: &Broker, cause: &str) {
    let counted = get(broker.status, "/metrics");
    let label = format!("cause=\"{cause}\"");
    let lines = counted
        .lines()
        .filter(|line| line.starts_with("keybroker_access_token_refusals_total"));
    let is_counted = |line: &str| line.contains(&label) && !line.ends_with(" 0");
    assert!(
        lines.clone().any(is_counted),
        "{cause}: {:?}",
        lines.collect::<Vec<_>>()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn every_bad_token_is_credential_and_no_more() {
    let service = Identity::start(IdentityOptions::default());
    let broker = start(&service, "audience = [\"keybroker\"]");
    let minted = |claims: Value, header: Value| {
        let mut full = user(ADA);
        full["aud"] = json!("keybroker");
        for (name, value) in claims.as_object().unwrap() {
            full[name] = value.clone();
        }
        service.mint(full, header)
    };
    let claims = |claims: Value| minted(claims, json!({}));
    let header = |header: Value| minted(json!({}), header);
    let good = claims(json!({}));
    Holder::of(&broker, &good).create(ADA).await.unwrap();
    let bobs = claims(json!({"sub": BOB}));
    let [parts, others] = [&good, &bobs].map(|token| token.split('.').collect::<Vec<_>>());
    let tampered = [parts[0], others[1], parts[2]].join(".");
    let oversized = claims(json!({"pad": "x".repeat(14_000)}));

    let bad = [
        ("expired", claims(json!({"exp": now() - 60}))),
        ("not-yet-valid", claims(json!({"nbf": now() + 90}))),
        ("issuer", claims(json!({"iss": "https://other.example"}))),
        ("audience", claims(json!({"aud": "other"}))),
        ("scope", claims(json!({"scope": "offline_access"}))),
        ("claim", claims(json!({"amr": null}))),
        ("subject", claims(json!({"sub": "ada"}))),
        (
            "kid",
            minted(json!({"iat": now() - 600}), json!({"kid": "nobody's"})),
        ),
        ("algorithm", header(json!({"alg": "none"}))),
        ("algorithm", header(json!({"alg": "HS256"}))),
        ("header", header(json!({"jku": service.url()}))),
        ("header", header(json!({"jwk": service.jwks()["keys"][0]}))),
        ("type", header(json!({"typ": "JWT"}))),
        ("malformed", "nonsense".to_owned()),
        ("signature", tampered),
    ];
    for (cause, token) in &bad {
        let status = refused(Holder::of(&broker, token).unwrap(ADA).await, "CREDENTIAL");
        let message = status.message();
        assert!(
            message.starts_with("no accepted credential (call "),
            "{cause}: {message}"
        );
        assert_is_counted(&broker, cause);
    }
    refused(
        Holder::of(&broker, &oversized).unwrap(ADA).await,
        "CREDENTIAL",
    );
    // None of it was of any consequence.
    assert_eq!(
        Holder::of(&broker, &good).unwrap(ADA).await.unwrap(),
        MATERIAL
    );
    let log = broker.site.log();
    for words in [
        "`exp` has passed",
        "`aud` contains none",
        "which is not a GUID",
        "does not trust keys that an access token itself contains",
    ] {
        assert!(log.contains(words), "{words}");
    }
}

/// A header stands in the place of the certificate, also when it is worth nothing.
#[tokio::test(flavor = "multi_thread")]
async fn one_header_is_one_credential() {
    let service = Identity::start(IdentityOptions::default());
    let broker = start(&service, "");
    Caller::of(&broker, "enroller")
        .create(ADA, MATERIAL)
        .await
        .unwrap();
    let token = service.user_token(ADA);
    let (bearer, lower) = (format!("Bearer {token}"), format!("bearer {token}"));
    for headers in [&[bearer.as_str()][..], &[&lower]] {
        for certificate in [None, Some("admin"), Some("releaser")] {
            let holder = Holder::presenting(&broker, certificate, headers);
            assert_eq!(holder.unwrap(ADA).await.unwrap(), MATERIAL);
            refused(holder.unwrap(BOB).await, "POLICY");
        }
    }
    for headers in [
        &[bearer.as_str(), &bearer][..],
        &[&bearer, ""],
        &[""],
        &[" "],
        &["Bearer"],
        &["Bearer "],
        &[&token],
        &["Digest x"],
        &["Basic bm9ib2R5Om5vdGhpbmc="],
    ] {
        for certificate in [None, Some("releaser")] {
            let holder = Holder::presenting(&broker, certificate, headers);
            refused(holder.unwrap(ADA).await, "CREDENTIAL");
        }
    }
    refused(
        Holder::presenting(&broker, None, &[]).unwrap(ADA).await,
        "CREDENTIAL",
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_provider_may_be_down_at_the_start_and_change_its_key() {
    let mut service = Identity::start(IdentityOptions::default());
    service.stop();
    let broker = Broker::start_on(site(&service, ""));
    // Certificates do not wait for it.
    Caller::of(&broker, "enroller")
        .create(ADA, MATERIAL)
        .await
        .unwrap();
    let old = Holder::of(&broker, &service.user_token(ADA));
    refused(old.unwrap(ADA).await, "IDENTITY_DOWN");
    until("the alert", || {
        broker.site.log().contains("issuer-keys").then_some(())
    });
    service.resume();
    assert_eq!(eventually(|| old.unwrap(ADA)).await, MATERIAL);

    service.rotate_key();
    let new = Holder::of(&broker, &service.user_token(ADA));
    assert_eq!(new.unwrap(ADA).await.unwrap(), MATERIAL);
    // The set that was fetched for the new key does not have the old one, and it may be an outdated copy.
    refused(old.unwrap(ADA).await, "IDENTITY_DOWN");
    service.stop();
    let another = Holder::of(&broker, &service.user_token(BOB));
    refused(another.unwrap(BOB).await, "KEY_NOT_FOUND");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_line_shows_a_token_from_a_file() {
    let service = Identity::start(IdentityOptions::default());
    let broker = start(&service, "");
    let ada = Holder::of(&broker, &service.user_token(ADA));
    ada.create(ADA).await.unwrap();
    let file = broker.site.folder().join("token");
    write_private(&file, &format!("{}\n", service.user_token(ADA)));
    let unwrap = |user: &str| {
        let output = Command::new(env!("CARGO_BIN_EXE_keybroker"))
            .args(["client", "--endpoint"])
            .arg(format!("https://localhost:{}", broker.grpc.port()))
            .arg("--ca")
            .arg(broker.site.pki.ca_file())
            .arg("--token-file")
            .arg(&file)
            .args(["unwrap", "--user", user, "--key-name", NAME])
            .output();
        Finished::from(output.unwrap())
    };
    let own = unwrap(ADA);
    assert_eq!(own.code, Some(0), "{own:#?}");
    assert_eq!(own.stdout.as_bytes(), MATERIAL);
    let others = unwrap(BOB);
    assert_eq!(others.code, Some(10), "{others:#?}");
    assert!(others.stderr.starts_with("error: POLICY: "), "{others:#?}");
}
