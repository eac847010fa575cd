//! Limits for each caller: call rates and an authentication failure limit. Alerts report a service that releases the
//! keys of unusually many users, a record that is replaced unusually often, a member with unusually many requests for
//! access, and a person who approves unusually many. The size of all state is bounded. The entry of an idle caller is
//! dropped when it no longer affects a decision.
//!
//! When an address reaches the authentication failure limit, the broker refuses invalid credentials from this address.
//! The broker no longer makes costly checks of credentials from this address. The broker still accepts valid
//! credentials of known callers. Therefore a caller cannot lock out other callers at the same address.
//!
//! Mitigation: M18 of `THREAT_MODEL.md`.

use std::{
    borrow::Borrow,
    fmt,
    hash::Hash,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    num::NonZeroU32,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use governor::{
    DefaultDirectRateLimiter, Quota, RateLimiter,
    clock::{Clock as _, DefaultClock},
};
use moka::sync::Cache;
use serde::{Deserialize, Serialize};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use keybroker_core::{
    error::{Error, Reason},
    key::{RecordId, Revision},
    metrics,
    principal::{Kind, Principal},
};

mod once_an_hour;
mod releases;
mod replacements;

use once_an_hour::OnceAnHour;
use releases::Releases;
use replacements::Replacements;

/// The `[rates]` section of the configuration. Every rate has a default and cannot be switched off.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Largest number of calls per minute for each user.
    pub user_calls_per_minute: u32,
    /// Largest number of calls per minute for each service. Each item of a batch counts as a call.
    pub service_calls_per_minute: u32,
    /// Largest number per minute of failed credentials for each address, of failed attempts (rejected envelopes, wrong words of a
    /// phrase) for each principal, and of recipients that the token refused for each principal.
    pub failures_per_minute: u32,
    /// Number of different users whose keys one service may release within an hour before an alert is raised.
    pub released_users_per_hour: u32,
    /// Number of times that one record may be replaced within an hour before an alert is raised.
    pub replacements_per_hour: u32,
    /// Number of requests for access that one member may make within an hour before an alert is raised.
    pub access_requests_per_hour: u32,
    /// Number of requests for access that one person may approve for members within an hour before an alert is raised.
    pub approvals_per_hour: u32,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            user_calls_per_minute: 120,
            service_calls_per_minute: 600_000,
            failures_per_minute: 20,
            released_users_per_hour: 1_000,
            replacements_per_hour: 10,
            access_requests_per_hour: 10,
            approvals_per_hour: 30,
        }
    }
}

/// Largest value of the rate settings.
pub const RATE_MAX: u32 = 60_000_000;
/// Largest value of the setting `released_users_per_hour`.
pub const RELEASED_USERS_MAX: u32 = 1_000_000;
/// Largest value of the setting `replacements_per_hour`.
pub const REPLACEMENTS_MAX: u32 = 1_000_000;
/// Largest value of the settings `access_requests_per_hour` and `approvals_per_hour`.
pub const ACCESS_REQUESTS_MAX: u32 = 1_000_000;

/// Largest number of callers that are counted separately.
const CALLERS_MAX: u64 = 100_000;
/// Idle time after which a caller's bucket is dropped. A bucket is full again after one minute, so dropping the bucket
/// loses no information.
const FORGOTTEN_AFTER: Duration = Duration::from_mins(2);
/// The same for a bucket that is full again after one hour.
const HOURLY_FORGOTTEN_AFTER: Duration = Duration::from_mins(61);

/// Largest number of concurrent checks of costly credentials from one address.
const TURNS_MAX: usize = 8;
/// The delay after which a caller may retry if its address already runs the largest number of costly checks.
const TURN_RETRY: Duration = Duration::from_millis(500);

/// The state of the limits of all callers.
#[derive(Debug)]
pub struct Limits {
    users: Buckets<String>,
    services: Buckets<String>,
    failed_credentials: Buckets<IpAddr>,
    failed_attempts: Buckets<String>,
    refused_recipients: Buckets<String>,
    turns: Cache<IpAddr, Arc<Semaphore>>,
    releases: Releases,
    replacements: Replacements,
    access_requests_per_hour: u64,
    access_requests: Buckets<String>,
    request_alerts: OnceAnHour<String>,
    approvals_per_hour: u64,
    approval_alerts: OnceAnHour<String>,
    lines_by_network: Buckets<Network>,
    lines: Buckets<()>,
    suppressed: AtomicU64,
}

