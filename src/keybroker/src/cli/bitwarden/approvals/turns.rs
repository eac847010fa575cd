//! The order in which the service looks at requests. A look ends after some time, also if the server is slow, and the next look begins
//! with the requests that the last ones did not reach.

use std::collections::HashSet;

use keybroker_core::organization::Guid;

/// The requests that had a turn in this round.
#[derive(Debug, Default)]
pub(super) struct Turns(HashSet<Guid>);

impl Turns {
    /// Puts the requests that had no turn in this round first. After each request had a turn, a new round begins.
    pub(super) fn order<T>(&mut self, requests: &mut [T], id: impl Fn(&T) -> Guid) {
        let listed: HashSet<Guid> = requests.iter().map(&id).collect();
        self.0.retain(|one| listed.contains(one));
        if self.0.len() == listed.len() {
            self.0.clear();
        }
        requests.sort_by_key(|one| self.0.contains(&id(one)));
    }

    /// Records the turn of a request.
    pub(super) fn take(&mut self, request: Guid) {
        self.0.insert(request);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn id(number: u8) -> Guid {
        Guid::from_bytes([number; 16])
    }

    /// Each look reaches two requests.
    #[test]
    fn every_request_has_its_turn() {
        let mut turns = Turns::default();
        let mut look = |list: &[u8]| {
            let mut ordered: Vec<Guid> = list.iter().copied().map(id).collect();
            turns.order(&mut ordered, |one| *one);
            for one in ordered.iter().take(2) {
                turns.take(*one);
            }
            ordered
        };
        assert_eq!(look(&[1, 2, 3, 4, 5]), [1, 2, 3, 4, 5].map(id));
        assert_eq!(look(&[1, 2, 3, 4, 5]), [3, 4, 5, 1, 2].map(id));
        // Request 3 was decided, and request 6 is new.
        assert_eq!(look(&[6, 1, 2, 4, 5]), [6, 5, 1, 2, 4].map(id));
        assert_eq!(look(&[6, 1, 2, 4, 5]), [6, 1, 2, 4, 5].map(id));
        assert_eq!(look(&[]), []);
        assert_eq!(look(&[2, 1]), [2, 1].map(id));
    }
}
