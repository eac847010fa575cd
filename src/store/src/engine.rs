//! The parts of the store that are the same for all engines.
//!
//! Every use of a connection runs in a separate task. If the caller cancels its call, the task
//! still completes its statement or transaction and returns the connection in its initial state. If
//! a step failed, took too long or panicked, the connection is closed instead of returned.
//! Therefore a connection from the pool is never inside a transaction of an earlier call.

use std::{
    fmt,
    hash::{BuildHasher as _, Hasher as _, RandomState},
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::future::BoxFuture;
use sqlx::{Database, Pool};
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio_util::task::TaskTracker;

use tracing::Instrument as _;

use keybroker_core::{call::CallId, metrics};

use super::{
    Error,
    error::Detail,
    mutations,
    session::{Columns as _, Session, Value},
    slow::{self, Named as _},
    statements::Statements,
};

mod approval;
mod approval_use;
mod calls;
mod clients;
mod destruction;
mod device;
mod kept;
mod member_keys;
mod probe;
mod registry;
mod rewrap;
mod tables;
mod uses;

/// Highest number of attempts of a transaction that conflicts with others.
const ATTEMPTS_MAX: u32 = 8;
/// The wait before the second attempt. The wait doubles, and has a random part so that the same transactions do not conflict
/// again.
const BACKOFF: Duration = Duration::from_millis(4);

/// The time for which a call waits for a database that has just become unavailable, for example
/// because its server restarts. After this time, calls fail immediately until the outage ends.
const OUTAGE_WAITED_OUT: Duration = Duration::from_millis(2_500);
/// The time for which a call tries other connections while the database answers other calls.
/// Callers wait about five seconds for the store.
const RETRIED_FOR: Duration = Duration::from_millis(4_500);
/// The wait before a call tries another connection. The wait doubles up to [`RECONNECT_WAIT_MAX`].
const RECONNECT_WAIT: Duration = Duration::from_millis(5);
const RECONNECT_WAIT_MAX: Duration = Duration::from_millis(100);

/// A connection that was not used for longer than this time is tested before its next use, because the server may have been
/// restarted.
pub(super) const TEST_AFTER: Duration = Duration::from_secs(1);

/// The differences between engines in addition to their SQL.
pub(super) trait Engine: fmt::Debug + Send + Sync + 'static {
    type Database: Database<Connection: Session>;

    /// The SQL of this engine, built once.
    fn sql() -> &'static Statements;

    /// The pool of the connections for a purpose (reading or writing).
    fn pool(&self, purpose: Purpose) -> &Pool<Self::Database>;

    /// Longest time for which a call may use a connection. The limit is longer than the database's
    /// own limit on statements, and applies when the database does not answer at all.
    fn time_limit(&self) -> Duration;

    /// Limits the number of concurrent connections for a purpose (reading or writing), and the time
    /// for which a call waits for a connection.
    fn limit(&self, _purpose: Purpose) -> Option<(&Semaphore, Duration)> {
        None
    }

    /// Fails if the database is not the database that was opened. The function is called before
    /// each use of a connection, and between each commit and its acknowledgement. A read may use
    /// the result of a recent check.
    fn check_place(&self, _purpose: Purpose) -> Result<(), Error> {
        Ok(())
    }

    /// Fails if another user may listen on the socket of the server. The function is called before
    /// a connection is taken from the pool, because the pool may open a new connection.
    fn check_socket(&self) -> Result<(), Error> {
        Ok(())
    }

    /// Closes all connections.
    fn close(&self) -> impl Future<Output = ()> + Send {
        async {
            self.pool(Purpose::Read).close().await;
            self.pool(Purpose::Write).close().await;
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    Read,
    Write,
}

type Connection<E> = <<E as Engine>::Database as Database>::Connection;
type Row<E> = <Connection<E> as Session>::Row;

/// Lends connections.
#[derive(Debug)]
struct Lender<E: Engine> {
    engine: E,
    connections: kept::Connections<E::Database>,
    probe: probe::Probe,
}

/// A store on one engine.
#[derive(Debug)]
pub(super) struct EngineStore<E: Engine> {
    lender: Arc<Lender<E>>,
    /// The tasks in progress. A task can run longer than its caller waits.
    tasks: TaskTracker,
}

impl<E: Engine> EngineStore<E> {
    pub(super) fn new(engine: E) -> Arc<Self> {
        let mut names = Vec::new();
        E::sql().names_below("", &mut names);
        slow::learn(names);
        Arc::new(Self {
            lender: Arc::new(Lender {
                connections: kept::Connections::new(&engine),
                engine,
                probe: probe::Probe::default(),
            }),
            tasks: TaskTracker::new(),
        })
    }

    /// Runs work in a separate task until the work ends.
    async fn spawn<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T, Error>> + Send + 'static,
    ) -> Result<T, Error> {
        match self.tasks.spawn(work.in_current_span()).await {
            Ok(result) => result.map_err(Error::settled),
            Err(panic) => Err(Error::Down(Detail::caused(
                "a task of the store failed",
                panic,
            ))),
        }
    }

    /// Runs a query.
    async fn query(
        &self,
        statement: &'static str,
        values: Vec<Value>,
    ) -> Result<Vec<Row<E>>, Error> {
        self.lender.probe.check(Purpose::Read)?;
        self.query_unprobed(statement, values).await
    }

    async fn query_unprobed(
        &self,
        statement: &'static str,
        values: Vec<Value>,
    ) -> Result<Vec<Row<E>>, Error> {
        let lender = Arc::clone(&self.lender);
        self.spawn(async move {
            let mut retry = Retry::new(&lender.probe, Purpose::Read);
            loop {
                let result = match Lease::take(&lender, Purpose::Read).await {
                    Ok(lease) => lease.query(statement, values.clone()).await,
                    Err(error) => Err(error),
                };
                match result {
                    // A query changes nothing, so the query can be repeated.
                    Err(Error::Disconnected(what)) => retry.wait(what).await?,
                    result => {
                        if result.is_ok() {
                            lender.probe.answered(Purpose::Read);
                        }
                        return result;
                    }
                }
            }
        })
        .await
    }

    /// Runs a query that counts up to a limit.
    async fn count_up_to(&self, statement: &'static str, values: Vec<Value>) -> Result<u32, Error> {
        let found = self.query(statement, values).await?;
        let count = found.first().ok_or(Error::NotFound)?.integer("total")?;
        Ok(u32::try_from(count).unwrap_or(u32::MAX))
    }

    /// Runs one statement that changes rows, and returns the number of changed rows.
    async fn execute(&self, statement: &'static str, values: Vec<Value>) -> Result<u64, Error> {
        self.transaction(End::Commit, move |session, _| {
            let values = values.clone();
            Box::pin(async move { Ok(session.execute(statement, values).await?) })
        })
        .await
    }

    /// Runs a transaction until it ends. If the work fails, the transaction is rolled back. The
    /// work runs again if the database rolled it back in favour of another transaction, or if the
    /// connection was lost before the commit was sent.
    async fn transaction<T, W>(&self, end: End, work: W) -> Result<T, Error>
    where
        T: Send + 'static,
        W: Work<E, T>,
    {
        self.lender.probe.check(Purpose::Write)?;
        self.transaction_unprobed(end, work).await
    }

    async fn transaction_unprobed<T, W>(&self, end: End, work: W) -> Result<T, Error>
    where
        T: Send + 'static,
        W: Work<E, T>,
    {
        let lender = Arc::clone(&self.lender);
        self.spawn(async move {
            let mut retry = Retry::new(&lender.probe, Purpose::Write);
            let mut attempt = 1;
            loop {
                let result = match Lease::take(&lender, Purpose::Write).await {
                    Ok(lease) => lease.transaction(end, &work).await,
                    Err(error) => Err(Ended::Without(error)),
                };
                let what = match result {
                    Ok(value) => {
                        lender.probe.answered(Purpose::Write);
                        return Ok(value);
                    }
                    Err(Ended::Without(Error::Disconnected(what))) => {
                        retry.wait(what).await?;
                        continue;
                    }
                    Err(Ended::Unknown(error, value)) => {
                        let Some(call) = end.mark() else {
                            return Err(Error::OutcomeUnknown(Detail::of(error)));
                        };
                        if is_committed(&lender, &mut retry, call).await? {
                            lender.probe.answered(Purpose::Write);
                            return Ok(value);
                        }
                        // The change was not made, so the change can be repeated.
                        let Error::Disconnected(what) = error else {
                            return Err(error);
                        };
                        retry.wait(what).await?;
                        continue;
                    }
                    Err(Ended::Without(Error::Contended(what))) => what,
                    Err(Ended::Without(error)) => {
                        // The database answered the call, although with an error.
                        if !matches!(error, Error::Down(_) | Error::Busy(_)) {
                            lender.probe.answered(Purpose::Write);
                        }
                        return Err(error);
                    }
                };
                if attempt == ATTEMPTS_MAX || retry.begun.elapsed() > lender.engine.time_limit() {
                    return Err(Error::Contended(what));
                }
                metrics::STORE_RETRIES.increment();
                tracing::debug!(attempt, %what, "a transaction is tried again");
                tokio::time::sleep(backoff(attempt)).await;
                attempt += 1;
            }
        })
        .await
    }
}

/// Returns the closure unchanged. Without this function, the compiler cannot infer that a closure
/// in a variable implements [`Work`].
fn as_work<E, T, W>(work: W) -> W
where
    E: Engine,
    W: for<'c> Fn(&'c mut Connection<E>, &'static Statements) -> BoxFuture<'c, Result<T, Error>>,
{
    work
}

/// Uses another connection to find out whether a change was committed. The connection of the change was lost during the
/// commit.
async fn is_committed<E: Engine>(
    lender: &Lender<E>,
    retry: &mut Retry<'_>,
    call: CallId,
) -> Result<bool, Error> {
    let work = as_work::<E, bool, _>(move |session, sql| {
        Box::pin(mutations::is_committed(session, sql, call))
    });
    loop {
        let result = match Lease::take(lender, Purpose::Write).await {
            Ok(lease) => lease.transaction(End::Rollback, &work).await,
            Err(error) => Err(Ended::Without(error)),
        };
        // The change may have been made. Therefore every error here must be `OutcomeUnknown`,
        // because other errors state that the change was not made.
        match result {
            Ok(committed) => return Ok(committed),
            Err(Ended::Without(
                Error::Disconnected(what) | Error::Contended(what) | Error::Busy(what),
            )) => {
                let waited = retry.wait(what).await;
                waited.map_err(|error| Error::OutcomeUnknown(Detail::of(error)))?;
            }
            Err(Ended::Without(error) | Ended::Unknown(error, _)) => {
                return Err(Error::OutcomeUnknown(Detail::of(error)));
            }
        }
    }
}

/// Limits the time for which a call retries after lost connections.
struct Retry<'p> {
    probe: &'p probe::Probe,
    purpose: Purpose,
    begun: Instant,
    wait: Duration,
}

