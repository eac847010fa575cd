//! Changes of API clients. The steps have the same order as for user keys: durable intent, commit, durable outcome,
//! answer.

use std::sync::atomic::Ordering;

use crate::{Broker, commit::Settled, journal::Draft};

use super::Prepared;
use keybroker_core::{
    call::{Call, Timestamp},
    error::{Error, Reason},
    principal::{Action, Principal},
};
use keybroker_policy::Resource;
use keybroker_store as store;
use keybroker_store::{ApprovedClient, ClientRow};

impl Broker {
    /// Asks the policy for a permit on the control plane, and begins the audit entry of the change.
    pub(crate) async fn begin_control_change(
        &self,
        principal: &Principal,
        call: &Call,
        action: Action,
    ) -> Result<Draft, Error> {
        let permit = self
            .permit(principal, call, action, Resource::Broker)
            .await?;
        let mut draft = Draft::new(principal, call, action);
        draft.policy(permit.policy());
        Ok(draft)
    }

    /// If a step before the change failed, records the failure in the audit log.
    pub(crate) async fn or_record<T>(
        &self,
        draft: &Draft,
        result: Result<T, Error>,
    ) -> Result<T, Error> {
        if let Err(error) = &result {
            self.record_failure(draft.clone(), error).await?;
        }
        result
    }

    /// Commits an API client with a new secret, and uses the approval that permits the change.
    pub(super) async fn commit_prepared(
        &self,
        call: &Call,
        draft: Draft,
        kind: ApprovedClient,
        prepared: &Prepared,
    ) -> Result<(), Error> {
        let (row, approval) = (&prepared.row, prepared.approval.as_ref());
        let commit = async {
            match (approval, kind) {
                (Some(approval), _) => {
                    let changed = self
                        .store
                        .change_approved_client(kind, row, approval, call.id);
                    changed.await
                }
                (None, ApprovedClient::New) => self.store.insert_client(row, call.id).await,
                (None, ApprovedClient::Changed) => {
                    self.store.update_client(row, Some(call.id)).await
                }
            }
        };
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
        let change = async {
            let result = commit.await;
            // The generation is also incremented if the outcome of the change is unknown, because the cached API client
            // may be out of date.
            self.clients_generation.fetch_add(1, Ordering::Release);
            result
        };
        let Settled { intent, result } = self.commit_with_intent(&draft, at, change).await?;
        let result = result.map_err(|error| match error {
            store::Error::Conflict => Error::new(
                Reason::Revision,
                "the API client, or the approval of the change, was changed at the same time",
            ),
            other => other.into(),
        });
        self.close_intent(intent, &draft, result).await
    }
}
