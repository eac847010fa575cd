//! The module as an application sees it: loaded by its path, used through its table of functions.

use std::{
    env, fmt, fs,
    path::{Path, PathBuf},
    ptr, thread,
    time::{Duration, Instant},
};

use cryptoki_sys::{
    CK_ATTRIBUTE, CK_ATTRIBUTE_TYPE, CK_C_INITIALIZE_ARGS, CK_FLAGS, CK_FUNCTION_LIST, CK_KEY_TYPE,
    CK_MECHANISM, CK_MECHANISM_TYPE, CK_OBJECT_HANDLE, CK_RV, CK_SESSION_HANDLE, CK_SLOT_ID,
    CK_TOKEN_INFO, CK_ULONG, CK_USER_TYPE, CKA_CLASS, CKA_DECRYPT, CKA_EXTRACTABLE, CKA_ID,
    CKA_KEY_TYPE, CKA_MODULUS_BITS, CKA_PRIVATE, CKA_SENSITIVE, CKA_SIGN, CKA_TOKEN, CKA_VALUE_LEN,
    CKA_VERIFY, CKF_OS_LOCKING_OK, CKF_RW_SESSION, CKF_SERIAL_SESSION, CKK_GENERIC_SECRET,
    CKM_GENERIC_SECRET_KEY_GEN, CKM_RSA_PKCS_KEY_PAIR_GEN, CKM_SHA256_HMAC, CKR_OK, CKU_USER,
    Pkcs11,
};
use keybroker_scriptable_pkcs11::{SCRIPT_FILE, SCRIPT_VARIABLE, counts, return_code_name};
use keybroker_test_support::faulty;

/// A return code that is not `CKR_OK`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Rv(pub(crate) CK_RV);

impl fmt::Display for Rv {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match return_code_name(self.0) {
            Some(name) => formatter.write_str(name),
            None => write!(formatter, "0x{:x}", self.0),
        }
    }
}

/// Calls a function of the module.
macro_rules! call {
    ($module:expr, $function:ident($($argument:expr),* $(,)?)) => {{
        let function = $module.list.$function.expect("a function of the table");
        // SAFETY: the signature is that of the standard, and every pointer is null or to a local variable.
        match unsafe { function($($argument),*) } {
            ::cryptoki_sys::CKR_OK => Ok(()),
            code => Err($crate::module::Rv(code)),
        }
    }};
}
pub(crate) use call;

/// An attribute of a template.
#[derive(Clone, Debug)]
pub(crate) struct Value(pub(crate) CK_ATTRIBUTE_TYPE, pub(crate) Vec<u8>);

pub(crate) fn flag(name: CK_ATTRIBUTE_TYPE, value: bool) -> Value {
    Value(name, vec![u8::from(value)])
}

pub(crate) fn number(name: CK_ATTRIBUTE_TYPE, value: CK_ULONG) -> Value {
    Value(name, value.to_ne_bytes().to_vec())
}

/// The attributes of a template, for as long as `values` live.
pub(crate) fn template(values: &mut [Value]) -> Vec<CK_ATTRIBUTE> {
    values
        .iter_mut()
        .map(|Value(name, value)| CK_ATTRIBUTE {
            type_: *name,
            pValue: value.as_mut_ptr().cast(),
            ulValueLen: length(value),
        })
        .collect()
}

pub(crate) fn length<T>(values: &[T]) -> CK_ULONG {
    values.len().try_into().unwrap()
}

pub(crate) fn mechanism(mechanism: CK_MECHANISM_TYPE) -> CK_MECHANISM {
    CK_MECHANISM {
        mechanism,
        pParameter: ptr::null_mut(),
        ulParameterLen: 0,
    }
}

/// The code as a text, `ok` for success.
#[allow(
    clippy::needless_pass_by_value,
    reason = "most callers have no other use for the result"
)]
pub(crate) fn outcome<T>(result: Result<T, Rv>) -> String {
    match result {
        Ok(_) => "ok".to_owned(),
        Err(code) => code.to_string(),
    }
}

