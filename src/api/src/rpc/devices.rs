//! Implements `keybroker.v1.DeviceService`.

use std::sync::Arc;

use tonic::{Request, Response, Status, async_trait};

use keybroker_broker::Broker;
use keybroker_core::principal::Action;
use keybroker_proto as proto;
use keybroker_proto::device_service_server::DeviceService;

use super::AuthenticatedCall;

mod answers;
mod requests;

use answers::{access_request, damaged_access_ids, damaged_device_ids, device};

#[derive(Debug)]
pub(super) struct Devices {
    broker: Arc<Broker>,
}

impl Devices {
    pub(super) fn new(broker: Arc<Broker>) -> Self {
        Self { broker }
    }
}

#[async_trait]
impl DeviceService for Devices {
    async fn establish_trust(
        &self,
        request: Request<proto::EstablishTrustRequest>,
    ) -> Result<Response<proto::EstablishTrustResponse>, Status> {
        let action = Action::EstablishDevice;
        let (entered, new) =
            AuthenticatedCall::enter(&self.broker, request, action, requests::new_device).await?;
        let made = self
            .broker
            .establish_trust(&entered.principal, &entered.call, new)
            .await
            .map_err(|error| entered.status(&error))?;
        Ok(Response::new(proto::EstablishTrustResponse {
            device: Some(device(&made)),
        }))
    }

    async fn get_device_keys(
        &self,
        request: Request<proto::GetDeviceKeysRequest>,
    ) -> Result<Response<proto::GetDeviceKeysResponse>, Status> {
        let parse = |r: proto::GetDeviceKeysRequest| requests::device_id("device_id", &r.device_id);
        let (entered, id) =
            AuthenticatedCall::enter(&self.broker, request, Action::FetchDevice, parse).await?;
        let row = self
            .broker
            .device_keys(&entered.principal, &entered.call, id)
            .await
            .map_err(|error| entered.status(&error))?;
        Ok(Response::new(proto::GetDeviceKeysResponse {
            keys: Some(proto::DeviceKeys {
                user_key: row.keys.user_key,
                public_key: row.keys.public_key,
                private_key: row.keys.private_key,
            }),
            key_name: row.key_name.as_str().to_owned(),
            revision: row.revision.get(),
        }))
    }

    async fn list_devices(
        &self,
        request: Request<proto::ListDevicesRequest>,
    ) -> Result<Response<proto::ListDevicesResponse>, Status> {
        let parse = |r: proto::ListDevicesRequest| requests::member(&r.user);
        let (entered, user) =
            AuthenticatedCall::enter(&self.broker, request, Action::ListDevices, parse).await?;
        let list = self
            .broker
            .list_devices(&entered.principal, &entered.call, user.as_ref())
            .await
            .map_err(|error| entered.status(&error))?;
        Ok(Response::new(proto::ListDevicesResponse {
            devices: list.devices.iter().map(device).collect(),
            damaged_device_ids: damaged_device_ids(&list),
        }))
    }

    async fn rename_device(
        &self,
        request: Request<proto::RenameDeviceRequest>,
    ) -> Result<Response<proto::RenameDeviceResponse>, Status> {
        let parse = |r: proto::RenameDeviceRequest| {
            let id = requests::device_id("device_id", &r.device_id)?;
            Ok((id, requests::device_name("name", r.name)?))
        };
        let (entered, (id, name)) =
            AuthenticatedCall::enter(&self.broker, request, Action::RenameDevice, parse).await?;
        let renamed = self
            .broker
            .rename_device(&entered.principal, &entered.call, id, name)
            .await
            .map_err(|error| entered.status(&error))?;
        Ok(Response::new(proto::RenameDeviceResponse {
            device: Some(device(&renamed)),
        }))
    }

    async fn untrust_devices(
        &self,
        request: Request<proto::UntrustDevicesRequest>,
    ) -> Result<Response<proto::UntrustDevicesResponse>, Status> {
        let action = Action::UntrustDevice;
        let (entered, ended) =
            AuthenticatedCall::enter(&self.broker, request, action, requests::untrusted).await?;
        let rows = self
            .broker
            .untrust_devices(&entered.principal, &entered.call, ended)
            .await
            .map_err(|error| entered.status(&error))?;
        Ok(Response::new(proto::UntrustDevicesResponse {
            devices: rows.iter().map(device).collect(),
        }))
    }

    async fn report_device_lost(
        &self,
        request: Request<proto::ReportDeviceLostRequest>,
    ) -> Result<Response<proto::ReportDeviceLostResponse>, Status> {
        let parse =
            |r: proto::ReportDeviceLostRequest| requests::device_id("device_id", &r.device_id);
        let (entered, id) =
            AuthenticatedCall::enter(&self.broker, request, Action::ReportDevice, parse).await?;
        let reported = self
            .broker
            .report_device_lost(&entered.principal, &entered.call, id)
            .await
            .map_err(|error| entered.status(&error))?;
        Ok(Response::new(proto::ReportDeviceLostResponse {
            device: Some(device(&reported)),
        }))
    }

