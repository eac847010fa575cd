//! Checks the claims of a verified access token against the issuer's configuration, and reads the
//! identity from the claims.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value};
use uuid::Uuid;

use crate::issuer::{Settings, Subject};
use keybroker_core::{
    call::Timestamp,
    key::UserId,
    principal::{Claims, Credential, Identity, Kind},
};

use super::{
    ACCESS_TOKEN,
    mapping::{access, kind_of},
    refusal::{Cause, Refusal, shown},
};

const MICROS_PER_SECOND: i64 = 1_000_000;
/// The claims that contain scopes: `scope` of RFC 9068, and `scp`, which some providers use instead.
const SCOPE_CLAIMS: [&str; 2] = ["scope", "scp"];

type Said = Map<String, Value>;

/// Returns the identity that an access token describes, and the end of its validity.
pub(crate) fn identity(
    settings: &Settings,
    said: &Said,
    now: Timestamp,
) -> Result<(Identity, Timestamp), Refusal> {
    identity_in(ACCESS_TOKEN, settings, said, now)
}

/// Does the same for the claims of an access token or an ID token. `noun` is its name in messages.
pub(super) fn identity_in(
    noun: &'static str,
    settings: &Settings,
    said: &Said,
    now: Timestamp,
) -> Result<(Identity, Timestamp), Refusal> {
    check_issued(settings, said, now)?;
    check_scopes(settings, said)?;
    check_claims(noun, settings, said)?;
    let subject = subject(settings, said)?;
    let expires = moment(said, "exp")
        .ok_or_else(|| Cause::Claim.because(format!("the {noun} has no `exp`")))?;
    check_lifetime(noun, settings, said, expires, now)?;
    let leeway = i64::from(settings.leeway_s).saturating_mul(MICROS_PER_SECOND);
    let until = Timestamp::from_micros(expires.micros().saturating_add(leeway));
    let access = access(settings, said)?;
    let grant = access.grant;
    let identity = Identity {
        name: format!("token:{}:{subject}", settings.name),
        credential: Credential::Token,
        kind: access.kind,
        users: grant.users(),
        key_names: grant.key_names(),
        tenant: grant.tenant,
        roles: grant.roles,
        subject: (access.kind == Kind::User).then_some(subject),
        mapping: access.mapping,
        claims: Claims {
            amr: texts(said.get("amr")),
            acr: text(said, "acr"),
            authenticated: moment(said, "auth_time"),
            device: settings
                .device_claim
                .as_ref()
                .and_then(|claim| text(said, claim)),
            organisations: organisations(settings, said),
            attributes: attributes(settings, said),
            expires: Some(expires),
        },
    };
    Ok((identity, until))
}

/// Checks `iat`. `exp` and `nbf` were checked together with the signature.
fn check_issued(settings: &Settings, said: &Said, now: Timestamp) -> Result<(), Refusal> {
    let Some(value) = said.get("iat") else {
        return Ok(());
    };
    let Some(issued) = moment(said, "iat") else {
        return Err(Cause::Claim.because(format!("the `iat` is {value}, which is not a time")));
    };
    let leeway = i64::from(settings.leeway_s).saturating_mul(MICROS_PER_SECOND);
    if issued.micros() > now.micros().saturating_add(leeway) {
        return Err(Cause::NotYetValid.because(format!(
            "the `iat` is {issued}, more than {} s in the future: check the clocks of the issuer and of this machine",
            settings.leeway_s
        )));
    }
    Ok(())
}

/// Checks the lifetime. A stolen access token can be used until it expires. Therefore an access
/// token that never expires, for example because of a provider's mistake, must be refused. Without
/// `iat`, the remaining lifetime is checked.
fn check_lifetime(
    noun: &'static str,
    settings: &Settings,
    said: &Said,
    expires: Timestamp,
    now: Timestamp,
) -> Result<(), Refusal> {
    let issued = moment(said, "iat");
    let life = expires
        .micros()
        .saturating_sub(issued.unwrap_or(now).micros())
        / MICROS_PER_SECOND;
    let minutes = settings.token_lifetime_max_minutes;
    // Without `iat`, the `exp`, which comes from the provider's clock, is compared with the
    // broker's clock, and the two clocks may differ.
    let leeway = issued.map_or(i64::from(settings.leeway_s), |_| 0);
    if life <= i64::from(minutes) * 60 + leeway {
        return Ok(());
    }
    let from = if issued.is_some() {
        "the `iat`".to_owned()
    } else {
        format!("the current time (the {noun} has no `iat`)")
    };
    Err(Cause::Lifetime.because(format!(
        "the `exp` is {life} s after {from}, but `token_lifetime_max_minutes` of the issuer is {minutes}"
    )))
}

