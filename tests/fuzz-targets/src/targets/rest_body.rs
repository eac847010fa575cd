//! Bodies of the REST API. An input is the content type, a line end, and the body; the body arrives in pieces of 7 bytes.

use std::sync::LazyLock;

use base64ct::{Base64, Encoding as _};
use serde_json::Value;
use tokio::runtime::{Builder, Runtime};

use keybroker_api::fuzzing;

pub(crate) const WORDS: &[&str] = &[
    "\"key\"",
    "\"Key\"",
    "\"",
    ":",
    ",",
    "{",
    "}",
    "[",
    "]",
    "null",
    "\\u0041",
    "\\/",
    "=",
    "application/json",
    "; charset=utf-8",
    "; charset=utf-16",
    " ",
    "\n",
];

const PIECE: usize = 7;
const KEY_BYTES: usize = 32;

static RUNTIME: LazyLock<Runtime> =
    LazyLock::new(|| Builder::new_current_thread().enable_time().build().unwrap());

/// Reads the key out of a request.
///
/// # Panics
/// If an accepted key is not the one in the body.
pub fn rest_body(input: &[u8]) -> bool {
    let Some(end) = input.iter().position(|byte| *byte == b'\n') else {
        return false;
    };
    let (content_type, body) = (&input[..end], &input[end + 1..]);
    let pieces = body.chunks(PIECE).map(<[u8]>::to_vec).collect();
    let Some(key) = RUNTIME.block_on(fuzzing::rest_body(content_type, pieces)) else {
        return false;
    };
    // The API does not look into members that it ignores, which may hold bytes that are not UTF-8.
    let json: Value = serde_json::from_str(&String::from_utf8_lossy(body)).unwrap();
    let texts = ["key", "Key"].map(|name| json.get(name).and_then(Value::as_str));
    let ([Some(text), None] | [None, Some(text)]) = texts else {
        panic!("accepted with {texts:?}");
    };
    assert_eq!(key.expose().len(), KEY_BYTES);
    assert_eq!(
        Base64::encode_string(key.expose()).trim_end_matches('='),
        text.trim_end_matches('=')
    );
    // Blanks around the value of a header are not part of it (RFC 9110, section 5.5).
    assert!(
        content_type
            .trim_ascii_start()
            .to_ascii_lowercase()
            .starts_with(b"application/json")
    );
    true
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let key = Base64::encode_string(&[0xf8; KEY_BYTES]);
    [
        format!("application/json\n{{\"key\":\"{key}\"}}"),
        format!("Application/JSON; charset=utf-8\n{{ \"Key\" : \"{key}\", \"other\": [1, {{}}] }}"),
        format!(
            "application/json\n{{\"key\":\"{}\"}}",
            key.trim_end_matches('=')
        ),
    ]
    .map(String::into_bytes)
    .to_vec()
}
