//! Tests every kind of bad access token, and every state of a provider, against a real identity service on loopback.

use std::fmt::Write as _;

use aws_lc_rs::{
    rand::SystemRandom,
    signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair as _},
};
use base64ct::{Base64UrlUnpadded, Encoding as _};
use serde_json::json;

use keybroker_core::{
    error::Reason,
    key::UserId,
    principal::{Kind, Role},
};
use keybroker_test_support::identity::{Answer, DISCOVERY, Identity, JWKS, Options, now, user};

use super::*;

mod provider;

const ADA: &str = "4c2f1f2e-6d0b-4d9c-9b55-3f6a8f1e7d10";

/// The tests must not wait for the real intervals.
fn quick(_: &Settings) -> Pace {
    Pace {
        refetch: Duration::from_mins(1),
        refresh: Duration::from_mins(15),
        retry_first: Duration::from_millis(10),
        retry_last: Duration::from_millis(50),
        keep: Duration::from_hours(1),
        look: Duration::from_millis(20),
        published_within: Duration::from_mins(5),
    }
}

/// The configuration of an issuer for Bitwarden, with additional lines.
fn settings(service: &Identity, lines: &str) -> Settings {
    let mut text = format!(
        "name = \"vault\"\nissuer = \"{}\"\nprofile = \"bitwarden\"\n",
        service.issuer()
    );
    for line in lines.lines() {
        writeln!(text, "{line}").unwrap();
    }
    if !lines.contains("_file") && !lines.contains("allow_http") {
        text.push_str("allow_http = true\n");
    }
    toml::from_str(&text).unwrap()
}

/// The same with tables, which must come last.
fn mapped_settings(service: &Identity, tables: &str) -> Settings {
    settings(service, &format!("allow_http = true\n{tables}"))
}

struct Running {
    tokens: Arc<Tokens>,
    stop: CancellationToken,
}

impl Running {
    fn with(settings: &[Settings], pace: impl Fn(&Settings) -> Pace) -> Self {
        let tokens = Arc::new(Tokens::paced(settings, pace).unwrap());
        let stop = CancellationToken::new();
        tokio::spawn(Arc::clone(&tokens).refresh(stop.clone()));
        Self { tokens, stop }
    }

    /// Waits until the first key set is available.
    async fn ready(service: &Identity, lines: &str) -> Self {
        let running = Self::with(&[settings(service, lines)], quick);
        let is_ready = |tokens: &Tokens| tokens.issuers[0].keys.current().is_ok();
        running.until(is_ready).await;
        running
    }

