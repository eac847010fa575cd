//! Inspects the frames of an HTTP/2 connection, between TLS and the HTTP/2 library. This module limits stream resets and
//! overwrites buffers of the library.
//!
//! Stream resets: the HTTP/2 library limits the number of streams per connection that are reset
//! before the library accepts them. A limit that stops rapid-reset attacks (CVE-2023-44487) would
//! also close connections of legitimate clients whose calls expire while the process is paused.
//! Therefore, the library's limit is high, and this module limits the rate of resets.
//!
//! Buffers: the library keeps the last frames that it read and wrote, including user keys, until
//! other frames replace them. When no message data and no headers have been read or written for a
//! short time, this module passes two kinds of frames to the library:
//!
//! - Frames of an unknown type with zeros as payload overwrite the library's read buffer. The
//!   library must ignore frames of an unknown type (RFC 9113 section 5.5).
//!
//! - The library answers PING frames (RFC 9113 section 6.7). The answers overwrite the library's
//!   write buffer, and this module discards the answers.
//!
//! The inserted frames do not come from the network and are not sent to the network.
//!
//! Mitigation: M3 of `THREAT_MODEL.md`.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Instant as TimerInstant, Sleep, sleep},
};
use uuid::Uuid;

use keybroker_core::metrics;

/// The buffers are overwritten if no message data and no headers were read or written for this
/// time.
const SILENCE: Duration = Duration::from_millis(250);
/// Header of a frame of an unknown type on stream 0, with a payload of 1,015 bytes. With its header, the frame has 1 KiB.
const FILLER_HEADER: [u8; 9] = [0, 0x03, 0xf7, 0xfa, 0, 0, 0, 0, 0];
const FILLER_BYTES: usize = 1_024;
/// Number of filler bytes. The fillers are larger than the library's read buffer, which contains at
/// most two frames of 16 KiB.
const FILLERS_BYTES: usize = 48 * FILLER_BYTES;
const PING_BYTES: usize = 17;
const PING_HEADER: [u8; 9] = [0, 0, 8, 6, 0, 0, 0, 0, 0];
const PONG_HEADER: [u8; 9] = [0, 0, 8, 6, 1, 0, 0, 0, 0];
/// Capacity of the library's write buffer, in bytes.
const WRITE_BUFFER_BYTES: usize = 16 * 1_024;

/// Permitted stream resets: the size of a burst, and the number of resets per second.
const UNAUTHENTICATED: Rate = Rate {
    burst: 64.0,
    per_second: 8.0,
};
const AUTHENTICATED: Rate = Rate {
    burst: 1_024.0,
    per_second: 256.0,
};
/// The limit on stream resets in the HTTP/2 library. The limit is higher than the permitted bursts.
pub(super) const LIBRARY_RESETS_MAX: usize = 2_048;

#[derive(Clone, Copy, Debug)]
struct Rate {
    burst: f64,
    per_second: f64,
}

/// Parses the headers of frames in one direction (RFC 9113 section 4.1).
#[derive(Debug)]
struct Frames {
    /// Number of preface bytes that have not been parsed yet.
    preface: usize,
    header: [u8; 9],
    /// Number of header bytes that have been parsed.
    read: usize,
    /// Number of payload bytes that have not been parsed yet.
    payload: usize,
}

/// The number of stream resets in a sequence of bytes, and whether the bytes are confidential.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Seen {
    resets: u32,
    /// Whether the bytes contain a part of a message or of headers.
    is_confidential: bool,
}

impl Frames {
    const DATA: u8 = 0;
    const HEADERS: u8 = 1;
    const RST_STREAM: u8 = 3;
    const CONTINUATION: u8 = 9;
    const END_HEADERS: u8 = 4;

    fn after(preface: usize) -> Self {
        Self {
            preface,
            header: [0; 9],
            read: 0,
            payload: 0,
        }
    }

