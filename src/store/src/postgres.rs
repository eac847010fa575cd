//! Support for PostgreSQL 14 and later.

use std::{
    env,
    path::{Path, PathBuf},
    sync::LazyLock,
    time::Duration,
};

use futures_util::{FutureExt as _, future::BoxFuture};
use sqlx::{
    ConnectOptions as _, PgConnection, Postgres,
    migrate::Migrator,
    postgres::{PgConnectOptions, PgSslMode},
};

use keybroker_core::call::CallId;

use super::{
    Error, Settings,
    dialect::{Dialect, LimitedDelete, Placeholder, Upsert},
    driver_errors::POOLER_REMEDY,
    durability::{Found, Weakness},
    error::{Detail, SharedSession},
    server::{Limits, Server},
    session::{Columns as _, Session as _, Value},
    settings::Tls,
    statements::Statements,
    url::{Place, Transport},
};

/// The isolation level READ COMMITTED is sufficient: every transaction changes one record and locks
/// this record first, and constraints enforce uniqueness.
const DIALECT: Dialect = Dialect {
    placeholder: Placeholder::Dollar,
    quote: '"',
    begin: "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE",
    lock: Some("FOR UPDATE"),
    unless_taken: " ON CONFLICT DO NOTHING",
    upsert: Upsert::ConflictOnce,
    limited_delete: LimitedDelete::Subquery,
    clock: Some("SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint AS now_us"),
    has_migrations: "SELECT 1 WHERE to_regclass('_sqlx_migrations') IS NOT NULL",
    durability: "SELECT name, setting AS value FROM pg_settings WHERE name IN \
                 ('fsync', 'full_page_writes', 'synchronous_commit', 'synchronous_standby_names')",
    durability_columns: ["name", "value"],
};

static SQL: LazyLock<Statements> = LazyLock::new(|| Statements::of_engine(&DIALECT));

static MIGRATOR: Migrator = sqlx::migrate!("../../migrations/postgres");

const PORT: u16 = 5_432;
/// The oldest supported version, in the form of `server_version_num`.
const OLDEST: i64 = 140_000;
/// The file name of a PostgreSQL socket is this prefix and the port.
const SOCKET_NAME: &str = ".s.PGSQL.";
/// The users under which database servers and their poolers run in the packages of Linux distributions.
pub(super) const SOCKET_USERS: [&str; 2] = ["postgres", "pgbouncer"];

/// Environment variables that the driver reads and that the program cannot override. Some of the
/// variables set the CAs for the server's certificate. Other variables set a client certificate or
/// settings of the session.
const VARIABLES: [&str; 4] = ["PGSSLROOTCERT", "PGSSLCERT", "PGSSLKEY", "PGOPTIONS"];

/// Returns a problem for each of [`VARIABLES`] that is set in the environment.
pub(super) fn environment_problems() -> Vec<String> {
    let is_set = |name: &&str| env::var_os(name).is_some();
    let complain = |name: &str| {
        format!(
            "[store]: the environment variable {name} is set, and would change the connection to PostgreSQL; remove it \
             from keybroker's environment (in a systemd unit: `UnsetEnvironment={name}`), and set the CA certificate in \
             `ca_file`"
        )
    };
    VARIABLES.into_iter().filter(is_set).map(complain).collect()
}

#[derive(Debug)]
pub(super) enum PostgreSql {}

impl Server for PostgreSql {
    type Database = Postgres;

    const NAME: &'static str = "PostgreSQL";
    const DIALECT: &'static Dialect = &DIALECT;

