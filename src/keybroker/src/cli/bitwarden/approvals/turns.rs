//! The order in which the service decides about requests. A pass ends after a limited time, also if the server is slow, and the next
//! pass begins with the requests that the last ones did not reach.

use std::collections::HashSet;

use aws_lc_rs::rand;

use crate::cli::exit::{Exit, Failure};
use keybroker_core::organization::Guid;

/// The order of the requests, and those that had a turn in this round.
#[derive(Debug, Default)]
pub(super) struct Turns {
    taken: HashSet<Guid>,
    /// The place in the list at which each pass begins, modulo the length of the list.
    place: usize,
}

impl Turns {
    /// Begins at a random place. A process that makes only one pass does not know which requests the last pass did not
    /// reach, and would otherwise always begin with the same ones.
    pub(super) fn at_random_place() -> Result<Self, Failure> {
        let mut bytes = [0; size_of::<usize>()];
        rand::fill(&mut bytes)
            .map_err(|_| Failure::new(Exit::Internal, "the random generator failed"))?;
        Ok(Self {
            place: usize::from_ne_bytes(bytes),
            ..Self::default()
        })
    }

    /// Puts the requests that had no turn in this round first. After each request had a turn, a new round begins.
    pub(super) fn order<T>(&mut self, requests: &mut [T], id: impl Fn(&T) -> Guid) {
        let listed: HashSet<Guid> = requests.iter().map(&id).collect();
        self.taken.retain(|one| listed.contains(one));
        if self.taken.len() == listed.len() {
            self.taken.clear();
        }
        let places = requests.len().max(1);
        requests.rotate_left(self.place % places);
        requests.sort_by_key(|one| self.taken.contains(&id(one)));
    }

    /// Records the turn of a request.
    pub(super) fn take(&mut self, request: Guid) {
        self.taken.insert(request);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn id(number: u8) -> Guid {
        Guid::from_bytes([number; 16])
    }

    /// Each pass reaches two requests.
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

    #[test]
    fn a_pass_can_begin_at_every_place() {
        for (place, expected) in [
            (0, [1, 2, 3]),
            (1, [2, 3, 1]),
            (2, [3, 1, 2]),
            (3, [1, 2, 3]),
        ] {
            let mut turns = Turns {
                place,
                ..Turns::default()
            };
            let mut requests = [1, 2, 3].map(id);
            turns.order(&mut requests, |one| *one);
            assert_eq!(requests, expected.map(id), "place {place}");
        }
        let mut turns = Turns::at_random_place().unwrap();
        turns.order(&mut [], |one: &Guid| *one);
    }
}
