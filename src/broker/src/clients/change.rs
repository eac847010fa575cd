//! Changes of API clients: intent durable, commit, outcome durable, answer, in a task that no caller can stop half way. The same
//! order as for user keys.

use std::sync::{Arc, atomic::Ordering};

use crate::{Broker, journal::Draft, observed};
use tracing::Instrument as _;

use keybroker_audit::EntryKind;
use keybroker_core::{
    call::{Call, Timestamp},
    error::{Error, Reason},
    principal::{Action, Principal},
};
use keybroker_policy::Resource;
use keybroker_store as store;
use keybroker_store::ClientRow;

impl Broker {
    /// Runs a change in a task of its own.
    pub(super) async fn to_the_end<T: Send + 'static>(
        self: &Arc<Self>,
        action: Action,
        call: Call,
        work: impl Future<Output = Result<T, Error>> + Send + 'static,
    ) -> Result<T, Error> {
        let work = async move { observed(action, &call, Box::pin(work)).await };
        match self.mutations.spawn(work.in_current_span()).await {
            Ok(result) => result,
            Err(panic) => Err(Error::new(
                Reason::Bug,
                format!("change of a client: {panic}"),
            )),
        }
    }

    /// Asks policy, and begins the entry.
    pub(super) async fn begin_client(
        &self,
        principal: &Principal,
        call: &Call,
        action: Action,
    ) -> Result<Draft, Error> {
        let permit = self
            .permit(principal, call, action, Resource::Broker)
            .await?;
        let mut draft = Draft::new(principal, call, action, None);
        draft.policy(permit.policy());
        Ok(draft)
    }

    /// Records a failure before anything was changed.
    pub(super) async fn or_record<T>(
        &self,
        draft: &Draft,
        result: Result<T, Error>,
    ) -> Result<T, Error> {
        if let Err(error) = &result {
            self.record_failure(draft.clone(), error).await?;
        }
        result
    }

    pub(super) async fn insert_client(
        &self,
        call: &Call,
        draft: Draft,
        row: ClientRow,
    ) -> Result<(), Error> {
        let commit = async { self.store.insert_client(&row, call.id).await };
        self.commit_client(draft, commit).await
    }

    pub(super) async fn update_client(
        &self,
        call: &Call,
        draft: Draft,
        row: ClientRow,
    ) -> Result<(), Error> {
        let commit = async { self.store.update_client(&row, Some(call.id)).await };
        self.commit_client(draft, commit).await
    }

    async fn commit_client(
        &self,
        draft: Draft,
        commit: impl Future<Output = Result<(), store::Error>>,
    ) -> Result<(), Error> {
        let at = Timestamp::now();
        let intent = self.record_intent(&draft, at).await?;
        let result = commit.await;
        // Also when it is not known whether it was done: what is remembered may be out of date.
        self.clients_generation.fetch_add(1, Ordering::Release);
        if let Err(store::Error::Down(_) | store::Error::OutcomeUnknown(_)) = result {
            self.resolve_later(intent);
            return result.map_err(Error::from);
        }
        if result.is_ok()
            && let Err(error) = self.acknowledge(draft.call(), at).await
        {
            self.resolve_later(intent);
            return Err(error);
        }
        let result = result.map_err(|error| match error {
            store::Error::Conflict => Error::new(Reason::Revision, "the client changed meanwhile"),
            other => other.into(),
        });
        let concluded = self.conclude(draft.kind(EntryKind::Outcome), result).await;
        if let Err(error) = &concluded
            && error.reason() == Reason::AuditDown
        {
            self.resolve_later(intent);
        }
        concluded.map(|((), _)| ())
    }
}
