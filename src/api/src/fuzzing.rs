//! Gives the fuzz targets in `tests/fuzz-targets` access to parsers of this crate. Only the fuzz
//! targets use this module.

use std::convert::Infallible;

use axum::body::Body;
use futures_util::stream;
use http::{HeaderMap, HeaderValue, header};

use keybroker_core::secret::KeyMaterial;

use super::{
    rest::body,
    rpc::{clients, page},
};

/// Parses a request of the REST API and returns its user key. The body of the request arrives in
/// `pieces`.
pub async fn rest_body(content_type: &[u8], pieces: Vec<Vec<u8>>) -> Option<KeyMaterial> {
    let mut headers = HeaderMap::new();
    let value = HeaderValue::from_bytes(content_type).ok()?;
    headers.insert(header::CONTENT_TYPE, value);
    let pieces = stream::iter(pieces.into_iter().map(Ok::<_, Infallible>));
    body::key(&headers, Body::from_stream(pieces)).await.ok()
}

/// Decodes a page token for user keys, and encodes it again.
pub fn page_token_of_user_keys(token: &str) -> Option<String> {
    let position = page::decode(token).ok()?;
    // An empty page token means the beginning of the list.
    Some(page::encode((!token.is_empty()).then_some(&position)))
}

/// Decodes a page token for API clients, and encodes it again.
pub fn page_token_of_clients(token: &str) -> Option<String> {
    let position = clients::position(token).ok()?;
    Some(clients::token((!token.is_empty()).then_some(&position)))
}
