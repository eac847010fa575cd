//! Vocabulary and messages, into each other.

use prost_types::Timestamp as WireTimestamp;

use crate::{
    broker::{RecordInfo, RecordState, RecordView, UserKeyRef},
    call::Timestamp,
    error::Error,
    key::{KeyName, Purpose, Revision, UserId, WrappingKeyState},
    proto,
};

const MICROS_PER_SECOND: i64 = 1_000_000;
const NANOS_PER_MICRO: i64 = 1_000;

pub(super) fn key_ref(user: &str, key_name: &str) -> Result<UserKeyRef, Error> {
    Ok(UserKeyRef {
        user: UserId::parse(user)?,
        name: KeyName::parse(key_name)?,
    })
}

pub(super) fn revision(number: u64, field: &'static str) -> Result<Revision, Error> {
    Revision::new(number).ok_or_else(|| Error::violation(field, "from 1 to 2^63 - 1"))
}

pub(super) fn timestamp(at: Timestamp) -> WireTimestamp {
    let micros = at.micros();
    WireTimestamp {
        seconds: micros.div_euclid(MICROS_PER_SECOND),
        nanos: i32::try_from(micros.rem_euclid(MICROS_PER_SECOND) * NANOS_PER_MICRO).unwrap_or(0),
    }
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
        WrappingKeyState::Active => proto::WrappingKeyState::Active,
        WrappingKeyState::Suspended => proto::WrappingKeyState::Suspended,
        WrappingKeyState::Deactivated => proto::WrappingKeyState::Deactivated,
        WrappingKeyState::Compromised => proto::WrappingKeyState::Compromised,
        WrappingKeyState::Destroyed => proto::WrappingKeyState::Destroyed,
    }
}
