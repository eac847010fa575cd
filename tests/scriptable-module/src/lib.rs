//! A PKCS#11 module that forwards every call to a real module and misbehaves as a script says. The README explains how to
//! use it and lists the settings of a script.
//!
//! `functions` is the table of all functions; each runs through `call::run`, which counts it and applies the rules of the
//! script. What a rule cannot express is in `token`, `sessions`, `login`, `limits` and `objects`.

#![warn(clippy::missing_safety_doc)]

mod call;
mod control;
mod functions;
mod limits;
mod login;
mod names;
mod objects;
mod process;
mod real;
mod script;
mod sessions;
mod shared;
mod tables;
mod token;

use cryptoki_sys::{
    CK_FLAGS, CK_FUNCTION_LIST, CK_INTERFACE, CK_RV, CK_ULONG, CK_UTF8CHAR, CK_VERSION,
    CKR_ARGUMENTS_BAD, CKR_BUFFER_TOO_SMALL, CKR_GENERAL_ERROR, CKR_OK,
};

pub use names::return_code_name;
pub use script::{BEHAVIOURS, Evidence, Profile, check};
pub use shared::{Count, counts};

/// Environment variable with the path of the script, or of a directory with a script named [`SCRIPT_FILE`].
pub const SCRIPT_VARIABLE: &str = "SCRIPTABLE_PKCS11_SCRIPT";
/// Environment variable with the path of the real module, for scripts that do not name one.
pub const MODULE_VARIABLE: &str = "SCRIPTABLE_PKCS11_MODULE";
/// The name of a script in a directory.
pub const SCRIPT_FILE: &str = "script.toml";
/// In the state directory: the log of calls, `PID FUNCTION begins` and `PID FUNCTION ends CODE`.
pub const CALLS_FILE: &str = "calls";

/// The table of functions of version 2.40.
///
/// # Safety
///
/// `list` is null or can be written to.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn C_GetFunctionList(list: *mut *mut CK_FUNCTION_LIST) -> CK_RV {
    let Ok(tables) = tables::tables() else {
        return CKR_GENERAL_ERROR;
    };
    // SAFETY: the caller vouches for it.
    let Some(list) = (unsafe { list.as_mut() }) else {
        return CKR_ARGUMENTS_BAD;
    };
    *list = tables.version_2();
    CKR_OK
}

/// The interfaces that the module shows: version 2.40, and 3.x when the real module or the script has it.
///
/// # Safety
///
/// `count` is null or can be written to; `list` is null or has room for as many interfaces as `count` says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn C_GetInterfaceList(
    list: *mut CK_INTERFACE,
    count: *mut CK_ULONG,
) -> CK_RV {
    let Ok(tables) = tables::tables() else {
        return CKR_GENERAL_ERROR;
    };
    // SAFETY: the caller vouches for it.
    let Some(count) = (unsafe { count.as_mut() }) else {
        return CKR_ARGUMENTS_BAD;
    };
    let interfaces = tables.interfaces();
    let length = CK_ULONG::try_from(interfaces.len()).unwrap_or(CK_ULONG::MAX);
    let room = std::mem::replace(count, length);
    if list.is_null() {
        return CKR_OK;
    }
    if room < length {
        return CKR_BUFFER_TOO_SMALL;
    }
    // SAFETY: the caller vouches for room for `room` interfaces, which are enough.
    unsafe { std::ptr::copy_nonoverlapping(interfaces.as_ptr(), list, interfaces.len()) };
    CKR_OK
}

/// One interface: the newest of the given name and version, where these are given.
///
/// # Safety
///
/// `name` is null or ends with NUL; `version` and `interface` are null or valid.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn C_GetInterface(
    name: *mut CK_UTF8CHAR,
    version: *mut CK_VERSION,
    interface: *mut *mut CK_INTERFACE,
    flags: CK_FLAGS,
) -> CK_RV {
    let Ok(tables) = tables::tables() else {
        return CKR_GENERAL_ERROR;
    };
    // SAFETY: the caller vouches for all three.
    let (name, version, interface) = unsafe {
        let name = (!name.is_null()).then(|| std::ffi::CStr::from_ptr(name.cast()));
        (name, version.as_ref(), interface.as_mut())
    };
    let Some(interface) = interface else {
        return CKR_ARGUMENTS_BAD;
    };
    if flags != 0 || name.is_some_and(|name| name != tables::INTERFACE) {
        return CKR_ARGUMENTS_BAD;
    }
    match tables.interface(version) {
        Some(found) => {
            *interface = found;
            CKR_OK
        }
        None => CKR_ARGUMENTS_BAD,
    }
}
