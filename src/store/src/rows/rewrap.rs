//! Decodes the rows that a re-wrap reads.

use keybroker_core::{call::Timestamp, key::WrappingKeyId};

use crate::{
    Error, REQUEST_KEPT_US,
    columns::Table,
    rewrap::{KeyUses, RevisionPlace, RevisionUnder, RowUnder, RunId, RunRow, RunState},
    session::{Columns, Value},
};

use super::Reader;

/// The values of the statement that counts the rows that need a wrapping key. An older answer to a request id needs no key,
/// and neither does a request for approval or for access that is over, or that expired.
pub(crate) fn values_of_uses(key: WrappingKeyId) -> Vec<Value> {
    let now = Timestamp::now().micros();
    let since = now - REQUEST_KEPT_US;
    vec![
        key.into(),
        key.into(),
        key.into(),
        since.into(),
        key.into(),
        now.into(),
        key.into(),
        key.into(),
        key.into(),
        now.into(),
    ]
}

/// Decodes the numbers of rows that need a wrapping key.
pub(crate) fn key_uses(row: &impl Columns) -> Result<KeyUses, Error> {
    let count =
        |column| -> Result<u64, Error> { Ok(u64::try_from(row.integer(column)?).unwrap_or(0)) };
    Ok(KeyUses {
        revisions: count("revisions")?,
        clients: count("clients")?,
        requests: count("requests")?,
        approvals: count("approvals")?,
        devices: count("devices")?,
        access_requests: count("access_requests")?,
    })
}

/// Decodes a row of a page of revisions. Fails only if the key of the row cannot be read, because
/// the start of the next page depends on this key.
pub(crate) fn row_under(row: &impl Columns) -> Result<RowUnder, Error> {
    let reader = Reader::new(Table::Revisions, row);
    let revision = reader.value("revision", row.integer("revision"))?;
    let place = RevisionPlace {
        record: reader.bytes("record_id")?.to_vec(),
        revision,
    };
    Ok(RowUnder {
        place,
        row: revision_under(row),
    })
}

fn revision_under(row: &impl Columns) -> Result<RevisionUnder, Error> {
    let revisions = Reader::new(Table::Revisions, row);
    Ok(RevisionUnder {
        record: revisions.record_id()?,
        address: Reader::new(Table::Records, row).address()?,
        revision: revisions.revision("revision")?,
        envelope: revisions.bytes("envelope")?.to_vec(),
        created: revisions.time("created_us")?,
    })
}

/// Decodes the run that was requested last.
pub(crate) fn run(row: &impl Columns) -> Result<RunRow, Error> {
    let corrupt = |column: &str| Error::Corrupt(format!("rewraps.{column}").into());
    let time =
        |column: &str| -> Result<_, Error> { Ok(Timestamp::from_micros(row.integer(column)?)) };
    let id = row.bytes("run_id")?;
    let source = row.bytes("source_key")?;
    Ok(RunRow {
        id: RunId::from_bytes(id.try_into().map_err(|_| corrupt("run_id"))?),
        state: RunState::parse(row.text("state")?).ok_or_else(|| corrupt("state"))?,
        rate: u32::try_from(row.integer("rate")?).map_err(|_| corrupt("rate"))?,
        source: match source {
            [] => None,
            id => Some(WrappingKeyId::from_slice(id).ok_or_else(|| corrupt("source_key"))?),
        },
        document: row.bytes("document")?.to_vec(),
        holder: row.text("holder")?.to_owned(),
        lease: time("lease_us")?,
        started: time("started_us")?,
    })
}

/// Returns the values of a run, without the primary key.
pub(crate) fn run_values(run: &RunRow) -> Vec<Value> {
    let source = run.source.as_ref().map_or(&[][..], |id| id.as_bytes());
    vec![
        run.id.as_bytes().as_slice().into(),
        run.state.as_str().into(),
        run.rate.into(),
        source.into(),
        run.document.as_slice().into(),
        run.holder.as_str().into(),
        run.lease.into(),
        run.started.into(),
    ]
}
