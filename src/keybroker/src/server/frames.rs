//! The frames of an HTTP/2 connection, before the library reads them.
//!
//! Counts the streams that a client resets. The HTTP/2 library bounds resets that come before it has accepted the stream, with
//! one number for the whole connection: low enough against a rapid reset (CVE-2023-44487), it ends the connection of an honest client
//! whose calls expire while the broker stands still. So the library's number is high, and the rate is bounded here.
//!
//! Overwrites what the library has read. Its read buffer keeps the last messages, keys among them, until new ones take their place.
//! When a connection falls silent, the library is given frames of an unknown type, filled with zeros, which it must ignore
//! (RFC 9113 section 5.5).
//!
//! Mitigation: M3 of `THREAT_MODEL.md`.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::{Duration, Instant},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Instant as TimerInstant, Sleep, sleep},
};

/// A connection on which nothing arrives for this long is silent.
const SILENCE: Duration = Duration::from_millis(250);
/// A frame of a type that has no meaning, on stream 0, with 1,015 bytes: with its header 1 KiB.
const FILLER_HEADER: [u8; 9] = [0, 0x03, 0xf7, 0xfa, 0, 0, 0, 0, 0];
const FILLER_BYTES: usize = 1_024;
/// The library's buffer takes two of the largest frames (16 KiB) at most.
const FILLERS: usize = 48;

/// Resets at once, and more each second.
const UNAUTHENTICATED: Rate = Rate {
    burst: 64.0,
    per_second: 8.0,
};
const AUTHENTICATED: Rate = Rate {
    burst: 1_024.0,
    per_second: 256.0,
};
/// The library's own limit: above both.
pub(super) const LIBRARY_RESETS_MAX: usize = 2_048;

#[derive(Clone, Copy, Debug)]
struct Rate {
    burst: f64,
    per_second: f64,
}

/// The frames of a connection, as far as they matter here (RFC 9113 section 4.1).
#[derive(Debug)]
struct Frames {
    /// What is left to read of the preface.
    preface: usize,
    header: [u8; 9],
    /// Bytes of the header that were read.
    read: usize,
    /// Bytes of the payload that are still to come.
    payload: usize,
}

impl Frames {
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

    /// Whether another frame may come now: after a whole one, and not within a block of headers.
    fn is_between(&self) -> bool {
        let [_, _, _, kind, flags, ..] = self.header;
        let is_headers = matches!(kind, Self::HEADERS | Self::CONTINUATION);
        let is_open = is_headers && flags & Self::END_HEADERS == 0;
        self.preface == 0 && self.read == 0 && self.payload == 0 && !is_open
    }

    /// How many streams these bytes reset.
    fn resets(&mut self, mut bytes: &[u8]) -> u32 {
        let mut resets = 0;
        skip(&mut bytes, &mut self.preface);
        while !bytes.is_empty() {
            if self.payload > 0 {
                skip(&mut bytes, &mut self.payload);
                continue;
            }
            let count = bytes.len().min(self.header.len() - self.read);
            self.header[self.read..self.read + count].copy_from_slice(&bytes[..count]);
            self.read += count;
            bytes = &bytes[count..];
            if self.read == self.header.len() {
                self.read = 0;
                let [high, middle, low, kind, ..] = self.header;
                let length = u32::from_be_bytes([0, high, middle, low]);
                self.payload = usize::try_from(length).unwrap_or(usize::MAX);
                resets += u32::from(kind == Self::RST_STREAM);
            }
        }
        resets
    }
}

fn skip(bytes: &mut &[u8], left: &mut usize) {
    let count = bytes.len().min(*left);
    *left -= count;
    *bytes = &bytes[count..];
}

/// A connection that ends when its client resets too many streams.
#[derive(Debug)]
pub(super) struct Watched<I> {
    io: I,
    frames: Frames,
    used: f64,
    since: Instant,
    is_authenticated: Arc<AtomicBool>,
    /// Ends after a silence; one timer for the life of the connection.
    silence: Pin<Box<Sleep>>,
    /// Whether something was read that is to be overwritten.
    is_dirty: bool,
    /// Bytes of fillers that are still to be read.
    filling: usize,
}

