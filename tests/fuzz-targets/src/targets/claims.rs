//! The claims of a token whose signature was good.

use std::path::Path;

use serde_json::{Value, json};

use keybroker_auth::fuzzing;
use keybroker_core::{call::Timestamp, principal::Role};

use super::issuer;

pub(crate) const WORDS: &[&str] = &[
    "\"sub\"",
    "\"exp\"",
    "\"iat\"",
    "\"scope\"",
    "\"scp\"",
    "\"amr\"",
    "\"realm_access\"",
    "\"roles\"",
    "\"keybroker-auditor\"",
    "\"_claim_names\"",
    "\"hasgroups\"",
    "null",
    "true",
    "[",
    "]",
    "{",
    "}",
    ",",
    ":",
    "1e18",
    "-1",
    "0.5",
    "9223372036854775807",
    "\"api\"",
    "urn:uuid:",
    "\\u0000",
];

/// Reads claims.
///
/// # Panics
/// If an identity has another user than the claims name, a longer life than permitted, or a role without the claim that gives it.
pub fn claims(json: &[u8]) -> bool {
    let settings = issuer::settings(Path::new("/keys.json"));
    let Some(identity) = fuzzing::claims(&settings, json, Timestamp::now()) else {
        return false;
    };
    let said: Value = serde_json::from_slice(json).unwrap();
    let digits = |text: &str| {
        let digits = text.trim_start_matches("urn:uuid:").chars();
        digits
            .filter(char::is_ascii_hexdigit)
            .collect::<String>()
            .to_ascii_lowercase()
    };
    let Some(subject) = identity.subject else {
        assert_eq!(identity.mapping.as_deref(), Some("auditors"));
        assert_eq!(identity.roles, [Role::Auditor].into());
        let roles = said["realm_access"]["roles"].to_string();
        assert!(roles.contains(&format!("\"{}\"", issuer::AUDITOR)));
        return true;
    };
    assert!(identity.roles.is_empty() && identity.mapping.is_none());
    assert_eq!(
        digits(said["sub"].as_str().unwrap()),
        digits(subject.as_str())
    );
    assert_eq!(subject.as_str().len(), issuer::ADA.len());
    assert_eq!(identity.name, format!("token:vault:{subject}"));
    let expires = identity.claims.expires.unwrap().micros();
    // Without `iat`, the life is measured from now, give or take the leeway.
    let latest = match said.get("iat") {
        None => Timestamp::now().micros() / 1_000_000 + 60,
        Some(iat) => iat.as_f64().map_or_else(
            || iat.as_str().unwrap().parse().unwrap(),
            |seconds| format!("{:.0}", seconds.trunc()).parse().unwrap(),
        ),
    };
    assert!(expires / 1_000_000 <= latest + issuer::LIFE_S);
    true
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let mut without_iat = issuer::claims();
    without_iat.as_object_mut().unwrap().remove("iat");
    let with_roles = |roles: Value| {
        let mut claims = issuer::claims();
        claims["realm_access"] = json!({ "roles": roles });
        claims
    };
    let auditor = with_roles(json!(["offline_access", issuer::AUDITOR]));
    let object = with_roles(json!({ "keybroker-auditor": { "1": "example.org" } }));
    [issuer::claims(), without_iat, auditor, object]
        .iter()
        .map(|claims| claims.to_string().into_bytes())
        .collect()
}
