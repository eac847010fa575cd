//! The sign-ins in progress: the secrets that bind the answer of the provider to the browser that began, and the limits of the
//! exchanges at the provider.
//!
//! Everyone can begin a sign-in, so one network must not prevent the sign-ins of others. A sign-in that was begun with a valid
//! session does not compete with sign-ins without one.
//!
//! Mitigation: M30 of `THREAT_MODEL.md`.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use axum::http::HeaderMap;
use subtle::ConstantTimeEq as _;
use tokio::sync::{Semaphore, SemaphorePermit};

use keybroker_core::{
    error::{Error, Reason},
    key::AccessRequestId,
    sign_in::Begun,
};

use super::cookies::{Cookie, Digest, LOGIN_LIFETIME, Value};

/// Highest number of sign-ins in progress. Then a new sign-in ends the oldest sign-in of the network that has the most. If several
/// networks have the most, it ends the oldest sign-in of all of them. Sign-ins with a session end only for other sign-ins with one.
const LOGINS_MAX: usize = 1_024;

/// Highest number of concurrent exchanges of sign-ins without a session.
const EXCHANGES_MAX: usize = 8;
/// Highest number of concurrent exchanges of sign-ins that were begun with a session.
const SESSION_EXCHANGES_MAX: usize = 4;
/// Longest time for which a sign-in waits for a place among the concurrent exchanges.
const EXCHANGE_WAIT: Duration = Duration::from_secs(2);
/// Highest number of exchanges per minute of sign-ins without a session, for each network. The limit must be well above the number
/// of approvers behind one address, and well below the rate that a provider refuses.
const EXCHANGES_PER_MINUTE: u32 = 120;
const MINUTE: Duration = Duration::from_mins(1);
/// Highest number of networks whose exchanges are counted separately. Then all counts start again, which only helps a caller
/// with that many networks.
const NETWORKS_MAX: usize = 4_096;
/// Time after which a person may try again if there are too many sign-ins.
const RETRY: Duration = Duration::from_secs(5);

/// A sign-in in progress.
#[derive(Debug)]
pub(super) struct Login {
    pub(super) begun: Begun,
    /// How old the authentication may be at most, if the provider was asked to authenticate again.
    pub(super) max_age: Option<Duration>,
    /// The request that the approver wants to see afterwards.
    pub(super) request: Option<AccessRequestId>,
    /// The session that the new session replaces.
    pub(super) replaces: Option<Digest>,
    /// The network from which the browser began, as in the limits of the broker.
    pub(super) network: IpAddr,
    pub(super) started: Instant,
}

impl Login {
    /// Whether the browser had a valid session when the sign-in began.
    fn has_session(&self) -> bool {
        self.replaces.is_some()
    }
}

/// The sign-ins in progress.
#[derive(Debug, Default)]
pub(super) struct Logins {
    kept: Mutex<HashMap<Digest, Login>>,
    exchanges: Exchanges,
}

/// The exchanges of codes at the provider, which the broker makes with its own credentials.
#[derive(Debug)]
struct Exchanges {
    without_session: Semaphore,
    with_session: Semaphore,
    recent: Mutex<Recent>,
}

/// The exchanges of sign-ins without a session within the current minute.
#[derive(Debug)]
struct Recent {
    since: Instant,
    by_network: HashMap<IpAddr, u32>,
}

impl Logins {
    /// Keeps a sign-in. Returns the value of the cookie.
    pub(super) fn keep(&self, login: Login) -> Result<Value, Error> {
        let (value, digest) = Value::fresh()?;
        let mut kept = self.kept();
        // The browser of a session has one cookie for sign-ins, so an earlier sign-in of the session can no longer be completed.
        kept.retain(|_, one| {
            let is_superseded = one.has_session() && one.replaces == login.replaces;
            one.started.elapsed() < LOGIN_LIFETIME && !is_superseded
        });
        if kept.len() >= LOGINS_MAX {
            let Some(ended) = least_needed(&kept, login.has_session()) else {
                return Err(overloaded("too many sign-ins are in progress", RETRY));
            };
            kept.remove(&ended);
        }
        kept.insert(digest, login);
        Ok(value)
    }

