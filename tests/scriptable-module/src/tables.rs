//! The tables of functions that the module shows, one per version of the interface.

use std::{ffi::CStr, mem::size_of, ptr, slice, sync::OnceLock};

use cryptoki_sys::{
    CK_FUNCTION_LIST, CK_FUNCTION_LIST_3_0, CK_FUNCTION_LIST_3_2, CK_INTERFACE, CK_VERSION,
};

use crate::{
    functions::LIST,
    process::{self, report},
    script::Interface,
};

/// The name of the standard's interface.
pub(crate) const INTERFACE: &CStr = c"PKCS 11";

/// The interfaces, newest first.
pub(crate) struct Tables {
    interfaces: Vec<CK_INTERFACE>,
}

// SAFETY: the pointers are to constants that live as long as the process, and nothing writes through them.
unsafe impl Send for Tables {}
// SAFETY: as above.
unsafe impl Sync for Tables {}

/// The real module has no functions to show.
#[derive(Debug)]
pub(crate) struct Unusable;

/// The tables, made at the first call: the versions depend on the script and on the real module.
pub(crate) fn tables() -> Result<&'static Tables, Unusable> {
    static TABLES: OnceLock<Tables> = OnceLock::new();
    let process = process::current().map_err(|error| {
        report(&error);
        Unusable
    })?;
    let newest = process.script().and_then(|script| script.interface);
    let of_real = match (process.real.version.major, process.real.version.minor) {
        (3, 0 | 1) => Interface::V3_0,
        (3.., _) => Interface::V3_2,
        _ => Interface::V2,
    };
    Ok(TABLES.get_or_init(|| Tables::up_to(newest.unwrap_or(of_real))))
}

impl Tables {
    fn up_to(newest: Interface) -> Self {
        let all = [
            (Interface::V3_2, (3, 2), size_of::<CK_FUNCTION_LIST_3_2>()),
            (Interface::V3_0, (3, 0), size_of::<CK_FUNCTION_LIST_3_0>()),
            (Interface::V2, (2, 40), size_of::<CK_FUNCTION_LIST>()),
        ];
        let interfaces = all
            .into_iter()
            .filter(|(interface, ..)| *interface <= newest)
            .map(|(_, (major, minor), size)| {
                let mut list = LIST;
                list.version = CK_VERSION { major, minor };
                CK_INTERFACE {
                    pInterfaceName: INTERFACE.as_ptr().cast_mut().cast(),
                    pFunctionList: first_part(&list, size).cast(),
                    flags: 0,
                }
            })
            .collect();
        Self { interfaces }
    }

    pub(crate) fn version_2(&self) -> *mut CK_FUNCTION_LIST {
        let last = self.interfaces.last();
        last.map_or(ptr::null_mut(), |interface| interface.pFunctionList.cast())
    }

    pub(crate) fn interfaces(&self) -> &[CK_INTERFACE] {
        &self.interfaces
    }

    /// The newest interface, or the one of this version.
    pub(crate) fn interface(&self, version: Option<&CK_VERSION>) -> Option<*mut CK_INTERFACE> {
        let mut all = self.interfaces.iter();
        all.find(|interface| {
            version.is_none_or(|version| {
                // SAFETY: each table begins with its version.
                let own = unsafe { *interface.pFunctionList.cast::<CK_VERSION>() };
                (own.major, own.minor) == (version.major, version.minor)
            })
        })
        .map(|interface| ptr::from_ref(interface).cast_mut())
    }
}

/// A copy of the first `size` bytes, which are the table of an older version, for the rest of the process.
fn first_part(list: &CK_FUNCTION_LIST_3_2, size: usize) -> *mut u64 {
    // SAFETY: the table consists of words without padding that matters, and `size` is not above its own size.
    let words = unsafe {
        slice::from_raw_parts(ptr::from_ref(list).cast::<u64>(), size / size_of::<u64>())
    };
    Vec::leak(words.to_vec()).as_mut_ptr()
}