    /// Whether the last frame is complete.
    fn is_at_boundary(&self) -> bool {
        self.preface == 0 && self.read == 0 && self.payload == 0
    }

    /// Whether a frame may be inserted: the last frame must be complete, and no block of headers
    /// may be open.
    fn is_between(&self) -> bool {
        let [_, _, _, kind, flags, ..] = self.header;
        let is_headers = matches!(kind, Self::HEADERS | Self::CONTINUATION);
        let is_open = is_headers && flags & Self::END_HEADERS == 0;
        self.is_at_boundary() && !is_open
    }

    /// Parses the next bytes.
    fn see(&mut self, mut bytes: &[u8]) -> Seen {
        let mut seen = Seen::default();
        skip(&mut bytes, &mut self.preface);
        while !bytes.is_empty() {
            if self.payload > 0 {
                seen.is_confidential |= matches!(
                    self.header[3],
                    Self::DATA | Self::HEADERS | Self::CONTINUATION
                );
                skip(&mut bytes, &mut self.payload);
                continue;
            }
            let count = bytes.len().min(self.header.len() - self.read);
            self.header[self.read..self.read + count].copy_from_slice(&bytes[..count]);
            self.read += count;
            bytes = &bytes[count..];
            if self.read == self.header.len() {
                self.read = 0;
                self.payload = payload_bytes(self.header);
                seen.resets += u32::from(self.header[3] == Self::RST_STREAM);
            }
        }
        seen
    }

    /// The number of leading bytes in `bytes` that belong to the current frame.
    fn rest_of_frame(&self, bytes: &[u8]) -> usize {
        if self.payload > 0 {
            return self.payload.min(bytes.len());
        }
        let missing = self.header.len() - self.read;
        let Some(rest) = bytes.get(..missing) else {
            return bytes.len();
        };
        let mut header = self.header;
        header[self.read..].copy_from_slice(rest);
        bytes.len().min(missing + payload_bytes(header))
    }
}

fn payload_bytes([high, middle, low, ..]: [u8; 9]) -> usize {
    let length = u32::from_be_bytes([0, high, middle, low]);
    usize::try_from(length).unwrap_or(usize::MAX)
}

fn skip(bytes: &mut &[u8], left: &mut usize) {
    let count = bytes.len().min(*left);
    *left -= count;
    *bytes = &bytes[count..];
}

/// A connection that limits stream resets and overwrites the buffers of the HTTP/2 library.
#[derive(Debug)]
pub(super) struct Watched<I> {
    io: I,
    received: Frames,
    sent: Frames,
    used: f64,
    since: Instant,
    is_authenticated: Arc<AtomicBool>,
    /// The timer for `SILENCE`, which exists as long as the connection.
    silence: Pin<Box<Sleep>>,
    /// When message data or headers were last read or written.
    active: TimerInstant,
    /// Whether message data or headers were read or written since the buffers were overwritten.
    is_dirty: bool,
    /// Number of bytes that were written since the library's write buffer was last overwritten, at
    /// most the capacity of this buffer.
    written: usize,
    filler: Filler,
    /// Number of answers to the inserted PING frames that the library has not written yet.
    pongs: usize,
}

/// The inserted frames, as one sequence of bytes.
#[derive(Debug)]
struct Filler {
    at: usize,
    end: usize,
    ping: [u8; PING_BYTES],
    pong: [u8; PING_BYTES],
}

impl Filler {
    fn new() -> Self {
        // The payload is random, so that the answers to inserted PING frames differ from the
        // answers to PING frames of the client.
        let payload = Uuid::new_v4();
        let frame = |header: [u8; 9]| {
            let mut frame = [0; PING_BYTES];
            frame[..9].copy_from_slice(&header);
            frame[9..].copy_from_slice(&payload.as_bytes()[..8]);
            frame
        };
        Self {
            at: 0,
            end: 0,
            ping: frame(PING_HEADER),
            pong: frame(PONG_HEADER),
        }
    }

