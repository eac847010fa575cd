//! Databases on servers. Several broker instances can use the same database. Connections are
//! verified, prepared and checked before they transfer any data.
//!
//! Mitigation: M17 of `THREAT_MODEL.md`.

use std::{
    fmt,
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::{FutureExt as _, future::BoxFuture};
use sqlx::{
    ConnectOptions as _, Connection as _, Database, Pool, migrate::Migrator, pool::PoolOptions,
};
use tokio::sync::Semaphore;

use keybroker_core::error::chain;

use super::{
    Error, KnownLog, MigrationReport, SchemaStatus, Settings,
    dialect::Dialect,
    driver_errors::is_damage,
    durability::{self, Found, Weakness},
    engine::{Engine, EngineStore, Purpose, TEST_AFTER},
    error::Detail,
    mutations,
    schema::{self, Accepted},
    session::Session,
    settings::Tls,
    socket::Socket,
    statements::Statements,
    tables::Tables,
    url::Place,
};

/// Time limit for connections that no caller waits for: the first connection and the connections
/// for migrations.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
const IDLE_TIMEOUT: Duration = Duration::from_mins(5);
/// Longest lifetime of a connection. A new connection uses the current address of the host name, and checks the server's
/// certificate and settings again.
const LIFETIME_MAX: Duration = Duration::from_mins(30);
/// Additional time after the server's own limit on a statement, in case the server does not answer
/// at all.
const BEYOND_STATEMENT: Duration = Duration::from_secs(1);

type ConnectionOf<S> = <<S as Server>::Database as Database>::Connection;
type OptionsOf<S> = <ConnectionOf<S> as sqlx::Connection>::Options;

/// One kind of server.
pub(super) trait Server: fmt::Debug + Send + Sync + 'static {
    type Database: Database<Connection: Session>;

    /// The name of the database product, for messages.
    const NAME: &'static str;
    const DIALECT: &'static Dialect;

    /// The statements in the dialect of this server, which are built once.
    fn sql() -> &'static Statements;

    fn migrator() -> &'static Migrator;

    /// The options of a connection. The options contain nothing from the environment of the
    /// process. The function fails if the environment contains a variable that the driver would
    /// use.
    fn options(settings: &Settings, place: &Place) -> Result<OptionsOf<Self>, Error>
    where
        Self: Sized;

    /// Sets the limits of a new session, and resets settings that the server's administrator may have changed.
    fn prepare<'c>(
        connection: &'c mut ConnectionOf<Self>,
        limits: &'c Limits,
    ) -> BoxFuture<'c, Result<(), sqlx::Error>>;

    /// Refuses a server that is too old or does not store strings byte by byte.
    fn check_server(connection: &mut ConnectionOf<Self>) -> BoxFuture<'_, Result<(), Error>>;

    /// Refuses a pooler that gives one session to several clients, because the settings and prepared statements of a session
    /// could then belong to another client.
    fn check_pooler<'c>(
        _first: &'c mut ConnectionOf<Self>,
        _second: &'c mut ConnectionOf<Self>,
    ) -> BoxFuture<'c, Result<(), Error>>
    where
        Self: Sized,
    {
        async { Ok(()) }.boxed()
    }

    fn weaknesses(found: &Found) -> Vec<Weakness>;

    /// Migrates the schema to the newest version, one instance at a time.
    fn migrate(connection: &mut ConnectionOf<Self>) -> BoxFuture<'_, Result<(), Error>>;
}

/// Limits of a session.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    pub(super) statement: Duration,
    pub(super) lock: Duration,
}

impl Limits {
    fn of(settings: &Settings) -> Self {
        Self {
            statement: settings.statement_timeout(),
            lock: Duration::from_millis(settings.lock_timeout_ms),
        }
    }
}

/// Opens a database, and refuses a schema that the caller does not accept.
pub(super) async fn open<S: Server>(
    settings: &Settings,
    place: &Place,
    accepted: Accepted,
) -> Result<Arc<dyn Tables>, Error> {
    let options = S::options(settings, place)?;
    let (mut first, socket) = connect::<S>(&options, settings, place).await?;
    schema::require(accepted, &mut first, S::sql(), S::migrator()).await?;
    let weaknesses = weaknesses::<S>(&mut first).await?;
    durability::require_accepted(&weaknesses, &settings.accept_weaker_durability)?;
    durability::announce(&weaknesses);
    close::<S>(first).await;
    if settings.tls == Tls::Plaintext && !place.is_local() {
        tracing::warn!(
            database = %place.shown(),
            "the connection to the database is not encrypted, because the configuration has `tls = \"plaintext\"`"
        );
    }
    let connections = Connections::of(settings);
    let pool = pool::<S>(settings, connections, options);
    fill(&pool).await?;
    Ok(EngineStore::new(OnServer::<S> {
        pool,
        socket,
        writes: Semaphore::new(usize::try_from(connections.writes).unwrap_or(1)),
        acquire_timeout: settings.acquire_timeout(),
        time_limit: settings.statement_timeout() + BEYOND_STATEMENT,
    }))
}

