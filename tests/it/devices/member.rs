//! A member with apps: signs in with an access token, and does the client's side of the device protocol with opaque bytes in place of
//! encrypted keys, because the broker does not interpret them.

use std::{
    cell::Cell,
    time::{SystemTime, UNIX_EPOCH},
};

use aws_lc_rs::{
    encoding::{AsDer as _, PublicKeyX509Der},
    rsa::{KeyPair as RsaKeyPair, KeySize},
    signature::{Ed25519KeyPair, KeyPair as _},
};
use tonic::{Status, transport::Channel};

use keybroker_proto::{self as proto, device_service_client::DeviceServiceClient};

use crate::{
    client::{NAME, channel},
    identity::Identity,
    process::Broker,
    tokens::Holder,
};

pub(crate) const CODE: &[u8] = b"an access code of 27 bytes!";

/// Microseconds since 1970.
pub(crate) fn now_us() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    i64::try_from(since.as_micros()).unwrap()
}

/// The DER SubjectPublicKeyInfo of a new RSA key.
pub(crate) fn spki() -> Vec<u8> {
    let pair = RsaKeyPair::generate(KeySize::Rsa2048).unwrap();
    let der: PublicKeyX509Der<'_> = pair.public_key().as_der().unwrap();
    der.as_ref().to_vec()
}

/// An app on a device.
pub(crate) struct App {
    pub(crate) id: Vec<u8>,
    pub(crate) name: String,
    pair: Ed25519KeyPair,
    last: Cell<i64>,
    /// How far the clock of the app is ahead, in microseconds.
    pub(crate) ahead: Cell<i64>,
}

impl App {
    pub(crate) fn new(number: u8) -> Self {
        Self {
            id: vec![number; 16],
            name: format!("device {number}"),
            pair: Ed25519KeyPair::generate().unwrap(),
            last: Cell::new(0),
            ahead: Cell::new(0),
        }
    }

    pub(crate) fn public(&self) -> Vec<u8> {
        self.pair.public_key().as_ref().to_vec()
    }

    /// Signs a change, as docs/devices.md describes it.
    pub(crate) fn sign(&self, kind: &str, user: &str, fields: &[&[u8]]) -> proto::DeviceSignature {
        let at = (now_us() + self.ahead.get()).max(self.last.get() + 1);
        self.last.set(at);
        let at_bytes = at.to_be_bytes();
        let head: [&[u8]; 6] = [
            b"keybroker/device-signature/v1",
            kind.as_bytes(),
            b"default",
            user.as_bytes(),
            &self.id,
            &at_bytes,
        ];
        let mut signed = Vec::new();
        for field in head.iter().chain(fields) {
            signed.extend(u32::try_from(field.len()).unwrap().to_be_bytes());
            signed.extend(*field);
        }
        proto::DeviceSignature {
            device_id: self.id.clone(),
            sign_time_us: at,
            signature: self.pair.sign(&signed).as_ref().to_vec(),
        }
    }

    /// Different bytes for each device.
    pub(crate) fn keys(&self) -> proto::DeviceKeys {
        proto::DeviceKeys {
            user_key: [&b"user key for "[..], &self.id].concat(),
            public_key: [&b"public key of "[..], &self.id].concat(),
            private_key: [&b"private key of "[..], &self.id].concat(),
        }
    }

    /// The trust of this app, signed by `signer`.
    pub(crate) fn trust(
        &self,
        user: &str,
        revision: u64,
        signer: &Self,
    ) -> proto::EstablishTrustRequest {
        let keys = self.keys();
        let public = self.public();
        let number = revision.to_be_bytes();
        let fields: [&[u8]; 9] = [
            &self.id,
            self.name.as_bytes(),
            b"laptop",
            &public,
            NAME.as_bytes(),
            &number,
            &keys.user_key,
            &keys.public_key,
            &keys.private_key,
        ];
        let signature = signer.sign("establish", user, &fields);
        proto::EstablishTrustRequest {
            device_id: self.id.clone(),
            name: self.name.clone(),
            r#type: "laptop".to_owned(),
            verification_key: public,
            key_name: NAME.to_owned(),
            revision,
            keys: Some(keys),
            access_request_id: Vec::new(),
            signature: Some(signature),
        }
    }

    /// A request for access of this app.
    pub(crate) fn wants(
        &self,
        approver: proto::AccessApprover,
    ) -> proto::CreateAccessRequestRequest {
        proto::CreateAccessRequestRequest {
            device_id: self.id.clone(),
            device_name: self.name.clone(),
            device_type: "phone".to_owned(),
            verification_key: self.public(),
            public_key: spki(),
            access_code: CODE.to_vec(),
            key_name: NAME.to_owned(),
            approver: approver.into(),
        }
    }
}

