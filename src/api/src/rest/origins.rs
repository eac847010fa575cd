//! CORS: only pages of the configured origins may send requests; origins are compared as strings.
//! CORS does not protect the keys: every request for a key requires an access token. CORS prevents
//! pages of other origins from sending requests in the browser of a user who has an access token.

use std::time::Duration;

use axum::http::{HeaderName, HeaderValue, Method, header, uri::Uri};
use tower_http::cors::CorsLayer;

/// Time for which a browser may cache the answer to a preflight request.
const PREFLIGHT_KEPT: Duration = Duration::from_hours(1);

/// The request headers that Bitwarden's TypeScript clients and clients with Bitwarden's SDK send.
const REQUEST_HEADERS: [HeaderName; 12] = [
    header::AUTHORIZATION,
    header::CONTENT_TYPE,
    header::ACCEPT,
    header::CACHE_CONTROL,
    header::PRAGMA,
    header::USER_AGENT,
    HeaderName::from_static("device-type"),
    HeaderName::from_static("device-identifier"),
    HeaderName::from_static("bitwarden-client-name"),
    HeaderName::from_static("bitwarden-client-version"),
    HeaderName::from_static("bitwarden-package-type"),
    HeaderName::from_static("is-prerelease"),
];

/// Returns a layer that answers preflight requests and adds CORS headers, or `None` if no origin is configured.
pub(super) fn layer(allowed: &[String]) -> Option<CorsLayer> {
    let origins: Vec<HeaderValue> = allowed
        .iter()
        .filter_map(|origin| HeaderValue::from_str(origin).ok())
        .collect();
    if origins.is_empty() {
        return None;
    }
    let layer = CorsLayer::new()
        .allow_origin(origins)
        .allow_methods([Method::GET, Method::POST, Method::PUT])
        .allow_headers(REQUEST_HEADERS)
        .expose_headers([header::RETRY_AFTER])
        .max_age(PREFLIGHT_KEPT);
    Some(layer)
}

/// The origin that Safari sends for pages of its extensions.
const FILES: &str = "file://";

/// Returns whether a browser or an app could send this value in the header `origin`. Each app may
/// use its own URL scheme, such as `bw-desktop-file`.
pub(super) fn is_origin(text: &str) -> bool {
    if text == FILES {
        return true;
    }
    let Some((scheme, rest)) = text.split_once("://") else {
        return false;
    };
    let is_scheme = scheme.starts_with(|c: char| c.is_ascii_lowercase())
        && scheme.bytes().all(|b| {
            b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'+' | b'-' | b'.')
        });
    let is_lower = rest
        .bytes()
        .all(|b| b.is_ascii_graphic() && !b.is_ascii_uppercase());
    // The scheme is replaced by `https`, because the URI type supports few schemes.
    let parsed = format!("https://{rest}").parse::<Uri>().ok();
    let authority = parsed.as_ref().and_then(Uri::authority);
    is_scheme
        && is_lower
        && !rest.contains(['*', '@'])
        && authority.is_some_and(|authority| {
            let has_good_port = authority.host() == rest || authority.port_u16().is_some();
            authority.as_str() == rest && has_good_port
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_origin_is_scheme_host_and_port() {
        for good in [
            "https://vault.example.org",
            "https://vault.example.org:8443",
            "http://localhost:8080",
            "https://[::1]:8443",
            "chrome-extension://nngceckbapebfimnlniiiahkandclblb",
            "bw-desktop-file://bundle",
            "file://",
        ] {
            assert!(is_origin(good), "{good}");
        }
        for bad in [
            "",
            "*",
            "null",
            "vault.example.org",
            "https://",
            "https://*.example.org",
            "https://vault.example.org/",
            "https://vault.example.org/x",
            "https://vault.example.org?x",
            "https://Vault.example.org",
            "https://ada@vault.example.org",
            "https://vault.example.org:x",
            "https://vault.example .org",
            "HTTPS://vault.example.org",
            "FILE://",
            "file:///",
            "file:///home/ada/page.html",
            "bw-desktop-file://",
        ] {
            assert!(!is_origin(bad), "{bad}");
        }
    }
}
