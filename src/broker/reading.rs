//! Metadata of records: one, or a page of many. No key material is touched.

use crate::{
    call::Call,
    error::Error,
    key::{KeyName, UserId},
    principal::{Action, Principal},
    store::{ListQuery, PAGE_SIZE_MAX, RecordInfo},
};

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

/// One page of records, ordered by user, then key name, bytewise.
#[derive(Clone, Debug)]
pub struct ListPage {
    /// The records.
    pub records: Vec<RecordInfo>,
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
    ) -> Result<RecordInfo, Error> {
        observed(Action::Get, call, async {
            let permit = self.permit(principal, call, Action::Get, Some(key)).await?;
            let mut draft = Draft::new(principal, call, Action::Get, Some(key));
            draft.policy(permit.policy());
            let address = key.address(principal);
            let record = self
                .existing_record(&permit, call, &address, &mut draft)
                .await;
            let (record, _) = self.conclude(draft, record).await?;
            Ok(record.info)
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
            let permit = self.permit(principal, call, Action::List, None).await?;
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
        Ok(ListPage { records, next })
    }
}
