//! Alerts about damaged rows that were found when a list was read.

use keybroker_core::{call::Call, metrics, principal::Action};
use keybroker_store::{DamagedClient, DamagedRecord};

/// Largest number of damaged rows of one page that are logged individually. The total number of damaged rows is always
/// logged.
const LOGGED_MAX: usize = 20;

/// Raises an alert about the damaged records of a page.
pub(super) fn report_records<'a>(
    call: &Call,
    action: Action,
    damaged: impl Iterator<Item = &'a DamagedRecord>,
) {
    report(call, "records", damaged, |row| {
        let record = row.id.map(|id| id.to_string());
        keybroker_core::alert!(
            RecordDamaged, call_id = %call.id, action = %action, record,
            damage = row.damage.as_str(), detail = row.detail,
            "a stored record is damaged; compare the record with a backup before you replace the record"
        );
    });
}

/// Raises an alert about the damaged API clients of a page.
pub(super) fn report_clients<'a>(
    call: &Call,
    action: Action,
    damaged: impl Iterator<Item = &'a DamagedClient>,
) {
    report(call, "clients", damaged, |row| {
        let client = row.id.map(|id| id.to_string());
        keybroker_core::alert!(
            ClientDamaged, call_id = %call.id, action = %action, client,
            damage = row.damage.as_str(), detail = row.detail,
            "the stored row of an API client is damaged"
        );
    });
}

fn report<'a, D: 'a>(
    call: &Call,
    table: &'static str,
    damaged: impl Iterator<Item = &'a D>,
    raise_alert: impl Fn(&D),
) {
    let mut total: usize = 0;
    for row in damaged {
        if total < LOGGED_MAX {
            raise_alert(row);
        }
        total += 1;
    }
    if total == 0 {
        return;
    }
    metrics::RECORDS_DAMAGED
        .with::<&str>([])
        .increment(u64::try_from(total).unwrap_or(u64::MAX));
    tracing::warn!(call_id = %call.id, table, total, "a page of a list contains damaged rows");
}
