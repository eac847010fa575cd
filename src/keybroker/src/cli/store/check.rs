//! `keybroker store check`: checks every row of every table, including deleted records and superseded revisions.

use std::sync::Arc;

use serde_json::{Value, json};

use crate::{
    cli::{
        Context,
        admins::{Admins, Logins},
        block_on,
        exit::{Exit, Failure},
        output::Field,
        pin::UserPin,
        progress::Progress,
    },
    places::Registry,
};
use keybroker_core::key::{KeyName, Revision, Tenant, UserId, WrappingKeyId};
use keybroker_store as store;
use keybroker_store::{
    scan::{ClientScan, FoundOther, OtherScan, Scan},
    tables::{Table, Tables},
};

use super::row_check::{Finding, Problem, RowChecker};

/// Maximum number of findings to show. All other findings are only counted, to limit the memory for
/// findings if all rows of a database are damaged.
const SHOWN_MAX: usize = 1_000;

/// The result of a scan.
#[derive(Debug, Default)]
pub(super) struct Report {
    pub(super) records: u64,
    pub(super) revisions: u64,
    pub(super) clients: u64,
    /// The number of rows in the tables of request ids, changes and last uses.
    pub(super) others: u64,
    pub(super) bad: u64,
    findings: Vec<Finding>,
}

pub(super) fn run(pin: &UserPin, context: &Context) -> Result<(), Failure> {
    let logins = Logins::of(context, pin)?;
    let report = block_on(scan_configured(context, &logins))??;
    report.show(context)?;
    report.verdict()
}

async fn scan_configured(context: &Context, logins: &Logins) -> Result<Report, Failure> {
    let store = store::open_tables(&logins.config()?.store).await?;
    let report = log_in_and_scan(context, logins, &store).await;
    store.close().await;
    report
}

async fn log_in_and_scan(
    context: &Context,
    logins: &Logins,
    store: &Arc<dyn Tables>,
) -> Result<Report, Failure> {
    let registry = Registry::read(&**store).await?;
    let admins = logins.log_in(context, &registry)?;
    scan(context, store, &admins).await
}

/// Reads every row once and changes nothing. The scan needs memory for only one page of each table
/// and for the findings to show.
pub(super) async fn scan(
    context: &Context,
    store: &Arc<dyn Tables>,
    admins: &Admins,
) -> Result<Report, Failure> {
    let registry = Registry::read(&**store).await?;
    let unusable = admins.check_registry(context, &registry)?;
    let mut checker = RowChecker::new(admins, registry.rows, unusable);
    let mut rows = store.count(Table::Revisions).await? + store.count(Table::Clients).await?;
    for table in OtherScan::TABLES {
        rows += store.count(table).await?;
    }
    let progress = Progress::new(context.output, "checking rows", rows);
    let mut scan = Scan::new(Arc::clone(store));
    let mut report = Report::default();
    while let Some(found) = scan.next().await? {
        report.records += u64::from(found.is_first && found.head.is_some());
        if found.revision.is_some() {
            report.revisions += 1;
            progress.step();
        }
        let key = found.good_revision().map(|row| row.wrapping_key);
        learn(context, &mut checker, key, &**store, admins).await?;
        for finding in checker.check(&found)? {
            report.add(&**store, finding).await?;
        }
    }
    if let Some(finding) = checker.end() {
        report.add(&**store, finding).await?;
    }
    let mut scan = ClientScan::new(Arc::clone(store));
    while let Some(found) = scan.next().await? {
        report.clients += 1;
        progress.step();
        let key = found.row.as_ref().ok().map(|row| row.key);
        learn(context, &mut checker, key, &**store, admins).await?;
        if let Some(finding) = checker.client(&found)? {
            report.add(&**store, finding).await?;
        }
    }
    check_others(context, store, &mut checker, &mut report, &progress).await?;
    Ok(report)
}

/// Checks the rows that belong neither to a record nor to an API client.
async fn check_others(
    context: &Context,
    store: &Arc<dyn Tables>,
    checker: &mut RowChecker<'_>,
    report: &mut Report,
    progress: &Progress,
) -> Result<(), Failure> {
    let mut scan = OtherScan::new(Arc::clone(store));
    while let Some(found) = scan.next().await? {
        report.others += 1;
        progress.step();
        let key = match &found {
            FoundOther::Request(row) => row.as_ref().as_ref().ok().map(|(_, record)| record.key),
            FoundOther::Approval(row) => row.as_ref().as_ref().ok().map(|row| row.signer),
            FoundOther::Device(row) => row.as_ref().as_ref().ok().map(|row| row.signer),
            FoundOther::AccessRequest(row) => row.as_ref().as_ref().ok().map(|row| row.signer),
            _ => None,
        };
        let admins = checker.admins();
        learn(context, checker, key, &**store, admins).await?;
        if let Some(finding) = checker.other(&found)? {
            report.add(&**store, finding).await?;
        }
    }
    if store.evidence(&[]).await?.store.is_none() {
        let remedy = "run `keybroker store migrate`, then `keybroker store accept-restored`";
        let finding = Finding::of_other(Problem::IdentityMissing, remedy);
        report.add(&**store, finding).await?;
    }
    let keyless = store.keyless_rows().await?;
    if keyless > 0 {
        let detail = format!(
            "{keyless} rows have NULL in a key column, so lists and calls cannot find these rows"
        );
        let finding = Finding::of_other(Problem::KeyMissing, detail);
        report.add(&**store, finding).await?;
    }
    Ok(())
}

