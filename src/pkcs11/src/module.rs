//! Loads and initialises the vendor's module, once per process.
//!
//! Mitigation: M15 of `THREAT_MODEL.md`.

use std::{
    collections::BTreeMap,
    ffi::CString,
    path::Path,
    time::{Duration, Instant},
};

use cryptoki::error::{Error, RvError};

use keybroker_pkcs11_ffi::Module;
use keybroker_worker_protocol::{Settings, check_module, softhsm_problem};

use crate::{
    calling,
    classify::{Class, Fault},
};

/// Loads and initialises the configured module.
pub(super) fn load(settings: &Settings) -> Result<Module, Fault> {
    load_timed(settings).map(|(module, _)| module)
}

/// Loads and initialises the configured module. Returns the module and the duration of `C_Initialize`.
pub(super) fn load_timed(settings: &Settings) -> Result<(Module, Duration), Fault> {
    let path = settings.module.as_path();
    let shown = path.display();
    let unfit = |detail: String| Fault::new(Class::NoToken, detail);
    if !path.is_absolute() {
        return Err(unfit(format!(
            "`token.module` is {shown}, which is not an absolute path; use an absolute path, so that no search path \
             determines which library receives the PIN"
        )));
    }
    check_module(path).map_err(|error| unfit(error.to_string()))?;
    calling::next("dlopen");
    let mut module = Module::load(path).map_err(|error| {
        unfit(format!(
            "{shown} is not a PKCS#11 module: it cannot be loaded, or it has no C_GetFunctionList ({error}); correct \
             `token.module`"
        ))
    })?;
    let reserved =
        match &settings.initialize_string {
            None => None,
            Some(text) => Some(CString::new(text.as_str()).map_err(|_| {
                unfit("`token.initialize_string` contains a NUL character".to_owned())
            })?),
        };
    calling::next("C_Initialize");
    let began = Instant::now();
    match module.initialize(reserved) {
        // Other code in this process has already initialised the module. All code in a process
        // shares the state of a module.
        Ok(()) | Err(Error::Pkcs11(RvError::CryptokiAlreadyInitialized, _)) => {
            Ok((module, began.elapsed()))
        }
        Err(error) => {
            let hint = match error {
                Error::Pkcs11(RvError::ArgumentsBad, _) => arguments_hint(settings).to_owned(),
                _ => configuration_hint(path),
            };
            Err(unfit(format!(
                "the PKCS#11 module {shown} cannot be initialised ({}): {hint}",
                Fault::from(error)
            )))
        }
    }
}

fn configuration_hint(path: &Path) -> String {
    let environment: BTreeMap<String, String> = std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .collect();
    softhsm_problem(path, &environment).unwrap_or_else(|| {
        "check the module's own configuration and [token.environment], which is the complete environment of the \
         module".to_owned()
    })
}

/// Explains a rejection of the arguments of `C_Initialize`. Of the arguments of `C_Initialize`,
/// only the string can be configured.
fn arguments_hint(settings: &Settings) -> &'static str {
    if settings.initialize_string.is_some() {
        "the module expects another string, or none, in `token.initialize_string`"
    } else {
        "some modules (NSS) need a string in `token.initialize_string`; the vendor's manual describes this string"
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
            let fault = load(&Settings {
                module: module.clone(),
                ..crate::tests::settings()
            })
            .unwrap_err();
            assert_eq!(
                fault.detail.contains("chmod go-w"),
                !good,
                "{mode:o}: {fault}"
            );
        }
    }
}
