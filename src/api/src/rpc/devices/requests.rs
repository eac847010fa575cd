//! Parses the messages of `DeviceService`. Every length is checked here.

use base64ct::{Base64UrlUnpadded, Encoding as _};

use keybroker_broker::{
    ACCESS_REQUESTS_LISTED_MAX, AccessCursor, AccessDenial, AccessPage, AdministratorApproval,
    Answer, DeviceApproval, DeviceRotation, NewAccessRequest, NewDevice, RotatedDevice, SealedKeys,
    Untrusted, UserKeyRef, Which,
};
use keybroker_core::{
    call::Timestamp,
    device::{
        ACCESS_CODE_BYTES_MAX, ACCESS_CODE_BYTES_MIN, AccessApprover, DEVICE_NAME_BYTES_MAX,
        DEVICE_TYPE_BYTES_MAX, DeviceSignature, PUBLIC_KEY_BYTES_MAX, SEALED_KEY_BYTES_MAX,
        SEALED_PRIVATE_KEY_BYTES_MAX, SEALED_PUBLIC_KEY_BYTES_MAX, VerificationKey,
    },
    error::{Error, Reason},
    key::{AccessRequestId, DeviceId, KeyName, UserId},
    principal::Principal,
    secret::KeyMaterial,
};
use keybroker_proto as proto;

use crate::rpc::convert;

/// Largest number of devices in one message. A member cannot have more.
const DEVICES_MAX: usize = 200;
/// Longest word of a phrase, in bytes.
const WORD_BYTES_MAX: usize = 64;
/// Longest name of the form of an answer, in bytes.
const ENCRYPTION_BYTES_MAX: usize = 32;

pub(super) fn device_id(field: &'static str, bytes: &[u8]) -> Result<DeviceId, Error> {
    DeviceId::from_slice(bytes).ok_or_else(|| Error::violation(field, "16 bytes"))
}

pub(super) fn access_id(bytes: &[u8]) -> Result<AccessRequestId, Error> {
    AccessRequestId::from_slice(bytes)
        .ok_or_else(|| Error::violation("access_request_id", "16 bytes"))
}

pub(super) fn access_code(bytes: Vec<u8>) -> Result<Vec<u8>, Error> {
    if (ACCESS_CODE_BYTES_MIN..=ACCESS_CODE_BYTES_MAX).contains(&bytes.len()) {
        Ok(bytes)
    } else {
        Err(Error::violation("access_code", "16 to 64 bytes"))
    }
}

/// The member whom an approver names; `None` for the caller itself.
pub(super) fn member(user: &str) -> Result<Option<UserId>, Error> {
    if user.is_empty() {
        return Ok(None);
    }
    UserId::parse(user).map(Some)
}

/// Whether a character is invisible, or changes how the text around it is shown. The joiners U+200C and U+200D are permitted, because some
/// scripts and emoji need them.
fn is_deceptive(char: char) -> bool {
    char.is_control()
        || matches!(
            char,
            '\u{ad}'
                | '\u{34f}'
                | '\u{61c}'
                | '\u{115f}'
                | '\u{1160}'
                | '\u{180e}'
                | '\u{200b}'
                | '\u{200e}'
                | '\u{200f}'
                | '\u{2028}'..='\u{202e}'
                | '\u{2060}'..='\u{206f}'
                | '\u{2800}'
                | '\u{3164}'
                | '\u{feff}'
                | '\u{ffa0}'
                | '\u{fff9}'..='\u{fffb}'
                | '\u{e0000}'..='\u{e007f}'
        )
}

fn text(field: &'static str, text: String, bytes_max: usize) -> Result<String, Error> {
    let is_plain = text.trim() == text && !text.chars().any(is_deceptive);
    if (1..=bytes_max).contains(&text.len()) && is_plain {
        return Ok(text);
    }
    let what = format!(
        "1 to {bytes_max} bytes of UTF-8, without spaces at the ends, control characters, invisible characters and characters that \
         change the direction of text"
    );
    Err(Error::violation(field, what))
}

pub(super) fn device_name(field: &'static str, name: String) -> Result<String, Error> {
    text(field, name, DEVICE_NAME_BYTES_MAX)
}

fn device_type(field: &'static str, kind: String) -> Result<String, Error> {
    text(field, kind, DEVICE_TYPE_BYTES_MAX)
}

fn blob(field: &'static str, bytes: Vec<u8>, bytes_max: usize) -> Result<Vec<u8>, Error> {
    if (1..=bytes_max).contains(&bytes.len()) {
        Ok(bytes)
    } else {
        Err(Error::violation(field, format!("1 to {bytes_max} bytes")))
    }
}