impl Limits {
    /// Creates the limits with every bucket full.
    pub fn new(settings: &Settings) -> Arc<Self> {
        Arc::new(Self {
            users: Buckets::new(settings.user_calls_per_minute),
            services: Buckets::new(settings.service_calls_per_minute),
            failed_credentials: Buckets::new(settings.failures_per_minute),
            failed_attempts: Buckets::new(settings.failures_per_minute),
            refused_recipients: Buckets::new(settings.failures_per_minute),
            turns: Cache::builder()
                .max_capacity(CALLERS_MAX)
                .time_to_idle(FORGOTTEN_AFTER)
                .build(),
            releases: Releases::new(settings.released_users_per_hour),
            replacements: Replacements::new(settings.replacements_per_hour),
            access_requests_per_hour: settings.access_requests_per_hour.into(),
            access_requests: Buckets::per_hour(settings.access_requests_per_hour),
            request_alerts: OnceAnHour::default(),
            approvals_per_hour: settings.approvals_per_hour.into(),
            approval_alerts: OnceAnHour::default(),
            lines_by_network: Buckets::new(LINES_PER_NETWORK),
            lines: Buckets::new(LINES_MAX),
            suppressed: AtomicU64::new(0),
        })
    }

    /// Whether the log limits allow another line about an unauthenticated caller at this address. A line that exceeds
    /// the limits is counted as suppressed.
    pub fn may_log(&self, address: IpAddr) -> bool {
        let network = Network::of(address);
        let may =
            self.lines_by_network.take(&network, 1).is_ok() && self.lines.take(&(), 1).is_ok();
        if !may {
            metrics::LOG_LINES_SUPPRESSED.increment();
            self.suppressed.fetch_add(1, Ordering::Relaxed);
        }
        may
    }

    /// Returns the number of lines that were suppressed since the previous call of this function.
    pub fn take_suppressed(&self) -> u64 {
        self.suppressed.swap(0, Ordering::Relaxed)
    }

    /// Counts `count` calls towards the rate limit of a principal. If too few calls are left, the error contains the
    /// time to wait.
    pub fn take_calls(&self, principal: &Principal, count: usize) -> Result<(), Error> {
        let buckets = match principal.kind() {
            Kind::User => &self.users,
            Kind::Service => &self.services,
        };
        // All calls of a principal with too many failed attempts are refused, because each call could be another attempt.
        if let Some(wait) = self.failed_attempts.empty_for(principal.name()) {
            return Err(used_up(wait));
        }
        buckets.take(principal.name(), count).map_err(|wait| {
            let detail = format!("{} has exceeded its rate limit", principal.name());
            Error::new(Reason::Rate, detail).retry_after(wait)
        })
    }

    /// Returns an error while an address has reached the authentication failure limit. The error contains the time
    /// until the next permitted attempt. During this time, costly credentials from this address are not checked.
    pub fn check_address(&self, address: IpAddr) -> Result<(), Error> {
        let closed = self.failed_credentials.empty_for(&network(address));
        closed.map_or(Ok(()), |wait| Err(used_up(wait)))
    }

    /// Reserves one of the concurrent checks of costly credentials for an address. Each address may run only a few
    /// costly checks concurrently, so that one address cannot block all others.
    pub fn take_turn(&self, address: IpAddr) -> Result<OwnedSemaphorePermit, Error> {
        let turns = self
            .turns
            .get_with(network(address), || Arc::new(Semaphore::new(TURNS_MAX)));
        turns.try_acquire_owned().map_err(|_| {
            let detail =
                format!("more than {TURNS_MAX} client secrets from one address are being verified");
            Error::new(Reason::Rate, detail).retry_after(TURN_RETRY)
        })
    }

    /// Counts a failed credential from an address. Returns an error if the address has reached the authentication
    /// failure limit.
    pub fn fail_address(&self, address: IpAddr) -> Result<(), Error> {
        let taken = self.failed_credentials.take(&network(address), 1);
        taken.map_err(used_up)
    }

    /// Counts a failed attempt of a principal: an envelope that the token rejected, or wrong words of a fingerprint phrase.
    pub fn fail_principal(&self, principal: &str) -> Result<(), Error> {
        let taken = self.failed_attempts.take(principal, 1);
        taken.map_err(used_up)
    }

