//! The database file: made, checked, migrated, locked.

use std::{
    fs::{self, File, OpenOptions},
    io::{Read as _, Write as _},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use sqlx::{SqlitePool, migrate::Migrator};

use crate::{Error, MigrationReport, SchemaStatus, StoreLock, identity, schema};

use super::statements::STATEMENTS;

static MIGRATOR: Migrator = sqlx::migrate!("../../migrations/sqlite");

/// Group may read (backups); nobody else may do anything.
const OPEN_TO_OTHERS: u32 = 0o027;

const ROOT: u32 = 0;

/// Refuses a file that is not there, or that others can change or read.
pub(crate) fn check(path: &Path) -> Result<(), Error> {
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
    let (owner, ours) = (meta.uid(), rustix::process::geteuid().as_raw());
    if is_foreign(owner, ours) {
        let what = format!(
            "{shown} belongs to user {owner}, who can change it behind the broker's back; run `chown {ours} {shown}`"
        );
        return Err(Error::Down(what.into()));
    }
    Ok(())
}

/// Root may do anything to any file, whoever it belongs to.
fn is_foreign(owner: u32, ours: u32) -> bool {
    ours != ROOT && owner != ROOT && owner != ours
}

async fn current(pool: &SqlitePool) -> Result<i64, Error> {
    schema::current(&mut *pool.acquire().await?, &STATEMENTS).await
}

pub(super) async fn require_current(pool: &SqlitePool) -> Result<(), Error> {
    schema::require_current(current(pool).await?, &MIGRATOR)
}

/// What migration would do, or has been done.
pub(crate) async fn status(path: &Path) -> Result<SchemaStatus, Error> {
    if !path.exists() {
        return Ok(schema::status(0, &MIGRATOR));
    }
    check(path)?;
    let pool = super::writer(path);
    let current = current(&pool).await;
    pool.close().await;
    Ok(schema::status(current?, &MIGRATOR))
}

/// Brings a database to the newest schema, making the file if need be. The caller holds the lock.
pub(crate) async fn migrate(path: &Path, dry_run: bool) -> Result<MigrationReport, Error> {
    let report = schema::plan(status(path).await?.current, &MIGRATOR)?;
    if !dry_run {
        make_file(path)?;
        let pool = super::writer(path);
        let done = run_migrations(&pool).await;
        pool.close().await;
        done?;
    }
    Ok(report)
}

async fn run_migrations(pool: &SqlitePool) -> Result<(), Error> {
    MIGRATOR.run(pool).await.map_err(|error| {
        Error::Schema(format!("migration failed, nothing was changed: {error}"))
    })?;
    identity::ensure(&mut *pool.acquire().await?, &STATEMENTS).await
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
pub(crate) fn lock(path: &Path) -> Result<StoreLock, Error> {
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
            "{} is in use by process {}; stop the broker first, because SQLite is for one process. What a running broker can do \
             itself is below `keybroker client`",
            path.display(),
            holder.trim()
        )));
    }
    note_holder(&mut file)
        .map_err(|error| Error::Down(format!("cannot write {shown}: {error}").into()))?;
    Ok(StoreLock { _file: Some(file) })
}

fn note_holder(file: &mut File) -> std::io::Result<()> {
    file.set_len(0)?;
    file.write_all(std::process::id().to_string().as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_ours_or_roots() {
        const BROKER: u32 = 990;
        const SOMEBODY: u32 = 1_000;
        assert!(is_foreign(SOMEBODY, BROKER));
        for (owner, ours) in [(BROKER, BROKER), (ROOT, BROKER), (SOMEBODY, ROOT)] {
            assert!(!is_foreign(owner, ours), "{owner} {ours}");
        }
    }
}