fn verification_key(bytes: &[u8]) -> Result<VerificationKey, Error> {
    let what = "a public key of Ed25519 (32 bytes), or an uncompressed point of P-256 (65 bytes)";
    VerificationKey::from_slice(bytes).ok_or_else(|| Error::violation("verification_key", what))
}

fn optional_signature(
    signature: Option<proto::DeviceSignature>,
) -> Result<Option<DeviceSignature>, Error> {
    let Some(signature) = signature else {
        return Ok(None);
    };
    let bytes = signature.signature.as_slice().try_into();
    Ok(Some(DeviceSignature {
        device: device_id("signature.device_id", &signature.device_id)?,
        at: Timestamp::from_micros(signature.sign_time_us),
        bytes: bytes.map_err(|_| Error::violation("signature.signature", "64 bytes"))?,
    }))
}

fn signature(signature: Option<proto::DeviceSignature>) -> Result<DeviceSignature, Error> {
    optional_signature(signature)?
        .ok_or_else(|| Error::violation("signature", "the signature of a trusted device"))
}

fn keys(keys: Option<proto::DeviceKeys>) -> Result<SealedKeys, Error> {
    let keys = keys.unwrap_or_default();
    Ok(SealedKeys {
        user_key: blob("keys.user_key", keys.user_key, SEALED_KEY_BYTES_MAX)?,
        public_key: blob(
            "keys.public_key",
            keys.public_key,
            SEALED_PUBLIC_KEY_BYTES_MAX,
        )?,
        private_key: blob(
            "keys.private_key",
            keys.private_key,
            SEALED_PRIVATE_KEY_BYTES_MAX,
        )?,
    })
}

pub(super) fn new_device(r: proto::EstablishTrustRequest) -> Result<NewDevice, Error> {
    let request = if r.access_request_id.is_empty() {
        None
    } else {
        Some(access_id(&r.access_request_id)?)
    };
    Ok(NewDevice {
        id: device_id("device_id", &r.device_id)?,
        name: device_name("name", r.name)?,
        kind: device_type("type", r.r#type)?,
        verification_key: verification_key(&r.verification_key)?,
        key_name: KeyName::parse(&r.key_name)?,
        revision: convert::revision(r.revision, "revision")?,
        keys: keys(r.keys)?,
        request,
        signature: signature(r.signature)?,
    })
}

fn device_ids(field: &'static str, ids: &[Vec<u8>]) -> Result<Vec<DeviceId>, Error> {
    if ids.len() > DEVICES_MAX {
        return Err(Error::violation(field, "at most 200 devices"));
    }
    ids.iter().map(|id| device_id(field, id)).collect()
}

pub(super) fn untrusted(r: proto::UntrustDevicesRequest) -> Result<Untrusted, Error> {
    let ids = device_ids("device_ids", &r.device_ids)?;
    let which = match (r.all, ids.is_empty()) {
        (true, true) => Which::All,
        (false, false) => Which::These(ids),
        _ => {
            let what = "at least one device, or no device together with `all`";
            return Err(Error::violation("device_ids", what));
        }
    };
    Ok(Untrusted {
        user: member(&r.user)?,
        which,
        are_lost: r.lost,
        signature: optional_signature(r.signature)?,
    })
}

fn rotated(device: proto::RotatedDevice) -> Result<RotatedDevice, Error> {
    Ok(RotatedDevice {
        id: device_id("devices.device_id", &device.device_id)?,
        user_key: blob("devices.user_key", device.user_key, SEALED_KEY_BYTES_MAX)?,
        public_key: blob(
            "devices.public_key",
            device.public_key,
            SEALED_PUBLIC_KEY_BYTES_MAX,
        )?,
    })
}

pub(super) fn rotation(
    principal: &Principal,
    r: proto::RotateDevicesRequest,
) -> Result<DeviceRotation, Error> {
    let material = KeyMaterial::new(r.key_material);
    let user = principal.subject().cloned().ok_or_else(|| {
        Error::new(
            Reason::Policy,
            "only a member can rotate the keys of its devices",
        )
    })?;
    if r.devices.len() > DEVICES_MAX {
        return Err(Error::violation("devices", "at most 200 devices"));
    }
    let devices = r.devices.into_iter().map(rotated);
    Ok(DeviceRotation {
        key: UserKeyRef {
            user,
            name: KeyName::parse(&r.key_name)?,
        },
        expected: convert::revision(r.expected_revision, "expected_revision")?,
        material: material?,
        devices: devices.collect::<Result<_, _>>()?,
        untrusted: device_ids("untrusted_device_ids", &r.untrusted_device_ids)?,
        signature: signature(r.signature)?,
    })
}

pub(super) fn new_access(r: proto::CreateAccessRequestRequest) -> Result<NewAccessRequest, Error> {
    let approver = match r.approver() {
        proto::AccessApprover::Device => AccessApprover::Device,
        proto::AccessApprover::Administrator => AccessApprover::Administrator,
        proto::AccessApprover::Unspecified => {
            return Err(Error::violation("approver", "a known value"));
        }
    };
    Ok(NewAccessRequest {
        device: device_id("device_id", &r.device_id)?,
        name: device_name("device_name", r.device_name)?,
        kind: device_type("device_type", r.device_type)?,
        verification_key: verification_key(&r.verification_key)?,
        public_key: blob("public_key", r.public_key, PUBLIC_KEY_BYTES_MAX)?,
        code: access_code(r.access_code)?,
        key_name: KeyName::parse(&r.key_name)?,
        approver,
    })
}

pub(super) fn approval(r: proto::ApproveAccessRequestRequest) -> Result<DeviceApproval, Error> {
    let is_plain =
        |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, b'.' | b'_' | b'-');
    let is_name = (1..=ENCRYPTION_BYTES_MAX).contains(&r.encryption.len())
        && r.encryption.bytes().all(is_plain);
    if !is_name {
        return Err(Error::violation(
            "encryption",
            "1 to 32 bytes of [a-z0-9._-]",
        ));
    }
    Ok(DeviceApproval {
        id: access_id(&r.access_request_id)?,
        answer: Answer {
            bytes: blob(
                "encrypted_user_key",
                r.encrypted_user_key,
                SEALED_KEY_BYTES_MAX,
            )?,
            form: r.encryption,
        },
        signature: signature(r.signature)?,
    })
}

