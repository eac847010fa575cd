//! MACs verified one after another, on a session of their own.

use crate::{
    classify::{Class, Fault},
    keys::KeyPair,
    open::KeySession,
    operation,
};
use keybroker_core::{
    envelope::{Mac, mac::MacMessage},
    key::WrappingKeyId,
};

use super::{Admin, AdminError};

/// What a token in doubt makes a MAC of. No row has such a message.
const PROOF: &[u8] = b"keybroker: is this token well?";

/// Verifies MACs without looking for the key each time.
#[derive(Debug)]
pub struct Verifier<'a> {
    admin: &'a Admin,
    ids: Vec<WrappingKeyId>,
    session: KeySession,
}

impl<'a> Verifier<'a> {
    pub(super) fn new(admin: &'a Admin, ids: &[WrappingKeyId]) -> Result<Self, AdminError> {
        Ok(Self {
            admin,
            ids: ids.to_vec(),
            session: admin.token.session(ids)?,
        })
    }

    /// Whether a MAC verifies. The key is one of those that this was made for.
    pub fn verify(
        &mut self,
        id: WrappingKeyId,
        message: &MacMessage,
        mac: &Mac,
    ) -> Result<bool, AdminError> {
        match self.ask(id, message, mac)? {
            Answer::Good => Ok(true),
            Answer::Wrong => Ok(false),
            Answer::Doubtful(_) => self.verify_in_doubt(id, message, mac),
        }
    }

    /// Some tokens call a wrong MAC by a code that also means trouble of their own, and may leave the session stuck. So
    /// there is another session, on which a good MAC must verify; then the same answer is about this MAC.
    fn verify_in_doubt(
        &mut self,
        id: WrappingKeyId,
        message: &MacMessage,
        mac: &Mac,
    ) -> Result<bool, AdminError> {
        self.renew()?;
        let pair = self.pair(id)?;
        let good = operation::mac(&self.session.session, pair, PROOF)?;
        operation::verify(&self.session.session, pair, PROOF, &good)?;
        match self.ask(id, message, mac)? {
            Answer::Good => Ok(true),
            Answer::Wrong => Ok(false),
            Answer::Doubtful(fault) => {
                tracing::debug!(%fault, "a MAC was refused ambiguously, twice");
                self.renew()?;
                Ok(false)
            }
        }
    }

    fn renew(&mut self) -> Result<(), AdminError> {
        self.session = self.admin.token.session(&self.ids)?;
        Ok(())
    }

    fn pair(&self, id: WrappingKeyId) -> Result<&KeyPair, AdminError> {
        self.session.pair(id).ok_or_else(|| {
            AdminError::Untrusted(format!("binding key {id} was not looked for on the token"))
        })
    }

    fn ask(
        &self,
        id: WrappingKeyId,
        message: &MacMessage,
        mac: &Mac,
    ) -> Result<Answer, AdminError> {
        let pair = self.pair(id)?;
        match operation::verify(&self.session.session, pair, message.as_bytes(), mac) {
            Ok(()) => Ok(Answer::Good),
            Err(fault) => match fault.class {
                Class::Input => Ok(Answer::Wrong),
                Class::Ambiguous => Ok(Answer::Doubtful(fault)),
                _ => Err(fault.into()),
            },
        }
    }
}

/// What the token says of a MAC.
enum Answer {
    Good,
    Wrong,
    Doubtful(Fault),
}
