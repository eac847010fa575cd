//! Creates the jobs of a re-wrap, and reads their results.

use keybroker_core::{
    envelope::{Context, Envelope, MAC_BYTES, Mac, Unsealed},
    key::WrappingKeyId,
};
use keybroker_worker_protocol::wire::{
    self, request,
    rewrap::{OwnKey, Target},
};

use crate::{Error, TokenKey};

/// A re-wrap with its envelope, its context and the new wrapping key.
#[derive(Debug)]
pub(super) struct Rewrap<'a> {
    pub(super) envelope: &'a Envelope,
    pub(super) context: Context<'a>,
    pub(super) to: &'a TokenKey,
}

impl Rewrap<'_> {
    /// Returns the job for a worker that has both wrapping keys.
    pub(super) fn on_one_token(&self) -> Result<request::Job, Error> {
        let [before, after] = Unsealed::message_around(
            self.to.algorithm,
            self.to.id,
            self.wrapped_length(),
            &self.context,
        )
        .map_err(|error| Error::Untrusted(error.to_string()))?;
        Ok(self.job(Target::OwnKey(OwnKey {
            key_id: self.to.id.as_bytes().to_vec(),
            message_before: before,
            message_after: after,
        })))
    }

    /// Returns the job for a worker that has only the old wrapping key.
    pub(super) fn for_another(&self) -> request::Job {
        self.job(Target::Spki(self.to.spki.clone()))
    }

    fn job(&self, target: Target) -> request::Job {
        request::Job::Rewrap(wire::Rewrap {
            envelope: Some(unwrap(self.envelope, &self.context)),
            new_algorithm: self.to.algorithm.number().into(),
            target: Some(target),
        })
    }

    fn wrapped_length(&self) -> usize {
        usize::try_from(self.to.modulus_bits.div_ceil(8)).unwrap_or(usize::MAX)
    }

    /// Reads the result of [`Self::on_one_token`].
    pub(super) fn moved(&self, output: &[u8]) -> Result<Envelope, Error> {
        let (wrapped, mac) = output
            .split_last_chunk::<MAC_BYTES>()
            .ok_or_else(|| self.wrong_length(output))?;
        let mac: Mac = *mac;
        Ok(self.unsealed(wrapped)?.seal(&self.context, mac))
    }

    /// Reads the result of [`Self::for_another`].
    pub(super) fn unsealed(&self, wrapped: &[u8]) -> Result<Unsealed, Error> {
        if wrapped.len() != self.wrapped_length() {
            return Err(self.wrong_length(wrapped));
        }
        Unsealed::new(self.to.algorithm, self.to.id, wrapped.to_vec())
            .map_err(|error| Error::Untrusted(error.to_string()))
    }

    fn wrong_length(&self, output: &[u8]) -> Error {
        Error::Untrusted(format!(
            "the worker returned {} bytes for a re-wrap to wrapping key {}",
            output.len(),
            self.to.id
        ))
    }
}

/// Returns the unwrap job for an envelope and its context.
pub(super) fn unwrap(envelope: &Envelope, context: &Context<'_>) -> wire::Unwrap {
    wire::Unwrap {
        key_id: envelope.wrapping_key().as_bytes().to_vec(),
        message: envelope.mac_message(context).as_bytes().to_vec(),
        mac: envelope.mac().to_vec(),
        algorithm: envelope.algorithm().number().into(),
        wrapped: envelope.wrapped().to_vec(),
    }
}

/// Returns a key that was found on the token.
pub(super) fn key(keys: &[TokenKey], id: WrappingKeyId) -> Result<&TokenKey, Error> {
    keys.iter()
        .find(|key| key.id == id)
        .ok_or(Error::UnknownKey(id))
}
