//! Pages of records and their page tokens. Page tokens are opaque to clients, and are checked like any other input.

use base64ct::{Base64UrlUnpadded, Encoding as _};

use keybroker_broker::{DamagedRecord, ListPage, PageRow, Position, SKIPPED_MAX};
use keybroker_core::{
    error::Error,
    key::{KeyName, UserId},
};
use keybroker_proto as proto;
use prost::Message;

use super::convert;

/// Longest page token, in bytes.
pub(super) const TOKEN_BYTES_MAX: usize = 1_024;
/// Version of page tokens that contain only the key of the last row on the page.
const VERSION: char = '1';
/// Version of page tokens that contain a key and a number of rows. The next page skips this number
/// of rows, whose keys are not readable.
const VERSION_WITH_SKIP: char = '2';
/// A separator that cannot occur in a user id, because user ids contain no control characters.
const SEPARATOR: char = '\u{1f}';

/// Bytes before each field: one for the tag, and at most three for a length within a message.
const OVERHEAD: usize = 4;

/// The rows of one page that fit into a message, and the position of the next page.
pub(super) struct Filled<M, D, K> {
    pub(super) rows: Vec<M>,
    pub(super) damaged: Vec<D>,
    pub(super) next: Option<Position<K>>,
}

/// Converts as many rows as fit into a message. The next page begins after the last converted row.
/// The longest row is much shorter than a message, so every page has at least one row.
pub(super) fn fill<V, W, K, M: Message, D: Message>(
    rows: Vec<PageRow<V, W, K>>,
    next: Option<Position<K>>,
    bytes_max: usize,
    good: impl Fn(&V) -> M,
    bad: impl Fn(&W) -> D,
) -> Filled<M, D, K> {
    let mut room = bytes_max - TOKEN_BYTES_MAX - OVERHEAD;
    let mut filled = Filled {
        rows: Vec::new(),
        damaged: Vec::new(),
        next,
    };
    let mut last = None;
    for row in rows {
        let content = row.content.as_ref().map(&good).map_err(&bad);
        let length = match &content {
            Ok(message) => message.encoded_len(),
            Err(message) => message.encoded_len(),
        };
        if length + OVERHEAD > room {
            filled.next = last;
            break;
        }
        room -= length + OVERHEAD;
        last = Some(row.end);
        match content {
            Ok(message) => filled.rows.push(message),
            Err(message) => filled.damaged.push(message),
        }
    }
    filled
}

/// The message for a page of records.
pub(super) fn message(page: ListPage, bytes_max: usize) -> proto::ListUserKeysResponse {
    let filled = fill(
        page.rows,
        page.next,
        bytes_max,
        convert::user_key_view,
        damaged,
    );
    proto::ListUserKeysResponse {
        user_keys: filled.rows,
        damaged: filled.damaged,
        next_page_token: encode(filled.next.as_ref()),
    }
}

fn damaged(record: &DamagedRecord) -> proto::DamagedUserKey {
    proto::DamagedUserKey {
        user: record
            .user
            .as_ref()
            .map(ToString::to_string)
            .unwrap_or_default(),
        key_name: record
            .name
            .as_ref()
            .map(ToString::to_string)
            .unwrap_or_default(),
        record_id: record
            .id
            .map(|id| id.as_bytes().to_vec())
            .unwrap_or_default(),
        problem: record.damage.as_str().to_owned(),
    }
}

pub(crate) fn encode(next: Option<&Position<(UserId, KeyName)>>) -> String {
    let Some(next) = next else {
        return String::new();
    };
    let key = next
        .after
        .as_ref()
        .map_or_else(String::new, |(user, name)| {
            format!("{}{SEPARATOR}{}", user.as_str(), name.as_str())
        });
    let text = match next.skip {
        0 => format!("{VERSION}{key}"),
        skip => format!("{VERSION_WITH_SKIP}{skip}{SEPARATOR}{key}"),
    };
    Base64UrlUnpadded::encode_string(text.as_bytes())
}

pub(crate) fn decode(token: &str) -> Result<Position<(UserId, KeyName)>, Error> {
    if token.is_empty() {
        return Ok(Position::default());
    }
    let parse = || {
        if token.len() > TOKEN_BYTES_MAX {
            return None;
        }
        let bytes = Base64UrlUnpadded::decode_vec(token).ok()?;
        let text = String::from_utf8(bytes).ok()?;
        if let Some(key) = text.strip_prefix(VERSION) {
            return Some(Some(key_of(key)?).into());
        }
        let (skip, key) = text
            .strip_prefix(VERSION_WITH_SKIP)?
            .split_once(SEPARATOR)?;
        let after = if key.is_empty() {
            None
        } else {
            Some(key_of(key)?)
        };
        let skip = skip.parse().ok();
        let skip = skip.filter(|skip| (1..=SKIPPED_MAX).contains(skip))?;
        Some(Position { after, skip })
    };
    parse().ok_or_else(|| {
        Error::violation(
            "page_token",
            "empty or the `next_page_token` of the previous response",
        )
    })
}

fn key_of(text: &str) -> Option<(UserId, KeyName)> {
    let (user, name) = text.split_once(SEPARATOR)?;
    Some((UserId::parse(user).ok()?, KeyName::parse(name).ok()?))
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
        for position in [
            Some(last.clone()).into(),
            Position {
                after: Some(last),
                skip: 7,
            },
            Position {
                after: None,
                skip: SKIPPED_MAX,
            },
        ] {
            assert_eq!(decode(&encode(Some(&position))).unwrap(), position);
        }
        assert_eq!(decode(&encode(None)).unwrap(), Position::default());
    }

    #[test]
    fn other_tokens_are_refused() {
        let other_version = Base64UrlUnpadded::encode_string("2a\u{1f}b".as_bytes());
        let no_name = Base64UrlUnpadded::encode_string("1a".as_bytes());
        let skips_all = Base64UrlUnpadded::encode_string("2100001\u{1f}".as_bytes());
        let skips_none = ["20\u{1f}", "20\u{1f}ada\u{1f}vault"]
            .map(|text| Base64UrlUnpadded::encode_string(text.as_bytes()));
        for bad in [
            &skips_none[0],
            &skips_none[1],
            "!",
            "YQ",
            &other_version,
            &no_name,
            &skips_all,
            &"A".repeat(1_025),
        ] {
            assert!(decode(bad).is_err(), "{bad}");
        }
    }
}
