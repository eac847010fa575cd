//! A trial is the verification of a secret with Argon2id. This module decides which trial may run
//! next. A trial deliberately needs much memory and time. Therefore only a few trials run
//! concurrently, and the other trials wait.
//!
//! Three lanes are served in this order: secrets that this broker accepted before, secrets of
//! existing API clients, and secrets for unknown ids. In the second lane, the API clients take
//! turns, so that guesses at the secret of one API client delay only this API client. Each lane is
//! bounded, and a trial that finds its lane full is refused immediately.

use std::{
    collections::{HashMap, VecDeque},
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::sync::oneshot;

use keybroker_core::key::ClientId;

/// Largest number of waiting trials in each of two lanes: accepted secrets and unknown ids.
const WAITING_MAX: usize = 64;
/// Largest number of waiting trials for existing clients.
const KNOWN_WAITING_MAX: usize = 1_024;
/// Largest number of concurrent trials of one API client's secrets. A trial counts towards this
/// limit from the look-up of the API client until the answer.
const CLIENT_MAX: usize = 16;
/// Largest number of concurrent look-ups of API clients for secrets that were not accepted before.
const LOOKUPS_MAX: usize = 256;

/// The lane in which a trial waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lane {
    /// This broker accepted the secret before, but the stored hash of the secret has changed since then.
    Proven,
    /// The client exists.
    Known(ClientId),
    /// The API client does not exist, or has no valid secret.
    Unknown,
}

/// The number of free turns, and the trials that wait for a turn.
#[derive(Clone)]
pub(super) struct Turns(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    free: usize,
    lookups: usize,
    proven: VecDeque<Waiting>,
    known: HashMap<ClientId, VecDeque<Waiting>>,
    /// The API clients in `known`, in the order of their turns.
    order: VecDeque<ClientId>,
    unknown: VecDeque<Waiting>,
    /// For each API client, the number of trials between look-up and answer.
    places: HashMap<ClientId, usize>,
}

type Waiting = oneshot::Sender<Turn>;

/// The turn of one trial, which may run until this value is dropped. Then the next waiting trial
/// gets its turn.
pub(super) struct Turn(Option<Turns>);

/// A place for one of the concurrent trials of an API client's secrets. When this value is dropped,
/// the place is free again.
pub(super) struct Place {
    turns: Turns,
    client: ClientId,
}

/// The permission for one look-up of an API client. When this value is dropped, another look-up may
/// begin.
pub(super) struct Lookup(Turns);

impl fmt::Debug for Turns {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Turns").finish_non_exhaustive()
    }
}

impl Turns {
    /// Allows `count` concurrent trials.
    pub(super) fn new(count: usize) -> Self {
        Self(Arc::new(Mutex::new(State {
            free: count,
            ..State::default()
        })))
    }

    /// Takes a place for a trial of one of the secrets of `client`. Returns `None` if all places
    /// are taken.
    pub(super) fn place(&self, client: ClientId) -> Option<Place> {
        let mut state = self.state();
        let taken = state.places.entry(client).or_default();
        if *taken >= CLIENT_MAX {
            return None;
        }
        *taken += 1;
        drop(state);
        Some(Place {
            turns: self.clone(),
            client,
        })
    }

    /// Returns a permission to look up an API client, or `None` if too many look-ups are running.
    pub(super) fn lookup(&self) -> Option<Lookup> {
        let mut state = self.state();
        if state.lookups >= LOOKUPS_MAX {
            return None;
        }
        state.lookups += 1;
        drop(state);
        Some(Lookup(self.clone()))
    }

    /// Waits for a turn. Returns `None` if the lane is full, or if the wait takes longer than `limit`.
    pub(super) async fn wait(&self, lane: Lane, limit: Duration) -> Option<Turn> {
        let waiting = {
            let mut state = self.state();
            if state.free > 0 {
                state.free -= 1;
                return Some(Turn(Some(self.clone())));
            }
            let (sender, waiting) = oneshot::channel();
            if !state.enqueue(lane, sender) {
                return None;
            }
            waiting
        };
        let turn = tokio::time::timeout(limit, waiting).await;
        turn.ok()?.ok()
    }

