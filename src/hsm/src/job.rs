//! One job on its way to a token and back.

use std::time::{Duration, Instant};

use tokio::sync::oneshot;
use tracing::Span;
use zeroize::Zeroizing;

use keybroker_worker_protocol::Work;

use crate::{Error, caller::Caller};

/// Bytes from the token: a MAC, key material, or nothing.
pub(super) type Output = Zeroizing<Vec<u8>>;

/// A job on its way to a token and back.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) work: Work,
    pub(super) caller: Caller,
    pub(super) done: oneshot::Sender<Answer>,
    pub(super) queued: Instant,
    /// How long it waited for a session.
    pub(super) waited: Duration,
    /// Whether a lost session has sent it back once already.
    pub(super) retried: bool,
    /// Workers that were lost while they held it.
    pub(super) losses: u32,
    /// The caller's span, which carries the id of the call into the log lines about this job.
    pub(super) span: Span,
}

impl Job {
    /// Answers the caller, unless it has gone. `on_token` is the time of the module.
    pub(super) fn answer(self, result: Result<Output, Error>, on_token: Duration) {
        let outside = self.waited + on_token;
        let _gone = self.done.send(Answer { result, outside });
    }
}

/// What became of a job.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) result: Result<Output, Error>,
    /// Time in the queue and in the module.
    pub(super) outside: Duration,
}
