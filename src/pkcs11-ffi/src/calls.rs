//! The unsafe calls of PKCS#11 functions.

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
    mechanism::Mechanism,
    object::{Attribute, AttributeType, ObjectHandle},
    session::Session,
    slot::Slot,
};
use cryptoki_sys::{
    CK_ATTRIBUTE, CK_BYTE, CK_C_INITIALIZE_ARGS, CK_FUNCTION_LIST, CK_INFO, CK_MECHANISM,
    CK_RSA_AES_KEY_WRAP_PARAMS, CK_RSA_PKCS_OAEP_PARAMS, CK_RV, CK_SESSION_HANDLE, CK_SLOT_ID,
    CK_TOKEN_INFO, CK_TRUE, CK_ULONG, CK_UNAVAILABLE_INFORMATION, CKA_UNWRAP_TEMPLATE,
    CKF_OS_LOCKING_OK, CKG_MGF1_SHA1, CKM_AES_KEY_WRAP_KWP, CKM_AES_KEY_WRAP_PKCS7,
    CKM_RSA_AES_KEY_WRAP, CKM_SHA_1, CKZ_DATA_SPECIFIED,
};

use crate::{TokenInfo, WrapMechanism};

/// Length in bytes of the first buffer for an attribute without a fixed length. The modulus of the longest key and a
/// list of 128 mechanisms fit into this buffer.
const FIRST_BUFFER: usize = 1024;
/// Length in bytes of the second and last buffer for an attribute without a fixed length.
const LAST_BUFFER: usize = 64 * 1024;

/// Length in bytes of the buffer for a wrapped key. The longest RSA private key in PKCS #8 fits into this buffer.
const WRAPPED_BUFFER: usize = 16 * 1024;

/// Largest number of attempts to read the list of slots. An attempt fails if the number of slots increases between two
/// calls.
const SLOT_LIST_TRIES: usize = 4;
/// Largest number of slots that the broker accepts from a module. Real modules have far fewer slots, and a larger
/// number would only waste memory.
const SLOTS_MAX: usize = 65_536;

/// The function list of PKCS#11 2.40. Modules for later versions of PKCS#11 also have this list.
#[derive(Clone)]
pub(crate) struct Functions(Arc<Loaded>);

struct Loaded {
    list: CK_FUNCTION_LIST,
    /// Keeps the library loaded, because the functions exist only while it is loaded.
    _library: cryptoki_sys::Pkcs11,
}

impl fmt::Debug for Functions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Functions").finish_non_exhaustive()
    }
}

/// The arguments of `C_Initialize` with the extension of NSS: `pReserved` points to the initialisation string, and a
/// field that must be NULL follows the standard fields. Modules other than NSS read only the standard fields.
#[repr(C)]
struct InitializeArguments {
    standard: CK_C_INITIALIZE_ARGS,
    reserved_by_nss: *mut c_void,
}

impl Functions {
    pub(crate) fn load(path: &Path) -> Result<Self> {
        // SAFETY: `cryptoki` has already loaded the same file, so no initialiser runs here. The operator declares that
        // the file is a PKCS#11 module with the types of the standard; code cannot check this declaration.
        let library = unsafe { cryptoki_sys::Pkcs11::new(path) }.map_err(Error::LibraryLoading)?;
        if library.C_GetFunctionList.is_err() {
            return Err(Error::MissingSymbol("C_GetFunctionList"));
        }
        let mut list: *mut CK_FUNCTION_LIST = ptr::null_mut();
        // SAFETY: the function exists, and the argument points to a pointer that the function may write.
        let code = unsafe { library.C_GetFunctionList(&raw mut list) };
        Rv::from(code).into_result(Function::GetFunctionList)?;
        if list.is_null() {
            return Err(Error::NullFunctionPointer);
        }
        // SAFETY: the function succeeded and the pointer is not NULL, so the pointer points to the module's list. The
        // module does not change its function list.
        let list = unsafe { *list };
        Ok(Self(Arc::new(Loaded {
            list,
            _library: library,
        })))
    }

