//! The job of a sealed release: the token unwraps the user key into a session object, and wraps this object under the public
//! key of the recipient. The session is closed after every failure, and its objects with it.

use std::cell::Cell;

use zeroize::Zeroizing;

use keybroker_core::{envelope::Algorithm, key::Purpose};
use keybroker_worker_protocol::wire::{self, FailureClass};

use crate::{classify::Fault, sealed::SealedKey};

use super::{SessionThread, Stop, algorithm, check_deadline, require};

impl SessionThread {
    /// Verifies the MAC and makes the sealed release. Returns the bytes for the recipient.
    pub(super) fn release(
        &mut self,
        job: &wire::Release,
        deadline: u64,
    ) -> Result<Zeroizing<Vec<u8>>, Stop> {
        let malformed = |what| Stop::failed(FailureClass::Unspecified, what);
        let from = job
            .envelope
            .as_ref()
            .ok_or_else(|| malformed("the release has no envelope"))?;
        let algorithm = algorithm(job.algorithm)
            .ok_or_else(|| malformed("the algorithm of the release is unknown"))?;
        // The MAC is verified first, so that the RSA key only unwraps bytes that were stored for this context.
        self.verify(&from.key_id, &from.message, &from.mac, deadline)?;
        self.seal(from, &job.recipient, algorithm, deadline)
            .map(Zeroizing::new)
    }

    /// Unwraps and wraps again on the token, after the MAC was verified. `to` is a DER SubjectPublicKeyInfo.
    pub(super) fn seal(
        &mut self,
        from: &wire::Unwrap,
        to: &[u8],
        to_algorithm: Algorithm,
        deadline: u64,
    ) -> Result<Vec<u8>, Stop> {
        let from_algorithm = algorithm(from.algorithm)
            .ok_or_else(|| Stop::failed(FailureClass::Damaged, "unknown algorithm"))?;
        check_deadline(deadline)?;
        let (session, pair) = self.session(&from.key_id)?;
        require(pair, Purpose::Sealed)?;
        let key = SealedKey {
            private: pair.private,
            algorithm: from_algorithm,
            wrapped: from.wrapped.clone(),
        };
        // The class of the failure if the token refuses the current step although the self-test passes.
        let refusal = Cell::new(FailureClass::Recipient);
        let released = session
            .recipients
            .borrow_mut()
            .object(&session.session, to)
            .and_then(|recipient| {
                // The MAC was valid, so the caller did not cause a failure of this step.
                refusal.set(FailureClass::Damaged);
                key.with_unwrapped(&session.session, |object| {
                    refusal.set(FailureClass::Recipient);
                    let wrapped = recipient.wrap(&session.session, object, to_algorithm)?;
                    // Only the removal of the object follows.
                    refusal.set(FailureClass::BackOff);
                    Ok::<_, Fault>(wrapped)
                })
            });
        released
            .inspect(|_| self.shared.last_answer.note())
            .map_err(|fault| self.stop(fault, &from.key_id, deadline, refusal.get()))
    }
}
