//! What all connections of a broker share.

use std::sync::Arc;

use tokio::sync::Semaphore;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use keybroker_auth::Authenticator;
use keybroker_broker::Broker;

use super::{Limits, log_limit::LogLimit, unauthenticated::Places, waiting::Waiting};

/// What every connection of every listener shares.
#[derive(Clone, Debug)]
pub(super) struct Shared {
    pub(super) broker: Arc<Broker>,
    pub(super) authenticator: Arc<Authenticator>,
    pub(super) connections: Arc<Semaphore>,
    /// Those whose handshake is under way.
    pub(super) handshakes: Arc<Waiting>,
    /// The connections that hold the other places.
    pub(super) places: Arc<Places>,
    /// Limits the log lines about connections that are refused.
    pub(super) refusals: Arc<LogLimit>,
    pub(super) limits: Arc<Limits>,
    /// Stop accepting and ask every connection to leave.
    pub(super) stop: CancellationToken,
    pub(super) tasks: TaskTracker,
}
