//! The messages to the receiver of notices, and their signatures, as the Standard Webhooks specification 1.0.0 states them.
//!
//! Mitigation: M29 of `THREAT_MODEL.md`.

use std::time::{SystemTime, UNIX_EPOCH};

use aws_lc_rs::hmac;
use base64ct::{Base64, Encoding as _};
use serde_json::{Map, Value, json};
use uuid::Uuid;

use keybroker_broker::Notice;

/// A notice in the form in which it is sent. The id and the body are the same for each attempt.
#[derive(Debug)]
pub(super) struct Message {
    id: String,
    body: String,
}

impl Message {
    pub(super) fn new(notice: &Notice) -> Self {
        let body = json!({
            "type": notice.event.as_str(),
            "timestamp": notice.at.to_string(),
            "data": data(notice),
        });
        Self {
            id: format!("msg_{}", Uuid::now_v7().simple()),
            body: body.to_string(),
        }
    }

    pub(super) fn id(&self) -> &str {
        &self.id
    }

    pub(super) fn body(&self) -> &str {
        &self.body
    }
}

/// The facts of a notice. A field without a value is absent.
fn data(notice: &Notice) -> Map<String, Value> {
    let mut data = Map::new();
    let mut put = |name: &str, value: Option<String>| {
        if let Some(value) = value.filter(|value| !value.is_empty()) {
            data.insert(name.to_owned(), value.into());
        }
    };
    put("call_id", Some(notice.call.to_string()));
    put("tenant", Some(notice.tenant.to_string()));
    put("user", Some(notice.user.as_str().to_owned()));
    put("principal", Some(notice.principal.clone()));
    put("peer", Some(notice.peer.clone()));
    put("place", Some(notice.place.clone()));
    let device = notice.device.as_ref();
    put("device", device.map(|device| device.id.to_string()));
    put("device_name", device.map(|device| device.name.clone()));
    put("device_type", device.map(|device| device.kind.clone()));
    put("access_request", notice.request.map(|id| id.to_string()));
    put("expires", notice.expires.map(|at| at.to_string()));
    if let Some((name, revision)) = &notice.key {
        data.insert("key_name".to_owned(), name.as_str().into());
        data.insert("revision".to_owned(), revision.get().into());
    }
    data
}

/// Signs messages, with each secret.
#[derive(Debug)]
pub(super) struct Signer(Vec<hmac::Key>);

impl Signer {
    pub(super) fn new(secrets: Vec<hmac::Key>) -> Self {
        Self(secrets)
    }

    /// The headers of an attempt that is made now. The time is that of the attempt, so that a receiver can refuse an old message
    /// that another person sends again.
    pub(super) fn headers(&self, message: &Message) -> [(&'static str, String); 4] {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        self.headers_at(message, now.map_or(0, |since| since.as_secs()))
    }

    fn headers_at(&self, message: &Message, seconds: u64) -> [(&'static str, String); 4] {
        let Message { id, body } = message;
        let signed = format!("{id}.{seconds}.{body}");
        let signatures = self.0.iter().map(|secret| {
            let tag = hmac::sign(secret, signed.as_bytes());
            format!("v1,{}", Base64::encode_string(tag.as_ref()))
        });
        [
            ("content-type", "application/json".to_owned()),
            ("webhook-id", id.clone()),
            ("webhook-timestamp", seconds.to_string()),
            (
                "webhook-signature",
                signatures.collect::<Vec<_>>().join(" "),
            ),
        ]
    }
}

#[cfg(test)]
mod tests {
    use keybroker_broker::{NoticeDevice, NoticeEvent};
    use keybroker_core::{
        call::{CallId, Timestamp},
        key::{AccessRequestId, DeviceId, KeyName, Revision, Tenant, UserId},
    };

    use super::*;

    /// The example of the specification's libraries.
    #[test]
    fn a_message_is_signed_as_the_libraries_of_the_specification_sign_it() {
        let secret = Base64::decode_vec("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw").unwrap();
        let secret = hmac::Key::new(hmac::HMAC_SHA256, &secret);
        let other = hmac::Key::new(hmac::HMAC_SHA256, &[7; 32]);
        let message = Message {
            id: "msg_p5jXN8AQM9LWM0D4loKWxJek".to_owned(),
            body: r#"{"test": 2432232314}"#.to_owned(),
        };
        let [_, (_, id), (_, time), (_, signature)] =
            Signer::new(vec![secret, other]).headers_at(&message, 1_614_265_330);
        assert_eq!((id.as_str(), time.as_str()), (message.id(), "1614265330"));
        let (first, second) = signature.split_once(' ').unwrap();
        assert_eq!(first, "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=");
        assert!(second.starts_with("v1,") && second != first, "{second}");
    }

    #[test]
    fn a_message_has_the_facts_and_no_empty_field() {
        let mut notice = Notice {
            event: NoticeEvent::AccessRequested,
            at: Timestamp::from_micros(1_795_262_400_000_000),
            call: CallId::fresh(),
            tenant: Tenant::default(),
            user: UserId::parse("ada").unwrap(),
            principal: "token:home:ada".to_owned(),
            peer: "192.0.2.7:4711".to_owned(),
            place: String::new(),
            device: Some(NoticeDevice {
                id: DeviceId::from_bytes([8; 16]),
                name: "Ada \"x\"".to_owned(),
                kind: "phone".to_owned(),
            }),
            request: Some(AccessRequestId::from_bytes([9; 16])),
            expires: Some(Timestamp::from_micros(1_795_262_400_000_001)),
            key: None,
        };
        let message = Message::new(&notice);
        let body: Value = serde_json::from_str(message.body()).unwrap();
        let expected = json!({
            "type": "access_request.created",
            "timestamp": "2026-11-21T12:00:00Z",
            "data": {
                "call_id": notice.call.to_string(),
                "tenant": "default",
                "user": "ada",
                "principal": "token:home:ada",
                "peer": "192.0.2.7:4711",
                "device": "08".repeat(16),
                "device_name": "Ada \"x\"",
                "device_type": "phone",
                "access_request": "09".repeat(16),
                "expires": "2026-11-21T12:00:00.000001Z",
            },
        });
        assert_eq!(body, expected);
        assert!(message.id().starts_with("msg_") && !message.id().contains('.'));
        assert_ne!(Message::new(&notice).id(), message.id());

        notice.event = NoticeEvent::UserKeyRotated;
        notice.key = Some((KeyName::parse("vault").unwrap(), Revision::FIRST));
        let body: Value = serde_json::from_str(Message::new(&notice).body()).unwrap();
        assert_eq!(body["type"], "user_key.rotated");
        assert_eq!(
            (&body["data"]["key_name"], &body["data"]["revision"]),
            (&json!("vault"), &json!(1))
        );
    }
}