    /// Returns an error while the token has refused too many recipients of a principal. The error contains the time to wait. During
    /// this time, the sealed releases of this principal are refused. Its other calls are not, because a service may pass on the
    /// recipients of its users.
    pub fn check_recipients(&self, principal: &str) -> Result<(), Error> {
        let closed = self.refused_recipients.empty_for(principal);
        closed.map_or(Ok(()), |wait| Err(used_up(wait)))
    }

    /// Counts the public key of a recipient that the token refused.
    pub fn fail_recipient(&self, principal: &str) -> Result<(), Error> {
        let taken = self.refused_recipients.take(principal, 1);
        taken.map_err(used_up)
    }

    /// Records that a service released a key of a user. Returns `true` if the service exceeds the limit of users per
    /// hour and no alert about the service was raised within the last hour.
    pub fn note_release(&self, principal: &Principal, user: &str) -> bool {
        principal.kind() == Kind::Service && self.releases.note(principal.name(), user)
    }

    /// Returns the revision whose time shows whether a record was replaced too often. If this revision was written
    /// within the hour before the current revision, there were too many replacements. Returns `None` if the record has
    /// too few revisions in total.
    pub fn telling_revision(&self, current: Revision) -> Option<Revision> {
        self.replacements.telling_revision(current)
    }

    /// Number of requests for access of one member within an hour, above which an alert is raised.
    pub fn access_requests_per_hour(&self) -> u64 {
        self.access_requests_per_hour
    }

    /// Counts a request for access of a member. Returns whether this broker alone received too many. The database does not have the
    /// requests that a later request of the same device replaced.
    pub fn note_access_request(&self, member: &str) -> bool {
        self.access_requests.take(member, 1).is_err()
    }

    /// Whether to raise an alert about a member with too many requests. The alert is raised at most once an hour.
    pub fn may_alert_of_requests(&self, member: String) -> bool {
        self.request_alerts.may_alert(member)
    }

    /// Number of approvals of one person within an hour, above which an alert is raised.
    pub fn approvals_per_hour(&self) -> u64 {
        self.approvals_per_hour
    }

    /// Whether to raise an alert about a person with too many approvals. The alert is raised at most once an hour.
    pub fn may_alert_of_approvals(&self, person: String) -> bool {
        self.approval_alerts.may_alert(person)
    }

    /// Whether to raise an alert about a record that was replaced too often. The alert is raised at most once an hour.
    pub fn may_alert_of_replacements(&self, record: RecordId) -> bool {
        self.replacements.may_alert(record)
    }
}

fn used_up(wait: Duration) -> Error {
    Error::new(
        Reason::FailureBudget,
        "the limit of failed attempts is reached",
    )
    .retry_after(wait)
}

/// The network of a caller's address: an IPv4 /24 or an IPv6 /64. Refusals are counted and logged per network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Network(IpAddr);

impl Network {
    /// Returns the network of an address.
    pub fn of(address: IpAddr) -> Self {
        const HOST_BITS: u32 = 8;
        Self(match network(address) {
            IpAddr::V4(v4) => {
                IpAddr::V4(Ipv4Addr::from_bits(v4.to_bits() >> HOST_BITS << HOST_BITS))
            }
            v6 @ IpAddr::V6(_) => v6,
        })
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bits = if self.0.is_ipv4() { 24 } else { 64 };
        write!(f, "{}/{bits}", self.0)
    }
}

/// Largest number of log lines per minute about unauthenticated callers, for each network and in total. The function
/// [`shortened`] limits a line to about 600 bytes, so unauthenticated callers add less than 5 MB per hour to the log.
const LINES_PER_NETWORK: u32 = 60;
const LINES_MAX: u32 = 120;

/// Shortens a string for a log line and replaces unusual characters. The text may contain parts of an unauthenticated
/// caller's credential.
pub fn shortened(text: &str) -> String {
    const CHARS_MAX: usize = 300;
    let printable = |c: char| {
        if c.is_ascii() && !c.is_ascii_control() {
            c
        } else {
            '?'
        }
    };
    let mut short: String = text.chars().take(CHARS_MAX).map(printable).collect();
    if text.chars().nth(CHARS_MAX).is_some() {
        short.push_str("...");
    }
    short
}

