//! The schema of a database, on any engine: what it is, what is missing, whether it fits.

use sqlx::migrate::Migrator;

use super::{
    Error,
    session::{Columns as _, Session},
    statements::Statements,
};

/// The schema of a database and of this binary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SchemaStatus {
    /// Version of the database; 0 when it has none.
    pub current: i64,
    /// Newest version that this binary knows.
    pub newest: i64,
}

/// What a migration did, or would do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MigrationReport {
    /// Version before.
    pub before: i64,
    /// Version after.
    pub newest: i64,
    /// The migrations between, in order.
    pub pending: Vec<String>,
}

/// The newest schema that this binary knows.
pub(super) fn newest(migrator: &Migrator) -> i64 {
    migrator.iter().map(|m| m.version).max().unwrap_or(0)
}

/// The schema of a database; 0 when it has none.
pub(super) async fn current(session: &mut impl Session, sql: &Statements) -> Result<i64, Error> {
    if session
        .rows(sql.has_migrations, Vec::new())
        .await?
        .is_empty()
    {
        return Ok(0);
    }
    let newest = session.rows(sql.newest_migration, Vec::new()).await?;
    newest
        .first()
        .map_or(Ok(0), |row| Ok(row.integer("version")?))
}

/// Refuses a schema that is older or newer than this binary's.
pub(super) fn require_current(current: i64, migrator: &Migrator) -> Result<(), Error> {
    let newest = newest(migrator);
    match current.cmp(&newest) {
        std::cmp::Ordering::Equal => Ok(()),
        std::cmp::Ordering::Less => {
            let what = format!(
                "the database has schema {current}, this release needs {newest}; back it up, then run \
                 `keybroker store migrate`"
            );
            Err(Error::Schema(what.into()))
        }
        std::cmp::Ordering::Greater => Err(too_new(current, newest)),
    }
}

fn too_new(current: i64, newest: i64) -> Error {
    let what = format!(
        "the database has schema {current}, newer than the {newest} that this release knows; run the \
         release that migrated it"
    );
    Error::Schema(what.into())
}

pub(super) fn status(current: i64, migrator: &Migrator) -> SchemaStatus {
    SchemaStatus {
        current,
        newest: newest(migrator),
    }
}

/// What a migration from a schema does.
pub(super) fn plan(current: i64, migrator: &Migrator) -> Result<MigrationReport, Error> {
    let newest = newest(migrator);
    if current > newest {
        return Err(too_new(current, newest));
    }
    let pending = migrator
        .iter()
        .filter(|m| m.version > current && !m.migration_type.is_down_migration())
        .map(|m| format!("{:04} {}", m.version, m.description))
        .collect();
    Ok(MigrationReport {
        before: current,
        newest,
        pending,
    })
}
