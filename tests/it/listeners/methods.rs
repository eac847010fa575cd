//! Every method, with a request that it takes and one that it refuses.

use keybroker_proto::{
    AddClientSecretRequest, ApproveAccessRequestRequest, ApproveChangeRequest,
    ApproveForMemberRequest, BatchUnwrapUserKeysRequest, ChangeWrappingKeyStateRequest,
    ConfirmAccessAnswerRequest, CreateAccessRequestRequest, CreateClientCredentialRequest,
    CreateUserKeyRequest, DeleteUserKeyRequest, DenyAccessRequestRequest, EstablishTrustRequest,
    FetchAccessAnswerRequest, GetDeviceKeysRequest, GetUserKeyRequest, GetWrappingKeyRequest,
    ListApprovalsRequest, ListClientCredentialsRequest, ListDevicesRequest, ListUserKeysRequest,
    RejectChangeRequest, RenameDeviceRequest, ReplaceUserKeyRequest, ReportDeviceLostRequest,
    RestoreUserKeyRevisionRequest, ResumeRewrapRequest, RevokeClientCredentialRequest,
    RotateWrappingKeyRequest, StartRewrapRequest, TailAuditLogRequest, UndeleteUserKeyRequest,
    UntrustDevicesRequest, UnwrapUserKeyRequest,
};
use prost::Message;
use prost_reflect::DescriptorPool;
use tonic::Code;
use tonic_types::StatusExt as _;

use super::raw::{Answer, Raw, frame};
use crate::{
    client::{Caller, refused},
    process::Broker,
    site::Options,
};

/// Every method, and a caller who may call it.
pub(crate) const METHODS: [(&str, &str); 40] = [
    ("/keybroker.v1.UserKeyService/CreateUserKey", "enroller"),
    ("/keybroker.v1.UserKeyService/UnwrapUserKey", "releaser"),
    (
        "/keybroker.v1.UserKeyService/BatchUnwrapUserKeys",
        "releaser",
    ),
    ("/keybroker.v1.UserKeyService/ReplaceUserKey", "enroller"),
    ("/keybroker.v1.UserKeyService/GetUserKey", "releaser"),
    ("/keybroker.v1.UserKeyService/ListUserKeys", "releaser"),
    ("/keybroker.v1.UserKeyService/DeleteUserKey", "lifecycle"),
    ("/keybroker.v1.UserKeyService/UndeleteUserKey", "lifecycle"),
    (
        "/keybroker.v1.UserKeyService/RestoreUserKeyRevision",
        "lifecycle",
    ),
    ("/keybroker.v1.ControlService/ListWrappingKeys", "admin"),
    ("/keybroker.v1.ControlService/GetWrappingKey", "admin"),
    ("/keybroker.v1.ControlService/GetTokenState", "admin"),
    ("/keybroker.v1.ControlService/TailAuditLog", "auditor"),
    (
        "/keybroker.v1.ControlService/CreateClientCredential",
        "admin",
    ),
    ("/keybroker.v1.ControlService/AddClientSecret", "admin"),
    (
        "/keybroker.v1.ControlService/ListClientCredentials",
        "auditor",
    ),
    (
        "/keybroker.v1.ControlService/RevokeClientCredential",
        "admin",
    ),
    ("/keybroker.v1.ControlService/StartRewrap", "admin"),
    ("/keybroker.v1.ControlService/GetRewrap", "auditor"),
    ("/keybroker.v1.ControlService/PauseRewrap", "admin"),
    ("/keybroker.v1.ControlService/ResumeRewrap", "admin"),
    ("/keybroker.v1.ControlService/RotateWrappingKey", "admin"),
    (
        "/keybroker.v1.ControlService/ChangeWrappingKeyState",
        "admin",
    ),
    ("/keybroker.v1.ControlService/ListApprovals", "auditor"),
    ("/keybroker.v1.ControlService/ApproveChange", "admin"),
    ("/keybroker.v1.ControlService/RejectChange", "admin"),
    ("/keybroker.v1.DeviceService/EstablishTrust", "releaser"),
    ("/keybroker.v1.DeviceService/GetDeviceKeys", "releaser"),
    ("/keybroker.v1.DeviceService/ListDevices", "releaser"),
    ("/keybroker.v1.DeviceService/RenameDevice", "releaser"),
    ("/keybroker.v1.DeviceService/UntrustDevices", "releaser"),
    ("/keybroker.v1.DeviceService/ReportDeviceLost", "releaser"),
    ("/keybroker.v1.DeviceService/RotateDevices", "releaser"),
    (
        "/keybroker.v1.DeviceService/CreateAccessRequest",
        "releaser",
    ),
    ("/keybroker.v1.DeviceService/FetchAccessAnswer", "releaser"),
    (
        "/keybroker.v1.DeviceService/ConfirmAccessAnswer",
        "releaser",
    ),
    ("/keybroker.v1.DeviceService/ListAccessRequests", "releaser"),
    (
        "/keybroker.v1.DeviceService/ApproveAccessRequest",
        "releaser",
    ),
    ("/keybroker.v1.DeviceService/ApproveForMember", "releaser"),
    ("/keybroker.v1.DeviceService/DenyAccessRequest", "releaser"),
];

