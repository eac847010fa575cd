//! One call: its attempts, its deadline and its request id.

use std::{
    fmt,
    future::IntoFuture,
    pin::Pin,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use keybroker_core::call::RequestId;
use tokio::time::{sleep, timeout};
use tonic::{
    Request,
    metadata::{Ascii, MetadataValue},
    transport::Channel,
};
use uuid::Uuid;

use crate::{
    credential::Credential,
    error::{AttemptError, Classified, Error, ErrorKind, InvalidField},
    link::Link,
    retry::{Bucket, Retries, RetryPolicy, Verdict},
};

/// The boxed future that [`IntoFuture`] returns for [`Read`], [`Change`] and [`NonIdempotent`].
pub type CallFuture<'a, T> = Pin<Box<dyn Future<Output = Result<T, Error>> + Send + 'a>>;

/// The longest deadline. A longer deadline is shortened to this value, so that time arithmetic cannot overflow.
const DEADLINE_MAX: Duration = Duration::from_hours(24);

type AttemptFuture<'a, T> = Pin<Box<dyn Future<Output = Result<T, AttemptError>> + Send + 'a>>;
type Attempts<'a, T> = Box<dyn Fn(Attempt) -> AttemptFuture<'a, T> + Send + Sync + 'a>;

/// The state that a client and its clones share.
#[derive(Debug)]
pub(crate) struct Shared {
    link: Link,
    credential: Credential,
    deadline: Duration,
    retry: RetryPolicy,
    bucket: Mutex<Bucket>,
}

impl Shared {
    pub(crate) fn new(
        link: Link,
        credential: Credential,
        deadline: Duration,
        retry: RetryPolicy,
    ) -> Self {
        let bucket = Bucket::full(retry.budget, Instant::now());
        Self {
            link,
            credential,
            deadline,
            retry,
            bucket: Mutex::new(bucket),
        }
    }

    /// Returns the same settings with another connection and another retry budget.
    pub(crate) fn separate(&self) -> Self {
        Self::new(
            self.link.separate(),
            self.credential.clone(),
            self.deadline,
            self.retry,
        )
    }

    pub(crate) async fn connect(&self) -> Result<(), Error> {
        let connecting = timeout(self.deadline.min(DEADLINE_MAX), self.link.connect());
        let (kind, source) = match connecting.await {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(error)) => (ErrorKind::Connection, Some(error.into())),
            Err(_) => (ErrorKind::DeadlineExceeded, None),
        };
        Err(Error {
            kind,
            refusal: None,
            attempts: 1,
            request_id: None,
            outcome_unknown: false,
            detail: "",
            source,
        })
    }

    fn bucket(&self) -> MutexGuard<'_, Bucket> {
        // No panic can occur inside an operation of the bucket, so a poisoned lock still protects a consistent bucket.
        self.bucket.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The values that one attempt needs to send its message.
#[derive(Debug)]
pub(crate) struct Attempt {
    pub(crate) channel: Channel,
    pub(crate) request_id: String,
    authorization: Option<MetadataValue<Ascii>>,
    timeout: Duration,
}

impl Attempt {
    /// Adds the deadline and the credential to a message.
    pub(crate) fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.set_timeout(self.timeout);
        if let Some(authorization) = &self.authorization {
            let metadata = request.metadata_mut();
            metadata.insert("authorization", authorization.clone());
        }
        request
    }
}

/// Whether an attempt may be repeated after a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Safety {
    /// The call changes nothing, so it may be repeated.
    Read,
    /// The call is a change that carries this request id, so it may be repeated.
    Identified(RequestId),
    /// The call is a change without a request id. The broker cannot recognise a repetition, so the call is never
    /// repeated.
    Unidentified,
}

/// A call that has not been awaited yet.
struct Call<'a, T> {
    shared: &'a Shared,
    safety: Safety,
    deadline: Duration,
    attempts: Attempts<'a, T>,
}

impl<'a, T: Send + 'a> Call<'a, T> {
    fn new<F>(
        shared: &'a Shared,
        safety: Safety,
        attempts: impl Fn(Attempt) -> F + Send + Sync + 'a,
    ) -> Self
    where
        F: Future<Output = Result<T, AttemptError>> + Send + 'a,
    {
        Self {
            shared,
            safety,
            deadline: shared.deadline,
            attempts: Box::new(move |attempt| Box::pin(attempts(attempt))),
        }
    }

    async fn run(self) -> Result<T, Error> {
        let ends = Instant::now() + self.deadline.min(DEADLINE_MAX);
        let remaining = || ends.saturating_duration_since(Instant::now());
        let mut retries = Retries::new(self.shared.retry);
        let mut made = 0;
        let mut outcome_unknown = false;
        loop {
            let began = Instant::now();
            let result = timeout(remaining(), self.attempt(&mut made, remaining())).await;
            let error = match result.unwrap_or(Err(AttemptError::TimedOut)) {
                Ok(answer) => {
                    self.shared.link.answered();
                    self.shared.bucket().deposit();
                    return Ok(answer);
                }
                Err(error) => error,
            };
            let mut failed = Classified::of(error);
            if failed.refusal.is_some() {
                self.shared.link.answered();
            } else if failed.kind == ErrorKind::DeadlineExceeded && made > 0 {
                self.shared.link.timed_out(began);
            }
            // Once the answer to one attempt is lost, the outcome is unknown: a refusal of a later
            // attempt does not show whether the earlier attempt made the change.
            outcome_unknown |= failed.outcome_unknown && made > 0 && self.safety != Safety::Read;
            if self.safety == Safety::Unidentified {
                failed.verdict = Verdict::Permanent;
            }
            let pause = retries.after_failure(
                failed.verdict,
                remaining(),
                &mut self.shared.bucket(),
                Instant::now(),
                random(),
            );
            match pause {
                Some(pause) => sleep(pause).await,
                None => return Err(self.error(failed, made, outcome_unknown)),
            }
        }
    }

    async fn attempt(&self, made: &mut u32, timeout: Duration) -> Result<T, AttemptError> {
        let authorization = self.shared.credential.header().await;
        let attempt = Attempt {
            channel: self.shared.link.channel(),
            request_id: match self.safety {
                Safety::Identified(id) => id.to_string(),
                Safety::Read | Safety::Unidentified => String::new(),
            },
            authorization: authorization.map_err(AttemptError::Credential)?,
            timeout,
        };
        *made += 1;
        (self.attempts)(attempt).await
    }

    fn error(&self, failed: Classified, attempts: u32, outcome_unknown: bool) -> Error {
        Error {
            kind: failed.kind,
            refusal: failed.refusal,
            attempts,
            request_id: match self.safety {
                Safety::Identified(id) => Some(id),
                Safety::Read | Safety::Unidentified => None,
            },
            outcome_unknown,
            detail: failed.detail,
            source: failed.source,
        }
    }
}

