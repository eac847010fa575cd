//! The caller of a token job.

use std::sync::Arc;

use keybroker_core::call::Deadline;

/// The caller of a job, and the deadline until which the result is useful. The jobs of each principal wait in a
/// separate queue.
#[derive(Clone, Debug)]
pub struct Caller {
    lane: Lane,
    deadline: Deadline,
}

impl Caller {
    /// Returns a caller that is a principal with this name. The token serves the principals in turns.
    pub fn principal(name: impl Into<Arc<str>>, deadline: Deadline) -> Self {
        Self {
            lane: Lane::Principal(name.into()),
            deadline,
        }
    }

    /// Returns a caller that is the broker itself, for work that is not part of a call. Background work gets a small
    /// share of the token's time, even if many callers wait.
    pub fn background(deadline: Deadline) -> Self {
        Self {
            lane: Lane::Background,
            deadline,
        }
    }

    pub(crate) fn lane(&self) -> &Lane {
        &self.lane
    }

    /// The deadline until which the result is useful.
    pub fn deadline(&self) -> Deadline {
        self.deadline
    }
}

/// Identifies the queue in which a job waits.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Lane {
    /// The queue of one principal.
    Principal(Arc<str>),
    /// The queue of the broker itself.
    Background,
}
