//! Prepares a mutation: checks the state of the record and makes the new revision on the token. The preparation does
//! not change the database.

use keybroker_core::{
    call::{Call, Timestamp},
    envelope::{Context, Envelope},
    error::{Error, Reason},
    key::{ID_BYTES, KeyAddress, KeyUse, RecordId, Revision},
    secret::KeyMaterial,
};
use keybroker_hsm::Caller;
use keybroker_policy::KeyPermit;
use keybroker_store::{NewRevision, RecordInfo, RecordState};

use super::{
    Broker, caller,
    change::{Change, Mutation},
    journal::Draft,
    registry::Registry,
    within,
};

/// The change that the store must commit.
pub(super) enum Commit {
    Create(NewRevision),
    /// The new revision, and the record before the change.
    Supersede(NewRevision, RecordInfo),
    Delete(RecordInfo),
    Undelete(RecordInfo),
}

impl Commit {
    /// Adds the record, the wrapping key and the digest of a new envelope to the audit entry.
    pub(super) fn describe(&self, draft: &mut Draft) {
        match self {
            Self::Create(new) | Self::Supersede(new, _) => {
                draft.record(new.record, new.revision);
                draft.wrapping_key(new.wrapping_key);
                draft.envelope(&new.envelope);
            }
            Self::Delete(record) | Self::Undelete(record) => {
                draft.record(record.id, record.revision);
            }
        }
    }

    /// Returns the record after this change. `at` is the time of the commit.
    pub(super) fn result(&self, at: Timestamp) -> RecordInfo {
        match self {
            Self::Create(new) => new.record_info(at),
            Self::Supersede(new, before) => RecordInfo {
                revision: new.revision,
                wrapping_key: new.wrapping_key,
                updated: at,
                ..before.clone()
            },
            Self::Delete(before) => RecordInfo {
                state: RecordState::Deleted,
                updated: at,
                deleted: Some(at),
                ..before.clone()
            },
            Self::Undelete(before) => RecordInfo {
                state: RecordState::Active,
                updated: at,
                deleted: None,
                ..before.clone()
            },
        }
    }
}

impl Broker {
    pub(super) async fn plan(
        &self,
        permit: &KeyPermit,
        mutation: &Mutation,
        draft: &mut Draft,
    ) -> Result<Commit, Error> {
        let (call, address) = (&mutation.call, permit.address());
        let token = &caller(&mutation.principal, call);
        if permit.action() != mutation.change.action() {
            return Err(Error::new(Reason::Bug, "the permit is for another action"));
        }
        match &mutation.change {
            Change::Create { material } => {
                if within(call, self.store.record(address)).await?.is_some() {
                    return Err(Error::new(
                        Reason::KeyExists,
                        "a record with this user and key name exists",
                    ));
                }
                self.check_keys(call, address).await?;
                let new = self
                    .wrap(
                        token,
                        call,
                        address,
                        fresh_record_id()?,
                        Revision::FIRST,
                        material,
                    )
                    .await?;
                Ok(Commit::Create(new))
            }
            Change::Replace { material, expected } => {
                let record = self.active_record(permit, call, draft).await?;
                check_revision(&record.info, *expected)?;
                self.check_revisions(call, &record.info).await?;
                let new = self
                    .wrap(
                        token,
                        call,
                        address,
                        record.info.id,
                        expected.next(),
                        material,
                    )
                    .await?;
                Ok(Commit::Supersede(new, record.info))
            }
            Change::Restore { revision, expected } => {
                let record = self.active_record(permit, call, draft).await?;
                check_revision(&record.info, *expected)?;
                // A restore is permitted even if the record has the maximum number of revisions. Otherwise, a caller
                // who used up the limit could prevent the recovery of an earlier revision.
                let new = self.rebind(token, call, &record.info, *revision).await?;
                Ok(Commit::Supersede(new, record.info))
            }
            Change::Delete { expected } => {
                let record = self.active_record(permit, call, draft).await?;
                check_revision(&record.info, *expected)?;
                Ok(Commit::Delete(record.info))
            }
            Change::Undelete => {
                let record = self.existing_record(permit, call, draft).await?;
                match record.info.state {
                    RecordState::Deleted => Ok(Commit::Undelete(record.info)),
                    RecordState::Active => {
                        Err(Error::new(Reason::KeyExists, "the record is active"))
                    }
                }
            }
        }
    }

