//! Support for MySQL 8 and later, and for MariaDB 10.6 and later.

use std::{sync::LazyLock, time::Duration};

use futures_util::{FutureExt as _, future::BoxFuture};
use sqlx::{
    AssertSqlSafe, ConnectOptions as _, MySql, MySqlConnection,
    migrate::Migrator,
    mysql::{MySqlConnectOptions, MySqlSslMode},
};

use super::{
    Error, Settings,
    dialect::{Dialect, LimitedDelete, Placeholder, Upsert},
    durability::{Found, Weakness},
    error::Detail,
    schema,
    server::{Limits, Server},
    session::{Columns as _, Session as _},
    settings::Tls,
    statements::Statements,
    url::{Place, Transport},
};

/// The session sets the isolation level READ COMMITTED. `postgres.rs` explains why READ COMMITTED
/// is sufficient with a locked row. The default isolation level REPEATABLE READ would lock gaps
/// between rows, and would read old data after waiting for a lock.
///
/// The statements do not use `INSERT IGNORE`, because `INSERT IGNORE` also hides errors about
/// values that do not fit.
const DIALECT: Dialect = Dialect {
    placeholder: Placeholder::Question,
    quote: '`',
    begin: "START TRANSACTION READ WRITE",
    lock: Some("FOR UPDATE"),
    unless_taken: "",
    upsert: Upsert::DuplicateKey,
    limited_delete: LimitedDelete::Limit,
    clock: Some("SELECT CAST(UNIX_TIMESTAMP(NOW(6)) * 1000000 AS SIGNED) AS now_us"),
    has_migrations: "SELECT 1 FROM information_schema.tables \
                     WHERE table_schema = DATABASE() AND table_name = '_sqlx_migrations'",
    durability: "SHOW GLOBAL VARIABLES WHERE Variable_name IN \
                 ('innodb_flush_log_at_trx_commit', 'innodb_doublewrite', 'log_bin', 'sync_binlog')",
    durability_columns: ["Variable_name", "Value"],
};

static SQL: LazyLock<Statements> = LazyLock::new(|| Statements::of_engine(&DIALECT));

static MIGRATOR: Migrator = sqlx::migrate!("../../migrations/mysql");

const PORT: u16 = 3_306;
/// The users under which database servers run in the packages of Linux distributions.
pub(super) const SOCKET_USERS: [&str; 2] = ["mysql", "mariadb"];
/// Older versions of MySQL ignore CHECK constraints.
const OLDEST_MYSQL: [u32; 3] = [8, 0, 16];
const OLDEST_MARIADB: [u32; 3] = [10, 6, 0];

/// In MySQL, the name of a lock has at most 64 characters. MySQL 9 has no `MD5()`.
const LOCK_MIGRATIONS: &str =
    "SELECT GET_LOCK(CONCAT('keybroker.', LEFT(SHA2(DATABASE(), 256), 40)), 60) AS locked";
const UNLOCK_MIGRATIONS: &str =
    "SELECT RELEASE_LOCK(CONCAT('keybroker.', LEFT(SHA2(DATABASE(), 256), 40)))";

/// Shortest limit on idle time. A broker without calls sends one probe per second, and a shorter
/// limit could close connections between two probes.
const IDLE_MIN_S: f64 = 10.0;

#[derive(Debug)]
pub(super) enum MySqlOrMariaDb {}

impl Server for MySqlOrMariaDb {
    type Database = MySql;

    const NAME: &'static str = "MySQL";
    const DIALECT: &'static Dialect = &DIALECT;

