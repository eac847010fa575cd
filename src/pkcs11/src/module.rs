//! Loads and initialises the vendor's module, once per process.
//!
//! Mitigation: M15 of `THREAT_MODEL.md`.

use std::{collections::BTreeMap, path::Path};

use cryptoki::{
    context::{CInitializeArgs, CInitializeFlags, Pkcs11},
    error::{Error, RvError},
};

use keybroker_worker_protocol::{check_module, softhsm_problem};

use crate::{
    calling,
    classify::{Class, Fault},
};

/// Loads and initialises the module at a path.
pub(super) fn load(path: &Path) -> Result<Pkcs11, Fault> {
    let shown = path.display();
    let unfit = |detail: String| Fault::new(Class::NoToken, detail);
    if !path.is_absolute() {
        return Err(unfit(format!(
            "`token.module` is {shown}: it must be an absolute path, so that no search path decides \
             which library sees the PIN"
        )));
    }
    check_module(path).map_err(|error| unfit(error.to_string()))?;
    calling::next("dlopen");
    let module = Pkcs11::new(path).map_err(|error| {
        unfit(format!(
            "{shown} is not a PKCS#11 module: it cannot be loaded, or it has no C_GetFunctionList ({error}); correct \
             `token.module`"
        ))
    })?;
    // With locking by the operating system: without it SoftHSM crashes as soon as two threads use it.
    let arguments = CInitializeArgs::new(CInitializeFlags::OS_LOCKING_OK);
    calling::next("C_Initialize");
    match module.initialize(arguments) {
        // Another part of this process was first; the module has one state per process.
        Ok(()) | Err(Error::Pkcs11(RvError::CryptokiAlreadyInitialized, _)) => Ok(module),
        Err(error) => {
            let fault = Fault::from(error);
            let environment: BTreeMap<String, String> = std::env::vars_os()
                .filter_map(|(name, value)| {
                    Some((name.into_string().ok()?, value.into_string().ok()?))
                })
                .collect();
            let hint = softhsm_problem(path, &environment).unwrap_or_else(|| {
                "check the module's own configuration and [token.environment], which is the whole environment of the module".to_owned()
            });
            Err(unfit(format!(
                "the PKCS#11 module {shown} does not initialise ({fault}): {hint}"
            )))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt as _};

    use super::*;

    #[test]
    fn a_module_that_other_users_can_replace_is_not_loaded() {
        let folder = tempfile::tempdir().unwrap();
        let module = folder.path().join("module.so");
        fs::write(&module, "").unwrap();
        for (mode, good) in [(0o755, true), (0o644, true), (0o775, false), (0o646, false)] {
            fs::set_permissions(&module, fs::Permissions::from_mode(mode)).unwrap();
            let fault = load(&module).unwrap_err();
            assert_eq!(
                fault.detail.contains("chmod go-w"),
                !good,
                "{mode:o}: {fault}"
            );
        }
    }
}
