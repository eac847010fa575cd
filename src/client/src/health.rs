//! The health of the broker's services (`grpc.health.v1.Health`).

use std::fmt;

use keybroker_proto as proto;
use tonic::Code;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use crate::{Client, call::Read, error::AttemptError};

/// A gRPC service of a broker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Service {
    /// Enrols and releases user keys.
    UserKeys,
    /// The admin API.
    Control,
}

impl Service {
    /// All services.
    pub const ALL: [Self; 2] = [Self::UserKeys, Self::Control];

    /// The full name of the service in the protocol, such as `keybroker.v1.UserKeyService`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::UserKeys => proto::user_key_service_server::SERVICE_NAME,
            Self::Control => proto::control_service_server::SERVICE_NAME,
        }
    }
}

/// Whether a service can do its work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ServiceHealth {
    /// The service can do its work.
    Serving,
    /// The service cannot do its work now, for example because the token is unavailable.
    NotServing,
    /// The broker does not have the service, for example because the broker is an earlier release.
    Absent,
    /// A state that the protocol does not define for a single check, or that a later release has added.
    Unknown,
}

impl ServiceHealth {
    /// The name of the state in the protocol, such as `NOT_SERVING`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Serving => "SERVING",
            Self::NotServing => "NOT_SERVING",
            Self::Absent => "SERVICE_UNKNOWN",
            Self::Unknown => "UNKNOWN",
        }
    }
}

impl fmt::Display for ServiceHealth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl From<ServingStatus> for ServiceHealth {
    fn from(status: ServingStatus) -> Self {
        match status {
            ServingStatus::Serving => Self::Serving,
            ServingStatus::NotServing => Self::NotServing,
            ServingStatus::ServiceUnknown => Self::Absent,
            ServingStatus::Unknown => Self::Unknown,
        }
    }
}

/// Health checks of the services, for which a caller needs no role. A failed call returns an [`Error`](crate::Error).
impl Client {
    /// Returns whether a service of the broker can do its work. Every gRPC listener answers a health check, even for a
    /// service that the listener does not serve. For a service that cannot do its work, the result is `Ok` with
    /// [`ServiceHealth::NotServing`].
    pub fn check_health(&self, service: Service) -> Read<'_, ServiceHealth> {
        Read::new(self.shared(), move |attempt| async move {
            let request = attempt.request(HealthCheckRequest {
                service: service.name().to_owned(),
            });
            let mut health = HealthClient::new(attempt.channel.clone());
            match health.check(request).await {
                Ok(answer) => Ok(answer.get_ref().status().into()),
                Err(status) if status.code() == Code::NotFound => Ok(ServiceHealth::Absent),
                Err(status) => Err(AttemptError::from(status)),
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `name` returns the name of the state in the protocol, for every state.
    #[test]
    fn states_have_the_names_of_the_protocol() {
        for number in 0..=3 {
            let status = ServingStatus::try_from(number).unwrap();
            assert_eq!(ServiceHealth::from(status).name(), status.as_str_name());
        }
    }
}
