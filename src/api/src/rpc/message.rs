//! Receives the complete message of a call before a service handles the call. The same length limit
//! therefore applies to every route, including routes that libraries add.
//!
//! The memory for the messages of all connections together is limited. The first 4 KiB of each message do not count towards
//! the limit, but every further byte does. If not enough memory is left, the call is refused. Calls do not wait for memory,
//! because connections that wait for each other could block forever. One principal can hold only a part of the memory, so
//! that it cannot prevent the large messages of others, and a message that stops arriving holds its memory only for a short
//! time.
//!
//! Mitigation: M3 of `THREAT_MODEL.md`.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use axum::{body::Body, extract::Request};
use http_body_util::{BodyExt as _, Full, Limited};

use keybroker_core::{
    counts::Counts,
    error::{Error, Reason},
    metrics,
};

use super::{HEALTH_BYTES_MAX, MESSAGE_BYTES_MAX, method};

/// Length of the prefix of a message, in bytes. The prefix contains a flag and the message's length (gRPC over HTTP/2).
const PREFIX_BYTES: usize = 5;
/// Number of bytes of each message that do not count towards the limit. Therefore, a call for a single user key can always
/// be received, regardless of how many large batches are in progress.
const FREE_BYTES: usize = 4 * 1_024;
/// Divisor: the messages of one principal may take at most the whole memory divided by this number.
const PRINCIPAL_DIVISOR: usize = 8;
/// The messages of every principal may take at least this number of bytes, so that the longest message always fits.
const PRINCIPAL_BYTES_MIN: usize = MESSAGE_BYTES_MAX;
/// Longest time in which a message must arrive. A client sends a message of 64 KiB much faster, even over a slow connection.
const RECEIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// Retry delay of a call that is refused because not enough memory is left.
const RETRY: Duration = Duration::from_secs(1);

/// Limits the bytes of messages in progress on all connections together. All clones share the same limit.
#[derive(Clone, Debug)]
pub struct Memory(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    bytes: usize,
    of_each_principal: usize,
    timeout: Duration,
    taken: Mutex<Taken>,
}

/// The bytes that the messages in progress have taken.
#[derive(Debug, Default)]
struct Taken {
    total: usize,
    /// The bytes of each principal, by the principal's name. All calls without a principal have the empty name.
    by_principal: Counts<String>,
}

/// The part of the memory that one message takes. When this value is dropped, the memory is free again.
#[derive(Debug)]
pub(super) struct Share {
    memory: Memory,
    principal: String,
    bytes: usize,
}

impl Memory {
    /// Limits the messages in progress to `bytes` bytes in total.
    pub fn new(bytes: usize) -> Self {
        Self::with_timeout(bytes, RECEIVE_TIMEOUT)
    }

    fn with_timeout(bytes: usize, timeout: Duration) -> Self {
        Self(Arc::new(Shared {
            bytes,
            of_each_principal: (bytes / PRINCIPAL_DIVISOR).max(PRINCIPAL_BYTES_MIN),
            timeout,
            taken: Mutex::default(),
        }))
    }

    /// Receives the message of a request. `principal` is the name of the caller's principal. The caller must keep the
    /// returned share of the memory until the request has been handled.
    pub(super) async fn receive(
        &self,
        request: Request,
        principal: Option<&str>,
        deadline: Instant,
    ) -> Result<(Request, Option<Share>), Error> {
        let path = request.uri().path();
        let bytes_max = if method::is_health(path) {
            HEALTH_BYTES_MAX
        } else {
            MESSAGE_BYTES_MAX
        };
        let bytes_max = bytes_max + PREFIX_BYTES;
        if method::takes_stream(path) {
            // The limit applies to all messages of the stream together.
            let limited = request.map(|body| Body::new(Limited::new(body, bytes_max)));
            return Ok((limited, None));
        }
        let (head, body) = request.into_parts();
        let reading = self.read(body, principal.unwrap_or_default(), bytes_max);
        let end = deadline.min(Instant::now() + self.0.timeout);
        let received = tokio::time::timeout_at(end.into(), reading).await;
        let late = |_| Error::new(Reason::Deadline, "the message did not arrive in time");
        let (message, share) = received.map_err(late)??;
        let body = Body::new(Full::new(message.into()));
        Ok((Request::from_parts(head, body), share))
    }