pub(super) fn for_member(
    r: proto::ApproveForMemberRequest,
) -> Result<AdministratorApproval, Error> {
    let is_word = |word: &String| (1..=WORD_BYTES_MAX).contains(&word.len());
    let words = r.phrase_words.try_into().ok();
    let words = words.filter(|words: &[String; 2]| words.iter().all(is_word));
    Ok(AdministratorApproval {
        id: access_id(&r.access_request_id)?,
        words: words.ok_or_else(|| Error::violation("phrase_words", "two words"))?,
    })
}

pub(super) fn denial(r: proto::DenyAccessRequestRequest) -> Result<AccessDenial, Error> {
    Ok(AccessDenial {
        id: access_id(&r.access_request_id)?,
        signature: optional_signature(r.signature)?,
        only_pending: false,
    })
}

#[expect(clippy::needless_pass_by_value, reason = "the form of all parsers")]
pub(super) fn access_page(r: proto::ListAccessRequestsRequest) -> Result<AccessPage, Error> {
    let first = AccessPage::from(r.show_all);
    Ok(AccessPage {
        after: cursor(&r.page_token)?,
        limit: match r.page_size {
            0 => first.limit,
            size if size <= ACCESS_REQUESTS_LISTED_MAX => size,
            _ => return Err(Error::violation("page_size", "at most 200")),
        },
        ..first
    })
}

/// A page token is the time of the last request of the page in microseconds, as eight bytes, and the id of this request.
pub(super) fn page_token(next: Option<AccessCursor>) -> String {
    next.map_or_else(String::new, |(requested, id)| {
        let mut cursor = requested.micros().to_be_bytes().to_vec();
        cursor.extend(id.as_bytes());
        Base64UrlUnpadded::encode_string(&cursor)
    })
}