impl<'p> Retry<'p> {
    fn new(probe: &'p probe::Probe, purpose: Purpose) -> Self {
        Self {
            probe,
            purpose,
            begun: Instant::now(),
            wait: RECONNECT_WAIT,
        }
    }

    /// Waits before the next attempt, or fails if no further attempt is permitted.
    async fn wait(&mut self, what: Detail) -> Result<(), Error> {
        self.probe.lost(self.purpose);
        let has_time = self.begun.elapsed() + self.wait < RETRIED_FOR;
        if !has_time || self.probe.is_long_outage(self.purpose) {
            return Err(Error::Down(what));
        }
        metrics::STORE_RECONNECTS.increment();
        tokio::time::sleep(self.wait).await;
        self.wait = (self.wait * 2).min(RECONNECT_WAIT_MAX);
        Ok(())
    }
}

/// The last step of a transaction whose work succeeded.
#[derive(Clone, Copy, Debug)]
enum End {
    Commit,
    /// Commits a change with the mark of its call. Another connection can then find out whether the change was committed.
    CommitMarked(CallId),
    /// Rolls back the work, for callers that need only the result of the work.
    Rollback,
}

impl End {
    fn mark(self) -> Option<CallId> {
        match self {
            Self::CommitMarked(call) => Some(call),
            Self::Commit | Self::Rollback => None,
        }
    }
}