    /// Refuses a new key if the user already has the largest permitted number of keys.
    async fn check_keys(&self, call: &Call, address: &KeyAddress) -> Result<(), Error> {
        let most = self.capacity.keys_per_user_max;
        let count = self.store.count_keys(&address.tenant, &address.user, most);
        if within(call, count).await? < most {
            return Ok(());
        }
        let detail = format!(
            "the user has {most} keys, including deleted ones, and `store.keys_per_user_max` allows no more; raise the setting, or \
             remove keys that were deleted long ago with `keybroker store purge`"
        );
        Err(Error::new(Reason::Limit, detail))
    }

    /// Refuses a new revision if the record already has the largest permitted number of revisions.
    /// Old revisions are not removed to make room, because a caller could then replace a key
    /// repeatedly to remove revisions before their retention period ends.
    async fn check_revisions(&self, call: &Call, info: &RecordInfo) -> Result<(), Error> {
        let most = self.capacity.revisions_max;
        // The number of the current revision is an upper bound of the number of stored revisions.
        if info.revision.get() < most.into() {
            return Ok(());
        }
        if within(call, self.store.count_revisions(info.id, most)).await? < most {
            return Ok(());
        }
        let detail = format!(
            "{most} revisions of the record are stored, and `store.revisions_max` allows no more; raise the setting, or run \
             `keybroker store purge`, which removes revisions that were superseded more than `store.retention_days` ago. \
             Earlier revisions can still be restored"
        );
        Err(Error::new(Reason::Limit, detail))
    }

    async fn wrap(
        &self,
        caller: &Caller,
        call: &Call,
        address: &KeyAddress,
        record: RecordId,
        revision: Revision,
        material: &KeyMaterial,
    ) -> Result<NewRevision, Error> {
        let wrapping_key = self
            .ask_registry(call.deadline, Registry::wrapping_key)
            .await?;
        let context = Context::Record {
            address,
            record_id: record,
            revision,
        };
        let job = self.token.wrap(wrapping_key, context, material, caller);
        let envelope = within(call, job).await?;
        Ok(new_revision(address, record, revision, &envelope))
    }

    /// Makes a new revision from the wrapped bytes of an earlier revision. The token verifies the MAC of the earlier
    /// revision before it makes the new MAC; the RSA key is not used.
    async fn rebind(
        &self,
        caller: &Caller,
        call: &Call,
        info: &RecordInfo,
        earlier: Revision,
    ) -> Result<NewRevision, Error> {
        if earlier >= info.revision {
            return Err(Error::violation(
                "revision",
                "a revision earlier than expected_revision",
            ));
        }
        let stored = within(call, self.store.revision(info.id, earlier))
            .await?
            .ok_or_else(|| {
                Error::new(
                    Reason::KeyNotFound,
                    "the record does not have this revision",
                )
            })?;
        let envelope = self.readable_envelope(call, &stored.envelope).await?;
        let key = envelope.wrapping_key();
        self.check_key(call.deadline, key, KeyUse::MakeMac).await?;
        let context = |revision| Context::Record {
            address: &info.address,
            record_id: info.id,
            revision,
        };
        let next = info.revision.next();
        let job = self
            .token
            .rebind(&envelope, context(earlier), context(next), caller);
        let envelope = within(call, job).await?;
        Ok(new_revision(&info.address, info.id, next, &envelope))
    }
}

fn check_revision(info: &RecordInfo, expected: Revision) -> Result<(), Error> {
    if info.revision == expected {
        Ok(())
    } else {
        let detail = format!(
            "the call expects revision {expected}, but the current revision is {}",
            info.revision
        );
        Err(Error::new(Reason::Revision, detail))
    }
}

fn new_revision(
    address: &KeyAddress,
    record: RecordId,
    revision: Revision,
    envelope: &Envelope,
) -> NewRevision {
    NewRevision {
        address: address.clone(),
        record,
        revision,
        envelope: envelope.to_bytes(),
        wrapping_key: envelope.wrapping_key(),
    }
}

fn fresh_record_id() -> Result<RecordId, Error> {
    let mut bytes = [0; ID_BYTES];
    aws_lc_rs::rand::fill(&mut bytes)
        .map_err(|_| Error::new(Reason::Bug, "the random generator failed"))?;
    Ok(RecordId::from_bytes(bytes))
}
