//! Re-wrap: moves key material from one wrapping key to another. From a plain wrapping key, the plaintext key material
//! exists only in the memory of this process and only during the job, and is overwritten afterwards. From a sealed wrapping
//! key, the token itself unwraps and wraps, and only to another sealed wrapping key.
//!
//! Mitigation: M22 of `THREAT_MODEL.md`.

use zeroize::Zeroizing;

use keybroker_core::{
    envelope::Algorithm,
    key::{Purpose, WrappingKeyId},
    secret::KEY_MATERIAL_BYTES_MAX,
};
use keybroker_worker_protocol::{
    oaep::WrapKey,
    wire::{
        self, FailureClass,
        rewrap::{OwnKey, Target as WireTarget},
    },
};

use crate::open::ProvedKey;

use super::{SessionThread, Stop, algorithm};

/// The public key of the target of a session thread's last re-wrap. A run re-wraps many rows to one
/// target, so the key is parsed only once.
#[derive(Debug)]
pub(super) struct Target {
    spki: Vec<u8>,
    key: WrapKey,
}

impl SessionThread {
    /// Verifies the MAC, decrypts, and encrypts for the new wrapping key. Returns the new wrapped bytes. If this worker
    /// has the new wrapping key, the new MAC follows the wrapped bytes.
    pub(super) fn rewrap(
        &mut self,
        job: &wire::Rewrap,
        deadline: u64,
    ) -> Result<Zeroizing<Vec<u8>>, Stop> {
        let malformed = |what| Stop::failed(FailureClass::Unspecified, what);
        let from = job
            .envelope
            .as_ref()
            .ok_or_else(|| malformed("the re-wrap has no envelope"))?;
        let target = job
            .target
            .as_ref()
            .ok_or_else(|| malformed("the re-wrap has no target"))?;
        let algorithm = algorithm(job.new_algorithm)
            .ok_or_else(|| malformed("the algorithm of the re-wrap is unknown"))?;
        let (_, pair) = self.session(&from.key_id)?;
        let wrapped = match pair.purpose {
            Purpose::Plain => self.decrypt_and_wrap(from, target, algorithm, deadline)?,
            Purpose::Sealed => self.seal_for(from, target, algorithm, deadline)?,
        };
        match target {
            WireTarget::Spki(_) => Ok(Zeroizing::new(wrapped)),
            WireTarget::OwnKey(own) => self.with_new_mac(own, wrapped, deadline),
        }
    }

    fn decrypt_and_wrap(
        &mut self,
        from: &wire::Unwrap,
        target: &WireTarget,
        algorithm: Algorithm,
        deadline: u64,
    ) -> Result<Vec<u8>, Stop> {
        self.prepare(target, algorithm)?;
        // The MAC is verified first, so that the RSA key only decrypts bytes that were stored for this context.
        self.verify(&from.key_id, &from.message, &from.mac, deadline)?;
        let material = self.decrypt(from, deadline)?;
        self.wrap_again(&material)
    }

    /// Makes a sealed release to the public key of the target, which is a sealed wrapping key. The front has checked the
    /// purpose of a target on another token.
    fn seal_for(
        &mut self,
        from: &wire::Unwrap,
        target: &WireTarget,
        algorithm: Algorithm,
        deadline: u64,
    ) -> Result<Vec<u8>, Stop> {
        let spki = match target {
            WireTarget::Spki(spki) => spki.clone(),
            WireTarget::OwnKey(own) => {
                let key = self.own_key(own)?;
                if key.place.purpose != Purpose::Sealed {
                    let what = "user keys are not moved from a sealed to a plain wrapping key";
                    return Err(Stop::failed(FailureClass::UnknownKey, what));
                }
                key.public.spki.clone()
            }
        };
        self.verify(&from.key_id, &from.message, &from.mac, deadline)?;
        self.seal(from, &spki, algorithm, deadline)
    }

    /// Parses the public key of the target, unless it is already parsed.
    fn prepare(&mut self, target: &WireTarget, algorithm: Algorithm) -> Result<(), Stop> {
        let spki = match target {
            WireTarget::Spki(spki) => spki,
            WireTarget::OwnKey(own) => self.own_spki(own)?,
        };
        let is_ready = self
            .target
            .as_ref()
            .is_some_and(|known| known.spki == *spki && known.key.algorithm() == algorithm);
        if is_ready {
            return Ok(());
        }
        let key = WrapKey::new(spki, algorithm)
            .map_err(|error| Stop::failed(FailureClass::UnknownKey, error.to_string()))?;
        let spki = spki.clone();
        self.target = Some(Target { spki, key });
        Ok(())
    }

    /// Returns the public key of one of this worker's wrapping keys. The worker computed the public
    /// key from the objects on the token.
    fn own_spki(&self, own: &OwnKey) -> Result<&Vec<u8>, Stop> {
        self.own_key(own).map(|key| &key.public.spki)
    }

    fn own_key(&self, own: &OwnKey) -> Result<&ProvedKey, Stop> {
        let id = WrappingKeyId::from_slice(&own.key_id);
        let mut keys = self.shared.keys.iter();
        keys.find(|key| Some(key.place.id) == id).ok_or_else(|| {
            Stop::failed(
                FailureClass::UnknownKey,
                "the new wrapping key was not in the setup of the worker",
            )
        })
    }

    fn wrap_again(&self, material: &[u8]) -> Result<Vec<u8>, Stop> {
        if !(1..=KEY_MATERIAL_BYTES_MAX).contains(&material.len()) {
            return Err(Stop::failed(
                FailureClass::Damaged,
                "the decrypted key material has a length that is not permitted",
            ));
        }
        let target = self.target.as_ref().ok_or_else(|| {
            Stop::failed(
                FailureClass::Unspecified,
                "the target of the re-wrap is not ready",
            )
        })?;
        let wrapped = target.key.wrap(material);
        wrapped.map_err(|error| Stop::failed(FailureClass::BackOff, error.to_string()))
    }

    fn with_new_mac(
        &mut self,
        own: &OwnKey,
        mut wrapped: Vec<u8>,
        deadline: u64,
    ) -> Result<Zeroizing<Vec<u8>>, Stop> {
        let message = [&own.message_before[..], &wrapped, &own.message_after].concat();
        let mac = self.mac(&own.key_id, &message, deadline)?;
        wrapped.extend_from_slice(&mac);
        Ok(Zeroizing::new(wrapped))
    }
}
