//! Waits for a signal in a separate thread, so that a command can work without an async runtime.

use std::thread;

use tokio::{
    runtime,
    signal::unix::{SignalKind, signal},
};

use super::exit::{Exit, Failure};

/// Starts a thread with this name that calls `then` at the first signal of this kind.
pub(super) fn at_first(
    kind: SignalKind,
    name: &str,
    then: impl FnOnce() + Send + 'static,
) -> Result<(), Failure> {
    let failed = |error| Failure::new(Exit::Internal, format!("cannot wait for signals: {error}"));
    let runtime = runtime::Builder::new_current_thread()
        .enable_io()
        .build()
        .map_err(failed)?;
    let entered = runtime.enter();
    let mut signals = signal(kind).map_err(failed)?;
    drop(entered);
    let wait = move || {
        if runtime.block_on(signals.recv()).is_some() {
            then();
        }
    };
    let thread = thread::Builder::new().name(name.to_owned());
    thread.spawn(wait).map(drop).map_err(failed)
}
