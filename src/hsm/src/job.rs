//! A token job with its answer.

use std::time::{Duration, Instant};

use tokio::sync::oneshot;
use tracing::Span;
use zeroize::Zeroizing;

use keybroker_worker_protocol::Work;

use keybroker_core::call::abandoned::Abandoned;

use crate::{Error, caller::Caller};

/// The bytes that the token returned: a MAC, key material, or no bytes.
pub(super) type Output = Zeroizing<Vec<u8>>;

/// A job with everything needed to run it and to answer its caller.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) work: Work,
    pub(super) caller: Caller,
    pub(super) done: oneshot::Sender<Answer>,
    /// Set when the remote caller has stopped waiting, although the call in the broker still waits for the job.
    pub(super) abandoned: Abandoned,
    pub(super) queued: Instant,
    /// Time that the job waited for a session.
    pub(super) waited: Duration,
    /// Whether another token can do the job. When the worker of this job is lost, the job fails immediately, and the
    /// broker gives the job to the other token. The job does not wait for a replacement worker.
    pub(super) has_alternative: bool,
    /// Whether the job was already repeated once because of a lost session.
    pub(super) retried: bool,
    /// Number of workers that were lost while they had the job.
    pub(super) losses: u32,
    /// The caller's span, which carries the id of the call into the log lines about this job.
    pub(super) span: Span,
}

impl Job {
    /// The time since the job was given to a session.
    pub(super) fn occupied(&self) -> Duration {
        self.queued.elapsed().saturating_sub(self.waited)
    }

    /// Answers the caller, unless the caller has stopped waiting. `on_token` is the time that the
    /// job spent in the module.
    pub(super) fn answer(self, result: Result<Output, Error>, on_token: Duration) {
        let outside = self.waited + on_token;
        let _gone = self.done.send(Answer { result, outside });
    }
}

/// The answer to a job.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) result: Result<Output, Error>,
    /// Time that the job spent in the queue and in the module.
    pub(super) outside: Duration,
}
