//! The real module behind this one.

use std::{mem::size_of, path::Path, ptr, sync::OnceLock};

use cryptoki_sys::{
    CK_FUNCTION_LIST, CK_FUNCTION_LIST_3_0, CK_FUNCTION_LIST_3_2, CK_INTERFACE, CK_VERSION, CKR_OK,
    Pkcs11,
};

/// The functions of the real module. A function that it does not have is `None`.
#[derive(Debug)]
pub(crate) struct Real {
    /// The table, filled as far as the version of the module goes.
    pub(crate) list: CK_FUNCTION_LIST_3_2,
    /// The newest version that the module shows.
    pub(crate) version: CK_VERSION,
}

/// Why the real module cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LoadError {
    /// The dynamic linker refused it, or it is not a PKCS#11 module.
    #[error("the real module {path} cannot be loaded: {source}")]
    Linker {
        path: String,
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// It does not show its functions.
    #[error("the real module {path} does not show its functions: it returned 0x{code:x}")]
    NoFunctions { path: String, code: u64 },
}

/// The real module, loaded at the first call. It stays loaded, also in a process that is forked later.
pub(crate) fn load(path: &Path) -> Result<&'static Real, &'static LoadError> {
    static REAL: OnceLock<Result<Real, LoadError>> = OnceLock::new();
    REAL.get_or_init(|| Real::open(path)).as_ref()
}

impl Real {
    fn open(path: &Path) -> Result<Self, LoadError> {
        let shown = path.display().to_string();
        // SAFETY: loading a library runs its initialisers; the script names a module that its author trusts.
        let library = unsafe { Pkcs11::new(path) }.map_err(|source| LoadError::Linker {
            path: shown.clone(),
            source: source.into(),
        })?;
        // A module that is unloaded while its threads run crashes the process.
        let library: &'static Pkcs11 = Box::leak(Box::new(library));
        if let Some(real) = library
            .C_GetInterface
            .is_ok()
            .then(|| Self::interface(library))
            .flatten()
        {
            return Ok(real);
        }
        let get = library
            .C_GetFunctionList
            .as_ref()
            .map_err(|error| LoadError::Linker {
                path: shown.clone(),
                source: error.to_string().into(),
            })?;
        let mut list: *mut CK_FUNCTION_LIST = ptr::null_mut();
        // SAFETY: the function has this signature by the standard.
        let code = unsafe { get(&raw mut list) };
        if code != CKR_OK || list.is_null() {
            return Err(LoadError::NoFunctions { path: shown, code });
        }
        // SAFETY: the module returned the table of version 2, which lives as long as the module.
        Ok(unsafe { Self::copied(list, size_of::<CK_FUNCTION_LIST>()) })
    }

    /// The newest interface, if it is of version 3.
    fn interface(library: &Pkcs11) -> Option<Self> {
        let mut interface: *mut CK_INTERFACE = ptr::null_mut();
        // SAFETY: the function is present and has this signature by the standard.
        let code = unsafe {
            library.C_GetInterface(ptr::null_mut(), ptr::null_mut(), &raw mut interface, 0)
        };
        if code != CKR_OK || interface.is_null() {
            return None;
        }
        // SAFETY: an interface named by the module holds a table that begins with its version.
        unsafe {
            let list: *const CK_FUNCTION_LIST = (*interface).pFunctionList.cast();
            let version = (*list).version;
            let size = match (version.major, version.minor) {
                (3, 0 | 1) => size_of::<CK_FUNCTION_LIST_3_0>(),
                (3, _) => size_of::<CK_FUNCTION_LIST_3_2>(),
                _ => return None,
            };
            Some(Self::copied(list, size))
        }
    }

    /// The three tables have the same beginning, so the shorter ones fill the first part of the longest.
    ///
    /// # Safety
    ///
    /// `list` points to a table of `size` bytes, which is the size of one of the three.
    unsafe fn copied(list: *const CK_FUNCTION_LIST, size: usize) -> Self {
        let mut complete = CK_FUNCTION_LIST_3_2::default();
        // SAFETY: the caller vouches for the source; the target is the longest of the tables.
        unsafe {
            ptr::copy_nonoverlapping(list.cast::<u8>(), (&raw mut complete).cast::<u8>(), size);
        }
        Self {
            version: complete.version,
            list: complete,
        }
    }
}
