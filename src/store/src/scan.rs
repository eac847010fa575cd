//! Scans for commands: every revision together with its record, every API client, and every row of the other tables,
//! including damaged rows.

use std::sync::Arc;

use keybroker_core::{
    call::Timestamp,
    key::{ClientId, KeyAddress, RecordId, Revision},
};

use super::{
    AccessRow, ApprovalRow, ClientRow, DeviceRow, Error, MemberKeyRow, RequestRecord, RequestScope,
    rows,
    session::Value,
    tables::{Cursor, Head, RevisionRow, Row, Table, Tables},
};

/// A row of the revisions, a row of the records, or one row of each table if the rows belong
/// together.
#[derive(Clone, Debug)]
pub struct Found {
    /// The record; absent for a revision without a record.
    pub head: Option<Arc<Result<Head, Error>>>,
    /// The revision; absent for a record without revisions.
    pub revision: Option<Result<RevisionRow, Error>>,
    /// Whether this result is the first for its record.
    pub is_first: bool,
    /// The time at which a later revision became current; absent if no later revision was found.
    pub superseded: Option<Timestamp>,
}

impl Found {
    /// The record, if it exists and can be decoded.
    pub fn good_head(&self) -> Option<&Head> {
        self.head.as_deref().and_then(|head| head.as_ref().ok())
    }

    /// The revision, if it exists and can be decoded.
    pub fn good_revision(&self) -> Option<&RevisionRow> {
        self.revision.as_ref().and_then(|row| row.as_ref().ok())
    }

    /// The record and revision, if the revision was superseded before the time `before`.
    pub fn superseded_before(&self, before: Timestamp) -> Option<Superseded> {
        let (head, row) = (self.good_head()?, self.good_revision()?);
        let is_old = row.revision < head.revision && self.superseded? < before;
        is_old.then(|| Superseded {
            record: row.record,
            address: head.address.clone(),
            revision: row.revision,
        })
    }
}

/// A revision that is no longer current.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Superseded {
    /// The record of the revision.
    pub record: RecordId,
    /// The address of the record.
    pub address: KeyAddress,
    /// The number of the revision.
    pub revision: Revision,
}

/// Reads records together with their revisions, in the order of the record ids. If a broker changes
/// a record during the scan, the results may lack a revision of this record or contain an
/// additional revision. For other records, the results are correct.
#[derive(Debug)]
pub struct Scan {
    store: Arc<dyn Tables>,
    records: Cursor,
    revisions: Cursor,
    /// The record whose revisions are read next.
    current: Option<(Row, Arc<Result<Head, Error>>)>,
    last_record: Option<Value>,
}

impl Scan {
    /// Creates a scan that starts at the beginning.
    pub fn new(store: Arc<dyn Tables>) -> Self {
        Self {
            store,
            records: Cursor::new(Table::Records),
            revisions: Cursor::new(Table::Revisions),
            current: None,
            last_record: None,
        }
    }

    /// The next result; `None` at the end.
    pub async fn next(&mut self) -> Result<Option<Found>, Error> {
        let store = Arc::clone(&self.store);
        loop {
            if self.current.is_none() {
                let row = self.records.take(&*store).await?;
                self.current = row.map(|row| {
                    let head = Arc::new(rows::head(&row));
                    (row, head)
                });
            }
            let revision = self.revisions.peek(&*store).await?.map(record_of);
            let record = self.current.as_ref().map(|(row, _)| record_of(row));
            let (head, has_revision) = match (&record, &revision) {
                (None, None) => return Ok(None),
                (Some(record), Some(revision)) if record == revision => (self.head(), true),
                // The next revision belongs to a record that does not exist.
                (Some(record), Some(revision)) if revision < record => (None, true),
                (None, Some(_)) => (None, true),
                (Some(_), _) => {
                    let head = self.head();
                    self.current = None;
                    if record == self.last_record {
                        // The revisions of this record were already returned.
                        continue;
                    }
                    (head, false)
                }
            };
            let record = if has_revision { revision } else { record };
            return self.found(head, has_revision, record).await.map(Some);
        }
    }

    fn head(&self) -> Option<Arc<Result<Head, Error>>> {
        self.current.as_ref().map(|(_, head)| Arc::clone(head))
    }

    async fn found(
        &mut self,
        head: Option<Arc<Result<Head, Error>>>,
        has_revision: bool,
        record: Option<Value>,
    ) -> Result<Found, Error> {
        let store = Arc::clone(&self.store);
        let is_first = record != self.last_record;
        let mut found = Found {
            head,
            revision: None,
            is_first,
            superseded: None,
        };
        if has_revision {
            let row = self.revisions.take(&*store).await?;
            found.revision = row.as_ref().map(rows::revision);
            let next = self.revisions.peek(&*store).await?;
            found.superseded = next
                .filter(|next| Some(record_of(next)) == record)
                .and_then(|next| rows::revision(next).ok())
                .map(|next| next.created);
        }
        self.last_record = record;
        Ok(found)
    }
}