/// Reads the registry again if a row has an unknown wrapping key. A running broker may use a
/// wrapping key that was registered after the start of the scan.
async fn learn(
    context: &Context,
    checker: &mut RowChecker<'_>,
    key: Option<WrappingKeyId>,
    store: &dyn Tables,
    admins: &Admins,
) -> Result<(), Failure> {
    if !checker.lacks(key) {
        return Ok(());
    }
    let registry = Registry::read(store).await?;
    if !checker.knows(&registry.rows) {
        let unusable = admins.check_registry(context, &registry)?;
        checker.renew(registry.rows, unusable);
    }
    Ok(())
}

impl Report {
    async fn add(&mut self, store: &dyn Tables, finding: Finding) -> Result<(), Failure> {
        if finding.may_be_a_change() && !is_still_so(store, &finding).await? {
            return Ok(());
        }
        self.bad += 1;
        if self.findings.len() < SHOWN_MAX {
            self.findings.push(finding);
        }
        Ok(())
    }

    fn show(&self, context: &Context) -> Result<(), Failure> {
        let rows: Vec<Vec<Field>> = self.findings.iter().map(fields).collect();
        let mut summary = vec![
            ("records", json!(self.records)),
            ("revisions", json!(self.revisions)),
            ("clients", json!(self.clients)),
            ("other_rows", json!(self.others)),
            ("bad", json!(self.bad)),
        ];
        if context.output.is_json() {
            let objects: Vec<Value> = rows
                .into_iter()
                .map(|row| {
                    row.into_iter()
                        .map(|(name, value)| (name.to_owned(), value))
                        .collect()
                })
                .collect();
            summary.push(("findings", json!(objects)));
        } else if !rows.is_empty() {
            context.output.list(rows, "")?;
        }
        context.output.fields(summary)
    }

    /// Returns success if every row is valid.
    pub(super) fn verdict(&self) -> Result<(), Failure> {
        if self.bad == 0 {
            return Ok(());
        }
        let what = format!(
            "{} bad rows among {} revisions of {} records, {} API clients and {} other rows: the broker refuses calls \
             for a damaged record with RECORD_DAMAGED, and refuses a damaged API client",
            self.bad, self.revisions, self.records, self.clients, self.others
        );
        Err(Failure::new(Exit::Verification, what).hint(
            "do not change the damaged rows yet: compare them with a backup (docs/operations.md, `record-damaged`)",
        ))
    }
}

/// Reads a record again, because a running broker may have changed the record between two pages of
/// the scan.
async fn is_still_so(store: &dyn Tables, finding: &Finding) -> Result<bool, Failure> {
    let (Some(record), Some(revision)) = (finding.record, finding.revision) else {
        return Ok(true);
    };
    let current = match store.record_by_id(record).await {
        Ok(current) => current.map(|info| info.revision),
        // The record has no current revision, or its row cannot be decoded.
        Err(store::Error::Corrupt(_)) => return Ok(true),
        Err(error) => return Err(error.into()),
    };
    let is_there = store.revision(record, revision).await?.is_some();
    Ok(match finding.problem {
        Problem::CurrentRevisionMissing => current == Some(revision) && !is_there,
        Problem::RevisionWithoutRecord => current.is_none() && is_there,
        _ => is_there && current.is_some_and(|current| current < revision),
    })
}

fn fields(finding: &Finding) -> Vec<Field> {
    let address = finding.head.as_ref().map(|head| &head.address);
    let detail = Some(&finding.detail).filter(|detail| !detail.is_empty());
    vec![
        ("problem", json!(finding.problem.as_str())),
        ("record_id", json!(finding.record.map(|id| id.to_string()))),
        (
            "tenant",
            json!(address.map(|at| Tenant::as_str(&at.tenant))),
        ),
        ("user", json!(address.map(|at| UserId::as_str(&at.user)))),
        (
            "key_name",
            json!(address.map(|at| KeyName::as_str(&at.name))),
        ),
        ("revision", json!(finding.revision.map(Revision::get))),
        ("client_id", json!(finding.client.map(|id| id.to_string()))),
        ("detail", json!(detail)),
    ]
}