    /// Calls `C_Initialize`, optionally with a string.
    pub(crate) fn initialize(&self, reserved: Option<CString>) -> Result<()> {
        let function = self.0.list.C_Initialize.ok_or(Error::NullFunctionPointer)?;
        let mut arguments = InitializeArguments {
            standard: CK_C_INITIALIZE_ARGS {
                CreateMutex: None,
                DestroyMutex: None,
                LockMutex: None,
                UnlockMutex: None,
                flags: CKF_OS_LOCKING_OK,
                // The string is never freed, because the standard does not say how long the module may use it. Each
                // process leaks at most one string.
                pReserved: reserved.map_or(ptr::null_mut(), CString::into_raw).cast(),
            },
            reserved_by_nss: ptr::null_mut(),
        };
        // SAFETY: the argument points to a structure that begins with the `CK_C_INITIALIZE_ARGS` of the standard.
        // `pReserved` is NULL, or a NUL-terminated string that is never freed.
        let code = unsafe { function((&raw mut arguments).cast()) };
        Rv::from(code).into_result(Function::Initialize)
    }

    /// Whether the call of `C_Initialize` in another function list has also initialised this function list.
    pub(crate) fn are_initialized(&self) -> bool {
        let Some(function) = self.0.list.C_GetInfo else {
            return true;
        };
        let mut info = CK_INFO::default();
        // SAFETY: the argument points to a structure of the standard that the function may write. The structure is plain data,
        // for which all bytes are valid.
        let code = unsafe { function(&raw mut info) };
        !matches!(Rv::from(code), Rv::Error(RvError::CryptokiNotInitialized))
    }

    /// Calls `C_Finalize`.
    pub(crate) fn finalize(&self) -> Result<()> {
        let function = self.0.list.C_Finalize.ok_or(Error::NullFunctionPointer)?;
        // SAFETY: the argument is NULL, as the standard requires.
        let code = unsafe { function(ptr::null_mut()) };
        Rv::from(code).into_result(Function::Finalize)
    }

