//! Releases a user key in plaintext, or sealed to a recipient.
//!
//! Mitigation: M13 of `THREAT_MODEL.md`.

use keybroker_core::{
    call::Call,
    envelope::{Context, Envelope, Kind},
    error::{Error, Reason},
    key::{KeyUse, Purpose, RecordId, Revision},
    principal::{Action, Principal},
    secret::KeyMaterial,
};
use keybroker_hsm::leave_if_slow;
use keybroker_policy::{KeyPermit, Release};
use keybroker_store::{Record, RecordState};

use super::{
    Broker, UserKeyRef,
    journal::{Draft, Recorded},
    observed, within,
};

mod sealed;

pub use sealed::SealedUserKey;

/// A user key that may leave the broker, because its audit entry is on disk.
#[derive(Debug)]
pub struct Released {
    material: KeyMaterial,
    revision: Revision,
}

impl Released {
    /// Creates a released key from an unwrapped key. The audit entry of its release is already on disk.
    fn new(unwrapped: Recorded<Unwrapped>) -> Self {
        let Unwrapped {
            material, revision, ..
        } = unwrapped.into_inner();
        Self { material, revision }
    }

    /// The key.
    pub fn material(&self) -> &KeyMaterial {
        &self.material
    }

    /// The revision that was released.
    pub fn revision(&self) -> Revision {
        self.revision
    }
}

/// An unwrapped key from the token, before the audit entry of its release is on disk.
#[derive(Debug)]
struct Unwrapped {
    record: RecordId,
    material: KeyMaterial,
    revision: Revision,
}

impl Recorded<Unwrapped> {
    fn record(&self) -> RecordId {
        self.get().record
    }
}

impl Broker {
    /// Releases a user key in plaintext, in this order: policy, record, one token job, audit entry, answer.
    pub async fn unwrap(
        &self,
        principal: &Principal,
        call: &Call,
        key: &UserKeyRef,
    ) -> Result<Released, Error> {
        observed(Action::Unwrap, call, async {
            let releaser = self.releaser(principal, call);
            self.check_admission(&releaser, principal, call, Action::Unwrap)
                .await?;
            let entered = self.enter(principal, call, Action::Unwrap).await?;
            entered
                .run(Box::pin(self.release(principal, call, key)))
                .await
        })
        .await
    }

    /// Returns an error if the key in use wraps new user keys so that they cannot be released in plain text. A client that
    /// can only receive plain keys would lose access to a key that it stores.
    pub fn check_plain_release(&self) -> Result<(), Error> {
        let registry = self.registry()?;
        let in_use = registry.wrapping_key().ok();
        let row = in_use.and_then(|id| registry.row(id));
        let is_sealed = row.is_some_and(|row| row.purpose == Purpose::Sealed);
        if !self.sealed_only && !is_sealed {
            return Ok(());
        }
        let what = "a key that this API can release later; the broker now stores user keys for sealed release only. Use the \
                    gRPC API, and pass a recipient with each release";
        let detail = if is_sealed {
            "the key in use is a sealed wrapping key"
        } else {
            "`release.sealed_only` is set"
        };
        Err(Error::new(Reason::ReleaseForm, detail).explained("key", what))
    }

    async fn release(
        &self,
        principal: &Principal,
        call: &Call,
        key: &UserKeyRef,
    ) -> Result<Released, Error> {
        let permit = self
            .permit_key(principal, call, Action::Unwrap, key)
            .await?;
        let mut draft = Draft::permitted(principal, call, &permit);
        let unwrapped = self
            .unwrap_record(principal, &permit, call, &mut draft)
            .await;
        let unwrapped = self.conclude(draft, unwrapped).await?;
        self.uses.note(unwrapped.record());
        if self.limits.note_release(principal, key.user.as_str()) {
            self.alert_of_bulk_release(principal, call).await;
        }
        Ok(Released::new(unwrapped))
    }