/// Waits for the pool's first connection. The pool's own time limit is the time for which a call
/// waits for a connection. A server may be slower if server and broker start at the same time.
async fn fill<D: Database>(pool: &Pool<D>) -> Result<(), Error> {
    let until = Instant::now() + CONNECT_TIMEOUT;
    loop {
        match pool.acquire().await {
            Err(sqlx::Error::PoolTimedOut) if Instant::now() < until => {}
            Err(error) => return Err(error.into()),
            Ok(_given_back) => return Ok(()),
        }
    }
}

pub(super) async fn status<S: Server>(
    settings: &Settings,
    place: &Place,
) -> Result<SchemaStatus, Error> {
    let options = S::options(settings, place)?;
    let (mut connection, _) = connect::<S>(&options, settings, place).await?;
    let status = schema::status(&mut connection, S::sql(), S::migrator()).await;
    close::<S>(connection).await;
    status
}

pub(super) async fn known_audit_log<S: Server>(
    settings: &Settings,
    place: &Place,
    instance: &str,
    log_id: &str,
) -> Result<KnownLog, Error> {
    let options = S::options(settings, place)?;
    let (mut connection, _) = connect::<S>(&options, settings, place).await?;
    let known = schema::known_audit_log(&mut connection, S::sql(), instance, log_id).await;
    close::<S>(connection).await;
    known
}

pub(super) async fn migrate<S: Server>(
    settings: &Settings,
    place: &Place,
    dry_run: bool,
) -> Result<MigrationReport, Error> {
    let options = S::options(settings, place)?;
    let (mut connection, _) = connect::<S>(&options, settings, place).await?;
    let current = schema::current(&mut connection, S::sql(), schema::newest(S::migrator())).await?;
    let report = schema::plan(current, S::migrator())?;
    if !dry_run {
        if !report.pending.is_empty() {
            run_migrations::<S>(&mut connection).await?;
        }
        mutations::ensure_identity(&mut connection, S::sql()).await?;
    }
    close::<S>(connection).await;
    Ok(report)
}

/// Runs the migrations with longer time limits, because a migration may take a long time and may
/// wait for a migration by another instance.
async fn run_migrations<S: Server>(connection: &mut ConnectionOf<S>) -> Result<(), Error> {
    let limits = Limits {
        statement: Duration::from_hours(1),
        lock: CONNECT_TIMEOUT,
    };
    S::prepare(connection, &limits).await?;
    S::migrate(connection).await
}

/// Checks the local socket of the server, then connects. The function also returns the socket if
/// later connections must check the socket again.
async fn connect<S: Server>(
    options: &OptionsOf<S>,
    settings: &Settings,
    place: &Place,
) -> Result<(ConnectionOf<S>, Option<Socket>), Error> {
    let socket = match settings.socket()? {
        None => None,
        Some(socket) => socket.check_listener().await?.is_shared.then_some(socket),
    };
    let shown = format!("{} database {}", S::NAME, place.shown());
    let mut connection = connect_only::<S>(options, &shown).await?;
    S::prepare(&mut connection, &Limits::of(settings)).await?;
    S::check_server(&mut connection).await?;
    let mut second = connect_only::<S>(options, &shown).await?;
    let checked = S::check_pooler(&mut connection, &mut second);
    match tokio::time::timeout(CONNECT_TIMEOUT, checked).await {
        Ok(checked) => checked?,
        Err(_) => return Err(no_answer(&shown)),
    }
    close::<S>(second).await;
    Ok((connection, socket))
}

async fn connect_only<S: Server>(
    options: &OptionsOf<S>,
    shown: &str,
) -> Result<ConnectionOf<S>, Error> {
    match tokio::time::timeout(CONNECT_TIMEOUT, options.connect()).await {
        Ok(Ok(connection)) => Ok(connection),
        Ok(Err(error)) => Err(unreachable(shown, error)),
        Err(_) => Err(no_answer(shown)),
    }
}

fn no_answer(shown: &str) -> Error {
    Error::Down(
        format!(
            "{shown} does not answer within {} s",
            CONNECT_TIMEOUT.as_secs()
        )
        .into(),
    )
}