    /// Calls `C_GetSlotList` and returns the slots with a token.
    pub(crate) fn slots_with_token(&self) -> Result<Vec<Slot>> {
        let mut ids: Vec<CK_SLOT_ID> = Vec::new();
        for _ in 0..SLOT_LIST_TRIES {
            let (count, is_filled) = match self.slot_list(&mut ids) {
                // The number of slots has increased since the last call, and the module may not have filled the buffer.
                Err(Error::Pkcs11(RvError::BufferTooSmall, _)) => (self.slot_list(&mut [])?, false),
                result => (result?, true),
            };
            if is_filled && count <= ids.len() {
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

    /// Returns the number of slots with a token.
    pub(crate) fn count_slots_with_token(&self) -> Result<usize> {
        self.slot_list(&mut [])
    }

    /// Fills the buffer with the slots that have a token, and returns the number of these slots. With an empty buffer,
    /// the module only returns the number.
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
        // SAFETY: the buffer is NULL, or has room for `count` numbers. The buffer and `count` live until the function
        // returns.
        let code = unsafe { function(CK_TRUE, buffer, &raw mut count) };
        Rv::from(code).into_result(Function::GetSlotList)?;
        Ok(usize::try_from(count)?)
    }

    /// Calls `C_GetTokenInfo`.
    pub(crate) fn token_info(&self, slot: Slot) -> Result<TokenInfo> {
        let function = self
            .0
            .list
            .C_GetTokenInfo
            .ok_or(Error::NullFunctionPointer)?;
        let mut info = CK_TOKEN_INFO::default();
        // SAFETY: the argument points to a structure of the standard that the function may write. The structure is plain data,
        // for which all bytes are valid.
        let code = unsafe { function(slot.id(), &raw mut info) };
        Rv::from(code).into_result(Function::GetTokenInfo)?;
        Ok(info.into())
    }

    /// Reads one attribute (`C_GetAttributeValue`). The first call to the module already passes a
    /// buffer, instead of only asking for the length.
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
        // SAFETY: the argument points to one attribute, which contains the address and the length of a writable buffer.
        // The attribute and the buffer live until the function returns. The handles are numbers, which the module
        // checks.
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
        // A token that withholds a value may leave the length unchanged. If the buffer contains a byte other than zero,
        // the buffer may contain the withheld value.
        if is_withheld && value.iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        // The buffer is still alive, and the length of the value was checked against the length of the buffer.
        // `cryptoki` reads the value from the buffer.
        attribute.pValue = buffer.as_mut_ptr().cast();
        let attribute = Attribute::try_from(attribute)?;
        Ok(Some(if is_withheld {
            Value::Leaked(attribute)
        } else {
            Value::Given(attribute)
        }))
    }

    /// Wraps a key (`C_WrapKey`) with a mechanism that `cryptoki` does not have.
    pub(crate) fn wrap_key(
        &self,
        session: &Session,
        mechanism: WrapMechanism,
        wrapping: ObjectHandle,
        key: ObjectHandle,
    ) -> Result<Vec<u8>> {
        let mut oaep = CK_RSA_PKCS_OAEP_PARAMS {
            hashAlg: CKM_SHA_1,
            mgf: CKG_MGF1_SHA1,
            source: CKZ_DATA_SPECIFIED,
            pSourceData: ptr::null_mut(),
            ulSourceDataLen: 0,
        };
        let mut rsa_aes = CK_RSA_AES_KEY_WRAP_PARAMS {
            ulAESKeyBits: 256,
            pOAEPParams: &raw mut oaep,
        };
        let without_parameter = |mechanism| CK_MECHANISM {
            mechanism,
            pParameter: ptr::null_mut(),
            ulParameterLen: 0,
        };
        let mechanism = match mechanism {
            WrapMechanism::AesKeyWrapKwp => without_parameter(CKM_AES_KEY_WRAP_KWP),
            WrapMechanism::AesKeyWrapPkcs7 => without_parameter(CKM_AES_KEY_WRAP_PKCS7),
            WrapMechanism::RsaAesKeyWrap => CK_MECHANISM {
                mechanism: CKM_RSA_AES_KEY_WRAP,
                pParameter: (&raw mut rsa_aes).cast(),
                ulParameterLen: CK_ULONG::try_from(size_of_val(&rsa_aes))?,
            },
        };
        let mut wrapped = vec![0_u8; WRAPPED_BUFFER];
        // SAFETY: the mechanism has no parameter, or the parameter that the standard requires. The parameter lives until
        // the function returns.
        let length =
            unsafe { self.call_wrap_key(session, mechanism, wrapping, key, &mut wrapped) }?;
        wrapped.truncate(length);
        Ok(wrapped)
    }

    /// Wraps a key (`C_WrapKey`) into a buffer, and returns the length of the wrapped key.
    pub(crate) fn wrap_key_into(
        &self,
        session: &Session,
        mechanism: &Mechanism<'_>,
        wrapping: ObjectHandle,
        key: ObjectHandle,
        wrapped: &mut [u8],
    ) -> Result<usize> {
        // SAFETY: `cryptoki` makes the parameter that the standard requires. The parameter is a part of `mechanism`,
        // which lives until the function returns.
        unsafe { self.call_wrap_key(session, mechanism.into(), wrapping, key, wrapped) }
    }

    /// Calls `C_WrapKey` once.
    ///
    /// # Safety
    ///
    /// The mechanism must have no parameter, or the parameter that the standard requires for this mechanism.
    unsafe fn call_wrap_key(
        &self,
        session: &Session,
        mut mechanism: CK_MECHANISM,
        wrapping: ObjectHandle,
        key: ObjectHandle,
        wrapped: &mut [u8],
    ) -> Result<usize> {
        let function = self.0.list.C_WrapKey.ok_or(Error::NullFunctionPointer)?;
        let mut length = CK_ULONG::try_from(wrapped.len())?;
        // SAFETY: the caller guarantees that the mechanism is valid. The buffer has room for `length` bytes. The
        // mechanism, the buffer and `length` live until the function returns. The handles are numbers, which the module
        // checks.
        let code = unsafe {
            function(
                session.handle(),
                &raw mut mechanism,
                wrapping.handle(),
                key.handle(),
                wrapped.as_mut_ptr(),
                &raw mut length,
            )
        };
        Rv::from(code).into_result(Function::WrapKey)?;
        let length = usize::try_from(length)?;
        if length > wrapped.len() {
            return Err(Error::Pkcs11(RvError::BufferTooSmall, Function::WrapKey));
        }
        Ok(length)
    }
}

/// A function with an input and an output, such as `C_Decrypt`.
type InputOutput = unsafe extern "C" fn(
    CK_SESSION_HANDLE,
    *mut CK_BYTE,
    CK_ULONG,
    *mut CK_BYTE,
    *mut CK_ULONG,
) -> CK_RV;

impl Functions {
    /// Calls `C_Decrypt` once, after a successful `C_DecryptInit`.
    pub(crate) fn decrypt(
        &self,
        session: &Session,
        input: &[u8],
        output: &mut [u8],
    ) -> Result<usize> {
        call_once(
            self.0.list.C_Decrypt,
            Function::Decrypt,
            session,
            input,
            output,
        )
    }

