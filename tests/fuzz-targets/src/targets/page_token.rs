//! Page tokens, of user keys and of API clients.

use base64ct::{Base64UrlUnpadded, Encoding as _};

use keybroker_api::fuzzing;

pub(crate) const WORDS: &[&str] = &["MQ", "Mg", "MWE", "H2I", "A", "_", "-", "=", "Hw"];

/// Longest token, in bytes.
const TOKEN_BYTES_MAX: usize = 1_024;

/// Reads a page token.
///
/// # Panics
/// If what an accepted one means is not what it means once it was written and read again, or it is one of both lists.
pub fn page_token(bytes: &[u8]) -> bool {
    let Ok(token) = str::from_utf8(bytes) else {
        return false;
    };
    let [user_keys, clients] = [
        fuzzing::page_token_of_user_keys,
        fuzzing::page_token_of_clients,
    ]
    .map(|read| {
        let again = read(token)?;
        assert!(token.len() <= TOKEN_BYTES_MAX);
        assert_eq!(read(&again).as_ref(), Some(&again));
        Some(again)
    });
    assert!(token.is_empty() || user_keys.is_none() || clients.is_none());
    user_keys.is_some() || clients.is_some()
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let mut seeds: Vec<Vec<u8>> = ["1ada\u{1f}vault", "27\u{1f}Zoë\u{1f}vault", "2100000\u{1f}"]
        .map(|text| Base64UrlUnpadded::encode_string(text.as_bytes()).into_bytes())
        .to_vec();
    seeds.push(Vec::new());
    seeds
}