    async fn rotate_devices(
        &self,
        request: Request<proto::RotateDevicesRequest>,
    ) -> Result<Response<proto::RotateDevicesResponse>, Status> {
        let entered = AuthenticatedCall::of(&request)?;
        let parsed = requests::rotation(&entered.principal, request.into_inner());
        let rotation = entered
            .parsed(&self.broker, Action::RotateDevices, parsed)
            .await?;
        let record = self
            .broker
            .rotate_devices(&entered.principal, &entered.call, rotation)
            .await
            .map_err(|error| entered.status(&error))?;
        Ok(Response::new(proto::RotateDevicesResponse {
            revision: record.revision.get(),
        }))
    }

    async fn create_access_request(
        &self,
        request: Request<proto::CreateAccessRequestRequest>,
    ) -> Result<Response<proto::CreateAccessRequestResponse>, Status> {
        let action = Action::RequestAccess;
        let (entered, new) =
            AuthenticatedCall::enter(&self.broker, request, action, requests::new_access).await?;
        let made = self
            .broker
            .request_access(&entered.principal, &entered.call, new)
            .await
            .map_err(|error| entered.status(&error))?;
        Ok(Response::new(proto::CreateAccessRequestResponse {
            access_request: Some(access_request(&made)),
        }))
    }

    async fn fetch_access_answer(
        &self,
        request: Request<proto::FetchAccessAnswerRequest>,
    ) -> Result<Response<proto::FetchAccessAnswerResponse>, Status> {
        let parse = |r: proto::FetchAccessAnswerRequest| {
            Ok((
                requests::access_id(&r.access_request_id)?,
                requests::access_code(r.access_code)?,
            ))
        };
        let (entered, (id, code)) =
            AuthenticatedCall::enter(&self.broker, request, Action::FetchAccess, parse).await?;
        let fetched = self
            .broker
            .fetch_access(&entered.principal, &entered.call, id, code)
            .await
            .map_err(|error| entered.status(&error))?;
        Ok(Response::new(answers::fetched(fetched)))
    }

    async fn confirm_access_answer(
        &self,
        request: Request<proto::ConfirmAccessAnswerRequest>,
    ) -> Result<Response<proto::ConfirmAccessAnswerResponse>, Status> {
        let parse = |r: proto::ConfirmAccessAnswerRequest| {
            Ok((
                requests::access_id(&r.access_request_id)?,
                requests::access_code(r.access_code)?,
            ))
        };
        let (entered, (id, code)) =
            AuthenticatedCall::enter(&self.broker, request, Action::FetchAccess, parse).await?;
        self.broker
            .confirm_access(&entered.principal, &entered.call, id, code)
            .await
            .map_err(|error| entered.status(&error))?;
        Ok(Response::new(proto::ConfirmAccessAnswerResponse {}))
    }

    async fn list_access_requests(
        &self,
        request: Request<proto::ListAccessRequestsRequest>,
    ) -> Result<Response<proto::ListAccessRequestsResponse>, Status> {
        let action = Action::ListAccess;
        let (entered, page) =
            AuthenticatedCall::enter(&self.broker, request, action, requests::access_page).await?;
        let list = self
            .broker
            .list_access_requests(&entered.principal, &entered.call, page)
            .await
            .map_err(|error| entered.status(&error))?;
        Ok(Response::new(proto::ListAccessRequestsResponse {
            access_requests: list.requests.iter().map(access_request).collect(),
            damaged_access_request_ids: damaged_access_ids(&list),
            next_page_token: requests::page_token(list.next),
        }))
    }

    async fn approve_access_request(
        &self,
        request: Request<proto::ApproveAccessRequestRequest>,
    ) -> Result<Response<proto::ApproveAccessRequestResponse>, Status> {
        let action = Action::ApproveAccess;
        let (entered, approval) =
            AuthenticatedCall::enter(&self.broker, request, action, requests::approval).await?;
        let approved = self
            .broker
            .approve_access(&entered.principal, &entered.call, approval)
            .await
            .map_err(|error| entered.status(&error))?;
        Ok(Response::new(proto::ApproveAccessRequestResponse {
            access_request: Some(access_request(&approved)),
        }))
    }

    async fn approve_for_member(
        &self,
        request: Request<proto::ApproveForMemberRequest>,
    ) -> Result<Response<proto::ApproveForMemberResponse>, Status> {
        let action = Action::ApproveForMember;
        let (entered, approval) =
            AuthenticatedCall::enter(&self.broker, request, action, requests::for_member).await?;
        let approved = self
            .broker
            .approve_for_member(&entered.principal, &entered.call, approval)
            .await
            .map_err(|error| entered.status(&error))?;
        Ok(Response::new(proto::ApproveForMemberResponse {
            access_request: Some(access_request(&approved)),
        }))
    }

    async fn deny_access_request(
        &self,
        request: Request<proto::DenyAccessRequestRequest>,
    ) -> Result<Response<proto::DenyAccessRequestResponse>, Status> {
        let action = Action::DenyAccess;
        let (entered, denial) =
            AuthenticatedCall::enter(&self.broker, request, action, requests::denial).await?;
        let denied = self
            .broker
            .deny_access(&entered.principal, &entered.call, denial)
            .await
            .map_err(|error| entered.status(&error))?;
        Ok(Response::new(proto::DenyAccessRequestResponse {
            access_request: Some(access_request(&denied)),
        }))
    }
}
