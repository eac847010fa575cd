//! The caller of a connection: the data that the server has about a call before an API handles the
//! call.

use std::{net::SocketAddr, sync::Arc};

use tokio::sync::Semaphore;

use crate::{error::Error, principal::Principal};

/// A peer and the result of its authentication. The APIs find the caller among the extensions of each HTTP request.
#[derive(Clone, Debug)]
pub struct Caller {
    peer: SocketAddr,
    principal: Result<Arc<Principal>, Arc<Error>>,
    /// Limits the concurrent calls of this connection.
    calls: Arc<Semaphore>,
    calls_max: usize,
    /// Limits the concurrent health checks. Health checks and health watches do not count as calls, so that an open watch does
    /// not make the connection busy.
    health_checks: Arc<Semaphore>,
    health_watches: Arc<Semaphore>,
}

/// Highest number of concurrent health checks on one connection.
const HEALTH_CHECKS_MAX: usize = 8;
/// Highest number of open health watches on one connection.
const HEALTH_WATCHES_MAX: usize = 4;

impl Caller {
    /// Creates a caller from its address, the result of its authentication, and the limit of its concurrent calls.
    pub fn new(
        peer: SocketAddr,
        principal: Result<Arc<Principal>, Error>,
        calls_max: usize,
    ) -> Self {
        Self {
            peer,
            principal: principal.map_err(Arc::new),
            calls: Arc::new(Semaphore::new(calls_max)),
            calls_max,
            health_checks: Arc::new(Semaphore::new(HEALTH_CHECKS_MAX)),
            health_watches: Arc::new(Semaphore::new(HEALTH_WATCHES_MAX)),
        }
    }

    /// Returns a caller with the same connection and another principal, for a call that has its own credential.
    #[must_use]
    pub fn with_principal(&self, principal: Result<Arc<Principal>, Error>) -> Self {
        Self {
            principal: principal.map_err(Arc::new),
            ..self.clone()
        }
    }

    /// The address and port of the peer.
    pub fn peer(&self) -> SocketAddr {
        self.peer
    }

    /// The authenticated principal, or the reason why the authentication failed.
    pub fn principal(&self) -> Result<&Arc<Principal>, &Arc<Error>> {
        self.principal.as_ref()
    }

    /// Limits the concurrent calls of the connection.
    pub fn calls(&self) -> &Arc<Semaphore> {
        &self.calls
    }

    /// Limits the concurrent health checks of the connection.
    pub fn health_checks(&self) -> &Arc<Semaphore> {
        &self.health_checks
    }

    /// Limits the concurrent health watches of the connection.
    pub fn health_watches(&self) -> &Arc<Semaphore> {
        &self.health_watches
    }

    /// Whether the authentication succeeded.
    pub fn is_known(&self) -> bool {
        self.principal.is_ok()
    }

    /// Whether no call of the connection is in progress. Health checks and health watches do not count as calls.
    pub fn is_idle(&self) -> bool {
        self.calls.available_permits() == self.calls_max
    }
}
