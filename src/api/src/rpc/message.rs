//! Receives the complete message of a call before a service handles the call. The same length limit
//! therefore applies to every route, including routes that libraries add.
//!
//! The memory for the messages of all connections together is limited. The first 4 KiB of each message do not count towards
//! the limit, but every further byte does. If not enough memory is left, the call is refused. Calls do not wait for memory,
//! because connections that wait for each other could block forever.
//!
//! Mitigation: M3 of `THREAT_MODEL.md`.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{body::Body, extract::Request};
use http_body_util::{BodyExt as _, Full, Limited};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use keybroker_core::{
    error::{Error, Reason},
    metrics,
};

use super::{HEALTH_BYTES_MAX, MESSAGE_BYTES_MAX, method};

/// Length of the prefix of a message, in bytes. The prefix contains a flag and the message's length (gRPC over HTTP/2).
const PREFIX_BYTES: usize = 5;
/// Number of bytes of each message that do not count towards the limit. Therefore, a call for a single user key can always
/// be received, regardless of how many large batches are in progress.
const FREE_BYTES: usize = 4 * 1_024;
/// Retry delay of a call that is refused because not enough memory is left.
const RETRY: Duration = Duration::from_secs(1);

/// Limits the bytes of messages in progress on all connections together.
#[derive(Clone, Debug)]
pub struct Memory(Arc<Semaphore>);

impl Memory {
    /// Limits the messages in progress to `bytes` bytes in total.
    pub fn new(bytes: usize) -> Self {
        Self(Arc::new(Semaphore::new(bytes.min(Semaphore::MAX_PERMITS))))
    }

    /// Receives the message of a request. The caller must keep the returned share of the memory until the request has been
    /// handled.
    pub(super) async fn receive(
        &self,
        request: Request,
        deadline: Instant,
    ) -> Result<(Request, Option<OwnedSemaphorePermit>), Error> {
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
        let received = tokio::time::timeout_at(deadline.into(), self.read(body, bytes_max)).await;
        let late = |_| Error::new(Reason::Deadline, "the message did not arrive in time");
        let (message, share) = received.map_err(late)??;
        let body = Body::new(Full::new(message.into()));
        Ok((Request::from_parts(head, body), share))
    }

    async fn read(
        &self,
        mut body: Body,
        bytes_max: usize,
    ) -> Result<(Vec<u8>, Option<OwnedSemaphorePermit>), Error> {
        let mut message = Vec::new();
        let mut share: Option<OwnedSemaphorePermit> = None;
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
            let held = share.as_ref().map_or(0, OwnedSemaphorePermit::num_permits);
            if let Some(more) = self.take(wanted.saturating_sub(held))? {
                match &mut share {
                    Some(share) => share.merge(more),
                    None => share = Some(more),
                }
            }
            message.extend_from_slice(&data);
            // A message whose prefix announces too many bytes is refused before it arrives.
            if declared(&message).is_some_and(|length| length > bytes_max - PREFIX_BYTES) {
                return Err(too_long(bytes_max));
            }
        }
        Ok((message, share))
    }

    fn take(&self, bytes: usize) -> Result<Option<OwnedSemaphorePermit>, Error> {
        if bytes == 0 {
            return Ok(None);
        }
        let permits = u32::try_from(bytes).unwrap_or(u32::MAX);
        let taken = Arc::clone(&self.0).try_acquire_many_owned(permits);
        taken.map(Some).map_err(|_| {
            metrics::MESSAGES_REFUSED.increment();
            Error::new(
                Reason::Rate,
                "the memory limit for messages in progress is reached",
            )
            .retry_after(RETRY)
        })
    }
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
    ) -> Result<(usize, Option<OwnedSemaphorePermit>), Error> {
        let deadline = Instant::now() + Duration::from_mins(1);
        let (received, share) = memory.receive(request(path, bytes), deadline).await?;
        let body = received.into_body().collect().await.unwrap().to_bytes();
        Ok((body.len(), share))
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
        let (limited, _) = memory.receive(long, Instant::now()).await.unwrap();
        limited.into_body().collect().await.unwrap_err();
    }

    #[tokio::test]
    async fn large_messages_share_a_total_and_small_ones_always_fit() {
        let memory = Memory::new(10_000);
        let (_, held) = receive(&memory, UNWRAP, 12_000).await.unwrap();
        assert_eq!(held.as_ref().unwrap().num_permits(), 12_000 - FREE_BYTES);
        let error = receive(&memory, UNWRAP, 12_000).await.unwrap_err();
        assert_eq!(error.reason(), Reason::Rate);
        assert!(error.retry_delay().is_some());
        receive(&memory, UNWRAP, FREE_BYTES).await.unwrap();
        drop(held);
        receive(&memory, UNWRAP, 12_000).await.unwrap();
        assert_eq!(memory.0.available_permits(), 10_000);
    }

    #[tokio::test]
    async fn a_message_that_states_too_much_is_not_waited_for() {
        let prefix = Ok::<_, std::io::Error>(vec![0, 0, 1, 0, 1]);
        let never = futures_util::StreamExt::chain(
            futures_util::stream::iter([prefix]),
            futures_util::stream::pending(),
        );
        let request = Request::post(UNWRAP)
            .body(Body::from_stream(never))
            .unwrap();
        let deadline = Instant::now() + Duration::from_mins(1);
        let error = Memory::new(1).receive(request, deadline).await.unwrap_err();
        assert_eq!(error.reason(), Reason::Request);
    }

    #[tokio::test]
    async fn a_message_that_stops_arriving_ends_at_the_deadline() {
        let never = futures_util::stream::pending::<Result<Vec<u8>, std::io::Error>>();
        let request = Request::post(UNWRAP)
            .body(Body::from_stream(never))
            .unwrap();
        let received = Memory::new(1).receive(request, Instant::now()).await;
        assert_eq!(received.unwrap_err().reason(), Reason::Deadline);
    }
}
