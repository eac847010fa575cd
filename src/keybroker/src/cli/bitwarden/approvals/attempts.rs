//! The listed requests that the service does not try again. Otherwise, each pass would use the token for a request that
//! always fails, and take a slot for a request that stays in the list after its approval was sent.

use std::collections::{HashMap, HashSet};

use keybroker_core::organization::Guid;

/// The requests that were tried, until the server no longer lists them.
#[derive(Debug, Default)]
pub(super) struct Attempts(HashMap<Guid, Attempt>);

#[derive(Debug)]
struct Attempt {
    /// SHA-256 of the wrapped key that the token refused: the token may accept another key. Absent if the request used a
    /// slot, after which it is not tried with any key.
    refused: Option<[u8; 32]>,
    why: String,
}

impl Attempts {
    /// Returns the reason if a request is not tried again with the wrapped key that has this digest.
    pub(super) fn reason(&self, request: Guid, digest: &[u8; 32]) -> Option<String> {
        let attempt = self.0.get(&request)?;
        let is_same = attempt.refused.is_none_or(|refused| refused == *digest);
        is_same.then(|| attempt.why.clone())
    }

    /// Records that the token refused the wrapped key that has this digest.
    pub(super) fn refused(&mut self, request: Guid, digest: [u8; 32], why: &str) {
        self.record(request, Some(digest), why);
    }

    /// Records that a request used a slot, with what is known about its approval.
    pub(super) fn used(&mut self, request: Guid, why: &str) {
        self.record(request, None, why);
    }

    fn record(&mut self, request: Guid, refused: Option<[u8; 32]>, why: &str) {
        let why = why.to_owned();
        self.0.insert(request, Attempt { refused, why });
    }

    /// Forgets the requests that are no longer listed.
    pub(super) fn retain(&mut self, listed: &HashSet<Guid>) {
        self.0.retain(|request, _| listed.contains(request));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn id(number: u8) -> Guid {
        Guid::from_bytes([number; 16])
    }

    #[test]
    fn a_request_is_tried_again_with_another_key_only_if_the_token_refused() {
        let mut attempts = Attempts::default();
        attempts.refused(id(1), [1; 32], "refused");
        attempts.used(id(2), "unknown");
        for (request, digest, why) in [
            (1, 1, Some("refused")),
            (1, 2, None),
            (2, 1, Some("unknown")),
            (2, 2, Some("unknown")),
            (3, 1, None),
        ] {
            let reason = attempts.reason(id(request), &[digest; 32]);
            assert_eq!(reason.as_deref(), why, "request {request}, key {digest}");
        }
        attempts.used(id(2), "accepted");
        assert_eq!(
            attempts.reason(id(2), &[1; 32]).as_deref(),
            Some("accepted")
        );
        attempts.retain(&HashSet::from([id(1)]));
        assert!(attempts.reason(id(1), &[1; 32]).is_some());
        assert!(attempts.reason(id(2), &[1; 32]).is_none());
    }
}
