//! Changes of records: intent durable, commit, outcome durable, answer.

use std::sync::Arc;

use crate::{
    audit::{EntryKind, OpenIntent},
    call::{Call, RequestId, Timestamp},
    envelope::{Context, Envelope},
    error::{Error, Reason},
    key::{ID_BYTES, KeyAddress, RecordId, Revision, WrappingKeyId},
    principal::{Action, Principal},
    secret::KeyMaterial,
    store::{self, NewRevision, RecordInfo, RecordState, RequestStamp, Stamp},
};

use super::{Broker, UserKeyRef, journal::Draft, observed, policy::Permit, within};

/// What a caller wants changed.
#[derive(Debug)]
pub(super) enum Change {
    Create {
        material: KeyMaterial,
    },
    Replace {
        material: KeyMaterial,
        expected: Revision,
    },
    Delete {
        expected: Revision,
    },
    Undelete,
    Restore {
        revision: Revision,
        expected: Revision,
    },
}

impl Change {
    pub(super) fn action(&self) -> Action {
        match self {
            Self::Create { .. } => Action::Create,
            Self::Replace { .. } => Action::Replace,
            Self::Delete { .. } => Action::Delete,
            Self::Undelete => Action::Undelete,
            Self::Restore { .. } => Action::Restore,
        }
    }
}

/// What the store is asked to commit.
enum Commit {
    Create(NewRevision),
    Supersede(NewRevision),
    Delete(RecordId, Revision),
    Undelete(RecordId, Revision),
}

impl Commit {
    fn describe(&self, draft: &mut Draft) {
        match self {
            Self::Create(new) | Self::Supersede(new) => {
                draft.record(new.record, new.revision);
                draft.wrapping_key(new.wrapping_key);
            }
            Self::Delete(record, revision) | Self::Undelete(record, revision) => {
                draft.record(*record, *revision);
            }
        }
    }
}

/// A change that is ready, or the answer that an earlier call with the same request id got.
enum Prepared {
    Ready(Commit, Stamp),
    Replayed(RecordInfo),
}

/// One mutation under way; owns all it needs, because it may outlive its caller.
struct Mutation {
    principal: Principal,
    call: Call,
    key: UserKeyRef,
    address: KeyAddress,
    change: Change,
    request: Option<RequestId>,
}

impl Broker {
    /// Wraps and stores a new user key.
    pub async fn create(
        self: &Arc<Self>,
        principal: &Principal,
        call: &Call,
        key: &UserKeyRef,
        material: KeyMaterial,
        request: Option<RequestId>,
    ) -> Result<RecordInfo, Error> {
        let change = Change::Create { material };
        self.mutate(principal, call, key, change, request).await
    }

    /// Stores new key material as the next revision, if `expected` is the current one.
    pub async fn replace(
        self: &Arc<Self>,
        principal: &Principal,
        call: &Call,
        key: &UserKeyRef,
        material: KeyMaterial,
        expected: Revision,
        request: Option<RequestId>,
    ) -> Result<RecordInfo, Error> {
        let change = Change::Replace { material, expected };
        self.mutate(principal, call, key, change, request).await
    }

    /// Marks a record deleted, if `expected` is its current revision.
    pub async fn delete(
        self: &Arc<Self>,
        principal: &Principal,
        call: &Call,
        key: &UserKeyRef,
        expected: Revision,
        request: Option<RequestId>,
    ) -> Result<RecordInfo, Error> {
        let change = Change::Delete { expected };
        self.mutate(principal, call, key, change, request).await
    }

    /// Makes a deleted record active again. One that is active is `KEY_EXISTS`.
    pub async fn undelete(
        self: &Arc<Self>,
        principal: &Principal,
        call: &Call,
        key: &UserKeyRef,
        request: Option<RequestId>,
    ) -> Result<RecordInfo, Error> {
        self.mutate(principal, call, key, Change::Undelete, request)
            .await
    }

    /// Makes the material of an earlier revision current again, as a new revision.
    pub async fn restore(
        self: &Arc<Self>,
        principal: &Principal,
        call: &Call,
        key: &UserKeyRef,
        revision: Revision,
        expected: Revision,
        request: Option<RequestId>,
    ) -> Result<RecordInfo, Error> {
        let change = Change::Restore { revision, expected };
        self.mutate(principal, call, key, change, request).await
    }

