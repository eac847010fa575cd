//! MySQL 8 and later, MariaDB 10.6 and later.

use std::time::Duration;

use futures_util::{FutureExt as _, future::BoxFuture};
use sqlx::{
    AssertSqlSafe, MySql, MySqlConnection,
    migrate::Migrator,
    mysql::{MySqlConnectOptions, MySqlSslMode},
};

use super::{
    Error, Settings,
    durability::{Found, Weakness},
    server::{Limits, Server},
    session::{Columns as _, Session as _},
    settings::Tls,
    statements::{Statements, TableStatements},
    url::{Door, Place},
};

mod statements;
mod tables;

static MIGRATOR: Migrator = sqlx::migrate!("migrations/mysql");

const PORT: u16 = 3_306;
/// Before it CHECK constraints were parsed and ignored.
const OLDEST_MYSQL: [u32; 3] = [8, 0, 16];
const OLDEST_MARIADB: [u32; 3] = [10, 6, 0];

#[derive(Debug)]
pub(super) enum MySqlOrMariaDb {}

impl Server for MySqlOrMariaDb {
    type Database = MySql;

    const NAME: &'static str = "MySQL";
    const SQL: &'static Statements = &statements::STATEMENTS;
    const TABLES: &'static TableStatements = &tables::TABLES;

    fn migrator() -> &'static Migrator {
        &MIGRATOR
    }

    fn options(settings: &Settings, place: &Place) -> Result<MySqlConnectOptions, Error> {
        let mut options = MySqlConnectOptions::new()
            .username(&place.user)
            .database(&place.database)
            .pipes_as_concat(false);
        if let Some(password) = settings.password()? {
            options = options.password(&password);
        }
        options = match &place.door {
            Door::Socket(path) => {
                return Ok(options.socket(path).ssl_mode(MySqlSslMode::Disabled));
            }
            Door::Network { host, port } => options.host(host).port(port.unwrap_or(PORT)),
        };
        options = match settings.tls {
            Tls::Verify => options.ssl_mode(MySqlSslMode::VerifyIdentity),
            Tls::Plaintext => options.ssl_mode(MySqlSslMode::Disabled),
        };
        if let Some(path) = &settings.ca_file {
            options = options.ssl_ca(path);
        }
        Ok(options)
    }

    /// The strict mode is what refuses a value that does not fit instead of cutting it.
    fn prepare<'c>(
        connection: &'c mut MySqlConnection,
        limits: &'c Limits,
    ) -> BoxFuture<'c, Result<(), sqlx::Error>> {
        async move {
            // Whole seconds, and at least one.
            let lock = limits.lock.as_secs_f64().ceil().max(1.0);
            let statement = limits.statement;
            let statement_limit = if version(connection).await?.is_mariadb {
                format!(
                    "max_statement_time = {}, SESSION idle_transaction_timeout = {}",
                    statement.as_secs_f64(),
                    (statement * 2).max(Duration::from_secs(1)).as_secs()
                )
            } else {
                format!("max_execution_time = {}", statement.as_millis())
            };
            // Numbers of ours, which `SET` takes in no other way.
            let set = format!(
                "SET SESSION autocommit = 1, SESSION foreign_key_checks = 1, SESSION unique_checks = 1, \
                 SESSION sql_mode = 'STRICT_ALL_TABLES,NO_ENGINE_SUBSTITUTION', \
                 SESSION innodb_lock_wait_timeout = {lock}, SESSION {statement_limit}"
            );
            sqlx::raw_sql(AssertSqlSafe(set)).execute(&mut *connection).await?;
            connection
                .control("SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED, READ WRITE")
                .await
        }
        .boxed()
    }

    fn check_server(connection: &mut MySqlConnection) -> BoxFuture<'_, Result<(), Error>> {
        async move {
            let version = version(connection).await?;
            let oldest = if version.is_mariadb {
                OLDEST_MARIADB
            } else {
                OLDEST_MYSQL
            };
            if version.numbers >= oldest {
                return Ok(());
            }
            Err(Error::Schema(format!(
                "the server is {}; keybroker needs MySQL 8.0.16 or MariaDB 10.6, or later",
                version.text
            )))
        }
        .boxed()
    }

    fn weaknesses(found: &Found) -> Vec<Weakness> {
        found.mysql()
    }

    /// Under a lock of our own: the driver's waits with a negative timeout, which MariaDB takes for an error. It ends with
    /// the connection at the latest.
    fn migrate(connection: &mut MySqlConnection) -> BoxFuture<'_, Result<(), Error>> {
        async move {
            let locked = connection
                .rows(
                    "SELECT GET_LOCK(CONCAT('keybroker.', MD5(DATABASE())), 60)",
                    Vec::new(),
                )
                .await?;
            if locked
                .first()
                .map(|row| row.optional_integer(0))
                .transpose()?
                .flatten()
                != Some(1)
            {
                return Err(Error::InUse(
                    "another process is migrating this database; wait for it, then try again"
                        .to_owned(),
                ));
            }
            let done = run_migrations(connection).await;
            connection
                .rows(
                    "SELECT RELEASE_LOCK(CONCAT('keybroker.', MD5(DATABASE())))",
                    Vec::new(),
                )
                .await?;
            done
        }
        .boxed()
    }
}

/// Each statement of a migration commits by itself, so one that was cut short left its mark and a part of its work. All of
/// them can run again, so it is begun anew.
async fn run_migrations(connection: &mut MySqlConnection) -> Result<(), Error> {
    if !connection
        .rows(statements::STATEMENTS.has_migrations, Vec::new())
        .await?
        .is_empty()
    {
        connection
            .control("DELETE FROM _sqlx_migrations WHERE NOT success")
            .await?;
    }
    let mut migrator = Migrator::with_migrations(MIGRATOR.iter().cloned().collect());
    migrator.set_locking(false);
    migrator.run_direct(None, connection, false).await.map_err(|error| {
        Error::Schema(format!(
            "migration failed: {error}. What it did so far is kept; once the cause is mended, run `keybroker store \
             migrate` again"
        ))
    })
}

struct Version {
    text: String,
    numbers: [u32; 3],
    is_mariadb: bool,
}

async fn version(connection: &mut MySqlConnection) -> Result<Version, sqlx::Error> {
    let rows = connection.rows("SELECT VERSION()", Vec::new()).await?;
    let text = rows
        .first()
        .ok_or(sqlx::Error::RowNotFound)?
        .text(0)?
        .to_owned();
    let mut parts = text
        .split(|c: char| !c.is_ascii_digit())
        .map(|part| part.parse().unwrap_or(0));
    let mut next = || parts.next().unwrap_or(0);
    Ok(Version {
        numbers: [next(), next(), next()],
        is_mariadb: text.contains("MariaDB"),
        text,
    })
}
