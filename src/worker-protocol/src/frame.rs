//! The frames on the socket pair between front and worker. Each frame is a big-endian length
//! followed by a protobuf message.

use std::io::{self, Read};

use prost::Message;
use zeroize::{Zeroize as _, Zeroizing};

/// Longest frame, in bytes. The messages of front and worker are far shorter than this limit.
const FRAME_BYTES_MAX: usize = 64 * 1024;
/// Number of bytes of the length at the start of each frame.
const PREFIX_BYTES: usize = 4;

/// Initial capacity of an [`Outbox`] in bytes, enough for the usual number of waiting frames.
const OUTBOX_BYTES: usize = 4 * 1024;

/// Frames that the socket has not accepted yet. Sent bytes are overwritten immediately.
#[derive(Debug)]
pub struct Outbox {
    bytes: Zeroizing<Vec<u8>>,
    sent: usize,
}

impl Default for Outbox {
    fn default() -> Self {
        Self {
            bytes: Zeroizing::new(Vec::with_capacity(OUTBOX_BYTES)),
            sent: 0,
        }
    }
}

impl Outbox {
    /// Appends a message as a frame.
    pub fn push(&mut self, message: &impl Message) {
        let length = message.encoded_len();
        let needed = self.bytes.len() + PREFIX_BYTES + length;
        if needed > self.bytes.capacity() {
            // If the vector grew automatically, its old copy would not be overwritten.
            let mut grown = Vec::with_capacity(needed * 2);
            grown.extend(&*self.bytes);
            self.bytes = Zeroizing::new(grown);
        }
        let length = u32::try_from(length).expect("a message is far below 4 GiB");
        self.bytes.extend(length.to_be_bytes());
        message
            .encode(&mut *self.bytes)
            .expect("a vector grows as far as it must");
    }

    /// The bytes that were not sent yet.
    pub fn rest(&self) -> &[u8] {
        &self.bytes[self.sent..]
    }

    /// Whether everything was sent.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Removes `count` bytes that were sent, and overwrites them.
    pub fn sent(&mut self, count: usize) {
        self.bytes[self.sent..self.sent + count].zeroize();
        self.sent += count;
        if self.sent == self.bytes.len() {
            self.bytes.clear();
            self.sent = 0;
        }
    }
}

/// Received bytes that the caller has not taken yet. Bytes of messages that were removed are
/// overwritten.
#[derive(Debug)]
pub struct Inbox {
    bytes: Zeroizing<Vec<u8>>,
    start: usize,
    end: usize,
}

impl Default for Inbox {
    fn default() -> Self {
        Self {
            bytes: Zeroizing::new(vec![0; PREFIX_BYTES + FRAME_BYTES_MAX]),
            start: 0,
            end: 0,
        }
    }
}

impl Inbox {
    /// Returns the buffer for the next read. After [`Inbox::take`] has found no message, the buffer
    /// has at least one byte of free space.
    pub fn room(&mut self) -> &mut [u8] {
        if self.end == self.bytes.len() {
            self.bytes.copy_within(self.start..self.end, 0);
            let kept = self.end - self.start;
            self.bytes[kept..].zeroize();
            (self.start, self.end) = (0, kept);
        }
        &mut self.bytes[self.end..]
    }

    /// Records that `count` bytes were read into [`Inbox::room`].
    pub fn received(&mut self, count: usize) {
        self.end += count;
    }

    /// Removes and returns the next message; `None` if no complete message has arrived.
    pub fn take<M: Message + Default>(&mut self) -> io::Result<Option<M>> {
        let Some((prefix, rest)) =
            self.bytes[self.start..self.end].split_first_chunk::<PREFIX_BYTES>()
        else {
            return Ok(None);
        };
        let length = length(*prefix)?;
        let Some(body) = rest.get(..length) else {
            return Ok(None);
        };
        let message = M::decode(body)?;
        let taken = self.start + PREFIX_BYTES + length;
        self.bytes[self.start..taken].zeroize();
        self.start = taken;
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
        Ok(Some(message))
    }