fn check_scopes(settings: &Settings, said: &Said) -> Result<(), Refusal> {
    let scopes: BTreeSet<String> = SCOPE_CLAIMS
        .into_iter()
        .flat_map(|claim| texts(said.get(claim)))
        .flat_map(|text| {
            let words = text.split(' ').filter(|word| !word.is_empty());
            words.map(str::to_owned).collect::<Vec<_>>()
        })
        .collect();
    match settings.required_scopes.difference(&scopes).next() {
        None => Ok(()),
        Some(missing) => Err(Cause::Scope.because(format!(
            "the `scope` lacks {missing:?}; the scopes are {}",
            shown(
                &scopes
                    .iter()
                    .map(String::as_str)
                    .collect::<Vec<_>>()
                    .join(" ")
            )
        ))),
    }
}

fn check_claims(noun: &'static str, settings: &Settings, said: &Said) -> Result<(), Refusal> {
    for (claim, accepted) in &settings.required_claims {
        let values = texts(said.get(claim));
        if values.is_empty() {
            return Err(Cause::Claim.because(format!("the {noun} has no `{claim}`")));
        }
        if !accepted.is_empty() && values.is_disjoint(accepted) {
            let values: Vec<&str> = values.iter().map(String::as_str).collect();
            return Err(Cause::Claim.because(format!(
                "the `{claim}` is {}, which is none of {accepted:?}",
                shown(&values.join(" "))
            )));
        }
    }
    Ok(())
}

fn subject(settings: &Settings, said: &Said) -> Result<UserId, Refusal> {
    let claim = &settings.subject_claim;
    let found = claim.find(said).ok().flatten();
    let Some(Value::String(sub)) = found else {
        let detail = format!(
            "the `{claim}` is {}, but it must be a string",
            kind_of(found)
        );
        return Err(Cause::Subject.because(detail));
    };
    let text = match settings.subject {
        Subject::Text => sub.to_owned(),
        Subject::Guid => match Uuid::try_parse(sub) {
            Ok(guid) if !guid.is_nil() => guid.hyphenated().to_string(),
            _ => {
                let detail = format!("the `{claim}` is {}, which is not a GUID", shown(sub));
                return Err(Cause::Subject.because(detail));
            }
        },
    };
    UserId::parse(&text).map_err(|error| {
        Cause::Subject.because(format!(
            "the `{claim}` is {}, but the `{claim}` of a user must be {}",
            shown(sub),
            error.detail()
        ))
    })
}

fn organisations(settings: &Settings, said: &Said) -> BTreeSet<String> {
    let claims = settings.organisation_claims.iter();
    claims.flat_map(|claim| texts(said.get(claim))).collect()
}

fn attributes(settings: &Settings, said: &Said) -> BTreeMap<String, BTreeSet<String>> {
    let named = settings.attributes.iter();
    named
        .map(|(claim, name)| (name.clone(), texts(said.get(claim))))
        .filter(|(_, values)| !values.is_empty())
        .collect()
}

/// Returns the values of a claim, which may be a single value or a list. Values that are not a string, number or
/// boolean are ignored.
fn texts(value: Option<&Value>) -> BTreeSet<String> {
    let values = match value {
        None => &[],
        Some(Value::Array(values)) => values.as_slice(),
        Some(value) => std::slice::from_ref(value),
    };
    let plain = values.iter().filter_map(|value| match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        Value::Bool(truth) => Some(truth.to_string()),
        Value::Null | Value::Array(_) | Value::Object(_) => None,
    });
    plain.collect()
}

fn text(said: &Said, claim: &str) -> Option<String> {
    texts(said.get(claim)).into_iter().next()
}

/// Reads a time in seconds since 1970. A fraction of a second is cut off (RFC 7519 section 2). A
/// number in a string is accepted, because some providers write the time as a string.
fn moment(said: &Said, claim: &str) -> Option<Timestamp> {
    let seconds = match said.get(claim)? {
        Value::Number(number) => number.as_i64().or_else(|| {
            let text = number.as_f64()?.trunc().to_string();
            text.parse().ok()
        })?,
        Value::String(text) => text.parse().ok()?,
        _ => return None,
    };
    let micros = seconds.checked_mul(MICROS_PER_SECOND)?;
    (seconds >= 0).then_some(Timestamp::from_micros(micros))
}