/// Groups IPv6 addresses by /64, so that a caller does not get a new limit by changing its address within one network.
/// A home network usually has at least a /64 (RFC 6177).
pub fn network(address: IpAddr) -> IpAddr {
    const HOST_BITS: u32 = 64;
    match address.to_canonical() {
        IpAddr::V6(v6) => IpAddr::V6(Ipv6Addr::from_bits(v6.to_bits() >> HOST_BITS << HOST_BITS)),
        v4 @ IpAddr::V4(_) => v4,
    }
}

/// A set of buckets, one for each caller.
struct Buckets<K> {
    quota: Quota,
    known: Cache<K, Arc<Bucket>>,
}

#[derive(Debug)]
struct Bucket {
    limiter: DefaultDirectRateLimiter,
    /// Time at which the last reported wait ends; the bucket is empty until then.
    empty_until: Mutex<Option<Instant>>,
}

impl<K> fmt::Debug for Buckets<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Buckets")
            .field("quota", &self.quota)
            .finish_non_exhaustive()
    }
}

impl<K: Hash + Eq + Send + Sync + 'static> Buckets<K> {
    fn new(per_minute: u32) -> Self {
        let per_minute = NonZeroU32::new(per_minute).unwrap_or(NonZeroU32::MIN);
        Self::of(Quota::per_minute(per_minute), FORGOTTEN_AFTER)
    }

    fn per_hour(per_hour: u32) -> Self {
        let per_hour = NonZeroU32::new(per_hour).unwrap_or(NonZeroU32::MIN);
        Self::of(Quota::per_hour(per_hour), HOURLY_FORGOTTEN_AFTER)
    }

    fn of(quota: Quota, forgotten_after: Duration) -> Self {
        Self {
            quota,
            known: Cache::builder()
                .max_capacity(CALLERS_MAX)
                .time_to_idle(forgotten_after)
                .build(),
        }
    }

    /// Takes `count` calls from a bucket. If the bucket contains fewer calls, takes none and returns the time to wait.
    /// If `count` exceeds the capacity of the bucket, takes all calls of a full bucket.
    fn take<Q>(&self, who: &Q, count: usize) -> Result<(), Duration>
    where
        Q: Hash + Eq + ToOwned<Owned = K> + ?Sized,
        K: Borrow<Q>,
    {
        let count = u32::try_from(count).unwrap_or(u32::MAX);
        let Some(count) = NonZeroU32::new(count.min(self.quota.burst_size().get())) else {
            return Ok(());
        };
        let bucket = self.known.get_with_by_ref(who, || {
            Arc::new(Bucket {
                limiter: RateLimiter::direct(self.quota),
                empty_until: Mutex::default(),
            })
        });
        // The outer error would mean that `count` exceeds the capacity; the lines above prevent this case.
        let Ok(Err(not_until)) = bucket.limiter.check_n(count) else {
            return Ok(());
        };
        let wait = not_until.wait_time_from(DefaultClock::default().now());
        *bucket.empty_until() = Instant::now().checked_add(wait);
        Err(wait)
    }

    /// Returns the remaining time of the last reported wait, without taking a call from the bucket.
    fn empty_for<Q>(&self, who: &Q) -> Option<Duration>
    where
        Q: Hash + Eq + ?Sized,
        K: Borrow<Q>,
    {
        let until = (*self.known.get(who)?.empty_until())?;
        let wait = until.saturating_duration_since(Instant::now());
        (!wait.is_zero()).then_some(wait)
    }
}

impl Bucket {
    fn empty_until(&self) -> MutexGuard<'_, Option<Instant>> {
        self.empty_until
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use keybroker_core::principal::Role;

    fn limits(per_minute: u32) -> Arc<Limits> {
        Limits::new(&Settings {
            user_calls_per_minute: per_minute,
            service_calls_per_minute: per_minute,
            failures_per_minute: per_minute,
            released_users_per_hour: per_minute,
            replacements_per_hour: per_minute,
            ..Settings::default()
        })
    }

    fn service(name: &str) -> Principal {
        crate::testing::service(name, &[Role::Release])
    }