    fn sql() -> &'static Statements {
        &SQL
    }

    fn migrator() -> &'static Migrator {
        &MIGRATOR
    }

    fn options(settings: &Settings, place: &Place) -> Result<MySqlConnectOptions, Error> {
        let mut options = MySqlConnectOptions::new()
            .username(&place.user)
            .database(&place.database)
            .pipes_as_concat(false)
            // By default, the driver logs the complete statement on every call.
            .disable_statement_logging();
        if let Some(password) = settings.password()? {
            options = options.password(&password);
        }
        options = match &place.transport {
            Transport::Socket(path) => {
                return Ok(options.socket(path).ssl_mode(MySqlSslMode::Disabled));
            }
            Transport::Network { host, port } => options.host(host).port(port.unwrap_or(PORT)),
        };
        options = match settings.tls {
            Tls::Verify => options.ssl_mode(MySqlSslMode::VerifyIdentity),
            Tls::Plaintext => options.ssl_mode(MySqlSslMode::Disabled),
        };
        if let Some(pem) = settings.authorities()? {
            options = options.ssl_ca_from_pem(pem);
        }
        Ok(options)
    }

    /// The strict mode makes the server refuse a value that does not fit, instead of truncating it.
    fn prepare<'c>(
        connection: &'c mut MySqlConnection,
        limits: &'c Limits,
    ) -> BoxFuture<'c, Result<(), sqlx::Error>> {
        async move {
            let is_mariadb = version(connection).await?.is_mariadb;
            // `SET` accepts no placeholders. The only variable parts of the SQL text are numbers that this program
            // computes.
            let set = session_settings(limits, is_mariadb);
            sqlx::raw_sql(AssertSqlSafe(set))
                .execute(&mut *connection)
                .await?;
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
            let what = format!(
                "the server is {}; keybroker needs MySQL 8.0.16 or MariaDB 10.6, or later",
                version.text
            );
            Err(Error::Schema(what.into()))
        }
        .boxed()
    }

    fn weaknesses(found: &Found) -> Vec<Weakness> {
        found.mysql()
    }

    /// Uses a separate lock instead of the driver's lock, because the driver waits with a negative timeout, which MariaDB treats
    /// as an error. The server releases the lock at the latest when the connection ends.
    fn migrate(connection: &mut MySqlConnection) -> BoxFuture<'_, Result<(), Error>> {
        async move {
            let locked = connection.rows(LOCK_MIGRATIONS, Vec::new()).await?;
            let locked = locked.first().map(|row| row.optional_integer("locked"));
            if locked.transpose()?.flatten() != Some(1) {
                return Err(Error::InUse(
                    "another process is migrating this database; wait until the migration has ended, then try again"
                        .to_owned(),
                ));
            }
            let done = run_migrations(connection).await;
            connection.rows(UNLOCK_MIGRATIONS, Vec::new()).await?;
            done
        }
        .boxed()
    }
}

/// A migration that adds a column. In MySQL, `ADD COLUMN` fails if the column already exists.
struct AddedColumn {
    /// Version of the migration.
    version: i64,
    /// Returns a row if the column exists.
    find: &'static str,
    /// Removes it.
    remove: &'static str,
}

const ADDED_COLUMNS: [AddedColumn; 1] = [AddedColumn {
    version: 4,
    find: "SELECT 1 FROM information_schema.columns WHERE table_schema = DATABASE() \
           AND table_name = 'requests' AND column_name = 'result_mac'",
    remove: "ALTER TABLE requests DROP COLUMN result_mac",
}];

/// Runs the migrations. Each statement of a migration is committed separately, so an interrupted
/// migration leaves its mark and some of its changes. All statements of a migration can be
/// repeated, except statements that add a column. Therefore the function first removes the columns
/// that an interrupted migration added, and then runs the migration again from its beginning.
async fn run_migrations(connection: &mut MySqlConnection) -> Result<(), Error> {
    if !connection
        .rows(SQL.has_migrations, Vec::new())
        .await?
        .is_empty()
    {
        connection
            .execute(
                "DELETE FROM _sqlx_migrations WHERE NOT success AND version <= ?",
                vec![schema::newest(&MIGRATOR).into()],
            )
            .await?;
        let current = schema::current(connection, &SQL, schema::newest(&MIGRATOR)).await?;
        for added in ADDED_COLUMNS {
            // No release has used the column, because no release opens a database before the migration is complete.
            if added.version > current && !connection.rows(added.find, Vec::new()).await?.is_empty()
            {
                connection.control(added.remove).await?;
            }
        }
    }
    let mut migrator = Migrator::with_migrations(MIGRATOR.iter().cloned().collect());
    migrator.set_locking(false);
    migrator.run_direct(None, connection, false).await.map_err(|error| {
        Error::Schema(Detail::caused("migration failed", error).remedy(
            "the completed steps of the migration are kept: repair the cause, then run `keybroker store migrate` again",
        ))
    })
}

