//! Reads the claims of an access token that identify its holder. The commands do not verify the
//! claims; only the broker verifies them. The commands show the claims and compare them with the
//! options, so that a wrong token file does not overwrite another user's key.

use base64ct::{Base64UrlUnpadded, Encoding as _};
use serde::Deserialize;
use uuid::Uuid;

use crate::cli::exit::{Exit, Failure};
use keybroker_bitwarden::Email;

/// The user that an access token identifies. Both fields are `None` if the access token cannot be decoded.
#[derive(Debug, Default, Deserialize)]
pub(super) struct Holder {
    sub: Option<String>,
    email: Option<String>,
}

impl Holder {
    /// Decodes the payload of an access token.
    pub(super) fn of(token: &str) -> Self {
        let payload = token.split('.').nth(1).unwrap_or_default();
        let claims = Base64UrlUnpadded::decode_vec(payload).unwrap_or_default();
        serde_json::from_slice(&claims).unwrap_or_default()
    }

    /// The user, with control characters escaped for a terminal.
    pub(super) fn user(&self) -> Option<String> {
        shown(self.sub.as_deref())
    }

    /// The e-mail address, with control characters escaped for a terminal.
    pub(super) fn email(&self) -> Option<String> {
        shown(self.email.as_deref())
    }

    /// Rejects an access token if the user in its claims differs from the user in the options.
    pub(super) fn check(&self, user: Option<Uuid>, email: Option<&str>) -> Result<(), Failure> {
        let of_user = self.sub.as_deref().and_then(|sub| sub.parse().ok());
        if user.is_some_and(|user| of_user != Some(user)) {
            return Err(other("user", self.user(), "--user"));
        }
        let (Some(typed), Some(found)) = (email, &self.email) else {
            return Ok(());
        };
        // The e-mail addresses are normalised as in the key derivation, so upper and lower case are
        // equal.
        let [typed, found] = [typed, found.as_str()]
            .map(|text| Email::parse(text).map(|email| email.as_str().to_owned()));
        if typed.is_ok() && typed == found {
            return Ok(());
        }
        Err(other("e-mail address", self.email(), "--email"))
    }
}

fn shown(text: Option<&str>) -> Option<String> {
    text.map(|text| text.escape_debug().to_string())
}

fn other(what: &str, found: Option<String>, option: &str) -> Failure {
    let what = match found {
        Some(found) => format!("the access token's {what} is {found}, which differs from {option}"),
        None => format!("the access token has no {what}; expected the value of {option}"),
    };
    Failure::new(Exit::Usage, what).hint(
        "the broker stores the key for the user of the access token: pass the access token of the intended user",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const ADA: &str = "7d444840-9dc0-41d1-b245-5ffdce74fad2";
    const BOB: &str = "c1a0fd0c-3bd3-4a59-8a55-5f3b0c9a3d11";

    fn holder(claims: &str) -> Holder {
        let payload = Base64UrlUnpadded::encode_string(claims.as_bytes());
        Holder::of(&format!("e30.{payload}.c2ln"))
    }

    fn is_good(holder: &Holder, user: Option<&str>, email: Option<&str>) -> bool {
        let user = user.map(|user| user.parse().unwrap());
        holder.check(user, email).is_ok()
    }

    #[test]
    fn a_token_of_another_user_is_refused() {
        let ada = holder(&format!(r#"{{"sub":"{ADA}","email":"Ada@example.org"}}"#));
        assert_eq!(ada.user().as_deref(), Some(ADA));
        assert!(is_good(&ada, None, None));
        assert!(is_good(&ada, Some(ADA), Some(" ada@EXAMPLE.org")));
        assert!(is_good(&ada, Some(&ADA.to_uppercase()), None));
        assert!(!is_good(&ada, Some(BOB), None));
        assert!(!is_good(&ada, Some(ADA), Some("bob@example.org")));
        assert!(!is_good(&ada, None, Some("")));
    }

    #[test]
    fn a_token_that_says_nothing_is_of_no_user_that_is_named() {
        for token in ["", "nonsense", "a.b.c", "e30.e30.e30", "e30.W10.e30"] {
            let holder = Holder::of(token);
            assert_eq!((holder.user(), holder.email()), (None, None), "{token}");
            assert!(is_good(&holder, None, Some("ada@example.org")));
            assert!(!is_good(&holder, Some(ADA), None));
        }
    }

    #[test]
    fn control_characters_do_not_reach_a_terminal() {
        let holder = holder(r#"{"sub":"\u001b[2J","email":"a\u0007"}"#);
        assert_eq!(holder.user().as_deref(), Some("\\u{1b}[2J"));
        assert_eq!(holder.email().as_deref(), Some("a\\u{7}"));
    }
}
