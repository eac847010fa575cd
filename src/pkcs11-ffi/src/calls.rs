//! The unsafe calls.

use std::{
    ffi::{CString, c_void},
    fmt,
    path::Path,
    ptr,
    sync::Arc,
};

use cryptoki::{
    context::Function,
    error::{Error, Result, Rv, RvError},
    object::{Attribute, AttributeType, ObjectHandle},
    session::Session,
    slot::Slot,
};
use cryptoki_sys::{
    CK_ATTRIBUTE, CK_C_INITIALIZE_ARGS, CK_FUNCTION_LIST, CK_INFO, CK_SLOT_ID, CK_TOKEN_INFO,
    CK_TRUE, CK_ULONG, CK_UNAVAILABLE_INFORMATION, CKF_OS_LOCKING_OK,
};

use crate::TokenInfo;

/// Length of the first buffer for an attribute whose length is not fixed, in bytes: the modulus of the longest key and a list of 128
/// mechanisms fit.
const FIRST_BUFFER: usize = 1024;
/// Length of the last buffer.
const LAST_BUFFER: usize = 64 * 1024;

/// How often the slots are asked for while their number grows.
const SLOT_LIST_TRIES: usize = 4;
/// Slots of one module, far more than any has: a number above is nonsense, and would only cost memory.
const SLOTS_MAX: usize = 65_536;

/// The function list of PKCS#11 2.40, which modules of every later version have as well.
#[derive(Clone)]
pub(crate) struct Functions(Arc<Loaded>);

struct Loaded {
    list: CK_FUNCTION_LIST,
    /// The functions of the list exist as long as it is loaded.
    _library: cryptoki_sys::Pkcs11,
}

impl fmt::Debug for Functions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Functions").finish_non_exhaustive()
    }
}

/// The arguments of `C_Initialize` as NSS extends them: `pReserved` is the string, and a field that must be NULL follows. Other
/// modules do not look behind the standard's fields.
#[repr(C)]
struct InitializeArguments {
    standard: CK_C_INITIALIZE_ARGS,
    reserved_by_nss: *mut c_void,
}

impl Functions {
    pub(crate) fn load(path: &Path) -> Result<Self> {
        // SAFETY: `cryptoki` has loaded the same file before, so no initialiser of it runs here. That it is a PKCS#11 module with the
        // types of the standard is what the operator says of it; nothing can check that.
        let library = unsafe { cryptoki_sys::Pkcs11::new(path) }.map_err(Error::LibraryLoading)?;
        if library.C_GetFunctionList.is_err() {
            return Err(Error::MissingSymbol("C_GetFunctionList"));
        }
        let mut list: *mut CK_FUNCTION_LIST = ptr::null_mut();
        // SAFETY: the function exists, and the argument points to a pointer that it may write.
        let code = unsafe { library.C_GetFunctionList(&raw mut list) };
        Rv::from(code).into_result(Function::GetFunctionList)?;
        if list.is_null() {
            return Err(Error::NullFunctionPointer);
        }
        // SAFETY: the function succeeded, so the pointer, which is not NULL, points to the list of the module. The list does not change.
        let list = unsafe { *list };
        Ok(Self(Arc::new(Loaded {
            list,
            _library: library,
        })))
    }

    /// `C_Initialize`, with a string or without.
    pub(crate) fn initialize(&self, reserved: Option<CString>) -> Result<()> {
        let function = self.0.list.C_Initialize.ok_or(Error::NullFunctionPointer)?;
        let mut arguments = InitializeArguments {
            standard: CK_C_INITIALIZE_ARGS {
                CreateMutex: None,
                DestroyMutex: None,
                LockMutex: None,
                UnlockMutex: None,
                flags: CKF_OS_LOCKING_OK,
                // Never freed: the standard does not say for how long the module may use it. It happens once per process.
                pReserved: reserved.map_or(ptr::null_mut(), CString::into_raw).cast(),
            },
            reserved_by_nss: ptr::null_mut(),
        };
        // SAFETY: the argument points to the arguments of the standard, with NULL or a string that ends with NUL and lives as long as
        // the process.
        let code = unsafe { function((&raw mut arguments).cast()) };
        Rv::from(code).into_result(Function::Initialize)
    }

    /// Whether `C_Initialize` of another function list was that of this one as well.
    pub(crate) fn are_initialized(&self) -> bool {
        let Some(function) = self.0.list.C_GetInfo else {
            return true;
        };
        let mut info = CK_INFO::default();
        // SAFETY: the argument points to a structure of the standard that the function may write. It is plain data: any bytes are good.
        let code = unsafe { function(&raw mut info) };
        !matches!(Rv::from(code), Rv::Error(RvError::CryptokiNotInitialized))
    }

    /// `C_Finalize`.
    pub(crate) fn finalize(&self) -> Result<()> {
        let function = self.0.list.C_Finalize.ok_or(Error::NullFunctionPointer)?;
        // SAFETY: the argument is NULL, as the standard demands.
        let code = unsafe { function(ptr::null_mut()) };
        Rv::from(code).into_result(Function::Finalize)
    }

