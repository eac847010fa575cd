//! Pending requests, parsed strictly: everything in them comes from a server that may be hostile, or from an unknown device.

use std::{fmt, net::IpAddr, time::Duration};

use base64ct::{Base64, Encoding as _};
use serde::Deserialize;
use serde_json::Value;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use keybroker_bitwarden::FingerprintPhrase;
use keybroker_core::{call::Timestamp, organization::Guid};
use keybroker_worker_protocol::{
    private_key::ORGANIZATION_KEY_BITS,
    recipient::{RecipientError, RecipientKey},
};

/// The reason why a request that the server sent is not accepted.
#[derive(Debug, thiserror::Error)]
pub(super) enum RequestError {
    #[error(transparent)]
    Json(#[from] serde_json::Error),
    #[error("`{0}` is not a GUID")]
    Guid(&'static str),
    #[error("`userId` is the GUID of zeros, which no member has")]
    NoMember,
    #[error("`{name}` is not 1 to {bytes_max} bytes without control characters")]
    Text {
        name: &'static str,
        bytes_max: usize,
    },
    #[error("`publicKey` is too long")]
    LongKey,
    #[error("`publicKey` is not canonical base64")]
    Base64,
    #[error("the public key of the device: {0}")]
    Recipient(#[from] RecipientError),
    #[error("the public key of the device does not have {ORGANIZATION_KEY_BITS} bits")]
    Bits,
    #[error("`requestIpAddress` is not an address")]
    Address,
    #[error("`creationDate` is not a time (RFC 3339)")]
    Time,
    #[error("`creationDate` is in the future")]
    Future,
    #[error("`requestDeviceType` is neither a text nor a number")]
    DeviceType,
    #[error("the server lists this request twice")]
    Twice,
}

/// The id that no member has: rows about approvals without a person have it in place of a member.
pub(super) const NO_MEMBER: Guid = Guid::from_bytes([0; 16]);
/// The time after which the server no longer accepts an answer.
const LIFETIME: Duration = Duration::from_hours(7 * 24);
/// A request that is dated later than this time from now is refused, because it would never expire.
const AHEAD_MAX: Duration = Duration::from_mins(10);
const EMAIL_BYTES_MAX: usize = 256;
const TEXT_BYTES_MAX: usize = 256;
/// Longest reason that is shown, in characters. The reason may contain a value of any length that the server sent.
const REASON_CHARS_MAX: usize = 300;
/// Longest public key in base64: that of RSA-4096.
const PUBLIC_KEY_BYTES_MAX: usize = 1_024;

/// A request as the server sends it.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Wire {
    id: String,
    user_id: String,
    organization_user_id: String,
    email: String,
    public_key: String,
    request_device_identifier: String,
    #[serde(default)]
    request_device_type: Value,
    request_ip_address: Option<String>,
    request_country_name: Option<String>,
    creation_date: String,
}

/// The request of a new device that waits for an administrator.
#[derive(Clone, Debug)]
pub(super) struct Pending {
    pub(super) id: Guid,
    /// The user who is a member.
    pub(super) member: Guid,
    /// The membership.
    pub(super) organization_user: Guid,
    /// The address as the server sends it, which is part of the fingerprint phrase.
    pub(super) email: String,
    pub(super) public_key: Vec<u8>,
    pub(super) recipient: RecipientKey,
    pub(super) device: String,
    pub(super) device_type: String,
    pub(super) address: Option<IpAddr>,
    pub(super) country: Option<String>,
    pub(super) created: Timestamp,
}

/// A request that cannot be used. It is shown, and nothing is approved for it.
#[derive(Debug)]
pub(super) struct Unreadable {
    /// The id, if it can be read.
    pub(super) id: Option<Guid>,
    pub(super) why: RequestError,
}

impl Unreadable {
    /// The reason, shortened.
    pub(super) fn reason(&self) -> String {
        let reason = self.why.to_string();
        reason.chars().take(REASON_CHARS_MAX).collect()
    }

    /// What identifies the reason when it occurs again, without text of the server.
    pub(super) fn kind(&self) -> String {
        match &self.why {
            RequestError::Json(_) => "json".to_owned(),
            why => why.to_string(),
        }
    }
}

impl fmt::Display for Unreadable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.id {
            Some(id) => write!(f, "request {id}: {}", self.reason()),
            None => write!(f, "a request without a readable id: {}", self.reason()),
        }
    }
}