fn cursor(token: &str) -> Result<Option<AccessCursor>, Error> {
    if token.is_empty() {
        return Ok(None);
    }
    let parse = || {
        let mut bytes = [0; 24];
        let read = Base64UrlUnpadded::decode(token, &mut bytes).ok()?;
        let (requested, id) = read.split_first_chunk()?;
        let requested = Timestamp::from_micros(i64::from_be_bytes(*requested));
        Some((requested, AccessRequestId::from_slice(id)?))
    };
    let cursor = parse().ok_or_else(|| {
        let what = "empty or the `next_page_token` of the previous response";
        Error::violation("page_token", what)
    });
    cursor.map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn signed() -> proto::DeviceSignature {
        proto::DeviceSignature {
            device_id: vec![1; 16],
            sign_time_us: 2,
            signature: vec![3; 64],
        }
    }

    fn establish() -> proto::EstablishTrustRequest {
        proto::EstablishTrustRequest {
            device_id: vec![1; 16],
            name: "laptop".to_owned(),
            r#type: "desktop".to_owned(),
            verification_key: vec![2; 32],
            key_name: "vault".to_owned(),
            revision: 1,
            keys: Some(proto::DeviceKeys {
                user_key: vec![1; 1_024],
                public_key: vec![1; 2_048],
                private_key: vec![1; 8_192],
            }),
            access_request_id: Vec::new(),
            signature: Some(signed()),
        }
    }

    #[test]
    fn a_name_has_no_characters_that_change_how_it_is_shown() {
        for good in ["Ada's laptop", "Büro 2", "👩\u{200d}💻", "می\u{200c}خواهم"] {
            assert_eq!(device_name("name", good.to_owned()).unwrap(), good);
        }
        for bad in [
            "laptop\u{202e}enohp",
            "lap\u{200b}top",
            "\u{2066}phone\u{2069}",
            "\u{feff}phone",
            "a\nb",
            "lap\u{ad}top",
            "\u{3164}",
            " phone",
            "phone ",
            "",
        ] {
            assert!(device_name("name", bad.to_owned()).is_err(), "{bad:?}");
        }
    }

    fn field(result: Result<NewDevice, Error>) -> &'static str {
        result.unwrap_err().violations()[0].field
    }

    #[test]
    fn every_field_of_a_new_device_has_its_limit() {
        type Edit = fn(&mut proto::EstablishTrustRequest);
        new_device(establish()).unwrap();
        let cases: [(&str, Edit); 14] = [
            ("device_id", |r| r.device_id.truncate(15)),
            ("name", |r| r.name.clear()),
            ("name", |r| r.name = "x".repeat(129)),
            ("name", |r| r.name = "a\nb".to_owned()),
            ("type", |r| r.r#type = "x".repeat(65)),
            ("verification_key", |r| r.verification_key.push(0)),
            ("key_name", |r| r.key_name = "Vault".to_owned()),
            ("revision", |r| r.revision = 0),
            ("keys.user_key", |r| r.keys = None),
            ("keys.user_key", |r| {
                r.keys.as_mut().unwrap().user_key.push(0);
            }),
            ("keys.public_key", |r| {
                r.keys.as_mut().unwrap().public_key.clear();
            }),
            ("keys.private_key", |r| {
                r.keys.as_mut().unwrap().private_key.push(0);
            }),
            ("access_request_id", |r| r.access_request_id = vec![1; 17]),
            ("signature", |r| r.signature = None),
        ];
        for (expected, edit) in cases {
            let mut changed = establish();
            edit(&mut changed);
            assert_eq!(field(new_device(changed)), expected);
        }
        let mut short = establish();
        short.signature.as_mut().unwrap().signature.truncate(63);
        assert_eq!(field(new_device(short)), "signature.signature");
    }

    #[test]
    fn all_or_these_devices_are_untrusted_but_not_both() {
        let request = |all, ids: usize| proto::UntrustDevicesRequest {
            device_ids: vec![vec![1; 16]; ids],
            all,
            ..proto::UntrustDevicesRequest::default()
        };
        assert_eq!(untrusted(request(true, 0)).unwrap().which, Which::All);
        assert!(untrusted(request(false, 2)).is_ok());
        for (all, ids) in [(false, 0), (true, 1), (false, 201)] {
            let refused = untrusted(request(all, ids)).unwrap_err();
            assert_eq!(refused.violations()[0].field, "device_ids");
        }
    }

    #[test]
    fn an_access_code_has_at_least_128_bits() {
        for (length, is_good) in [(0, false), (15, false), (16, true), (64, true), (65, false)] {
            assert_eq!(access_code(vec![1; length]).is_ok(), is_good, "{length}");
        }
    }

    #[test]
    fn a_page_token_comes_back_as_it_went_and_others_are_refused() {
        let cursor_of = |micros, id| {
            let id = AccessRequestId::from_bytes([id; 16]);
            (Timestamp::from_micros(micros), id)
        };
        for last in [cursor_of(-1, 0), cursor_of(i64::MAX, 255)] {
            assert_eq!(cursor(&page_token(Some(last))).unwrap(), Some(last));
        }
        assert_eq!(cursor(&page_token(None)).unwrap(), None);
        let good = page_token(Some(cursor_of(7, 7)));
        for bad in ["!", "YQ", &good[..31], &format!("{good}A"), &good.repeat(9)] {
            assert!(cursor(bad).is_err(), "{bad}");
        }
        let sized = |page_size| {
            access_page(proto::ListAccessRequestsRequest {
                page_size,
                ..proto::ListAccessRequestsRequest::default()
            })
        };
        assert_eq!(sized(0).unwrap(), AccessPage::from(false));
        assert_eq!(sized(200).unwrap().limit, 200);
        assert!(sized(201).is_err());
    }

    #[test]
    fn an_approval_names_its_encryption() {
        let request = |encryption: &str| proto::ApproveAccessRequestRequest {
            access_request_id: vec![1; 16],
            encrypted_user_key: vec![1; 256],
            encryption: encryption.to_owned(),
            signature: Some(signed()),
        };
        assert!(approval(request("rsa-oaep-sha256")).is_ok());
        for bad in ["", "RSA", "a b", &"x".repeat(33)] {
            let refused = approval(request(bad)).unwrap_err();
            assert_eq!(refused.violations()[0].field, "encryption");
        }
    }
}
