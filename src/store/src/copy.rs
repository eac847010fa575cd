//! Copies a database into another database of the same or of another engine, row by row and byte for byte.
//!
//! Both databases are read side by side in the order of their keys, which is the same on every
//! engine. Therefore an interrupted copy can continue, and the copy detects rows that exist only in
//! the target. After the copy, both databases are read again in the same order. The second reading
//! shows that the databases are equal, and that the source was not changed during the copy. A row
//! may still change after the second reading has read it. Every change of a record leaves a mark,
//! so the marks are read once more at the end ([`Copy::look_again`]).

use std::{cmp::Ordering, sync::Arc};

use super::{
    Error,
    tables::{Cursor, PAGE_ROWS, Row, Table, Tables},
    tally::Tally,
};

/// The reason why a copy stopped.
#[derive(Clone, Debug, thiserror::Error)]
pub enum CopyError {
    /// The source database failed.
    #[error("the source database: {0}")]
    Source(#[source] Error),
    /// The target database failed.
    #[error("the destination database: {0}")]
    Target(#[source] Error),
    /// A row of the target is missing in the source.
    #[error("the destination database has a row that the source database does not have: {0}")]
    Extra(String),
    /// Both databases have a row with the same key, and the rows differ.
    #[error("a row differs: {0}")]
    Differs(String),
    /// A row of the source is missing in the target although all rows were copied.
    #[error("the source database has a row that the destination database does not have: {0}")]
    Missing(String),
}

/// The treatment of rows that are missing in the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lacking {
    /// Missing rows are ignored, because the target is checked before an interrupted copy
    /// continues.
    Ignore,
    /// The rows are added.
    Add,
    /// Missing rows are an error, because the target is checked after a copy.
    Refuse,
}

/// A source and a target database.
#[derive(Clone, Debug)]
pub struct Copy {
    /// The database from which rows are copied.
    pub from: Arc<dyn Tables>,
    /// The database to which rows are copied.
    pub to: Arc<dyn Tables>,
    /// Rows that were added.
    pub added: Arc<Tally>,
}

/// The result of the comparison of one table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Walked {
    /// The number of rows of the source.
    pub rows: u64,
    /// The number of rows that were missing in the target.
    pub lacking: u64,
}

impl Copy {
    /// Whether the target has no row in any table.
    pub async fn is_target_empty(&self) -> Result<bool, CopyError> {
        for table in Table::ALL {
            let page = self.to.page(table, None, 0).await;
            if !page.map_err(CopyError::Target)?.is_empty() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Compares one table of both databases. `step` is called for every row of the source.
    pub async fn walk(
        &self,
        table: Table,
        lacking: Lacking,
        step: impl Fn() + Sync,
    ) -> Result<Walked, CopyError> {
        let (mut from, mut to) = (Cursor::new(table), Cursor::new(table));
        let mut walked = Walked::default();
        let mut waiting = Vec::new();
        while let Some(row) = from.take(&*self.from).await.map_err(CopyError::Source)? {
            walked.rows += 1;
            step();
            let other = to.peek(&*self.to).await.map_err(CopyError::Target)?;
            match other.map(|other| other.key().cmp(row.key())) {
                Some(Ordering::Less) => return Err(extra(other)),
                Some(Ordering::Equal) if other == Some(&row) => {
                    to.take(&*self.to).await.map_err(CopyError::Target)?;
                }
                Some(Ordering::Equal) => return Err(CopyError::Differs(row.place())),
                Some(Ordering::Greater) | None => {
                    walked.lacking += 1;
                    match lacking {
                        Lacking::Ignore => {}
                        Lacking::Refuse => return Err(CopyError::Missing(row.place())),
                        Lacking::Add => waiting.push(row),
                    }
                }
            }
            if waiting.len() == PAGE_ROWS {
                self.add(table, &mut waiting).await?;
            }
        }
        self.add(table, &mut waiting).await?;
        let left = to.peek(&*self.to).await.map_err(CopyError::Target)?;
        if left.is_some() {
            return Err(extra(left));
        }
        Ok(walked)
    }

    /// Refuses a source that was changed after its tables were compared. Every mutation of a record leaves a mark. The other
    /// tables can change without a mark, so these tables are compared again.
    pub async fn look_again(&self) -> Result<(), CopyError> {
        for table in [
            Table::Changes,
            Table::Clients,
            Table::Places,
            Table::Destructions,
            Table::MemberKeys,
            Table::Devices,
            Table::AccessRequests,
            Table::WrappingKeys,
        ] {
            self.walk(table, Lacking::Refuse, || {}).await?;
        }
        Ok(())
    }

    /// Copies the identity of the source to the target after the copy, so that brokers that used
    /// the source accept the target.
    pub async fn carry_identity(&self) -> Result<(), CopyError> {
        let source = self.from.evidence(&[]).await.map_err(CopyError::Source)?;
        let Some(id) = source.store else {
            return Ok(());
        };
        self.to.adopt_identity(id).await.map_err(CopyError::Target)
    }

    async fn add(&self, table: Table, waiting: &mut Vec<Row>) -> Result<(), CopyError> {
        if waiting.is_empty() {
            return Ok(());
        }
        self.added.begin();
        let added = self.to.insert(table, waiting).await;
        if added.is_ok() {
            self.added.add(waiting.len());
        }
        waiting.clear();
        added.map_err(|error| match error {
            // The conflict is about another unique value, because the comparison would have found a
            // row with the same key.
            Error::Exists => CopyError::Extra(format!(
                "{}, which conflicts with a row to be added",
                table.name()
            )),
            Error::Corrupt(_) => CopyError::Source(error),
            error => CopyError::Target(error),
        })
    }
}

fn extra(row: Option<&Row>) -> CopyError {
    CopyError::Extra(row.map_or_else(String::new, Row::place))
}
