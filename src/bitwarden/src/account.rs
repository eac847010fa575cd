//! The values that a person types: e-mail address and password.

use std::fmt;

use zeroize::Zeroizing;

use super::Error;

/// Longest e-mail address, in bytes, as in the database of Bitwarden's server.
const EMAIL_BYTES_MAX: usize = 256;
/// Longest password, in bytes. Clients have no maximum length. This maximum detects a wrong file
/// that was passed as the password file.
pub const PASSWORD_BYTES_MAX: usize = 4_096;
/// JavaScript's `trim` removes this character, but Rust's `trim` does not.
const BYTE_ORDER_MARK: char = '\u{feff}';
/// Rust's `trim` removes this character, but JavaScript's `trim` does not.
const NEXT_LINE: char = '\u{85}';

/// An e-mail address, normalised as the salt of a master key: trimmed and in lower case, as in all clients.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Email(String);

impl Email {
    /// Normalises an e-mail address. Fails if the result is empty, too long or has control characters.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let is_space = |c: char| (c.is_whitespace() && c != NEXT_LINE) || c == BYTE_ORDER_MARK;
        let email = text.trim_matches(is_space).to_lowercase();
        let is_odd = email.chars().any(char::is_control);
        if email.is_empty() || email.len() > EMAIL_BYTES_MAX || is_odd {
            return Err(Error::Email);
        }
        Ok(Self(email))
    }

    /// The normalised address.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl AsRef<str> for Email {
    fn as_ref(&self) -> &str {
        self.as_str()
    }
}

/// The salt of a master key as the server sends it before a login. The salt is used unchanged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Salt(String);

impl Salt {
    /// Uses the text unchanged, without trimming it or changing its case.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let is_odd = text.chars().any(char::is_control);
        if text.is_empty() || text.len() > EMAIL_BYTES_MAX || is_odd {
            return Err(Error::Salt);
        }
        Ok(Self(text.to_owned()))
    }
}

impl From<&Email> for Salt {
    fn from(email: &Email) -> Self {
        Self(email.0.clone())
    }
}

impl AsRef<str> for Salt {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

/// A master password.
pub struct Password(Zeroizing<String>);

impl Password {
    /// Uses the text unchanged, without trimming or normalising it.
    pub fn new(text: Zeroizing<String>) -> Result<Self, Error> {
        if (1..=PASSWORD_BYTES_MAX).contains(&text.len()) {
            Ok(Self(text))
        } else {
            Err(Error::Password)
        }
    }

    pub(super) fn expose(&self) -> &[u8] {
        self.0.as_bytes()
    }
}

impl fmt::Debug for Password {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Password(redacted)")
    }
}
