//! The writer's state. The handles of a log read the state directly and do not ask the writer's thread, because the
//! thread may wait for a hanging disk.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use keybroker_core::metrics;

use super::{APPEND_TIMEOUT, Class, Error};

#[derive(Debug, Default)]
pub(super) struct Shared(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// The reason why nothing can be written; `None` if the last attempt to write succeeded.
    down: Option<Error>,
    /// Time at which the writer's unfinished request to the disk began.
    busy_since: Option<Instant>,
    /// Whether the hanging disk was already reported.
    stall_reported: bool,
    durable: Durable,
}

/// The end of the durable part of the log.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Durable {
    /// The newest segment.
    pub(super) segment: u64,
    /// Number of durable bytes in the newest segment.
    pub(super) bytes: u64,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records that the writer is about to use the disk.
    pub(super) fn busy(&self) {
        self.state().busy_since = Some(Instant::now());
    }

    /// Records that the disk has completed all requests.
    pub(super) fn idle(&self) {
        let mut state = self.state();
        state.busy_since = None;
        if std::mem::take(&mut state.stall_reported) {
            tracing::info!("the disk of the audit log answers again");
        }
        measure(&state);
    }

    pub(super) fn set_durable(&self, segment: u64, bytes: u64) {
        self.state().durable = Durable { segment, bytes };
    }

    pub(super) fn durable(&self) -> Durable {
        self.state().durable
    }

    pub(super) fn set_down(&self, cause: Option<Error>) {
        let mut state = self.state();
        if let Some(error) = &cause
            && state.down.is_none()
        {
            keybroker_core::alert!(AuditLog, %error, "no key is released or changed until the audit log is writable");
        }
        state.down = cause;
        measure(&state);
    }

    /// Whether the log can be written: the last request to the disk succeeded, and the disk does not hang.
    pub(super) fn writable(&self) -> Result<(), Error> {
        if let Some(error) = &self.state().down {
            return Err(error.clone());
        }
        self.moving()
    }

    /// Returns an error while a request to the disk takes longer than a call waits for its entry.
    pub(super) fn moving(&self) -> Result<(), Error> {
        let mut state = self.state();
        if !state.hangs() {
            return Ok(());
        }
        let error = Error::new(format!(
            "the disk has not answered for {} ms; check the disk and the kernel's log",
            APPEND_TIMEOUT.as_millis()
        ));
        if !std::mem::replace(&mut state.stall_reported, true) {
            keybroker_core::alert!(AuditLog, %error, "no key is released or changed until the audit log is writable");
        }
        measure(&state);
        Err(error)
    }
}

impl State {
    fn hangs(&self) -> bool {
        self.busy_since
            .is_some_and(|since| since.elapsed() >= APPEND_TIMEOUT)
    }
}

fn measure(state: &State) {
    metrics::AUDIT_WRITABLE.set_flag(state.down.is_none() && !state.hangs());
}

/// The error for an entry that did not become durable in time. After this error, the entry may still become durable.
pub(super) fn slow() -> Error {
    Error {
        text: format!(
            "no audit entry became durable within {} ms; check the disk",
            APPEND_TIMEOUT.as_millis()
        ),
        class: Class::Slow,
    }
}
