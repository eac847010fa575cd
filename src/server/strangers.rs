//! Places for connections on which nobody was recognised yet: a part of all, so that strangers never take every place, and no
//! more than a part of that for one network, so that one stranger does not take everybody's.
//!
//! Mitigation: M3 of `THREAT_MODEL.md`.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use crate::limits::network;

/// One network has so much of the places at most.
const NETWORK_DIVISOR: usize = 8;
/// But never fewer places than this.
const NETWORK_MIN: usize = 8;

/// The places.
#[derive(Debug)]
pub(super) struct Strangers {
    places: usize,
    per_network: usize,
    taken: Mutex<Taken>,
}

#[derive(Debug, Default)]
struct Taken {
    all: usize,
    /// No more networks than places.
    by_network: HashMap<IpAddr, usize>,
}

impl Strangers {
    pub(super) fn new(places: usize) -> Arc<Self> {
        Arc::new(Self {
            places,
            per_network: (places / NETWORK_DIVISOR).max(NETWORK_MIN).min(places),
            taken: Mutex::default(),
        })
    }

    /// A place for a peer, given back when it is dropped. A proxy speaks for many: where all come through one, only the whole
    /// counts.
    fn place(self: &Arc<Self>, peer: IpAddr, is_proxy: bool) -> Option<Place> {
        let network = (!is_proxy).then(|| network(peer));
        let mut taken = self.lock();
        if taken.all >= self.places {
            return None;
        }
        if let Some(network) = network {
            let count = taken.by_network.entry(network).or_default();
            if *count >= self.per_network {
                return None;
            }
            *count += 1;
        }
        taken.all += 1;
        Some(Place {
            strangers: Arc::clone(self),
            network,
        })
    }

    fn lock(&self) -> MutexGuard<'_, Taken> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Debug)]
struct Place {
    strangers: Arc<Strangers>,
    network: Option<IpAddr>,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.strangers.lock();
        taken.all -= 1;
        if let Some(network) = self.network
            && let Some(count) = taken.by_network.get_mut(&network)
        {
            *count -= 1;
            if *count == 0 {
                taken.by_network.remove(&network);
            }
        }
    }
}

/// Whether anybody on a connection was recognised. Until then it holds one of the places for strangers.
#[derive(Debug)]
pub(super) struct Acquaintance {
    place: Mutex<Option<Place>>,
    known: AtomicBool,
    /// Whether credentials of calls are looked at.
    is_heard: bool,
}

impl Acquaintance {
    /// Of a connection whose certificate names a principal.
    pub(super) fn known() -> Self {
        Self {
            place: Mutex::default(),
            known: AtomicBool::new(true),
            is_heard: true,
        }
    }

    /// Of any other, with a place if there is one.
    pub(super) fn stranger(strangers: &Arc<Strangers>, peer: IpAddr, is_proxy: bool) -> Self {
        Self {
            place: Mutex::new(strangers.place(peer, is_proxy)),
            known: AtomicBool::new(false),
            is_heard: true,
        }
    }

    /// The same, whose calls can bring no credential of their own.
    #[must_use]
    pub(super) fn unheard(self) -> Self {
        Self {
            is_heard: false,
            ..self
        }
    }

    /// Whether credentials of calls are looked at.
    pub(super) fn is_heard(&self) -> bool {
        self.is_heard
    }

    pub(super) fn is_known(&self) -> bool {
        self.known.load(Ordering::Relaxed)
    }

    /// Whether the connection may go on.
    pub(super) fn has_place(&self) -> bool {
        self.is_known() || self.lock().is_some()
    }

    /// Somebody was recognised: the place is for the next stranger.
    pub(super) fn introduce(&self) {
        if !self.known.swap(true, Ordering::Relaxed) {
            drop(self.lock().take());
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Place>> {
        self.place.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_network_takes_a_part_and_gives_it_back() {
        let strangers = Strangers::new(100);
        let [one, neighbour, other] =
            ["2001:db8::1", "2001:db8::2", "192.0.2.1"].map(|text| text.parse().unwrap());
        let mut held: Vec<_> = (0..12)
            .map(|number| {
                let peer = if number % 2 == 0 { one } else { neighbour };
                Acquaintance::stranger(&strangers, peer, false)
            })
            .collect();
        assert!(held.iter().all(Acquaintance::has_place));
        assert!(!Acquaintance::stranger(&strangers, one, false).has_place());
        assert!(Acquaintance::stranger(&strangers, other, false).has_place());
        // Whoever is introduced makes room, and so does whoever leaves.
        held[0].introduce();
        held[0].introduce();
        let next = Acquaintance::stranger(&strangers, neighbour, false);
        assert!(next.has_place() && held[0].has_place());
        assert!(!Acquaintance::stranger(&strangers, one, false).has_place());
        held.clear();
        drop(next);
        assert_eq!(strangers.lock().all, 0);
        assert!(strangers.lock().by_network.is_empty());
    }

    #[test]
    fn behind_a_proxy_only_the_whole_counts() {
        let strangers = Strangers::new(20);
        let proxy = "127.0.0.1".parse().unwrap();
        let held: Vec<_> = (0..20)
            .map(|_| Acquaintance::stranger(&strangers, proxy, true))
            .collect();
        assert!(held.iter().all(Acquaintance::has_place));
        assert!(!Acquaintance::stranger(&strangers, proxy, true).has_place());
    }
}