/// Waits until something is there, and fails if it never is.
pub(crate) fn until(what: &str, mut is_there: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_mins(1);
    while !is_there() {
        assert!(Instant::now() < end, "no {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// The module in this process, and its script.
pub(crate) struct Module {
    pub(crate) list: CK_FUNCTION_LIST,
    pub(crate) library: Pkcs11,
    folder: PathBuf,
    pin: String,
}

// SAFETY: PKCS#11 functions may be called by several threads once the module is initialised for it.
unsafe impl Sync for Module {}

impl Module {
    /// Loads the module, without initialising it.
    pub(crate) fn load() -> Self {
        // SAFETY: the library is the module that was built with this test.
        let library = unsafe { Pkcs11::new(faulty::module()) }.unwrap();
        let mut list: *mut CK_FUNCTION_LIST = ptr::null_mut();
        // SAFETY: the function writes the address of its table, which lives as long as the library.
        let list = unsafe {
            assert_eq!(library.C_GetFunctionList(&raw mut list), CKR_OK);
            *list
        };
        Self {
            list,
            library,
            folder: env::var_os(SCRIPT_VARIABLE)
                .map(PathBuf::from)
                .unwrap_or_default(),
            pin: env::var(crate::CHILD).unwrap(),
        }
    }

    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// The PIN of the real token.
    pub(crate) fn pin(&self) -> &str {
        &self.pin
    }

    pub(crate) fn script(&self) -> String {
        fs::read_to_string(self.folder().join(SCRIPT_FILE)).unwrap()
    }

    pub(crate) fn set_script(&self, text: &str) {
        let partial = self.folder().join("partial");
        fs::write(&partial, text).unwrap();
        fs::rename(partial, self.folder().join(SCRIPT_FILE)).unwrap();
    }

    /// The calls of a function so far, from the shared counters.
    pub(crate) fn calls(&self, function: &str) -> u64 {
        let counts = counts(self.folder()).unwrap();
        let count = counts.iter().find(|count| count.function == function);
        count.unwrap().calls
    }

    pub(crate) fn initialize(&self) -> Result<(), Rv> {
        let mut arguments = CK_C_INITIALIZE_ARGS {
            flags: CKF_OS_LOCKING_OK,
            ..CK_C_INITIALIZE_ARGS::default()
        };
        call!(self, C_Initialize((&raw mut arguments).cast()))
    }

    /// Slots with a token, uninitialised ones included.
    pub(crate) fn slots(&self) -> Vec<CK_SLOT_ID> {
        let mut slots = [0; 8];
        let mut count = length(&slots);
        call!(self, C_GetSlotList(1, slots.as_mut_ptr(), &raw mut count)).unwrap();
        slots[..usize::try_from(count).unwrap()].to_vec()
    }

    /// The slot with the initialised token.
    pub(crate) fn slot(&self) -> CK_SLOT_ID {
        self.slots()[0]
    }

    pub(crate) fn info(&self) -> CK_TOKEN_INFO {
        self.token_info(self.slot()).unwrap()
    }

    pub(crate) fn token_info(&self, slot: CK_SLOT_ID) -> Result<CK_TOKEN_INFO, Rv> {
        let mut info = CK_TOKEN_INFO::default();
        call!(self, C_GetTokenInfo(slot, &raw mut info))?;
        Ok(info)
    }

    pub(crate) fn open_as(
        &self,
        slot: CK_SLOT_ID,
        flags: CK_FLAGS,
    ) -> Result<CK_SESSION_HANDLE, Rv> {
        let mut session = 0;
        let flags = flags | CKF_SERIAL_SESSION;
        call!(
            self,
            C_OpenSession(slot, flags, ptr::null_mut(), None, &raw mut session)
        )?;
        Ok(session)
    }

    pub(crate) fn open(&self) -> Result<CK_SESSION_HANDLE, Rv> {
        self.open_as(self.slot(), CKF_RW_SESSION)
    }

    pub(crate) fn login_as(
        &self,
        session: CK_SESSION_HANDLE,
        user: CK_USER_TYPE,
        pin: &str,
    ) -> Result<(), Rv> {
        let mut pin = pin.as_bytes().to_vec();
        call!(self, C_Login(session, user, pin.as_mut_ptr(), length(&pin)))
    }

    pub(crate) fn login(&self, session: CK_SESSION_HANDLE, pin: &str) -> Result<(), Rv> {
        self.login_as(session, CKU_USER, pin)
    }

    /// Initialises the module and logs in.
    pub(crate) fn ready(&self) -> CK_SESSION_HANDLE {
        self.initialize().unwrap();
        let session = self.open().unwrap();
        self.login(session, self.pin()).unwrap();
        session
    }

    pub(crate) fn random(&self, session: CK_SESSION_HANDLE) -> Result<Vec<u8>, Rv> {
        let mut bytes = vec![0; 16];
        call!(
            self,
            C_GenerateRandom(session, bytes.as_mut_ptr(), length(&bytes))
        )?;
        Ok(bytes)
    }

    pub(crate) fn generate(
        &self,
        session: CK_SESSION_HANDLE,
        kind: CK_MECHANISM_TYPE,
        mut values: Vec<Value>,
    ) -> Result<CK_OBJECT_HANDLE, Rv> {
        let mut key = 0;
        let mut attributes = template(&mut values);
        call!(
            self,
            C_GenerateKey(
                session,
                &mut mechanism(kind),
                attributes.as_mut_ptr(),
                length(&attributes),
                &raw mut key
            )
        )?;
        Ok(key)
    }

    /// A key for HMAC in this session, with further attributes.
    pub(crate) fn secret(
        &self,
        session: CK_SESSION_HANDLE,
        more: &[Value],
    ) -> Result<CK_OBJECT_HANDLE, Rv> {
        self.secret_of_type(session, CKK_GENERIC_SECRET, more)
    }

    pub(crate) fn secret_of_type(
        &self,
        session: CK_SESSION_HANDLE,
        key_type: CK_KEY_TYPE,
        more: &[Value],
    ) -> Result<CK_OBJECT_HANDLE, Rv> {
        let mut values = vec![
            number(CKA_KEY_TYPE, key_type),
            number(CKA_VALUE_LEN, 32),
            flag(CKA_TOKEN, false),
            flag(CKA_SIGN, true),
            flag(CKA_VERIFY, true),
        ];
        values.extend_from_slice(more);
        self.generate(session, CKM_GENERIC_SECRET_KEY_GEN, values)
    }

    /// A pair of keys in this session, with further attributes: the public and the private key.
    pub(crate) fn pair(
        &self,
        session: CK_SESSION_HANDLE,
        public: &[Value],
        private: &[Value],
    ) -> Result<(CK_OBJECT_HANDLE, CK_OBJECT_HANDLE), Rv> {
        let public_defaults = [number(CKA_MODULUS_BITS, 1024), flag(CKA_TOKEN, false)];
        let private_defaults = [
            flag(CKA_TOKEN, false),
            flag(CKA_PRIVATE, true),
            flag(CKA_SENSITIVE, true),
            flag(CKA_EXTRACTABLE, false),
            flag(CKA_DECRYPT, true),
        ];
        let public = [&public_defaults, public].concat();
        self.pair_of(session, public, [&private_defaults, private].concat())
    }

    /// A pair of keys with these attributes and no others.
    pub(crate) fn pair_of(
        &self,
        session: CK_SESSION_HANDLE,
        mut public: Vec<Value>,
        mut private: Vec<Value>,
    ) -> Result<(CK_OBJECT_HANDLE, CK_OBJECT_HANDLE), Rv> {
        let (mut public, mut private) = (template(&mut public), template(&mut private));
        let (mut public_key, mut private_key) = (0, 0);
        call!(
            self,
            C_GenerateKeyPair(
                session,
                &mut mechanism(CKM_RSA_PKCS_KEY_PAIR_GEN),
                public.as_mut_ptr(),
                length(&public),
                private.as_mut_ptr(),
                length(&private),
                &raw mut public_key,
                &raw mut private_key
            )
        )?;
        Ok((public_key, private_key))
    }

    pub(crate) fn sign(
        &self,
        session: CK_SESSION_HANDLE,
        key: CK_OBJECT_HANDLE,
        data: &[u8],
    ) -> Result<Vec<u8>, Rv> {
        call!(
            self,
            C_SignInit(session, &mut mechanism(CKM_SHA256_HMAC), key)
        )?;
        let (mut data, mut mac) = (data.to_vec(), vec![0; 64]);
        let mut size = length(&mac);
        call!(
            self,
            C_Sign(
                session,
                data.as_mut_ptr(),
                length(&data),
                mac.as_mut_ptr(),
                &raw mut size
            )
        )?;
        mac.truncate(size.try_into().unwrap());
        Ok(mac)
    }

    pub(crate) fn verify(
        &self,
        session: CK_SESSION_HANDLE,
        key: CK_OBJECT_HANDLE,
        data: &[u8],
        mac: &[u8],
    ) -> Result<(), Rv> {
        call!(
            self,
            C_VerifyInit(session, &mut mechanism(CKM_SHA256_HMAC), key)
        )?;
        let (mut data, mut mac) = (data.to_vec(), mac.to_vec());
        call!(
            self,
            C_Verify(
                session,
                data.as_mut_ptr(),
                length(&data),
                mac.as_mut_ptr(),
                length(&mac)
            )
        )
    }

    /// Reads an attribute with room for this many bytes; without room, asks for its size.
    pub(crate) fn read_with(
        &self,
        session: CK_SESSION_HANDLE,
        object: CK_OBJECT_HANDLE,
        name: CK_ATTRIBUTE_TYPE,
        room: Option<usize>,
    ) -> Result<Vec<u8>, Rv> {
        let mut bytes = vec![0_u8; room.unwrap_or_default()];
        let mut attribute = CK_ATTRIBUTE {
            type_: name,
            pValue: room.map_or(ptr::null_mut(), |_| bytes.as_mut_ptr().cast()),
            ulValueLen: length(&bytes),
        };
        call!(
            self,
            C_GetAttributeValue(session, object, &raw mut attribute, 1)
        )?;
        bytes.resize(attribute.ulValueLen.try_into().unwrap(), 0);
        Ok(bytes)
    }

    pub(crate) fn read(
        &self,
        session: CK_SESSION_HANDLE,
        object: CK_OBJECT_HANDLE,
        name: CK_ATTRIBUTE_TYPE,
    ) -> Result<Vec<u8>, Rv> {
        self.read_with(session, object, name, Some(256))
    }

    /// The objects with these attributes.
    pub(crate) fn find(
        &self,
        session: CK_SESSION_HANDLE,
        mut values: Vec<Value>,
    ) -> Result<Vec<CK_OBJECT_HANDLE>, Rv> {
        let mut attributes = template(&mut values);
        call!(
            self,
            C_FindObjectsInit(session, attributes.as_mut_ptr(), length(&attributes))
        )?;
        let mut found = [0; 16];
        let mut count = 0;
        call!(
            self,
            C_FindObjects(session, found.as_mut_ptr(), length(&found), &raw mut count)
        )?;
        call!(self, C_FindObjectsFinal(session))?;
        Ok(found[..usize::try_from(count).unwrap()].to_vec())
    }

    /// The objects of this class.
    pub(crate) fn find_class(
        &self,
        session: CK_SESSION_HANDLE,
        class: CK_ULONG,
    ) -> Result<Vec<CK_OBJECT_HANDLE>, Rv> {
        self.find(session, vec![number(CKA_CLASS, class)])
    }
}

/// `CKA_ID` with one byte.
pub(crate) fn id(byte: u8) -> Value {
    Value(CKA_ID, vec![byte])
}

/// The shortest of several calls took at least this long: a busy machine only makes single calls slow.
pub(crate) fn is_slow(minimum: Duration, mut call: impl FnMut()) -> bool {
    (0..10).all(|_| {
        let began = Instant::now();
        call();
        began.elapsed() >= minimum
    })
}
