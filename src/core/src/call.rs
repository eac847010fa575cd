//! The properties of a call to the broker, such as its id and its deadline, and the type for points in time.

use std::{
    fmt,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::error::{Error, Reason};

pub mod abandoned;
pub mod caller;
pub mod in_progress;
pub mod outside_time;

/// Returns a random duration between `least` and `least + width`, so that callers that were refused at the same time
/// retry at different times.
pub fn spread(least: Duration, width: Duration) -> Duration {
    let mut bytes = [0; 2];
    // If the system returns no random bytes, all callers get the same duration, and the function does not fail.
    let share = match aws_lc_rs::rand::fill(&mut bytes) {
        Ok(()) => u32::from(u16::from_le_bytes(bytes)),
        Err(_) => 0,
    };
    least + width / u32::from(u16::MAX) * share
}

/// The id that the server gives to every call. The log, the audit log and errors contain the call id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CallId(Uuid);

impl CallId {
    /// Returns a new id: a UUID of version 7, so that ids sort by time.
    pub fn fresh() -> Self {
        Self(Uuid::now_v7())
    }

    /// Parses a call id in the text form that the audit log uses.
    pub fn parse(text: &str) -> Option<Self> {
        Uuid::try_parse(text).ok().map(Self)
    }

    /// The 16 bytes.
    pub fn as_bytes(&self) -> &[u8; 16] {
        self.0.as_bytes()
    }

    /// Reads a call id from 16 bytes.
    pub fn from_slice(bytes: &[u8]) -> Option<Self> {
        Uuid::from_slice(bytes).ok().map(Self)
    }
}

impl fmt::Display for CallId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// An id that the client chooses for a mutation. If the client sends the mutation again with this id, the mutation takes effect
/// only once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RequestId(Uuid);

impl RequestId {
    /// Parses the text form of a UUID. An empty string means that there is no request id.
    pub fn parse(text: &str) -> Result<Option<Self>, Error> {
        if text.is_empty() {
            return Ok(None);
        }
        match Uuid::try_parse(text) {
            Ok(uuid) if !uuid.is_nil() => Ok(Some(Self(uuid))),
            _ => Err(Error::violation(
                "request_id",
                "empty or a UUID that is not nil",
            )),
        }
    }

    /// Reads a request id from the 16 stored bytes.
    pub fn from_slice(bytes: &[u8]) -> Option<Self> {
        Uuid::from_slice(bytes).ok().map(Self)
    }

    /// The 16 bytes.
    pub fn as_bytes(&self) -> &[u8; 16] {
        self.0.as_bytes()
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The moment after which the caller no longer waits for the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deadline(Instant);

impl Deadline {
    /// Returns a deadline that is this duration from now.
    pub fn after(duration: Duration) -> Self {
        Self(Instant::now() + duration)
    }

    /// Returns a deadline at this instant.
    pub fn at(instant: Instant) -> Self {
        Self(instant)
    }

    /// The moment.
    pub fn instant(self) -> Instant {
        self.0
    }

    /// The time until the deadline; zero when the deadline has passed.
    pub fn remaining(self) -> Duration {
        self.0.saturating_duration_since(Instant::now())
    }

    /// Returns an error if the deadline has passed.
    pub fn check(self) -> Result<(), Error> {
        if self.remaining().is_zero() {
            Err(Error::new(Reason::Deadline, "deadline passed"))
        } else {
            Ok(())
        }
    }
}

/// The properties of a call that every operation of the broker needs.
#[derive(Clone, Debug)]
pub struct Call {
    /// The call id that the server created.
    pub id: CallId,
    /// The origin of the connection: `address:port`, or `local` for the command line.
    pub peer: String,
    /// When the call must be answered.
    pub deadline: Deadline,
}

impl Call {
    /// Creates a call with a new id.
    pub fn start(peer: impl Into<String>, deadline: Deadline) -> Self {
        Self {
            id: CallId::fresh(),
            peer: peer.into(),
            deadline,
        }
    }
}

/// UTC microseconds since 1970.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Timestamp(i64);

impl Timestamp {
    /// The time of the system clock. If the clock shows a time before 1970 or after the year 294246, the result is the nearer of
    /// these limits.
    pub fn now() -> Self {
        let since = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        Self(i64::try_from(since.as_micros()).unwrap_or(i64::MAX))
    }

    /// From microseconds since 1970.
    pub const fn from_micros(micros: i64) -> Self {
        Self(micros)
    }

    /// Microseconds since 1970.
    pub const fn micros(self) -> i64 {
        self.0
    }
}

impl fmt::Display for Timestamp {
    /// Writes the time in UTC with microseconds, in the format of RFC 3339.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let nanos = i128::from(self.0) * 1_000;
        let text = time::OffsetDateTime::from_unix_timestamp_nanos(nanos)
            .ok()
            .and_then(|at| {
                at.format(&time::format_description::well_known::Rfc3339)
                    .ok()
            });
        match text {
            Some(text) => f.write_str(&text),
            None => write!(f, "{} us", self.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_ids_are_uuids() {
        assert_eq!(RequestId::parse("").unwrap(), None);
        assert!(
            RequestId::parse("7d444840-9dc0-11d1-b245-5ffdce74fad2")
                .unwrap()
                .is_some()
        );
        for bad in ["x", "00000000-0000-0000-0000-000000000000", " "] {
            assert_eq!(RequestId::parse(bad).unwrap_err().reason(), Reason::Request);
        }
    }

    #[test]
    fn a_passed_deadline_is_an_error() {
        let past = Deadline::after(Duration::ZERO);
        assert_eq!(past.check().unwrap_err().reason(), Reason::Deadline);
        assert!(Deadline::after(Duration::from_mins(1)).check().is_ok());
    }
}
