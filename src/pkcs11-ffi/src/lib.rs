//! The PKCS#11 calls that the crate `cryptoki` cannot make, and nothing else: the only unsafe code of the product.
//!
//! [`Module`] and [`Session`] are those of `cryptoki`, which they dereference to, except for four calls:
//!
//! - `C_GetSlotList`: `cryptoki` 0.12 asks again for ever when a module returns `CKR_BUFFER_TOO_SMALL` and needs no more room than
//!   before. The remote client of p11-kit does so when its server has no token. Here the list is asked for a few times at most, and not
//!   at all when it is empty.
//! - `C_GetTokenInfo`: `cryptoki` 0.12 parses the time of a token with `CKF_CLOCK_ON_TOKEN` and fails when it is not a time.
//!   opencryptoki before 3.11 returns `21:38:18`. Here the time is bytes, which the broker does not need.
//! - `C_GetAttributeValue` for attributes of any length: `cryptoki` asks for the length first, with no buffer. The remote client of
//!   p11-kit fails at that, and so does nShield for some attributes. Here the first call has a buffer.
//! - `C_Initialize` with a string in `pReserved`: the softoken of NSS cannot be used without.
//!
//! The module is loaded twice, once by `cryptoki`, which does not give its function list to others, and once here. The second time
//! the dynamic loader returns the same library. The client module of p11-kit all the same makes a new connection, with sessions of
//! its own, for each function list that it gives; with such a module `cryptoki` makes these calls, too. Whether there is any slot is
//! then asked over a connection for this question alone.

mod calls;
mod token_info;

use std::{ffi::CString, ops::Deref, path::Path};

use cryptoki::{
    context::{CInitializeArgs, CInitializeFlags, Pkcs11},
    error::Result,
    object::{Attribute, AttributeType, ObjectHandle},
    slot::Slot,
};

use calls::{Functions, Value};
pub use token_info::TokenInfo;

/// A PKCS#11 module of this process.
#[derive(Clone, Debug)]
pub struct Module {
    cryptoki: Pkcs11,
    functions: Functions,
    /// Whether both function lists are of one state.
    is_shared: bool,
}

impl Module {
    /// Loads the library at a path. The caller has checked that nobody else can replace it.
    pub fn load(path: &Path) -> Result<Self> {
        Ok(Self {
            cryptoki: Pkcs11::new(path)?,
            functions: Functions::load(path)?,
            is_shared: true,
        })
    }

    /// `C_Initialize` with locking by the operating system: without it SoftHSM crashes as soon as two threads use it. The
    /// string goes into `pReserved`; modules that expect none refuse it.
    pub fn initialize(&mut self, reserved: Option<CString>) -> Result<()> {
        if let Some(text) = reserved {
            return self.functions.initialize(Some(text));
        }
        let arguments = CInitializeArgs::new(CInitializeFlags::OS_LOCKING_OK);
        let result = self.cryptoki.initialize(arguments);
        self.is_shared = self.functions.are_initialized();
        result
    }

    /// `C_GetSlotList`: the slots with a token.
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

    /// `C_GetTokenInfo`.
    pub fn get_token_info(&self, slot: Slot) -> Result<TokenInfo> {
        if self.is_shared {
            return self.functions.token_info(slot);
        }
        let info = self.cryptoki.get_token_info(slot)?;
        Ok(TokenInfo::from(info))
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

/// A session of a [`Module`]. It is closed when it is dropped.
#[derive(Debug)]
pub struct Session {
    cryptoki: cryptoki::session::Session,
    functions: Option<Functions>,
}

impl Session {
    /// `C_GetAttributeValue` for one attribute. `None` if the object does not have it or does not give it.
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

    /// The same, and also what the token wrote beside the answer that it does not give the attribute.
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

    /// The same with the query for the length that `cryptoki` makes: whether a token answers it is a matter of the token report.
    pub fn attribute_by_length_query(
        &self,
        object: ObjectHandle,
        kind: AttributeType,
    ) -> Result<Option<Attribute>> {
        let read = self.cryptoki.get_attributes(object, &[kind])?;
        Ok(read.into_iter().next())
    }
}

impl Deref for Session {
    type Target = cryptoki::session::Session;

    fn deref(&self) -> &cryptoki::session::Session {
        &self.cryptoki
    }
}

#[cfg(test)]
mod tests;
