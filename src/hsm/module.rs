//! The vendor's module: loaded and initialised once per process.

use std::path::Path;

use cryptoki::{
    context::{CInitializeArgs, CInitializeFlags, Pkcs11},
    error::{Error, RvError},
};

use super::classify::{Class, Fault};

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
    if !path.is_file() {
        return Err(unfit(format!(
            "no PKCS#11 module at {shown}: install the vendor's package (Debian: softhsm2) or mend \
             `token.module`"
        )));
    }
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
