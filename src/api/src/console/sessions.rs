//! The sessions of approvers, in the memory of this process. A restart of the broker ends them.
//!
//! Mitigation: M30 of `THREAT_MODEL.md`.

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use aws_lc_rs::{hmac, rand};
use axum::http::HeaderMap;
use base64ct::{Base64UrlUnpadded, Encoding as _};

use keybroker_core::{
    call::Timestamp,
    error::{Error, Reason},
    principal::Principal,
};

use super::cookies::{Cookie, Digest, Value};

/// Highest number of sessions. Then a new session ends the session that was not used for the longest time.
const SESSIONS_MAX: usize = 4_096;
/// Highest number of sessions of one approver.
const SESSIONS_OF_ONE_MAX: usize = 8;

/// The sessions of approvers.
#[derive(Debug)]
pub struct Sessions {
    idle: Duration,
    lifetime: Duration,
    open: Mutex<HashMap<Digest, Open>>,
}

#[derive(Debug)]
struct Open {
    session: Session,
    used: Instant,
}

/// The session of an approver who signed in.
#[derive(Clone)]
pub struct Session(Arc<Inner>);

struct Inner {
    digest: Digest,
    principal: Arc<Principal>,
    started: Instant,
    forms: hmac::Key,
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Session({})", self.0.principal)
    }
}

impl Session {
    /// The approver.
    pub fn principal(&self) -> &Arc<Principal> {
        &self.0.principal
    }

    /// Whether the approver authenticated at the provider within this time.
    pub(super) fn is_authenticated_within(&self, time: Duration) -> bool {
        is_authenticated_within(&self.0.principal, time)
    }

    pub(super) fn digest(&self) -> Digest {
        self.0.digest
    }

    /// The token of a form: a MAC over its purpose, by a key of this session.
    pub(super) fn token(&self, purpose: &str) -> String {
        let tag = hmac::sign(&self.0.forms, purpose.as_bytes());
        Base64UrlUnpadded::encode_string(tag.as_ref())
    }

    /// Whether a form has the token of its purpose.
    pub(super) fn is_token(&self, purpose: &str, token: &str) -> bool {
        let tag = Base64UrlUnpadded::decode_vec(token).unwrap_or_default();
        hmac::verify(&self.0.forms, purpose.as_bytes(), &tag).is_ok()
    }
}

/// Whether the provider says that a principal authenticated within this time.
pub(super) fn is_authenticated_within(principal: &Principal, time: Duration) -> bool {
    let time = i64::try_from(time.as_micros()).unwrap_or(i64::MAX);
    let authenticated = principal.identity().claims.authenticated;
    let now = Timestamp::now().micros();
    authenticated.is_some_and(|at| now.saturating_sub(at.micros()) <= time)
}

impl Sessions {
    /// No sessions yet. A session ends after `idle` without a request, and at the latest after `lifetime`.
    pub fn new(idle: Duration, lifetime: Duration) -> Self {
        Self {
            idle,
            lifetime,
            open: Mutex::default(),
        }
    }

    /// The session of a request, if it has not ended.
    pub fn find(&self, headers: &HeaderMap) -> Option<Session> {
        let digest = Cookie::Session.read(headers)?;
        let now = Instant::now();
        let mut open = self.lock();
        let found = open.get_mut(&digest)?;
        if !self.is_good(found, now) {
            open.remove(&digest);
            return None;
        }
        found.used = now;
        Some(found.session.clone())
    }

    /// Starts a session with a new id.
    pub(super) fn start(&self, principal: Arc<Principal>) -> Result<Value, Error> {
        let (value, digest) = Value::fresh()?;
        let mut key = [0; 32];
        rand::fill(&mut key).map_err(|_| Error::new(Reason::Bug, "no random bytes"))?;
        let now = Instant::now();
        let session = Session(Arc::new(Inner {
            digest,
            principal,
            started: now,
            forms: hmac::Key::new(hmac::HMAC_SHA256, &key),
        }));
        let mut open = self.lock();
        open.retain(|_, one| self.is_good(one, now));
        let name = session.principal().name();
        make_room(&mut open, SESSIONS_OF_ONE_MAX, |one| {
            one.session.principal().name() == name
        });
        make_room(&mut open, SESSIONS_MAX, |_| true);
        open.insert(digest, Open { session, used: now });
        Ok(value)
    }

