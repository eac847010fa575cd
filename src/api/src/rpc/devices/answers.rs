//! Converts devices and requests for access to messages.

use keybroker_broker::{AccessAnswer, AccessList, AccessView, DeviceList, DeviceView};
use keybroker_core::device::{AccessApprover, AccessState, DeviceState};
use keybroker_proto as proto;

use crate::rpc::convert::timestamp;

const fn device_state(state: DeviceState) -> proto::DeviceState {
    match state {
        DeviceState::Trusted => proto::DeviceState::Trusted,
        DeviceState::Untrusted => proto::DeviceState::Untrusted,
        DeviceState::Lost => proto::DeviceState::Lost,
    }
}

const fn access_state(state: AccessState) -> proto::AccessRequestState {
    match state {
        AccessState::Pending => proto::AccessRequestState::Pending,
        AccessState::Approved => proto::AccessRequestState::Approved,
        AccessState::Denied => proto::AccessRequestState::Denied,
        AccessState::Consumed => proto::AccessRequestState::Consumed,
        AccessState::Revoked => proto::AccessRequestState::Revoked,
        AccessState::Expired => proto::AccessRequestState::Expired,
    }
}

const fn approver(approver: AccessApprover) -> proto::AccessApprover {
    match approver {
        AccessApprover::Device => proto::AccessApprover::Device,
        AccessApprover::Administrator => proto::AccessApprover::Administrator,
    }
}

pub(super) fn device(view: &DeviceView) -> proto::Device {
    let row = &view.row;
    proto::Device {
        id: row.address.device.as_bytes().to_vec(),
        state: device_state(row.state).into(),
        name: row.name.clone(),
        r#type: row.kind.clone(),
        key_name: row.key_name.as_str().to_owned(),
        revision: row.revision.get(),
        encrypted_public_key: row.keys.public_key.clone(),
        trust_time: Some(timestamp(row.trusted)),
        last_use_time: row.used.map(timestamp),
        lost_time: row.lost.map(timestamp),
        verified: view.is_verified,
        altered: view.is_altered,
    }
}

/// A request for access. An approver gets neither the public key nor its SHA-256, because all words of the phrase could be computed
/// from either: HMAC hashes a key that is longer than its block, so the digest is as good as the key.
pub(super) fn access_request(view: &AccessView) -> proto::AccessRequest {
    let (row, decision) = (&view.row, view.row.decision.as_ref());
    let is_phrase_complete = view.phrase.words.iter().all(Option::is_some);
    let decided_by = decision.and_then(|decision| decision.device);
    proto::AccessRequest {
        id: row.id.as_bytes().to_vec(),
        state: access_state(view.state).into(),
        approver: approver(row.approver).into(),
        user: row.device.address.user.as_str().to_owned(),
        key_name: row.key_name.as_str().to_owned(),
        device_id: row.device.address.device.as_bytes().to_vec(),
        device_name: row.device.name.clone(),
        device_type: row.device.kind.clone(),
        public_key: if is_phrase_complete {
            row.public_key.clone()
        } else {
            Vec::new()
        },
        public_key_sha256: if is_phrase_complete {
            view.public_key_sha256().to_vec()
        } else {
            Vec::new()
        },
        requested_by: row.requested_by.clone(),
        peer: row.peer.clone(),
        request_time: Some(timestamp(row.requested)),
        expire_time: Some(timestamp(row.expires)),
        decided_by: decision.map_or_else(String::new, |decision| decision.by.clone()),
        decided_by_device_id: decided_by.map_or_else(Vec::new, |id| id.as_bytes().to_vec()),
        decide_time: decision.map(|decision| timestamp(decision.at)),
        phrase: view
            .phrase
            .words
            .iter()
            .map(|word| word.unwrap_or_default().to_owned())
            .collect(),
        verified: view.is_verified,
        altered: view.is_altered,
        place: view.place.clone(),
        first_approved_by: row.first_approved_by.clone().unwrap_or_default(),
    }
}

pub(super) fn fetched(answer: AccessAnswer) -> proto::FetchAccessAnswerResponse {
    let (encrypted_user_key, encryption) = match answer.answer {
        Some(answer) => (answer.bytes, answer.form),
        None => (Vec::new(), String::new()),
    };
    proto::FetchAccessAnswerResponse {
        state: access_state(answer.state).into(),
        encrypted_user_key,
        encryption,
        expire_time: Some(timestamp(answer.expires)),
    }
}

pub(super) fn damaged_device_ids(list: &DeviceList) -> Vec<Vec<u8>> {
    let ids = list.damaged.iter().map(|row| {
        let address = row.address.as_ref();
        address.map_or_else(Vec::new, |at| at.device.as_bytes().to_vec())
    });
    ids.collect()
}

pub(super) fn damaged_access_ids(list: &AccessList) -> Vec<Vec<u8>> {
    let ids = list.damaged.iter();
    ids.map(|row| row.id.map_or_else(Vec::new, |id| id.as_bytes().to_vec()))
        .collect()
}
