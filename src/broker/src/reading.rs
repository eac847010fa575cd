//! Metadata of records: one, or a page of many. No key material is touched.

use std::collections::HashMap;

use keybroker_core::{
    call::{Call, Timestamp},
    error::Error,
    key::{KeyName, RecordId, UserId},
    principal::{Action, Principal},
};
use keybroker_policy::Resource;
use keybroker_store::{ListQuery, PAGE_SIZE_MAX, RecordInfo};

use super::{Broker, UserKeyRef, journal::Draft, observed, within};

/// Which records to list within the principal's tenant.
#[derive(Clone, Debug)]
pub struct ListRequest {
    /// Only this user's.
    pub user: Option<UserId>,
    /// Deleted ones too.
    pub deleted: bool,
    /// Where the page before ended.
    pub after: Option<(UserId, KeyName)>,
    /// 1 to 1,000 records.
    pub limit: u32,
}

/// A record and when its key was last released.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecordView {
    /// What the record says.
    pub info: RecordInfo,
    /// When its key was last released, as far as was written down.
    pub used: Option<Timestamp>,
}

/// One page of records, ordered by user, then key name, bytewise.
#[derive(Clone, Debug)]
pub struct ListPage {
    /// The records.
    pub records: Vec<RecordView>,
    /// Where the next page begins after; absent at the end.
    pub next: Option<(UserId, KeyName)>,
}

impl Broker {
    /// What is known of one record, active or deleted.
    pub async fn get(
        &self,
        principal: &Principal,
        call: &Call,
        key: &UserKeyRef,
    ) -> Result<RecordView, Error> {
        observed(Action::Get, call, async {
            let permit = self
                .permit(principal, call, Action::Get, key.resource(principal))
                .await?;
            let mut draft = Draft::new(principal, call, Action::Get, Some(key));
            draft.policy(permit.policy());
            let address = key.address(principal);
            let record = self
                .existing_record(&permit, call, &address, &mut draft)
                .await;
            let (record, _) = self.conclude(draft, record).await?;
            let mut views = self.with_uses(call, vec![record.info]).await;
            Ok(views.remove(0))
        })
        .await
    }

    /// One page of records.
    pub async fn list(
        &self,
        principal: &Principal,
        call: &Call,
        request: ListRequest,
    ) -> Result<ListPage, Error> {
        observed(Action::List, call, async {
            let resource = Resource::UserKeys {
                tenant: principal.tenant(),
                user: request.user.as_ref(),
            };
            let permit = self.permit(principal, call, Action::List, resource).await?;
            let mut draft = Draft::new(principal, call, Action::List, None);
            draft.policy(permit.policy());
            draft.user(request.user.clone());
            let page = self.page(principal, call, request).await;
            let (page, _) = self.conclude(draft, page).await?;
            Ok(page)
        })
        .await
    }

    async fn page(
        &self,
        principal: &Principal,
        call: &Call,
        request: ListRequest,
    ) -> Result<ListPage, Error> {
        if !(1..=PAGE_SIZE_MAX).contains(&request.limit) {
            return Err(Error::violation("page_size", "at most 1,000"));
        }
        self.check_acknowledged()?;
        let query = ListQuery {
            tenant: principal.tenant().clone(),
            user: request.user,
            deleted: request.deleted,
            after: request.after,
            limit: request.limit,
        };
        let records = within(call, self.store.list(&query)).await?;
        let full = u32::try_from(records.len()).is_ok_and(|count| count == request.limit);
        let next = records
            .last()
            .filter(|_| full)
            .map(|last| (last.address.user.clone(), last.address.name.clone()));
        let records = self.with_uses(call, records).await;
        Ok(ListPage { records, next })
    }

    /// Adds when each was last released. Without it everything else is still told.
    async fn with_uses(&self, call: &Call, records: Vec<RecordInfo>) -> Vec<RecordView> {
        let ids: Vec<RecordId> = records.iter().map(|info| info.id).collect();
        let uses = match within(call, self.store.last_uses(&ids)).await {
            Ok(uses) => uses,
            Err(error) => {
                tracing::warn!(call_id = %call.id, %error, "last uses not read");
                HashMap::new()
            }
        };
        let view = |info: RecordInfo| RecordView {
            used: uses.get(&info.id).copied(),
            info,
        };
        records.into_iter().map(view).collect()
    }
}