impl<I> Watched<I> {
    /// A connection whose reader sees `preface` bytes before the first frame.
    pub(super) fn new(io: I, preface: usize, is_authenticated: Arc<AtomicBool>) -> Self {
        Self {
            io,
            frames: Frames::after(preface),
            used: 0.0,
            since: Instant::now(),
            is_authenticated,
            silence: Box::pin(sleep(SILENCE)),
            is_dirty: false,
            filling: 0,
        }
    }

    /// Puts as much of the fillers into the buffer as fits.
    fn fill(&mut self, buffer: &mut ReadBuf<'_>) {
        while self.filling > 0 && buffer.remaining() > 0 {
            let at = (FILLERS * FILLER_BYTES - self.filling) % FILLER_BYTES;
            let rest = if at < FILLER_HEADER.len() {
                &FILLER_HEADER[at..]
            } else {
                &[0; FILLER_BYTES][at..]
            };
            let count = rest.len().min(buffer.remaining());
            buffer.put_slice(&rest[..count]);
            self.filling -= count;
        }
    }

    fn note(&mut self, resets: u32, now: Instant) -> io::Result<()> {
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
        metrics::counter!("keybroker_connections_refused_total", "cause" => "resets").increment(1);
        Err(io::Error::other("the client resets too many streams"))
    }
}

impl<I: AsyncRead + Unpin> AsyncRead for Watched<I> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.filling > 0 {
            self.fill(buffer);
            return Poll::Ready(Ok(()));
        }
        let before = buffer.filled().len();
        match Pin::new(&mut self.io).poll_read(context, buffer) {
            Poll::Ready(read) => {
                read?;
                let resets = self.frames.resets(&buffer.filled()[before..]);
                self.silence.as_mut().reset(TimerInstant::now() + SILENCE);
                self.is_dirty = true;
                Poll::Ready(self.note(resets, Instant::now()))
            }
            Poll::Pending => {
                if !self.is_dirty || self.silence.as_mut().poll(context).is_pending() {
                    return Poll::Pending;
                }
                self.is_dirty = false;
                if !self.frames.is_between() {
                    return Poll::Pending;
                }
                self.filling = FILLERS * FILLER_BYTES;
                self.fill(buffer);
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
        Pin::new(&mut self.io).poll_write(context, bytes)
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
        Pin::new(&mut self.io).poll_write_vectored(context, parts)
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
        // A payload that looks like headers of resets.
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
                resets += counted.resets(part);
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
            // Headers that a continuation follows, and headers that are complete.
            (frame(Frames::HEADERS, 10), false),
            ([vec![0, 0, 0, 1, 4], vec![0; 4]].concat(), true),
        ] {
            let mut frames = Frames::after(0);
            frames.resets(&bytes);
            assert_eq!(frames.is_between(), is_between, "{bytes:?}");
        }
        assert!(!Frames::after(24).is_between());
    }

    /// Silence is followed by whole frames of the unknown type, and by nothing after these.
    #[tokio::test]
    async fn a_silent_connection_is_filled_once() {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        let (mut client, server) = tokio::io::duplex(1_024);
        let mut counted = Watched::new(server, 0, Arc::default());
        client.write_all(&frame(0, 5)).await.unwrap();
        let mut seen = vec![0; 14];
        counted.read_exact(&mut seen).await.unwrap();
        assert_eq!(seen, frame(0, 5));
        let mut filler = vec![0; FILLERS * FILLER_BYTES];
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

    #[tokio::test]
    async fn an_authenticated_client_may_reset_more() {
        for (known, burst, second) in [(false, 64, 8), (true, 1_024, 256)] {
            let mut counted = Watched::new((), 0, Arc::new(AtomicBool::new(known)));
            let start = counted.since;
            counted.note(burst, start).unwrap();
            counted.note(1, start).unwrap_err();
            let mut counted = Watched::new((), 0, Arc::new(AtomicBool::new(known)));
            let start = counted.since;
            counted.note(burst, start).unwrap();
            let later = start + Duration::from_secs(1);
            counted.note(second, later).unwrap();
            counted.note(1, later).unwrap_err();
        }
    }
}
