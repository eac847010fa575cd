//! The schema of a database, on any engine: its version, its pending migrations, and whether this
//! release can use the schema.
//!
//! If older releases can still use the database after a migration, the name of the migration
//! contains the earliest usable schema: `0009_notes_usable_from_8.up.sql`. The database stores the
//! name, so that a release can read the names of later migrations.

use std::cmp::Ordering;

use sqlx::migrate::Migrator;

use super::{
    Error, KnownLog, rows,
    session::{Columns as _, Session},
    statements::Statements,
};

/// The schema of a database and of this binary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SchemaStatus {
    /// Version of the database's schema; 0 if the database has no schema.
    pub current: i64,
    /// Newest schema version that this binary supports.
    pub newest: i64,
    /// Whether this version of the broker can serve from the database.
    pub is_usable: bool,
}

/// In a migration's description, the text before the earliest usable schema.
const USABLE_FROM: &str = " usable from ";

/// The schemas that a caller accepts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Accepted {
    /// The caller accepts only the schema of this binary.
    Own,
    /// The caller also accepts a newer schema if its migrations declare that this binary can use
    /// the schema.
    Usable,
}

/// The result of a migration, or of a dry run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MigrationReport {
    /// Version of the schema before the migration.
    pub before: i64,
    /// Version of the schema after the migration.
    pub newest: i64,
    /// The migrations between the two versions, in order.
    pub pending: Vec<String>,
}

/// The newest schema that this binary supports.
pub(super) fn newest(migrator: &Migrator) -> i64 {
    migrator.iter().map(|m| m.version).max().unwrap_or(0)
}

/// The schema version of a database; 0 if the database has no schema. `known` is the newest version
/// that this binary supports.
///
/// An unfinished migration is not counted, because this release runs the migration again. An
/// unfinished migration of a later release is counted, because the migration may already have
/// changed data that this release reads.
pub(super) async fn current(
    session: &mut impl Session,
    sql: &Statements,
    known: i64,
) -> Result<i64, Error> {
    if session
        .rows(sql.has_migrations, Vec::new())
        .await?
        .is_empty()
    {
        return Ok(0);
    }
    let newest = session
        .rows(sql.newest_migration, vec![known.into()])
        .await?;
    newest
        .first()
        .map_or(Ok(0), |row| Ok(row.integer("version")?))
}

/// The first schema with the table of audit logs.
const AUDIT_LOGS_SINCE: i64 = 6;

/// Whether a database was used with an audit log of an instance. A database with a schema before
/// [`AUDIT_LOGS_SINCE`] has no table of audit logs.
pub(super) async fn known_audit_log(
    session: &mut impl Session,
    sql: &Statements,
    instance: &str,
    log_id: &str,
) -> Result<KnownLog, Error> {
    if current(session, sql, AUDIT_LOGS_SINCE).await? < AUDIT_LOGS_SINCE {
        return Ok(KnownLog::None);
    }
    let values = vec![log_id.into(), instance.into()];
    let found = session.rows(sql.audit_logs, values).await?;
    rows::known_log(found.first().ok_or(Error::NotFound)?)
}

/// Refuses a schema that is older than the schema of this binary, or newer than the caller accepts.
pub(super) async fn require(
    accepted: Accepted,
    session: &mut impl Session,
    sql: &Statements,
    migrator: &Migrator,
) -> Result<(), Error> {
    let SchemaStatus {
        current,
        newest,
        is_usable,
    } = status(session, sql, migrator).await?;
    match current.cmp(&newest) {
        Ordering::Equal => Ok(()),
        Ordering::Less => {
            let what = format!(
                "the database has schema {current}, but this release needs schema {newest}; back up the database, then \
                 run `keybroker store migrate`"
            );
            Err(Error::Schema(what.into()))
        }
        Ordering::Greater if is_usable && accepted == Accepted::Usable => {
            tracing::warn!(
                schema = current,
                schema_of_this_release = newest,
                "a later release migrated the database; this release can still use the database, but upgrade this \
                 broker, too"
            );
            Ok(())
        }
        Ordering::Greater => Err(too_new(current, newest)),
    }
}

fn too_new(current: i64, newest: i64) -> Error {
    let what = format!(
        "the database has schema {current}, which is newer than schema {newest} of this release; run the release that \
         migrated the database"
    );
    Error::Schema(what.into())
}

pub(super) async fn status(
    session: &mut impl Session,
    sql: &Statements,
    migrator: &Migrator,
) -> Result<SchemaStatus, Error> {
    let newest = newest(migrator);
    let current = current(session, sql, newest).await?;
    let is_usable = match current.cmp(&newest) {
        Ordering::Less => false,
        Ordering::Equal => true,
        Ordering::Greater => {
            let later = session
                .rows(sql.later_migrations, vec![newest.into()])
                .await?;
            let mut is_usable = true;
            for row in &later {
                is_usable &=
                    usable_from(row.text("description")?).is_some_and(|from| from <= newest);
            }
            is_usable
        }
    };
    Ok(SchemaStatus {
        current,
        newest,
        is_usable,
    })
}

/// The status of a database that does not exist.
pub(super) fn none(migrator: &Migrator) -> SchemaStatus {
    SchemaStatus {
        current: 0,
        newest: newest(migrator),
        is_usable: false,
    }
}

/// The earliest schema whose releases can still use the database after a migration with the
/// description `description`.
fn usable_from(description: &str) -> Option<i64> {
    let (_, number) = description.rsplit_once(USABLE_FROM)?;
    number.parse().ok()
}

/// The migrations from a schema to the newest schema.
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

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, fs, path::Path};

    use super::*;

    #[test]
    fn only_a_whole_number_at_the_end_says_which_release_can_serve() {
        assert_eq!(usable_from("notes usable from 7"), Some(7));
        assert_eq!(usable_from("usable from 5 usable from 8"), Some(8));
        for other in [
            "notes",
            "usable from 7",
            "notes usable from",
            "notes usable from ",
            "notes usable from 7 or so",
            "notes usable from 7x",
        ] {
            assert_eq!(usable_from(other), None, "{other}");
        }
    }

    /// A release reads the names of later migrations, on every engine.
    #[test]
    fn the_engines_have_the_same_migrations_and_none_names_a_schema_that_is_not_earlier() {
        let names = |engine: &str| -> BTreeSet<String> {
            let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../migrations");
            let files = fs::read_dir(folder.join(engine)).unwrap();
            files
                .map(|file| file.unwrap().file_name().into_string().unwrap())
                .collect()
        };
        let sqlite = names("sqlite");
        assert!(sqlite.len() >= 12, "{sqlite:?}");
        for engine in ["postgres", "mysql"] {
            assert_eq!(names(engine), sqlite, "{engine}");
        }
        for name in &sqlite {
            let (version, rest) = name.split_once('_').unwrap();
            let description = rest.split('.').next().unwrap().replace('_', " ");
            if description.contains("usable") {
                let (from, version) = (usable_from(&description), version.parse().unwrap());
                assert!(from.is_some_and(|from| from < version), "{name}");
            }
        }
    }
}