    async fn mutate(
        self: &Arc<Self>,
        principal: &Principal,
        call: &Call,
        key: &UserKeyRef,
        change: Change,
        request: Option<RequestId>,
    ) -> Result<RecordInfo, Error> {
        let broker = Arc::clone(self);
        let mutation = Mutation {
            principal: principal.clone(),
            call: call.clone(),
            key: key.clone(),
            address: key.address(principal),
            change,
            request,
        };
        let work = async move {
            let (action, call) = (mutation.change.action(), mutation.call.clone());
            observed(action, &call, broker.mutate_to_the_end(mutation)).await
        };
        match self.mutations.spawn(work).await {
            Ok(result) => result,
            Err(panic) => Err(Error::new(Reason::Bug, format!("mutation: {panic}"))),
        }
    }

    async fn mutate_to_the_end(&self, mutation: Mutation) -> Result<RecordInfo, Error> {
        let Mutation {
            principal,
            call,
            key,
            change,
            request,
            ..
        } = &mutation;
        let action = change.action();
        let permit = self.permit(principal, call, action, Some(key)).await?;
        let mut draft = Draft::new(principal, call, action, Some(key));
        draft.policy(permit.policy());
        draft.request(*request);
        match self.prepare(&permit, &mutation, &mut draft).await {
            Ok(Prepared::Ready(commit, stamp)) => {
                self.commit(&mutation, draft, commit, stamp).await
            }
            Ok(Prepared::Replayed(info)) => {
                draft.record(info.id, info.revision);
                self.conclude(draft, Ok(info)).await.map(|(info, _)| info)
            }
            Err(error) => {
                self.record_failure(draft, &error).await?;
                Err(error)
            }
        }
    }

    async fn prepare(
        &self,
        permit: &Permit,
        mutation: &Mutation,
        draft: &mut Draft,
    ) -> Result<Prepared, Error> {
        let Mutation {
            principal,
            call,
            key,
            change,
            request,
            ..
        } = mutation;
        let request = match request {
            None => None,
            Some(id) => {
                let stamp = self
                    .request_stamp(principal, call, key, change, *id)
                    .await?;
                if let Some(result) = self.earlier_result(call, &stamp, key, change).await? {
                    return Ok(Prepared::Replayed(result));
                }
                Some(stamp)
            }
        };
        match self.plan(permit, mutation, draft).await {
            Ok(commit) => {
                let stamp = Stamp {
                    call: call.id,
                    at: Timestamp::now(),
                    request,
                };
                Ok(Prepared::Ready(commit, stamp))
            }
            Err(error) => {
                let error = self.unless_done_meanwhile(mutation, request.as_ref(), error);
                error.await.map(Prepared::Replayed)
            }
        }
    }

    /// A failure, or the answer of another call with the same request id that was committed since this one looked: a client
    /// that tries again at another broker may overtake its own first attempt.
    async fn unless_done_meanwhile(
        &self,
        mutation: &Mutation,
        request: Option<&RequestStamp>,
        error: Error,
    ) -> Result<RecordInfo, Error> {
        let Some(stamp) = request.filter(|_| is_of_the_record(error.reason())) else {
            return Err(error);
        };
        let Mutation {
            call, key, change, ..
        } = mutation;
        match self.earlier_result(call, stamp, key, change).await {
            Ok(Some(info)) => Ok(info),
            Err(other) if other.reason() == Reason::RequestIdReused => Err(other),
            _ => Err(error),
        }
    }

    async fn plan(
        &self,
        permit: &Permit,
        mutation: &Mutation,
        draft: &mut Draft,
    ) -> Result<Commit, Error> {
        let Mutation { call, address, .. } = mutation;
        match &mutation.change {
            Change::Create { material } => {
                if within(call, self.store.record(address)).await?.is_some() {
                    return Err(Error::new(Reason::KeyExists, "the address is taken"));
                }
                let new = self
                    .wrap(call, address, fresh_record_id()?, Revision::FIRST, material)
                    .await?;
                Ok(Commit::Create(new))
            }
            Change::Replace { material, expected } => {
                let record = self.active_record(permit, call, address, draft).await?;
                check_revision(&record.info, *expected)?;
                let new = self
                    .wrap(call, address, record.info.id, expected.next(), material)
                    .await?;
                Ok(Commit::Supersede(new))
            }
            Change::Restore { revision, expected } => {
                let record = self.active_record(permit, call, address, draft).await?;
                check_revision(&record.info, *expected)?;
                let new = self.rebind(call, &record.info, *revision).await?;
                Ok(Commit::Supersede(new))
            }
            Change::Delete { expected } => {
                let record = self.active_record(permit, call, address, draft).await?;
                check_revision(&record.info, *expected)?;
                Ok(Commit::Delete(record.info.id, *expected))
            }
            Change::Undelete => {
                let record = self.existing_record(permit, call, address, draft).await?;
                match record.info.state {
                    RecordState::Deleted => {
                        Ok(Commit::Undelete(record.info.id, record.info.revision))
                    }
                    RecordState::Active => {
                        Err(Error::new(Reason::KeyExists, "the record is active"))
                    }
                }
            }
        }
    }

