//! Connections that the store keeps between two uses, instead of returning them to the driver's pool.
//!
//! The pool tests each connection that returns: one more round trip to a server, or one more switch to the thread of an SQLite
//! connection and back, for each call. It does not know in which state the connection was left. A [`Lease`](super::Lease) knows:
//! it gives back only a connection whose last statement or transaction ended completely. The pool still opens and closes the
//! connections, and each one regularly returns to it, so that the pool's limits on the age and the idle time apply.

use std::{
    ops::{Deref, DerefMut},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use sqlx::{Connection as _, Database, Pool, pool::PoolConnection};
use tokio::sync::{Semaphore, SemaphorePermit};

use super::{Engine, Purpose, TEST_AFTER};

/// A connection returns to its pool when it was taken from there longer ago than this time, or was not used for this time.
const KEPT_FOR: Duration = Duration::from_secs(10);

/// The kept connections for each purpose. Purposes that share a pool share its connections.
#[derive(Debug)]
pub(super) struct Connections<D: Database> {
    reads: Arc<Kept<D>>,
    writes: Arc<Kept<D>>,
}

impl<D: Database> Connections<D> {
    pub(super) fn new(engine: &impl Engine<Database = D>) -> Self {
        let (reads, writes) = (engine.pool(Purpose::Read), engine.pool(Purpose::Write));
        let of_reads = Arc::new(Kept::new(reads));
        let of_writes = if std::ptr::eq(reads, writes) {
            Arc::clone(&of_reads)
        } else {
            Arc::new(Kept::new(writes))
        };
        Self {
            reads: of_reads,
            writes: of_writes,
        }
    }

    pub(super) fn of(&self, purpose: Purpose) -> &Kept<D> {
        match purpose {
            Purpose::Read => &self.reads,
            Purpose::Write => &self.writes,
        }
    }

    /// Returns all connections to their pools, and keeps none from now on.
    pub(super) fn close(&self) {
        self.reads.close();
        self.writes.close();
    }
}

/// The kept connections of one pool.
#[derive(Debug)]
pub(super) struct Kept<D: Database> {
    pool: Pool<D>,
    /// One place for each connection of the pool. A call that has a place takes a kept connection, or one from the pool if none is
    /// kept. So lent and kept connections together are never more than the pool may have.
    places: Semaphore,
    free: Mutex<Free<D>>,
}

#[derive(Debug)]
struct Free<D: Database> {
    /// The last element was used most recently.
    connections: Vec<Held<D>>,
    is_closed: bool,
}

impl<D: Database> Kept<D> {
    fn new(pool: &Pool<D>) -> Self {
        let all = pool.options().get_max_connections();
        Self {
            pool: pool.clone(),
            places: Semaphore::new(usize::try_from(all).unwrap_or(Semaphore::MAX_PERMITS)),
            free: Mutex::new(Free {
                connections: Vec::new(),
                is_closed: false,
            }),
        }
    }

    fn free(&self) -> MutexGuard<'_, Free<D>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a connection, with its place. Waits as long as the pool would.
    pub(super) async fn take(&self) -> Result<(Held<D>, SemaphorePermit<'_>), sqlx::Error> {
        let limit = self.pool.options().get_acquire_timeout();
        let taken = if let Ok(place) = self.places.try_acquire() {
            match self.pop() {
                Some(held) if held.is_recent() => return Ok((held, place)),
                held => tokio::time::timeout(limit, self.working(held))
                    .await
                    .map(|held| held.map(|held| (held, place))),
            }
        } else {
            let waited = async {
                let place = self.places.acquire().await;
                let place = place.map_err(|_| sqlx::Error::PoolClosed)?;
                Ok((self.working(self.pop()).await?, place))
            };
            tokio::time::timeout(limit, waited).await
        };
        taken.unwrap_or(Err(sqlx::Error::PoolTimedOut))
    }

    /// A connection that works: this one, another kept one, or one from the pool.
    async fn working(&self, mut kept: Option<Held<D>>) -> Result<Held<D>, sqlx::Error> {
        while let Some(mut held) = kept {
            if held.is_recent() || held.ping().await.is_ok() {
                return Ok(held);
            }
            kept = self.pop();
        }
        self.pool.acquire().await.map(Held::new)
    }

    fn pop(&self) -> Option<Held<D>> {
        self.free().connections.pop()
    }

    /// Gives back a connection that is in its initial state.
    pub(super) fn give_back(&self, mut held: Held<D>) {
        let now = Instant::now();
        held.used = now;
        let mut free = self.free();
        let unused = free.connections.first();
        let unused = unused
            .is_some_and(|held| now.duration_since(held.used) > KEPT_FOR)
            .then(|| free.connections.remove(0));
        let returning = if free.is_closed || now.duration_since(held.taken) > KEPT_FOR {
            Some(held)
        } else {
            free.connections.push(held);
            None
        };
        drop(free);
        for held in unused.into_iter().chain(returning) {
            held.return_to_pool();
        }
    }

    fn close(&self) {
        let mut free = self.free();
        free.is_closed = true;
        let all = std::mem::take(&mut free.connections);
        drop(free);
        for held in all {
            held.return_to_pool();
        }
    }
}

/// A connection. It is closed when it is dropped, because it may be in any state.
#[derive(Debug)]
pub(super) struct Held<D: Database> {
    connection: Option<PoolConnection<D>>,
    /// When it was taken from the pool.
    taken: Instant,
    /// When it was last given back.
    used: Instant,
}

const TAKEN: &str = "taken only by functions that consume the connection";

impl<D: Database> Held<D> {
    fn new(connection: PoolConnection<D>) -> Self {
        let now = Instant::now();
        Self {
            connection: Some(connection),
            taken: now,
            used: now,
        }
    }

    fn is_recent(&self) -> bool {
        self.used.elapsed() < TEST_AFTER
    }

    fn return_to_pool(mut self) {
        drop(self.connection.take());
    }
}

impl<D: Database> Deref for Held<D> {
    type Target = D::Connection;

    fn deref(&self) -> &D::Connection {
        self.connection.as_ref().expect(TAKEN)
    }
}

impl<D: Database> DerefMut for Held<D> {
    fn deref_mut(&mut self) -> &mut D::Connection {
        self.connection.as_mut().expect(TAKEN)
    }
}

impl<D: Database> Drop for Held<D> {
    fn drop(&mut self) {
        if let Some(connection) = self.connection.take() {
            // The server rolls back an open transaction when its client disconnects.
            drop(connection.detach());
        }
    }
}

#[cfg(test)]
mod tests {
    use sqlx::{Sqlite, sqlite::SqlitePoolOptions};
    use tokio::{sync::mpsc, task::JoinSet};

    use super::*;

    /// The connections of a pool that reports each connection that returns to it.
    fn kept(all: u32) -> (Arc<Kept<Sqlite>>, mpsc::UnboundedReceiver<()>) {
        let (returned, returns) = mpsc::unbounded_channel();
        let pool = SqlitePoolOptions::new()
            .max_connections(all)
            .acquire_timeout(Duration::from_mins(1))
            .after_release(move |_, _| {
                returned.send(()).unwrap();
                Box::pin(async { Ok(true) })
            })
            .connect_lazy("sqlite::memory:")
            .unwrap();
        (Arc::new(Kept::new(&pool)), returns)
    }

    fn long_ago() -> Instant {
        Instant::now().checked_sub(KEPT_FOR * 2).unwrap()
    }

    #[tokio::test]
    async fn a_connection_is_used_again_without_a_return_to_the_pool() {
        let (kept, mut returns) = kept(2);
        for _ in 0..100 {
            let (mut held, _place) = kept.take().await.unwrap();
            held.ping().await.unwrap();
            kept.give_back(held);
        }
        assert_eq!(kept.pool.size(), 1);
        assert!(returns.try_recv().is_err());
    }

    #[tokio::test]
    async fn connections_return_to_the_pool_by_age_by_idle_time_and_at_the_end() {
        let (kept, mut returns) = kept(3);
        let (mut old, place) = kept.take().await.unwrap();
        old.taken = long_ago();
        kept.give_back(old);
        drop(place);
        returns.recv().await.unwrap();

        let (mut unused, unused_place) = kept.take().await.unwrap();
        let (used, used_place) = kept.take().await.unwrap();
        unused.used = long_ago();
        kept.free().connections.push(unused);
        drop(unused_place);
        assert!(returns.try_recv().is_err());
        kept.give_back(used);
        drop(used_place);
        returns.recv().await.unwrap();
        assert_eq!(kept.free().connections.len(), 1);

        // The pool waits for every connection.
        kept.close();
        kept.pool.close().await;
        assert_eq!(kept.pool.size(), 0);
        assert!(matches!(kept.take().await, Err(sqlx::Error::PoolClosed)));
    }

    #[tokio::test]
    async fn a_connection_in_an_unknown_state_is_closed() {
        let (kept, mut returns) = kept(1);
        let (held, place) = kept.take().await.unwrap();
        drop((held, place));
        assert_eq!(kept.pool.size(), 0);
        assert!(returns.try_recv().is_err());
        drop(kept.take().await.unwrap());
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn lent_and_kept_connections_are_never_more_than_the_pool_has() {
        const ALL: u32 = 3;
        let (kept, _returns) = kept(ALL);
        let mut calls = JoinSet::new();
        for number in 0..300_u32 {
            let kept = Arc::clone(&kept);
            let call = calls.spawn(async move {
                let (mut held, _place) = kept.take().await.unwrap();
                assert!(kept.pool.size() <= ALL);
                held.ping().await.unwrap();
                match number % 7 {
                    // The connection is closed.
                    0 => {}
                    // It returns to the pool.
                    1 => {
                        held.taken = long_ago();
                        kept.give_back(held);
                    }
                    _ => kept.give_back(held),
                }
            });
            // Some callers end their calls.
            if number % 11 == 0 {
                call.abort();
            }
        }
        while let Some(ended) = calls.join_next().await {
            assert!(ended.is_ok() || ended.is_err_and(|error| error.is_cancelled()));
        }
        assert_eq!(kept.places.available_permits(), 3);
        assert!(kept.free().connections.len() <= 3);
    }
}
