//! Calls of the device service: trusted devices of a member, and requests of new devices for access. `docs/devices.md` describes
//! the protocol, the keys that an app makes, and the bytes that a device signs.
//!
//! The calls return protobuf messages, which contain only encrypted keys.

use keybroker_core::key::{AccessRequestId, DeviceId, UserId};
use keybroker_proto::{self as proto, device_service_client::DeviceServiceClient};
use tonic::transport::Channel;

use crate::{
    Client,
    call::{Attempt, NonIdempotent, Read},
    error::AttemptError,
};

/// Trusted devices. A failed call returns an [`Error`](crate::Error).
impl Client {
    /// Lists the devices of the caller or, for an approver, of a member.
    pub fn list_devices(&self, user: Option<&UserId>) -> Read<'_, proto::ListDevicesResponse> {
        let user = user.map_or_else(String::new, |user| user.as_str().to_owned());
        Read::new(self.shared(), move |attempt| {
            let request = attempt.request(proto::ListDevicesRequest { user: user.clone() });
            async move { Ok(service(&attempt).list_devices(request).await?.into_inner()) }
        })
    }

    /// Returns the encrypted keys of a trusted device of the caller.
    pub fn get_device_keys(&self, device: DeviceId) -> Read<'_, proto::GetDeviceKeysResponse> {
        Read::new(self.shared(), move |attempt| async move {
            let request = attempt.request(proto::GetDeviceKeysRequest {
                device_id: device.as_bytes().to_vec(),
            });
            let answer = service(&attempt).get_device_keys(request).await?;
            Ok(answer.into_inner())
        })
    }

    /// Establishes the trust of a device of the caller.
    pub fn establish_trust(
        &self,
        trust: proto::EstablishTrustRequest,
    ) -> NonIdempotent<'_, proto::Device> {
        NonIdempotent::new(self.shared(), move |attempt| {
            let request = attempt.request(trust.clone());
            async move {
                let answer = service(&attempt).establish_trust(request).await?;
                device(answer.into_inner().device)
            }
        })
    }

    /// Gives a device of the caller another name. The call is retried like a read, because a repeated call changes nothing.
    pub fn rename_device(&self, id: DeviceId, name: impl Into<String>) -> Read<'_, proto::Device> {
        let name = name.into();
        Read::new(self.shared(), move |attempt| {
            let request = attempt.request(proto::RenameDeviceRequest {
                device_id: id.as_bytes().to_vec(),
                name: name.clone(),
            });
            async move {
                let answer = service(&attempt).rename_device(request).await?;
                device(answer.into_inner().device)
            }
        })
    }

    /// Ends the trust of devices, and returns these devices.
    pub fn untrust_devices(
        &self,
        ended: proto::UntrustDevicesRequest,
    ) -> NonIdempotent<'_, Vec<proto::Device>> {
        NonIdempotent::new(self.shared(), move |attempt| {
            let request = attempt.request(ended.clone());
            async move {
                let answer = service(&attempt).untrust_devices(request).await?;
                Ok(answer.into_inner().devices)
            }
        })
    }

    /// Records that a device of the caller was lost, without ending its trust.
    pub fn report_device_lost(&self, id: DeviceId) -> NonIdempotent<'_, proto::Device> {
        NonIdempotent::new(self.shared(), move |attempt| async move {
            let request = attempt.request(proto::ReportDeviceLostRequest {
                device_id: id.as_bytes().to_vec(),
            });
            let answer = service(&attempt).report_device_lost(request).await?;
            device(answer.into_inner().device)
        })
    }

    /// Replaces the user key of the caller and the encrypted keys of all trusted devices, and returns the new revision.
    pub fn rotate_devices(&self, rotation: proto::RotateDevicesRequest) -> NonIdempotent<'_, u64> {
        NonIdempotent::new(self.shared(), move |attempt| {
            let request = attempt.request(rotation.clone());
            async move {
                let answer = service(&attempt).rotate_devices(request).await?;
                Ok(answer.into_inner().revision)
            }
        })
    }
}

