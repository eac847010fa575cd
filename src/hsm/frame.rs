//! Frames on the socket pair between front and worker: a big-endian length, then a protobuf message.

use std::io::{self, Read, Write};

use prost::Message;

/// Longest frame, in bytes; nothing that either end sends comes near it.
pub(super) const FRAME_BYTES_MAX: usize = 64 * 1024;
/// Length of the length.
pub(super) const PREFIX_BYTES: usize = 4;

/// Appends a message as a frame.
pub(super) fn encode(message: &impl Message, buffer: &mut Vec<u8>) {
    let length = u32::try_from(message.encoded_len()).expect("a message is far below 4 GiB");
    buffer.extend(length.to_be_bytes());
    message
        .encode(buffer)
        .expect("a vector grows as far as it must");
}

/// The length that a prefix announces, if it is permitted.
pub(super) fn length(prefix: [u8; PREFIX_BYTES]) -> io::Result<usize> {
    usize::try_from(u32::from_be_bytes(prefix))
        .ok()
        .filter(|length| *length <= FRAME_BYTES_MAX)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "frame too long"))
}

/// Reads one frame into the buffer. `false` at the end of the stream.
pub(super) fn read(stream: &mut impl Read, buffer: &mut Vec<u8>) -> io::Result<bool> {
    let mut prefix = [0; PREFIX_BYTES];
    match stream.read_exact(&mut prefix) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(false),
        Err(error) => return Err(error),
    }
    buffer.resize(length(prefix)?, 0);
    stream.read_exact(buffer)?;
    Ok(true)
}

/// Writes one message.
pub(super) fn write(stream: &mut impl Write, message: &impl Message) -> io::Result<()> {
    let mut buffer =
        zeroize::Zeroizing::new(Vec::with_capacity(PREFIX_BYTES + message.encoded_len()));
    encode(message, &mut buffer);
    stream.write_all(&buffer)
}

/// `CLOCK_MONOTONIC` now, in nanoseconds: the one clock that both processes share.
pub(super) fn monotonic_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    seconds * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hsm::wire::{Canary, Request, request::Job};

    #[test]
    fn a_frame_is_read_as_it_was_written() {
        let request = Request {
            id: 7,
            deadline_ns: 9,
            job: Some(Job::Canary(Canary {})),
        };
        let mut stream = Vec::new();
        write(&mut stream, &request).unwrap();
        let (mut rest, mut buffer) = (stream.as_slice(), Vec::new());
        assert!(read(&mut rest, &mut buffer).unwrap());
        assert_eq!(Request::decode(buffer.as_slice()).unwrap(), request);
        assert!(!read(&mut rest, &mut buffer).unwrap());
    }

    #[test]
    fn a_frame_that_is_too_long_is_refused_before_it_is_read() {
        let mut stream: &[u8] = &[0, 1, 0, 1, 0];
        let error = read(&mut stream, &mut Vec::new()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }
}
