//! The vendor's module: loaded and initialised once per process.
//!
//! Mitigation: M15 of `THREAT_MODEL.md`.

use std::{collections::BTreeMap, path::Path};

use cryptoki::{
    context::{CInitializeArgs, CInitializeFlags, Pkcs11},
    error::{Error, RvError},
};

use keybroker_core::trusted_file::{self, Purpose};

use super::classify::{Class, Fault};

const MODULE: Purpose = Purpose::trust("other users could replace the code that is given the PIN");
const ENVIRONMENT: Purpose =
    Purpose::trust("other users could change what the PKCS#11 module reads or loads");

/// Refuses a module that does not exist, or that other users could replace: it is given the PIN.
pub fn check_file(path: &Path) -> Result<(), String> {
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

/// Loads and initialises the module at a path.
pub(super) fn load(path: &Path) -> Result<Pkcs11, Fault> {
    let shown = path.display();
    let unfit = |detail: String| Fault::new(Class::Configuration, detail);
    if !path.is_absolute() {
        return Err(unfit(format!(
            "`token.module` is {shown}: it must be an absolute path, so that no search path decides \
             which library sees the PIN"
        )));
    }
    check_file(path).map_err(unfit)?;
    let module = Pkcs11::new(path).map_err(|error| {
        unfit(format!(
            "{shown} is not a PKCS#11 module that can be loaded: {error}; correct `token.module`"
        ))
    })?;
    // With locking by the operating system: without it SoftHSM crashes as soon as two threads use it.
    let arguments = CInitializeArgs::new(CInitializeFlags::OS_LOCKING_OK);
    match module.initialize(arguments) {
        // Another part of this process was first; the module has one state per process.
        Ok(()) | Err(Error::Pkcs11(RvError::CryptokiAlreadyInitialized, _)) => Ok(module),
        Err(error) => Err(unfit(format!(
            "the module {shown} does not initialise: {error}; look at its own configuration (SoftHSM: \
             SOFTHSM2_CONF in `token.environment`)"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt as _};

    use super::*;

    #[test]
    fn a_module_that_others_can_replace_is_not_loaded() {
        let folder = tempfile::tempdir().unwrap();
        let module = folder.path().join("module.so");
        let problem = check_file(&module).unwrap_err();
        assert!(problem.contains("no PKCS#11 module at"), "{problem}");
        let problem = check_file(folder.path()).unwrap_err();
        assert!(problem.contains("is a directory"), "{problem}");
        fs::write(&module, "").unwrap();
        for (mode, good) in [(0o755, true), (0o644, true), (0o775, false), (0o646, false)] {
            fs::set_permissions(&module, fs::Permissions::from_mode(mode)).unwrap();
            assert_eq!(check_file(&module).is_ok(), good, "{mode:o}");
            let fault = load(&module).unwrap_err();
            assert_eq!(fault.detail.contains("chmod go-w"), !good, "{fault}");
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