    /// Takes the sign-in of a browser that brings back its state. The same answer is not accepted a second time.
    pub(super) fn take(&self, headers: &HeaderMap, state: &str) -> Option<Login> {
        let digest = Cookie::Login.read(headers)?;
        let mut kept = self.kept();
        let login = kept.get(&digest)?;
        // An answer with another state leaves the sign-in as it is: another site can send the browser here, too.
        if !bool::from(login.begun.state.as_bytes().ct_eq(state.as_bytes())) {
            return None;
        }
        let login = kept.remove(&digest)?;
        (login.started.elapsed() < LOGIN_LIFETIME).then_some(login)
    }

    /// Takes a place for the exchange of a code. Waits for a short time if all places are taken.
    pub(super) async fn exchange(&self, login: &Login) -> Result<SemaphorePermit<'_>, Error> {
        self.exchanges.begin(login, EXCHANGE_WAIT).await
    }

    fn kept(&self) -> MutexGuard<'_, HashMap<Digest, Login>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for Exchanges {
    fn default() -> Self {
        Self {
            without_session: Semaphore::new(EXCHANGES_MAX),
            with_session: Semaphore::new(SESSION_EXCHANGES_MAX),
            recent: Mutex::new(Recent::begin()),
        }
    }
}

impl Exchanges {
    async fn begin(&self, login: &Login, wait: Duration) -> Result<SemaphorePermit<'_>, Error> {
        let places = if login.has_session() {
            &self.with_session
        } else {
            self.count(login.network)?;
            &self.without_session
        };
        let place = tokio::time::timeout(wait, places.acquire()).await;
        let place = place.ok().and_then(Result::ok);
        place.ok_or_else(|| overloaded("too many codes are being exchanged", RETRY))
    }

    /// Counts an exchange of a network. Returns an error if the network has reached the limit.
    fn count(&self, network: IpAddr) -> Result<(), Error> {
        let mut recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        if recent.since.elapsed() >= MINUTE || recent.by_network.len() >= NETWORKS_MAX {
            *recent = Recent::begin();
        }
        let wait = MINUTE.saturating_sub(recent.since.elapsed());
        let count = recent.by_network.entry(network).or_default();
        if *count >= EXCHANGES_PER_MINUTE {
            let detail = "too many sign-ins of this network were finished within a minute";
            return Err(overloaded(detail, wait));
        }
        *count += 1;
        Ok(())
    }
}

impl Recent {
    fn begin() -> Self {
        Self {
            since: Instant::now(),
            by_network: HashMap::new(),
        }
    }
}

fn overloaded(detail: &str, wait: Duration) -> Error {
    Error::new(Reason::Rate, format!("sign-in: {detail}")).retry_after(wait)
}

/// Returns the sign-in that ends so that another one can begin; `None` if no sign-in may end for it.
fn least_needed(kept: &HashMap<Digest, Login>, for_session: bool) -> Option<Digest> {
    let are_all_with_session = kept.values().all(Login::has_session);
    if are_all_with_session && !for_session {
        return None;
    }
    let may_end = |login: &Login| are_all_with_session || !login.has_session();
    let mut counts = HashMap::<IpAddr, usize>::new();
    for one in kept.values().filter(|one| may_end(one)) {
        *counts.entry(one.network).or_default() += 1;
    }
    let most = counts.values().max()?;
    let of_busiest = kept
        .iter()
        .filter(|(_, one)| may_end(one) && counts.get(&one.network) == Some(most));
    let oldest = of_busiest.min_by_key(|(_, one)| one.started);
    oldest.map(|(digest, _)| *digest)
}

#[cfg(test)]
mod tests {
    use axum::http::header;

    use keybroker_broker::limits;

    use super::*;

