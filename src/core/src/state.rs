//! Small facts that one broker instance remembers across restarts, such as that the token rejected the PIN. Each fact is a file
//! of mode 0600 in the directory `state` below the audit directory. A change of a fact replaces the complete file.
//!
//! The directory belongs to one instance: two instances with the same directory would overwrite each other's facts.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Read as _, Write as _},
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use rustix::fs::{FlockOperation, OFlags};
use serde::{Serialize, de::DeserializeOwned};

use crate::remedy::explained;

/// Name of the state directory, which is below the audit directory.
pub const DIRECTORY: &str = "state";
/// Longest fact, in bytes.
const FACT_BYTES_MAX: u64 = 64 * 1024;
const OPEN_TO_OTHERS: u32 = 0o077;
/// Pause between two attempts to take a lock.
const LOCK_PAUSE: Duration = Duration::from_millis(10);

/// Reason why a fact could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file system refused the access, or other users can change the file.
    #[error("{action} {}", path.display())]
    Unusable {
        /// The attempted action, as the first words of a sentence.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause of the failure.
        source: io::Error,
    },
    /// The content of the file cannot be parsed as the expected type of fact.
    #[error("the state file {} is damaged", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// The error of the JSON parser, with the position of the damage.
        source: serde_json::Error,
    },
}

impl Error {
    /// Whether the file could be read, but its content is damaged.
    pub fn is_damaged(&self) -> bool {
        matches!(self, Self::Damaged { .. })
    }
}

/// A lock on a fact. The lock is released when this value is dropped, or by the kernel when the process ends.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

/// The directory of facts. The directory is created when the first fact is written.
#[derive(Clone, Debug)]
pub struct StateDirectory {
    path: PathBuf,
}

impl StateDirectory {
    /// The state directory of the instance that writes its audit log to `audit_directory`.
    pub fn below(audit_directory: &Path) -> Self {
        Self {
            path: audit_directory.join(DIRECTORY),
        }
    }

