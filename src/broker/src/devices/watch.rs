//! Alerts about unusually many requests for access of one member, and unusually many approvals of one person.
//!
//! The counts are read from the database, so that all brokers of one database share them, and a restart loses nothing. Requests that
//! a later request of the same device replaced are not in the database, so each broker also counts the requests in memory. A count
//! never makes a call fail, because the change is already committed.

use std::time::Duration;

use keybroker_core::{
    call::{Call, Timestamp},
    error::Error,
    key::UserId,
    principal::Principal,
};
use keybroker_store as store;

use crate::Broker;

/// Time limit for a count.
const WATCH_TIMEOUT: Duration = Duration::from_secs(1);
/// The time in microseconds over which requests and approvals are counted.
const WINDOW_US: i64 = 3_600 * 1_000_000;

impl Broker {
    /// Raises an alert about a member with unusually many requests: another person may be signed in as the member.
    pub(super) async fn watch_requests(&self, principal: &Principal, call: &Call, user: &UserId) {
        let member = format!("{}/{user}", principal.tenant());
        let are_too_many = self.limits.note_access_request(&member);
        let counts = self
            .store
            .recent_access_requests(principal.tenant(), user, since());
        let most = self.limits.access_requests_per_hour();
        let mut count = counted(call, counts).await.unwrap_or_default();
        if are_too_many {
            count = count.max(most.saturating_add(1));
        }
        if count <= most || !self.limits.may_alert_of_requests(member) {
            return;
        }
        keybroker_core::alert!(
            FrequentAccessRequests, call_id = %call.id, %principal, user = user.as_str(), count,
            "a member made more than `access_requests_per_hour` requests for access within an hour"
        );
        let action = "alarm.frequent_access_requests";
        let recorded = self.record_alert(principal, call, action, None).await;
        report(recorded);
    }

    /// Raises an alert about a person who approves unusually many requests: another person may be using the credential.
    pub(super) async fn watch_approvals(&self, principal: &Principal, call: &Call) {
        let mut total = 0;
        for name in self.principals_of_person(principal.name()) {
            let counts = self
                .store
                .recent_approvals(principal.tenant(), name, since());
            let Some(count) = counted(call, counts).await else {
                return;
            };
            total += count;
        }
        if total <= self.limits.approvals_per_hour() {
            return;
        }
        let person = self.person_named(principal.name());
        if !self.limits.may_alert_of_approvals(person.to_owned()) {
            return;
        }
        keybroker_core::alert!(
            FrequentApprovals, call_id = %call.id, %principal, person, count = total,
            "a person approved more than `approvals_per_hour` requests for access within an hour"
        );
        let action = "alarm.frequent_approvals";
        let recorded = self.record_alert(principal, call, action, None).await;
        report(recorded);
    }
}

fn since() -> Timestamp {
    Timestamp::from_micros(Timestamp::now().micros().saturating_sub(WINDOW_US))
}

/// The result of a count; `None` if the database did not answer in time.
async fn counted(
    call: &Call,
    counts: impl Future<Output = Result<u64, store::Error>>,
) -> Option<u64> {
    match tokio::time::timeout(WATCH_TIMEOUT, counts).await {
        Ok(Ok(count)) => Some(count),
        Ok(Err(error)) => {
            tracing::warn!(call_id = %call.id, %error, "cannot count requests for access");
            None
        }
        Err(_) => {
            tracing::warn!(call_id = %call.id, "the database did not answer in time, so requests for access were not counted");
            None
        }
    }
}

fn report(recorded: Result<(), Error>) {
    if let Err(error) = recorded {
        tracing::error!(%error, "cannot write the audit entry of an alert");
    }
}
