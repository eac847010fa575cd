//! The sign-ins in progress: the secrets that bind the answer of the provider to the browser that began.
//!
//! Mitigation: M30 of `THREAT_MODEL.md`.

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use axum::http::HeaderMap;
use subtle::ConstantTimeEq as _;

use keybroker_core::{error::Error, key::AccessRequestId, sign_in::Begun};

use super::cookies::{Cookie, Digest, Value};

/// Highest number of sign-ins in progress. Then a new sign-in ends the oldest sign-in of the address that has the most, so that one
/// address cannot prevent the sign-ins of others.
const LOGINS_MAX: usize = 1_024;
/// Time within which a sign-in must end.
const LOGIN_LIFETIME: Duration = Duration::from_mins(10);

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
    pub(super) address: IpAddr,
    pub(super) started: Instant,
}

/// The sign-ins in progress.
#[derive(Debug, Default)]
pub(super) struct Logins(Mutex<HashMap<Digest, Login>>);

impl Logins {
    /// Keeps a sign-in. Returns the value of the cookie.
    pub(super) fn keep(&self, login: Login) -> Result<Value, Error> {
        let (value, digest) = Value::fresh()?;
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.retain(|_, one| one.started.elapsed() < LOGIN_LIFETIME);
        if kept.len() >= LOGINS_MAX
            && let Some(oldest) = oldest_of_busiest(&kept)
        {
            kept.remove(&oldest);
        }
        kept.insert(digest, login);
        Ok(value)
    }

    /// Takes the sign-in of a browser that brings back its state. The same answer is not accepted a second time.
    pub(super) fn take(&self, headers: &HeaderMap, state: &str) -> Option<Login> {
        let digest = Cookie::Login.read(headers)?;
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let login = kept.get(&digest)?;
        // An answer with another state leaves the sign-in as it is: another site can send the browser here, too.
        if !bool::from(login.begun.state.as_bytes().ct_eq(state.as_bytes())) {
            return None;
        }
        let login = kept.remove(&digest)?;
        (login.started.elapsed() < LOGIN_LIFETIME).then_some(login)
    }
}

fn oldest_of_busiest(kept: &HashMap<Digest, Login>) -> Option<Digest> {
    let mut counts = BTreeMap::<IpAddr, usize>::new();
    for one in kept.values() {
        *counts.entry(one.address).or_default() += 1;
    }
    let (busiest, _) = counts.into_iter().max_by_key(|(_, count)| *count)?;
    let of_busiest = kept.iter().filter(|(_, one)| one.address == busiest);
    let oldest = of_busiest.min_by_key(|(_, one)| one.started);
    oldest.map(|(digest, _)| *digest)
}

#[cfg(test)]
mod tests {
    use axum::http::header;

    use super::*;

    fn login(address: u8, state: &str) -> Login {
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
            address: IpAddr::from([192, 0, 2, address]),
            started: Instant::now(),
        }
    }

    fn cookie(value: &Value) -> HeaderMap {
        let set = Cookie::Login.set(value);
        let pair = set.to_str().unwrap().split(';').next().unwrap().to_owned();
        HeaderMap::from_iter([(header::COOKIE, pair.parse().unwrap())])
    }

    #[test]
    fn a_sign_in_ends_once_and_only_with_its_state() {
        let logins = Logins::default();
        let first = cookie(&logins.keep(login(1, "one")).unwrap());
        let second = cookie(&logins.keep(login(1, "two")).unwrap());
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
        let other = cookie(&logins.keep(login(2, "other")).unwrap());
        let first = cookie(&logins.keep(login(1, "first")).unwrap());
        for _ in 0..LOGINS_MAX {
            logins.keep(login(1, "flood")).unwrap();
        }
        assert_eq!(logins.0.lock().unwrap().len(), LOGINS_MAX);
        assert!(logins.take(&first, "first").is_none());
        assert!(logins.take(&other, "other").is_some());
    }
}
