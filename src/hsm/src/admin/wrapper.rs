//! Wraps many records in a command, without a running broker.

use keybroker_core::{
    envelope::{Context, Envelope, Unsealed},
    secret::KeyMaterial,
};
use keybroker_worker_protocol::{ExpectedKey, oaep::WrapKey};

use super::{Admin, AdminError};

/// Wraps key material under one key. Each thread needs a separate wrapper, because each wrapper has its own admin
/// worker. As in the broker, the public-key operation runs in software and the token computes the MAC.
#[derive(Debug)]
pub struct Wrapper {
    admin: Admin,
    key: ExpectedKey,
    public: WrapKey,
}

impl Admin {
    /// Checks a wrapping key and returns a wrapper for this key.
    pub fn into_wrapper(self, key: ExpectedKey) -> Result<Wrapper, AdminError> {
        self.know([(key.id, &key.objects)])?;
        let checked = self.check(key.id)?;
        if let Some(problem) = checked.problem {
            return Err(AdminError::Untrusted(problem));
        }
        let algorithm = checked
            .algorithm
            .filter(|_| checked.fingerprint == key.fingerprint);
        let Some(algorithm) = algorithm else {
            return Err(AdminError::Untrusted(format!(
                "key {} on the token has the public key {}, but the registry has the public key {}",
                key.id, checked.fingerprint, key.fingerprint
            )));
        };
        let public = WrapKey::new(&checked.spki, algorithm)?;
        Ok(Wrapper {
            admin: self,
            key,
            public,
        })
    }
}

impl Wrapper {
    /// Wraps key material for a context.
    pub fn wrap(
        &self,
        context: &Context<'_>,
        material: &KeyMaterial,
    ) -> Result<Envelope, AdminError> {
        let wrapped = self.public.wrap(material.expose())?;
        let unsealed = Unsealed::new(self.public.algorithm(), self.key.id, wrapped)
            .map_err(|error| AdminError::Untrusted(error.to_string()))?;
        let mac = self
            .admin
            .mac(self.key.id, &unsealed.mac_message(context))?;
        Ok(unsealed.seal(context, mac))
    }
}
