//! Changes of records, in this order: durable intent, commit, durable outcome, answer.

use std::{sync::Arc, time::Duration};

use keybroker_core::{
    call::{Call, RequestId, Timestamp},
    error::{Error, Reason},
    key::Revision,
    principal::Principal,
    secret::KeyMaterial,
};
use keybroker_policy::KeyPermit;
use keybroker_store as store;
use keybroker_store::{RecordInfo, RequestStamp, Stamp};

use super::{
    Broker, UserKeyRef, caller,
    change::{Change, Mutation},
    commit::Settled,
    journal::{Draft, Recorded},
    plan::Commit,
};

/// The period in which the replacements of a record are counted, in microseconds.
const REPLACEMENTS_WINDOW_US: i64 = 3_600 * 1_000_000;
/// Longest wait for the database when the replacements of a record are counted.
const WATCH_TIMEOUT: Duration = Duration::from_millis(500);

/// A prepared change, or the answer to an earlier call with the same request id.
enum Prepared {
    Ready(Box<(Commit, Stamp)>),
    Replayed(RecordInfo),
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

    /// Stores new key material as the next revision, if `expected` is the current revision.
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

    /// Marks a record as deleted, if `expected` is its current revision.
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

    /// Makes a deleted record active again. Returns `KEY_EXISTS` if the record is active.
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

