//! Limits the number of connections in their handshake, and of connections to the status listener.
//! A new connection is never refused because of this limit. If the limit is reached, the oldest
//! waiting connection of the network with the most waiting connections is closed. Therefore, a
//! flood of silent connections from one network closes only connections of this network.
//!
//! Mitigation: M3 of `THREAT_MODEL.md`.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio_util::sync::CancellationToken;

/// The waiting connections, oldest first.
#[derive(Debug)]
pub(super) struct Waiting {
    max: usize,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    next: u64,
    all: BTreeMap<u64, (Option<IpAddr>, CancellationToken)>,
    by_network: HashMap<IpAddr, BTreeSet<u64>>,
}

impl Waiting {
    /// Creates a value that permits `max` waiting connections.
    pub(super) fn new(max: usize) -> Arc<Self> {
        Arc::new(Self {
            max: max.max(1),
            state: Mutex::default(),
        })
    }

    /// Adds a waiting connection, and closes another connection if there are too many. If `network`
    /// is `None`, the connection is not counted for any network.
    pub(super) fn enter(self: &Arc<Self>, network: Option<IpAddr>) -> Ticket {
        let mut state = self.lock();
        let is_full = state.all.len() >= self.max;
        let victim = is_full.then(|| state.oldest_of_the_largest()).flatten();
        if let Some(victim) = victim
            && let Some(closed) = state.remove(victim)
        {
            closed.cancel();
        }
        let id = state.next;
        state.next += 1;
        let closed = CancellationToken::new();
        state.all.insert(id, (network, closed.clone()));
        if let Some(network) = network {
            state.by_network.entry(network).or_default().insert(id);
        }
        drop(state);
        Ticket {
            waiting: Arc::clone(self),
            id,
            closed,
            made_room: victim.is_some(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Returns the oldest connection of the network with the most connections. If the network of
    /// every connection is unknown, returns the oldest of all connections.
    fn oldest_of_the_largest(&self) -> Option<u64> {
        let largest = self.by_network.values().max_by_key(|ids| ids.len());
        let of_network = largest.and_then(|ids| ids.first());
        of_network.or_else(|| self.all.keys().next()).copied()
    }

    fn remove(&mut self, id: u64) -> Option<CancellationToken> {
        let (network, closed) = self.all.remove(&id)?;
        if let Some(network) = network
            && let Some(ids) = self.by_network.get_mut(&network)
        {
            ids.remove(&id);
            if ids.is_empty() {
                self.by_network.remove(&network);
            }
        }
        Some(closed)
    }
}

/// One waiting connection. Dropping the ticket removes the connection from the waiting connections.
#[derive(Debug)]
pub(super) struct Ticket {
    waiting: Arc<Waiting>,
    id: u64,
    closed: CancellationToken,
    made_room: bool,
}

impl Ticket {
    /// Completes when this connection must be closed to make room for a newer connection.
    pub(super) async fn closed(&self) {
        self.closed.cancelled().await;
    }

    /// Whether an older connection was closed to make room for this connection.
    pub(super) fn made_room(&self) -> bool {
        self.made_room
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.waiting.lock().remove(self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn are_closed(tickets: &[Ticket]) -> Vec<bool> {
        let closed = tickets.iter().map(|ticket| ticket.closed.is_cancelled());
        closed.collect()
    }

    #[test]
    fn the_largest_network_gives_way_with_its_oldest() {
        let waiting = Waiting::new(4);
        let first = waiting.enter(Some(address("198.51.100.0")));
        let crowd: Vec<_> = (0..5)
            .map(|_| waiting.enter(Some(address("192.0.2.0"))))
            .collect();
        assert_eq!(are_closed(&crowd), [true, true, false, false, false]);
        assert!(crowd[3].made_room() && !crowd[2].made_room());
        let next = waiting.enter(Some(address("203.0.113.0")));
        assert!(!first.closed.is_cancelled() && !next.closed.is_cancelled());
        assert!(crowd[2].closed.is_cancelled());
        drop((first, crowd, next));
        let state = waiting.lock();
        assert!(state.all.is_empty() && state.by_network.is_empty());
    }

    #[test]
    fn without_networks_the_oldest_of_all_gives_way() {
        let waiting = Waiting::new(2);
        let all: Vec<_> = (0..3).map(|_| waiting.enter(None)).collect();
        assert_eq!(are_closed(&all), [true, false, false]);
        assert_eq!(waiting.lock().all.len(), 2);
    }
}