    async fn wrap(
        &self,
        call: &Call,
        address: &KeyAddress,
        record: RecordId,
        revision: Revision,
        material: &KeyMaterial,
    ) -> Result<NewRevision, Error> {
        let wrapping_key = self.registry()?.wrapping_key()?;
        let context = Context::Record {
            address,
            record_id: record,
            revision,
        };
        let job = self
            .token
            .wrap(wrapping_key, context, material, call.deadline);
        let envelope = within(call, job).await?;
        Ok(new_revision(address, record, revision, &envelope))
    }

    /// Binds an earlier revision's wrapped bytes to the revision after the current one. The token verifies the old MAC
    /// before it makes the new one; the RSA key is not used.
    async fn rebind(
        &self,
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
            .ok_or_else(|| Error::new(Reason::KeyNotFound, "no such revision"))?;
        let envelope = self.readable_envelope(&stored.envelope).await?;
        let context = |revision| Context::Record {
            address: &info.address,
            record_id: info.id,
            revision,
        };
        let next = info.revision.next();
        let job = self
            .token
            .rebind(&envelope, context(earlier), context(next), call.deadline);
        let envelope = within(call, job).await?;
        Ok(new_revision(&info.address, info.id, next, &envelope))
    }

    /// From here on nothing stops at the caller's deadline: what is begun gets its outcome.
    async fn commit(
        &self,
        mutation: &Mutation,
        mut draft: Draft,
        commit: Commit,
        stamp: Stamp,
    ) -> Result<RecordInfo, Error> {
        mutation.call.deadline.check()?;
        commit.describe(&mut draft);
        let intent = OpenIntent {
            call: stamp.call,
            action: mutation.change.action().as_str().to_owned(),
            at: stamp.at,
        };
        let _durable = self.record_ok(draft.kind(EntryKind::Intent)).await?;
        let request = stamp.request.clone();
        let result = match commit {
            Commit::Create(new) => self.store.create(new, stamp).await,
            Commit::Supersede(new) => self.store.supersede(new, stamp).await,
            Commit::Delete(record, expected) => self.store.delete(record, expected, stamp).await,
            Commit::Undelete(record, _) => self.store.undelete(record, stamp).await,
        };
        if let Err(store::Error::Down(_)) = result {
            // Whether it was committed is not known: `maintain` asks the store until it is.
            self.resolve_later(intent);
            return result.map_err(Error::from);
        }
        let result = match result.map_err(|error| from_commit(error, &mutation.change)) {
            Err(error) => {
                let request = request.as_ref();
                let result = self.unless_done_meanwhile(mutation, request, error).await;
                if let Ok(info) = &result {
                    draft.record(info.id, info.revision);
                }
                result
            }
            result => result,
        };
        let outcome = self.conclude(draft.kind(EntryKind::Outcome), result).await;
        if let Err(error) = &outcome
            && error.reason() == Reason::AuditDown
        {
            self.resolve_later(intent);
        }
        outcome.map(|(info, _)| info)
    }
}

/// A record that changed its state between the look and the commit reads as it would have a moment later.
fn from_commit(error: store::Error, change: &Change) -> Error {
    match (&error, change) {
        (store::Error::State, Change::Undelete) => {
            Error::new(Reason::KeyExists, "the record is active")
        }
        (store::Error::State, _) => Error::new(Reason::KeyNotFound, "the record is deleted"),
        _ => error.into(),
    }
}

/// Whether a failure may be what a mutation finds that was done already.
fn is_of_the_record(reason: Reason) -> bool {
    matches!(
        reason,
        Reason::KeyExists | Reason::KeyNotFound | Reason::KeyState | Reason::Revision
    )
}

fn check_revision(info: &RecordInfo, expected: Revision) -> Result<(), Error> {
    if info.revision == expected {
        Ok(())
    } else {
        let detail = format!("expected {expected}, current is {}", info.revision);
        Err(Error::new(Reason::Revision, detail))
    }
}

fn new_revision(
    address: &KeyAddress,
    record: RecordId,
    revision: Revision,
    envelope: &Envelope,
) -> NewRevision {
    let wrapping_key: WrappingKeyId = envelope.wrapping_key();
    NewRevision {
        address: address.clone(),
        record,
        revision,
        envelope: envelope.to_bytes(),
        wrapping_key,
    }
}

fn fresh_record_id() -> Result<RecordId, Error> {
    let mut bytes = [0; ID_BYTES];
    aws_lc_rs::rand::fill(&mut bytes)
        .map_err(|_| Error::new(Reason::Bug, "the random generator failed"))?;
    Ok(RecordId::from_bytes(bytes))
}