    fn sql() -> &'static Statements {
        &SQL
    }

    fn migrator() -> &'static Migrator {
        &MIGRATOR
    }

    fn options(settings: &Settings, place: &Place) -> Result<PgConnectOptions, Error> {
        // The driver reads the environment. Every value from the environment is either overwritten or refused.
        let problems = environment_problems();
        if !problems.is_empty() {
            return Err(Error::Schema(problems.join("; ").into()));
        }
        let options = PgConnectOptions::new_without_pgpass()
            .username(&place.user)
            .database(&place.database)
            .application_name("keybroker")
            .extra_float_digits(None)
            // By default, the driver logs the complete statement on every call.
            .disable_statement_logging()
            .password(
                settings
                    .password()?
                    .as_ref()
                    .map_or("", |password| password.as_str()),
            );
        let mut options = match &place.transport {
            Transport::Socket(path) => {
                let (directory, port) = split_socket(path);
                return Ok(options
                    .port(port)
                    .socket(directory)
                    .ssl_mode(PgSslMode::Disable));
            }
            Transport::Network { host, port } => options.host(host).port(port.unwrap_or(PORT)),
        };
        options = match settings.tls {
            Tls::Verify => options.ssl_mode(PgSslMode::VerifyFull),
            Tls::Plaintext => options.ssl_mode(PgSslMode::Disable),
        };
        if let Some(pem) = settings.authorities()? {
            options = options.ssl_root_cert_from_pem(pem);
        }
        Ok(options)
    }

    fn prepare<'c>(
        connection: &'c mut PgConnection,
        limits: &'c Limits,
    ) -> BoxFuture<'c, Result<(), sqlx::Error>> {
        async move {
            let value = |limit: Duration| Value::Text(limit.as_millis().to_string());
            connection
                .rows(
                    "SELECT set_config('statement_timeout', $1, false), \
                     set_config('lock_timeout', $2, false), \
                     set_config('idle_in_transaction_session_timeout', $3, false), \
                     set_config('default_transaction_isolation', 'read committed', false)",
                    vec![
                        value(limits.statement),
                        value(limits.lock),
                        value(limits.statement * 2),
                    ],
                )
                .await
                .map(drop)
        }
        .boxed()
    }

    fn check_server(connection: &mut PgConnection) -> BoxFuture<'_, Result<(), Error>> {
        async move {
            let rows = connection
                .rows(
                    "SELECT current_setting('server_version_num')::bigint AS number, \
                     current_setting('server_version') AS version, \
                     current_setting('server_encoding') AS encoding",
                    Vec::new(),
                )
                .await?;
            let row = rows.first().ok_or(Error::NotFound)?;
            if row.integer("number")? < OLDEST {
                let version = row.text("version")?;
                let what = format!("the server is PostgreSQL {version}; keybroker needs 14 or later");
                return Err(Error::Schema(what.into()));
            }
            match row.text("encoding")? {
                "UTF8" => Ok(()),
                other => {
                    let what = format!(
                        "the database has the encoding {other}, which cannot represent every user name; create the \
                         database again with ENCODING 'UTF8'"
                    );
                    Err(Error::Schema(what.into()))
                }
            }
        }
        .boxed()
    }

    /// A setting in the session of the first connection must be invisible to the second connection,
    /// even inside a transaction of the second connection. A pooler in transaction mode gives the
    /// most recently used session to the transaction of the second connection. Other clients of the
    /// pooler may take the session before this transaction begins, so the check is repeated several
    /// times.
    fn check_pooler<'c>(
        first: &'c mut PgConnection,
        second: &'c mut PgConnection,
    ) -> BoxFuture<'c, Result<(), Error>> {
        const ROUNDS: u32 = 5;
        const SEEN: &str =
            "SELECT coalesce(current_setting('keybroker.session', true), '') AS mark";
        async move {
            let mark = CallId::fresh().to_string();
            for _ in 0..ROUNDS {
                let set = "SELECT set_config('keybroker.session', $1, false)";
                first.rows(set, vec![mark.as_str().into()]).await?;
                second.control("BEGIN").await?;
                let seen = second.rows(SEEN, Vec::new()).await?;
                let is_shared =
                    seen.first().map(|row| row.text("mark")).transpose()? == Some(&mark);
                if is_shared {
                    return Err(shared_session());
                }
                let seen = first.rows(SEEN, Vec::new()).await?;
                let is_kept = seen.first().map(|row| row.text("mark")).transpose()? == Some(&mark);
                if !is_kept {
                    return Err(shared_session());
                }
                second.control("ROLLBACK").await?;
            }
            Ok(())
        }
        .boxed()
    }

    fn weaknesses(found: &Found) -> Vec<Weakness> {
        found.postgres()
    }

    /// The driver keeps an advisory lock during the migrations, and runs each migration together
    /// with its mark in one transaction.
    fn migrate(connection: &mut PgConnection) -> BoxFuture<'_, Result<(), Error>> {
        async move {
            MIGRATOR
                .run_direct(None, connection, false)
                .await
                .map_err(|error| {
                    let what = "the migration failed, and its changes were undone";
                    Error::Schema(Detail::caused(what, error))
                })
        }
        .boxed()
    }
}

fn shared_session() -> Error {
    Error::Schema(Detail::of(SharedSession { source: None }).remedy(POOLER_REMEDY))
}

/// The socket itself.
pub(super) fn socket_file(path: &Path) -> PathBuf {
    let (directory, port) = split_socket(path);
    directory.join(format!("{SOCKET_NAME}{port}"))
}

/// A setting specifies a socket by the socket's directory or, if the port is not the default, by
/// the socket's own path.
fn split_socket(path: &Path) -> (&Path, u16) {
    let port = path
        .file_name()
        .and_then(|name| name.to_str()?.strip_prefix(SOCKET_NAME)?.parse().ok());
    match (path.parent(), port) {
        (Some(directory), Some(port)) => (directory, port),
        _ => (path, PORT),
    }
}
