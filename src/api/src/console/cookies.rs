//! The two cookies of the page. Both have the prefix `__Host-`: a browser accepts them only over HTTPS, and neither another host of
//! the domain nor another path can set or read them.
//!
//! Mitigation: M30 of `THREAT_MODEL.md`.

use std::time::Duration;

use aws_lc_rs::{digest, rand};
use axum::http::{HeaderMap, HeaderValue, header};
use base64ct::{Base64UrlUnpadded, Encoding as _};

use keybroker_core::error::{Error, Reason};

/// Time within which a sign-in must end.
pub(super) const LOGIN_LIFETIME: Duration = Duration::from_mins(10);
/// Bytes of randomness of a cookie.
const RANDOM_BYTES: usize = 32;

/// A cookie of the page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cookie {
    /// The session. Browsers send the cookie only with requests from this page (`SameSite=Strict`).
    Session,
    /// The sign-in in progress. The provider, which is another site, sends the browser back, so the cookie is `SameSite=Lax`.
    Login,
}

/// SHA-256 of the value of a cookie. The server keeps only the digest.
pub(super) type Digest = [u8; 32];

impl Cookie {
    const fn name(self) -> &'static str {
        match self {
            Self::Session => "__Host-keybroker-session",
            Self::Login => "__Host-keybroker-login",
        }
    }

    const fn attributes(self) -> &'static str {
        match self {
            Self::Session => "Path=/; Secure; HttpOnly; SameSite=Strict",
            Self::Login => "Path=/; Secure; HttpOnly; SameSite=Lax",
        }
    }

    /// The header that stores a value in the browser.
    pub(super) fn set(self, value: &Value) -> HeaderValue {
        let (name, attributes) = (self.name(), self.attributes());
        let lifetime = match self {
            // The browser keeps it until it ends; the broker ends the session earlier.
            Self::Session => String::new(),
            Self::Login => format!("; Max-Age={}", LOGIN_LIFETIME.as_secs()),
        };
        header_value(&format!("{name}={}; {attributes}{lifetime}", value.0))
    }

    /// The header that removes the cookie from the browser.
    pub(super) fn clear(self) -> HeaderValue {
        let (name, attributes) = (self.name(), self.attributes());
        header_value(&format!("{name}=; {attributes}; Max-Age=0"))
    }

    /// The digest of the cookie's value in a request; `None` if the request has no such cookie, or several.
    pub(super) fn read(self, headers: &HeaderMap) -> Option<Digest> {
        let lines = headers.get_all(header::COOKIE).iter();
        let pairs = lines
            .filter_map(|line| line.to_str().ok())
            .flat_map(|line| line.split(';'))
            .filter_map(|pair| pair.trim().split_once('='));
        let mut values = pairs.filter(|(name, _)| *name == self.name());
        let (Some((_, value)), None) = (values.next(), values.next()) else {
            return None;
        };
        let mut bytes = [0; RANDOM_BYTES];
        let decoded = Base64UrlUnpadded::decode(value, &mut bytes).ok()?;
        (decoded.len() == RANDOM_BYTES).then(|| sha256(decoded))
    }
}

fn header_value(text: &str) -> HeaderValue {
    HeaderValue::from_str(text).expect("names, attributes and Base64url are ASCII")
}

fn sha256(bytes: &[u8]) -> Digest {
    let mut digest = [0; 32];
    digest.copy_from_slice(digest::digest(&digest::SHA256, bytes).as_ref());
    digest
}

/// The value of a cookie: 256 random bits.
pub(super) struct Value(String);

impl Value {
    pub(super) fn fresh() -> Result<(Self, Digest), Error> {
        let mut bytes = [0; RANDOM_BYTES];
        rand::fill(&mut bytes).map_err(|_| Error::new(Reason::Bug, "no random bytes"))?;
        let value = Self(Base64UrlUnpadded::encode_string(&bytes));
        Ok((value, sha256(&bytes)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(lines: &[&str]) -> Option<Digest> {
        let mut headers = HeaderMap::new();
        for line in lines {
            headers.append(header::COOKIE, line.parse().unwrap());
        }
        Cookie::Session.read(&headers)
    }

    #[test]
    fn a_cookie_that_was_set_is_read() {
        let (value, digest) = Value::fresh().unwrap();
        let set = Cookie::Session.set(&value);
        let set = set.to_str().unwrap();
        let (pair, attributes) = set.split_once("; ").unwrap();
        assert_eq!(attributes, "Path=/; Secure; HttpOnly; SameSite=Strict");
        assert_eq!(read(&[pair]), Some(digest));
        assert_eq!(read(&[&format!("other=1; {pair}; last=2")]), Some(digest));
        assert_eq!(read(&["other=1", pair]), Some(digest));
    }

    #[test]
    fn absent_repeated_and_malformed_cookies_are_no_session() {
        let (value, _) = Value::fresh().unwrap();
        let name = Cookie::Session.name();
        let good = format!("{name}={}", value.0);
        let long = format!("{good}AAAA");
        let other = format!("{}={}", Cookie::Login.name(), value.0);
        for lines in [
            &[][..],
            &[good.as_str(), good.as_str()],
            &[&format!("{good}; {good}")],
            &[&format!("{name}=")],
            &[name],
            &[&format!("{name}=AAAA")],
            &[&long],
            &[&good.replacen('=', "=*", 1)],
            &[&other],
        ] {
            assert_eq!(read(lines), None, "{lines:?}");
        }
    }

    #[test]
    fn a_cleared_cookie_expires_at_once() {
        for cookie in [Cookie::Session, Cookie::Login] {
            let text = cookie.clear();
            let text = text.to_str().unwrap();
            assert!(text.starts_with(&format!("{}=; Path=/", cookie.name())));
            assert!(text.ends_with("; Max-Age=0"), "{text}");
        }
    }
}
