//! The queue of commands for the writer's thread.
//!
//! The thread parks while the queue is empty, and each sender unparks the thread. A blocking receive of the channel
//! would first spin and yield the processor several times. At low load, spinning costs more processor time than the
//! wake-up.

use std::{
    thread::{self, Thread},
    time::{Duration, Instant},
};

use crossbeam_channel::{
    Receiver, RecvTimeoutError, SendTimeoutError, Sender, TryRecvError, TrySendError,
};
use tokio::sync::oneshot;

use super::{Entry, Error};

/// An entry, and the channel that tells the caller that the entry is durable.
pub(super) type Waiting = (Box<Entry>, oneshot::Sender<Result<u64, Error>>);

pub(super) enum Command {
    Append(Waiting),
    /// Like [`Command::Append`], but the entry may wait a few milliseconds for further entries.
    AppendUnhurried(Waiting),
    Close,
}

/// Sends commands to the writer's thread. When this value is dropped, [`receive`] returns `Disconnected`.
pub(super) struct Commands {
    // This field is dropped before `writer`. Therefore the channel is already disconnected when the thread wakes up.
    queue: Sender<Command>,
    writer: WakeOnDrop,
}

impl Commands {
    /// `writer` is the thread that calls [`receive`].
    pub(super) fn new(queue: Sender<Command>, writer: Thread) -> Self {
        Self {
            queue,
            writer: WakeOnDrop(writer),
        }
    }

    pub(super) fn try_send(&self, command: Command) -> Result<(), TrySendError<Command>> {
        self.queue.try_send(command)?;
        self.writer.0.unpark();
        Ok(())
    }

    pub(super) fn send_deadline(
        &self,
        command: Command,
        until: Instant,
    ) -> Result<(), SendTimeoutError<Command>> {
        self.queue.send_deadline(command, until)?;
        self.writer.0.unpark();
        Ok(())
    }
}

struct WakeOnDrop(Thread);

impl Drop for WakeOnDrop {
    fn drop(&mut self) {
        self.0.unpark();
    }
}

/// Waits for the next command, at most for `timeout`.
pub(super) fn receive(
    queue: &Receiver<Command>,
    timeout: Duration,
) -> Result<Command, RecvTimeoutError> {
    let until = Instant::now() + timeout;
    loop {
        match queue.try_recv() {
            Ok(command) => return Ok(command),
            Err(TryRecvError::Disconnected) => return Err(RecvTimeoutError::Disconnected),
            Err(TryRecvError::Empty) => {}
        }
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(RecvTimeoutError::Timeout);
        }
        // If a command was sent after `try_recv`, the thread is already unparked, and this call returns immediately.
        thread::park_timeout(left);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_mins(1);

    #[test]
    fn a_parked_receiver_gets_every_command_and_the_end() {
        let (queue, receiver) = crossbeam_channel::bounded(1);
        let (parking, parked) = crossbeam_channel::bounded(0);
        let thread = thread::spawn(move || {
            for _ in 0..100 {
                parking.send(()).unwrap();
                assert!(matches!(receive(&receiver, LONG), Ok(Command::Close)));
            }
            parking.send(()).unwrap();
            receive(&receiver, LONG).map(drop)
        });
        let commands = Commands::new(queue, thread.thread().clone());
        let begun = Instant::now();
        for _ in 0..100 {
            parked.recv().unwrap();
            commands.try_send(Command::Close).ok().unwrap();
        }
        parked.recv().unwrap();
        drop(commands);
        assert_eq!(thread.join().unwrap(), Err(RecvTimeoutError::Disconnected));
        // Without a wake-up, the thread would have waited for the complete time.
        assert!(begun.elapsed() < LONG / 2);
    }

    #[test]
    fn an_empty_queue_times_out() {
        let (_queue, receiver) = crossbeam_channel::bounded(1);
        let none = receive(&receiver, Duration::from_millis(5)).map(drop);
        assert_eq!(none, Err(RecvTimeoutError::Timeout));
    }
}
