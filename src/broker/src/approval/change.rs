//! The exact change for which an approval is requested, as JSON and as a digest.

use aws_lc_rs::digest;
use serde_json::{Value, json};

use keybroker_core::{
    call::Timestamp,
    client_credential::Document,
    key::{ClientId, Tenant, WrappingKeyId},
    principal::{Action, Reach},
};

const DOMAIN: &[u8] = b"keybroker/approved-change/v1";
const DAY_US: i64 = 24 * 3_600 * 1_000_000;

/// The lifetime of a new secret, in whole days. The caller states a time of expiry, which is another one at each call. Therefore
/// the approval is for a number of days, which begin when the secret is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Lifetime(i64);

impl Lifetime {
    /// Rounds to the nearest day, at least one.
    pub(crate) fn until(expires: Timestamp, now: Timestamp) -> Self {
        let micros = expires.micros().saturating_sub(now.micros());
        Self((micros.saturating_add(DAY_US / 2) / DAY_US).max(1))
    }

    /// When a secret that is made now expires.
    pub(crate) fn end(self, now: Timestamp) -> Timestamp {
        let micros = self.0.saturating_mul(DAY_US);
        Timestamp::from_micros(now.micros().saturating_add(micros))
    }
}

/// A change that needs an approval.
#[derive(Clone, Debug)]
pub(crate) struct Asked {
    pub(super) action: Action,
    document: Value,
}

impl Asked {
    /// The destruction of a wrapping key. `sequence` is the number of the key's registry row before the change: each change of the
    /// key, also the schedule of the destruction itself, gives the row another number.
    pub(crate) fn destruction(
        action: Action,
        key: WrappingKeyId,
        after_days: u32,
        sequence: u64,
    ) -> Self {
        Self {
            action,
            document: json!({
                "after_days": after_days,
                "registry_sequence": sequence,
                "wrapping_key": key.to_string(),
            }),
        }
    }

    /// The record that a wrapping key is permanently missing. The key counts as destroyed then. `sequence` is the number of the
    /// key's registry row before the change.
    pub(crate) fn loss(key: WrappingKeyId, sequence: u64) -> Self {
        Self {
            action: Action::LoseKey,
            document: json!({
                "registry_sequence": sequence,
                "wrapping_key": key.to_string(),
            }),
        }
    }

    /// A new API client.
    pub(crate) fn new_client(document: &Document, lifetime: Option<Lifetime>) -> Self {
        Self {
            action: Action::CreateClient,
            document: json!({
                "key_names": texts(document.key_names.as_ref()),
                "label": document.label,
                "roles": document.roles.iter().map(|role| role.as_str()).collect::<Vec<_>>(),
                "secret_days": lifetime.map(|days| days.0),
                "tenant": document.tenant.as_str(),
                "users": texts(document.users.as_ref()),
            }),
        }
    }

    /// A further secret of an API client. The number of the secret is never used again.
    pub(crate) fn new_secret(
        client: ClientId,
        document: &Document,
        lifetime: Option<Lifetime>,
    ) -> Self {
        let number = document.secrets.last().map_or(1, |last| last.number + 1);
        Self {
            action: Action::CreateClient,
            document: json!({
                "client": client.to_string(),
                "label": document.label,
                "roles": document.roles.iter().map(|role| role.as_str()).collect::<Vec<_>>(),
                "secret_days": lifetime.map(|days| days.0),
                "secret_number": number,
                "tenant": document.tenant.as_str(),
            }),
        }
    }

    /// The change as JSON with sorted names. Equal changes have equal bytes.
    pub(super) fn bytes(&self) -> Vec<u8> {
        self.document.to_string().into_bytes()
    }

    /// The SHA-256 of the action, the change and the requesting person, each with its length.
    pub(super) fn digest(&self, person: &str) -> [u8; 32] {
        digest_of(self.action.as_str(), person, &self.bytes())
    }
}

/// The SHA-256 of an action, a change as JSON and the requesting person, each with its length.
pub(super) fn digest_of(action: &str, person: &str, document: &[u8]) -> [u8; 32] {
    let mut context = digest::Context::new(&digest::SHA256);
    for part in [DOMAIN, action.as_bytes(), person.as_bytes(), document] {
        let length = u64::try_from(part.len()).unwrap_or(u64::MAX);
        context.update(&length.to_be_bytes());
        context.update(part);
    }
    let mut bytes = [0; 32];
    bytes.copy_from_slice(context.finish().as_ref());
    bytes
}

fn texts<T: Ord + AsRef<str>>(reach: Option<&Reach<T>>) -> Value {
    match reach {
        None => Value::Null,
        Some(Reach::All) => json!(["*"]),
        Some(Reach::Only(named)) => named.iter().map(AsRef::as_ref).collect(),
    }
}

/// The parts of a stored change that decide who can see it, and that belong into the audit log.
#[derive(Debug, Default)]
pub(super) struct About {
    /// The tenant of the API client; absent for a change of a wrapping key.
    pub(super) tenant: Option<Tenant>,
    /// The wrapping key, or `None`.
    pub(super) wrapping_key: Option<WrappingKeyId>,
}

impl About {
    pub(super) fn of(document: &[u8]) -> Self {
        let Ok(document) = serde_json::from_slice::<Value>(document) else {
            return Self::default();
        };
        let text = |name: &str| document.get(name).and_then(Value::as_str);
        Self {
            tenant: text("tenant").and_then(|tenant| Tenant::parse(tenant).ok()),
            wrapping_key: text("wrapping_key").and_then(WrappingKeyId::from_hex),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: WrappingKeyId = WrappingKeyId::from_bytes([7; 16]);

    fn destruction(days: u32, sequence: u64) -> Asked {
        Asked::destruction(Action::DestroyKey, KEY, days, sequence)
    }

    #[test]
    fn a_change_is_written_to_the_letter() {
        let id = "07".repeat(16);
        let expected =
            format!(r#"{{"after_days":30,"registry_sequence":4,"wrapping_key":"{id}"}}"#);
        assert_eq!(destruction(30, 4).bytes(), expected.as_bytes());
        let about = About::of(expected.as_bytes());
        assert_eq!((about.tenant, about.wrapping_key), (None, Some(KEY)));
    }

    /// Two requests that differ in any part have different digests.
    #[test]
    fn the_digest_covers_action_change_and_person() {
        let now = Asked::destruction(Action::DestroyKeyNow, KEY, 30, 4);
        let digests = [
            destruction(30, 4).digest("Ada"),
            destruction(31, 4).digest("Ada"),
            destruction(30, 5).digest("Ada"),
            now.digest("Ada"),
            destruction(30, 4).digest("Bob"),
        ];
        for (number, digest) in digests.iter().enumerate() {
            assert!(!digests[..number].contains(digest), "{number}");
        }
        assert_eq!(destruction(30, 4).digest("Ada"), digests[0]);
    }

    /// A caller states the time of expiry in seconds, some time before the broker reads its clock.
    #[test]
    fn a_lifetime_is_rounded_to_the_nearest_day() {
        let at = Timestamp::from_micros;
        let days = |micros| Lifetime::until(at(micros), at(0)).0;
        let second = 1_000_000;
        for (micros, expected) in [
            (30 * DAY_US - 3 * second, 30),
            (30 * DAY_US + 3 * second, 30),
            (1, 1),
            (DAY_US / 2 - 1, 1),
            (DAY_US * 3 / 2, 2),
            (i64::MIN, 1),
        ] {
            assert_eq!(days(micros), expected, "{micros}");
        }
        assert_eq!(Lifetime(2).end(at(5)), at(2 * DAY_US + 5));
    }
}
