//! The gRPC API. The API parses messages, calls the broker, and converts answers and errors. The broker makes all
//! decisions.

use std::sync::Arc;

use axum::Router;
use tonic::{Request, Status, service::Routes};
use tonic_reflection::server::Error as ReflectionError;

use keybroker_broker::Broker;
use keybroker_core::{
    call::{Call, CallId},
    error::{Error, Reason},
    principal::{Action, Principal},
};
use keybroker_proto::{
    FILE_DESCRIPTOR_SET, control_service_server::ControlServiceServer,
    device_service_server::DeviceServiceServer, user_key_service_server::UserKeyServiceServer,
};

mod approvals;
pub(super) mod clients;
mod control;
mod convert;
mod devices;
mod key_changes;
mod message;
mod method;
mod middleware;
pub(super) mod page;
mod rewrap;
mod status;
mod stream_end;
mod timeout;
mod user_keys;

pub use message::Memory;
pub use middleware::Context;

/// Longest message, in bytes.
const MESSAGE_BYTES_MAX: usize = 64 * 1024;
/// Longest message of a health check, in bytes. A health check sends only the name of a service.
pub const HEALTH_BYTES_MAX: usize = 1024;

/// Name of the user-key service, which health checks also use.
pub const USER_KEY_SERVICE: &str = "keybroker.v1.UserKeyService";
/// Name of the device service, which listeners with the user-key service have, too.
pub const DEVICE_SERVICE: &str = "keybroker.v1.DeviceService";
/// Name of the admin API's service, which health checks also use.
pub const CONTROL_SERVICE: &str = "keybroker.v1.ControlService";

/// The services of a listener.
#[derive(Clone, Copy, Debug)]
pub struct Services {
    /// Whether the listener has the user-key service and the device service.
    pub user_keys: bool,
    /// Whether the listener has the service of the admin API.
    pub control: bool,
    /// Whether the listener has server reflection.
    pub reflection: bool,
}

/// The routes of a listener.
pub fn routes<H>(context: Context, services: Services, health: H) -> Result<Router, ReflectionError>
where
    H: tower::Service<
            http::Request<tonic::body::Body>,
            Response = http::Response<tonic::body::Body>,
            Error = std::convert::Infallible,
        > + tonic::server::NamedService
        + Clone
        + Send
        + Sync
        + 'static,
    H::Future: Send + 'static,
{
    let broker = &context.broker;
    let mut routes = Routes::new(health);
    if services.user_keys {
        let service = user_keys::UserKeys::new(Arc::clone(broker));
        routes = routes.add_service(
            UserKeyServiceServer::new(service).max_decoding_message_size(MESSAGE_BYTES_MAX),
        );
        let service = devices::Devices::new(Arc::clone(broker));
        routes = routes.add_service(
            DeviceServiceServer::new(service).max_decoding_message_size(MESSAGE_BYTES_MAX),
        );
    }
    if services.control {
        let service = control::Control::new(Arc::clone(broker));
        routes = routes.add_service(
            ControlServiceServer::new(service).max_decoding_message_size(MESSAGE_BYTES_MAX),
        );
    }
    if services.reflection {
        let builder = || {
            let mut builder = tonic_reflection::server::Builder::configure()
                .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
                .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
                // Clients need the descriptors of `tonic_types` to decode the details of errors.
                .register_encoded_file_descriptor_set(tonic_types::pb::FILE_DESCRIPTOR_SET)
                .with_service_name(H::NAME);
            // Reflection lists only the services of this listener.
            for (has, name) in [
                (services.user_keys, USER_KEY_SERVICE),
                (services.user_keys, DEVICE_SERVICE),
                (services.control, CONTROL_SERVICE),
            ] {
                if has {
                    builder = builder.with_service_name(name);
                }
            }
            builder
        };
        let v1 = builder().build_v1()?;
        let alpha = builder().build_v1alpha()?;
        routes = routes
            .add_service(v1.max_decoding_message_size(MESSAGE_BYTES_MAX))
            .add_service(alpha.max_decoding_message_size(MESSAGE_BYTES_MAX));
    }
    Ok(middleware::wrap(
        routes.prepare().into_axum_router(),
        context,
    ))
}

/// An authenticated call in progress. Only the middleware creates an `AuthenticatedCall`, after it has
/// authenticated the caller.
#[derive(Clone, Debug)]
struct AuthenticatedCall {
    principal: Arc<Principal>,
    call: Call,
}

impl AuthenticatedCall {
    /// The call that the middleware added to the request.
    fn of<T>(request: &Request<T>) -> Result<Self, Status> {
        let entered = request.extensions().get::<Self>().cloned();
        entered.ok_or_else(|| {
            let error = Error::new(Reason::Bug, "the call did not pass through the middleware");
            status::to_status(&error, CallId::fresh())
        })
    }

    /// Returns the authenticated call and the parsed message. If the message cannot be parsed, the broker writes an audit entry.
    async fn enter<T, P>(
        broker: &Broker,
        request: Request<T>,
        action: Action,
        parse: impl FnOnce(T) -> Result<P, Error>,
    ) -> Result<(Self, P), Status> {
        let entered = Self::of(&request)?;
        let parsed = parse(request.into_inner());
        let parsed = entered.parsed(broker, action, parsed).await?;
        Ok((entered, parsed))
    }

    /// Returns the parsed request. If the request cannot be parsed, the broker writes an audit entry.
    async fn parsed<T>(
        &self,
        broker: &Broker,
        action: Action,
        parsed: Result<T, Error>,
    ) -> Result<T, Status> {
        match parsed {
            Ok(parsed) => Ok(parsed),
            Err(error) => {
                let error = broker
                    .unserved(&self.principal, &self.call, action, error)
                    .await;
                Err(self.status(&error))
            }
        }
    }

    fn status(&self, error: &Error) -> Status {
        status::to_status(error, self.call.id)
    }
}