/// The record id of a row, which is the first column of both tables. A row whose record id cannot be read comes before all other
/// rows.
fn record_of(row: &Row) -> Value {
    match row.key().first() {
        Some(Some(id)) => id.clone(),
        _ => Value::Bytes(Vec::new()),
    }
}

/// A row of the API clients.
#[derive(Clone, Debug)]
pub struct FoundClient {
    /// The id of the client; absent for a row without a valid id.
    pub id: Option<ClientId>,
    /// The decoded row, or the error of a row that cannot be decoded.
    pub row: Result<ClientRow, Error>,
}

/// Reads the API clients in the order of their ids. One query reads a complete row. Therefore, if
/// an API client changes during the scan, the result contains its old or its new state.
#[derive(Debug)]
pub struct ClientScan {
    store: Arc<dyn Tables>,
    clients: Cursor,
}

impl ClientScan {
    /// Creates a scan that starts at the beginning.
    pub fn new(store: Arc<dyn Tables>) -> Self {
        Self {
            store,
            clients: Cursor::new(Table::Clients),
        }
    }

    /// The next result; `None` at the end.
    pub async fn next(&mut self) -> Result<Option<FoundClient>, Error> {
        let row = self.clients.take(&*self.store).await?;
        Ok(row.map(|row| FoundClient {
            id: rows::client_id(&row),
            row: rows::client(&row),
        }))
    }
}

/// A row of one of the tables in [`OtherScan::TABLES`].
#[derive(Clone, Debug)]
pub enum FoundOther {
    /// A request id and its stored answer.
    Request(Box<Result<(RequestScope, RequestRecord), Error>>),
    /// The mark of a change.
    Change(Result<(), Error>),
    /// The time at which a record was last released.
    LastUse(Result<(), Error>),
    /// The time at which a secret of an API client was last accepted.
    ClientUse(Result<(), Error>),
    /// A request for approval.
    Approval(Box<Result<ApprovalRow, Error>>),
    /// The wrapped key of a member of a Bitwarden organisation.
    MemberKey(Box<Result<MemberKeyRow, Error>>),
    /// A device.
    Device(Box<Result<DeviceRow, Error>>),
    /// A request for access.
    AccessRequest(Box<Result<AccessRow, Error>>),
}

/// Reads the tables of [`OtherScan::TABLES`], one after another.
#[derive(Debug)]
pub struct OtherScan {
    store: Arc<dyn Tables>,
    tables: std::vec::IntoIter<Table>,
    current: Option<(Table, Cursor)>,
}

impl OtherScan {
    /// The tables, in the order in which they are read.
    pub const TABLES: [Table; 8] = [
        Table::Requests,
        Table::Changes,
        Table::LastUses,
        Table::ClientUses,
        Table::Approvals,
        Table::MemberKeys,
        Table::Devices,
        Table::AccessRequests,
    ];

    /// Creates a scan that starts at the beginning.
    pub fn new(store: Arc<dyn Tables>) -> Self {
        Self {
            store,
            tables: Vec::from(Self::TABLES).into_iter(),
            current: None,
        }
    }

    /// The next result; `None` at the end.
    pub async fn next(&mut self) -> Result<Option<FoundOther>, Error> {
        loop {
            if let Some((table, cursor)) = &mut self.current
                && let Some(row) = cursor.take(&*self.store).await?
            {
                return Ok(Some(match table {
                    Table::Requests => FoundOther::Request(Box::new(rows::request(&row))),
                    Table::Changes => FoundOther::Change(rows::change(&row).map(drop)),
                    Table::LastUses => FoundOther::LastUse(rows::last_use(&row).map(drop)),
                    Table::Approvals => FoundOther::Approval(Box::new(rows::approval(&row))),
                    Table::MemberKeys => FoundOther::MemberKey(Box::new(rows::member_key(&row))),
                    Table::Devices => FoundOther::Device(Box::new(rows::device(&row))),
                    Table::AccessRequests => {
                        FoundOther::AccessRequest(Box::new(rows::access_request(&row)))
                    }
                    _ => FoundOther::ClientUse(rows::client_use_row(&row)),
                }));
            }
            let Some(table) = self.tables.next() else {
                return Ok(None);
            };
            self.current = Some((table, Cursor::new(table)));
        }
    }
}
