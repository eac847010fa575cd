//! Releases a user key in plaintext.
//!
//! Mitigation: M13 of `THREAT_MODEL.md`.

use keybroker_core::{
    call::Call,
    envelope::{Context, Envelope, Kind},
    error::{Error, Reason},
    key::{KeyUse, RecordId, Revision},
    principal::{Action, Principal},
    secret::KeyMaterial,
};
use keybroker_hsm::leave_if_slow;
use keybroker_policy::KeyPermit;
use keybroker_store::{Record, RecordState};

use super::{
    Broker, UserKeyRef,
    journal::{Draft, Recorded},
    observed, within,
};

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
            let entered = self.enter(principal, call).await?;
            entered
                .run(Box::pin(self.release(principal, call, key)))
                .await
        })
        .await
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
    async fn alert_of_bulk_release(&self, principal: &Principal, call: &Call) {
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
        if permit.action() != Action::Unwrap {
            return Err(Error::new(Reason::Bug, "the permit is for another action"));
        }
        let record = self.active_record(permit, call, draft).await?;
        let envelope = self.readable_envelope(call, &record.envelope).await?;
        draft.wrapping_key(envelope.wrapping_key());
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
