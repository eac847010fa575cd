//! What the writer's thread tells the handles of a log, so that they need not ask it: it may hang in the disk.

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
    /// Why nothing can be written, as last seen.
    down: Option<Error>,
    /// When the writer asked the disk for something that it has not done yet.
    busy_since: Option<Instant>,
    /// Whether the log says of the disk that it hangs.
    stall_reported: bool,
    durable: Durable,
}

/// How far the log is durable.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Durable {
    /// The newest segment.
    pub(super) segment: u64,
    /// That many of its bytes.
    pub(super) bytes: u64,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The writer is about to ask the disk for something.
    pub(super) fn busy(&self) {
        self.state().busy_since = Some(Instant::now());
    }

    /// The disk has done all that it was asked for.
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
            keybroker_core::alert!(AuditLog, %error, "nothing is released or changed until the audit log is writable");
        }
        state.down = cause;
        measure(&state);
    }

    /// Whether the log can be written: the disk did what it was asked last, and does not hang.
    pub(super) fn writable(&self) -> Result<(), Error> {
        if let Some(error) = &self.state().down {
            return Err(error.clone());
        }
        self.moving()
    }

    /// An error while the disk has not answered the writer for longer than a call waits for an entry.
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
            keybroker_core::alert!(AuditLog, %error, "nothing is released or changed until the audit log is writable");
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

/// An entry did not become durable in time. Whether it will is not known.
pub(super) fn slow() -> Error {
    Error {
        text: format!(
            "no entry became durable within {} ms; look at the disk",
            APPEND_TIMEOUT.as_millis()
        ),
        class: Class::Slow,
    }
}