    /// Ends a session.
    pub(super) fn end(&self, digest: &Digest) {
        self.lock().remove(digest);
    }

    fn is_good(&self, one: &Open, now: Instant) -> bool {
        now.duration_since(one.used) < self.idle
            && now.duration_since(one.session.0.started) < self.lifetime
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Digest, Open>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Ends the least recently used of the selected sessions until there is room for one more.
fn make_room(open: &mut HashMap<Digest, Open>, max: usize, is_one: impl Fn(&Open) -> bool) {
    while open.values().filter(|one| is_one(one)).count() >= max {
        let selected = open.iter().filter(|(_, one)| is_one(one));
        let oldest = selected.min_by_key(|(_, one)| one.used);
        let Some(digest) = oldest.map(|(digest, _)| *digest) else {
            return;
        };
        open.remove(&digest);
    }
}

#[cfg(test)]
mod tests {
    use axum::http::header;
    use keybroker_core::{
        key::Tenant,
        principal::{Claims, Credential, Identity, Kind, Reach},
    };

    use super::*;

    const HOUR: Duration = Duration::from_hours(1);

    fn approver(name: &str, authenticated: Option<Timestamp>) -> Arc<Principal> {
        Arc::new(Principal::authenticated(Identity {
            name: name.to_owned(),
            credential: Credential::Token,
            kind: Kind::Service,
            tenant: Tenant::default(),
            roles: std::collections::BTreeSet::new(),
            users: Reach::All,
            key_names: Reach::All,
            subject: None,
            mapping: None,
            claims: Claims {
                authenticated,
                ..Claims::default()
            },
        }))
    }

    fn started(sessions: &Sessions, name: &str) -> HeaderMap {
        let value = sessions.start(approver(name, None)).unwrap();
        let set = Cookie::Session.set(&value);
        let pair = set.to_str().unwrap().split(';').next().unwrap().to_owned();
        HeaderMap::from_iter([(header::COOKIE, pair.parse().unwrap())])
    }

    #[test]
    fn a_session_is_found_until_it_ends() {
        let sessions = Sessions::new(HOUR, HOUR);
        let carol = started(&sessions, "carol");
        let found = sessions.find(&carol).unwrap();
        assert_eq!(found.principal().name(), "carol");
        assert!(sessions.find(&HeaderMap::new()).is_none());
        sessions.end(&found.digest());
        assert!(sessions.find(&carol).is_none());
        for (idle, lifetime) in [(Duration::ZERO, HOUR), (HOUR, Duration::ZERO)] {
            let sessions = Sessions::new(idle, lifetime);
            assert!(sessions.find(&started(&sessions, "carol")).is_none());
            assert!(sessions.lock().is_empty());
        }
    }

    #[test]
    fn a_person_has_a_limited_number_of_sessions() {
        let sessions = Sessions::new(HOUR, HOUR);
        let dave = started(&sessions, "dave");
        let of_carol: Vec<_> = (0..=SESSIONS_OF_ONE_MAX)
            .map(|_| started(&sessions, "carol"))
            .collect();
        assert!(sessions.find(&of_carol[0]).is_none());
        assert!(of_carol[1..].iter().all(|one| sessions.find(one).is_some()));
        assert!(sessions.find(&dave).is_some());
    }

    #[test]
    fn a_token_is_of_one_session_and_one_purpose() {
        let sessions = Sessions::new(HOUR, HOUR);
        let [one, other] =
            ["carol", "carol"].map(|name| sessions.find(&started(&sessions, name)).unwrap());
        let token = one.token("deny 1");
        assert!(one.is_token("deny 1", &token));
        assert!(!one.is_token("deny 2", &token));
        assert!(!one.is_token("approve 1", &token));
        assert!(!other.is_token("deny 1", &token));
        for bad in ["", "*", &token[1..], &format!("{token}A")] {
            assert!(!one.is_token("deny 1", bad), "{bad}");
        }
    }

    #[test]
    fn an_authentication_without_a_time_is_not_recent() {
        let now = Timestamp::now().micros();
        for (ago_s, is_recent) in [(0, true), (59, true), (61, false)] {
            let at = Timestamp::from_micros(now - ago_s * 1_000_000);
            let principal = approver("carol", Some(at));
            let minute = Duration::from_mins(1);
            assert_eq!(is_authenticated_within(&principal, minute), is_recent);
        }
        assert!(!is_authenticated_within(&approver("carol", None), HOUR));
    }
}
