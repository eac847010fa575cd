//! Parses the body of POST and PUT, which is a small JSON object with one key of 32 bytes.

use std::time::Duration;

use axum::{
    body::Body,
    http::{HeaderMap, StatusCode, header},
};
use base64ct::{Base64, Base64Unpadded, Encoding as _};
use http_body_util::BodyExt as _;
use serde::Deserialize;
use zeroize::{Zeroize as _, Zeroizing};

use keybroker_core::{
    error::{Error, Reason},
    secret::KeyMaterial,
};

use crate::discard::discard;

/// Length of a user key in the Key Connector interface, in bytes.
pub(super) const KEY_BYTES: usize = 32;
/// Longest accepted body of a request, in bytes. The body that Bitwarden clients send is about 60
/// bytes long.
const BODY_BYTES_MAX: usize = 4 * 1_024;
/// Longest time for receiving a body.
const BODY_TIMEOUT: Duration = Duration::from_secs(10);
/// Largest part of a refused body that is discarded, in bytes.
const DISCARDED_BYTES_MAX: usize = 2 * 1_024 * 1_024;

/// The reason why a body is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Malformed {
    /// The content type is not JSON.
    ContentType,
    /// The body is too long.
    TooLarge,
    /// The body did not arrive in time.
    Slow,
    /// The body is incomplete.
    Broken,
    /// The body is not a JSON object with a `key`.
    Json,
    /// The key is not base64.
    Base64,
    /// The key has the wrong length.
    Length,
}

impl Malformed {
    pub(super) fn status(self) -> StatusCode {
        match self {
            Self::ContentType => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            Self::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            Self::Slow => StatusCode::REQUEST_TIMEOUT,
            Self::Broken | Self::Json | Self::Base64 | Self::Length => StatusCode::BAD_REQUEST,
        }
    }

    pub(super) fn error(self) -> Error {
        match self {
            Self::ContentType => Error::violation("content-type", "application/json, in UTF-8"),
            Self::TooLarge => Error::violation("body", "at most 4 KiB"),
            Self::Slow => Error::new(Reason::Deadline, "the body did not arrive in time"),
            Self::Broken => Error::violation("body", "complete"),
            Self::Json => Error::violation("body", "a JSON object whose `key` is a string"),
            Self::Base64 => Error::violation("key", "standard base64, with padding"),
            Self::Length => Error::violation("key", "32 bytes in standard base64 (44 characters)"),
        }
    }
}

/// Reads the user key from the body of a request. At most `BODY_BYTES_MAX` bytes of the body are
/// kept in memory.
pub(crate) async fn key(headers: &HeaderMap, mut body: Body) -> Result<KeyMaterial, Malformed> {
    let text = text(headers, &mut body).await;
    if let Err(Malformed::ContentType | Malformed::TooLarge) = text {
        // If the broker closes a connection before it has read all bytes, the client may not
        // receive the answer.
        discard(&mut body, DISCARDED_BYTES_MAX).await;
    }
    parse(&text?)
}

async fn text(headers: &HeaderMap, body: &mut Body) -> Result<Zeroizing<Vec<u8>>, Malformed> {
    if !is_json(headers) {
        return Err(Malformed::ContentType);
    }
    if let Some(length) = headers.get(header::CONTENT_LENGTH) {
        let length = length.to_str().ok().and_then(|text| text.parse().ok());
        if length.is_none_or(|length: usize| length > BODY_BYTES_MAX) {
            return Err(Malformed::TooLarge);
        }
    }
    read_within(BODY_TIMEOUT, body).await
}

async fn read_within(timeout: Duration, body: &mut Body) -> Result<Zeroizing<Vec<u8>>, Malformed> {
    let read = tokio::time::timeout(timeout, read(body)).await;
    read.unwrap_or(Err(Malformed::Slow))
}

async fn read(body: &mut Body) -> Result<Zeroizing<Vec<u8>>, Malformed> {
    // The full capacity is allocated first, because a growing vector leaves copies that are not overwritten.
    let mut text = Zeroizing::new(Vec::with_capacity(BODY_BYTES_MAX));
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame.map_err(|_| Malformed::Broken)?.into_data() else {
            continue;
        };
        if text.len() + data.len() > BODY_BYTES_MAX {
            return Err(Malformed::TooLarge);
        }
        text.extend_from_slice(&data);
    }
    Ok(text)
}

#[derive(Deserialize)]
struct Fields {
    #[serde(alias = "Key")]
    key: String,
}

fn parse(text: &[u8]) -> Result<KeyMaterial, Malformed> {
    let fields: Fields = serde_json::from_slice(text).map_err(|_| Malformed::Json)?;
    let encoded = Zeroizing::new(fields.key);
    // Bitwarden clients always send padding, but accept a key without padding. Therefore this parser accepts a key
    // with or without padding.
    let decoded = Base64::decode_vec(&encoded).or_else(|_| Base64Unpadded::decode_vec(&encoded));
    let mut key = decoded.map_err(|_| Malformed::Base64)?;
    if key.len() != KEY_BYTES {
        key.zeroize();
        return Err(Malformed::Length);
    }
    KeyMaterial::new(key).map_err(|_| Malformed::Length)
}

