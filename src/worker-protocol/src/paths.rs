//! Checks of the files that the settings name: other users must not be able to change them.
//!
//! Mitigation: M15 of `THREAT_MODEL.md`.

use std::{collections::BTreeMap, path::Path};

use keybroker_core::trusted_file::{self, Purpose};

const MODULE: Purpose = Purpose::trust("other users could replace the code that is given the PIN");
const ENVIRONMENT: Purpose =
    Purpose::trust("other users could change what the PKCS#11 module reads or loads");

/// Refuses a module that does not exist, or that other users could replace: it is given the PIN.
pub fn check_module(path: &Path) -> Result<(), String> {
    match trusted_file::open(path, MODULE) {
        // The loader opens the path again. That is no race: only root and this user can change what it leads to.
        Ok(_) => Ok(()),
        Err(error) if error.is_missing() => Err(format!(
            "no PKCS#11 module at {}: {error}; install the vendor's package (Debian: softhsm2) or correct `token.module`",
            path.display()
        )),
        Err(error) => Err(format!("the PKCS#11 module: {error}")),
    }
}

/// Refuses files and directories of `token.environment` that other users could change, such as the file of
/// `SOFTHSM2_CONF`: modules read from them where their keys are, or load further code. A value counts when it is the absolute
/// path of something that exists, or a list of such paths separated by colons (`LD_LIBRARY_PATH`).
pub fn check_environment(environment: &BTreeMap<String, String>) -> Result<(), String> {
    for (name, value) in environment {
        let whole = Path::new(value);
        let parts: Vec<&Path> = if whole.exists() {
            vec![whole]
        } else {
            value.split(':').map(Path::new).collect()
        };
        for path in parts.into_iter().filter(|path| path.is_absolute()) {
            trusted_file::check_if_present(path, ENVIRONMENT)
                .map_err(|error| format!("[token.environment] {name}: {error}"))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt as _};

    use super::*;

    #[test]
    fn a_module_that_other_users_can_replace_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let module = folder.path().join("module.so");
        let problem = check_module(&module).unwrap_err();
        assert!(problem.contains("no PKCS#11 module at"), "{problem}");
        let problem = check_module(folder.path()).unwrap_err();
        assert!(problem.contains("is a directory"), "{problem}");
        fs::write(&module, "").unwrap();
        for (mode, good) in [(0o755, true), (0o644, true), (0o775, false), (0o646, false)] {
            fs::set_permissions(&module, fs::Permissions::from_mode(mode)).unwrap();
            assert_eq!(check_module(&module).is_ok(), good, "{mode:o}");
        }
    }

    #[test]
    fn what_the_environment_of_the_module_names_cannot_be_changed_by_others() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("softhsm2.conf");
        fs::write(&file, "").unwrap();
        let shown = file.display().to_string();
        let check = |value: &str| {
            check_environment(&BTreeMap::from([("VARIABLE".to_owned(), value.to_owned())]))
        };
        let list = format!("/usr/lib:{shown}");
        for value in [shown.as_str(), &list, "/nowhere", "text", "/dev/null", ""] {
            check(value).unwrap();
        }
        fs::set_permissions(&file, fs::Permissions::from_mode(0o664)).unwrap();
        for value in [shown.as_str(), &list] {
            let problem = check(value).unwrap_err();
            assert!(
                problem.contains("VARIABLE") && problem.contains("chmod go-w"),
                "{problem}"
            );
        }
    }
}
