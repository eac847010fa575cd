//! Connections that the store keeps between two uses, instead of returning them to the driver's pool.
//!
//! The driver's pool tests each returned connection, because the connection may be in any state.
//! For each call, the test costs a round trip to the server, or a switch to the thread of the
//! SQLite connection and back. The store does not need the test: a [`Lease`](super::Lease) gives
//! back a connection only if its last statement or transaction ended completely. The pool opens the
//! connections. The store applies the pool's limits on the lifetime and the idle time of a
//! connection.

use std::{
    collections::VecDeque,
    ops::{Deref, DerefMut},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use sqlx::{Connection as _, Database, Pool, pool::PoolConnection};
use tokio::{
    sync::{Semaphore, SemaphorePermit},
    time::timeout,
};

use super::{Engine, Purpose, TEST_AFTER};

/// The test of one connection may take this fraction (1/`TEST_PART`) of the time for which a caller
/// waits for a connection.
const TEST_PART: u32 = 4;

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

    /// Closes all kept connections. Connections that are given back later are closed, too.
    pub(super) fn close(&self) {
        self.reads.close();
        self.writes.close();
    }
}

/// The kept connections of one pool.
#[derive(Debug)]
pub(super) struct Kept<D: Database> {
    pool: Pool<D>,
    /// One permit for each connection of the pool. A call with a permit takes a kept connection or,
    /// if no connection is kept, opens a connection through the pool. Therefore the number of lent
    /// and kept connections never exceeds the limit of the pool.
    places: Semaphore,
    free: Mutex<Free<D>>,
}

#[derive(Debug)]
struct Free<D: Database> {
    /// The first element is the connection that has not been used for the longest time. This
    /// connection is taken first, so that every connection is used or tested before the server
    /// closes the connection.
    connections: VecDeque<Held<D>>,
    is_closed: bool,
}

impl<D: Database> Kept<D> {
    fn new(pool: &Pool<D>) -> Self {
        let all = pool.options().get_max_connections();
        Self {
            pool: pool.clone(),
            places: Semaphore::new(usize::try_from(all).unwrap_or(Semaphore::MAX_PERMITS)),
            free: Mutex::new(Free {
                connections: VecDeque::new(),
                is_closed: false,
            }),
        }
    }

    fn free(&self) -> MutexGuard<'_, Free<D>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a permit and a connection. Waits at most for the pool's `acquire_timeout`.
    pub(super) async fn take(&self) -> Result<(Held<D>, SemaphorePermit<'_>), sqlx::Error> {
        let limit = self.pool.options().get_acquire_timeout();
        let taken = if let Ok(place) = self.places.try_acquire() {
            match self.pop() {
                Some(held) if held.is_recent() => return Ok((held, place)),
                held => timeout(limit, self.working(held))
                    .await
                    .map(|held| held.map(|held| (held, place))),
            }
        } else {
            let waited = async {
                let place = self.places.acquire().await;
                let place = place.map_err(|_| sqlx::Error::PoolClosed)?;
                Ok((self.working(self.pop()).await?, place))
            };
            timeout(limit, waited).await
        };
        taken.unwrap_or(Err(sqlx::Error::PoolTimedOut))
    }

    /// Returns a connection that works: `kept`, another kept connection, or a connection from the
    /// pool.
    async fn working(&self, kept: Option<Held<D>>) -> Result<Held<D>, sqlx::Error> {
        let limit = self.pool.options().get_acquire_timeout() / TEST_PART;
        let mut next = kept;
        while let Some(mut held) = next {
            if held.is_recent() {
                return Ok(held);
            }
            match timeout(limit, held.ping()).await {
                Ok(Ok(())) => return Ok(held),
                Ok(Err(_)) => {}
                // If the network lost this connection without an error, the network has probably
                // lost the other connections, too. The caller has enough time for one unanswered
                // test, but not for many.
                Err(_) => self.drop_untested(),
            }
            next = self.pop();
        }
        self.pool.acquire().await.map(Held::new)
    }

    fn pop(&self) -> Option<Held<D>> {
        self.free().connections.pop_front()
    }

    /// Closes all kept connections that would be tested before their next use.
    fn drop_untested(&self) {
        let mut free = self.free();
        let all = std::mem::take(&mut free.connections);
        let (recent, untested) = all.into_iter().partition::<VecDeque<_>, _>(Held::is_recent);
        free.connections = recent;
        drop(free);
        drop(untested);
    }