    /// Calls `C_Sign` once, after a successful `C_SignInit`.
    pub(crate) fn sign(&self, session: &Session, input: &[u8], output: &mut [u8]) -> Result<usize> {
        call_once(self.0.list.C_Sign, Function::Sign, session, input, output)
    }
}

fn call_once(
    function: Option<InputOutput>,
    name: Function,
    session: &Session,
    input: &[u8],
    output: &mut [u8],
) -> Result<usize> {
    let function = function.ok_or(Error::NullFunctionPointer)?;
    let mut length = CK_ULONG::try_from(output.len())?;
    // SAFETY: the input has the stated length, and the standard forbids the function to change the input. The output has
    // room for `length` bytes. The input, the output and `length` live until the function returns. The handle is a number,
    // which the module checks.
    let code = unsafe {
        function(
            session.handle(),
            input.as_ptr().cast_mut(),
            CK_ULONG::try_from(input.len())?,
            output.as_mut_ptr(),
            &raw mut length,
        )
    };
    Rv::from(code).into_result(name)?;
    let length = usize::try_from(length)?;
    if length > output.len() {
        return Err(Error::Pkcs11(RvError::BufferTooSmall, name));
    }
    Ok(length)
}

/// Returns `CKA_UNWRAP_TEMPLATE` with these attributes. The value contains the addresses of the attributes' values, so
/// the module must not use the value after the end of the lifetime of `attributes`.
pub(crate) fn unwrap_template(attributes: &[Attribute]) -> Attribute {
    let value = attributes.iter().flat_map(|attribute| {
        let attribute = CK_ATTRIBUTE::from(attribute);
        // The members of `CK_ATTRIBUTE` have the same size and no padding.
        [
            attribute.type_.to_ne_bytes(),
            attribute.pValue.expose_provenance().to_ne_bytes(),
            attribute.ulValueLen.to_ne_bytes(),
        ]
        .concat()
    });
    let kind = AttributeType::VendorDefined(CKA_UNWRAP_TEMPLATE);
    Attribute::VendorDefined((kind, value.collect()))
}

/// The bytes that a token wrote into the buffer for an attribute.
#[derive(Debug)]
pub(crate) enum Value {
    /// The value of the attribute.
    Given(Attribute),
    /// Bytes that the token wrote although it reported that the attribute is sensitive or does not exist.
    Leaked(Attribute),
}
