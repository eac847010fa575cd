//! The PKCS#11 calls that the crate `cryptoki` cannot make. This crate contains the only unsafe code of the product.
//!
//! [`Module`] and [`Session`] dereference to the types of `cryptoki`, and replace or add the following eight calls:
//!
//! - `C_GetSlotList`: `cryptoki` 0.12 repeats the call forever if a module returns `CKR_BUFFER_TOO_SMALL` with an
//!   unchanged number of slots. For example, the remote client of p11-kit returns this code if its server has no token.
//!   This crate repeats the call only a few times, and does not read the list if the number of slots is 0.
//!
//! - `C_GetTokenInfo`: `cryptoki` 0.12 parses the time of a token with `CKF_CLOCK_ON_TOKEN`.
//!   `cryptoki` returns an error if the text is not a valid time, such as `21:38:18` from
//!   opencryptoki before 3.11. This crate returns the time as text. The broker does not use the
//!   time.
//!
//! - `C_GetAttributeValue` for attributes of any length: `cryptoki` first asks for the length without a buffer. The
//!   query for the length fails with the remote client of p11-kit, and with nShield for some attributes. This crate
//!   passes a buffer in the first call.
//!
//! - `C_Initialize` with a string in `pReserved`: the softoken of NSS requires this string.
//!
//! - `C_WrapKey` with three mechanisms that `cryptoki` 0.12 does not have ([`WrapMechanism`]).
//!
//! - `C_GenerateKeyPair` and `C_CreateObject` with `CKA_UNWRAP_TEMPLATE`: `cryptoki` 0.12 does not have this attribute, whose value is an
//!   array of attributes.
//!
//! - `C_Decrypt`, `C_Sign` and `C_WrapKey`: `cryptoki` 0.12 calls each of them twice, the first time for the length of
//!   the output. Each call is a round trip to a device on the network. This crate passes a buffer in the first call. The
//!   caller owns the buffer, so that no other buffer contains the plaintext.
//!
//! The module is loaded twice: by `cryptoki`, which does not give access to its function list, and
//! by this crate. The dynamic loader loads the library only once, so `cryptoki` and this crate use
//! the same library. The client module of p11-kit, however, makes a new connection with its own
//! sessions for each function list. With the client module of p11-kit, `cryptoki` makes all calls
//! of the list above, and `C_WrapKey` with the mechanisms of [`WrapMechanism`] is not available. For this client module,
//! this crate uses its own connection only to find out whether a slot has a token.

mod calls;
mod token_info;

use std::{ffi::CString, ops::Deref, path::Path};

use cryptoki::{
    context::{CInitializeArgs, CInitializeFlags, Function, Pkcs11},
    error::{Error, Result, RvError},
    mechanism::Mechanism,
    object::{Attribute, AttributeType, ObjectHandle},
    slot::Slot,
};
use zeroize::Zeroizing;

use calls::{Functions, Value, unwrap_template};
pub use token_info::TokenInfo;

/// A PKCS#11 module of this process.
#[derive(Clone, Debug)]
pub struct Module {
    cryptoki: Pkcs11,
    functions: Functions,
    /// Whether the function lists of `cryptoki` and of this crate share their sessions.
    is_shared: bool,
}

impl Module {
    /// Loads the library at this path. The caller must have checked that other users cannot replace the library file.
    pub fn load(path: &Path) -> Result<Self> {
        Ok(Self {
            cryptoki: Pkcs11::new(path)?,
            functions: Functions::load(path)?,
            is_shared: true,
        })
    }

    /// Calls `C_Initialize` with locking by the operating system. Without locking, SoftHSM crashes when two threads use
    /// it. `reserved` becomes `pReserved`. Modules that do not expect a string return an error for a string.
    pub fn initialize(&mut self, reserved: Option<CString>) -> Result<()> {
        if let Some(text) = reserved {
            return self.functions.initialize(Some(text));
        }
        let arguments = CInitializeArgs::new(CInitializeFlags::OS_LOCKING_OK);
        let result = self.cryptoki.initialize(arguments);
        self.is_shared = self.functions.are_initialized();
        result
    }

    /// Calls `C_GetSlotList` and returns the slots with a token.
    pub fn slots_with_token(&self) -> Result<Vec<Slot>> {
        if self.is_shared {
            return self.functions.slots_with_token();
        }
        self.functions.initialize(None)?;
        let count = self.functions.count_slots_with_token();
        let ended = self.functions.finalize();
        if count? == 0 {
            return Ok(Vec::new());
        }
        ended?;
        self.cryptoki.get_slots_with_token()
    }

