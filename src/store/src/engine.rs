//! The store over any engine: what is the same wherever the rows are kept.
//!
//! Everything that touches a connection runs in a task of its own. A caller that goes away drops only its wait: the task
//! ends its statement or its transaction and gives the connection back as it found it. A connection that cannot be given
//! back like that, because something failed on the way, because it took too long or because the task itself died, is closed.
//! So none is ever lent out inside somebody else's transaction.

use std::{
    fmt,
    hash::{BuildHasher as _, Hasher as _, RandomState},
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::future::BoxFuture;
use sqlx::{Database, Pool, pool::PoolConnection};
use tokio_util::task::TaskTracker;

use super::{
    Error,
    session::{Session, Value},
    statements::{Statements, TableStatements},
};

mod calls;
mod clients;
mod probe;
mod tables;
mod uses;

/// A transaction that lost to another is tried so many times in all.
const ATTEMPTS_MAX: u32 = 8;
/// The wait before the second attempt; it doubles, and has a random part so that the losers do not meet again.
const BACKOFF: Duration = Duration::from_millis(4);

/// A query that failed later than this is not asked again.
const AT_ONCE: Duration = Duration::from_millis(250);

/// What differs between engines beside their SQL.
pub(super) trait Engine: fmt::Debug + Send + Sync + 'static {
    type Database: Database<Connection: Session>;

    const SQL: &'static Statements;
    const TABLES: &'static TableStatements;

    /// The connections for a purpose.
    fn pool(&self, purpose: Purpose) -> &Pool<Self::Database>;

    /// How long a call may have a connection: longer than the database's own limit on statements, for when the database does
    /// not answer at all.
    fn time_limit(&self) -> Duration;
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    Read,
    Write,
}

type Connection<E> = <<E as Engine>::Database as Database>::Connection;
type Row<E> = <Connection<E> as Session>::Row;

/// A store on one engine.
#[derive(Debug)]
pub(super) struct EngineStore<E> {
    engine: Arc<E>,
    probe: Arc<probe::Probe>,
    /// What is under way, which outlives its callers.
    tasks: TaskTracker,
}

impl<E: Engine> EngineStore<E> {
    pub(super) fn new(engine: E) -> Arc<Self> {
        Arc::new(Self {
            engine: Arc::new(engine),
            probe: Arc::default(),
            tasks: TaskTracker::new(),
        })
    }

    /// Runs work in a task of its own, to its end.
    async fn spawn<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T, Error>> + Send + 'static,
    ) -> Result<T, Error> {
        match self.tasks.spawn(work).await {
            Ok(result) => result,
            Err(panic) => Err(Error::Down(
                format!("a task of the store failed: {panic}").into(),
            )),
        }
    }

    /// Runs a query.
    async fn query(
        &self,
        statement: &'static str,
        values: Vec<Value>,
    ) -> Result<Vec<Row<E>>, Error> {
        self.probe.check(Purpose::Read)?;
        self.query_unprobed(statement, values).await
    }

    async fn query_unprobed(
        &self,
        statement: &'static str,
        values: Vec<Value>,
    ) -> Result<Vec<Row<E>>, Error> {
        let (engine, probe) = (Arc::clone(&self.engine), Arc::clone(&self.probe));
        self.spawn(async move {
            let begun = Instant::now();
            let lease = Lease::take(&*engine, Purpose::Read).await?;
            let rows = match lease.query(statement, values.clone()).await {
                // The connection may have died while it lay in the pool, and a query can be asked again. A dead one says so at
                // once: what took longer failed otherwise, and would only take as long again.
                Err(Error::Down(_)) if begun.elapsed() < AT_ONCE => {
                    let lease = Lease::take(&*engine, Purpose::Read).await?;
                    lease.query(statement, values).await
                }
                result => result,
            }?;
            probe.answered(Purpose::Read);
            Ok(rows)
        })
        .await
    }

    /// Runs one statement that changes rows, and says how many.
    async fn execute(&self, statement: &'static str, values: Vec<Value>) -> Result<u64, Error> {
        self.transaction(End::Commit, move |session, _| {
            let values = values.clone();
            Box::pin(async move { Ok(session.execute(statement, values).await?) })
        })
        .await
    }

    /// Runs a transaction to its end. Work that fails is rolled back. It may run more than once: when the database undid it
    /// in favour of another transaction, it is tried again, a bounded number of times.
    async fn transaction<T, W>(&self, end: End, work: W) -> Result<T, Error>
    where
        T: Send + 'static,
        W: Work<E, T>,
    {
        self.probe.check(Purpose::Write)?;
        self.transaction_unprobed(end, work).await
    }

    async fn transaction_unprobed<T, W>(&self, end: End, work: W) -> Result<T, Error>
    where
        T: Send + 'static,
        W: Work<E, T>,
    {
        let (engine, probe) = (Arc::clone(&self.engine), Arc::clone(&self.probe));
        self.spawn(async move {
            let begun = Instant::now();
            let mut attempt = 1;
            loop {
                let lease = Lease::take(&*engine, Purpose::Write).await?;
                let result = lease.transaction(end, &work).await;
                let Err(Error::Contended(what)) = &result else {
                    // Also when it was not what the caller wanted.
                    if !matches!(result, Err(Error::Down(_))) {
                        probe.answered(Purpose::Write);
                    }
                    return result;
                };
                if attempt == ATTEMPTS_MAX || begun.elapsed() > engine.time_limit() {
                    return result;
                }
                metrics::counter!("keybroker_store_retries_total").increment(1);
                tracing::debug!(attempt, %what, "a transaction is tried again");
                tokio::time::sleep(backoff(attempt)).await;
                attempt += 1;
            }
        })
        .await
    }
}

