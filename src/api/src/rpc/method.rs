//! Determines properties of gRPC methods from their paths.

use keybroker_core::principal::Action;

use super::{CONTROL_SERVICE, DEVICE_SERVICE, USER_KEY_SERVICE};

/// Whether a method is a health check, which callers without a principal may call.
pub(super) fn is_health(path: &str) -> bool {
    path.starts_with("/grpc.health.v1.Health/")
}

/// Whether a method is a health check that sends answers until the connection ends.
pub(super) fn is_watch(path: &str) -> bool {
    path == "/grpc.health.v1.Health/Watch"
}

/// Whether a method releases exactly one key, which needs one job on the token.
pub(super) fn is_unwrap(path: &str) -> bool {
    path == "/keybroker.v1.UserKeyService/UnwrapUserKey"
}

/// Whether a client may send more than one message to a method.
pub(super) fn takes_stream(path: &str) -> bool {
    path.starts_with("/grpc.reflection.")
}

/// Whether a method may send an unlimited number of answers. No method of `keybroker.v1` sends an
/// unlimited number of answers.
pub(super) fn is_stream(path: &str) -> bool {
    is_watch(path) || takes_stream(path)
}

/// The action of a gRPC method; `None` for an unknown method.
pub(super) fn action(path: &str) -> Option<Action> {
    let (service, method) = path.strip_prefix('/')?.split_once('/')?;
    let action = match (service, method) {
        (USER_KEY_SERVICE, "CreateUserKey") => Action::Create,
        (USER_KEY_SERVICE, "UnwrapUserKey" | "BatchUnwrapUserKeys") => Action::Unwrap,
        (USER_KEY_SERVICE, "ReplaceUserKey") => Action::Replace,
        (USER_KEY_SERVICE, "GetUserKey") => Action::Get,
        (USER_KEY_SERVICE, "ListUserKeys") => Action::List,
        (USER_KEY_SERVICE, "DeleteUserKey") => Action::Delete,
        (USER_KEY_SERVICE, "UndeleteUserKey") => Action::Undelete,
        (USER_KEY_SERVICE, "RestoreUserKeyRevision") => Action::Restore,
        (CONTROL_SERVICE, "ListWrappingKeys" | "GetWrappingKey" | "GetRewrap") => {
            Action::ReadWrappingKeys
        }
        (CONTROL_SERVICE, "GetTokenState") => Action::ReadToken,
        (CONTROL_SERVICE, "TailAuditLog") => Action::ReadAudit,
        (CONTROL_SERVICE, "CreateClientCredential" | "AddClientSecret") => Action::CreateClient,
        (CONTROL_SERVICE, "ListClientCredentials") => Action::ListClients,
        (CONTROL_SERVICE, "RevokeClientCredential") => Action::RevokeClient,
        (CONTROL_SERVICE, "StartRewrap" | "PauseRewrap" | "ResumeRewrap") => Action::Rewrap,
        (CONTROL_SERVICE, "RotateWrappingKey") => Action::RotateKey,
        (CONTROL_SERVICE, "ListApprovals") => Action::ListApprovals,
        (CONTROL_SERVICE, "ApproveChange") => Action::Approve,
        (CONTROL_SERVICE, "RejectChange") => Action::RejectApproval,
        (DEVICE_SERVICE, "EstablishTrust") => Action::EstablishDevice,
        (DEVICE_SERVICE, "GetDeviceKeys") => Action::FetchDevice,
        (DEVICE_SERVICE, "ListDevices") => Action::ListDevices,
        (DEVICE_SERVICE, "RenameDevice") => Action::RenameDevice,
        (DEVICE_SERVICE, "UntrustDevices") => Action::UntrustDevice,
        (DEVICE_SERVICE, "ReportDeviceLost") => Action::ReportDevice,
        (DEVICE_SERVICE, "RotateDevices") => Action::RotateDevices,
        (DEVICE_SERVICE, "CreateAccessRequest") => Action::RequestAccess,
        (DEVICE_SERVICE, "FetchAccessAnswer" | "ConfirmAccessAnswer") => Action::FetchAccess,
        (DEVICE_SERVICE, "ListAccessRequests") => Action::ListAccess,
        (DEVICE_SERVICE, "ApproveAccessRequest") => Action::ApproveAccess,
        (DEVICE_SERVICE, "ApproveForMember") => Action::ApproveForMember,
        (DEVICE_SERVICE, "DenyAccessRequest") => Action::DenyAccess,
        // The path does not show which action the caller requests: the message specifies the new
        // state of the key.
        (CONTROL_SERVICE, "ChangeWrappingKeyState") => Action::ActivateKey,
        _ => return None,
    };
    Some(action)
}

#[cfg(test)]
mod tests {
    use prost_reflect::DescriptorPool;

    use super::*;

    #[test]
    fn every_method_has_an_action() {
        let pool = DescriptorPool::decode(keybroker_proto::FILE_DESCRIPTOR_SET).unwrap();
        let mut methods = 0;
        for service in pool.services() {
            for method in service.methods() {
                let path = format!("/{}/{}", service.full_name(), method.name());
                assert!(action(&path).is_some(), "{path}");
                assert!(
                    !method.is_server_streaming(),
                    "{path} needs an end: is_stream"
                );
                methods += 1;
            }
        }
        assert_eq!(methods, 40);
        for other in [
            "",
            "/",
            "/x/CreateUserKey",
            "/keybroker.v1.UserKeyService/Other",
        ] {
            assert!(action(other).is_none(), "{other}");
        }
    }
}