    /// Calls `C_GetTokenInfo`.
    pub fn get_token_info(&self, slot: Slot) -> Result<TokenInfo> {
        if self.is_shared {
            return self.functions.token_info(slot);
        }
        let info = self.cryptoki.get_token_info(slot)?;
        Ok(TokenInfo::from(info))
    }

    /// Calls `C_GetSlotInfo`, and returns whether the slot is a hardware slot (`CKF_HW_SLOT`).
    pub fn is_hardware_slot(&self, slot: Slot) -> Result<bool> {
        Ok(self.cryptoki.get_slot_info(slot)?.hardware_slot())
    }

    /// Opens a read-only session.
    pub fn open_ro_session(&self, slot: Slot) -> Result<Session> {
        Ok(self.wrapped(self.cryptoki.open_ro_session(slot)?))
    }

    /// Opens a read-write session.
    pub fn open_rw_session(&self, slot: Slot) -> Result<Session> {
        Ok(self.wrapped(self.cryptoki.open_rw_session(slot)?))
    }

    fn wrapped(&self, session: cryptoki::session::Session) -> Session {
        Session {
            cryptoki: session,
            functions: self.is_shared.then(|| self.functions.clone()),
        }
    }
}

impl Deref for Module {
    type Target = Pkcs11;

    fn deref(&self) -> &Pkcs11 {
        &self.cryptoki
    }
}

/// The mechanisms of `C_WrapKey` that `cryptoki` 0.12 does not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WrapMechanism {
    /// `CKM_AES_KEY_WRAP_KWP` of PKCS #11 3.0: AES key wrap with padding (RFC 5649).
    AesKeyWrapKwp,
    /// `CKM_AES_KEY_WRAP_PKCS7` of PKCS #11 3.0: AES key wrap (RFC 3394) after PKCS #7 padding.
    AesKeyWrapPkcs7,
    /// `CKM_RSA_AES_KEY_WRAP`: AES key wrap with padding under a new AES-256 key, which is encrypted under an RSA public
    /// key with OAEP and SHA-1.
    RsaAesKeyWrap,
}

/// A session of a [`Module`]. Dropping the value closes the session.
#[derive(Debug)]
pub struct Session {
    cryptoki: cryptoki::session::Session,
    functions: Option<Functions>,
}

impl Session {
    /// Reads one attribute (`C_GetAttributeValue`). Returns `None` if the object does not have the attribute or the
    /// token does not reveal its value.
    pub fn attribute(
        &self,
        object: ObjectHandle,
        kind: AttributeType,
    ) -> Result<Option<Attribute>> {
        match self.read(object, kind)? {
            Some(Value::Given(attribute)) => Ok(Some(attribute)),
            Some(Value::Leaked(_)) | None => Ok(None),
        }
    }

    /// Reads one attribute, like [`Session::attribute`]. Also returns bytes that a token wrote
    /// although the token reported that the attribute is sensitive.
    pub fn attribute_or_leak(
        &self,
        object: ObjectHandle,
        kind: AttributeType,
    ) -> Result<Option<Attribute>> {
        match self.read(object, kind)? {
            Some(Value::Given(attribute) | Value::Leaked(attribute)) => Ok(Some(attribute)),
            None => Ok(None),
        }
    }

    fn read(&self, object: ObjectHandle, kind: AttributeType) -> Result<Option<Value>> {
        match &self.functions {
            Some(functions) => functions.attribute(&self.cryptoki, object, kind),
            None => Ok(self
                .attribute_by_length_query(object, kind)?
                .map(Value::Given)),
        }
    }

    /// Reads one attribute with `cryptoki`, which first queries the length. The token report shows whether a token
    /// answers the query for the length.
    pub fn attribute_by_length_query(
        &self,
        object: ObjectHandle,
        kind: AttributeType,
    ) -> Result<Option<Attribute>> {
        let read = self.cryptoki.get_attributes(object, &[kind])?;
        Ok(read.into_iter().next())
    }

