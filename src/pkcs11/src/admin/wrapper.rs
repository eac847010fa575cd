//! Wrapping many records from a one-shot command.

use keybroker_worker_protocol::{ExpectedKey, oaep::WrapKey};

use crate::{
    classify::{Class, Fault},
    open::KeySession,
    operation,
};
use keybroker_core::{
    envelope::{Context, Envelope, Unsealed},
    secret::KeyMaterial,
};

use super::{Admin, AdminError};

/// Wraps under one key with a session of its own, for one thread. As in the broker: the public key in software, the MAC on
/// the token.
#[derive(Debug)]
pub struct Wrapper {
    key: ExpectedKey,
    session: KeySession,
    public: WrapKey,
}

impl Admin {
    /// Checks a key and opens a session to wrap under it.
    pub fn wrapper(&self, key: ExpectedKey) -> Result<Wrapper, AdminError> {
        let proved = self.token.prove(&self.settings, &key)?;
        let public = WrapKey::new(&proved.public.spki, proved.self_test.algorithm())
            .map_err(AdminError::Untrusted)?;
        Ok(Wrapper {
            key,
            session: self.token.session(&[key.id])?,
            public,
        })
    }
}

impl Wrapper {
    /// Wraps key material for the place where it will be kept.
    pub fn wrap(
        &self,
        context: &Context<'_>,
        material: &KeyMaterial,
    ) -> Result<Envelope, AdminError> {
        let untrusted = |what: String| Fault::new(Class::Untrusted, what);
        let wrapped = self.public.wrap(material.expose()).map_err(untrusted)?;
        let unsealed = Unsealed::new(self.public.algorithm(), self.key.id, wrapped)
            .map_err(|error| untrusted(error.to_string()))?;
        let pair = self
            .session
            .pair(self.key.id)
            .expect("the session was opened with this key");
        let message = unsealed.mac_message(context);
        let mac = operation::mac(&self.session.session, pair, message.as_bytes())?;
        Ok(unsealed.seal(context, mac))
    }
}
