//! `keybroker store check`: every row of every table, deleted records and superseded revisions included.

use std::sync::Arc;

use serde_json::{Value, json};

use crate::{
    cli::{
        Context, block_on,
        exit::{Exit, Failure},
        output::Field,
        pin::{UserPin, log_in},
        progress::Progress,
        token,
    },
    config::Config,
};
use keybroker_core::key::{KeyName, Revision, Tenant, UserId, WrappingKeyId, WrappingKeyState};
use keybroker_pkcs11::admin::Admin;
use keybroker_store as store;
use keybroker_store::{
    RegistryRow,
    scan::{ClientScan, RowScan, Scan},
    tables::{Table, Tables},
};

use super::judge::{Finding, Judge, Problem};

/// More findings than this are counted, not shown: a whole database that is damaged must fit into memory.
const SHOWN_MAX: usize = 1_000;

/// What a scan found.
#[derive(Debug, Default)]
pub(super) struct Report {
    pub(super) records: u64,
    pub(super) revisions: u64,
    pub(super) clients: u64,
    /// Rows of the other tables.
    pub(super) other_rows: u64,
    pub(super) bad: u64,
    findings: Vec<Finding>,
}

pub(super) fn run(pin: &UserPin, context: &Context) -> Result<(), Failure> {
    let config = context.config_for_token()?;
    let admin = log_in(&config, &pin.get(&config.token)?, false)?;
    let report = block_on(scan_configured(context, &config, &admin))??;
    report.show(context)?;
    report.verdict()
}

async fn scan_configured(
    context: &Context,
    config: &Config,
    admin: &Admin,
) -> Result<Report, Failure> {
    let store = store::open_tables(&config.store).await?;
    let report = scan(context, &store, admin).await;
    store.close().await;
    report
}

/// Reads everything once and changes nothing. Memory is bounded by a page of each table and the findings shown.
pub(super) async fn scan(
    context: &Context,
    store: &Arc<dyn Tables>,
    admin: &Admin,
) -> Result<Report, Failure> {
    let registry = store.registry().await?;
    let verifier = admin.verifier(&verified_keys(admin, &registry)?)?;
    let mut judge = Judge::new(verifier, registry);
    let mut rows = store.count(Table::Revisions).await? + store.count(Table::Clients).await?;
    for table in RowScan::TABLES {
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
        learn(&mut judge, key, &**store, admin).await?;
        for finding in judge.judge(&found)? {
            report.add(&**store, finding).await?;
        }
    }
    if let Some(finding) = judge.end() {
        report.add(&**store, finding).await?;
    }
    let mut scan = ClientScan::new(Arc::clone(store));
    while let Some(found) = scan.next().await? {
        report.clients += 1;
        progress.step();
        let key = found.row.as_ref().ok().map(|row| row.key);
        learn(&mut judge, key, &**store, admin).await?;
        if let Some(finding) = judge.client(&found)? {
            report.add(&**store, finding).await?;
        }
    }
    for table in RowScan::TABLES {
        let mut scan = RowScan::new(Arc::clone(store), table);
        while let Some(found) = scan.next().await? {
            report.other_rows += 1;
            progress.step();
            let key = match &found.request {
                Ok(Some((_, record))) => Some(record.key),
                _ => None,
            };
            learn(&mut judge, key, &**store, admin).await?;
            if let Some(finding) = judge.row(&found, table)? {
                report.add(&**store, finding).await?;
            }
        }
    }
    let problem = match store.evidence(&[]).await {
        Ok(evidence) if evidence.store.is_some() => None,
        Ok(_) => Some("the row of store_identity is missing".to_owned()),
        Err(error @ store::Error::Corrupt(_)) => Some(error.to_string()),
        Err(error) => return Err(error.into()),
    };
    if let Some(detail) = problem {
        let finding = Finding::of_row(Problem::IdentityMissing, detail);
        report.add(&**store, finding).await?;
    }
    Ok(report)
}

/// Reads the registry again for a key that it did not have: a running broker may use one that was registered since we began.
async fn learn<'a>(
    judge: &mut Judge<'a>,
    key: Option<WrappingKeyId>,
    store: &dyn Tables,
    admin: &'a Admin,
) -> Result<(), Failure> {
    if !judge.lacks(key) {
        return Ok(());
    }
    let registry = store.registry().await?;
    if !judge.knows(&registry) {
        let verifier = admin.verifier(&verified_keys(admin, &registry)?)?;
        judge.renew(verifier, registry);
    }
    Ok(())
}

/// The keys that can verify rows. While the registry itself is in doubt no row can be judged.
fn verified_keys(admin: &Admin, registry: &[RegistryRow]) -> Result<Vec<WrappingKeyId>, Failure> {
    let mut ids = Vec::new();
    let mut problems = Vec::new();
    for row in registry {
        if row.state == WrappingKeyState::Destroyed {
            continue;
        }
        ids.push(row.id);
        match admin.check(row.id) {
            Ok(key) => {
                problems.extend(token::compare(admin, row, &key)?);
                problems.extend(key.problem);
            }
            Err(error) => problems.push(format!("key {}: {error}", row.id)),
        }
    }
    if problems.is_empty() {
        return Ok(ids);
    }
    let what = format!(
        "no row was looked at, because the registry and this token do not agree:\n  {}",
        problems.join("\n  ")
    );
    Err(Failure::new(Exit::Untrusted, what).hint("`keybroker token check` says more"))
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
            ("other_rows", json!(self.other_rows)),
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

    /// Success, when every row is good.
    pub(super) fn verdict(&self) -> Result<(), Failure> {
        if self.bad == 0 {
            return Ok(());
        }
        let what = format!(
            "{} bad rows among {} revisions of {} records, {} API clients and {} other rows: calls that need such a \
             record get RECORD_DAMAGED, and such a client is refused",
            self.bad, self.revisions, self.records, self.clients, self.other_rows
        );
        Err(Failure::new(Exit::Verification, what).hint(
            "change nothing yet: compare these rows with a backup (docs/operations.md, `record-damaged`)",
        ))
    }
}

/// Looks again at one record, now: a running broker may have changed it between two pages.
async fn is_still_so(store: &dyn Tables, finding: &Finding) -> Result<bool, Failure> {
    let (Some(record), Some(revision)) = (finding.record, finding.revision) else {
        return Ok(true);
    };
    let current = match store.record_by_id(record).await {
        Ok(current) => current.map(|info| info.revision),
        // The join finds no current revision, or the record does not decode any more.
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