    /// Wraps a key under another key (`C_WrapKey`). Returns `None` if the function list of this crate cannot use the
    /// session, because each function list of the module has its own sessions.
    pub fn wrap_key_with(
        &self,
        mechanism: WrapMechanism,
        wrapping: ObjectHandle,
        key: ObjectHandle,
    ) -> Option<Result<Vec<u8>>> {
        let functions = self.functions.as_ref()?;
        Some(functions.wrap_key(&self.cryptoki, mechanism, wrapping, key))
    }
}

impl Session {
    /// Decrypts (`C_DecryptInit`, `C_Decrypt`) into a buffer, and returns the length of the plaintext in bytes. If the
    /// plaintext is longer than the buffer, returns `CKR_BUFFER_TOO_SMALL`. After an error, the operation may still be
    /// active in the session.
    pub fn decrypt_into(
        &self,
        mechanism: &Mechanism<'_>,
        key: ObjectHandle,
        ciphertext: &[u8],
        plaintext: &mut [u8],
    ) -> Result<usize> {
        let Some(functions) = &self.functions else {
            let bytes = Zeroizing::new(self.cryptoki.decrypt(mechanism, key, ciphertext)?);
            return copied(&bytes, plaintext, Function::Decrypt);
        };
        self.cryptoki.decrypt_init(mechanism, key)?;
        functions.decrypt(&self.cryptoki, ciphertext, plaintext)
    }

    /// Writes a signature or a MAC (`C_SignInit`, `C_Sign`) into a buffer, and returns its length in bytes. The errors
    /// are the same as for [`Session::decrypt_into`].
    pub fn sign_into(
        &self,
        mechanism: &Mechanism<'_>,
        key: ObjectHandle,
        message: &[u8],
        signature: &mut [u8],
    ) -> Result<usize> {
        let Some(functions) = &self.functions else {
            let bytes = self.cryptoki.sign(mechanism, key, message)?;
            return copied(&bytes, signature, Function::Sign);
        };
        self.cryptoki.sign_init(mechanism, key)?;
        functions.sign(&self.cryptoki, message, signature)
    }
}

impl Session {
    /// Wraps a key (`C_WrapKey`) into a buffer, and returns the length of the wrapped key in bytes. If the wrapped key is
    /// longer than the buffer, returns `CKR_BUFFER_TOO_SMALL`.
    pub fn wrap_key_into(
        &self,
        mechanism: &Mechanism<'_>,
        wrapping: ObjectHandle,
        key: ObjectHandle,
        wrapped: &mut [u8],
    ) -> Result<usize> {
        let Some(functions) = &self.functions else {
            let bytes = self.cryptoki.wrap_key(mechanism, wrapping, key)?;
            return copied(&bytes, wrapped, Function::WrapKey);
        };
        functions.wrap_key_into(&self.cryptoki, mechanism, wrapping, key, wrapped)
    }

    /// Generates a key pair (`C_GenerateKeyPair`) whose private key has `CKA_UNWRAP_TEMPLATE`: the attributes that every
    /// object must have that the private key unwraps. Returns the public and the private object.
    pub fn generate_unwrapping_pair(
        &self,
        mechanism: &Mechanism<'_>,
        public: &[Attribute],
        private: &[Attribute],
        unwrapped: &[Attribute],
    ) -> Result<(ObjectHandle, ObjectHandle)> {
        let private = [private, &[unwrap_template(unwrapped)]].concat();
        self.cryptoki.generate_key_pair(mechanism, public, &private)
    }

    /// Creates a private key (`C_CreateObject`) with `CKA_UNWRAP_TEMPLATE`, like [`generate_unwrapping_pair`](Self::generate_unwrapping_pair).
    /// The template is unchanged afterwards. It is not copied, because it contains the secret parts of the key.
    pub fn create_unwrapping_object(
        &self,
        template: &mut Vec<Attribute>,
        unwrapped: &[Attribute],
    ) -> Result<ObjectHandle> {
        template.push(unwrap_template(unwrapped));
        let made = self.cryptoki.create_object(template);
        template.pop();
        made
    }
}

/// Copies an output into the caller's buffer, and returns its length.
fn copied(output: &[u8], buffer: &mut [u8], function: Function) -> Result<usize> {
    let place = buffer
        .get_mut(..output.len())
        .ok_or(Error::Pkcs11(RvError::BufferTooSmall, function))?;
    place.copy_from_slice(output);
    Ok(output.len())
}

impl Deref for Session {
    type Target = cryptoki::session::Session;

    fn deref(&self) -> &cryptoki::session::Session {
        &self.cryptoki
    }
}

#[cfg(test)]
mod tests;