impl Pending {
    pub(super) fn parse(value: &Value, now: Timestamp) -> Result<Self, Unreadable> {
        let id = value
            .get("id")
            .and_then(Value::as_str)
            .and_then(Guid::parse);
        let parsed = Wire::deserialize(value)
            .map_err(RequestError::from)
            .and_then(|wire| wire.checked(now));
        parsed.map_err(|why| Unreadable { id, why })
    }

    /// The five words that the member sees on the new device.
    pub(super) fn phrase(&self) -> FingerprintPhrase {
        FingerprintPhrase::new(&self.email, &self.public_key)
    }

    pub(super) fn expires(&self) -> Timestamp {
        later(self.created, LIFETIME)
    }

    pub(super) fn is_expired(&self, now: Timestamp) -> bool {
        self.expires() <= now
    }
}

impl Wire {
    fn checked(self, now: Timestamp) -> Result<Pending, RequestError> {
        let guid = |name, text: &str| Guid::parse(text).ok_or(RequestError::Guid(name));
        let member = guid("userId", &self.user_id)?;
        if member == NO_MEMBER {
            return Err(RequestError::NoMember);
        }
        let text = |name, text: String, bytes_max: usize| {
            let is_good =
                (1..=bytes_max).contains(&text.len()) && !text.chars().any(char::is_control);
            if is_good {
                return Ok(text);
            }
            Err(RequestError::Text { name, bytes_max })
        };
        if self.public_key.len() > PUBLIC_KEY_BYTES_MAX {
            return Err(RequestError::LongKey);
        }
        let public_key = Base64::decode_vec(&self.public_key).map_err(|_| RequestError::Base64)?;
        let recipient = RecipientKey::from_spki(&public_key)?;
        if recipient.modulus().len() * 8 != ORGANIZATION_KEY_BITS {
            return Err(RequestError::Bits);
        }
        let address = self.request_ip_address.filter(|text| !text.is_empty());
        let address = address
            .map(|text| text.parse().map_err(|_| RequestError::Address))
            .transpose()?;
        let country = self.request_country_name.filter(|text| !text.is_empty());
        let created = timestamp(&self.creation_date).ok_or(RequestError::Time)?;
        if created > later(now, AHEAD_MAX) {
            return Err(RequestError::Future);
        }
        Ok(Pending {
            id: guid("id", &self.id)?,
            member,
            organization_user: guid("organizationUserId", &self.organization_user_id)?,
            email: text("email", self.email, EMAIL_BYTES_MAX)?,
            public_key,
            recipient,
            device: text(
                "requestDeviceIdentifier",
                self.request_device_identifier,
                TEXT_BYTES_MAX,
            )?,
            device_type: match self.request_device_type {
                Value::Null => "unknown".to_owned(),
                Value::String(name) => text("requestDeviceType", name, TEXT_BYTES_MAX)?,
                Value::Number(number) => number.to_string(),
                _ => return Err(RequestError::DeviceType),
            },
            address,
            country: country
                .map(|name| text("requestCountryName", name, TEXT_BYTES_MAX))
                .transpose()?,
            created,
        })
    }
}

fn timestamp(text: &str) -> Option<Timestamp> {
    let at = OffsetDateTime::parse(text, &Rfc3339).ok()?;
    let micros = i64::try_from(at.unix_timestamp_nanos() / 1_000).ok()?;
    Some(Timestamp::from_micros(micros))
}

