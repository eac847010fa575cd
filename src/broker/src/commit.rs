//! The steps that changes to user keys and changes to API clients have in common. A change runs in a task that no
//! caller can stop, and writes its intent before the commit and its outcome after the commit.
//!
//! Mitigation: M13 of `THREAT_MODEL.md`.

use std::sync::Arc;

use tracing::Instrument as _;

use keybroker_audit::{EntryKind, OpenIntent};
use keybroker_core::{
    call::{Call, Timestamp},
    error::{Error, Reason},
    principal::Action,
};
use keybroker_store as store;

use super::{
    Broker, TaskFailed,
    journal::{Draft, Recorded},
    observed,
};

/// The definite answer of the store about a change: the change was made, or it was not made. The intent stays open
/// until [`Broker::close_intent`].
#[must_use = "an intent stays open until its outcome is recorded"]
pub(super) struct Settled<T> {
    pub(super) intent: OpenIntent,
    /// The store's answer.
    pub(super) result: Result<T, store::Error>,
}

impl Broker {
    /// Runs a change to completion in a separate task.
    pub(super) async fn run_change<T: Send + 'static>(
        self: &Arc<Self>,
        action: Action,
        call: Call,
        change: impl Future<Output = Result<T, Error>> + Send + 'static,
    ) -> Result<T, Error> {
        let change = async move { observed(action, &call, Box::pin(change)).await };
        match self.mutations.spawn(change.in_current_span()).await {
            Ok(result) => result,
            Err(source) => Err(TaskFailed::of("a change", source)),
        }
    }

    /// Makes the intent durable, commits the change, and adds the change to the list of changes by which the broker
    /// recognises its database. Returns an error if the change was not started, or if its outcome is unknown.
    /// `maintain` asks the store for an unknown outcome until the store answers.
    pub(super) async fn commit_with_intent<T>(
        &self,
        draft: &Draft,
        at: Timestamp,
        commit: impl Future<Output = Result<T, store::Error>>,
    ) -> Result<Settled<T>, Error> {
        let intent = self.record_intent(draft, at).await?;
        self.settle(intent, draft, at, commit).await
    }

    /// Commits a change whose intent is already durable, like [`Broker::commit_with_intent`].
    pub(super) async fn settle<T>(
        &self,
        intent: OpenIntent,
        draft: &Draft,
        at: Timestamp,
        commit: impl Future<Output = Result<T, store::Error>>,
    ) -> Result<Settled<T>, Error> {
        let result = match commit.await {
            Err(error) if error.has_unknown_outcome() => {
                self.resolve_later(intent);
                return Err(error.into());
            }
            result => result,
        };
        if result.is_ok()
            && let Err(error) = self.acknowledge(draft.call(), at).await
        {
            self.resolve_later(intent);
            return Err(error);
        }
        Ok(Settled { intent, result })
    }

    /// Makes the outcome durable and returns the result. If the outcome cannot be recorded now, `maintain` records it
    /// later.
    pub(super) async fn close_intent<T>(
        &self,
        intent: OpenIntent,
        draft: &Draft,
        result: Result<T, Error>,
    ) -> Result<T, Error> {
        let concluded = self.conclude(draft.kind(EntryKind::Outcome), result).await;
        if let Err(error) = &concluded
            && error.reason() == Reason::AuditDown
        {
            self.resolve_later(intent);
        }
        concluded.map(Recorded::into_inner)
    }
}