    #[test]
    fn a_principal_over_its_rate_is_told_when_to_come_again() {
        let limits = limits(3);
        limits.take_calls(&service("one"), 2).unwrap();
        let error = limits.take_calls(&service("one"), 2).unwrap_err();
        assert_eq!(error.reason(), Reason::Rate);
        let wait = error.retry_delay().unwrap();
        assert!(
            wait > Duration::from_secs(15) && wait <= Duration::from_secs(20),
            "{wait:?}"
        );
        // A refused call takes nothing from the rate and does not affect other callers.
        limits.take_calls(&service("one"), 1).unwrap();
        limits.take_calls(&service("other"), 3).unwrap();
        limits.take_calls(&service("large-batch"), 1_000).unwrap();
        limits.take_calls(&service("large-batch"), 1).unwrap_err();
    }

    #[test]
    fn failures_of_an_address_end_its_budget_and_no_other() {
        let limits = limits(2);
        let [one, neighbour, other]: [IpAddr; 3] =
            ["2001:db8::1", "2001:db8::ffff:1", "192.0.2.1"].map(|text| text.parse().unwrap());
        limits.fail_address(one).unwrap();
        limits.fail_address(one).unwrap();
        limits.check_address(one).unwrap();
        let error = limits.fail_address(one).unwrap_err();
        assert_eq!(error.reason(), Reason::FailureBudget);
        assert!(error.retry_delay().is_some());
        for address in [one, neighbour] {
            limits.check_address(address).unwrap_err();
        }
        limits.check_address(other).unwrap();
        let mapped = "::ffff:192.0.2.1".parse().unwrap();
        for _ in 0..3 {
            limits.fail_address(mapped).ok();
        }
        limits.check_address(other).unwrap_err();
    }

    #[test]
    fn failed_attempts_cost_a_principal_its_calls() {
        let limits = limits(2);
        let guilty = service("guilty");
        for _ in 0..2 {
            limits.fail_principal(guilty.name()).unwrap();
        }
        limits.take_calls(&guilty, 1).unwrap();
        limits.fail_principal(guilty.name()).unwrap_err();
        let error = limits.take_calls(&guilty, 1).unwrap_err();
        assert_eq!(error.reason(), Reason::FailureBudget);
        limits.take_calls(&service("innocent"), 1).unwrap();
    }

    #[test]
    fn what_a_caller_puts_into_a_log_line_is_short_and_plain() {
        let hostile = "\u{10ffff}\n\"".repeat(1_000);
        let short = shortened(&hostile);
        assert!(short.len() <= 303, "{}", short.len());
        assert!(short.chars().all(|c| c.is_ascii() && !c.is_ascii_control()));
        assert_eq!(shortened("the `exp` has passed"), "the `exp` has passed");
    }

    /// Refusals from constantly changing addresses add a limited number of log lines. The other refusals are only
    /// counted.
    #[test]
    fn unauthenticated_callers_do_not_fill_the_log() {
        const REFUSALS: u32 = 100_000;
        // On a busy machine, the test takes long enough for a bucket to fill up again.
        let bounds = |per_minute: u32, begun: Instant| {
            let seconds = u32::try_from(begun.elapsed().as_secs()).unwrap() + 1;
            per_minute..=per_minute + per_minute * seconds / 60 + 1
        };
        let count = |written: usize| u32::try_from(written).unwrap();
        let (limits, begun) = (limits(1), Instant::now());
        let written = (0..REFUSALS)
            .filter(|number| limits.may_log(IpAddr::from((number << 8).to_be_bytes())))
            .count();
        let written = count(written);
        assert!(bounds(LINES_MAX, begun).contains(&written), "{written}");
        assert_eq!(limits.take_suppressed(), u64::from(REFUSALS - written));
        assert_eq!(limits.take_suppressed(), 0);
        let one = IpAddr::from([192, 0, 2, 1]);
        let (limits, begun) = (self::limits(1), Instant::now());
        let written = count((0..10_000).filter(|_| limits.may_log(one)).count());
        let expected = bounds(LINES_PER_NETWORK, begun);
        assert!(expected.contains(&written), "{written}");
    }

    #[test]
    fn unauthenticated_callers_do_not_fill_the_memory() {
        let buckets = Buckets::<u64>::new(1);
        for number in 0..3 * CALLERS_MAX {
            buckets.take(&number, 1).unwrap();
        }
        buckets.known.run_pending_tasks();
        assert!(buckets.known.entry_count() <= CALLERS_MAX);
    }
}