/// The failure of a transaction.
enum Ended<T> {
    /// Nothing was committed.
    Without(Error),
    /// The change may have been committed. The second value is the result of the transaction's
    /// work.
    Unknown(Error, T),
}

/// The work that is done in a transaction.
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

/// A connection for one use. When the lease is dropped, the connection is closed, unless the
/// connection was returned to the pool.
struct Lease<'l, E: Engine> {
    lender: &'l Lender<E>,
    purpose: Purpose,
    connection: kept::Held<E::Database>,
    _place: SemaphorePermit<'l>,
    _permit: Option<SemaphorePermit<'l>>,
    _count: probe::Leased<'l>,
}

impl<'l, E: Engine> Lease<'l, E> {
    async fn take(lender: &'l Lender<E>, purpose: Purpose) -> Result<Self, Error> {
        let Lender { engine, probe, .. } = lender;
        engine.check_place(purpose)?;
        let begun = Instant::now();
        let permit = match engine.limit(purpose) {
            None => None,
            Some((semaphore, limit)) => {
                match tokio::time::timeout(limit, semaphore.acquire()).await {
                    Ok(Ok(permit)) => Some(permit),
                    Ok(Err(_)) => return Err(Error::Down("the store is closed".into())),
                    Err(_) if probe.has_answered_since(purpose, begun) => {
                        let what = format!("{ALL_CHANGES_IN_USE}; {MORE_CONNECTIONS}");
                        return Err(Error::Busy(what.into()));
                    }
                    Err(_) => return Err(Error::Down(ALL_CHANGES_IN_USE.into())),
                }
            }
        };
        engine.check_socket()?;
        let (connection, place) = match lender.connections.of(purpose).take().await {
            Ok(taken) => taken,
            Err(sqlx::Error::PoolTimedOut) => {
                return Err(Self::not_obtained(engine, probe, purpose, begun));
            }
            Err(error) => return Err(error.into()),
        };
        let lease = Self {
            lender,
            purpose,
            connection,
            _place: place,
            _permit: permit,
            _count: probe.leased(purpose),
        };
        // Check the database again, because the call may have waited for the connection.
        engine.check_place(purpose)?;
        Ok(lease)
    }

