//! For whom a job is done.

use std::sync::Arc;

use keybroker_core::call::Deadline;

/// For whom a job is done, and until when its result is of use. Jobs of different principals wait in separate queues.
#[derive(Clone, Debug)]
pub struct Caller {
    lane: Lane,
    deadline: Deadline,
}

impl Caller {
    /// A principal, by its name. Its jobs take turns with those of other principals.
    pub fn principal(name: impl Into<Arc<str>>, deadline: Deadline) -> Self {
        Self {
            lane: Lane::Principal(name.into()),
            deadline,
        }
    }

    /// The broker itself, for work that no caller waits for. It has a small share of the token, however many callers wait.
    pub fn background(deadline: Deadline) -> Self {
        Self {
            lane: Lane::Background,
            deadline,
        }
    }

    pub(crate) fn lane(&self) -> &Lane {
        &self.lane
    }

    /// When the result is due.
    pub fn deadline(&self) -> Deadline {
        self.deadline
    }
}

/// Jobs that wait in one queue.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Lane {
    /// Those of one principal.
    Principal(Arc<str>),
    /// Those of the broker itself.
    Background,
}
