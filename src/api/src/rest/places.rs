//! The places for REST requests that wait for their next attempt. A waiting request occupies a connection and the memory of its
//! body, so the number of places limits the waiting requests, in total and for each principal.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use keybroker_core::counts::Counts;

/// Divisor: one principal may take at most the number of all places divided by this number.
const PRINCIPAL_DIVISOR: usize = 16;
/// Every principal may take at least this number of places, because a user may have several
/// devices.
const PRINCIPAL_MIN: usize = 4;

/// The places for waiting requests. All clones share the same places.
#[derive(Clone, Debug)]
pub struct RetryPlaces(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    places: usize,
    of_each_principal: usize,
    taken: Mutex<Taken>,
}

#[derive(Debug, Default)]
struct Taken {
    total: usize,
    /// The number of taken places of each principal, by the principal's name.
    by_principal: Counts<String>,
}

impl RetryPlaces {
    /// Creates `places` places. With 0 places, no request waits.
    pub fn new(places: usize) -> Self {
        Self(Arc::new(Shared {
            places,
            of_each_principal: places.div_ceil(PRINCIPAL_DIVISOR).max(PRINCIPAL_MIN),
            taken: Mutex::default(),
        }))
    }

    /// Takes a place. Returns `None` if no place is free or if the principal already has its
    /// maximum number of places.
    pub(super) fn take(&self, principal: &str) -> Option<RetryPlace> {
        let mut taken = self.taken();
        let principal = principal.to_owned();
        let max = self.0.of_each_principal;
        if taken.total >= self.0.places || !taken.by_principal.take(principal.clone(), max) {
            return None;
        }
        taken.total += 1;
        Some(RetryPlace {
            places: self.clone(),
            principal,
        })
    }

    fn taken(&self) -> MutexGuard<'_, Taken> {
        self.0.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A taken place. When this value is dropped, the place is free again.
#[derive(Debug)]
pub(super) struct RetryPlace {
    places: RetryPlaces,
    principal: String,
}

impl Drop for RetryPlace {
    fn drop(&mut self) {
        let mut taken = self.places.taken();
        taken.total -= 1;
        taken.by_principal.give_back(&self.principal);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_principal_cannot_take_the_places_of_the_others() {
        let places = RetryPlaces::new(96);
        let alice: Vec<RetryPlace> = (0..6).map(|_| places.take("alice").unwrap()).collect();
        assert!(places.take("alice").is_none());
        assert!(places.take("bob").is_some());
        drop(alice);
        assert!(places.take("alice").is_some());
    }

    #[test]
    fn the_total_is_limited_and_places_return() {
        let places = RetryPlaces::new(2);
        let held = [places.take("alice").unwrap(), places.take("bob").unwrap()];
        assert!(places.take("carol").is_none());
        drop(held);
        assert!(places.take("carol").is_some());
        assert!(places.taken().by_principal.is_empty());
    }

    #[test]
    fn a_member_with_several_devices_waits_with_each() {
        let places = RetryPlaces::new(8);
        let held: Vec<RetryPlace> = (0..4).map(|_| places.take("alice").unwrap()).collect();
        assert!(places.take("alice").is_none());
        assert!(places.take("bob").is_some());
        drop(held);
    }

    #[test]
    fn without_places_nobody_waits() {
        assert!(RetryPlaces::new(0).take("alice").is_none());
        assert!(RetryPlaces::new(1).take("alice").is_some());
    }
}
