//! Verifies many MACs in sequence, on a separate session.

use keybroker_core::key::WrappingKeyId;

use crate::{
    classify::{Class, Fault},
    keys::{KeyPair, KeySession},
    operation,
};

use super::{Admin, AdminError};

/// The message whose MAC the token must verify after an ambiguous answer. No row MAC is computed over this message.
const PROOF: &[u8] = b"keybroker self-test of the MAC";

/// Verifies MACs without searching for the key each time.
#[derive(Debug)]
pub(crate) struct Verifier {
    ids: Vec<WrappingKeyId>,
    session: KeySession,
}

impl Verifier {
    /// Creates a verifier with one integrity key.
    pub(crate) fn new(admin: &Admin, id: WrappingKeyId) -> Result<Self, AdminError> {
        Ok(Self {
            ids: vec![id],
            session: admin.session(&[id])?,
        })
    }

    /// Adds another integrity key, unless it was added before.
    pub(crate) fn add(&mut self, admin: &Admin, id: WrappingKeyId) -> Result<(), AdminError> {
        if self.ids.contains(&id) {
            return Ok(());
        }
        let ids: Vec<_> = self.ids.iter().copied().chain([id]).collect();
        self.session = admin.session(&ids)?;
        self.ids = ids;
        Ok(())
    }

    /// Returns whether a MAC is correct. The integrity key must have been passed to [`Verifier::new`] or
    /// [`Verifier::add`].
    pub(crate) fn verify(
        &mut self,
        admin: &Admin,
        id: WrappingKeyId,
        message: &[u8],
        mac: &[u8],
    ) -> Result<bool, AdminError> {
        match self.ask(id, message, mac)? {
            Answer::Good => Ok(true),
            Answer::Wrong => Ok(false),
            Answer::Doubtful(_) => self.verify_in_doubt(admin, id, message, mac),
        }
    }

    /// Verifies a MAC after an ambiguous answer. Some tokens report a wrong MAC with a code that can also mean a device
    /// error, and leave the session unusable. Therefore a valid MAC is first verified on a new session. If this session
    /// then returns the ambiguous code for the row's MAC, the row's MAC is wrong.
    fn verify_in_doubt(
        &mut self,
        admin: &Admin,
        id: WrappingKeyId,
        message: &[u8],
        mac: &[u8],
    ) -> Result<bool, AdminError> {
        self.renew(admin)?;
        let pair = self.pair(id)?;
        let good = operation::mac(&self.session.session, pair, PROOF)?;
        operation::verify(&self.session.session, pair, PROOF, &good)?;
        match self.ask(id, message, mac)? {
            Answer::Good => Ok(true),
            Answer::Wrong => Ok(false),
            Answer::Doubtful(fault) => {
                tracing::debug!(%fault, "the token rejected a MAC twice with an ambiguous return code");
                self.renew(admin)?;
                Ok(false)
            }
        }
    }

    fn renew(&mut self, admin: &Admin) -> Result<(), AdminError> {
        self.session = admin.session(&self.ids)?;
        Ok(())
    }

    fn pair(&self, id: WrappingKeyId) -> Result<&KeyPair, AdminError> {
        self.session.pair(id).ok_or_else(|| {
            AdminError::Untrusted(format!(
                "the command did not look for the integrity key {id} on the token"
            ))
        })
    }

    fn ask(&self, id: WrappingKeyId, message: &[u8], mac: &[u8]) -> Result<Answer, AdminError> {
        let pair = self.pair(id)?;
        match operation::verify(&self.session.session, pair, message, mac) {
            Ok(()) => Ok(Answer::Good),
            Err(fault) => match fault.class {
                Class::Input => Ok(Answer::Wrong),
                Class::Ambiguous => Ok(Answer::Doubtful(fault)),
                _ => Err(fault.into()),
            },
        }
    }
}

/// The token's answer to the verification of a MAC.
enum Answer {
    Good,
    Wrong,
    Doubtful(Fault),
}
