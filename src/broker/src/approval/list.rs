//! The requests for approval, as administrators and auditors see them.

use std::collections::BTreeSet;

use keybroker_core::{
    approval::ApprovalState,
    call::{Call, Timestamp},
    error::Error,
    key::{ApprovalId, WrappingKeyId},
    principal::{Action, Principal, Role},
};
use keybroker_store::{ApprovalFilter, ApprovalRow, DamagedApproval};

use crate::{Broker, within};

use super::{Unverified, change::About};

/// A request for approval.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApprovalView {
    /// The stored request.
    pub row: ApprovalRow,
    /// The state at the time of the answer.
    pub state: ApprovalState,
    /// Whether the token verified the row for this answer; `false` if the token was unavailable.
    pub is_verified: bool,
    /// Why the broker does not accept the row, for example because it was altered.
    pub problem: Option<String>,
}

impl ApprovalView {
    /// A row that this broker has just written or verified.
    pub(super) fn verified(row: ApprovalRow) -> Self {
        Self {
            state: row.state_at(Timestamp::now()),
            row,
            is_verified: true,
            problem: None,
        }
    }
}

/// The requests for approval.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApprovalList {
    /// The requests, newest first.
    pub approvals: Vec<ApprovalView>,
    /// Rows that cannot be read.
    pub damaged: Vec<DamagedApproval>,
}

impl Broker {
    /// Returns the requests for approval: those that are open or, with `all`, also those that are over. With `one`, returns only the
    /// request with this id, in any state. A request about an API client is shown to administrators of the same tenant, and to auditors.
    pub async fn approvals(
        &self,
        principal: &Principal,
        call: &Call,
        all: bool,
        one: Option<ApprovalId>,
    ) -> Result<ApprovalList, Error> {
        Box::pin(
            self.read_async(principal, call, Action::ListApprovals, async {
                let now = Timestamp::now();
                let wanted = match one {
                    Some(id) => ApprovalFilter::One(id),
                    None if all => ApprovalFilter::All,
                    None => ApprovalFilter::OpenAt(now),
                };
                let found = within(call, self.store.approvals(wanted)).await?;
                let mut list = ApprovalList {
                    approvals: Vec::new(),
                    damaged: Vec::new(),
                };
                let mut failed = BTreeSet::new();
                for row in found {
                    let row = match row {
                        Ok(row) => row,
                        Err(damaged) => {
                            list.damaged.push(damaged);
                            continue;
                        }
                    };
                    let state = row.state_at(now);
                    let is_wanted = state.is_open() || !matches!(wanted, ApprovalFilter::OpenAt(_));
                    if is_wanted && is_shown(&row, principal) {
                        let view = self.listed_approval(row, state, &mut failed).await;
                        list.approvals.push(view);
                    }
                }
                Ok(list)
            }),
        )
        .await
    }

    /// Verifies a listed row. `failed` are the signers that the token could not use for this list: the token is not asked again for
    /// each of their rows. A row decides by its signer only about rows of the same signer, because a person who can write to the
    /// database chooses the signer.
    pub(crate) async fn listed_approval(
        &self,
        row: ApprovalRow,
        state: ApprovalState,
        failed: &mut BTreeSet<WrappingKeyId>,
    ) -> ApprovalView {
        let verified = if failed.contains(&row.signer) {
            Err(None)
        } else {
            self.verify_approval(&row).await.map_err(Some)
        };
        let problem = match &verified {
            Err(Some(Unverified::Altered(error))) => Some(error.detail().to_owned()),
            Err(Some(Unverified::NotNow(error))) => {
                failed.insert(row.signer);
                tracing::info!(%error, "the token did not verify all requests for approval of a list");
                None
            }
            Err(Some(Unverified::KeyState(_)) | None) | Ok(()) => None,
        };
        ApprovalView {
            row,
            state,
            is_verified: verified.is_ok(),
            problem,
        }
    }
}

fn is_shown(row: &ApprovalRow, principal: &Principal) -> bool {
    let tenant = About::of(&row.document).tenant;
    principal.has(Role::Auditor) || tenant.is_none_or(|tenant| tenant == *principal.tenant())
}
