//! The calls of [`MemberKeys`], for any engine.

use async_trait::async_trait;

use crate::{
    Error, MemberKeyRow, MemberKeys, member_key::MEMBER_KEYS_LISTED_MAX, mutations, rows,
    tables::Table,
};
use keybroker_core::{envelope::Mac, organization::Guid};

use super::{End, Engine, EngineStore};

#[async_trait]
impl<E: Engine> MemberKeys for EngineStore<E> {
    async fn member_keys(
        &self,
        organization: Guid,
        member: Guid,
    ) -> Result<Vec<MemberKeyRow>, Error> {
        let values = vec![
            organization.into(),
            member.into(),
            MEMBER_KEYS_LISTED_MAX.into(),
        ];
        let found = self.query(E::sql().member_keys, values).await?;
        found.iter().map(rows::member_key).collect()
    }

    async fn member_key(
        &self,
        organization: Guid,
        digest: &[u8; 32],
    ) -> Result<Option<MemberKeyRow>, Error> {
        let values = vec![organization.into(), digest.as_slice().into()];
        let found = self.query(E::sql().member_key, values).await?;
        found.first().map(rows::member_key).transpose()
    }

    async fn add_member_key(&self, row: &MemberKeyRow) -> Result<(), Error> {
        let values = rows::new_member_key(row);
        let inserted = self
            .transaction(End::Commit, move |session, sql| {
                let values = values.clone();
                let insert = sql.of(Table::MemberKeys).insert;
                Box::pin(mutations::insert_unless_taken(session, insert, values))
            })
            .await?;
        if inserted { Ok(()) } else { Err(Error::Exists) }
    }

    async fn update_member_key(&self, row: &MemberKeyRow, expected: &Mac) -> Result<(), Error> {
        let mut values = rows::member_key_values(row);
        values.extend([
            row.organization.into(),
            row.digest.as_slice().into(),
            expected.into(),
        ]);
        match self.execute(E::sql().update_member_key, values).await? {
            1 => Ok(()),
            _ => Err(Error::Conflict),
        }
    }
}
