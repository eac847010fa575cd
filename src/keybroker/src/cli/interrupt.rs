//! Handles Ctrl-C in a command: the command reports the change that was in progress, and ends with
//! exit code 130. By default, Ctrl-C would end a command without a message, even while the command
//! changes a token or a database.

use std::{
    process,
    sync::{Mutex, PoisonError},
};

use tokio::signal::unix::SignalKind;

use super::{
    exit::{Exit, Failure},
    output::Output,
    signals,
};

static UNDER_WAY: Mutex<Option<UnderWay>> = Mutex::new(None);

/// A change that a command is making.
#[derive(Clone, Copy)]
struct UnderWay {
    action: &'static str,
    next: &'static str,
}

/// Marks a change as in progress until the guard is dropped.
pub(super) struct Guard(());

/// Marks the start of a change. `action` is the name of the change in the audit log, and `next` is
/// the hint to show after an interruption.
pub(super) fn begin(action: &'static str, next: &'static str) -> Guard {
    set(Some(UnderWay { action, next }));
    Guard(())
}

impl Drop for Guard {
    fn drop(&mut self) {
        set(None);
    }
}

fn set(under_way: Option<UnderWay>) {
    *UNDER_WAY.lock().unwrap_or_else(PoisonError::into_inner) = under_way;
}

/// Starts a thread that ends the process at the first SIGINT.
pub(super) fn watch(output: Output) -> Result<(), Failure> {
    signals::at_first(SignalKind::interrupt(), "interrupt", move || {
        output.failure(&interrupted());
        process::exit(Exit::Interrupted.code().into());
    })
}

fn interrupted() -> Failure {
    let under_way = *UNDER_WAY.lock().unwrap_or_else(PoisonError::into_inner);
    match under_way {
        Some(UnderWay { action, next }) => {
            let what =
                format!("interrupted during `{action}`, which may be partly or completely done");
            Failure::new(Exit::Interrupted, what).hint(next)
        }
        None => Failure::new(Exit::Interrupted, "interrupted; no change was in progress"),
    }
}