    async fn read(
        &self,
        mut body: Body,
        principal: &str,
        bytes_max: usize,
    ) -> Result<(Vec<u8>, Option<Share>), Error> {
        let mut message = Vec::new();
        let mut share: Option<Share> = None;
        while let Some(frame) = body.frame().await {
            let broken = |_| Error::violation("message", "a protobuf message of this method");
            let Ok(data) = frame.map_err(broken)?.into_data() else {
                continue;
            };
            let length = message.len() + data.len();
            if length > bytes_max {
                return Err(too_long(bytes_max));
            }
            let wanted = length.saturating_sub(FREE_BYTES);
            if wanted > 0 {
                let share = share.get_or_insert_with(|| Share {
                    memory: self.clone(),
                    principal: principal.to_owned(),
                    bytes: 0,
                });
                share.grow_to(wanted)?;
            }
            message.extend_from_slice(&data);
            // A message whose prefix announces too many bytes is refused before it arrives.
            if declared(&message).is_some_and(|length| length > bytes_max - PREFIX_BYTES) {
                return Err(too_long(bytes_max));
            }
        }
        Ok((message, share))
    }

    fn take(&self, principal: &str, bytes: usize) -> Result<(), Error> {
        let mut taken = self.taken();
        let has_room = bytes <= self.0.bytes.saturating_sub(taken.total);
        if !has_room {
            return Err(refused(
                "the memory limit for messages in progress is reached",
            ));
        }
        let max = self.0.of_each_principal;
        if !taken
            .by_principal
            .take_several(principal.to_owned(), bytes, max)
        {
            return Err(refused(
                "the principal's memory limit for messages in progress is reached",
            ));
        }
        taken.total += bytes;
        Ok(())
    }

    fn taken(&self) -> MutexGuard<'_, Taken> {
        self.0.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Share {
    /// Takes the memory that is missing up to `bytes` bytes.
    fn grow_to(&mut self, bytes: usize) -> Result<(), Error> {
        let missing = bytes.saturating_sub(self.bytes);
        self.memory.take(&self.principal, missing)?;
        self.bytes += missing;
        Ok(())
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut taken = self.memory.taken();
        taken.total -= self.bytes;
        taken
            .by_principal
            .give_back_several(&self.principal, self.bytes);
    }
}

/// Refuses a call because not enough memory is left.
fn refused(detail: &str) -> Error {
    metrics::MESSAGES_REFUSED.increment();
    Error::new(Reason::Rate, detail).retry_after(RETRY)
}

/// Returns the length that the prefix of a message states.
fn declared(message: &[u8]) -> Option<usize> {
    let length = message.get(1..PREFIX_BYTES)?.try_into().ok()?;
    usize::try_from(u32::from_be_bytes(length)).ok()
}

fn too_long(bytes_max: usize) -> Error {
    let limit = if bytes_max == HEALTH_BYTES_MAX + PREFIX_BYTES {
        "at most 1 KiB"
    } else {
        "at most 64 KiB"
    };
    Error::violation("message", limit)
}

#[cfg(test)]
mod tests {
    use super::*;

    const UNWRAP: &str = "/keybroker.v1.UserKeyService/UnwrapUserKey";
    const ALICE: Option<&str> = Some("alice");

    fn request(path: &str, bytes: usize) -> Request {
        let parts = vec![0; bytes];
        let parts: Vec<_> = parts.chunks(1_000).map(<[u8]>::to_vec).collect();
        let parts = parts.into_iter().map(Ok::<_, std::io::Error>);
        let body = Body::from_stream(futures_util::stream::iter(parts));
        Request::post(path).body(body).unwrap()
    }

    async fn receive(
        memory: &Memory,
        path: &str,
        bytes: usize,
    ) -> Result<(usize, Option<Share>), Error> {
        receive_of(memory, ALICE, path, bytes).await
    }

    async fn receive_of(
        memory: &Memory,
        principal: Option<&str>,
        path: &str,
        bytes: usize,
    ) -> Result<(usize, Option<Share>), Error> {
        let deadline = Instant::now() + Duration::from_mins(1);
        let request = request(path, bytes);
        let (received, share) = memory.receive(request, principal, deadline).await?;
        let body = received.into_body().collect().await.unwrap().to_bytes();
        Ok((body.len(), share))
    }

    /// A request whose message begins with these bytes and never ends.
    fn stalled(beginning: Vec<u8>) -> Request {
        let beginning = Ok::<_, std::io::Error>(beginning);
        let never = futures_util::StreamExt::chain(
            futures_util::stream::iter([beginning]),
            futures_util::stream::pending(),
        );
        Request::post(UNWRAP)
            .body(Body::from_stream(never))
            .unwrap()
    }

