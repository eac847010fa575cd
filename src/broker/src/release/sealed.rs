//! Releases a user key sealed to a recipient. The token encrypts the user key, which never reaches this process.
//!
//! Mitigation: M26 of `THREAT_MODEL.md`.

use keybroker_core::{
    call::Call,
    envelope::{Algorithm, Context},
    error::{Error, Reason},
    key::{Fingerprint, Purpose, RecordId, Revision, Sealing},
    principal::{Action, Principal},
};
use keybroker_hsm as hsm;
use keybroker_hsm::{Recipient, Sealed};
use keybroker_policy::{KeyPermit, Release};

use crate::{
    Broker, UserKeyRef,
    journal::{Draft, Recorded},
    observed, within,
};

/// A user key that the token encrypted to a recipient.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SealedUserKey {
    record: RecordId,
    revision: Revision,
    sealed: Sealed,
}

impl SealedUserKey {
    /// The record of the user key.
    pub(crate) fn record(&self) -> RecordId {
        self.record
    }

    /// The bytes that only the recipient can open.
    pub fn ciphertext(&self) -> &[u8] {
        &self.sealed.ciphertext
    }

    /// The algorithm of the ciphertext.
    pub fn algorithm(&self) -> Algorithm {
        self.sealed.algorithm
    }

    /// The fingerprint of the recipient's public key.
    pub fn recipient(&self) -> Fingerprint {
        self.sealed.recipient
    }

    /// The protection of the wrapping key.
    pub fn sealing(&self) -> Sealing {
        self.sealed.sealing
    }

    /// The revision that was released.
    pub fn revision(&self) -> Revision {
        self.revision
    }
}

impl Broker {
    /// Releases a user key to a recipient, in this order: policy, record, one token job, audit entry, answer.
    pub async fn unwrap_sealed(
        &self,
        principal: &Principal,
        call: &Call,
        key: &UserKeyRef,
        recipient: &Recipient,
    ) -> Result<SealedUserKey, Error> {
        observed(Action::Unwrap, call, async {
            let releaser = self.releaser(principal, call);
            self.check_admission(&releaser, principal, call, Action::Unwrap)
                .await?;
            let entered = self.enter(principal, call, Action::Unwrap).await?;
            entered
                .run(Box::pin(
                    self.release_sealed(principal, call, key, recipient),
                ))
                .await
        })
        .await
    }

    async fn release_sealed(
        &self,
        principal: &Principal,
        call: &Call,
        key: &UserKeyRef,
        recipient: &Recipient,
    ) -> Result<SealedUserKey, Error> {
        let form = Release::Sealed(recipient.key.fingerprint());
        let permit = self
            .permit_release(principal, call, Action::Unwrap, key, form)
            .await?;
        let mut draft = Draft::permitted(principal, call, &permit);
        let sealed = self
            .seal_record(principal, &permit, call, recipient, &mut draft)
            .await;
        let sealed: Recorded<SealedUserKey> = self.conclude(draft, sealed).await?;
        let sealed = sealed.into_inner();
        self.uses.note(sealed.record);
        if self.limits.note_release(principal, key.user.as_str()) {
            self.alert_of_bulk_release(principal, call).await;
        }
        Ok(sealed)
    }

    /// Reads the record for which the permit was issued, and lets the token encrypt its user key to the recipient. The
    /// permit must be for a release to this recipient. The caller must conclude the draft before any part of the result
    /// leaves the broker.
    pub(crate) async fn seal_record(
        &self,
        principal: &Principal,
        permit: &KeyPermit,
        call: &Call,
        recipient: &Recipient,
        draft: &mut Draft,
    ) -> Result<SealedUserKey, Error> {
        if permit.release() != Release::Sealed(recipient.key.fingerprint()) {
            return Err(Error::new(
                Reason::Bug,
                "the permit is for another form of release or for another recipient",
            ));
        }
        // The principal of a release chose the recipient. The principal of an approval did not: the member's device did.
        let chose_recipient = permit.action() == Action::Unwrap;
        if chose_recipient {
            self.limits.check_recipients(principal.name())?;
        }
        let record = self.active_record(permit, call, draft).await?;
        let envelope = self.readable_envelope(call, &record.envelope).await?;
        draft.wrapping_key(envelope.wrapping_key());
        if self.purpose_of(&envelope)? != Purpose::Sealed {
            return Err(under_plain_key());
        }
        let context = Context::Record {
            address: permit.address(),
            record_id: record.info.id,
            revision: record.info.revision,
        };
        let caller = self.releaser(principal, call);
        let job = async {
            let released = self
                .token
                .release(&envelope, context, recipient, &caller)
                .await;
            if chose_recipient && matches!(released, Err(hsm::Error::Recipient(_))) {
                self.count_refused_recipient(principal);
            }
            released
        };
        Ok(SealedUserKey {
            sealed: within(call, job).await?,
            record: record.info.id,
            revision: record.info.revision,
        })
    }

    /// Counts a recipient that the token refused for the principal that chose the recipient. The worker repeats a refused
    /// job, so each of these calls costs the token the time of many releases.
    fn count_refused_recipient(&self, principal: &Principal) {
        if self.limits.fail_recipient(principal.name()).is_err() {
            tracing::warn!(
                principal = principal.name(),
                "the token refused too many recipients of one principal; the broker refuses this principal's sealed releases \
                 for a limited time"
            );
        }
    }
}

/// Refuses a sealed release of a record under a plain wrapping key, which cannot unwrap to an object on the token.
fn under_plain_key() -> Error {
    let what = "absent: this key is under a plain wrapping key, which cannot encrypt to a recipient; after an administrator has \
                moved the key to a sealed wrapping key, send the recipient again";
    let detail = "the record is under a plain wrapping key: make a sealed wrapping key the key in use, and re-wrap";
    Error::new(Reason::ReleaseForm, detail).explained("recipient", what)
}