/// Whether the headers contain exactly one content type, which is `application/json` in UTF-8. Parameters other than
/// `charset` are ignored.
fn is_json(headers: &HeaderMap) -> bool {
    let mut values = headers.get_all(header::CONTENT_TYPE).iter();
    let (Some(value), None) = (values.next(), values.next()) else {
        return false;
    };
    let Ok(value) = value.to_str() else {
        return false;
    };
    let mut parts = value.split(';').map(str::trim);
    let is_json = parts
        .next()
        .is_some_and(|name| name.eq_ignore_ascii_case("application/json"));
    is_json
        && parts.all(|parameter| {
            parameter.split_once('=').is_none_or(|(name, value)| {
                !name.trim().eq_ignore_ascii_case("charset")
                    || value.trim().trim_matches('"').eq_ignore_ascii_case("utf-8")
            })
        })
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;
    use proptest::prelude::*;

    use super::*;

    fn headers(content_type: &[&str]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for value in content_type {
            let value = HeaderValue::from_str(value).unwrap();
            headers.append(header::CONTENT_TYPE, value);
        }
        headers
    }

    #[test]
    fn content_types() {
        for good in [
            "application/json",
            "application/json; charset=utf-8",
            "Application/JSON;charset=\"UTF-8\"",
            "application/json; odata=verbose",
        ] {
            assert!(is_json(&headers(&[good])), "{good}");
        }
        for bad in [
            &[][..],
            &[""],
            &["text/plain"],
            &["application/json-patch"],
            &["application/jsonx; charset=utf-8"],
            &["application/json; charset=latin1"],
            &["application/x-www-form-urlencoded"],
            &["application/json", "application/json"],
        ] {
            assert!(!is_json(&headers(bad)), "{bad:?}");
        }
    }

    #[test]
    fn keys_in_every_form_that_clients_write() {
        let expected: Vec<u8> = (0..32).map(|byte| byte ^ 0xf8).collect();
        let padded = Base64::encode_string(&expected);
        let unpadded = padded.trim_end_matches('=');
        let escaped = padded.replace('+', "\\u002b").replace('/', "\\/");
        assert!(escaped.len() > padded.len());
        for text in [
            format!(r#"{{"key":"{padded}"}}"#),
            format!(r#"{{"Key":"{padded}"}}"#),
            format!(r#"{{"key":"{unpadded}"}}"#),
            format!(r#"{{"key":"{escaped}"}}"#),
            format!(r#" {{ "other": [1, {{}}], "key" : "{padded}" }} "#),
        ] {
            let key = parse(text.as_bytes());
            assert_eq!(key.unwrap().expose(), expected, "{text}");
        }
    }

    #[test]
    fn bodies_that_are_none() {
        let key = |bytes: usize| Base64::encode_string(&vec![7; bytes]);
        let whole = key(32);
        for (text, expected) in [
            (String::new(), Malformed::Json),
            ("key".to_owned(), Malformed::Json),
            ("null".to_owned(), Malformed::Json),
            ("{}".to_owned(), Malformed::Json),
            (r#"{"KEY":""}"#.to_owned(), Malformed::Json),
            (r#"{"key":null}"#.to_owned(), Malformed::Json),
            (r#"{"key":[7]}"#.to_owned(), Malformed::Json),
            (format!(r#"{{"key":"{whole}"}}x"#), Malformed::Json),
            (
                format!(r#"{{"key":"{whole}","Key":"{whole}"}}"#),
                Malformed::Json,
            ),
            (format!(r#"{{"key":"{whole} "}}"#), Malformed::Base64),
            (
                format!(r#"{{"key":"{}"}}"#, whole.replace('B', "_")),
                Malformed::Base64,
            ),
            (r#"{"key":"AAB"}"#.to_owned(), Malformed::Base64),
            (r#"{"key":"a secret"}"#.to_owned(), Malformed::Base64),
            (r#"{"key":""}"#.to_owned(), Malformed::Length),
            (format!(r#"{{"key":"{}"}}"#, key(31)), Malformed::Length),
            (format!(r#"{{"key":"{}"}}"#, key(33)), Malformed::Length),
            (format!(r#"{{"key":"{}"}}"#, key(64)), Malformed::Length),
        ] {
            assert_eq!(parse(text.as_bytes()).unwrap_err(), expected, "{text}");
        }
    }

    #[tokio::test]
    async fn no_more_is_read_than_is_permitted() {
        let json = headers(&["application/json"]);
        let endless =
            futures_util::stream::repeat_with(|| Ok::<_, std::io::Error>("x".repeat(999)));
        let read = key(&json, Body::from_stream(endless)).await;
        assert_eq!(read.unwrap_err(), Malformed::TooLarge);
        let mut announced = json.clone();
        announced.insert(header::CONTENT_LENGTH, HeaderValue::from_static("4097"));
        let never = futures_util::stream::pending::<Result<String, std::io::Error>>();
        let read = key(&announced, Body::from_stream(never)).await;
        assert_eq!(read.unwrap_err(), Malformed::TooLarge);
    }

    #[tokio::test]
    async fn a_body_that_never_comes_is_given_up() {
        let never = futures_util::stream::pending::<Result<String, std::io::Error>>();
        let timeout = Duration::from_millis(20);
        let read = read_within(timeout, &mut Body::from_stream(never)).await;
        assert_eq!(read.unwrap_err(), Malformed::Slow);
        let broken = futures_util::stream::iter([Err::<String, _>(std::io::Error::other("cut"))]);
        let read = read_within(BODY_TIMEOUT, &mut Body::from_stream(broken)).await;
        assert_eq!(read.unwrap_err(), Malformed::Broken);
    }

    proptest! {
        #[test]
        fn no_body_panics(bytes in prop::collection::vec(any::<u8>(), 0..200), text in "\\PC{0,80}") {
            prop_assert!(parse(&bytes).is_err());
            let text = format!(r#"{{"key":"{text}"}}"#);
            prop_assert!(parse(text.as_bytes()).is_err());
        }
    }
}
