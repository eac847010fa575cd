//! A database copied into another one, of whichever engine, row by row and byte for byte.
//!
//! Both are read side by side in the order of their keys, which is the same on every engine. So a copy that was cut short
//! goes on where it was, a target that holds anything else is found out, and the same reading shows in the end that both are
//! equal: that the source was not changed meanwhile, either. What was read early in that last reading may change while the
//! rest is read; every change leaves a mark, so the marks are read once more ([`Copy::look_again`]).

use std::{cmp::Ordering, sync::Arc};

use super::{
    Error,
    tables::{Cursor, PAGE_ROWS, Row, Table, Tables},
    tally::Tally,
};

/// Why a copy stopped.
#[derive(Clone, Debug, thiserror::Error)]
pub enum CopyError {
    /// The database that is copied failed.
    #[error("the database to copy from: {0}")]
    Source(#[source] Error),
    /// The database that is filled failed.
    #[error("the database to copy to: {0}")]
    Target(#[source] Error),
    /// The target has a row that the source has not.
    #[error("the database to copy to has a row that the other has not: {0}")]
    Extra(String),
    /// Both have a row of this key, and they differ.
    #[error("a row differs: {0}")]
    Differs(String),
    /// The target lacks a row after everything was copied.
    #[error("the database to copy from has a row that the other has not: {0}")]
    Missing(String),
}

/// What is done about rows that the target lacks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lacking {
    /// They are left out, as before a copy that goes on.
    Ignore,
    /// They are added.
    Add,
    /// They are an error, as after a copy.
    Refuse,
}

/// Two databases.
#[derive(Clone, Debug)]
pub struct Copy {
    /// Where rows come from.
    pub from: Arc<dyn Tables>,
    /// Where they go to.
    pub to: Arc<dyn Tables>,
    /// Rows that were added.
    pub added: Arc<Tally>,
}

/// What was found in one table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Walked {
    /// Rows of the source.
    pub rows: u64,
    /// Rows that the target lacked.
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

    /// Goes through one table of both. `step` is called for every row of the source.
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

    /// Refuses a source that was changed since its tables were compared: every mutation of a record leaves a mark; the registry and
    /// the API clients can change without one.
    pub async fn look_again(&self) -> Result<(), CopyError> {
        for table in [Table::Changes, Table::Clients, Table::WrappingKeys] {
            self.walk(table, Lacking::Refuse, || {}).await?;
        }
        Ok(())
    }

    /// Gives the target the identity of the source, once it is equal: the brokers that know the source then accept the copy.
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
            // Not by its key, or it would have been seen: something else that is unique.
            Error::Exists => CopyError::Extra(format!(
                "{}, in the place of one that was to be added",
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