/// How a transaction ends when its work succeeded.
#[derive(Clone, Copy, Debug)]
enum End {
    Commit,
    /// For work that only wanted to know what it would do.
    Rollback,
}

/// What is done in a transaction.
trait Work<E: Engine, T>:
    for<'c> Fn(&'c mut Connection<E>, &'static Statements) -> BoxFuture<'c, Result<T, Error>>
    + Send
    + Sync
    + 'static
{
}

impl<E, T, W> Work<E, T> for W
where
    E: Engine,
    W: for<'c> Fn(&'c mut Connection<E>, &'static Statements) -> BoxFuture<'c, Result<T, Error>>
        + Send
        + Sync
        + 'static,
{
}

/// A connection from the pool. Closed when it is dropped, unless it was given back.
struct Lease<'e, E: Engine> {
    engine: &'e E,
    connection: Option<PoolConnection<E::Database>>,
}

impl<'e, E: Engine> Lease<'e, E> {
    async fn take(engine: &'e E, purpose: Purpose) -> Result<Self, Error> {
        let connection = engine.pool(purpose).acquire().await?;
        Ok(Self {
            engine,
            connection: Some(connection),
        })
    }

    fn session(&mut self) -> &mut Connection<E> {
        self.connection
            .as_mut()
            .expect("taken by `give_back` alone, which consumes the lease")
    }

    fn give_back(mut self) {
        drop(self.connection.take());
    }

    async fn query(
        mut self,
        statement: &'static str,
        values: Vec<Value>,
    ) -> Result<Vec<Row<E>>, Error> {
        let limit = self.engine.time_limit();
        let rows = tokio::time::timeout(limit, self.session().rows(statement, values)).await;
        let rows = rows.map_err(|_| no_answer(limit))??;
        self.give_back();
        Ok(rows)
    }

    async fn transaction<T>(mut self, end: End, work: &impl Work<E, T>) -> Result<T, Error> {
        let limit = self.engine.time_limit();
        let session = self.session();
        let run = async {
            session.control(E::SQL.begin).await?;
            let result = work(session, E::SQL).await;
            let last = match (&result, end) {
                (Ok(_), End::Commit) => "COMMIT",
                _ => "ROLLBACK",
            };
            let ended = session.control(last).await;
            Ok::<_, Error>((result, ended))
        };
        match tokio::time::timeout(limit, run).await {
            Ok(Ok((result, Ok(())))) => {
                self.give_back();
                result
            }
            // What was wrong first says more than the rollback that failed then.
            Ok(Ok((Err(error), Err(_))) | Err(error)) => Err(error),
            Ok(Ok((Ok(_), Err(error)))) => Err(error.into()),
            Err(_) => Err(no_answer(limit)),
        }
    }
}

impl<E: Engine> Drop for Lease<'_, E> {
    fn drop(&mut self) {
        if let Some(connection) = self.connection.take() {
            // The server rolls back what its client left open.
            drop(connection.detach());
        }
    }
}

fn no_answer(limit: Duration) -> Error {
    Error::Down(format!("no answer within {} ms", limit.as_millis()).into())
}

fn backoff(attempt: u32) -> Duration {
    let ceiling = BACKOFF * 2_u32.saturating_pow(attempt.min(6));
    // Hashers are seeded at random, and that is random enough here.
    let random = RandomState::new().build_hasher().finish();
    let share = u32::try_from(random % 1_024).unwrap_or(0);
    ceiling / 2 + ceiling / 2 * share / 1_024
}
