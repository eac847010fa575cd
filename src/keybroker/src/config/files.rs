//! The files that a configuration names: present, complete, and safe from changes by other users.

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use rustix::fs::{Access, access};

use keybroker_auth::{issuer, token::Tokens};
use keybroker_core::trusted_file;
use keybroker_hsm as hsm;
use keybroker_hsm::Pin;
use keybroker_policy::Problems;

use super::Config;

/// What an examination of the files found.
#[derive(Debug, Default)]
pub struct FileReport {
    /// Everything that is wrong, each with its remedy.
    pub problems: Vec<String>,
    /// How much each PEM file gave, and which secrets a group can read.
    pub notes: Vec<String>,
}

impl Config {
    /// Examines the files. Reads them as `serve` would, and changes nothing.
    pub fn examine_files(&self) -> FileReport {
        let mut report = FileReport::default();
        let problems = &mut report.problems;
        let module = hsm::check_module(&self.token.module);
        problems.extend(module.err().map(|what| format!("[token] `module`: {what}")));
        problems.extend(hsm::check_environment(&self.token.environment).err());
        if let Some(path) = &self.token.pin_file {
            problems.extend(Pin::from_file(path).err());
        }
        if let Some(path) = self.store.file() {
            problems.extend(check_database(&path).err());
        }
        problems.extend(self.store.file_problems());
        problems.extend(check_audit(&self.audit.directory).err());
        if let Err(Problems(more)) = self.policy.check() {
            problems.extend(more.iter().map(|what| format!("[policy]: {what}")));
        }
        // What is wrong with them beside their files was said already.
        if issuer::problems(&self.issuers).is_empty() {
            problems.extend(Tokens::new(&self.issuers).err());
        }
        for listener in &self.listeners {
            let address = listener.address;
            match listener.check_tls() {
                Ok(Some(contents)) => {
                    let note = format!("[[listener]] {address}: {contents}");
                    report.notes.push(note);
                }
                Ok(None) => {}
                Err(what) => problems.push(format!("[[listener]] {address}: {what}")),
            }
        }
        if let Some(remote) = &self.status.remote {
            let name = format!("[status.remote] {}", remote.address);
            match remote.check_tls() {
                Ok(Some(contents)) => report.notes.push(format!("{name}: {contents}")),
                Ok(None) => {}
                Err(what) => problems.push(format!("{name}: {what}")),
            }
        }
        if let Some(count) = self.store.authorities_count() {
            let what = if count == 1 {
                "authority"
            } else {
                "authorities"
            };
            let note = format!("[store] `ca_file`: {count} {what}");
            report.notes.push(note);
        }
        if rustix::process::geteuid().is_root() {
            report.notes.extend(self.secrets_of_groups());
        }
        report
    }

    /// The secrets that the group of root's file can read. A broker that runs as root needs no such group.
    fn secrets_of_groups(&self) -> Vec<String> {
        let keys = self
            .listeners
            .iter()
            .filter_map(|listener| listener.tls.as_ref());
        let secrets = keys
            .map(|tls| &tls.key_file)
            .chain(&self.token.pin_file)
            .chain(&self.store.password_file);
        secrets
            .filter_map(|path| Some((path, trusted_file::reading_group(path)?)))
            .map(|(path, group)| {
                format!(
                    "{}: group {group} can read this secret; root does not need the group, so use mode 0600 unless the broker runs as a \
                     user of that group",
                    path.display()
                )
            })
            .collect()
    }
}

/// SQLite makes files of its own beside the database, so the folder must be writable, too.
fn check_database(path: &Path) -> Result<(), String> {
    let folder = path.parent().unwrap_or(path);
    check_writable("[store] `url`", folder)?;
    if path.exists() && access(path, Access::READ_OK | Access::WRITE_OK).is_err() {
        let shown = path.display();
        return Err(format!(
            "[store] `url`: this user cannot read and write {shown}"
        ));
    }
    Ok(())
}

/// The directory is made when it is missing and the one above it is there.
fn check_audit(directory: &Path) -> Result<(), String> {
    let name = "[audit] `directory`";
    if !directory.exists() {
        let above = directory.parent().map(PathBuf::from).unwrap_or_default();
        return check_writable(name, &above);
    }
    check_writable(name, directory)?;
    let meta = fs::metadata(directory).map_err(|error| format!("{name}: {error}"))?;
    let (mode, ours) = (meta.mode() & 0o7777, rustix::process::geteuid().as_raw());
    if mode & 0o077 != 0 || meta.uid() != ours {
        let shown = directory.display();
        return Err(format!(
            "{name}: {shown} has mode {mode:04o} and belongs to user {}; it must have mode 0700 and belong to \
             user {ours}",
            meta.uid()
        ));
    }
    Ok(())
}

fn check_writable(name: &str, folder: &Path) -> Result<(), String> {
    let shown = folder.display();
    if !folder.is_dir() {
        return Err(format!(
            "{name}: there is no directory {shown}; make it, owned by the broker's user"
        ));
    }
    access(folder, Access::WRITE_OK | Access::EXEC_OK).map_err(|error| {
        format!("{name}: this user cannot write to {shown}: {error}; change its owner or mode")
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn a_folder_that_is_missing_is_reported() {
        let folder = tempfile::tempdir().unwrap();
        let missing = folder.path().join("no/such");
        assert!(
            check_database(&missing.join("x.db"))
                .unwrap_err()
                .contains("no directory")
        );
        assert!(check_audit(&missing).unwrap_err().contains("no directory"));
        assert_eq!(check_database(&folder.path().join("x.db")), Ok(()));
        assert_eq!(check_audit(&folder.path().join("audit")), Ok(()));
    }

    #[test]
    fn an_audit_directory_open_to_others_is_reported() {
        let folder = tempfile::tempdir().unwrap();
        for (mode, good) in [(0o700, true), (0o750, false), (0o701, false)] {
            fs::set_permissions(folder.path(), fs::Permissions::from_mode(mode)).unwrap();
            assert_eq!(check_audit(folder.path()).is_ok(), good, "{mode:o}");
        }
    }
}
