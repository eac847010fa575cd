//! Opening a token: module, selection, login once, keys found, gated and proved. The same road for a worker and for the
//! one-shot commands.
//!
//! Mitigation: M15 of `THREAT_MODEL.md`.

use cryptoki::{
    context::Pkcs11,
    error::Error,
    session::{Session, UserType},
    slot::Slot,
};

use crate::key::WrappingKeyId;

use super::{
    ExpectedKey, Pin, Settings, TokenInfo,
    classify::{Class, Fault, is_pin_untried},
    keys::{self, KeyPair, PublicSide},
    module,
    operation::{self, Canary},
    select::{self, Selector},
};

/// A token that this process is logged in to.
#[derive(Debug)]
pub(super) struct OpenToken {
    pub(super) module: Pkcs11,
    pub(super) slot: Slot,
    pub(super) info: TokenInfo,
    /// Keeps the login alive: when the last session of a process closes, the token forgets it.
    pub(super) anchor: Session,
}

/// A key that passed the gate and the canary.
#[derive(Clone, Debug)]
pub(super) struct ProvedKey {
    pub(super) id: WrappingKeyId,
    pub(super) public: PublicSide,
    pub(super) canary: Canary,
}

impl OpenToken {
    /// Loads the module, chooses the token and logs in, once. A PIN that may lock the token is not tried.
    pub(super) fn login(settings: &Settings, pin: &Pin, write: bool) -> Result<Self, Fault> {
        let selector = Selector::from_settings(settings)
            .map_err(|what| Fault::new(Class::Configuration, what))?;
        let module = module::load(&settings.module)?;
        let (slot, info) = select::find(&module, &selector)?;
        refuse_last_try(&module, slot)?;
        let anchor = if write {
            module.open_rw_session(slot)?
        } else {
            module.open_ro_session(slot)?
        };
        anchor
            .login(UserType::User, Some(&pin.to_auth_pin()))
            .map_err(|error| refused_login(error, &module, slot, &info))?;
        Ok(Self {
            module,
            slot,
            info,
            anchor,
        })
    }

    /// Finds a key, holds it against what the registry expects, gates and proves it.
    pub(super) fn prove(
        &self,
        settings: &Settings,
        expected: &ExpectedKey,
    ) -> Result<ProvedKey, Fault> {
        let pair = keys::find(&self.anchor, expected.id)?;
        keys::inspect(&self.anchor, &pair, &settings.attribute_exceptions)?.require(pair.id)?;
        let public = keys::public_side(&self.anchor, &pair)?;
        if public.fingerprint != expected.fingerprint {
            return Err(Fault::new(
                Class::Untrusted,
                format!(
                    "wrapping key {} on the token has the public key {}, the registry says {}: this is \
                     another key under the same CKA_ID",
                    pair.id, public.fingerprint, expected.fingerprint
                ),
            ));
        }
        let canary = self.probe(pair.id, &public, settings.allow_oaep_sha1)?;
        Ok(ProvedKey {
            id: pair.id,
            public,
            canary,
        })
    }

    pub(super) fn probe(
        &self,
        id: WrappingKeyId,
        public: &PublicSide,
        allow_oaep_sha1: bool,
    ) -> Result<Canary, Fault> {
        operation::probe(|| self.session(&[id]), id, public, allow_oaep_sha1)
    }

    /// Another session of the same login, with the handles of the keys.
    pub(super) fn session(&self, ids: &[WrappingKeyId]) -> Result<KeySession, Fault> {
        KeySession::open(&self.module, self.slot, ids)
    }
}

/// A login that failed counts as a wrong try unless the code says otherwise, or the token is gone: tokens have answers of
/// their own to a wrong PIN, and lock after a few. So the PIN is not tried again.
fn refused_login(error: Error, module: &Pkcs11, slot: Slot, info: &TokenInfo) -> Fault {
    let untried = matches!(error, Error::Pkcs11(code, _) if is_pin_untried(code));
    let fault = Fault::from(error);
    if untried {
        return fault;
    }
    if fault.class != Class::Pin && module.get_token_info(slot).is_err() {
        return Fault::new(Class::TokenLost, fault.detail);
    }
    Fault::new(
        Class::Pin,
        format!(
            "the token {:?} refused the login ({fault}); the PIN is not tried again until its file changes \
             (`touch` is a change), because a token may lock after a few wrong ones",
            info.label
        ),
    )
}

fn refuse_last_try(module: &Pkcs11, slot: Slot) -> Result<(), Fault> {
    let info = module.get_token_info(slot)?;
    let refused = |what: &str| Err(Fault::new(Class::Pin, what));
    if info.user_pin_locked() {
        return refused(
            "the user PIN is locked: unlock it with the security officer's PIN, then touch the PIN \
             file",
        );
    }
    if info.user_pin_final_try() {
        return refused(
            "one more wrong PIN would lock the token, so none is tried: log in once with the vendor's \
             tool to reset the counter, then touch the PIN file",
        );
    }
    Ok(())
}

/// One session with the handles of the keys, owned by one thread for its life.
#[derive(Debug)]
pub(super) struct KeySession {
    pub(super) session: Session,
    pairs: Vec<KeyPair>,
}

impl KeySession {
    /// Opens a session and finds the keys again: handles die with the session family, and a stale handle may mean
    /// another object.
    pub(super) fn open(module: &Pkcs11, slot: Slot, ids: &[WrappingKeyId]) -> Result<Self, Fault> {
        let session = module.open_ro_session(slot)?;
        let pairs = ids
            .iter()
            .map(|id| keys::find(&session, *id))
            .collect::<Result<_, _>>()?;
        Ok(Self { session, pairs })
    }

    pub(super) fn pair(&self, id: WrappingKeyId) -> Option<&KeyPair> {
        self.pairs.iter().find(|pair| pair.id == id)
    }
}