/// A signed-in member.
pub(crate) struct Member {
    pub(crate) holder: Holder,
    pub(crate) user: String,
    devices: DeviceServiceClient<Channel>,
}

macro_rules! calls {
    ($($name:ident: $request:ident -> $response:ident;)+) => {
        impl Member {
            $(pub(crate) async fn $name(
                &self,
                request: proto::$request,
            ) -> Result<proto::$response, Status> {
                let request = self.holder.request(request);
                let answer = self.devices.clone().$name(request).await?;
                Ok(answer.into_inner())
            })+
        }
    };
}
calls! {
    establish_trust: EstablishTrustRequest -> EstablishTrustResponse;
    get_device_keys: GetDeviceKeysRequest -> GetDeviceKeysResponse;
    list_devices: ListDevicesRequest -> ListDevicesResponse;
    rename_device: RenameDeviceRequest -> RenameDeviceResponse;
    untrust_devices: UntrustDevicesRequest -> UntrustDevicesResponse;
    report_device_lost: ReportDeviceLostRequest -> ReportDeviceLostResponse;
    rotate_devices: RotateDevicesRequest -> RotateDevicesResponse;
    create_access_request: CreateAccessRequestRequest -> CreateAccessRequestResponse;
    fetch_access_answer: FetchAccessAnswerRequest -> FetchAccessAnswerResponse;
    confirm_access_answer: ConfirmAccessAnswerRequest -> ConfirmAccessAnswerResponse;
    list_access_requests: ListAccessRequestsRequest -> ListAccessRequestsResponse;
    approve_access_request: ApproveAccessRequestRequest -> ApproveAccessRequestResponse;
    approve_for_member: ApproveForMemberRequest -> ApproveForMemberResponse;
    deny_access_request: DenyAccessRequestRequest -> DenyAccessRequestResponse;
}

impl Member {
    pub(crate) fn of(broker: &Broker, service: &Identity, user: &str) -> Self {
        Self::with_token(broker, user, &service.user_token(user))
    }

    pub(crate) fn with_token(broker: &Broker, user: &str, token: &str) -> Self {
        Self {
            holder: Holder::of(broker, token),
            user: user.to_owned(),
            devices: DeviceServiceClient::new(channel(&broker.site.pki, None, broker.grpc)),
        }
    }

    /// The client, for calls with other settings.
    pub(crate) fn client(&self) -> DeviceServiceClient<Channel> {
        self.devices.clone()
    }

    /// A member with a user key and a first trusted device.
    pub(crate) async fn with_first_device(
        broker: &Broker,
        service: &Identity,
        user: &str,
    ) -> (Self, App) {
        let member = Self::of(broker, service, user);
        member.holder.create(user).await.unwrap();
        let first = App::new(1);
        let trust = first.trust(user, 1, &first);
        member.establish_trust(trust).await.unwrap();
        (member, first)
    }

    /// Trusts another device, with the signature of a trusted one.
    pub(crate) async fn trusts(&self, app: &App, signer: &App) -> Result<proto::Device, Status> {
        let made = self
            .establish_trust(app.trust(&self.user, 1, signer))
            .await?;
        Ok(made.device.unwrap())
    }

    pub(crate) async fn keys_of(&self, app: &App) -> Result<proto::GetDeviceKeysResponse, Status> {
        self.get_device_keys(proto::GetDeviceKeysRequest {
            device_id: app.id.clone(),
        })
        .await
    }

    pub(crate) async fn devices(&self) -> Vec<proto::Device> {
        let listed = self
            .list_devices(proto::ListDevicesRequest::default())
            .await;
        listed.unwrap().devices
    }

    /// Asks for access for a new device.
    pub(crate) async fn asks(
        &self,
        app: &App,
        approver: proto::AccessApprover,
    ) -> Result<proto::AccessRequest, Status> {
        let made = self.create_access_request(app.wants(approver)).await?;
        Ok(made.access_request.unwrap())
    }

    /// Approves a request with a trusted device.
    pub(crate) fn approval(
        &self,
        request: &proto::AccessRequest,
        signer: &App,
        answer: &[u8],
    ) -> proto::ApproveAccessRequestRequest {
        let fields: [&[u8]; 4] = [&request.id, &request.public_key, answer, b"rsa-oaep-sha256"];
        proto::ApproveAccessRequestRequest {
            access_request_id: request.id.clone(),
            encrypted_user_key: answer.to_vec(),
            encryption: "rsa-oaep-sha256".to_owned(),
            signature: Some(signer.sign("approve", &self.user, &fields)),
        }
    }

