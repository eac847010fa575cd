//! The database file and its schema: made, checked, migrated, locked.

use std::{
    fs::{self, File, OpenOptions},
    io::{Read as _, Write as _},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use sqlx::{Row as _, SqlitePool, migrate::Migrator};

use crate::store::{Error, MigrationReport, SchemaStatus, StoreLock};

static MIGRATOR: Migrator = sqlx::migrate!("migrations/sqlite");

/// Group may read (backups); nobody else may do anything.
const OPEN_TO_OTHERS: u32 = 0o027;

/// Refuses a file that is not there, or that others can change or read.
pub(in crate::store) fn check_file(path: &Path) -> Result<(), Error> {
    let shown = path.display();
    let meta = fs::metadata(path).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => Error::Schema(format!(
            "there is no database at {shown}; make it with `keybroker store migrate`"
        )),
        _ => Error::Down(format!("cannot look at {shown}: {error}").into()),
    })?;
    let mode = meta.mode() & 0o777;
    if mode & OPEN_TO_OTHERS != 0 {
        let what =
            format!("{shown} has mode {mode:03o}: others can use it; run `chmod 600 {shown}`");
        return Err(Error::Down(what.into()));
    }
    Ok(())
}

/// The newest schema that this binary knows.
fn newest() -> i64 {
    MIGRATOR.iter().map(|m| m.version).max().unwrap_or(0)
}

/// The schema of a database; 0 when it has none.
async fn current(pool: &SqlitePool) -> Result<i64, Error> {
    let table = sqlx::query(
        "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = '_sqlx_migrations'",
    )
    .fetch_optional(pool)
    .await?;
    if table.is_none() {
        return Ok(0);
    }
    let row = sqlx::query("SELECT coalesce(max(version), 0) FROM _sqlx_migrations WHERE success")
        .fetch_one(pool)
        .await?;
    Ok(row.try_get(0)?)
}

pub(super) async fn require_current(pool: &SqlitePool) -> Result<(), Error> {
    let (current, newest) = (current(pool).await?, newest());
    match current.cmp(&newest) {
        std::cmp::Ordering::Equal => Ok(()),
        std::cmp::Ordering::Less => Err(Error::Schema(format!(
            "the database has schema {current}, this release needs {newest}; back it up, then run \
             `keybroker store migrate`"
        ))),
        std::cmp::Ordering::Greater => Err(too_new(current, newest)),
    }
}

fn too_new(current: i64, newest: i64) -> Error {
    Error::Schema(format!(
        "the database has schema {current}, newer than the {newest} that this release knows; run the \
         release that migrated it"
    ))
}

/// What migration would do, or has been done.
pub(in crate::store) async fn status(path: &Path) -> Result<SchemaStatus, Error> {
    if !path.exists() {
        return Ok(SchemaStatus {
            current: 0,
            newest: newest(),
        });
    }
    check_file(path)?;
    let pool = super::writer(path);
    let current = current(&pool).await;
    pool.close().await;
    Ok(SchemaStatus {
        current: current?,
        newest: newest(),
    })
}

/// Brings a database to the newest schema, making the file if need be. The caller holds the lock.
pub(in crate::store) async fn migrate(
    path: &Path,
    dry_run: bool,
) -> Result<MigrationReport, Error> {
    let before = status(path).await?;
    if before.current > before.newest {
        return Err(too_new(before.current, before.newest));
    }
    let pending: Vec<String> = MIGRATOR
        .iter()
        .filter(|m| m.version > before.current && !m.migration_type.is_down_migration())
        .map(|m| format!("{:04} {}", m.version, m.description))
        .collect();
    if !dry_run && !pending.is_empty() {
        make_file(path)?;
        let pool = super::writer(path);
        let run = MIGRATOR.run(&pool).await;
        pool.close().await;
        run.map_err(|error| {
            Error::Schema(format!("migration failed, nothing was changed: {error}"))
        })?;
    }
    Ok(MigrationReport {
        before: before.current,
        newest: before.newest,
        pending,
    })
}

fn make_file(path: &Path) -> Result<(), Error> {
    let made = OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(path);
    made.map(drop).map_err(|error| {
        let shown = path.display();
        let remedy = "its directory must exist and belong to the user that runs keybroker";
        Error::Down(format!("cannot make {shown}: {error}; {remedy}").into())
    })
}

/// Takes the database for this process alone.
pub(in crate::store) fn lock(path: &Path) -> Result<StoreLock, Error> {
    let mut name = path.as_os_str().to_owned();
    name.push(".lock");
    let lock_path = PathBuf::from(name);
    let shown = lock_path.display();
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&lock_path)
        .map_err(|error| {
            let remedy = "its directory must exist and belong to the user that runs keybroker";
            Error::Down(format!("cannot open {shown}: {error}; {remedy}").into())
        })?;
    if file.try_lock().is_err() {
        let mut holder = String::new();
        let _unreadable = file.read_to_string(&mut holder);
        return Err(Error::InUse(format!(
            "{} is in use by process {}; stop it first, or ask it through its control plane \
             (`keybroker client …`)",
            path.display(),
            holder.trim()
        )));
    }
    note_holder(&mut file)
        .map_err(|error| Error::Down(format!("cannot write {shown}: {error}").into()))?;
    Ok(StoreLock { _file: file })
}

fn note_holder(file: &mut File) -> std::io::Result<()> {
    file.set_len(0)?;
    file.write_all(std::process::id().to_string().as_bytes())
}