    /// The reason why a call got no connection in time. If all connections are in use and the
    /// database answers other calls, the pool is full. If the database answers no call, the
    /// database may be unavailable, and the caller may retry.
    fn not_obtained(engine: &E, probe: &probe::Probe, purpose: Purpose, begun: Instant) -> Error {
        let pool = engine.pool(purpose);
        let other = match purpose {
            Purpose::Read => Purpose::Write,
            Purpose::Write => Purpose::Read,
        };
        let shares_pool = std::ptr::eq(pool, engine.pool(other));
        let mut lent = probe.leases(purpose);
        if shares_pool {
            lent += probe.leases(other);
        }
        let all = pool.options().get_max_connections();
        if lent < all {
            return Error::Disconnected(
                "no connection in time: the database does not accept new connections".into(),
            );
        }
        let what =
            format!("no connection in time: all {all} connections to the database are in use");
        let is_answering = probe.has_answered_since(purpose, begun)
            || (shares_pool && probe.has_answered_since(other, begun));
        if is_answering {
            // Reads and writes share one pool only on database servers, and only the size of this
            // pool is configurable.
            let remedy = if shares_pool {
                MORE_CONNECTIONS
            } else {
                MORE_THAN_SQLITE
            };
            Error::Busy(format!("{what}; {remedy}").into())
        } else {
            Error::Disconnected(
                format!("{what}, and the database answered no call on these connections").into(),
            )
        }
    }