/// The settings of a session. A limit on idle time ends a transaction whose client or network
/// failed. Without the limit on idle time, the server would hold the locks until TCP detects the
/// failure, which can take hours. In MySQL, the limit on idle time applies to all connections, even
/// outside transactions. A closed connection is detected before its next use.
fn session_settings(limits: &Limits, is_mariadb: bool) -> String {
    // The server's settings for time limits are in seconds, and the minimum is one second.
    let seconds = |limit: Duration| limit.as_secs_f64().ceil().max(1.0);
    let lock = seconds(limits.lock);
    let idle = seconds(limits.statement * 2);
    let statement = if is_mariadb {
        let statement = limits.statement.as_secs_f64();
        format!("max_statement_time = {statement}, SESSION idle_transaction_timeout = {idle}")
    } else {
        let (statement, idle) = (limits.statement.as_millis(), idle.max(IDLE_MIN_S));
        format!("max_execution_time = {statement}, SESSION wait_timeout = {idle}")
    };
    format!(
        "SET SESSION autocommit = 1, SESSION foreign_key_checks = 1, SESSION unique_checks = 1, \
         SESSION sql_mode = 'STRICT_ALL_TABLES,NO_ENGINE_SUBSTITUTION', \
         SESSION innodb_lock_wait_timeout = {lock}, SESSION {statement}"
    )
}

struct Version {
    text: String,
    numbers: [u32; 3],
    is_mariadb: bool,
}

async fn version(connection: &mut MySqlConnection) -> Result<Version, sqlx::Error> {
    let rows = connection
        .rows("SELECT VERSION() AS version", Vec::new())
        .await?;
    let text = rows
        .first()
        .ok_or(sqlx::Error::RowNotFound)?
        .text("version")?
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

#[cfg(test)]
mod tests {
    use super::*;

    /// No statement uses a function that MySQL 8.0 or 9 removed. The tests run on MariaDB, which
    /// still has some of the removed functions.
    #[test]
    fn no_statement_calls_a_function_that_newer_versions_of_mysql_do_not_have() {
        let mut texts = vec![LOCK_MIGRATIONS.to_owned(), UNLOCK_MIGRATIONS.to_owned()];
        texts.push(format!("{:?}", *SQL));
        texts.extend(
            MIGRATOR
                .iter()
                .map(|migration| format!("{:?}", migration.sql)),
        );
        for text in texts {
            let text = text.to_ascii_uppercase();
            for removed in [
                "MD5(",
                "SHA(",
                "SHA1(",
                "PASSWORD(",
                "ENCODE(",
                "DECODE(",
                "ENCRYPT(",
            ] {
                let called = text.match_indices(removed).any(|(at, _)| {
                    !text[..at].ends_with(|c: char| c.is_ascii_alphanumeric() || c == '_')
                });
                assert!(!called, "{removed} {text}");
            }
        }
    }

    /// The tests do not run on MySQL, so this test at least checks the text of the settings.
    #[test]
    fn a_transaction_whose_client_is_gone_ends_on_both() {
        let limits = Limits {
            statement: Duration::from_millis(2_500),
            lock: Duration::from_millis(100),
        };
        let (mysql, mariadb) = (
            session_settings(&limits, false),
            session_settings(&limits, true),
        );
        assert!(mysql.contains("max_execution_time = 2500, SESSION wait_timeout = 10"));
        assert!(mariadb.contains("max_statement_time = 2.5, SESSION idle_transaction_timeout = 5"));
        for set in [mysql, mariadb] {
            assert!(set.contains("innodb_lock_wait_timeout = 1,"), "{set}");
        }
        let long = Limits {
            statement: Duration::from_mins(1),
            ..limits
        };
        assert!(session_settings(&long, false).ends_with("wait_timeout = 120"));
    }
}