#[test]
fn the_list_of_methods_is_complete() {
    let pool = DescriptorPool::decode(keybroker_proto::FILE_DESCRIPTOR_SET).unwrap();
    let mut declared: Vec<_> = pool
        .services()
        .flat_map(|service| {
            let name = service.full_name().to_owned();
            let paths = service.methods().map(|m| format!("/{name}/{}", m.name()));
            paths.collect::<Vec<_>>()
        })
        .collect();
    let mut listed: Vec<_> = METHODS.iter().map(|(path, _)| (*path).to_owned()).collect();
    declared.sort();
    listed.sort();
    assert_eq!(declared, listed);
}

/// Every method refuses a message that does not parse from one who may call it, and audits it as its own action.
#[tokio::test(flavor = "multi_thread")]
async fn every_method_audits_what_it_cannot_read() {
    let broker = Broker::start(Options::default());
    for (path, caller) in METHODS {
        let caller = Raw::connect(&broker.site.pki, Some(caller), broker.grpc).await;
        let answer = caller.post(path, frame(&[0xff; 9]), &[]).await.unwrap();
        refused(Err::<(), _>(answer.status()), "REQUEST");
    }
    let audit = broker.site.audit();
    let mut actions: Vec<_> = audit
        .lines()
        .filter(|line| line.contains("\"REQUEST\""))
        .map(|line| {
            let (_, rest) = line.split_once(r#""action":""#).unwrap();
            rest.split('"').next().unwrap().to_owned()
        })
        .collect();
    actions.sort();
    assert_eq!(
        actions,
        [
            "access_request.approve",
            "access_request.approve_for_member",
            "access_request.create",
            "access_request.deny",
            "access_request.fetch",
            "access_request.fetch",
            "access_request.list",
            "approval.approve",
            "approval.list",
            "approval.reject",
            "audit.read",
            "client_credential.create",
            "client_credential.create",
            "client_credential.list",
            "client_credential.revoke",
            "device.establish",
            "device.fetch",
            "device.list",
            "device.rename",
            "device.report_lost",
            "device.rotate",
            "device.untrust",
            "token.read",
            "user_key.create",
            "user_key.delete",
            "user_key.get",
            "user_key.list",
            "user_key.replace",
            "user_key.restore",
            "user_key.undelete",
            "user_key.unwrap",
            "user_key.unwrap",
            "wrapping_key.activate",
            "wrapping_key.read",
            "wrapping_key.read",
            "wrapping_key.read",
            "wrapping_key.rewrap",
            "wrapping_key.rewrap",
            "wrapping_key.rewrap",
            "wrapping_key.rotate",
        ]
    );
}

async fn call(broker: &Broker, method: &str, message: Vec<u8>) -> Answer {
    let is_it = |path: &str| path.rsplit('/').next() == Some(method);
    let (path, caller) = METHODS.into_iter().find(|(path, _)| is_it(path)).unwrap();
    let caller = Raw::connect(&broker.site.pki, Some(caller), broker.grpc).await;
    caller.post(path, frame(&message), &[]).await.unwrap()
}

/// A method, a message with one field that is wrong, and the name of that field.
type Wrong = (&'static str, Vec<u8>, &'static str);

fn wrong(method: &'static str, message: &impl Message, field: &'static str) -> Wrong {
    (method, message.encode_to_vec(), field)
}

fn wrong_writes() -> Vec<Wrong> {
    let create = |key_name: &str, request_id: &str| CreateUserKeyRequest {
        user: "ada".to_owned(),
        key_name: key_name.to_owned(),
        key_material: vec![1],
        request_id: request_id.to_owned(),
    };
    let replace = ReplaceUserKeyRequest {
        user: "ada".to_owned(),
        key_name: "vault".to_owned(),
        key_material: vec![1; 191],
        expected_revision: 1,
        ..Default::default()
    };
    let delete = DeleteUserKeyRequest {
        user: "ada".to_owned(),
        key_name: "vault".to_owned(),
        expected_revision: 0,
        ..Default::default()
    };
    let undelete = UndeleteUserKeyRequest {
        key_name: "vault".to_owned(),
        ..Default::default()
    };
    let restore = |revision, expected_revision| RestoreUserKeyRevisionRequest {
        user: "ada".to_owned(),
        key_name: "vault".to_owned(),
        revision,
        expected_revision,
        ..Default::default()
    };
    vec![
        wrong("CreateUserKey", &create("Vault", ""), "key_name"),
        wrong("CreateUserKey", &create(&"n".repeat(65), ""), "key_name"),
        wrong("CreateUserKey", &create("vault", "7"), "request_id"),
        wrong("ReplaceUserKey", &replace, "key_material"),
        wrong("DeleteUserKey", &delete, "expected_revision"),
        wrong("UndeleteUserKey", &undelete, "user"),
        wrong("RestoreUserKeyRevision", &restore(0, 1), "revision"),
        wrong(
            "RestoreUserKeyRevision",
            &restore(1, u64::MAX),
            "expected_revision",
        ),
    ]
}

fn wrong_reads() -> Vec<Wrong> {
    let unwrap = |user: &str, key_name: &str| UnwrapUserKeyRequest {
        user: user.to_owned(),
        key_name: key_name.to_owned(),
        recipient: None,
    };
    let batch = |length| BatchUnwrapUserKeysRequest {
        items: vec![unwrap("ada", "vault"); length],
    };
    let get = GetUserKeyRequest {
        user: "ada".to_owned(),
        key_name: "ä".to_owned(),
    };
    let list = |page_size, page_token: &str, user: &str| ListUserKeysRequest {
        page_size,
        page_token: page_token.to_owned(),
        user: user.to_owned(),
        show_deleted: false,
    };
    vec![
        wrong("UnwrapUserKey", &unwrap("\u{7}", "vault"), "user"),
        wrong("BatchUnwrapUserKeys", &batch(0), "items"),
        wrong("BatchUnwrapUserKeys", &batch(65), "items"),
        wrong("GetUserKey", &get, "key_name"),
        wrong("ListUserKeys", &list(1_001, "", ""), "page_size"),
        wrong("ListUserKeys", &list(10, "no token", ""), "page_token"),
        wrong(
            "ListUserKeys",
            &list(10, &"A".repeat(1_025), ""),
            "page_token",
        ),
        wrong("ListUserKeys", &list(10, "", "\n"), "user"),
        wrong(
            "GetWrappingKey",
            &GetWrappingKeyRequest { id: vec![0; 15] },
            "id",
        ),
        wrong(
            "TailAuditLog",
            &TailAuditLogRequest { limit: 1_001 },
            "limit",
        ),
    ]
}

fn wrong_clients() -> Vec<Wrong> {
    let create = |label: &str, role: &str| CreateClientCredentialRequest {
        label: label.to_owned(),
        roles: vec![role.to_owned()],
        ..Default::default()
    };
    let add = |id: String, seconds| AddClientSecretRequest {
        id,
        expire_time: Some(prost_types::Timestamp { seconds, nanos: 0 }),
    };
    let list = |page_size, page_token: &str| ListClientCredentialsRequest {
        page_size,
        page_token: page_token.to_owned(),
    };
    let revoke = RevokeClientCredentialRequest {
        id: "00".repeat(16),
        secret_number: Some(0),
    };
    let unlimited = create("x", "release");
    let rotate = RotateWrappingKeyRequest {
        modulus_bits: 1_024,
        ..Default::default()
    };
    let change = |id: &[u8], change| ChangeWrappingKeyStateRequest {
        id: id.to_owned(),
        change,
        ..Default::default()
    };
    vec![
        wrong("CreateClientCredential", &create("", "enrol"), "label"),
        wrong("CreateClientCredential", &create("x", "root"), "roles"),
        wrong("CreateClientCredential", &create("x", "admin"), "roles"),
        wrong("CreateClientCredential", &unlimited, "roles"),
        wrong("AddClientSecret", &add("00".to_owned(), 1 << 33), "id"),
        wrong("AddClientSecret", &add("00".repeat(16), 1), "expire_time"),
        wrong("ListClientCredentials", &list(1_001, ""), "page_size"),
        wrong("ListClientCredentials", &list(1, "x"), "page_token"),
        wrong("RevokeClientCredential", &revoke, "secret_number"),
        wrong("RotateWrappingKey", &rotate, "modulus_bits"),
        wrong("ChangeWrappingKeyState", &change(&[7; 15], 2), "id"),
        wrong("ChangeWrappingKeyState", &change(&[7; 16], 99), "change"),
    ]
}

fn wrong_rewraps() -> Vec<Wrong> {
    let start = |bytes, rows_per_second_max| StartRewrapRequest {
        source_wrapping_key_id: vec![7; bytes],
        rows_per_second_max,
        from_compromised: false,
    };
    let resume = ResumeRewrapRequest {
        rows_per_second_max: Some(1_000_001),
    };
    let source = "source_wrapping_key_id";
    vec![
        wrong("StartRewrap", &start(15, 0), source),
        // No such wrapping key is registered.
        wrong("StartRewrap", &start(16, 0), source),
        wrong("StartRewrap", &start(0, 1_000_001), "rows_per_second_max"),
        wrong("ResumeRewrap", &resume, "rows_per_second_max"),
    ]
}

fn wrong_approvals() -> Vec<Wrong> {
    let approve = |id, digest| ApproveChangeRequest {
        id: vec![7; id],
        digest: vec![7; digest],
    };
    let reject = RejectChangeRequest { id: vec![7; 17] };
    let list = ListApprovalsRequest {
        show_all: false,
        id: vec![7; 15],
    };
    vec![
        wrong("ListApprovals", &list, "id"),
        wrong("ApproveChange", &approve(15, 32), "id"),
        wrong("ApproveChange", &approve(16, 31), "digest"),
        wrong("RejectChange", &reject, "id"),
    ]
}

fn wrong_devices() -> Vec<Wrong> {
    let id = |bytes| GetDeviceKeysRequest {
        device_id: vec![7; bytes],
    };
    let list = ListDevicesRequest {
        user: "\n".to_owned(),
    };
    let rename = |name: &str| RenameDeviceRequest {
        device_id: vec![7; 16],
        name: name.to_owned(),
    };
    let untrust = |all, devices| UntrustDevicesRequest {
        all,
        device_ids: vec![vec![7; 16]; devices],
        ..Default::default()
    };
    let report = ReportDeviceLostRequest {
        device_id: Vec::new(),
    };
    let establish = EstablishTrustRequest {
        device_id: vec![7; 16],
        ..Default::default()
    };
    let create = CreateAccessRequestRequest {
        device_id: vec![7; 16],
        ..Default::default()
    };
    let fetch = |id, code| FetchAccessAnswerRequest {
        access_request_id: vec![7; id],
        access_code: vec![7; code],
    };
    let confirm = ConfirmAccessAnswerRequest {
        access_request_id: vec![7; 16],
        access_code: vec![7; 65],
    };
    let approve = ApproveAccessRequestRequest {
        encryption: "none of these".to_owned(),
        ..Default::default()
    };
    let for_member = ApproveForMemberRequest {
        access_request_id: vec![7; 16],
        phrase_words: vec!["one".to_owned()],
    };
    let deny = DenyAccessRequestRequest {
        access_request_id: vec![7; 17],
        signature: None,
    };
    let request = "access_request_id";
    vec![
        wrong("GetDeviceKeys", &id(15), "device_id"),
        wrong("ListDevices", &list, "user"),
        wrong("RenameDevice", &rename(""), "name"),
        wrong("RenameDevice", &rename("\u{1b}"), "name"),
        wrong("UntrustDevices", &untrust(false, 0), "device_ids"),
        wrong("UntrustDevices", &untrust(true, 1), "device_ids"),
        wrong("ReportDeviceLost", &report, "device_id"),
        wrong("EstablishTrust", &establish, "name"),
        wrong("CreateAccessRequest", &create, "approver"),
        wrong("FetchAccessAnswer", &fetch(15, 16), request),
        wrong("FetchAccessAnswer", &fetch(16, 15), "access_code"),
        wrong("ConfirmAccessAnswer", &confirm, "access_code"),
        wrong("ApproveAccessRequest", &approve, "encryption"),
        wrong("ApproveForMember", &for_member, "phrase_words"),
        wrong("DenyAccessRequest", &deny, request),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn every_method_names_the_field_that_is_wrong() {
    let broker = Broker::start(Options::default());
    let enroller = Caller::of(&broker, "enroller");
    enroller.create("ada", b"material of ada").await.unwrap();
    let all = [
        wrong_writes(),
        wrong_reads(),
        wrong_clients(),
        wrong_rewraps(),
        wrong_approvals(),
        wrong_devices(),
    ];
    for (method, message, field) in all.concat() {
        let answer = call(&broker, method, message).await;
        let status = refused(Err::<(), _>(answer.status()), "REQUEST");
        assert_eq!(status.code(), Code::InvalidArgument, "{field}");
        let violations = status.get_details_bad_request().unwrap().field_violations;
        assert_eq!(violations.len(), 1, "{field}");
        assert_eq!(violations[0].field, field);
    }
    // An unknown wrapping key is none, and these take anything.
    let unknown = GetWrappingKeyRequest { id: vec![0; 16] };
    let unknown = call(&broker, "GetWrappingKey", unknown.encode_to_vec()).await;
    refused(Err::<(), _>(unknown.status()), "KEY_NOT_FOUND");
    for method in ["ListWrappingKeys", "GetTokenState"] {
        let answer = call(&broker, method, Vec::new()).await;
        assert_eq!(answer.status().code(), Code::Ok);
    }
}