/// A call that changes nothing. The call is made only when it is awaited. [`deadline`](Self::deadline) overrides the
/// client's deadline.
///
/// If the call releases a key, the broker writes an audit entry for each attempt that reaches the broker.
#[must_use = "the call is sent only when this future is awaited"]
pub struct Read<'a, T>(Call<'a, T>);

impl<'a, T: Send + 'a> Read<'a, T> {
    pub(crate) fn new<F>(
        shared: &'a Shared,
        attempts: impl Fn(Attempt) -> F + Send + Sync + 'a,
    ) -> Self
    where
        F: Future<Output = Result<T, AttemptError>> + Send + 'a,
    {
        Self(Call::new(shared, Safety::Read, attempts))
    }
}

/// A change with a request id, by which the broker recognises a repetition. The change is made only when it is awaited.
///
/// The library chooses a new request id unless you set one with [`request_id`](Self::request_id). All attempts of the
/// call carry the same request id. A program that must finish a change after a restart chooses the request id with
/// [`new_request_id`], and stores this id together with the planned change. After the restart, the program repeats the
/// call with the same request id and content within 24 hours.
#[must_use = "the call is sent only when this future is awaited"]
pub struct Change<'a, T>(Call<'a, T>);

impl<'a, T: Send + 'a> Change<'a, T> {
    pub(crate) fn new<F>(
        shared: &'a Shared,
        attempts: impl Fn(Attempt) -> F + Send + Sync + 'a,
    ) -> Self
    where
        F: Future<Output = Result<T, AttemptError>> + Send + 'a,
    {
        let safety = Safety::Identified(new_request_id());
        Self(Call::new(shared, safety, attempts))
    }

    /// Sets the request id. Use the same id to repeat a change, and never use one id for two changes.
    pub fn request_id(mut self, id: RequestId) -> Self {
        self.0.safety = Safety::Identified(id);
        self
    }
}

/// A change that has no request id in the protocol, so the broker would treat a repetition as another change. The
/// library makes only one attempt. After an error with [`outcome_unknown`](Error::outcome_unknown), find out whether
/// the change was made before you make the call again.
#[must_use = "the call is sent only when this future is awaited"]
pub struct NonIdempotent<'a, T>(Call<'a, T>);

impl<'a, T: Send + 'a> NonIdempotent<'a, T> {
    pub(crate) fn new<F>(
        shared: &'a Shared,
        attempts: impl Fn(Attempt) -> F + Send + Sync + 'a,
    ) -> Self
    where
        F: Future<Output = Result<T, AttemptError>> + Send + 'a,
    {
        Self(Call::new(shared, Safety::Unidentified, attempts))
    }
}

macro_rules! awaitable {
    ($($name:ident),*) => {$(
        impl<'a, T: Send + 'a> $name<'a, T> {
            /// Sets the time limit of the call, which starts when the call is awaited and includes all attempts and
            /// pauses.
            pub fn deadline(mut self, deadline: Duration) -> Self {
                self.0.deadline = deadline;
                self
            }
        }

        impl<'a, T: Send + 'a> IntoFuture for $name<'a, T> {
            type Output = Result<T, Error>;
            type IntoFuture = CallFuture<'a, T>;

            fn into_future(self) -> Self::IntoFuture {
                Box::pin(self.0.run())
            }
        }

        impl<T> fmt::Debug for $name<'_, T> {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.debug_struct(stringify!($name))
                    .field("safety", &self.0.safety)
                    .field("deadline", &self.0.deadline)
                    .finish_non_exhaustive()
            }
        }
    )*};
}
awaitable!(Read, Change, NonIdempotent);

/// Returns a random request id for one change.
pub fn new_request_id() -> RequestId {
    let text = Uuid::new_v4().to_string();
    let parsed = RequestId::parse(&text).ok().flatten();
    parsed.expect("a random UUID has its version bits set, so it is not nil")
}

/// Parses a request id, for example a request id that the program stored earlier.
///
/// # Errors
/// Returns an error if the text is not a UUID, or is the nil UUID.
pub fn parse_request_id(text: &str) -> Result<RequestId, InvalidField> {
    let parsed = RequestId::parse(text).ok().flatten();
    parsed.ok_or(InvalidField::REQUEST_ID)
}

/// Returns a uniformly distributed number.
fn random() -> u32 {
    // The first 32 bits of a version 4 UUID are random.
    Uuid::new_v4().as_fields().0
}
