//! Examines the files that a configuration names: whether the files exist, are valid, and cannot be
//! changed by other users.

use std::{
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use rustix::fs::{Access, access};

use keybroker_auth::{issuer, sign_in, token::Tokens};
use keybroker_core::{error::chain, remedy::explained, trusted_file};
use keybroker_hsm::Settings;
use keybroker_policy::Problems;
use keybroker_worker_protocol::{
    Pin, check_environment, check_module, integrity_file::IntegrityFiles,
};

use super::{
    Config, FileReport, bitwarden, certificates, check_token::integrity_key_problems, notices,
};

impl Config {
    /// Examines the files of the configuration. Reads the files in the same way as `serve`, and
    /// changes nothing.
    pub fn examine_files(&self) -> FileReport {
        let mut report = FileReport::default();
        let problems = &mut report.problems;
        problems.extend(self.tokens.problems_of_each(token_files));
        if let Some(path) = self.store.file() {
            problems.extend(check_database(&path).err().map(|error| chain(&error)));
        }
        problems.extend(self.store.file_problems());
        let organizations = &self.bitwarden_organizations;
        problems.extend(
            organizations
                .iter()
                .flat_map(bitwarden::Settings::file_problems),
        );
        let receiver = self.notices.as_ref();
        problems.extend(receiver.and_then(notices::Settings::file_problem));
        problems.extend(
            check_audit(&self.audit.directory)
                .err()
                .map(|error| chain(&error)),
        );
        if let Err(Problems(more)) = self.policy.check() {
            problems.extend(more.iter().map(|what| format!("[policy]: {what}")));
        }
        // Policies that cannot be loaded were already reported above.
        report
            .notes
            .extend(self.unknown_principals().into_iter().flatten());
        report.notes.extend(self.policy.ignored_files());
        report.notes.extend(issuer::remarks(&self.issuers));
        let problems = &mut report.problems;
        // Other problems of the issuers are reported as problems of the settings.
        if issuer::problems(&self.issuers).is_empty() {
            match Tokens::new(&self.issuers) {
                Ok(tokens) => problems.extend(self.client_secret_problem(&tokens)),
                Err(error) => problems.push(chain(&error)),
            }
        }
        self.examine_certificates(&mut report);
        self.examine_listeners(&mut report);
        let problems = &mut report.problems;
        if let Some(remote) = &self.status.remote {
            let name = format!("[status.remote] {}", remote.address);
            match remote.check_tls() {
                Ok(Some(contents)) => report.notes.push(format!("{name}: {contents}")),
                Ok(None) => {}
                Err(error) => problems.push(format!("{name}: {}", chain(&error))),
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
        report.problems = join_listeners(report.problems);
        report
    }

    /// Examines the TLS files of the listeners.
    fn examine_listeners(&self, report: &mut FileReport) {
        let problems = &mut report.problems;
        for listener in &self.listeners {
            let address = listener.address;
            match listener.check_tls() {
                Ok(Some(contents)) => {
                    let note = format!("[[listener]] {address}: {contents}");
                    report.notes.push(note);
                }
                Ok(None) => {}
                Err(error) => {
                    problems.push(format!("[[listener]] {address}: {}", chain(&error)));
                }
            }
        }
    }

    /// The problem of the file with the client secret of the page for approvers. Other problems of the section are reported as
    /// problems of the settings.
    fn client_secret_problem(&self, tokens: &Tokens) -> Option<String> {
        let console = self.console.as_ref()?;
        if !console.problems(&self.issuers).is_empty() {
            return None;
        }
        let error = sign_in::Provider::new(tokens, console.registration()).err()?;
        Some(format!("[console]: {}", chain(&error)))
    }

    /// Examines the certificates of listeners, and the CA certificates of issuers and of the database.
    fn examine_certificates(&self, report: &mut FileReport) {
        for listener in &self.listeners {
            certificates::examine(listener, report);
        }
        for issuer in &self.issuers {
            if let Some(path) = &issuer.ca_file {
                let setting = format!("[[issuer]] {}: `ca_file`", issuer.name);
                certificates::examine_authorities(&setting, path, report);
            }
        }
        for organization in &self.bitwarden_organizations {
            if let Some(path) = &organization.ca_file {
                let setting = format!("{}: `ca_file`", organization.place());
                certificates::examine_authorities(&setting, path, report);
            }
        }
        let receiver = self.notices.as_ref();
        if let Some(path) = receiver.and_then(|receiver| receiver.ca_file.as_ref()) {
            certificates::examine_authorities("[notices] `ca_file`", path, report);
        }
        if let Some(path) = &self.store.ca_file {
            certificates::examine_authorities("[store] `ca_file`", path, report);
        }
    }

    /// Notes about secrets that a group can read. If the broker runs as root, no group needs to
    /// read its secrets.
    fn secrets_of_groups(&self) -> Vec<String> {
        let keys = self
            .listeners
            .iter()
            .filter_map(|listener| listener.tls.as_ref());
        let pin_files = self
            .tokens
            .all()
            .iter()
            .filter_map(|token| token.pin_file.as_ref());
        let secrets = keys
            .map(|tls| &tls.key_file)
            .chain(pin_files)
            .chain(&self.store.password_file)
            .chain(self.notices.as_ref().map(|notices| &notices.secret_file))
            .chain(
                self.console
                    .as_ref()
                    .and_then(|console| console.client_secret_file.as_ref()),
            )
            .chain(
                self.bitwarden_organizations
                    .iter()
                    .map(|it| &it.client_secret_file),
            );
        secrets
            .filter_map(|path| Some((path, trusted_file::reading_group(path)?)))
            .map(|(path, group)| {
                format!(
                    "{}: group {group} can read this secret; set mode 0600, unless the broker runs as a user of this \
                     group",
                    path.display()
                )
            })
            .collect()
    }
}

/// Examines the files of one token.
fn token_files(token: &Settings) -> Vec<String> {
    let mut problems = Vec::new();
    // A relative path is reported as a problem of the settings.
    if token.module.is_absolute() {
        let module = check_module(&token.module);
        problems.extend(module.err().map(|what| format!("[token] `module`: {what}")));
    }
    let environment = check_environment(&token.environment);
    problems.extend(environment.err().map(|error| error.to_string()));
    problems.extend(integrity_file_problems(token));
    let pin_file = token.pin_file.as_ref();
    if let Some(path) = pin_file.filter(|path| trusted_file::is_absolute(path)) {
        problems.extend(Pin::from_file(path).err().map(|error| error.to_string()));
    }
    problems
}

/// Returns the problems of integrity key files. Another function reports problems of the settings
/// for integrity key files.
fn integrity_file_problems(token: &Settings) -> Vec<String> {
    let is_set_well = integrity_key_problems(token).is_empty();
    match IntegrityFiles::permitted(token) {
        Ok(Some(files)) if is_set_well => {
            files.problems().iter().map(ToString::to_string).collect()
        }
        _ => Vec::new(),
    }
}

const LISTENER: &str = "[[listener]] ";

/// Merges equal problems of several listeners into one problem, because listeners often use the
/// same files.
fn join_listeners(problems: Vec<String>) -> Vec<String> {
    let parts = |problem: &str| {
        let (address, what) = problem.strip_prefix(LISTENER)?.split_once(": ")?;
        Some((address.to_owned(), what.to_owned()))
    };
    let mut joined: Vec<String> = Vec::new();
    for problem in problems {
        let same = parts(&problem).and_then(|(address, what)| {
            let earlier = joined
                .iter_mut()
                .find_map(|one| Some((parts(one).filter(|(_, other)| *other == what)?.0, one)));
            earlier.map(|(addresses, one)| {
                *one = format!("{LISTENER}{addresses}, {address}: {what}");
            })
        });
        if same.is_none() {
            joined.push(problem);
        }
    }
    joined
}

/// An error that prevents the use of a configured file or directory.
#[derive(Debug, thiserror::Error)]
enum Unusable {
    #[error("{setting}: there is no directory {}; create it with the broker's user as the owner", path.display())]
    Missing {
        setting: &'static str,
        path: PathBuf,
    },
    #[error("{setting}: the user of this process cannot write to {}", path.display())]
    NotWritable {
        setting: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("{setting}: the user of this process cannot read and write {}", path.display())]
    NotAccessible {
        setting: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("{setting}: cannot examine {}", path.display())]
    NotExamined {
        setting: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error(
        "{setting}: {} belongs to user {owner}, but this process runs as user {ours}; run the command as user {owner}, \
         or change the owner to user {ours}",
        path.display()
    )]
    Foreign {
        setting: &'static str,
        path: PathBuf,
        owner: u32,
        ours: u32,
    },
    #[error("{setting}: {} has mode {mode:04o}, so other users can access it; run `chmod 700 {}`", path.display(), path.display())]
    OpenToOthers {
        setting: &'static str,
        path: PathBuf,
        mode: u32,
    },
}

/// Checks the database file and its directory. The directory must be writable, because SQLite creates files next to the
/// database.
fn check_database(path: &Path) -> Result<(), Unusable> {
    let setting = "[store] `url`";
    let folder = path.parent().unwrap_or(path);
    check_writable(setting, folder)?;
    if !path.exists() {
        return Ok(());
    }
    access(path, Access::READ_OK | Access::WRITE_OK).map_err(|source| Unusable::NotAccessible {
        setting,
        path: path.to_owned(),
        source: explained(path, source.into()),
    })
}

/// Checks the audit directory. The broker creates the audit directory if the parent directory exists.
fn check_audit(directory: &Path) -> Result<(), Unusable> {
    let setting = "[audit] `directory`";
    if !directory.exists() {
        let above = directory.parent().map(PathBuf::from).unwrap_or_default();
        return check_writable(setting, &above);
    }
    let path = directory.to_owned();
    let meta = match fs::metadata(directory) {
        Ok(meta) => meta,
        Err(source) => {
            return Err(Unusable::NotExamined {
                setting,
                path,
                source,
            });
        }
    };
    let (mode, owner) = (meta.mode() & 0o7777, meta.uid());
    let ours = rustix::process::geteuid().as_raw();
    if owner != ours {
        return Err(Unusable::Foreign {
            setting,
            path,
            owner,
            ours,
        });
    }
    if mode & 0o077 != 0 {
        return Err(Unusable::OpenToOthers {
            setting,
            path,
            mode,
        });
    }
    check_writable(setting, directory)
}

fn check_writable(setting: &'static str, folder: &Path) -> Result<(), Unusable> {
    let path = folder.to_owned();
    if !folder.is_dir() {
        return Err(Unusable::Missing { setting, path });
    }
    access(folder, Access::WRITE_OK | Access::EXEC_OK).map_err(|source| Unusable::NotWritable {
        setting,
        path,
        source: explained(folder, source.into()),
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
                .to_string()
                .contains("no directory")
        );
        assert!(
            check_audit(&missing)
                .unwrap_err()
                .to_string()
                .contains("no directory")
        );
        check_database(&folder.path().join("x.db")).unwrap();
        check_audit(&folder.path().join("audit")).unwrap();
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
