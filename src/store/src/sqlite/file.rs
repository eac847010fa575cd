//! Creates, checks, migrates and locks the database file.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read as _, Write as _},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use rustix::fs::OFlags;
use sqlx::{SqlitePool, migrate::Migrator};

use keybroker_core::trusted_file::{self, Purpose};

use crate::{
    Error, KnownLog, MigrationReport, SchemaStatus, error::Detail, mutations, schema,
    schema::Accepted,
};

use super::SQL;

static MIGRATOR: Migrator = sqlx::migrate!("../../migrations/sqlite");

/// The group may read the file, for backups. Others have no access.
const OPEN_TO_OTHERS: u32 = 0o027;

const WRITABLE_BY_OTHERS: u32 = 0o022;

const ROOT: u32 = 0;

const PLACE: Purpose = Purpose::trust("other users could put another database in its place");
/// The first bytes of every SQLite database (section 1.3 of its file format).
const HEADER: &[u8; 16] = b"SQLite format 3\0";

const DIRECTORY: &str = "it must be a regular file, and its directory must exist and belong to the user that runs keybroker";

/// Suffixes of the files next to a database: WAL, journal, and index of the WAL. When SQLite opens
/// a database, it writes the content of the WAL or journal into the database.
const SIDE_FILES: [&str; 3] = ["-wal", "-journal", "-shm"];

/// Refuses a file that does not exist, or that other users can change or read.
pub(crate) fn check(path: &Path) -> Result<(), Error> {
    let shown = path.display();
    let meta = fs::metadata(path).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => {
            let what = format!(
                "there is no database at {shown}; create it with `keybroker store migrate`"
            );
            Error::Schema(what.into())
        }
        _ => not_examined(path, error),
    })?;
    let mode = meta.mode() & 0o777;
    if mode & OPEN_TO_OTHERS != 0 {
        let what = format!(
            "the database {shown} has mode {mode:04o}: other users can access the database; run `chmod 600 {shown}`"
        );
        return Err(Error::Down(what.into()));
    }
    check_header(path)?;
    let (owner, ours) = (meta.uid(), rustix::process::geteuid().as_raw());
    if is_foreign(owner, ours) {
        let what = format!(
            "{shown} belongs to user {owner}, who could change the database; run `chown {ours} {shown}`"
        );
        return Err(Error::Down(what.into()));
    }
    check_side_files(path, owner)
}

/// Refuses a file that is not a SQLite database. If the file cannot be read, the function returns no error, because
/// SQLite reports this problem.
fn check_header(path: &Path) -> Result<(), Error> {
    let mut begin = [0; HEADER.len()];
    let read = File::open(path).and_then(|mut file| file.read_exact(&mut begin));
    match read {
        Ok(()) if begin != *HEADER => {
            let what = format!("{} is not a SQLite database", path.display());
            Err(Error::Schema(Detail::from(what).remedy(
                "set the URL to another file, or restore a backup if the database file was overwritten",
            )))
        }
        // An empty file is a new database. SQLite reports a file that is too short or cannot be read.
        _ => Ok(()),
    }
}

fn not_examined(path: &Path, error: io::Error) -> Error {
    Error::Down(Detail::of_file("cannot examine", path, error))
}

