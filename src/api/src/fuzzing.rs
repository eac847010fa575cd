//! Readers of this crate for the fuzz targets of `tests/fuzz-targets`. No program uses them.

use std::convert::Infallible;

use axum::body::Body;
use futures_util::stream;
use http::{HeaderMap, HeaderValue, header};

use keybroker_core::secret::KeyMaterial;

use super::{
    rest::body,
    rpc::{clients, page},
};

/// Reads the key out of a request of the REST API whose body arrives in these pieces.
pub async fn rest_body(content_type: &[u8], pieces: Vec<Vec<u8>>) -> Option<KeyMaterial> {
    let mut headers = HeaderMap::new();
    let value = HeaderValue::from_bytes(content_type).ok()?;
    headers.insert(header::CONTENT_TYPE, value);
    let pieces = stream::iter(pieces.into_iter().map(Ok::<_, Infallible>));
    body::key(&headers, Body::from_stream(pieces)).await.ok()
}

/// Reads a page token of user keys, and writes it again.
pub fn page_token_of_user_keys(token: &str) -> Option<String> {
    let position = page::decode(token).ok()?;
    // No token and the beginning of the list are one position.
    Some(page::encode((!token.is_empty()).then_some(&position)))
}

/// Reads a page token of API clients, and writes it again.
pub fn page_token_of_clients(token: &str) -> Option<String> {
    let position = clients::position(token).ok()?;
    Some(clients::token((!token.is_empty()).then_some(&position)))
}
