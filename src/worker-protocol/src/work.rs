//! A token job in the form that front and workers share.

use zeroize::Zeroize as _;

use crate::wire::{Request, request::Job};

/// A request. The request is overwritten when it is dropped, because the message of a MAC may
/// contain key material.
#[derive(Debug)]
pub struct Work(Request);

impl Work {
    /// Creates a job without number and deadline.
    pub fn new(job: Job) -> Self {
        Self(Request {
            id: 0,
            deadline_ns: 0,
            job: Some(job),
        })
    }

    /// Creates a job from a request that was received over the socket.
    pub fn from_wire(request: Request) -> Self {
        Self(request)
    }

    /// Sets the number and the deadline, and returns the request to be sent. No token call starts after the deadline.
    pub fn stamped(&mut self, id: u64, deadline_ns: u64) -> &Request {
        self.0.id = id;
        self.0.deadline_ns = deadline_ns;
        &self.0
    }

    /// The number that the front assigned to the job.
    pub fn id(&self) -> u64 {
        self.0.id
    }

    /// The deadline in `CLOCK_MONOTONIC` nanoseconds. No token call starts after the deadline.
    pub fn deadline_ns(&self) -> u64 {
        self.0.deadline_ns
    }

    /// The job; absent in a malformed request.
    pub fn job(&self) -> Option<&Job> {
        self.0.job.as_ref()
    }

    /// Number of session objects that a worker with sealed wrapping keys makes for the job at most: the unwrapped user key and
    /// the key of the recipient. The key for self-tests is imported only once.
    pub fn session_objects(&self) -> u64 {
        match &self.0.job {
            Some(Job::Release(_) | Job::Rewrap(_)) => 2,
            Some(Job::SelfTest(_)) => 1,
            _ => 0,
        }
    }

    /// Whether the job is a self-test of the worker instead of a caller's job.
    pub fn is_self_test(&self) -> bool {
        matches!(self.0.job, Some(Job::SelfTest(_)))
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        match &mut self.0.job {
            Some(Job::Mac(job)) => job.message.zeroize(),
            Some(Job::VerifyMac(job)) => job.message.zeroize(),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::{Mac, Reply, VerifyMac, reply::Outcome};

    /// Key material must not appear as bytes, as text or as a list of numbers.
    #[test]
    fn debug_shows_no_message_of_a_mac() {
        let message = b"material".to_vec();
        let mac = Work::new(Job::Mac(Mac {
            key_id: vec![1; 16],
            message: message.clone(),
        }));
        let verify = Work::new(Job::VerifyMac(VerifyMac {
            key_id: vec![1; 16],
            message: message.clone(),
            mac: vec![2; 32],
        }));
        let reply = Reply {
            outcome: Some(Outcome::Output(message.clone())),
            ..Reply::default()
        };
        for shown in [
            format!("{mac:?}"),
            format!("{verify:?}"),
            format!("{reply:?}"),
        ] {
            assert!(!shown.contains("material"), "{shown}");
            let numbers = format!("{message:?}");
            assert!(!shown.contains(numbers.trim_matches(['[', ']'])), "{shown}");
        }
    }
}