/// Refuses files of another user next to a database. In a directory that other users can write to,
/// a WAL of another user could replace the complete content of the database at the next start.
fn check_side_files(path: &Path, database_owner: u32) -> Result<(), Error> {
    // SQLite resolves symbolic links before it looks for the side files.
    let resolved = fs::canonicalize(path).map_err(|error| not_examined(path, error))?;
    let trusted = [ROOT, rustix::process::geteuid().as_raw(), database_owner];
    for suffix in SIDE_FILES {
        let file = with_suffix(&resolved, suffix);
        let shown = file.display();
        let meta = match fs::symlink_metadata(&file) {
            Ok(meta) => meta,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(not_examined(&file, error)),
        };
        let (mode, owner) = (meta.mode() & 0o777, meta.uid());
        let problem = if !meta.is_file() {
            "the path is not a regular file".to_owned()
        } else if !trusted.contains(&owner) {
            format!("the file belongs to user {owner}")
        } else if mode & WRITABLE_BY_OTHERS != 0 {
            format!("has mode {mode:03o}")
        } else {
            continue;
        };
        let what = format!(
            "{shown}: {problem}; another user could have written this file, and SQLite would write its content into \
             the database. If the file does not belong to the database, remove the file. Then remove the write \
             permission of other \
             users from the directory of the file"
        );
        return Err(Error::Down(what.into()));
    }
    Ok(())
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

/// Whether a user other than root and `ours` owns a file. The result is always false if `ours` is
/// root, because root may use every file.
fn is_foreign(owner: u32, ours: u32) -> bool {
    ours != ROOT && owner != ROOT && owner != ours
}

pub(super) async fn require(accepted: Accepted, pool: &SqlitePool) -> Result<(), Error> {
    schema::require(accepted, &mut *pool.acquire().await?, &SQL, &MIGRATOR).await
}

/// Whether the file exists. Fails if other users can change the file.
fn exists(path: &Path) -> Result<bool, Error> {
    match path.try_exists() {
        Ok(true) => check(path).map(|()| true),
        Ok(false) => Ok(false),
        Err(error) => Err(not_examined(path, error)),
    }
}

/// The schema of the database; version 0 if the file does not exist.
pub(crate) async fn status(path: &Path) -> Result<SchemaStatus, Error> {
    if !exists(path)? {
        return Ok(schema::none(&MIGRATOR));
    }
    let pool = super::writer(path);
    let status = async { schema::status(&mut *pool.acquire().await?, &SQL, &MIGRATOR).await };
    let status = status.await;
    pool.close().await;
    status
}

pub(crate) async fn known_audit_log(
    path: &Path,
    instance: &str,
    log_id: &str,
) -> Result<KnownLog, Error> {
    if !exists(path)? {
        return Ok(KnownLog::None);
    }
    let pool = super::writer(path);
    let known = async {
        let mut connection = pool.acquire().await?;
        schema::known_audit_log(&mut *connection, &SQL, instance, log_id).await
    };
    let known = known.await;
    pool.close().await;
    known
}

/// Migrates a database to the newest schema, and creates the file if necessary. The caller must hold the lock of the
/// database.
pub(crate) async fn migrate(path: &Path, dry_run: bool) -> Result<MigrationReport, Error> {
    let report = schema::plan(status(path).await?.current, &MIGRATOR)?;
    if !dry_run {
        make_file(path)?;
        check(path)?;
        let pool = super::writer(path);
        let done = run_migrations(&pool).await;
        pool.close().await;
        done?;
    }
    Ok(report)
}

async fn run_migrations(pool: &SqlitePool) -> Result<(), Error> {
    MIGRATOR.run(pool).await.map_err(|error| {
        Error::Schema(Detail::caused(
            "the migration failed, and nothing was changed",
            error,
        ))
    })?;
    mutations::ensure_identity(&mut *pool.acquire().await?, &SQL).await
}

fn make_file(path: &Path) -> Result<(), Error> {
    if path.exists() {
        return Ok(());
    }
    // `create_new` does not follow a symbolic link to a file that does not exist.
    let made = OpenOptions::new()
        .create_new(true)
        .append(true)
        .mode(0o600)
        .open(path);
    made.map(drop).map_err(|error| {
        Error::Down(Detail::of_file("cannot create", path, error).or_remedy(DIRECTORY))
    })
}

/// Locks an embedded database for one process.
#[derive(Debug)]
pub struct StoreLock {
    _file: Option<File>,
}

impl StoreLock {
    /// Creates an empty lock for a database on a server, because any number of processes may use
    /// such a database.
    pub(crate) fn not_needed() -> Self {
        Self { _file: None }
    }
}

/// Locks the database for this process.
pub(crate) fn lock(path: &Path) -> Result<StoreLock, Error> {
    let lock_path = with_suffix(path, ".lock");
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        // Without `NONBLOCK`, opening a FIFO would block. Without `NOFOLLOW`, the code below could
        // overwrite the target of a symbolic link.
        .custom_flags((OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed())
        .open(&lock_path)
        .map_err(|error| {
            Error::Down(Detail::of_file("cannot open", &lock_path, error).or_remedy(DIRECTORY))
        })?;
    check_lock(&file, &lock_path)?;
    if file.try_lock().is_err() {
        let mut holder = String::new();
        let _unreadable = file.read_to_string(&mut holder);
        return Err(Error::InUse(format!(
            "{} is in use by process {}; stop the broker first, because only one process can use a SQLite database. For \
             a running broker, use the commands of `keybroker client`",
            path.display(),
            holder.trim()
        )));
    }
    note_open_directory(path);
    note_holder(&mut file)
        .map_err(|error| Error::Down(Detail::of_file("cannot write", &lock_path, error)))?;
    Ok(StoreLock { _file: Some(file) })
}

/// Checks the lock file. The broker writes its process id into the lock file, so the lock file must
/// not be a hard link to another file.
fn check_lock(file: &File, path: &Path) -> Result<(), Error> {
    let shown = path.display();
    let meta = file.metadata().map_err(|error| not_examined(path, error))?;
    let ours = rustix::process::geteuid().as_raw();
    let problem = if !meta.is_file() {
        "the path is not a regular file".to_owned()
    } else if meta.nlink() > 1 {
        "the file has more than one hard link, and SQLite would overwrite the file".to_owned()
    } else if is_foreign(meta.uid(), ours) {
        format!("the file belongs to user {}", meta.uid())
    } else {
        return Ok(());
    };
    Err(Error::Down(
        format!("{shown}: {problem}; remove {shown}").into(),
    ))
}

/// Warns if other users can move the database in its directory while the broker is stopped.
fn note_open_directory(path: &Path) {
    if let Err(error) = trusted_file::check_above(path, PLACE) {
        tracing::warn!(
            database = %path.display(), cause = %error,
            "other users of this machine can replace the database while the broker is stopped"
        );
    }
}

fn note_holder(file: &mut File) -> io::Result<()> {
    file.set_len(0)?;
    file.write_all(std::process::id().to_string().as_bytes())
}

#[cfg(test)]
#[path = "../../../../tests/support/src/skip.rs"]
#[allow(
    unreachable_pub,
    reason = "other packages use it as a part of a library"
)]
mod skip;

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, chown, symlink};

    use super::{skip::is_root, *};

    const OTHER_USER: u32 = 65_534;

    #[test]
    fn a_file_is_ours_or_roots() {
        const BROKER: u32 = 990;
        const SOMEBODY: u32 = 1_000;
        assert!(is_foreign(SOMEBODY, BROKER));
        for (owner, ours) in [(BROKER, BROKER), (ROOT, BROKER), (SOMEBODY, ROOT)] {
            assert!(!is_foreign(owner, ours), "{owner} {ours}");
        }
    }

    /// A migrated database in a directory that every user can write to.
    async fn database(folder: &tempfile::TempDir) -> PathBuf {
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o777)).unwrap();
        let path = folder.path().join("keybroker.db");
        migrate(&path, false).await.unwrap();
        path
    }

    fn refusal<T>(result: Result<T, Error>) -> String {
        match result {
            Ok(_) => panic!("not refused"),
            Err(error) => keybroker_core::error::causes(&error),
        }
    }

    /// If another user creates a WAL next to the database, its content is not written into the
    /// database.
    #[tokio::test]
    async fn a_side_file_of_another_user_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = database(&folder).await;
        for suffix in SIDE_FILES {
            let planted = with_suffix(&path, suffix);
            for harm in ["link", "mode", "owner"] {
                match harm {
                    "link" => symlink("/etc/hostname", &planted).unwrap(),
                    _ => fs::write(&planted, b"planted").unwrap(),
                }
                let mode = if harm == "mode" { 0o666 } else { 0o600 };
                if harm != "link" {
                    fs::set_permissions(&planted, fs::Permissions::from_mode(mode)).unwrap();
                }
                if harm == "owner" {
                    if !is_root("a side file of another user") {
                        fs::remove_file(&planted).unwrap();
                        continue;
                    }
                    chown(&planted, Some(OTHER_USER), None).unwrap();
                }
                for refused in [
                    refusal(status(&path).await),
                    refusal(migrate(&path, false).await),
                ] {
                    assert!(
                        refused.contains(planted.to_str().unwrap()),
                        "{harm}: {refused}"
                    );
                }
                fs::remove_file(&planted).unwrap();
            }
        }
        let status = status(&path).await.unwrap();
        assert_eq!(status.current, status.newest);
    }

    /// The lock file cannot be used to overwrite another file of the broker's user.
    #[tokio::test]
    async fn a_lock_that_leads_to_another_file_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = database(&folder).await;
        let (victim, lock_path) = (folder.path().join("victim"), with_suffix(&path, ".lock"));
        fs::write(&victim, b"content").unwrap();
        symlink(&victim, &lock_path).unwrap();
        refusal(lock(&path));
        fs::remove_file(&lock_path).unwrap();
        fs::hard_link(&victim, &lock_path).unwrap();
        assert!(refusal(lock(&path)).contains("hard link"));
        fs::remove_file(&lock_path).unwrap();
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &lock_path,
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::from_raw_mode(0o600),
            0,
        )
        .unwrap();
        assert!(refusal(lock(&path)).contains("regular file"));
        fs::remove_file(&lock_path).unwrap();
        assert_eq!(fs::read(&victim).unwrap(), b"content");
        drop(lock(&path).unwrap());
    }

    /// A database is not created through a symbolic link whose target does not exist.
    #[tokio::test]
    async fn a_database_is_not_made_through_a_link() {
        let folder = tempfile::tempdir().unwrap();
        let (path, target) = (
            folder.path().join("keybroker.db"),
            folder.path().join("target"),
        );
        symlink(&target, &path).unwrap();
        refusal(migrate(&path, false).await);
        assert!(!target.exists());
    }
}
