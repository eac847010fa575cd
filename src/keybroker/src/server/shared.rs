//! Defines the state that all connections of a broker share.

use std::sync::Arc;

use tokio::sync::Semaphore;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use keybroker_auth::Authenticator;
use keybroker_broker::Broker;

use super::{Limits, log_limit::LogLimit, unauthenticated::Places, waiting::Waiting};

/// The state that every connection of every listener shares.
#[derive(Clone, Debug)]
pub(super) struct Shared {
    pub(super) broker: Arc<Broker>,
    pub(super) authenticator: Arc<Authenticator>,
    pub(super) connections: Arc<Semaphore>,
    /// The connections whose handshake is in progress.
    pub(super) handshakes: Arc<Waiting>,
    /// The places of connections whose handshake is complete.
    pub(super) places: Arc<Places>,
    /// Limits the log lines about refused connections.
    pub(super) refusals: Arc<LogLimit>,
    pub(super) limits: Arc<Limits>,
    /// Signal to the listeners to stop accepting connections, and to the connections to end.
    pub(super) stop: CancellationToken,
    pub(super) tasks: TaskTracker,
}