/// Requests of new devices for access. A failed call returns an [`Error`](crate::Error).
impl Client {
    /// Asks for the user key for a new device of the caller.
    pub fn create_access_request(
        &self,
        wanted: proto::CreateAccessRequestRequest,
    ) -> NonIdempotent<'_, proto::AccessRequest> {
        NonIdempotent::new(self.shared(), move |attempt| {
            let request = attempt.request(wanted.clone());
            async move {
                let answer = service(&attempt).create_access_request(request).await?;
                access(answer.into_inner().access_request)
            }
        })
    }

    /// Returns the state of a request that the caller made and, if it was approved, the answer.
    pub fn fetch_access_answer(
        &self,
        id: AccessRequestId,
        access_code: &[u8],
    ) -> NonIdempotent<'_, proto::FetchAccessAnswerResponse> {
        let access_code = access_code.to_vec();
        NonIdempotent::new(self.shared(), move |attempt| {
            let request = attempt.request(proto::FetchAccessAnswerRequest {
                access_request_id: id.as_bytes().to_vec(),
                access_code: access_code.clone(),
            });
            async move {
                let answer = service(&attempt).fetch_access_answer(request).await?;
                Ok(answer.into_inner())
            }
        })
    }

    /// Confirms that the new device has the user key.
    pub fn confirm_access_answer(
        &self,
        id: AccessRequestId,
        access_code: &[u8],
    ) -> NonIdempotent<'_, ()> {
        let access_code = access_code.to_vec();
        NonIdempotent::new(self.shared(), move |attempt| {
            let request = attempt.request(proto::ConfirmAccessAnswerRequest {
                access_request_id: id.as_bytes().to_vec(),
                access_code: access_code.clone(),
            });
            async move {
                service(&attempt).confirm_access_answer(request).await?;
                Ok(())
            }
        })
    }

    /// Returns one page of the requests of the caller's devices or, for an approver, of all members whom the approver covers: those that
    /// are pending or, with `show_all`, also those that are over. `page_token` is the `next_page_token` of the page before, and empty for
    /// the first page.
    pub fn list_access_requests(
        &self,
        show_all: bool,
        page_token: impl Into<String>,
    ) -> Read<'_, proto::ListAccessRequestsResponse> {
        let page_token = page_token.into();
        Read::new(self.shared(), move |attempt| {
            let request = attempt.request(proto::ListAccessRequestsRequest {
                show_all,
                page_size: 0,
                page_token: page_token.clone(),
            });
            async move {
                let answer = service(&attempt).list_access_requests(request).await?;
                Ok(answer.into_inner())
            }
        })
    }

    /// Approves the request of another device of the caller.
    pub fn approve_access_request(
        &self,
        approval: proto::ApproveAccessRequestRequest,
    ) -> NonIdempotent<'_, proto::AccessRequest> {
        NonIdempotent::new(self.shared(), move |attempt| {
            let request = attempt.request(approval.clone());
            async move {
                let answer = service(&attempt).approve_access_request(request).await?;
                access(answer.into_inner().access_request)
            }
        })
    }

    /// Approves the request of another person as an approver. `words` are the two words of the phrase that the list hides, as the
    /// member says them.
    pub fn approve_for_member(
        &self,
        id: AccessRequestId,
        words: [String; 2],
    ) -> NonIdempotent<'_, proto::AccessRequest> {
        NonIdempotent::new(self.shared(), move |attempt| {
            let request = attempt.request(proto::ApproveForMemberRequest {
                access_request_id: id.as_bytes().to_vec(),
                phrase_words: words.to_vec(),
            });
            async move {
                let answer = service(&attempt).approve_for_member(request).await?;
                access(answer.into_inner().access_request)
            }
        })
    }

    /// Denies a pending request, or withdraws an approval. If a device was trusted because of the approval, its trust is ended; a member
    /// then needs the signature of a trusted device.
    pub fn deny_access_request(
        &self,
        id: AccessRequestId,
        signature: Option<proto::DeviceSignature>,
    ) -> NonIdempotent<'_, proto::AccessRequest> {
        NonIdempotent::new(self.shared(), move |attempt| {
            let request = attempt.request(proto::DenyAccessRequestRequest {
                access_request_id: id.as_bytes().to_vec(),
                signature: signature.clone(),
            });
            async move {
                let answer = service(&attempt).deny_access_request(request).await?;
                access(answer.into_inner().access_request)
            }
        })
    }
}

fn service(attempt: &Attempt) -> DeviceServiceClient<Channel> {
    DeviceServiceClient::new(attempt.channel.clone())
}

fn device(device: Option<proto::Device>) -> Result<proto::Device, AttemptError> {
    device.ok_or(AttemptError::Invalid("device is absent"))
}

fn access(request: Option<proto::AccessRequest>) -> Result<proto::AccessRequest, AttemptError> {
    request.ok_or(AttemptError::Invalid("access_request is absent"))
}
