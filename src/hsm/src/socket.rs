//! The front's end of the socket between the front and a worker.
//!
//! The runtime watches the socket only for reading. If it also watched the socket for writing, it would wake up after
//! each job, at the moment when the worker takes the job out of the socket.

use std::{
    io::{self, Read as _, Write as _},
    os::unix::net::UnixStream,
};

use rustix::net::{Shutdown, shutdown};
use tokio::io::{Interest, unix::AsyncFd};

pub(crate) struct Socket(AsyncFd<UnixStream>);

impl Socket {
    pub(crate) fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        register(stream, Interest::READABLE).map(Self)
    }

    /// Waits for bytes or, on a packet socket, for the next packet. Returns 0 at the end.
    pub(crate) async fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = |mut stream: &UnixStream| stream.read(buffer);
        self.0.async_io(Interest::READABLE, read).await
    }

    /// Writes without waiting. Returns `WouldBlock` if the socket has no space.
    pub(crate) fn try_write(&self, bytes: &[u8]) -> io::Result<usize> {
        let mut stream = self.0.get_ref();
        stream.write(bytes)
    }

    /// Waits until the socket has space. This is rare, because the space is many times larger than the jobs that a worker
    /// may have. Therefore each wait registers the socket for writing again.
    pub(crate) async fn writable(&self) -> io::Result<()> {
        let stream = self.0.get_ref().try_clone()?;
        let stream = register(stream, Interest::WRITABLE)?;
        stream.writable().await.map(drop)
    }

    /// Closes the sending half. A worker whose socket is closed finishes its jobs and ends.
    pub(crate) fn close(&self) {
        if let Err(error) = shutdown(self.0.get_ref(), Shutdown::Write) {
            tracing::debug!(%error, "the worker's socket was already closed");
        }
    }
}

/// Registers a socket with the runtime. tokio deprecates the safe function, because it also accepts types whose
/// descriptor may change. A [`UnixStream`] owns its descriptor, which never changes.
#[expect(
    deprecated,
    reason = "the replacement is unsafe code, and is not needed for this type"
)]
fn register(stream: UnixStream, interest: Interest) -> io::Result<AsyncFd<UnixStream>> {
    AsyncFd::with_interest(stream, interest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::SocketPair;

    /// A full socket reports `WouldBlock`, and `writable` returns when the other end has read. Each read returns one packet.
    #[tokio::test]
    async fn a_full_socket_becomes_writable_and_keeps_its_packets() {
        let (ours, mut theirs) = SocketPair::of_packets().unwrap().into_ends();
        let socket = Socket::new(ours).unwrap();
        let packet = [7; 1_000];
        let mut sent = 0;
        let full = loop {
            match socket.try_write(&packet) {
                Ok(count) => sent += usize::from(count == packet.len()),
                Err(error) => break error,
            }
        };
        assert_eq!(full.kind(), io::ErrorKind::WouldBlock);
        let reading = tokio::task::spawn_blocking(move || {
            let mut buffer = [0; 4_096];
            for _ in 0..sent {
                assert_eq!(theirs.read(&mut buffer).unwrap(), 1_000);
            }
            theirs.write_all(b"first").unwrap();
            theirs.write_all(b"second").unwrap();
        });
        socket.writable().await.unwrap();
        reading.await.unwrap();
        let mut buffer = [0; 64];
        for expected in ["first", "second", ""] {
            let count = socket.read(&mut buffer).await.unwrap();
            assert_eq!(&buffer[..count], expected.as_bytes());
        }
    }
}