    async fn until(&self, is_so: impl Fn(&Tokens) -> bool) {
        for _ in 0..500 {
            if is_so(&self.tokens) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("not so after five seconds");
    }

    async fn accepted(&self, token: &str) -> Arc<Principal> {
        self.tokens.verify(token.as_bytes()).await.unwrap()
    }

    /// Expects that the access token can be verified only later.
    async fn undecided(&self, token: &str, words: &str) {
        let error = self.tokens.verify(token.as_bytes()).await.unwrap_err();
        assert_eq!(error.reason(), Reason::IdentityDown);
        assert_eq!(error.retry_delay(), Some(Duration::from_secs(2)));
        assert!(!error.is_failed_attempt());
        assert!(error.detail().contains(words), "{words}: {error}");
    }

    /// Expects that the access token is not rejected, because the issuer may have a newer key that cannot be looked up
    /// yet. The attempt counts as failed if signatures were checked.
    async fn postponed(&self, token: &str, words: &str, counts: bool) {
        let error = self.tokens.verify(token.as_bytes()).await.unwrap_err();
        assert_eq!(error.reason(), Reason::IdentityDown, "{error}");
        assert_eq!(error.is_failed_attempt(), counts, "{error}");
        let wait = error.retry_delay().unwrap();
        assert!((1..=60).contains(&wait.as_secs()), "{wait:?}");
        assert!(error.detail().contains(words), "{words}: {error}");
    }

    async fn refused(&self, token: &str, words: &str) {
        let error = self.tokens.verify(token.as_bytes()).await.unwrap_err();
        assert_eq!(error.reason(), Reason::Credential);
        assert!(error.detail().contains(words), "{words}: {error}");
        let signature = token.rsplit('.').next().unwrap();
        assert!(
            signature.len() < 20 || !error.detail().contains(signature),
            "the log would show the token"
        );
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

#[tokio::test]
async fn a_good_token_is_its_user() {
    let service = Identity::start(Options::default());
    let running = Running::ready(&service, "").await;
    let principal = running
        .accepted(&service.user_token(&ADA.to_uppercase()))
        .await;
    let identity = principal.identity();
    assert_eq!(identity.name, format!("token:vault:{ADA}"));
    assert_eq!(identity.kind, Kind::User);
    assert_eq!(identity.subject, Some(UserId::parse(ADA).unwrap()));
    assert!(identity.roles.is_empty());
    assert!(identity.claims.amr.contains("external"));
    assert_eq!(identity.claims.organisations.len(), 1);
    assert!(identity.claims.device.is_some());
    assert!(identity.claims.authenticated.is_some());
    assert!(identity.claims.attributes["email"].contains("user@example.org"));
    assert!(identity.claims.attributes["email_verified"].contains("true"));
    assert!(identity.claims.expires.unwrap() > Timestamp::now());
}

#[tokio::test]
async fn scope_and_amr_may_be_lists_or_text() {
    let service = Identity::start(Options::default());
    let running = Running::ready(&service, "").await;
    for (scope, amr) in [
        (json!(["api", "offline_access"]), json!(["Application"])),
        (json!("api"), json!("Application")),
        (json!("offline_access  api"), json!("external")),
        (json!(["offline_access api"]), json!(["mfa", "external"])),
    ] {
        let claims = json!({"sub": ADA, "scope": scope, "amr": amr});
        running.accepted(&service.mint(claims, json!({}))).await;
    }
}

/// Each bad access token with its description and words that the log must contain.
#[expect(clippy::too_many_lines, reason = "a table")]
fn bad_tokens(service: &Identity) -> Vec<(&'static str, String, &'static str)> {
    let minted = |claims: Value, header: Value| {
        let mut full = user(ADA);
        for (name, value) in claims.as_object().unwrap() {
            full[name] = value.clone();
        }
        service.mint(full, header)
    };
    let claims = |claims: Value| minted(claims, json!({}));
    let header = |header: Value| minted(json!({}), header);
    let foreign = Identity::start(Options {
        issuer: Some(service.issuer().to_owned()),
        ..Options::default()
    });
    let own_key = foreign.jwks()["keys"][0].clone();
    let good = service.user_token(ADA);
    let parts: Vec<&str> = good.split('.').collect();
    let other = service.user_token("00000000-0000-4000-8000-00000000000b");
    let others: Vec<&str> = other.split('.').collect();
    vec![
        (
            "expired",
            claims(json!({"exp": now() - 31})),
            "`exp` has passed",
        ),
        ("no exp", claims(json!({"exp": null})), "no `exp`"),
        ("exp as text", claims(json!({"exp": "never"})), "no `exp`"),
        (
            "exp as text of a number",
            claims(json!({"exp": "99999999999"})),
            "no `exp`",
        ),
        ("not yet valid", claims(json!({"nbf": now() + 60})), "`nbf`"),
        (
            "issued in the future",
            claims(json!({"iat": now() + 60})),
            "`iat`",
        ),
        ("iat as text", claims(json!({"iat": "x"})), "`iat`"),
        (
            "other issuer",
            claims(json!({"iss": "http://other.example"})),
            "no [[issuer]] has",
        ),
        ("no issuer", claims(json!({"iss": null})), "no `iss`"),
        (
            "issuer as list",
            claims(json!({"iss": [service.issuer()]})),
            "no `iss`",
        ),
        (
            "issuer with a slash",
            claims(json!({"iss": format!("{}/", service.issuer())})),
            "no [[issuer]]",
        ),
        (
            "wrong scope",
            claims(json!({"scope": ["api.push"]})),
            "`scope` lacks",
        ),
        (
            "scope in a word",
            claims(json!({"scope": "apiary"})),
            "`scope` lacks",
        ),
        ("no scope", claims(json!({"scope": null})), "`scope` lacks"),
        ("wrong amr", claims(json!({"amr": ["none"]})), "`amr` is"),
        ("no amr", claims(json!({"amr": null})), "no `amr`"),
        (
            "amr as object",
            claims(json!({"amr": {"external": true}})),
            "no `amr`",
        ),
        ("no sub", claims(json!({"sub": null})), "no `sub`"),
        (
            "sub not a GUID",
            claims(json!({"sub": "ada"})),
            "not a GUID",
        ),
        (
            "sub nil",
            claims(json!({"sub": "00000000-0000-0000-0000-000000000000"})),
            "not a GUID",
        ),
        ("sub as number", claims(json!({"sub": 7})), "no `sub`"),
        (
            "unknown kid",
            minted(json!({"iat": now() - 600}), json!({"kid": "nobody's"})),
            "none of [\"key-1\"]",
        ),
        (
            "kid not text",
            header(json!({"kid": 1})),
            "`kid` is not a string",
        ),
        (
            "alg none",
            header(json!({"alg": "none"})),
            "`alg` is \"none\"",
        ),
        (
            "alg None",
            header(json!({"alg": "None"})),
            "`alg` is \"None\"",
        ),
        ("no alg", header(json!({"alg": null})), "`alg` is \"\""),
        (
            "HS256 with the public key",
            header(json!({"alg": "HS256"})),
            "`alg` is \"HS256\"",
        ),
        (
            "alg that is not allowed",
            header(json!({"alg": "RS512"})),
            "`alg` is \"RS512\"",
        ),
        (
            "other typ",
            header(json!({"typ": "JWT"})),
            "`typ` is \"JWT\"",
        ),
        ("no typ", header(json!({"typ": null})), "`typ` is \"\""),
        (
            "jku",
            header(json!({"jku": format!("{}{JWKS}", foreign.url())})),
            "`jku`",
        ),
        ("jwk", header(json!({"jwk": own_key})), "`jwk`"),
        ("x5u", header(json!({"x5u": foreign.url()})), "`x5u`"),
        ("x5c", header(json!({"x5c": ["MIIB"]})), "`x5c`"),
        (
            "crit",
            header(json!({"crit": ["b64"], "b64": false})),
            "`crit`",
        ),
        (
            "other key of that name",
            foreign.user_token(ADA),
            "signature does not verify",
        ),
        (
            "payload of another",
            [parts[0], others[1], parts[2]].join("."),
            "signature does not verify",
        ),
        (
            "signature of another",
            [parts[0], parts[1], others[2]].join("."),
            "signature does not verify",
        ),
        (
            "no signature",
            [parts[0], parts[1], ""].join("."),
            "signature does not verify",
        ),
        ("two parts", [parts[0], parts[1]].join("."), "2 parts"),
        ("five parts", format!("{good}.x.y"), "5 parts"),
        (
            "padding",
            [parts[0], &format!("{}==", parts[1]), parts[2]].join("."),
            "payload is not",
        ),
        ("no token", String::new(), "1 parts"),
        (
            "oversized",
            claims(json!({"pad": "x".repeat(TOKEN_BYTES_MAX)})),
            "the access token is too long",
        ),
    ]
}

#[tokio::test]
async fn every_bad_token_is_refused_for_its_reason() {
    let service = Identity::start(Options::default());
    let running = Running::ready(&service, "").await;
    // A valid access token from the same service is accepted.
    running.accepted(&service.user_token(ADA)).await;
    for (what, token, words) in bad_tokens(&service) {
        eprintln!("{what}");
        running.refused(&token, words).await;
    }
    running.accepted(&service.user_token(ADA)).await;
}

/// The messages about an ID token name the ID token, and quote the values of its claims as they are.
#[tokio::test]
async fn messages_about_an_id_token_keep_the_values_of_its_claims() {
    let service = Identity::start(Options::default());
    let running = Running::ready(&service, "").await;
    let id_tokens = running.tokens.id_tokens("vault", "page").unwrap();
    let verified = async |edit: Value| {
        let mut claims = user(ADA);
        claims["aud"] = json!("page");
        claims["nonce"] = json!("n");
        let more = edit.as_object().unwrap().clone();
        claims.as_object_mut().unwrap().extend(more);
        let token = service.mint(claims, json!({"typ": "JWT"}));
        id_tokens.verify(token.as_bytes(), "n").await
    };
    verified(json!({})).await.unwrap();
    for (edit, words) in [
        (
            json!({"azp": "the access token page"}),
            "the `azp` is \"the access token page\", which is another client",
        ),
        (json!({"exp": null}), "the ID token has no `exp`"),
        (json!({"amr": null}), "the ID token has no `amr`"),
        (
            json!({"iat": null, "exp": u32::MAX}),
            "the ID token has no `iat`",
        ),
        (
            json!({"exp": now() - 31}),
            "the `exp` of the ID token has passed",
        ),
    ] {
        let error = verified(edit).await.unwrap_err();
        let detail = error.detail();
        assert!(
            detail.starts_with("ID token of the issuer \"vault\" refused: "),
            "{detail}"
        );
        assert!(detail.contains(words), "{words}: {detail}");
    }
    let error = id_tokens.verify(b"one.two", "n").await.unwrap_err();
    let words = "the ID token has 2 parts";
    assert!(error.detail().contains(words), "{error}");
}

/// An expired access token is reported as renewable only if a renewed access token would be
/// accepted. Everything except the time is verified first. Otherwise a caller could send an access
/// token for another service without limit, because such an access token never counts as a failure.
#[tokio::test]
async fn only_a_token_whose_one_fault_is_its_age_is_renewable() {
    let service = Identity::start(Options::default());
    let running = Running::ready(&service, "audience = [\"keybroker\"]").await;
    let foreign = Identity::start(Options {
        issuer: Some(service.issuer().to_owned()),
        ..Options::default()
    });
    let expired = |signer: &Identity, edit: Value| {
        let mut claims = user(ADA);
        let base = json!({"aud": "keybroker", "iat": now() - 7_200, "nbf": now() - 7_200, "exp": now() - 3_600});
        for more in [base, edit] {
            let more = more.as_object().unwrap().clone();
            claims.as_object_mut().unwrap().extend(more);
        }
        signer.mint(claims, json!({}))
    };
    let renewable = async |token: String| {
        let error = running.tokens.verify(token.as_bytes()).await.unwrap_err();
        assert_eq!(error.reason(), Reason::Credential);
        (error.is_renewable(), error.detail().to_owned())
    };
    let (is_renewable, detail) = renewable(expired(&service, json!({}))).await;
    assert!(
        is_renewable && detail.contains("`exp` has passed"),
        "{detail}"
    );
    for (edit, words) in [
        (json!({"aud": "another service"}), "`aud`"),
        (json!({"aud": null}), "`aud`"),
        (json!({"iss": "http://other.example"}), "no [[issuer]] has"),
        (json!({"nbf": now() + 3_600}), "`nbf`"),
        (json!({"iat": now() + 3_600}), "`iat`"),
        (json!({"iat": 0}), "token_lifetime_max_minutes"),
        (json!({"scope": ["api.push"]}), "`scope`"),
        (json!({"amr": ["none"]}), "`amr`"),
        (json!({"sub": "ada"}), "not a GUID"),
    ] {
        let (is_renewable, detail) = renewable(expired(&service, edit.clone())).await;
        assert!(!is_renewable && detail.contains(words), "{edit}: {detail}");
    }
    let (is_renewable, detail) = renewable(expired(&foreign, json!({}))).await;
    assert!(!is_renewable && detail.contains("signature"), "{detail}");
}

#[tokio::test]
async fn one_changed_byte_anywhere_is_refused() {
    let service = Identity::start(Options::default());
    let running = Running::ready(&service, "").await;
    let good = service.user_token(ADA);
    running.accepted(&good).await;
    for at in (0..good.len() - 1).step_by(7) {
        let mut bad = good.clone().into_bytes();
        bad[at] = if bad[at] == b'A' { b'B' } else { b'A' };
        // The last character of a part has unused bits.
        if bad == good.as_bytes() {
            continue;
        }
        assert!(running.tokens.verify(&bad).await.is_err(), "byte {at}");
    }
}

#[tokio::test]
async fn leeway_is_as_configured() {
    let service = Identity::start(Options::default());
    let running = Running::ready(&service, "leeway_s = 100").await;
    for claims in [
        json!({"exp": now() - 90}),
        json!({"nbf": now() + 90}),
        json!({"iat": now() + 90}),
    ] {
        let mut full = user(ADA);
        full.as_object_mut()
            .unwrap()
            .extend(claims.as_object().unwrap().clone());
        running.accepted(&service.mint(full, json!({}))).await;
    }
}

/// The access token of a user who is a member of 180 organisations, which are in one claim.
#[tokio::test]
async fn a_token_of_a_user_with_many_organisations_is_accepted_and_the_limit_is_named() {
    let service = Identity::start(Options::default());
    let running = Running::ready(&service, "").await;
    let with = |count: usize| {
        let mut claims = user(ADA);
        let organisations = (0..count).map(|n| json!(format!("b8a3c0de-5a55-4c52-9d3e-{n:012}")));
        claims["orguser"] = organisations.collect();
        service.mint(claims, json!({}))
    };
    let long = with(180);
    assert!(
        (9_000..TOKEN_BYTES_MAX).contains(&long.len()),
        "{}",
        long.len()
    );
    let principal = running.accepted(&long).await;
    assert_eq!(principal.identity().claims.organisations.len(), 180);
    let longer = with(400);
    let words = format!(
        "too long: {} bytes, but `limits.access_token_bytes_max` is 16384",
        longer.len()
    );
    running.refused(&longer, &words).await;
    let tokens = Tokens::paced(&[settings(&service, "")], quick).unwrap();
    let tokens = tokens.with_token_bytes_max(1_024);
    let refused = tokens.verify(long.as_bytes()).await.unwrap_err();
    assert!(refused.detail().contains("is 1024"), "{refused}");
}

#[tokio::test]
async fn a_token_that_lives_longer_than_its_issuers_may_is_refused() {
    let service = Identity::start(Options::default());
    let with = |edit: Value| {
        let mut claims = user(ADA);
        let more = edit.as_object().unwrap().clone();
        claims.as_object_mut().unwrap().extend(more);
        service.mint(claims, json!({}))
    };
    let day = 86_400;
    let running = Running::ready(&service, "").await;
    let good = json!({"iat": now(), "exp": now() + day});
    running.accepted(&with(good)).await;
    let long = json!({"iat": now() - 10, "exp": now() + day});
    running
        .refused(
            &with(long),
            "86410 s after the `iat`, but `token_lifetime_max_minutes`",
        )
        .await;
    let eternal = json!({"iat": null, "exp": u32::MAX});
    running
        .refused(&with(eternal), "the access token has no `iat`")
        .await;
    running
        .accepted(&with(json!({"iat": null, "exp": now() + day})))
        .await;
    let running = Running::ready(&service, "token_lifetime_max_minutes = 5").await;
    running
        .accepted(&with(json!({"iat": now() - 200, "exp": now() + 100})))
        .await;
    running
        .refused(
            &with(json!({"iat": now() - 200, "exp": now() + 101})),
            "is 5",
        )
        .await;
}

#[tokio::test]
async fn the_audience_is_looked_at_when_it_is_configured() {
    let service = Identity::start(Options::default());
    let running = Running::ready(&service, "audience = [\"keybroker\", \"keys\"]").await;
    let with = |audience: Value| {
        let mut claims = user(ADA);
        claims["aud"] = audience;
        service.mint(claims, json!({}))
    };
    running.accepted(&with(json!("keybroker"))).await;
    running.accepted(&with(json!(["other", "keys"]))).await;
    running
        .refused(&with(json!("other")), "`aud` contains none")
        .await;
    running
        .refused(&with(json!([])), "`aud` contains none")
        .await;
    running.refused(&with(json!({"keys": 1})), "no `aud`").await;
    running.refused(&service.user_token(ADA), "no `aud`").await;
}

#[tokio::test]
async fn a_service_has_the_roles_of_its_issuer_and_no_keys_of_its_own() {
    let service = Identity::start(Options::default());
    let lines = "kind = \"service\"\nroles = [\"release\"]\nusers = [\"ada\"]\nsubject = \"text\"\n\
                 required_claims = { sub = [\"backup\"] }\nattributes = { azp = \"application\" }";
    let running = Running::ready(&service, lines).await;
    let claims = json!({"sub": "backup", "scope": "api", "azp": "nightly"});
    let principal = running.accepted(&service.mint(claims, json!({}))).await;
    assert!(principal.has(Role::Release) && principal.subject().is_none());
    assert!(
        !principal
            .identity()
            .users
            .contains(&UserId::parse("bob").unwrap())
    );
    assert!(principal.identity().claims.attributes["application"].contains("nightly"));
    let other = json!({"sub": "other", "scope": "api"});
    running
        .refused(&service.mint(other, json!({})), "`sub` is \"other\"")
        .await;
}

/// The claim must identify one user for ever, so nothing but a string of a valid length is accepted.
#[tokio::test]
async fn another_claim_than_sub_can_identify_the_user() {
    let service = Identity::start(Options::default());
    let lines = "subject = \"text\"\nsubject_claim = [\"https://example.org/ids\", \"user.id\"]";
    let running = Running::ready(&service, lines).await;
    let with = |id: Value| {
        let mut claims = user(ADA);
        claims["https://example.org/ids"] = id;
        service.mint(claims, json!({}))
    };
    let principal = running
        .accepted(&with(json!({ "user.id": "Ada Lovelace" })))
        .await;
    assert_eq!(principal.name(), "token:vault:Ada Lovelace");
    assert_eq!(principal.subject().unwrap().as_str(), "Ada Lovelace");
    for (id, words) in [
        (json!(null), "is missing, but it must be a string"),
        (json!("ada"), "is missing"),
        (json!({ "user": { "id": "ada" } }), "is missing"),
        (json!({ "user.id": null }), "is missing"),
        (json!({ "user.id": ["ada"] }), "is a list"),
        (json!({ "user.id": { "id": "ada" } }), "is an object"),
        (json!({ "user.id": 7 }), "is a number"),
        (json!({ "user.id": true }), "is a boolean"),
        (json!({ "user.id": "" }), "1 to 255 bytes"),
        (json!({ "user.id": "a\nb" }), "without control characters"),
        (json!({ "user.id": "x".repeat(256) }), "1 to 255 bytes"),
    ] {
        running.refused(&with(id), words).await;
    }
    // The access token still needs a `sub`.
    let mut claims = user(ADA);
    claims["https://example.org/ids"] = json!({ "user.id": "ada" });
    claims["sub"] = Value::Null;
    running
        .refused(&service.mint(claims, json!({})), "no `sub`")
        .await;
}

/// Two access tokens of one principal have different claims. The broker remembers both, and each keeps its own roles.
#[tokio::test]
async fn a_remembered_token_keeps_the_roles_of_its_claims() {
    let service = Identity::start(Options::default());
    let lines = "[[mapping]]\nname = \"auditors\"\nwhen = [{ claim = \"groups\", any_of = [\"auditors\"] }]\nroles = [\"auditor\"]";
    let running = Running::with(&[mapped_settings(&service, lines)], quick);
    running
        .until(|tokens| tokens.issuers[0].keys.current().is_ok())
        .await;
    let mut claims = user(ADA);
    let member = service.mint(claims.clone(), json!({}));
    claims["groups"] = json!(["auditors"]);
    let auditor = service.mint(claims, json!({}));
    for _ in 0..2 {
        let one = running.accepted(&member).await;
        assert_eq!((one.kind(), one.mapping()), (Kind::User, None));
        let other = running.accepted(&auditor).await;
        assert_eq!(one.name(), other.name());
        assert_eq!(
            (other.kind(), other.mapping()),
            (Kind::Service, Some("auditors"))
        );
        assert!(other.has(Role::Auditor) && other.subject().is_none());
    }
}

#[tokio::test]
async fn each_allowed_algorithm_verifies_and_a_key_is_for_its_own() {
    let service = Identity::start(Options::default());
    // The key in the set has the `alg` RS256. The test removes the member `alg`, to test the other
    // algorithms.
    let mut set = service.jwks();
    set["keys"][0].as_object_mut().unwrap().remove("alg");
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("jwks");
    let elliptic = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).unwrap();
    let edwards = Ed25519KeyPair::generate().unwrap();
    let encode = Base64UrlUnpadded::encode_string;
    let point = elliptic.public_key().as_ref();
    let keys = set["keys"].as_array_mut().unwrap();
    keys.push(json!({"kty": "EC", "crv": "P-256", "kid": "ec", "x": encode(&point[1..33]), "y": encode(&point[33..])}));
    keys.push(json!({"kty": "OKP", "crv": "Ed25519", "kid": "ed", "x": encode(edwards.public_key().as_ref())}));
    // Keys for other purposes do not disturb the rest of the set.
    keys.push(json!({"kty": "oct", "kid": "shared", "k": "c2VjcmV0"}));
    keys.push(json!({"kty": "RSA", "kid": "enc", "use": "enc", "n": "x", "e": "AQAB"}));
    keys.push(json!("nonsense"));
    std::fs::write(&path, set.to_string()).unwrap();
    let lines = format!(
        "jwks_file = {path:?}\nalgorithms = [\"RS256\", \"RS384\", \"RS512\", \"PS256\", \"PS384\", \"PS512\", \"ES256\", \"EdDSA\"]"
    );
    let running = Running::ready(&service, &lines).await;
    for alg in ["RS256", "RS384", "RS512", "PS256", "PS384", "PS512"] {
        running
            .accepted(&service.mint(user(ADA), json!({"alg": alg})))
            .await;
    }
    let sign = |alg: &str, kid: &str| {
        let unsigned = service.mint(user(ADA), json!({"alg": alg, "kid": kid}));
        let message = unsigned.rsplit_once('.').unwrap().0.to_owned();
        let signature = match alg {
            "ES256" => {
                let made = elliptic.sign(&SystemRandom::new(), message.as_bytes());
                made.unwrap().as_ref().to_vec()
            }
            _ => edwards.sign(message.as_bytes()).as_ref().to_vec(),
        };
        format!("{message}.{}", encode(&signature))
    };
    running.accepted(&sign("ES256", "ec")).await;
    running.accepted(&sign("EdDSA", "ed")).await;
    running
        .refused(&sign("EdDSA", "ec"), "not the algorithm of the key")
        .await;
    running
        .refused(&sign("ES256", "key-1"), "not the algorithm of the key")
        .await;
    running
        .refused(
            &service.mint(user(ADA), json!({"kid": "shared"})),
            "none of",
        )
        .await;
    running
        .refused(&service.mint(user(ADA), json!({"kid": "enc"})), "none of")
        .await;
    // One of three kinds of keys matches.
    running
        .accepted(&service.mint(user(ADA), json!({"kid": null})))
        .await;
}

#[tokio::test]
async fn a_verified_token_is_remembered_until_it_expires() {
    let service = Identity::start(Options::default());
    let running = Running::ready(&service, "leeway_s = 0").await;
    let mut claims = user(ADA);
    claims["exp"] = json!(now() + 2);
    let token = service.mint(claims, json!({}));
    let first = running.accepted(&token).await;
    let again = running.accepted(&token).await;
    assert!(
        Arc::ptr_eq(&first, &again),
        "the second time it is not verified again"
    );
    tokio::time::sleep(Duration::from_millis(3_100)).await;
    running.refused(&token, "`exp` has passed").await;
}

#[tokio::test]
async fn issuers_are_told_apart_by_their_iss() {
    let (one, other) = (
        Identity::start(Options::default()),
        Identity::start(Options::default()),
    );
    let second = Settings {
        name: "second".to_owned(),
        tenant: keybroker_core::key::Tenant::parse("second").unwrap(),
        ..settings(&other, "")
    };
    let running = Running::with(&[settings(&one, ""), second], quick);
    running
        .until(|tokens| tokens.issuers.iter().all(|i| i.keys.current().is_ok()))
        .await;
    assert_eq!(
        running
            .accepted(&other.user_token(ADA))
            .await
            .tenant()
            .as_str(),
        "second"
    );
    let mut claims = user(ADA);
    claims["iss"] = json!(one.issuer());
    running
        .refused(&other.mint(claims, json!({})), "signature does not verify")
        .await;
}

/// The service does not sign with the library that is under test.
#[test]
fn the_double_makes_real_signatures() {
    let service = Identity::start(Options::default());
    let token = service.user_token(ADA);
    let (message, signature) = token.rsplit_once('.').unwrap();
    let key = service.jwks()["keys"][0].clone();
    let number = |name: &str| Base64UrlUnpadded::decode_vec(key[name].as_str().unwrap()).unwrap();
    let components = aws_lc_rs::signature::RsaPublicKeyComponents {
        n: number("n"),
        e: number("e"),
    };
    let signature = Base64UrlUnpadded::decode_vec(signature).unwrap();
    components
        .verify(
            &aws_lc_rs::signature::RSA_PKCS1_2048_8192_SHA256,
            message.as_bytes(),
            &signature,
        )
        .unwrap();
    let pem = KeySet::parse_pem(service.pem().as_bytes()).unwrap();
    assert_eq!(pem.names(), ["(key without `kid`)"]);
}

/// An earlier release read only one key from a file with two keys, and reported a key in PKCS #1 as
/// missing.
#[test]
fn every_key_of_a_pem_file_counts() {
    let key = || rcgen::KeyPair::generate().unwrap().public_key_pem();
    let (first, second) = (key(), key());
    for text in [
        format!("{}{}", first.trim_end(), second.trim_end()),
        format!("\u{feff}{first}{second}"),
        format!("{first}# the next one\n{second}").replace('\n', "\r\n"),
    ] {
        assert_eq!(KeySet::parse_pem(text.as_bytes()).unwrap().names().len(), 2);
    }
    for (text, words) in [
        (first.replace("PUBLIC", "RSA PUBLIC"), "-RSAPublicKey_in"),
        (
            format!("{first}{}", second.replacen("-----BEGIN", "----BEGIN", 1)),
            "looks like",
        ),
    ] {
        let problem = KeySet::parse_pem(text.as_bytes()).unwrap_err().to_string();
        assert!(problem.contains(words), "{words}: {problem}");
    }
}