    fn start(&mut self, pings: usize) {
        self.at = 0;
        self.end = FILLERS_BYTES + pings * PING_BYTES;
    }

    fn is_active(&self) -> bool {
        self.at < self.end
    }

    /// Copies as many bytes as fit into the buffer.
    fn fill(&mut self, buffer: &mut ReadBuf<'_>) {
        while self.is_active() && buffer.remaining() > 0 {
            let rest = if let Some(at) = self.at.checked_sub(FILLERS_BYTES) {
                &self.ping[at % PING_BYTES..]
            } else {
                let at = self.at % FILLER_BYTES;
                FILLER_HEADER
                    .get(at..)
                    .filter(|rest| !rest.is_empty())
                    .unwrap_or(&[0; FILLER_BYTES][at..])
            };
            let count = rest.len().min(buffer.remaining());
            buffer.put_slice(&rest[..count]);
            self.at += count;
        }
    }
}

impl<I> Watched<I> {
    /// Wraps a connection on which `preface` bytes arrive before the first frame.
    pub(super) fn new(io: I, preface: usize, is_authenticated: Arc<AtomicBool>) -> Self {
        Self {
            io,
            received: Frames::after(preface),
            sent: Frames::after(0),
            used: 0.0,
            since: Instant::now(),
            is_authenticated,
            silence: Box::pin(sleep(SILENCE)),
            active: TimerInstant::now(),
            is_dirty: false,
            written: 0,
            filler: Filler::new(),
            pongs: 0,
        }
    }

    /// Starts to overwrite the buffers.
    fn start_filling(&mut self, buffer: &mut ReadBuf<'_>) {
        let pings = self.written.div_ceil(PING_BYTES);
        self.written = 0;
        self.pongs += pings;
        self.filler.start(pings);
        self.filler.fill(buffer);
    }

    fn note_dirty(&mut self, seen: Seen) {
        if !seen.is_confidential {
            return;
        }
        self.active = TimerInstant::now();
        if !self.is_dirty {
            self.is_dirty = true;
            self.silence.as_mut().reset(self.active + SILENCE);
        }
    }

    /// Waits until no message data and no headers were read or written for `SILENCE`. The timer is set again only when
    /// it fires, because setting the timer for each frame costs more than a few additional wake-ups.
    fn poll_silence(&mut self, context: &mut Context<'_>) -> Poll<()> {
        loop {
            ready!(self.silence.as_mut().poll(context));
            let end = self.active + SILENCE;
            if self.silence.deadline() >= end {
                return Poll::Ready(());
            }
            self.silence.as_mut().reset(end);
        }
    }

    fn note_written(&mut self, bytes: &[u8], context: &mut Context<'_>) {
        let seen = self.sent.see(bytes);
        self.written = (self.written + bytes.len()).min(WRITE_BUFFER_BYTES);
        self.note_dirty(seen);
        // The timer must wake the task after `SILENCE`, even if the task does not read before then.
        if self.is_dirty && self.poll_silence(context).is_ready() {
            context.waker().wake_by_ref();
        }
    }

    /// Counts the leading bytes that are answers to the inserted PING frames, and marks these
    /// answers as received.
    fn take_pongs(&mut self, bytes: &[u8]) -> usize {
        let mut taken = 0;
        while self.pongs > 0
            && self.sent.is_at_boundary()
            && bytes[taken..].starts_with(&self.filler.pong)
        {
            self.pongs -= 1;
            taken += PING_BYTES;
        }
        taken
    }

    fn note_resets(&mut self, resets: u32, now: Instant) -> io::Result<()> {
        if resets == 0 {
            return Ok(());
        }
        let rate = if self.is_authenticated.load(Ordering::Relaxed) {
            AUTHENTICATED
        } else {
            UNAUTHENTICATED
        };
        let regained = now.duration_since(self.since).as_secs_f64() * rate.per_second;
        self.since = now;
        self.used = (self.used - regained).max(0.0) + f64::from(resets);
        if self.used <= rate.burst {
            return Ok(());
        }
        metrics::CONNECTIONS_REFUSED.with(["resets"]).increment(1);
        Err(io::Error::other("the client reset too many HTTP/2 streams"))
    }
}