    pub(crate) async fn approves(
        &self,
        request: &proto::AccessRequest,
        signer: &App,
    ) -> Result<proto::AccessRequest, Status> {
        let approval = self.approval(request, signer, b"sealed answer");
        let approved = self.approve_access_request(approval).await?;
        Ok(approved.access_request.unwrap())
    }

    pub(crate) async fn fetches(
        &self,
        request: &proto::AccessRequest,
        code: &[u8],
    ) -> Result<proto::FetchAccessAnswerResponse, Status> {
        self.fetch_access_answer(proto::FetchAccessAnswerRequest {
            access_request_id: request.id.clone(),
            access_code: code.to_vec(),
        })
        .await
    }

    pub(crate) async fn confirms(&self, request: &proto::AccessRequest) -> Result<(), Status> {
        let confirmed = self.confirm_access_answer(proto::ConfirmAccessAnswerRequest {
            access_request_id: request.id.clone(),
            access_code: CODE.to_vec(),
        });
        confirmed.await.map(drop)
    }

    pub(crate) async fn denies(
        &self,
        request: &proto::AccessRequest,
    ) -> Result<proto::AccessRequest, Status> {
        self.deny(request, None).await
    }

    /// Denies a request, or ends what followed from its approval, signed by `signer`.
    pub(crate) async fn ends_approval(
        &self,
        request: &proto::AccessRequest,
        signer: Option<&App>,
    ) -> Result<proto::AccessRequest, Status> {
        let fields: [&[u8]; 3] = [b"untrusted", b"these", &request.device_id];
        let signature = signer.map(|signer| signer.sign("untrust", &self.user, &fields));
        self.deny(request, signature).await
    }

    async fn deny(
        &self,
        request: &proto::AccessRequest,
        signature: Option<proto::DeviceSignature>,
    ) -> Result<proto::AccessRequest, Status> {
        let denied = self.deny_access_request(proto::DenyAccessRequestRequest {
            access_request_id: request.id.clone(),
            signature,
        });
        Ok(denied.await?.access_request.unwrap())
    }

    /// All requests of the member.
    pub(crate) async fn requests(&self) -> Vec<proto::AccessRequest> {
        let all = proto::ListAccessRequestsRequest {
            show_all: true,
            ..proto::ListAccessRequestsRequest::default()
        };
        self.list_access_requests(all)
            .await
            .unwrap()
            .access_requests
    }

    /// Ends the trust of these devices, signed by `signer`.
    pub(crate) fn end(
        &self,
        apps: &[&App],
        lost: bool,
        signer: Option<&App>,
    ) -> proto::UntrustDevicesRequest {
        let cause: &[u8] = if lost { b"lost" } else { b"untrusted" };
        let which: &[u8] = if apps.is_empty() { b"all" } else { b"these" };
        let mut fields: Vec<&[u8]> = vec![cause, which];
        fields.extend(apps.iter().map(|app| app.id.as_slice()));
        proto::UntrustDevicesRequest {
            device_ids: apps.iter().map(|app| app.id.clone()).collect(),
            all: apps.is_empty(),
            lost,
            user: String::new(),
            signature: signer.map(|signer| signer.sign("untrust", &self.user, &fields)),
        }
    }

    /// A rotation of the user key and of these devices.
    pub(crate) fn rotation(
        &self,
        expected: u64,
        material: &[u8],
        kept: &[&App],
        untrusted: &[&App],
        signer: &App,
    ) -> proto::RotateDevicesRequest {
        let expected_bytes = expected.to_be_bytes();
        let count = u32::try_from(kept.len()).unwrap().to_be_bytes();
        let devices: Vec<_> = kept
            .iter()
            .map(|app| proto::RotatedDevice {
                device_id: app.id.clone(),
                user_key: [b"rotated user key ", material, &app.id[..]].concat(),
                public_key: [b"rotated public key ", material, &app.id[..]].concat(),
            })
            .collect();
        let mut fields: Vec<&[u8]> = vec![NAME.as_bytes(), &expected_bytes, material, &count];
        for device in &devices {
            fields.extend([
                device.device_id.as_slice(),
                &device.user_key,
                &device.public_key,
            ]);
        }
        fields.extend(untrusted.iter().map(|app| app.id.as_slice()));
        let signature = signer.sign("rotate", &self.user, &fields);
        proto::RotateDevicesRequest {
            key_name: NAME.to_owned(),
            key_material: material.to_vec(),
            expected_revision: expected,
            untrusted_device_ids: untrusted.iter().map(|app| app.id.clone()).collect(),
            signature: Some(signature),
            devices,
        }
    }
}