/// The error for a failed connection, with a remedy.
fn unreachable(shown: &str, error: sqlx::Error) -> Error {
    let remedy = if let sqlx::Error::Database(database) = &error {
        match database.code().as_deref() {
            Some("3D000" | "42000") => "create the database, with a separate user as its owner",
            Some("28P01" | "28000") => {
                "check the user in `store.url`, and `password_file` or `password_variable`"
            }
            _ => "see the log of the database server",
        }
    } else if chain(&error).contains("certificate") {
        // The driver has no separate type for errors of its TLS library, so the text of the error
        // is searched.
        "the server's certificate cannot be verified: set `store.ca_file` to the certificate of the CA that issued it, \
         and use a host name from the server's certificate in `store.url`"
    } else if matches!(error, sqlx::Error::Tls(_)) {
        "enable TLS on the server; set `store.tls = \"plaintext\"` only on a network that no other machine can access"
    } else {
        "check `store.url`, and check whether the database server runs"
    };
    let is_damage = is_damage(&error);
    let detail = Detail::caused(format!("cannot use the {shown}"), error).remedy(remedy);
    if is_damage {
        Error::Corrupt(detail)
    } else {
        Error::Down(detail)
    }
}

async fn weaknesses<S: Server>(
    connection: &mut ConnectionOf<S>,
) -> Result<Vec<Weakness>, sqlx::Error> {
    let rows = connection.rows(S::sql().durability, Vec::new()).await?;
    let found = Found::read(&rows, S::DIALECT.durability_columns)?;
    Ok(S::weaknesses(&found))
}

/// Closes a connection cleanly, so that the server logs no warning.
async fn close<S: Server>(connection: ConnectionOf<S>) {
    if let Err(error) = connection.close().await {
        tracing::debug!(%error, "a connection was not closed cleanly");
    }
}

/// The numbers of connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Connections {
    all: u32,
    /// Highest number of concurrent connections for changes.
    writes: u32,
}

impl Connections {
    /// Permits changes to use half of the connections. There are at least two connections, so at
    /// least one connection is always free for reads.
    fn of(settings: &Settings) -> Self {
        let all = settings.connections_max.max(2);
        Self {
            all,
            writes: all / 2,
        }
    }
}

fn pool<S: Server>(
    settings: &Settings,
    connections: Connections,
    options: OptionsOf<S>,
) -> Pool<S::Database> {
    let limits = Limits::of(settings);
    let accepted: Arc<[String]> = settings.accept_weaker_durability.clone().into();
    PoolOptions::new()
        .max_connections(connections.all)
        .acquire_timeout(settings.acquire_timeout())
        .idle_timeout(IDLE_TIMEOUT)
        .max_lifetime(LIFETIME_MAX)
        .test_before_acquire(false)
        .before_acquire(|connection, meta| {
            Box::pin(async move {
                if meta.idle_for > TEST_AFTER {
                    sqlx::Connection::ping(connection).await?;
                }
                Ok(true)
            })
        })
        .after_connect(move |connection, _| {
            let accepted = Arc::clone(&accepted);
            Box::pin(async move {
                S::prepare(connection, &limits).await?;
                let weaknesses = weaknesses::<S>(connection).await?;
                durability::require_accepted(&weaknesses, &accepted)
                    .map_err(|error| sqlx::Error::Configuration(error.into()))
            })
        })
        .connect_lazy_with(options)
}

/// A database on a server.
struct OnServer<S: Server> {
    pool: Pool<S::Database>,
    /// The socket, if another user could replace it while the server is stopped.
    socket: Option<Socket>,
    /// Limits the number of concurrent changes, so that some connections are always free for reads while changes wait for the
    /// locks of other transactions.
    writes: Semaphore,
    acquire_timeout: Duration,
    time_limit: Duration,
}

/// The output omits the options, which contain the password.
impl<S: Server> fmt::Debug for OnServer<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct(S::NAME)
            .field("connections", &self.pool.size())
            .finish_non_exhaustive()
    }
}

impl<S: Server> Engine for OnServer<S> {
    type Database = S::Database;

    fn sql() -> &'static Statements {
        S::sql()
    }

    fn pool(&self, _purpose: Purpose) -> &Pool<S::Database> {
        &self.pool
    }

    fn time_limit(&self) -> Duration {
        self.time_limit
    }

    fn check_socket(&self) -> Result<(), Error> {
        self.socket.as_ref().map_or(Ok(()), Socket::check_again)
    }

    fn limit(&self, purpose: Purpose) -> Option<(&Semaphore, Duration)> {
        match purpose {
            Purpose::Read => None,
            Purpose::Write => Some((&self.writes, self.acquire_timeout)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_never_have_every_connection() {
        for (configured, all, writes) in [(1, 2, 1), (2, 2, 1), (3, 3, 1), (10, 10, 5)] {
            let settings = Settings {
                connections_max: configured,
                ..Settings::new("postgres://me@db/keys")
            };
            assert_eq!(Connections::of(&settings), Connections { all, writes });
        }
    }
}