    fn login(address: &str, state: &str) -> Login {
        Login {
            begun: Begun {
                url: String::new(),
                state: state.to_owned(),
                nonce: String::new(),
                verifier: String::new(),
            },
            max_age: None,
            request: None,
            replaces: None,
            network: limits::network(address.parse().unwrap()),
            started: Instant::now(),
        }
    }

    /// A sign-in that was begun with the session of this number.
    fn with_session(number: usize, address: &str, state: &str) -> Login {
        let mut digest = Digest::default();
        digest[..8].copy_from_slice(&number.to_be_bytes());
        Login {
            replaces: Some(digest),
            ..login(address, state)
        }
    }

    fn cookie(value: &Value) -> HeaderMap {
        let set = Cookie::Login.set(value);
        let pair = set.to_str().unwrap().split(';').next().unwrap().to_owned();
        HeaderMap::from_iter([(header::COOKIE, pair.parse().unwrap())])
    }

    fn keep(logins: &Logins, login: Login) -> HeaderMap {
        cookie(&logins.keep(login).unwrap())
    }

    #[test]
    fn a_sign_in_ends_once_and_only_with_its_state() {
        let logins = Logins::default();
        let first = keep(&logins, login("192.0.2.1", "one"));
        let second = keep(&logins, login("192.0.2.1", "two"));
        assert!(logins.take(&first, "two").is_none());
        assert!(logins.take(&second, "one").is_none());
        assert!(logins.take(&HeaderMap::new(), "one").is_none());
        assert!(logins.take(&first, "one").is_some());
        assert!(logins.take(&first, "one").is_none());
        assert!(logins.take(&second, "two").is_some());
    }

    #[test]
    fn a_flood_from_one_address_ends_only_its_own_sign_ins() {
        let logins = Logins::default();
        let other = keep(&logins, login("192.0.2.2", "other"));
        let first = keep(&logins, login("192.0.2.1", "first"));
        for _ in 0..LOGINS_MAX {
            keep(&logins, login("192.0.2.1", "flood"));
        }
        assert_eq!(logins.kept().len(), LOGINS_MAX);
        assert!(logins.take(&first, "first").is_none());
        assert!(logins.take(&other, "other").is_some());
    }

    #[test]
    fn the_addresses_of_one_ipv6_network_count_together() {
        let logins = Logins::default();
        // The address of the other network is higher than all addresses of the flood.
        let other = keep(&logins, login("2001:db8:ffff::1", "other"));
        for number in 0..2 * LOGINS_MAX {
            keep(&logins, login(&format!("2001:db8::{number:x}"), "flood"));
        }
        assert_eq!(logins.kept().len(), LOGINS_MAX);
        assert!(logins.take(&other, "other").is_some());
    }

    #[test]
    fn among_networks_with_equal_counts_the_oldest_sign_in_ends() {
        let logins = Logins::default();
        let first = keep(&logins, login("192.0.2.1", "first"));
        let highest = keep(&logins, login("255.255.255.255", "highest"));
        for number in 2..LOGINS_MAX {
            let address = format!("10.0.{}.{}", number / 256, number % 256);
            keep(&logins, login(&address, "one"));
        }
        assert_eq!(logins.kept().len(), LOGINS_MAX);
        keep(&logins, login("198.51.100.1", "new"));
        assert_eq!(logins.kept().len(), LOGINS_MAX);
        assert!(logins.take(&first, "first").is_none());
        assert!(logins.take(&highest, "highest").is_some());
    }

    #[test]
    fn a_sign_in_with_a_session_does_not_end_for_others() {
        let logins = Logins::default();
        let approver = keep(&logins, with_session(1, "192.0.2.1", "approver"));
        // Also if its network has the most sign-ins.
        for _ in 0..2 * LOGINS_MAX {
            keep(&logins, login("192.0.2.1", "flood"));
        }
        for number in 0..LOGINS_MAX {
            let address = format!("10.0.{}.{}", number / 256, number % 256);
            keep(&logins, login(&address, "flood"));
        }
        assert_eq!(logins.kept().len(), LOGINS_MAX);
        assert!(logins.take(&approver, "approver").is_some());
    }

