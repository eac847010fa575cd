//! Converts between the types of the broker and protobuf messages.

use prost_types::Timestamp as WireTimestamp;

use keybroker_broker::{
    Recipient, RecipientKey, RecordInfo, RecordState, RecordView, UserKeyRef, WrappingKeyView,
};
use keybroker_core::{
    call::Timestamp,
    envelope::Algorithm,
    error::{EXPLANATION_BYTES_MAX, Error},
    key::{KeyName, Purpose, Revision, Sealing, UserId, WrappingKeyState},
};
use keybroker_proto as proto;

const MICROS_PER_SECOND: i64 = 1_000_000;
const NANOS_PER_MICRO: i64 = 1_000;

pub(super) fn key_ref(user: &str, key_name: &str) -> Result<UserKeyRef, Error> {
    Ok(UserKeyRef {
        user: UserId::parse(user)?,
        name: KeyName::parse(key_name)?,
    })
}

pub(super) fn revision(number: u64, field: &'static str) -> Result<Revision, Error> {
    Revision::new(number).ok_or_else(|| Error::violation(field, "1 to 2^63 - 1"))
}

/// Parses the recipient of a sealed release. The violation says why a key is refused, and contains no byte of it.
pub(super) fn recipient(recipient: &proto::Recipient) -> Result<Recipient, Error> {
    let key = RecipientKey::from_spki(&recipient.public_key).map_err(|error| {
        let what = format!(
            "the DER SubjectPublicKeyInfo of an RSA public key of 2048, 3072 or 4096 bits with the exponent 65537; this key is refused: {error}"
        );
        Error::violation("recipient.public_key", what)
    })?;
    let algorithm = match proto::OaepHash::try_from(recipient.hash) {
        Ok(proto::OaepHash::Unspecified) => None,
        Ok(proto::OaepHash::Sha256) => Some(Algorithm::RsaOaepSha256),
        Ok(proto::OaepHash::Sha1) => Some(Algorithm::RsaOaepSha1),
        Err(_) => {
            return Err(Error::violation(
                "recipient.hash",
                "a hash of the definition",
            ));
        }
    };
    Ok(Recipient { key, algorithm })
}

pub(super) const fn sealing(sealing: Option<Sealing>) -> proto::Sealing {
    match sealing {
        None => proto::Sealing::Unspecified,
        Some(Sealing::Enforced) => proto::Sealing::Enforced,
        Some(Sealing::Worker) => proto::Sealing::Worker,
    }
}

pub(super) fn timestamp(at: Timestamp) -> WireTimestamp {
    let micros = at.micros();
    WireTimestamp {
        seconds: micros.div_euclid(MICROS_PER_SECOND),
        nanos: i32::try_from(micros.rem_euclid(MICROS_PER_SECOND) * NANOS_PER_MICRO).unwrap_or(0),
    }
}

/// Parses a time. Returns `None` for a time before the year 1970 or after the year 9999.
pub(super) fn moment(at: &WireTimestamp) -> Option<Timestamp> {
    const SECONDS_END: i64 = 253_402_300_800;
    const NANOS_PER_SECOND: i32 = 1_000_000_000;
    if !(0..SECONDS_END).contains(&at.seconds) || !(0..NANOS_PER_SECOND).contains(&at.nanos) {
        return None;
    }
    let micros = at.seconds * MICROS_PER_SECOND + i64::from(at.nanos) / NANOS_PER_MICRO;
    Some(Timestamp::from_micros(micros))
}

pub(super) fn user_key(info: &RecordInfo) -> proto::UserKey {
    let state = match info.state {
        RecordState::Active => proto::UserKeyState::Active,
        RecordState::Deleted => proto::UserKeyState::Deleted,
    };
    proto::UserKey {
        user: info.address.user.as_str().to_owned(),
        key_name: info.address.name.as_str().to_owned(),
        record_id: info.id.as_bytes().to_vec(),
        state: state.into(),
        revision: info.revision.get(),
        wrapping_key_id: info.wrapping_key.as_bytes().to_vec(),
        create_time: Some(timestamp(info.created)),
        update_time: Some(timestamp(info.updated)),
        delete_time: info.deleted.map(timestamp),
        last_use_time: None,
    }
}

pub(super) fn user_key_view(view: &RecordView) -> proto::UserKey {
    proto::UserKey {
        last_use_time: view.used.map(timestamp),
        ..user_key(&view.info)
    }
}

pub(super) const fn purpose(purpose: Purpose) -> proto::WrappingKeyPurpose {
    match purpose {
        Purpose::Plain => proto::WrappingKeyPurpose::Plain,
        Purpose::Sealed => proto::WrappingKeyPurpose::Sealed,
    }
}

pub(super) const fn key_state(state: WrappingKeyState) -> proto::WrappingKeyState {
    match state {
        WrappingKeyState::PreActive => proto::WrappingKeyState::PreActive,
        WrappingKeyState::Active => proto::WrappingKeyState::Active,
        WrappingKeyState::Suspended => proto::WrappingKeyState::Suspended,
        WrappingKeyState::Deactivated => proto::WrappingKeyState::Deactivated,
        WrappingKeyState::Compromised => proto::WrappingKeyState::Compromised,
        WrappingKeyState::Destroyed => proto::WrappingKeyState::Destroyed,
    }
}

/// A wrapping key without its public key.
pub(super) fn wrapping_key(view: &WrappingKeyView) -> proto::WrappingKey {
    let on_token = view.on_token.as_ref();
    proto::WrappingKey {
        id: view.id.as_bytes().to_vec(),
        fingerprint: view.fingerprint.0.to_vec(),
        purpose: purpose(view.purpose).into(),
        state: key_state(view.state).into(),
        modulus_bits: on_token.map_or(0, |key| key.modulus_bits),
        algorithm: on_token.map_or_else(String::new, |key| key.algorithm.as_str().to_owned()),
        register_time: Some(timestamp(view.registered)),
        backup_confirmed: view.backup_confirmed,
        public_key_pem: String::new(),
        problem: bounded(view.problem.as_deref().unwrap_or_default()),
        destroy_time: view.destroyed_at.map(timestamp),
        tokens: view.tokens.clone(),
        missing_tokens: view.missing_tokens.clone(),
        token_assurances: view.assurances.clone(),
        sealing: sealing(view.sealing).into(),
    }
}

/// Shortens a string to the maximum length of an explanation.
pub(super) fn bounded(text: &str) -> String {
    text[..text.floor_char_boundary(EXPLANATION_BYTES_MAX)].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_come_back_as_they_went_and_others_are_none() {
        for micros in [0, 1, 1_700_000_000_000_001, 253_402_300_799_999_999] {
            let at = Timestamp::from_micros(micros);
            assert_eq!(moment(&timestamp(at)), Some(at));
        }
        for (seconds, nanos) in [
            (-1, 0),
            (253_402_300_800, 0),
            (i64::MAX, 0),
            (i64::MIN, 0),
            (1, -1),
            (1, 1_000_000_000),
        ] {
            assert_eq!(moment(&WireTimestamp { seconds, nanos }), None);
        }
    }
}