    fn pass_on(&self) {
        loop {
            let mut state = self.state();
            let Some(next) = state.next() else {
                state.free += 1;
                return;
            };
            drop(state);
            match next.send(Turn(Some(self.clone()))) {
                Ok(()) => return,
                // The caller of this trial has stopped waiting. The inner value is taken out of the
                // `Turn`, because dropping the `Turn` would start a second trial.
                Err(mut turn) => drop(turn.0.take()),
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[cfg(test)]
    pub(super) fn free(&self) -> usize {
        self.state().free
    }

    #[cfg(test)]
    pub(super) fn waiting(&self) -> usize {
        self.waiting_by_lane().into_iter().sum()
    }

    /// The numbers of waiting trials in the lanes of accepted secrets, existing clients and unknown ids.
    #[cfg(test)]
    pub(super) fn waiting_by_lane(&self) -> [usize; 3] {
        let state = self.state();
        let known = state.known.values().map(VecDeque::len).sum();
        [state.proven.len(), known, state.unknown.len()]
    }
}

impl State {
    fn enqueue(&mut self, lane: Lane, waiting: Waiting) -> bool {
        match lane {
            Lane::Proven => push(&mut self.proven, waiting),
            Lane::Unknown => push(&mut self.unknown, waiting),
            Lane::Known(client) => {
                let all: usize = self.known.values().map(VecDeque::len).sum();
                if all >= KNOWN_WAITING_MAX {
                    return false;
                }
                let queue = self.known.entry(client).or_default();
                if queue.is_empty() {
                    self.order.push_back(client);
                }
                push(queue, waiting)
            }
        }
    }

    fn next(&mut self) -> Option<Waiting> {
        let next = self.proven.pop_front().or_else(|| self.next_known());
        next.or_else(|| self.unknown.pop_front())
    }

    /// Returns a trial of the API client that is first in the order, and moves this API client to
    /// the end of the order.
    fn next_known(&mut self) -> Option<Waiting> {
        let client = self.order.pop_front()?;
        let queue = self.known.get_mut(&client)?;
        let next = queue.pop_front();
        if queue.is_empty() {
            self.known.remove(&client);
        } else {
            self.order.push_back(client);
        }
        next
    }
}

/// Adds a trial to its lane if the lane is not full. If the queue is full, trials whose callers
/// have stopped waiting are removed first.
fn push(queue: &mut VecDeque<Waiting>, waiting: Waiting) -> bool {
    if queue.len() >= WAITING_MAX {
        queue.retain(|waiting| !waiting.is_closed());
    }
    let has_room = queue.len() < WAITING_MAX;
    if has_room {
        queue.push_back(waiting);
    }
    has_room
}

impl Drop for Turn {
    fn drop(&mut self) {
        if let Some(turns) = self.0.take() {
            turns.pass_on();
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut state = self.turns.state();
        if let Some(taken) = state.places.get_mut(&self.client) {
            *taken = taken.saturating_sub(1);
            if *taken == 0 {
                state.places.remove(&self.client);
            }
        }
    }
}

impl Drop for Lookup {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.lookups = state.lookups.saturating_sub(1);
    }
}

#[cfg(test)]
mod tests {
    use std::future::Future;

    use super::*;

    const LONG: Duration = Duration::from_mins(1);

    fn client(number: u8) -> ClientId {
        ClientId::from_hex(&format!("{number:02x}").repeat(16)).unwrap()
    }

    /// Polls once, so that the trial is in its queue.
    async fn queued<'a>(
        turns: &'a Turns,
        lane: Lane,
    ) -> std::pin::Pin<Box<dyn Future<Output = Option<Turn>> + 'a>> {
        let mut waiting = Box::pin(turns.wait(lane, LONG));
        tokio::select! {
            biased;
            turn = &mut waiting => panic!("ended at once, with a turn: {}", turn.is_some()),
            () = std::future::ready(()) => {}
        }
        waiting
    }

    #[tokio::test]
    async fn existing_clients_go_before_unknown_ids_and_take_turns_among_each_other() {
        let turns = Turns::new(1);
        let mut running = turns.wait(Lane::Unknown, LONG).await;
        let lanes = [
            Lane::Unknown,
            Lane::Known(client(1)),
            Lane::Known(client(1)),
            Lane::Known(client(1)),
            Lane::Known(client(2)),
            Lane::Proven,
        ];
        let mut waiting = Vec::new();
        for lane in lanes {
            waiting.push(queued(&turns, lane).await);
        }
        // The position of each trial in the preceding list.
        for expected in [5, 1, 4, 2, 3, 0] {
            drop(running.take());
            running = waiting[expected].as_mut().await;
            assert!(running.is_some());
        }
        drop(running);
        assert_eq!((turns.free(), turns.waiting()), (1, 0));
    }

    #[tokio::test]
    async fn a_trial_that_gave_up_takes_no_turn_and_no_room() {
        let turns = Turns::new(1);
        let running = turns.wait(Lane::Unknown, LONG).await;
        for lane in [Lane::Unknown, Lane::Known(client(1)), Lane::Proven] {
            for _ in 0..WAITING_MAX {
                assert!(turns.wait(lane, Duration::ZERO).await.is_none());
            }
            drop(queued(&turns, lane).await);
        }
        drop(running);
        assert_eq!((turns.free(), turns.waiting()), (1, 0));
    }

    #[tokio::test]
    async fn each_lane_and_each_client_is_bounded() {
        let turns = Turns::new(0);
        let mut waiting = Vec::new();
        for _ in 0..WAITING_MAX {
            waiting.push(queued(&turns, Lane::Unknown).await);
        }
        assert!(turns.wait(Lane::Unknown, LONG).await.is_none());
        let places: Vec<_> = (0..CLIENT_MAX).map(|_| turns.place(client(1))).collect();
        assert!(places.iter().all(Option::is_some));
        assert!(turns.place(client(1)).is_none() && turns.place(client(2)).is_some());
        drop(places);
        assert!(turns.place(client(1)).is_some());
        assert!(turns.state().places.is_empty());
        let lookups: Vec<_> = (0..LOOKUPS_MAX).map(|_| turns.lookup()).collect();
        assert!(lookups.iter().all(Option::is_some) && turns.lookup().is_none());
        drop(lookups);
        assert!(turns.lookup().is_some());
    }
}
