//! The job of a sealed release, its recipient and its result.

use keybroker_core::{
    envelope::{Algorithm, Context, Envelope},
    key::{Fingerprint, Sealing},
};
use keybroker_worker_protocol::{
    recipient::RecipientKey,
    wire::{self, request},
};

use crate::{Error, TokenKey, job::Output, rewrap};

/// The recipient of a sealed release.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recipient {
    /// The public key to which the token encrypts.
    pub key: RecipientKey,
    /// The algorithm that the recipient requires; `None` for the algorithm of the wrapping key on the token.
    pub algorithm: Option<Algorithm>,
}

/// A user key that the token encrypted to a recipient.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sealed {
    /// The bytes that only the recipient can open.
    pub ciphertext: Vec<u8>,
    /// The algorithm of the ciphertext.
    pub algorithm: Algorithm,
    /// The fingerprint of the recipient's public key.
    pub recipient: Fingerprint,
    /// The protection of the wrapping key.
    pub sealing: Sealing,
}

/// A sealed release with its envelope, its context and its recipient.
#[derive(Debug)]
pub(super) struct Release<'a> {
    envelope: &'a Envelope,
    context: Context<'a>,
    recipient: &'a RecipientKey,
    algorithm: Algorithm,
    sealing: Sealing,
}

impl<'a> Release<'a> {
    /// Checks that the wrapping key makes sealed releases, with the algorithm that the recipient requires. `key` is the
    /// wrapping key of the envelope, with the algorithm that every token with this key supports.
    pub(super) fn new(
        envelope: &'a Envelope,
        context: Context<'a>,
        recipient: &'a Recipient,
        key: &TokenKey,
    ) -> Result<Self, Error> {
        let algorithm = key.algorithm;
        if recipient.algorithm.is_some_and(|other| other != algorithm) {
            return Err(Error::RecipientAlgorithm(algorithm));
        }
        let sealing = key.sealing.ok_or_else(|| {
            let what = format!(
                "wrapping key {} is not a sealed wrapping key, so it cannot make sealed releases",
                key.id
            );
            Error::Untrusted(what)
        })?;
        Ok(Self {
            envelope,
            context,
            recipient: &recipient.key,
            algorithm,
            sealing,
        })
    }

    pub(super) fn job(&self) -> request::Job {
        request::Job::Release(wire::Release {
            envelope: Some(rewrap::unwrap(self.envelope, &self.context)),
            recipient: self.recipient.spki().to_vec(),
            algorithm: self.algorithm.number().into(),
        })
    }

    /// Reads the result of the job.
    pub(super) fn sealed(&self, mut output: Output) -> Result<Sealed, Error> {
        if output.len() != self.recipient.modulus().len() {
            return Err(Error::Untrusted(format!(
                "the worker returned {} bytes for a recipient's key of {} bytes",
                output.len(),
                self.recipient.modulus().len()
            )));
        }
        Ok(Sealed {
            ciphertext: std::mem::take(&mut *output),
            algorithm: self.algorithm,
            recipient: self.recipient.fingerprint(),
            sealing: self.sealing,
        })
    }
}