    fn give_back(self) {
        self.lender
            .connections
            .of(self.purpose)
            .give_back(self.connection);
    }

    async fn query(
        mut self,
        statement: &'static str,
        values: Vec<Value>,
    ) -> Result<Vec<Row<E>>, Error> {
        let limit = self.lender.engine.time_limit();
        let rows = tokio::time::timeout(limit, self.connection.rows(statement, values)).await;
        let rows = rows.map_err(|_| no_answer(limit))??;
        self.give_back();
        Ok(rows)
    }

    async fn transaction<T>(mut self, end: End, work: &impl Work<E, T>) -> Result<T, Ended<T>> {
        let limit = self.lender.engine.time_limit();
        let until = tokio::time::Instant::now() + limit;
        let session: &mut Connection<E> = &mut self.connection;
        let run = async {
            session.control(E::sql().begin).await?;
            Ok::<_, Error>(work(session, E::sql()).await)
        };
        let result = match tokio::time::timeout_at(until, run).await {
            Ok(Ok(result)) => result,
            Ok(Err(error)) => return Err(Ended::Without(error)),
            Err(_) => return Err(Ended::Without(no_answer(limit))),
        };
        let is_commit = result.is_ok() && !matches!(end, End::Rollback);
        let last = if is_commit { "COMMIT" } else { "ROLLBACK" };
        let ended = match tokio::time::timeout_at(until, self.connection.control(last)).await {
            Ok(ended) => ended.map_err(Error::from),
            Err(_) => Err(no_answer(limit)),
        };
        match (result, ended) {
            (Ok(value), Ok(())) => {
                // If the database file was removed, the commit is lost when the broker ends.
                // Therefore the outcome is unknown.
                if let Err(error) = self.lender.engine.check_place(Purpose::Write) {
                    return Err(if is_commit {
                        Ended::Unknown(error, value)
                    } else {
                        Ended::Without(error)
                    });
                }
                self.give_back();
                Ok(value)
            }
            (Err(error), Ok(())) => {
                self.give_back();
                Err(Ended::Without(error))
            }
            (Ok(value), Err(error)) if is_commit => Err(Ended::of_commit(error, value)),
            // The error of the work is more useful to the caller than the error of the rollback.
            // Nothing was committed, because the transaction was rolled back or its connection is
            // closed.
            (Err(error), Err(_)) | (Ok(_), Err(error)) => Err(Ended::Without(error)),
        }
    }
}

impl<T> Ended<T> {
    /// Interprets the error of a commit. Only the error `Contended` proves that nothing was
    /// committed: the server rolled back the change in favour of another transaction.
    fn of_commit(error: Error, value: T) -> Self {
        match error {
            Error::Contended(_) => Self::Without(error),
            error => Self::Unknown(error, value),
        }
    }
}

const ALL_CHANGES_IN_USE: &str = "no connection in time: all connections for changes are in use, which are half of `store.connections_max`";

const MORE_CONNECTIONS: &str = "raise `store.connections_max` if the server has capacity left";

const MORE_THAN_SQLITE: &str = "the number of connections to a SQLite database is fixed: make fewer concurrent calls, or move to a \
                                database server with `keybroker store copy`";

fn no_answer(limit: Duration) -> Error {
    Error::Down(format!("no answer within {} ms", limit.as_millis()).into())
}

fn backoff(attempt: u32) -> Duration {
    let ceiling = BACKOFF * 2_u32.saturating_pow(attempt.min(6));
    // A random wait does not need a cryptographic generator: the random seed of a hasher is
    // sufficient.
    let random = RandomState::new().build_hasher().finish();
    let share = u32::try_from(random % 1_024).unwrap_or(0);
    ceiling / 2 + ceiling / 2 * share / 1_024
}