    /// Gives back a connection that is in its initial state.
    pub(super) fn give_back(&self, mut held: Held<D>) {
        let options = self.pool.options();
        let is_beyond = |limit: Option<Duration>, since: Instant| {
            limit.is_some_and(|limit| since.elapsed() > limit)
        };
        held.used = Instant::now();
        let mut closing = Vec::new();
        let mut free = self.free();
        while let Some(oldest) = free.connections.front()
            && is_beyond(options.get_idle_timeout(), oldest.used)
        {
            closing.extend(free.connections.pop_front());
        }
        if free.is_closed || is_beyond(options.get_max_lifetime(), held.opened) {
            closing.push(held);
        } else {
            free.connections.push_back(held);
        }
        drop(free);
        closing.into_iter().for_each(Held::close);
    }

    fn close(&self) {
        let mut free = self.free();
        free.is_closed = true;
        let all = std::mem::take(&mut free.connections);
        drop(free);
        all.into_iter().for_each(Held::close);
    }
}

/// A connection that a caller uses and that may be in any state. Therefore dropping this value
/// closes the connection.
#[derive(Debug)]
pub(super) struct Held<D: Database> {
    connection: Option<PoolConnection<D>>,
    /// The time at which the pool opened the connection.
    opened: Instant,
    /// The time at which the connection was last given back.
    used: Instant,
}

const TAKEN: &str = "taken only by functions that consume the connection";

impl<D: Database> Held<D> {
    fn new(connection: PoolConnection<D>) -> Self {
        let now = Instant::now();
        Self {
            connection: Some(connection),
            opened: now,
            used: now,
        }
    }

    fn is_recent(&self) -> bool {
        self.used.elapsed() < TEST_AFTER
    }