fn later(at: Timestamp, by: Duration) -> Timestamp {
    let micros = i64::try_from(by.as_micros()).unwrap_or(i64::MAX);
    Timestamp::from_micros(at.micros().saturating_add(micros))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const NOW: &str = "2026-12-02T10:00:00Z";
    const KEY: &str =
        include_str!("../../../../../../tests/vectors/bitwarden/fingerprint-public-key.txt");

    fn request() -> Value {
        json!({
            "object": "pending-org-auth-request",
            "id": "00000000-0000-4000-8000-000000000001",
            "userId": "a09726a0-9590-49d1-a5f5-afe300b6a515",
            "organizationUserId": "00000000-0000-4000-8000-000000000003",
            "email": "user@example.com",
            "publicKey": KEY.trim_end(),
            "requestDeviceIdentifier": "f5d3f2f0-0000-4000-8000-000000000000",
            "requestDeviceType": "Chrome",
            "requestIpAddress": "192.0.2.7",
            "requestCountryName": null,
            "creationDate": "2026-12-01T09:58:07.1234567Z",
        })
    }

    fn now() -> Timestamp {
        timestamp(NOW).unwrap()
    }

    #[test]
    fn a_request_is_read_with_its_phrase() {
        let pending = Pending::parse(&request(), now()).unwrap();
        assert_eq!(
            pending.phrase().to_string(),
            "boundless-gristle-pungent-voice-grant"
        );
        assert_eq!(
            pending.member.to_string(),
            "a09726a0-9590-49d1-a5f5-afe300b6a515"
        );
        assert_eq!(
            (pending.country.as_deref(), &*pending.device_type),
            (None, "Chrome")
        );
        assert!(!pending.is_expired(now()));
        assert!(pending.is_expired(later(now(), Duration::from_hours(7 * 24))));
        let mut older = request();
        older["requestDeviceType"] = json!(9);
        older["requestIpAddress"] = json!("");
        let older = Pending::parse(&older, now()).unwrap();
        assert_eq!((&*older.device_type, older.address), ("9", None));
    }

    #[test]
    fn bad_requests_are_refused_with_their_id() {
        let long = "x".repeat(300);
        for (field, value, word) in [
            ("userId", json!("x"), "userId"),
            ("userId", json!(NO_MEMBER.to_string()), "no member has"),
            ("organizationUserId", json!(1), "string"),
            ("email", json!("a\u{1b}[2J@b"), "email"),
            ("email", json!(long), "email"),
            ("email", json!(""), "email"),
            ("publicKey", json!("AAAA"), "public key"),
            ("publicKey", json!("!"), "base64"),
            ("publicKey", json!("A".repeat(2_000)), "too long"),
            (
                "requestDeviceIdentifier",
                json!(long),
                "requestDeviceIdentifier",
            ),
            ("requestDeviceType", json!({}), "requestDeviceType"),
            ("requestIpAddress", json!("localhost"), "requestIpAddress"),
            ("requestCountryName", json!("\n"), "requestCountryName"),
            ("creationDate", json!("yesterday"), "creationDate"),
            ("creationDate", json!("2026-12-02T10:11:00Z"), "future"),
        ] {
            let mut bad = request();
            bad[field] = value;
            let unreadable = Pending::parse(&bad, now()).unwrap_err();
            assert!(
                unreadable.why.to_string().contains(word),
                "{field}: {unreadable}"
            );
            assert!(unreadable.id.is_some(), "{field}");
        }
        let unreadable = Pending::parse(&json!([]), now()).unwrap_err();
        assert!(unreadable.to_string().contains("without a readable id"));
    }

    #[test]
    fn a_long_value_is_not_repeated_in_the_reason() {
        let bad = json!("x".repeat(100_000));
        let unreadable = Pending::parse(&bad, now()).unwrap_err();
        let text = unreadable.to_string();
        assert!(text.contains("xxx") && text.len() < 400, "{text}");
        let other = Pending::parse(&json!("y"), now()).unwrap_err();
        assert_eq!(unreadable.kind(), other.kind());
    }
}
