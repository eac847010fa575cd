//! Reads the metadata of one record or of a page of records. No function of this module reads key material.

use std::collections::HashMap;

use keybroker_core::{
    call::{Call, Timestamp},
    error::Error,
    key::{KeyName, RecordId, UserId},
    principal::{Action, Principal},
};
use keybroker_policy::Resource;
use keybroker_store::{DamagedRecord, ListQuery, PAGE_SIZE_MAX, Position, RecordInfo};

use super::{Broker, UserKeyRef, damage, journal::Draft, observed, within};

/// The filter and position of a list within the principal's tenant.
#[derive(Clone, Debug)]
pub struct ListRequest {
    /// If set, only the records of this user are listed.
    pub user: Option<UserId>,
    /// Whether deleted records are listed in addition to active records.
    pub deleted: bool,
    /// Position at which the previous page ended.
    pub from: Position<(UserId, KeyName)>,
    /// Number of records, 1 to 1,000.
    pub limit: u32,
}

/// A record with the time of its last release.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecordView {
    /// The stored metadata.
    pub info: RecordInfo,
    /// Time of the last release of this record's key, if the time was stored.
    pub used: Option<Timestamp>,
}

/// A row of a page.
#[derive(Clone, Debug)]
pub struct PageRow<T, D, K> {
    /// The content of the row, or a description of the damage.
    pub content: Result<T, D>,
    /// The position after this row, from which the next page can begin.
    pub end: Position<K>,
}

/// One page of records, ordered bytewise by user and then by key name.
#[derive(Clone, Debug)]
pub struct ListPage {
    /// The records. A damaged record is listed with the fields that can be read.
    pub rows: Vec<PageRow<RecordView, DamagedRecord, (UserId, KeyName)>>,
    /// The position of the next page; `None` on the last page.
    pub next: Option<Position<(UserId, KeyName)>>,
}

impl Broker {
    /// Returns the metadata of one record, active or deleted.
    pub async fn get(
        &self,
        principal: &Principal,
        call: &Call,
        key: &UserKeyRef,
    ) -> Result<RecordView, Error> {
        Box::pin(observed(Action::Get, call, async {
            let permit = self.permit_key(principal, call, Action::Get, key).await?;
            let mut draft = Draft::permitted(principal, call, &permit);
            let record = self.existing_record(&permit, call, &mut draft).await;
            let info = self.conclude(draft, record).await?.into_inner().info;
            let uses = self.uses_of(call, [info.id].into_iter()).await;
            Ok(RecordView {
                used: uses.get(&info.id).copied(),
                info,
            })
        }))
        .await
    }

    /// Returns one page of records.
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
            let mut draft = Draft::new(principal, call, Action::List);
            draft.policy(permit.policy());
            draft.user(request.user.clone());
            let page = self.page(principal, call, request).await;
            Ok(self.conclude(draft, page).await?.into_inner())
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
            from: request.from,
            limit: request.limit,
        };
        let found = within(call, self.store.list(&query)).await?;
        let is_full = u32::try_from(found.len()).is_ok_and(|count| count >= request.limit);
        damage::report_records(
            call,
            Action::List,
            found.iter().filter_map(|row| row.as_ref().err()),
        );
        let good = found.iter().filter_map(|row| row.as_ref().ok());
        let uses = self.uses_of(call, good.map(|info| info.id)).await;
        let mut end = query.from;
        let rows: Vec<_> = found
            .into_iter()
            .map(|row| {
                end.advance(match &row {
                    Ok(info) => Some((info.address.user.clone(), info.address.name.clone())),
                    Err(damaged) => damaged.key(),
                });
                PageRow {
                    content: row.map(|info| RecordView {
                        used: uses.get(&info.id).copied(),
                        info,
                    }),
                    end: end.clone(),
                }
            })
            .collect();
        let next = rows.last().filter(|_| is_full).map(|row| row.end.clone());
        Ok(ListPage { rows, next })
    }

    /// Reads the time at which each record was last released. If the times cannot be read, the failure is logged, and
    /// the call still succeeds.
    async fn uses_of(
        &self,
        call: &Call,
        records: impl Iterator<Item = RecordId>,
    ) -> HashMap<RecordId, Timestamp> {
        let ids: Vec<RecordId> = records.collect();
        match within(call, self.store.last_uses(&ids)).await {
            Ok(uses) => uses,
            Err(error) => {
                tracing::warn!(call_id = %call.id, %error, "cannot read the times of last use of records");
                HashMap::new()
            }
        }
    }
}