    /// Stores the user key of an earlier revision as a new revision, which becomes the current revision.
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
            change,
            request,
        };
        self.run_change(mutation.change.action(), call.clone(), async move {
            broker.run_mutation(mutation).await
        })
        .await
    }

    async fn run_mutation(&self, mutation: Mutation) -> Result<RecordInfo, Error> {
        let Mutation {
            principal,
            call,
            key,
            change,
            request,
            ..
        } = &mutation;
        let action = change.action();
        // Deleting and undeleting without a request id need no token job, so they are accepted even if the token is
        // overloaded.
        let needs_token = !matches!(change, Change::Delete { .. } | Change::Undelete);
        if needs_token || request.is_some() {
            let caller = caller(principal, call);
            self.check_admission(&caller, principal, call, action)
                .await?;
        }
        let permit = self.permit_key(principal, call, action, key).await?;
        let mut draft = Draft::permitted(principal, call, &permit);
        draft.request(*request);
        match self.prepare(&permit, &mutation, &mut draft).await {
            Ok(Prepared::Ready(ready)) => {
                let (commit, stamp) = *ready;
                self.commit(&mutation, draft, commit, stamp).await
            }
            Ok(Prepared::Replayed(info)) => self.replay(draft, info).await,
            Err(error) => {
                self.record_failure(draft, &error).await?;
                Err(error)
            }
        }
    }

    async fn prepare(
        &self,
        permit: &KeyPermit,
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
        self.check_acknowledged()?;
        let token = caller(principal, call);
        let request = match request {
            None => None,
            Some(id) => {
                let stamp = self
                    .request_stamp(principal, call, key, change, *id)
                    .await?;
                if let Some(result) = self
                    .earlier_result(&token, call, &stamp, key, change)
                    .await?
                {
                    return Ok(Prepared::Replayed(result));
                }
                Some(stamp)
            }
        };
        let commit = match self.plan(permit, mutation, draft).await {
            Ok(commit) => commit,
            Err(error) => {
                let earlier = self
                    .earlier_after(mutation, request.as_ref(), &error)
                    .await?;
                return earlier.map(Prepared::Replayed).ok_or(error);
            }
        };
        let at = Timestamp::now();
        let request = match request {
            None => None,
            Some(request) => {
                let result = commit.result(at);
                Some(self.with_result(&token, call, request, result).await?)
            }
        };
        let stamp = Stamp {
            call: call.id,
            at,
            request,
        };
        Ok(Prepared::Ready(Box::new((commit, stamp))))
    }

    /// Commits a prepared change. The caller's deadline is checked only at the start. Afterwards, the change runs until
    /// its outcome is recorded.
    async fn commit(
        &self,
        mutation: &Mutation,
        mut draft: Draft,
        commit: Commit,
        stamp: Stamp,
    ) -> Result<RecordInfo, Error> {
        commit.describe(&mut draft);
        if let Err(error) = mutation.call.deadline.check() {
            self.record_failure(draft, &error).await?;
            return Err(error);
        }
        let (request, at) = (stamp.request.clone(), stamp.at);
        let change = async {
            match commit {
                Commit::Create(new) => self.store.create(new, stamp).await,
                Commit::Supersede(new, _) => self.store.supersede(new, stamp).await,
                Commit::Delete(record) => {
                    self.store.delete(record.id, record.revision, stamp).await
                }
                Commit::Undelete(record) => self.store.undelete(record.id, stamp).await,
            }
        };
        let Settled { intent, result } = self.commit_with_intent(&draft, at, change).await?;
        let (result, earlier) = match result {
            Ok(info) => (Ok(info), None),
            Err(error) => {
                let error = from_commit(error, &mutation.change);
                match self.earlier_after(mutation, request.as_ref(), &error).await {
                    Ok(earlier) => (Err(error), earlier),
                    Err(other) => (Err(other), None),
                }
            }
        };
        let outcome = self.close_intent(intent, &draft, result).await;
        match (outcome, earlier) {
            (Err(error), _) if error.reason() == Reason::AuditDown => Err(error),
            (_, Some(info)) => self.replay(draft, info).await,
            (Ok(info), None) => {
                if matches!(
                    mutation.change,
                    Change::Replace { .. } | Change::Restore { .. }
                ) {
                    self.watch_replacements(mutation, &info).await;
                }
                Ok(info)
            }
            (Err(error), None) => Err(error),
        }
    }

    /// Raises an alert about a record that is replaced unusually often: another person may be using the caller's
    /// credential, or a failing program may be retrying. The check never makes the call fail, because the change is
    /// already committed.
    async fn watch_replacements(&self, mutation: &Mutation, info: &RecordInfo) {
        let Some(telling) = self.limits.telling_revision(info.revision) else {
            return;
        };
        let Mutation {
            principal, call, ..
        } = mutation;
        // The change is committed, so its answer must not wait for a hanging database.
        let read = tokio::time::timeout(WATCH_TIMEOUT, self.store.revision(info.id, telling));
        let Ok(read) = read.await else {
            tracing::warn!(
                call_id = %call.id,
                "the database did not answer in time, so the replacements of a record were not counted"
            );
            return;
        };
        let then = match read {
            Ok(Some(stored)) => stored.created,
            // The revision no longer exists. Only the purge removes revisions, long after they were superseded.
            Ok(None) => return,
            Err(error) => {
                tracing::warn!(call_id = %call.id, %error, "cannot count the replacements of a record");
                return;
            }
        };
        let since = info.updated.micros().saturating_sub(then.micros());
        if since >= REPLACEMENTS_WINDOW_US || !self.limits.may_alert_of_replacements(info.id) {
            return;
        }
        keybroker_core::alert!(
            FrequentReplacement, call_id = %call.id, %principal, record = %info.id, revision = info.revision.get(),
            "a record was replaced more than `replacements_per_hour` times within an hour"
        );
        let record = Some((info.id, info.revision));
        let action = "alarm.frequent_replacement";
        if let Err(error) = self.record_alert(principal, call, action, record).await {
            tracing::error!(%error, "cannot write the audit entry of an alert");
        }
    }

    /// Looks again for an earlier call with the same request id, after an error that a concurrent change of the record
    /// can cause. The earlier call may have been committed after the first lookup. If there was an earlier call, this
    /// call is a retry and gets the answer of the earlier call.
    async fn earlier_after(
        &self,
        mutation: &Mutation,
        request: Option<&RequestStamp>,
        error: &Error,
    ) -> Result<Option<RecordInfo>, Error> {
        let rivals = [
            Reason::KeyExists,
            Reason::KeyNotFound,
            Reason::Revision,
            Reason::Limit,
        ];
        match request {
            Some(stamp) if rivals.contains(&error.reason()) => {
                let Mutation {
                    principal,
                    call,
                    key,
                    change,
                    ..
                } = mutation;
                self.earlier_result(&caller(principal, call), call, stamp, key, change)
                    .await
            }
            _ => Ok(None),
        }
    }

    /// Returns the answer of an earlier call with the same request id, and records the retry in the audit log.
    async fn replay(&self, mut draft: Draft, info: RecordInfo) -> Result<RecordInfo, Error> {
        draft.record(info.id, info.revision);
        draft.wrapping_key(info.wrapping_key);
        draft.no_envelope();
        self.conclude(draft, Ok(info))
            .await
            .map(Recorded::into_inner)
    }
}

/// Converts the error of a commit. If another change of the record was committed between the check and the commit,
/// returns the error that the check would return now.
fn from_commit(error: store::Error, change: &Change) -> Error {
    match (&error, change) {
        (store::Error::State, Change::Undelete) => {
            Error::new(Reason::KeyExists, "the record is active")
        }
        (store::Error::State, _) => Error::new(Reason::KeyNotFound, "the record is deleted"),
        _ => error.into(),
    }
}