    #[tokio::test]
    async fn every_route_has_a_limit() {
        let memory = Memory::new(1_000_000);
        for (path, limit) in [
            (UNWRAP, MESSAGE_BYTES_MAX),
            (
                "/keybroker.v1.ControlService/TailAuditLog",
                MESSAGE_BYTES_MAX,
            ),
            ("/no.such.Service/Method", MESSAGE_BYTES_MAX),
            ("/grpc.health.v1.Health/Check", HEALTH_BYTES_MAX),
            ("/grpc.health.v1.Health/Watch", HEALTH_BYTES_MAX),
        ] {
            let longest = limit + PREFIX_BYTES;
            assert_eq!(receive(&memory, path, longest).await.unwrap().0, longest);
            let error = receive(&memory, path, longest + 1).await.unwrap_err();
            assert_eq!(error.reason(), Reason::Request, "{path}");
        }
        let path = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo";
        let long = request(path, MESSAGE_BYTES_MAX + PREFIX_BYTES + 1);
        let received = memory.receive(long, ALICE, Instant::now()).await;
        let (limited, _) = received.unwrap();
        limited.into_body().collect().await.unwrap_err();
    }

    #[tokio::test]
    async fn large_messages_share_a_total_and_small_ones_always_fit() {
        let memory = Memory::new(10_000);
        let (_, held) = receive(&memory, UNWRAP, 12_000).await.unwrap();
        assert_eq!(held.as_ref().unwrap().bytes, 12_000 - FREE_BYTES);
        let error = receive(&memory, UNWRAP, 12_000).await.unwrap_err();
        assert_eq!(error.reason(), Reason::Rate);
        assert!(error.retry_delay().is_some());
        receive(&memory, UNWRAP, FREE_BYTES).await.unwrap();
        drop(held);
        receive(&memory, UNWRAP, 12_000).await.unwrap();
        assert_eq!(memory.taken().total, 0);
    }

    #[tokio::test]
    async fn one_principal_cannot_take_the_memory_of_the_others() {
        let longest = MESSAGE_BYTES_MAX + PREFIX_BYTES;
        // An eighth is enough for two of the longest messages.
        let memory = Memory::new(16 * MESSAGE_BYTES_MAX);
        let first = receive(&memory, UNWRAP, longest).await.unwrap();
        let second = receive(&memory, UNWRAP, longest).await.unwrap();
        let error = receive(&memory, UNWRAP, longest).await.unwrap_err();
        assert_eq!(error.reason(), Reason::Rate);
        assert!(error.retry_delay().is_some());
        // A refused message keeps nothing, and the small messages of the principal still fit.
        let held = [&first, &second].map(|(_, share)| share.as_ref().unwrap().bytes);
        assert_eq!(memory.taken().total, held.iter().sum::<usize>());
        receive(&memory, UNWRAP, FREE_BYTES).await.unwrap();
        for other in [Some("bob"), None] {
            receive_of(&memory, other, UNWRAP, longest).await.unwrap();
        }
        drop(first);
        receive(&memory, UNWRAP, longest).await.unwrap();
        drop(second);
        let taken = memory.taken();
        assert!(taken.total == 0 && taken.by_principal.is_empty());
    }

    #[tokio::test]
    async fn a_message_that_states_too_much_is_not_waited_for() {
        let request = stalled(vec![0, 0, 1, 0, 1]);
        let deadline = Instant::now() + Duration::from_mins(1);
        let received = Memory::new(1).receive(request, ALICE, deadline).await;
        assert_eq!(received.unwrap_err().reason(), Reason::Request);
    }

    #[tokio::test]
    async fn a_message_that_stops_arriving_ends_at_the_deadline() {
        let request = stalled(Vec::new());
        let received = Memory::new(1).receive(request, ALICE, Instant::now()).await;
        assert_eq!(received.unwrap_err().reason(), Reason::Deadline);
    }

    #[tokio::test]
    async fn a_message_that_stops_arriving_ends_long_before_a_late_deadline() {
        let memory = Memory::with_timeout(MESSAGE_BYTES_MAX, Duration::from_millis(20));
        let began = Instant::now();
        let deadline = began + Duration::from_mins(1);
        let request = stalled(vec![0; 2 * FREE_BYTES]);
        let received = memory.receive(request, ALICE, deadline).await;
        assert_eq!(received.unwrap_err().reason(), Reason::Deadline);
        assert!(began.elapsed() < Duration::from_secs(30));
        let taken = memory.taken();
        assert!(taken.total == 0 && taken.by_principal.is_empty());
    }
}
