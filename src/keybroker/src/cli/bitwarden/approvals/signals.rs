//! The signal that ends the service.

use std::{
    sync::mpsc::{self, Receiver},
    thread,
};

use tokio::{
    runtime,
    signal::unix::{SignalKind, signal},
};

use crate::cli::exit::{Exit, Failure};

/// Returns a channel that a thread closes at the first SIGTERM, so that a decision in progress is completed.
pub(super) fn terminations() -> Result<Receiver<()>, Failure> {
    let failed = |error| Failure::new(Exit::Internal, format!("cannot wait for signals: {error}"));
    let runtime = runtime::Builder::new_current_thread()
        .enable_io()
        .build()
        .map_err(failed)?;
    let entered = runtime.enter();
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    drop(entered);
    let (sender, receiver) = mpsc::channel();
    let wait = move || {
        runtime.block_on(terminate.recv());
        drop(sender);
    };
    let thread = thread::Builder::new().name("terminate".to_owned());
    thread.spawn(wait).map_err(failed)?;
    Ok(receiver)
}