    /// Closes a connection that is in its initial state, and notifies the server. The pool limits
    /// the time for closing.
    fn close(mut self) {
        if let Some(mut connection) = self.connection.take() {
            connection.close_on_drop();
        }
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
    use std::sync::atomic::{AtomicU32, Ordering};

    use sqlx::{Sqlite, sqlite::SqlitePoolOptions};
    use tokio::task::JoinSet;

    use super::*;

    const LIFETIME: Duration = Duration::from_mins(30);
    const IDLE: Duration = Duration::from_mins(5);

    /// The connections of a pool, and the number that the pool has opened.
    fn kept(all: u32) -> (Arc<Kept<Sqlite>>, Arc<AtomicU32>) {
        let opened = Arc::new(AtomicU32::new(0));
        let count = Arc::clone(&opened);
        let pool = SqlitePoolOptions::new()
            .max_connections(all)
            .acquire_timeout(Duration::from_mins(1))
            .max_lifetime(LIFETIME)
            .idle_timeout(IDLE)
            .after_release(|_, _| panic!("no connection returns to the pool"))
            .after_connect(move |_, _| {
                count.fetch_add(1, Ordering::Relaxed);
                Box::pin(async { Ok(()) })
            })
            .connect_lazy("sqlite::memory:")
            .unwrap();
        (Arc::new(Kept::new(&pool)), opened)
    }

    /// Counts a connection as lent, even if its call is cancelled.
    struct Lent {
        all: Arc<AtomicU32>,
        count: u32,
    }

    impl Lent {
        fn new(all: &Arc<AtomicU32>) -> Self {
            Self {
                all: Arc::clone(all),
                count: all.fetch_add(1, Ordering::SeqCst) + 1,
            }
        }
    }

    impl Drop for Lent {
        fn drop(&mut self) {
            self.all.fetch_sub(1, Ordering::SeqCst);
        }
    }

    fn ago(time: Duration) -> Instant {
        Instant::now().checked_sub(time).unwrap()
    }

    /// Waits until the pool has only this number of connections, because the pool closes
    /// connections in separate tasks.
    async fn until_size(kept: &Kept<Sqlite>, size: u32) {
        for _ in 0..3_000 {
            if kept.pool.size() == size {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("the pool has {} connections", kept.pool.size());
    }

    #[tokio::test]
    async fn a_connection_is_used_again_without_a_return_to_the_pool() {
        let (kept, opened) = kept(2);
        for _ in 0..100 {
            let (mut held, _place) = kept.take().await.unwrap();
            held.ping().await.unwrap();
            kept.give_back(held);
        }
        assert_eq!(opened.load(Ordering::Relaxed), 1);
    }

    /// A server closes connections that were not used for a long time. Therefore all connections
    /// are used in turn.
    #[tokio::test]
    async fn the_connection_that_was_not_used_for_the_longest_time_is_taken_first() {
        let (kept, _) = kept(3);
        let mut lent = Vec::new();
        for number in 0..3 {
            let (mut held, place) = kept.take().await.unwrap();
            let statement =
                sqlx::AssertSqlSafe(format!("CREATE TEMP TABLE it AS SELECT {number} AS number"));
            sqlx::raw_sql(statement).execute(&mut *held).await.unwrap();
            lent.push((held, place));
        }
        for (held, _place) in lent {
            kept.give_back(held);
        }
        for expected in [0, 1, 2, 0, 1, 2] {
            let (mut held, _place) = kept.take().await.unwrap();
            let number: i32 = sqlx::query_scalar("SELECT number FROM it")
                .fetch_one(&mut *held)
                .await
                .unwrap();
            assert_eq!(number, expected);
            kept.give_back(held);
        }
    }

    #[tokio::test]
    async fn connections_are_closed_by_age_by_idle_time_and_at_the_end() {
        let (kept, _) = kept(3);
        let (mut old, place) = kept.take().await.unwrap();
        old.opened = ago(LIFETIME * 2);
        kept.give_back(old);
        drop(place);
        until_size(&kept, 0).await;

        let (mut unused, unused_place) = kept.take().await.unwrap();
        let (used, used_place) = kept.take().await.unwrap();
        unused.used = ago(IDLE * 2);
        kept.free().connections.push_back(unused);
        drop(unused_place);
        kept.give_back(used);
        drop(used_place);
        until_size(&kept, 1).await;
        assert_eq!(kept.free().connections.len(), 1);

        kept.close();
        kept.pool.close().await;
        assert_eq!(kept.pool.size(), 0);
        assert!(matches!(kept.take().await, Err(sqlx::Error::PoolClosed)));
    }

    #[tokio::test]
    async fn a_connection_that_was_not_used_recently_is_tested() {
        let (kept, opened) = kept(2);
        let (held, place) = kept.take().await.unwrap();
        kept.give_back(held);
        drop(place);
        kept.free().connections[0].used = ago(TEST_AFTER * 2);
        let (held, _place) = kept.take().await.unwrap();
        assert!(!held.is_recent(), "the connection is the kept one");
        assert_eq!(opened.load(Ordering::Relaxed), 1);
    }

    #[tokio::test]
    async fn connections_that_would_be_tested_are_closed_and_the_others_stay() {
        let (kept, _) = kept(3);
        let mut lent = Vec::new();
        for _ in 0..3 {
            lent.push(kept.take().await.unwrap());
        }
        for (held, _place) in lent {
            kept.give_back(held);
        }
        for held in kept.free().connections.iter_mut().take(2) {
            held.used = ago(TEST_AFTER * 2);
        }
        kept.drop_untested();
        assert_eq!(kept.free().connections.len(), 1);
        until_size(&kept, 1).await;
    }

    #[tokio::test]
    async fn a_connection_in_an_unknown_state_is_closed() {
        let (kept, opened) = kept(1);
        let (held, place) = kept.take().await.unwrap();
        drop((held, place));
        assert_eq!(kept.pool.size(), 0);
        drop(kept.take().await.unwrap());
        assert_eq!(opened.load(Ordering::Relaxed), 2);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn lent_and_kept_connections_are_never_more_than_the_pool_has() {
        const ALL: u32 = 3;
        let (kept, _) = kept(ALL);
        let lent = Arc::new(AtomicU32::new(0));
        let mut calls = JoinSet::new();
        for number in 0..300_u32 {
            let (kept, lent) = (Arc::clone(&kept), Arc::clone(&lent));
            let call = calls.spawn(async move {
                let (mut held, _place) = kept.take().await.unwrap();
                let lent = Lent::new(&lent);
                assert!(lent.count <= ALL, "{} connections are lent", lent.count);
                held.ping().await.unwrap();
                match number % 7 {
                    // The connection is closed, because its state is unknown.
                    0 => {}
                    // The connection is closed, because it is too old.
                    1 => {
                        held.opened = ago(LIFETIME * 2);
                        kept.give_back(held);
                    }
                    _ => kept.give_back(held),
                }
            });
            // Some callers cancel their calls.
            if number % 11 == 0 {
                call.abort();
            }
        }
        while let Some(ended) = calls.join_next().await {
            assert!(ended.is_ok() || ended.is_err_and(|error| error.is_cancelled()));
        }
        assert_eq!(kept.places.available_permits(), 3);
        let free = kept.free().connections.len();
        assert!(free <= 3, "{free} connections are kept");
        until_size(&kept, u32::try_from(free).unwrap()).await;
    }
}