impl<I: AsyncRead + Unpin> AsyncRead for Watched<I> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.filler.is_active() {
            self.filler.fill(buffer);
            return Poll::Ready(Ok(()));
        }
        let before = buffer.filled().len();
        match Pin::new(&mut self.io).poll_read(context, buffer) {
            Poll::Ready(read) => {
                read?;
                let seen = self.received.see(&buffer.filled()[before..]);
                self.note_dirty(seen);
                Poll::Ready(self.note_resets(seen.resets, Instant::now()))
            }
            Poll::Pending => {
                if !self.is_dirty || self.poll_silence(context).is_pending() {
                    return Poll::Pending;
                }
                self.is_dirty = false;
                if !self.received.is_between() {
                    return Poll::Pending;
                }
                self.start_filling(buffer);
                Poll::Ready(Ok(()))
            }
        }
    }
}

impl<I: AsyncWrite + Unpin> AsyncWrite for Watched<I> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let taken = self.take_pongs(bytes);
        if taken > 0 {
            return Poll::Ready(Ok(taken));
        }
        // While the library still has answers to write, each write ends at the end of a frame, so
        // that the next frame can be inspected.
        let part = if self.pongs > 0 {
            &bytes[..self.sent.rest_of_frame(bytes)]
        } else {
            bytes
        };
        let count = ready!(Pin::new(&mut self.io).poll_write(context, part))?;
        self.note_written(&part[..count], context);
        Poll::Ready(Ok(count))
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if self.pongs > 0 {
            let first = parts.iter().find(|part| !part.is_empty());
            return self.poll_write(context, first.map_or(&[][..], |part| part));
        }
        let count = ready!(Pin::new(&mut self.io).poll_write_vectored(context, parts))?;
        let mut left = count;
        for part in parts {
            let written = part.len().min(left);
            self.note_written(&part[..written], context);
            left -= written;
        }
        Poll::Ready(Ok(count))
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    fn frame(kind: u8, payload: usize) -> Vec<u8> {
        let [_, high, middle, low] = u32::try_from(payload).unwrap().to_be_bytes();
        let mut frame = vec![high, middle, low, kind, 0, 0, 0, 0, 1];
        // A payload that looks like the headers of RST_STREAM frames.
        frame.extend([0, 0, 4, 3, 0].into_iter().cycle().take(payload));
        frame
    }

    proptest! {
        #[test]
        fn resets_are_counted_wherever_reads_end(
            frames in prop::collection::vec((0_u8..12, 0_usize..40), 0..40),
            cuts in prop::collection::vec(1_usize..30, 1..50),
        ) {
            let mut bytes = vec![3; 24];
            for &(kind, payload) in &frames {
                bytes.extend(frame(kind, payload));
            }
            let mut counted = Frames::after(24);
            let mut resets = 0;
            let mut rest = &bytes[..];
            for cut in cuts.iter().cycle() {
                let (part, more) = rest.split_at((*cut).min(rest.len()));
                resets += counted.see(part).resets;
                rest = more;
                if rest.is_empty() {
                    break;
                }
            }
            let expected = frames.iter().filter(|(kind, _)| *kind == Frames::RST_STREAM);
            prop_assert_eq!(usize::try_from(resets).unwrap(), expected.count());
        }
    }

    #[test]
    fn fillers_stand_between_frames_alone() {
        for (bytes, is_between) in [
            (frame(0, 10), true),
            (frame(0, 10)[..18].to_vec(), false),
            (frame(0, 10)[..4].to_vec(), false),
            // Incomplete headers that need a CONTINUATION frame, and complete headers.
            (frame(Frames::HEADERS, 10), false),
            ([vec![0, 0, 0, 1, 4], vec![0; 4]].concat(), true),
        ] {
            let mut frames = Frames::after(0);
            frames.see(&bytes);
            assert_eq!(frames.is_between(), is_between, "{bytes:?}");
        }
        assert!(!Frames::after(24).is_between());
    }

    /// After an idle period, complete frames of the unknown type are inserted only once.
    #[tokio::test]
    async fn a_silent_connection_is_filled_once() {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        let (mut client, server) = tokio::io::duplex(1_024);
        let mut counted = Watched::new(server, 0, Arc::default());
        client.write_all(&frame(0, 5)).await.unwrap();
        let mut seen = vec![0; 14];
        counted.read_exact(&mut seen).await.unwrap();
        assert_eq!(seen, frame(0, 5));
        let mut filler = vec![0; FILLERS_BYTES];
        counted.read_exact(&mut filler).await.unwrap();
        for one in filler.chunks(FILLER_BYTES) {
            assert_eq!(one[..9], FILLER_HEADER);
            assert!(one[9..].iter().all(|byte| *byte == 0));
        }
        let more = tokio::time::timeout(3 * SILENCE, counted.read_u8()).await;
        more.unwrap_err();
        client.write_all(&[7]).await.unwrap();
        assert_eq!(counted.read_u8().await.unwrap(), 7);
    }

    /// After the library writes, enough PING frames are inserted to overwrite the write buffer. The
    /// answers to the PING frames are discarded, and all other frames are sent.
    #[tokio::test]
    async fn answers_to_own_pings_are_never_sent() {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        let (mut client, server) = tokio::io::duplex(64 * 1_024);
        let mut watched = Watched::new(server, 0, Arc::default());
        let message = frame(Frames::DATA, 100);
        watched.write_all(&message).await.unwrap();
        let mut filler = vec![0; FILLERS_BYTES];
        watched.read_exact(&mut filler).await.unwrap();
        let pings = message.len().div_ceil(PING_BYTES);
        let mut answers = Vec::new();
        for _ in 0..pings {
            let mut ping = [0; PING_BYTES];
            watched.read_exact(&mut ping).await.unwrap();
            assert_eq!(ping[..9], PING_HEADER);
            ping[4] = 1;
            answers.push(ping.to_vec());
        }
        // An answer to a PING frame of the client, and a frame whose payload looks like an answer
        // to an inserted PING frame.
        let mut other = answers[0].clone();
        other[9] ^= 1;
        let mut lookalike = frame(Frames::DATA, PING_BYTES);
        lookalike[9..].copy_from_slice(&answers[0]);
        let (first, second) = answers.split_at(2);
        let written = [
            first.concat(),
            other.clone(),
            lookalike.clone(),
            second.concat(),
            message.clone(),
        ];
        let written = written.concat();
        watched.write_all(&written).await.unwrap();
        watched.shutdown().await.unwrap();
        let mut arrived = Vec::new();
        client.read_to_end(&mut arrived).await.unwrap();
        let expected = [message.clone(), other, lookalike, message].concat();
        assert_eq!(arrived, expected);
        assert_eq!(watched.pongs, 0);
    }

    #[tokio::test]
    async fn an_authenticated_client_may_reset_more() {
        for (known, burst, second) in [(false, 64, 8), (true, 1_024, 256)] {
            let mut counted = Watched::new((), 0, Arc::new(AtomicBool::new(known)));
            let start = counted.since;
            counted.note_resets(burst, start).unwrap();
            counted.note_resets(1, start).unwrap_err();
            let mut counted = Watched::new((), 0, Arc::new(AtomicBool::new(known)));
            let start = counted.since;
            counted.note_resets(burst, start).unwrap();
            let later = start + Duration::from_secs(1);
            counted.note_resets(second, later).unwrap();
            counted.note_resets(1, later).unwrap_err();
        }
    }
}
