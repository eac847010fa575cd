//! Re-wrap: moves key material from one wrapping key to another. The plaintext key material exists only in the memory
//! of this process and only during the job, and is overwritten afterwards.
//!
//! Mitigation: M22 of `THREAT_MODEL.md`.

use zeroize::Zeroizing;

use keybroker_core::{envelope::Algorithm, key::WrappingKeyId, secret::KEY_MATERIAL_BYTES_MAX};
use keybroker_worker_protocol::{
    oaep::WrapKey,
    wire::{
        self, FailureClass,
        rewrap::{OwnKey, Target as WireTarget},
    },
};

use super::{SessionThread, Stop};

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
        let algorithm = u8::try_from(job.new_algorithm)
            .ok()
            .and_then(Algorithm::from_number)
            .ok_or_else(|| malformed("the algorithm of the re-wrap is unknown"))?;
        self.prepare(target, algorithm)?;
        // The MAC is verified first, so that the RSA key only decrypts bytes that were stored for this context.
        self.verify(&from.key_id, &from.message, &from.mac, deadline)?;
        let wrapped = {
            let material = self.decrypt(from, deadline)?;
            self.wrap_again(&material)?
        };
        match target {
            WireTarget::Spki(_) => Ok(Zeroizing::new(wrapped)),
            WireTarget::OwnKey(own) => self.with_new_mac(own, wrapped, deadline),
        }
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
        let id = WrappingKeyId::from_slice(&own.key_id);
        let mut keys = self.shared.keys.iter();
        keys.find(|key| Some(key.place.id) == id)
            .map(|key| &key.public.spki)
            .ok_or_else(|| {
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