    /// Raises an alert about a service that releases the keys of unusually many users: another person may be using its
    /// credential. The alert is raised at most once an hour and also written to the audit log. The release itself was
    /// permitted and has its own audit entry.
    pub(crate) async fn alert_of_bulk_release(&self, principal: &Principal, call: &Call) {
        keybroker_core::alert!(
            BulkRelease, call_id = %call.id, %principal,
            "keys of more users than `released_users_per_hour` were released within an hour"
        );
        if let Err(error) = self
            .record_alert(principal, call, "alarm.bulk_release", None)
            .await
        {
            tracing::error!(%error, "cannot write the audit entry of an alert");
        }
    }

    async fn unwrap_record(
        &self,
        principal: &Principal,
        permit: &KeyPermit,
        call: &Call,
        draft: &mut Draft,
    ) -> Result<Unwrapped, Error> {
        if permit.action() != Action::Unwrap || permit.release() != Release::Plain {
            return Err(Error::new(Reason::Bug, "the permit is for another action"));
        }
        if self.sealed_only {
            return Err(needs_recipient("`release.sealed_only` is set"));
        }
        let record = self.active_record(permit, call, draft).await?;
        let envelope = self.readable_envelope(call, &record.envelope).await?;
        draft.wrapping_key(envelope.wrapping_key());
        if self.purpose_of(&envelope)? == Purpose::Sealed {
            return Err(needs_recipient("the record is under a sealed wrapping key"));
        }
        let context = Context::Record {
            address: permit.address(),
            record_id: record.info.id,
            revision: record.info.revision,
        };
        let caller = self.releaser(principal, call);
        let job = self.token.unwrap(&envelope, context, &caller);
        let material = within(call, job).await?;
        Ok(Unwrapped {
            record: record.info.id,
            material,
            revision: record.info.revision,
        })
    }

    /// Returns the purpose of the wrapping key of an envelope. The token has verified the MAC of the row with the purpose.
    fn purpose_of(&self, envelope: &Envelope) -> Result<Purpose, Error> {
        let registry = self.registry()?;
        let id = envelope.wrapping_key();
        let row = registry.row(id).ok_or_else(|| {
            let detail = format!("wrapping key {id} of the envelope is not registered");
            Error::new(Reason::RecordDamaged, detail)
        })?;
        Ok(row.purpose)
    }

    /// Reads the record for which the permit was issued, if the record is active.
    pub(super) async fn active_record(
        &self,
        permit: &KeyPermit,
        call: &Call,
        draft: &mut Draft,
    ) -> Result<Record, Error> {
        let record = self.existing_record(permit, call, draft).await?;
        match record.info.state {
            RecordState::Active => Ok(record),
            RecordState::Deleted => Err(Error::new(Reason::KeyNotFound, "the record is deleted")),
        }
    }

    /// Reads the record for which the permit was issued, whether the record is active or deleted.
    pub(super) async fn existing_record(
        &self,
        permit: &KeyPermit,
        call: &Call,
        draft: &mut Draft,
    ) -> Result<Record, Error> {
        self.check_acknowledged()?;
        let record = within(call, leave_if_slow(self.store.record(permit.address())))
            .await?
            .ok_or_else(|| {
                Error::new(Reason::KeyNotFound, "no record with this user and key name")
            })?;
        draft.record(record.info.id, record.info.revision);
        Ok(record)
    }

    /// Parses a stored envelope and checks that its wrapping key may unwrap.
    pub(super) async fn readable_envelope(
        &self,
        call: &Call,
        bytes: &[u8],
    ) -> Result<Envelope, Error> {
        let envelope =
            Envelope::parse(bytes).map_err(|error| Error::caused(Reason::RecordDamaged, error))?;
        if envelope.kind() != Kind::Record {
            let detail = "the stored envelope is not the envelope of a user key";
            return Err(Error::new(Reason::RecordDamaged, detail));
        }
        let key = envelope.wrapping_key();
        self.check_key(call.deadline, key, KeyUse::Unwrap).await?;
        Ok(envelope)
    }
}

/// Refuses a plain release. Everybody who may release the key may know that the release needs a recipient.
fn needs_recipient(detail: &str) -> Error {
    let what =
        "the public key of the recipient; this key is released only encrypted to a recipient";
    Error::new(Reason::ReleaseForm, detail).explained("recipient", what)
}