    #[test]
    fn sign_ins_with_a_session_end_only_for_each_other() {
        let logins = Logins::default();
        let first = keep(&logins, with_session(0, "192.0.2.1", "first"));
        let second = keep(&logins, with_session(1, "192.0.2.1", "second"));
        for number in 2..LOGINS_MAX {
            keep(&logins, with_session(number, "192.0.2.1", "one"));
        }
        let refused = logins.keep(login("192.0.2.2", "other")).map(|_| ());
        let refused = refused.unwrap_err();
        assert_eq!(refused.reason(), Reason::Rate);
        assert!(refused.retry_delay().is_some());
        keep(&logins, with_session(LOGINS_MAX, "192.0.2.1", "new"));
        assert_eq!(logins.kept().len(), LOGINS_MAX);
        assert!(logins.take(&first, "first").is_none());
        assert!(logins.take(&second, "second").is_some());
    }

    #[test]
    fn a_session_has_one_sign_in() {
        let logins = Logins::default();
        let earlier = keep(&logins, with_session(1, "192.0.2.1", "earlier"));
        let other = keep(&logins, with_session(2, "192.0.2.1", "other"));
        let without = keep(&logins, login("192.0.2.1", "without"));
        let later = keep(&logins, with_session(1, "192.0.2.1", "later"));
        assert!(logins.take(&earlier, "earlier").is_none());
        assert!(logins.take(&other, "other").is_some());
        assert!(logins.take(&without, "without").is_some());
        assert!(logins.take(&later, "later").is_some());
    }

    #[tokio::test]
    async fn few_codes_are_exchanged_at_the_same_time() {
        let exchanges = Exchanges::default();
        let (one, other) = (login("192.0.2.1", ""), login("192.0.2.2", ""));
        let mut running = Vec::new();
        for _ in 0..EXCHANGES_MAX {
            running.push(exchanges.begin(&one, Duration::ZERO).await.unwrap());
        }
        let error = exchanges.begin(&other, Duration::ZERO).await.unwrap_err();
        assert_eq!(error.reason(), Reason::Rate);
        assert!(!error.is_failed_attempt() && error.retry_delay().is_some());
        // Sign-ins with a session have places of their own.
        let approver = with_session(1, "192.0.2.1", "");
        let place = exchanges.begin(&approver, Duration::ZERO).await.unwrap();
        drop((running.pop(), place));
        drop(exchanges.begin(&other, Duration::ZERO).await.unwrap());
    }

    #[tokio::test]
    async fn a_network_has_a_limit_of_exchanges_per_minute() {
        let exchanges = Exchanges::default();
        let one = login("2001:db8::1", "");
        for _ in 0..EXCHANGES_PER_MINUTE {
            drop(exchanges.begin(&one, EXCHANGE_WAIT).await.unwrap());
        }
        for address in ["2001:db8::1", "2001:db8::ffff:1"] {
            let begun = exchanges.begin(&login(address, ""), EXCHANGE_WAIT).await;
            let error = begun.unwrap_err();
            assert_eq!(error.reason(), Reason::Rate);
            assert!(error.retry_delay().is_some_and(|delay| delay <= MINUTE));
        }
        // Neither another network nor an approver with a session pays for it.
        let other = login("2001:db8:1::1", "");
        drop(exchanges.begin(&other, EXCHANGE_WAIT).await.unwrap());
        let approver = with_session(1, "2001:db8::1", "");
        drop(exchanges.begin(&approver, EXCHANGE_WAIT).await.unwrap());
        assert_eq!(
            exchanges.with_session.available_permits(),
            SESSION_EXCHANGES_MAX
        );
    }

    #[test]
    fn the_number_of_counted_networks_is_limited() {
        let exchanges = Exchanges::default();
        for number in 0..3 * NETWORKS_MAX {
            let address = u32::try_from(number).unwrap().to_be_bytes();
            exchanges.count(IpAddr::from(address)).unwrap();
        }
        assert!(exchanges.recent.lock().unwrap().by_network.len() <= NETWORKS_MAX);
    }
}
