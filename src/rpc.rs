//! The gRPC door: messages into vocabulary, one call of the broker, answers and errors back. Nothing is decided here.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use axum::Router;
use tonic::{Request, Status, service::Routes};

use crate::{
    broker::Broker,
    call::Call,
    error::{Error, Reason},
    principal::{Action, Principal},
    proto::{
        FILE_DESCRIPTOR_SET, control_service_server::ControlServiceServer,
        user_key_service_server::UserKeyServiceServer,
    },
};

mod control;
mod convert;
mod edge;
mod page;
mod status;
mod user_keys;

/// Longest message, in bytes.
const MESSAGE_BYTES_MAX: usize = 64 * 1024;

/// Names of the services, for health.
pub const USER_KEY_SERVICE: &str = "keybroker.v1.UserKeyService";
/// Name of the control-plane service.
pub const CONTROL_SERVICE: &str = "keybroker.v1.ControlService";

/// Who is at the other end of a connection.
#[derive(Clone, Debug)]
pub struct Caller {
    peer: SocketAddr,
    principal: Arc<Result<Principal, Error>>,
}

impl Caller {
    /// A peer, and what authentication said of it.
    pub fn new(peer: SocketAddr, principal: Result<Principal, Error>) -> Self {
        Self {
            peer,
            principal: Arc::new(principal),
        }
    }
}

/// What a listener lets in.
#[derive(Clone, Copy, Debug)]
pub struct Services {
    /// The user-key service.
    pub user_keys: bool,
    /// The control-plane service.
    pub control: bool,
    /// Server reflection.
    pub reflection: bool,
}

/// The routes of a listener. Every call gets a deadline of at most `call_timeout_max`.
pub fn routes<H>(
    broker: &Arc<Broker>,
    services: Services,
    health: H,
    call_timeout_max: Duration,
) -> Result<Router, String>
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
    let mut routes = Routes::new(health);
    if services.user_keys {
        let service = user_keys::UserKeys::new(Arc::clone(broker));
        routes = routes.add_service(
            UserKeyServiceServer::new(service).max_decoding_message_size(MESSAGE_BYTES_MAX),
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
            tonic_reflection::server::Builder::configure()
                .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
        };
        let v1 = builder().build_v1().map_err(|error| error.to_string())?;
        let alpha = builder()
            .build_v1alpha()
            .map_err(|error| error.to_string())?;
        routes = routes.add_service(v1).add_service(alpha);
    }
    Ok(edge::wrap(
        routes.prepare().into_axum_router(),
        call_timeout_max,
    ))
}

/// An authenticated call under way.
struct Entered {
    principal: Principal,
    call: Call,
}

impl Entered {
    /// Takes a call in: who, since when, until when. The one place where a gRPC call gets its principal.
    fn new<T>(broker: &Broker, request: &Request<T>) -> Result<Self, Status> {
        let extensions = request.extensions();
        let call = extensions.get::<edge::Ticket>().cloned();
        let caller = extensions.get::<Caller>();
        let (Some(ticket), Some(caller)) = (call, caller) else {
            return Err(Status::internal(
                "a call that did not come through the edge",
            ));
        };
        let call = Call {
            id: ticket.id,
            peer: caller.peer.to_string(),
            deadline: ticket.deadline,
        };
        match caller.principal.as_ref() {
            Ok(principal) => Ok(Self {
                principal: principal.clone(),
                call,
            }),
            Err(error) => {
                broker.note_refusal(caller.peer.ip(), Reason::Credential);
                tracing::info!(call_id = %call.id, peer = %call.peer, %error, "call refused");
                Err(status::to_status(error, call.id))
            }
        }
    }

    /// The parsed request, or its refusal, audited.
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
                    .malformed(&self.principal, &self.call, action, error)
                    .await;
                Err(self.status(&error))
            }
        }
    }

    fn status(&self, error: &Error) -> Status {
        status::to_status(error, self.call.id)
    }
}