    /// Reads until a message is complete; `None` at the end of the stream.
    pub fn receive<M: Message + Default>(
        &mut self,
        stream: &mut impl Read,
    ) -> io::Result<Option<M>> {
        loop {
            if let Some(message) = self.take()? {
                return Ok(Some(message));
            }
            match stream.read(self.room()) {
                Ok(0) if self.end == 0 => return Ok(None),
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => self.received(count),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// Decodes the length in a prefix. Returns an error if the frame would be too long.
fn length(prefix: [u8; PREFIX_BYTES]) -> io::Result<usize> {
    usize::try_from(u32::from_be_bytes(prefix))
        .ok()
        .filter(|length| *length <= FRAME_BYTES_MAX)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "frame too long"))
}

/// The current `CLOCK_MONOTONIC` in nanoseconds. Front and workers use the same clock.
pub fn monotonic_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    seconds * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::{Request, SelfTest, request::Job};

    fn request(id: u64) -> Request {
        Request {
            id,
            deadline_ns: 9,
            job: Some(Job::SelfTest(SelfTest {})),
        }
    }

    /// A stream that returns a few bytes at a time, as sockets may do.
    struct Trickle<'a>(&'a [u8], usize);

    impl Read for Trickle<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let length = self.1.min(buffer.len());
            self.0.read(&mut buffer[..length])
        }
    }

    #[test]
    fn frames_are_read_as_written_however_the_stream_splits_them() {
        for step in [1, 3, 7, 4_096] {
            let mut outbox = Outbox::default();
            (0..300).for_each(|id| outbox.push(&request(id)));
            let stream = outbox.rest().to_vec();
            let (mut inbox, mut stream) = (Inbox::default(), Trickle(&stream, step));
            for id in 0..300 {
                assert_eq!(inbox.receive(&mut stream).unwrap(), Some(request(id)));
            }
            assert_eq!(inbox.receive::<Request>(&mut stream).unwrap(), None);
        }
    }

    /// Together, the frames are longer than an inbox, so that an incomplete frame moves to the
    /// start of the buffer.
    #[test]
    fn messages_taken_out_are_overwritten() {
        let mut secret = request(1);
        secret.job = Some(Job::Mac(crate::wire::Mac {
            key_id: vec![1; 16],
            message: vec![0xa5; 40_000],
        }));
        let mut outbox = Outbox::default();
        (0..5).for_each(|_| outbox.push(&secret));
        let stream = outbox.rest().to_vec();
        let (mut inbox, mut stream) = (Inbox::default(), stream.as_slice());
        for _ in 0..5 {
            assert!(inbox.receive::<Request>(&mut stream).unwrap().is_some());
            let unread = inbox.start..inbox.end;
            let left = |(index, byte): (usize, &u8)| *byte == 0xa5 && !unread.contains(&index);
            assert!(!inbox.bytes.iter().enumerate().any(left));
        }
        let (half, all) = (outbox.rest().len() / 2, outbox.rest().len());
        outbox.sent(half);
        assert!(outbox.bytes[..half].iter().all(|byte| *byte == 0));
        outbox.sent(all - half);
        assert!(outbox.is_empty());
        let room = outbox.bytes.capacity();
        outbox.bytes.resize(room, 0);
        assert!(!outbox.bytes.contains(&0xa5));
    }

    #[test]
    fn a_frame_that_is_too_long_is_refused_before_it_is_read() {
        let mut stream: &[u8] = &[0, 1, 0, 1, 0];
        let error = Inbox::default()
            .receive::<Request>(&mut stream)
            .unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }

    #[test]
    fn a_stream_that_ends_within_a_frame_is_an_error() {
        let mut stream: &[u8] = &[0, 0, 0, 9, 0];
        let error = Inbox::default()
            .receive::<Request>(&mut stream)
            .unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}