    /// `C_GetSlotList`: the slots with a token.
    pub(crate) fn slots_with_token(&self) -> Result<Vec<Slot>> {
        let mut ids: Vec<CK_SLOT_ID> = Vec::new();
        for _ in 0..SLOT_LIST_TRIES {
            let count = match self.slot_list(&mut ids) {
                // There are more of them than a moment ago.
                Err(Error::Pkcs11(RvError::BufferTooSmall, _)) => self.slot_list(&mut [])?,
                result => result?,
            };
            if count <= ids.len() {
                ids.truncate(count);
                return ids
                    .into_iter()
                    .map(|id| Slot::try_from(id).map_err(|_| Error::InvalidValue))
                    .collect();
            }
            if count > SLOTS_MAX {
                return Err(Error::InvalidValue);
            }
            ids = vec![0; count];
        }
        Err(Error::Pkcs11(
            RvError::BufferTooSmall,
            Function::GetSlotList,
        ))
    }

    /// The number of slots with a token.
    pub(crate) fn count_slots_with_token(&self) -> Result<usize> {
        self.slot_list(&mut [])
    }

    /// Fills the buffer with the slots that have a token, and returns their number. With an empty buffer the number alone is asked for.
    fn slot_list(&self, ids: &mut [CK_SLOT_ID]) -> Result<usize> {
        let function = self
            .0
            .list
            .C_GetSlotList
            .ok_or(Error::NullFunctionPointer)?;
        let mut count = CK_ULONG::try_from(ids.len())?;
        let buffer = if ids.is_empty() {
            ptr::null_mut()
        } else {
            ids.as_mut_ptr()
        };
        // SAFETY: the buffer is NULL, or `count` says how many numbers it has room for. Both live until the function returns.
        let code = unsafe { function(CK_TRUE, buffer, &raw mut count) };
        Rv::from(code).into_result(Function::GetSlotList)?;
        Ok(usize::try_from(count)?)
    }

    /// `C_GetTokenInfo`.
    pub(crate) fn token_info(&self, slot: Slot) -> Result<TokenInfo> {
        let function = self
            .0
            .list
            .C_GetTokenInfo
            .ok_or(Error::NullFunctionPointer)?;
        let mut info = CK_TOKEN_INFO::default();
        // SAFETY: the argument points to a structure of the standard that the function may write. It is plain data: any bytes are good.
        let code = unsafe { function(slot.id(), &raw mut info) };
        Rv::from(code).into_result(Function::GetTokenInfo)?;
        Ok(info.into())
    }

    /// `C_GetAttributeValue` for one attribute, with a buffer in the first call.
    pub(crate) fn attribute(
        &self,
        session: &Session,
        object: ObjectHandle,
        kind: AttributeType,
    ) -> Result<Option<Value>> {
        let first = kind.fixed_size().unwrap_or(FIRST_BUFFER);
        match self.read(session, object, kind, first) {
            Err(Error::Pkcs11(RvError::BufferTooSmall, _)) => {
                self.read(session, object, kind, LAST_BUFFER)
            }
            read => read,
        }
    }

    fn read(
        &self,
        session: &Session,
        object: ObjectHandle,
        kind: AttributeType,
        length: usize,
    ) -> Result<Option<Value>> {
        let function = self
            .0
            .list
            .C_GetAttributeValue
            .ok_or(Error::NullFunctionPointer)?;
        let mut buffer = vec![0_u8; length];
        let mut attribute = CK_ATTRIBUTE {
            type_: kind.into(),
            pValue: buffer.as_mut_ptr().cast(),
            ulValueLen: CK_ULONG::try_from(buffer.len())?,
        };
        // SAFETY: the argument points to one attribute, which names a buffer that the function may write, and its length. Both live
        // until it returns. The handles are numbers, which the module checks.
        let code = unsafe { function(session.handle(), object.handle(), &raw mut attribute, 1) };
        let code = Rv::from(code);
        let is_withheld = matches!(
            code,
            Rv::Error(RvError::AttributeSensitive | RvError::AttributeTypeInvalid)
        );
        if !is_withheld {
            code.into_result(Function::GetAttributeValue)?;
        }
        if attribute.ulValueLen == CK_UNAVAILABLE_INFORMATION {
            return Ok(None);
        }
        let value = usize::try_from(attribute.ulValueLen)
            .ok()
            .and_then(|length| buffer.get(..length))
            .ok_or(Error::InvalidValue)?;
        // A token that says that it withholds the value may leave the length as it was. If it wrote bytes all the same, they may be the
        // value.
        if is_withheld && value.iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        // The buffer is alive, and the length has been compared with it. `cryptoki` reads the value from there.
        attribute.pValue = buffer.as_mut_ptr().cast();
        let attribute = Attribute::try_from(attribute)?;
        Ok(Some(if is_withheld {
            Value::Leaked(attribute)
        } else {
            Value::Given(attribute)
        }))
    }
}

/// What a token wrote into the buffer for an attribute.
#[derive(Debug)]
pub(crate) enum Value {
    /// The value.
    Given(Attribute),
    /// Bytes beside the answer that the object does not have the attribute, or that the token does not give it.
    Leaked(Attribute),
}
