//! Pages of records, and their tokens: opaque to clients, and checked like any other input when they come back.

use base64ct::{Base64UrlUnpadded, Encoding as _};
use prost::Message as _;

use keybroker_broker::ListPage;
use keybroker_core::{
    error::Error,
    key::{KeyName, UserId},
};
use keybroker_proto as proto;

use super::convert;

/// Longest page token, in bytes.
const TOKEN_BYTES_MAX: usize = 1_024;
const VERSION: char = '1';
/// Cannot occur in a user: no control characters.
const SEPARATOR: char = '\u{1f}';

/// A tag and a length before each field: one byte, and at most three for what fits a message.
const OVERHEAD: usize = 4;

/// As many records of a page as a message holds; the next page begins after them. The longest record is far shorter than
/// a message, so that every page moves on.
pub(super) fn message(mut page: ListPage, bytes_max: usize) -> proto::ListUserKeysResponse {
    let mut room = bytes_max - TOKEN_BYTES_MAX - OVERHEAD;
    let mut user_keys = Vec::with_capacity(page.records.len());
    for record in &page.records {
        let user_key = convert::user_key_view(record);
        let length = user_key.encoded_len() + OVERHEAD;
        if length > room {
            let last = user_keys
                .len()
                .checked_sub(1)
                .and_then(|at| page.records.get(at));
            page.next = last.map(|last| {
                (
                    last.info.address.user.clone(),
                    last.info.address.name.clone(),
                )
            });
            break;
        }
        room -= length;
        user_keys.push(user_key);
    }
    proto::ListUserKeysResponse {
        user_keys,
        next_page_token: encode(page.next.as_ref()),
    }
}

fn encode(next: Option<&(UserId, KeyName)>) -> String {
    next.map_or_else(String::new, |(user, name)| {
        let text = format!("{VERSION}{}{SEPARATOR}{}", user.as_str(), name.as_str());
        Base64UrlUnpadded::encode_string(text.as_bytes())
    })
}

pub(super) fn decode(token: &str) -> Result<Option<(UserId, KeyName)>, Error> {
    if token.is_empty() {
        return Ok(None);
    }
    let parse = || {
        if token.len() > TOKEN_BYTES_MAX {
            return None;
        }
        let bytes = Base64UrlUnpadded::decode_vec(token).ok()?;
        let text = String::from_utf8(bytes).ok()?;
        let (user, name) = text.strip_prefix(VERSION)?.split_once(SEPARATOR)?;
        Some((UserId::parse(user).ok()?, KeyName::parse(name).ok()?))
    };
    parse()
        .map(Some)
        .ok_or_else(|| Error::violation("page_token", "empty, or from the previous response"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_comes_back_as_it_went() {
        let last = (
            UserId::parse("Zoë 🔑").unwrap(),
            KeyName::parse("vault").unwrap(),
        );
        assert_eq!(decode(&encode(Some(&last))).unwrap(), Some(last));
        assert_eq!(decode(&encode(None)).unwrap(), None);
    }

    #[test]
    fn other_tokens_are_refused() {
        let other_version = Base64UrlUnpadded::encode_string("2a\u{1f}b".as_bytes());
        let no_name = Base64UrlUnpadded::encode_string("1a".as_bytes());
        for bad in ["!", "YQ", &other_version, &no_name, &"A".repeat(1_025)] {
            assert!(decode(bad).is_err(), "{bad}");
        }
    }
}
