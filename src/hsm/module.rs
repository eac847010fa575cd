//! The vendor's module: loaded and initialised once per process.
//!
//! Mitigation: M15 of `THREAT_MODEL.md`.

use std::{fs, os::unix::fs::MetadataExt as _, path::Path};

use cryptoki::{
    context::{CInitializeArgs, CInitializeFlags, Pkcs11},
    error::{Error, RvError},
};

use super::classify::{Class, Fault};

const WRITABLE_BY_OTHERS: u32 = 0o022;

/// Refuses a module that is not there, or that others could replace: it is given the PIN.
pub fn check_file(path: &Path) -> Result<(), String> {
    let shown = path.display();
    let meta = fs::metadata(path).map_err(|error| {
        format!(
            "no PKCS#11 module at {shown}: {error}; install the vendor's package (Debian: softhsm2) or mend \
             `token.module`"
        )
    })?;
    if !meta.is_file() {
        return Err(format!(
            "no PKCS#11 module at {shown}: it is not a file; mend `token.module`"
        ));
    }
    let mode = meta.mode() & 0o7777;
    if mode & WRITABLE_BY_OTHERS != 0 {
        return Err(format!(
            "the PKCS#11 module {shown} has mode {mode:04o}: others can replace the code that is given the PIN; \
             run `chmod go-w {shown}`"
        ));
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
            "{shown} is not a PKCS#11 module that can be loaded: {error}; mend `token.module`"
        ))
    })?;
    // With locking by the operating system: without it SoftHSM crashes as soon as two threads use it.
    let arguments = CInitializeArgs::new(CInitializeFlags::OS_LOCKING_OK);
    match module.initialize(arguments) {
        // Somebody in this process was first: the state is theirs and ours alike.
        Ok(()) | Err(Error::Pkcs11(RvError::CryptokiAlreadyInitialized, _)) => Ok(module),
        Err(error) => Err(unfit(format!(
            "the module {shown} does not initialise: {error}; look at its own configuration (SoftHSM: \
             SOFTHSM2_CONF in `token.environment`)"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn a_module_that_others_can_replace_is_not_loaded() {
        let folder = tempfile::tempdir().unwrap();
        let module = folder.path().join("module.so");
        for missing in [module.as_path(), folder.path()] {
            let problem = check_file(missing).unwrap_err();
            assert!(problem.contains("no PKCS#11 module at"), "{problem}");
        }
        fs::write(&module, "").unwrap();
        for (mode, good) in [(0o755, true), (0o644, true), (0o775, false), (0o646, false)] {
            fs::set_permissions(&module, fs::Permissions::from_mode(mode)).unwrap();
            assert_eq!(check_file(&module).is_ok(), good, "{mode:o}");
            let fault = load(&module).unwrap_err();
            assert_eq!(fault.detail.contains("chmod go-w"), !good, "{fault}");
        }
    }
}