    /// A state directory whose path another process supplied.
    pub fn at(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
        }
    }

    /// The path of the directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Reads a fact. Returns `None` if the fact was never written. Fails if the file or the
    /// directory belongs to another user or is accessible to others. Also fails if the file is not
    /// a regular file or is longer than 64 KiB.
    pub fn read(&self, name: &str) -> Result<Option<Vec<u8>>, Error> {
        self.read_up_to(name, FACT_BYTES_MAX)
    }

    /// Reads a fact, with the limit `bytes_max` instead of 64 KiB.
    pub fn read_up_to(&self, name: &str, bytes_max: u64) -> Result<Option<Vec<u8>>, Error> {
        let path = self.path.join(name);
        match self.read_file(&path, bytes_max) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(fail("cannot read the state file", &path, source)),
        }
    }

    /// Replaces a fact. After the function returns, the new fact survives a power failure. If the
    /// process crashes before the function returns, the file contains the old or the new fact.
    ///
    /// Fails for a fact of more than 64 KiB, because [`StateDirectory::read`] would refuse the fact.
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<(), Error> {
        self.write_up_to(name, bytes, FACT_BYTES_MAX)
    }

    /// Replaces a fact, with the limit `bytes_max` instead of 64 KiB.
    pub fn write_up_to(&self, name: &str, bytes: &[u8], bytes_max: u64) -> Result<(), Error> {
        let path = self.path.join(name);
        self.write_file(&path, bytes, bytes_max)
            .map_err(|source| fail("cannot write the state file", &path, source))
    }

    /// Returns the names of the facts that begin with `prefix` and end with `suffix`, oldest fact first.
    pub fn names(&self, prefix: &str, suffix: &str) -> Result<Vec<String>, Error> {
        self.list(prefix, suffix)
            .map_err(|source| fail("cannot list the state directory", &self.path, source))
    }

    fn list(&self, prefix: &str, suffix: &str) -> io::Result<Vec<String>> {
        let entries = match fs::read_dir(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries?,
        };
        let mut found = Vec::new();
        for entry in entries {
            let entry = entry?;
            let Ok(name) = entry.file_name().into_string() else {
                continue;
            };
            if name.starts_with(prefix) && name.ends_with(suffix) {
                found.push((entry.metadata()?.modified()?, name));
            }
        }
        found.sort();
        Ok(found.into_iter().map(|(_, name)| name).collect())
    }

    /// Reads a fact that is stored as JSON. Fails like [`StateDirectory::read`], and with [`Error::Damaged`] if the content is
    /// not a fact of this type.
    pub fn read_json<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>, Error> {
        let Some(bytes) = self.read(name)? else {
            return Ok(None);
        };
        serde_json::from_slice(&bytes)
            .map(Some)
            .map_err(|source| self.damaged(name, source))
    }

    /// Replaces a fact that is stored as JSON, like [`StateDirectory::write`].
    pub fn write_json<T: Serialize>(&self, name: &str, fact: &T) -> Result<(), Error> {
        let bytes = serde_json::to_vec(fact).map_err(|source| self.damaged(name, source))?;
        self.write(name, &bytes)
    }

    fn damaged(&self, name: &str, source: serde_json::Error) -> Error {
        Error::Damaged {
            path: self.path.join(name),
            source,
        }
    }

    /// Removes a fact. Succeeds if the fact does not exist.
    pub fn remove(&self, name: &str) -> Result<(), Error> {
        let path = self.path.join(name);
        match fs::remove_file(&path).and_then(|()| sync(&self.path)) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(fail("cannot remove the state file", &path, source))
            }
            _ => Ok(()),
        }
    }

    /// Takes a lock that excludes other processes, so that this process can read a stored fact and
    /// then replace this fact. Waits at most `timeout`.
    pub fn lock(&self, name: &str, timeout: Duration) -> Result<Lock, Error> {
        let path = self.path.join(name);
        self.lock_file(&path, timeout)
            .map(|file| Lock { _file: file })
            .map_err(|source| fail("cannot lock the state file", &path, source))
    }

    fn lock_file(&self, path: &Path, timeout: Duration) -> io::Result<File> {
        self.prepare()?;
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(OFlags::NOFOLLOW.bits().cast_signed())
            .open(path)?;
        check(&file.metadata()?)?;
        let until = Instant::now() + timeout;
        loop {
            match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(file),
                Err(rustix::io::Errno::WOULDBLOCK) if Instant::now() < until => {
                    thread::sleep(LOCK_PAUSE);
                }
                Err(rustix::io::Errno::WOULDBLOCK) => {
                    return Err(io::Error::other("another process holds the lock"));
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Creates the state directory and, if necessary, the audit directory above it.
    fn prepare(&self) -> io::Result<()> {
        if let Some(parent) = self.path.parent() {
            make(parent)?;
            // A command that another user runs must not create a directory that the broker cannot use.
            let owner = fs::metadata(parent)?.uid();
            if owner != rustix::process::geteuid().as_raw() {
                return Err(io::Error::other(format!(
                    "{} belongs to user {owner}; run the command as user {owner}",
                    parent.display()
                )));
            }
        }
        make(&self.path)?;
        check(&fs::metadata(&self.path)?)
    }

    fn read_file(&self, path: &Path, bytes_max: u64) -> io::Result<Vec<u8>> {
        check(&fs::metadata(&self.path)?)?;
        // With `NONBLOCK`, the open does not block if the path leads to a FIFO.
        let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(flags.bits().cast_signed())
            .open(path)?;
        let meta = file.metadata()?;
        if !meta.is_file() {
            return Err(io::Error::other("the path is not a regular file"));
        }
        check(&meta)?;
        if meta.len() > bytes_max {
            let kib = bytes_max / 1024;
            return Err(io::Error::other(format!(
                "the file is longer than {kib} KiB"
            )));
        }
        let mut bytes = Vec::new();
        file.take(bytes_max).read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    fn write_file(&self, path: &Path, bytes: &[u8], bytes_max: u64) -> io::Result<()> {
        if u64::try_from(bytes.len()).is_ok_and(|length| length > bytes_max) {
            let kib = bytes_max / 1024;
            return Err(io::Error::other(format!(
                "the content of the state file is longer than {kib} KiB"
            )));
        }
        self.prepare()?;
        let unfinished = path.with_extension(format!("{}.tmp", std::process::id()));
        // Remove the temporary file of an earlier process that had the same process id and was
        // killed during a write.
        fs::remove_file(&unfinished).ok();
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&unfinished)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&unfinished, path)?;
        sync(&self.path)
    }
}

fn fail(action: &'static str, path: &Path, source: io::Error) -> Error {
    Error::Unusable {
        action,
        path: path.to_owned(),
        source: explained(path, source),
    }
}

fn check(meta: &fs::Metadata) -> io::Result<()> {
    let ours = rustix::process::geteuid().as_raw();
    if meta.uid() == ours && meta.mode() & OPEN_TO_OTHERS == 0 {
        return Ok(());
    }
    let what = if meta.is_dir() { "directory" } else { "file" };
    let remedy = if meta.uid() == ours {
        let mode = if meta.is_dir() { "0700" } else { "0600" };
        format!("other users can access the {what}; set the mode of the {what} to {mode}")
    } else {
        format!(
            "the {what} belongs to user {}, and this process runs as user {ours}; run the command as user {}",
            meta.uid(),
            meta.uid()
        )
    };
    Err(io::Error::other(format!(
        "mode {:04o}, owner {}: {remedy}",
        meta.mode() & 0o7777,
        meta.uid()
    )))
}

fn make(directory: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(0o700).create(directory) {
        Ok(()) => sync(directory.parent().unwrap_or(Path::new("."))),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(error),
    }
}

fn sync(directory: &Path) -> io::Result<()> {
    File::open(directory)?.sync_all()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn a_fact_is_replaced_whole_and_removed() {
        let audit = tempfile::tempdir().unwrap();
        let state = StateDirectory::below(audit.path());
        assert_eq!(state.read("pin").unwrap(), None);
        state.remove("pin").unwrap();
        state.write("pin", b"a longer fact").unwrap();
        state.write("pin", b"short").unwrap();
        assert_eq!(state.read("pin").unwrap().unwrap(), b"short");
        assert_eq!(
            fs::read_dir(audit.path().join(DIRECTORY)).unwrap().count(),
            1
        );
        state.remove("pin").unwrap();
        assert_eq!(state.read("pin").unwrap(), None);
    }

    #[test]
    fn a_fact_of_the_wrong_form_is_damaged_and_can_be_replaced() {
        let audit = tempfile::tempdir().unwrap();
        let state = StateDirectory::below(audit.path());
        assert_eq!(state.read_json::<u64>("mark").unwrap(), None);
        for damaged in [&b""[..], b"{", b"\"text\"", b"\xff"] {
            state.write("mark", damaged).unwrap();
            let error = state.read_json::<u64>("mark").unwrap_err();
            assert!(error.is_damaged(), "{error}");
            assert!(error.to_string().contains("state/mark"), "{error}");
        }
        state.write_json("mark", &7).unwrap();
        assert_eq!(state.read_json::<u64>("mark").unwrap(), Some(7));
        let unreadable = state.write("mark", &vec![0; 64 * 1024 + 1]).unwrap_err();
        assert!(!unreadable.is_damaged(), "{unreadable}");
        assert_eq!(state.read_json::<u64>("mark").unwrap(), Some(7));
    }

    #[test]
    fn facts_are_found_by_the_ends_of_their_names() {
        let audit = tempfile::tempdir().unwrap();
        let state = StateDirectory::below(audit.path());
        assert_eq!(state.names("list-", ".der").unwrap(), [""; 0]);
        let long = vec![7; 64 * 1024 + 1];
        for name in ["list-a.der", "list-a.json", "other.der"] {
            state.write_up_to(name, &long, 65 * 1024).unwrap();
        }
        assert_eq!(state.names("list-", ".der").unwrap(), ["list-a.der"]);
        let read = state.read_up_to("list-a.der", 65 * 1024).unwrap();
        assert_eq!(read, Some(long));
        state.read("list-a.der").unwrap_err();
    }

    #[test]
    fn a_lock_is_held_by_one() {
        let folder = tempfile::tempdir().unwrap();
        // The audit directory is created together with the state directory.
        let state = StateDirectory::below(&folder.path().join("audit"));
        let held = state.lock("lock", Duration::ZERO).unwrap();
        state.lock("lock", Duration::ZERO).unwrap_err();
        drop(held);
        state.lock("lock", Duration::ZERO).unwrap();
    }

    #[test]
    fn a_fact_that_others_can_change_is_refused() {
        let audit = tempfile::tempdir().unwrap();
        let state = StateDirectory::below(audit.path());
        state.write("pin", b"fact").unwrap();
        let directory = audit.path().join(DIRECTORY);
        let file = directory.join("pin");
        for path in [&file, &directory] {
            let mode = fs::metadata(path).unwrap().permissions().mode();
            fs::set_permissions(path, fs::Permissions::from_mode(mode | 0o020)).unwrap();
            state.read("pin").unwrap_err();
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
            state.read("pin").unwrap();
        }
        fs::remove_file(&file).unwrap();
        std::os::unix::fs::symlink("/etc/hostname", &file).unwrap();
        state.read("pin").unwrap_err();
        fs::remove_file(&file).unwrap();
        fs::write(&file, vec![0; 64 * 1024 + 1]).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
        state.read("pin").unwrap_err();
    }
}
