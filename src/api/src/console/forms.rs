//! Reads forms, and refuses those that did not come from this page.
//!
//! Mitigation: M30 of `THREAT_MODEL.md`.

use std::time::Duration;

use axum::{
    body::Body,
    http::{HeaderMap, StatusCode, header},
};
use http_body_util::BodyExt as _;

use crate::discard::discard;

use super::{answer::Failure, sessions::Session};

/// Longest accepted form, in bytes.
const FORM_BYTES_MAX: usize = 8 * 1_024;
/// Longest time for receiving a form.
const FORM_TIMEOUT: Duration = Duration::from_secs(10);
/// Largest part of a refused form that is discarded, in bytes.
const DISCARDED_BYTES_MAX: usize = 1_024 * 1_024;

/// The fields of a form or of a query.
#[derive(Debug)]
pub(super) struct Fields(Vec<(String, String)>);

impl Fields {
    pub(super) fn parse(text: &[u8]) -> Self {
        Self(form_urlencoded::parse(text).into_owned().collect())
    }

    /// The value of a field; empty if the field is absent or repeated.
    pub(super) fn value(&self, name: &str) -> &str {
        let mut values = self.0.iter().filter(|(one, _)| one == name);
        match (values.next(), values.next()) {
            (Some((_, value)), None) => value,
            _ => "",
        }
    }

    /// Refuses a form without the token of its purpose and of this session.
    pub(super) fn check_token(&self, session: &Session, purpose: &str) -> Result<(), Box<Failure>> {
        if session.is_token(purpose, self.value("token")) {
            return Ok(());
        }
        Err(Failure::new(
            StatusCode::FORBIDDEN,
            "The form is not valid",
            "The form does not belong to your session, for example because you signed in again. Nothing was changed. Open \
             the page again, and repeat the input.",
        ))
    }
}

/// Refuses a form of another site. Browsers send `origin` with every form, and scripts of other sites cannot change it.
pub(super) fn check_origin(headers: &HeaderMap, origin: &str) -> Result<(), Box<Failure>> {
    let mut origins = headers.get_all(header::ORIGIN).iter();
    let is_ours = matches!((origins.next(), origins.next()), (Some(one), None) if one == origin);
    let site = headers.get("sec-fetch-site");
    if is_ours && site.is_none_or(|site| site == "same-origin") {
        return Ok(());
    }
    Err(Failure::new(
        StatusCode::FORBIDDEN,
        "The form is from another site",
        "This page accepts only its own forms. Nothing was changed. If you see this text often, ask the operator to check \
         that `external_url` in the configuration is the address that your browser shows.",
    ))
}

/// Reads the body of a form.
pub(super) async fn read(headers: &HeaderMap, mut body: Body) -> Result<Fields, Box<Failure>> {
    let read = if is_form(headers) {
        tokio::time::timeout(FORM_TIMEOUT, text(&mut body)).await
    } else {
        Ok(Err(StatusCode::UNSUPPORTED_MEDIA_TYPE))
    };
    let status = match read {
        Ok(Ok(text)) => return Ok(Fields::parse(&text)),
        Ok(Err(status)) => status,
        Err(_) => StatusCode::REQUEST_TIMEOUT,
    };
    // If the broker answered before it has read the body, the browser might not show the answer.
    discard(&mut body, DISCARDED_BYTES_MAX).await;
    let text = "The page did not receive a complete form of at most 8 KiB. Nothing was changed.";
    Err(Failure::new(status, "The form is not valid", text))
}

async fn text(body: &mut Body) -> Result<Vec<u8>, StatusCode> {
    let mut text = Vec::new();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|_| StatusCode::BAD_REQUEST)?;
        let Ok(data) = frame.into_data() else {
            continue;
        };
        if text.len() + data.len() > FORM_BYTES_MAX {
            return Err(StatusCode::PAYLOAD_TOO_LARGE);
        }
        text.extend_from_slice(&data);
    }
    Ok(text)
}

fn is_form(headers: &HeaderMap) -> bool {
    let mut values = headers.get_all(header::CONTENT_TYPE).iter();
    let (Some(value), None) = (values.next(), values.next()) else {
        return false;
    };
    let kind = value.to_str().unwrap_or("").split(';').next().unwrap_or("");
    kind.trim()
        .eq_ignore_ascii_case("application/x-www-form-urlencoded")
}

#[cfg(test)]
mod tests {
    use super::*;

    const ORIGIN: &str = "https://approvers.example.org";

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(*name, value.parse().unwrap());
        }
        headers
    }

    #[test]
    fn only_forms_of_this_origin_are_accepted() {
        for (pairs, is_ours) in [
            (&[("origin", ORIGIN)][..], true),
            (
                &[("origin", ORIGIN), ("sec-fetch-site", "same-origin")],
                true,
            ),
            (
                &[("origin", ORIGIN), ("sec-fetch-site", "same-site")],
                false,
            ),
            (
                &[("origin", ORIGIN), ("sec-fetch-site", "cross-site")],
                false,
            ),
            (&[("origin", ORIGIN), ("origin", ORIGIN)], false),
            (&[("origin", "https://example.org")], false),
            (&[("origin", "https://approvers.example.org:8443")], false),
            (&[("origin", "http://approvers.example.org")], false),
            (&[("origin", "null")], false),
            (&[], false),
        ] {
            let checked = check_origin(&headers(pairs), ORIGIN);
            assert_eq!(checked.is_ok(), is_ours, "{pairs:?}");
        }
    }

    #[test]
    fn a_repeated_field_has_no_value() {
        let fields = Fields::parse(b"a=1&b=2&b=3&c=%3Cb%3E+x&=4");
        assert_eq!(fields.value("a"), "1");
        assert_eq!(fields.value("b"), "");
        assert_eq!(fields.value("c"), "<b> x");
        assert_eq!(fields.value("d"), "");
    }

    #[tokio::test]
    async fn a_form_has_a_type_and_a_limit() {
        let form = headers(&[(
            "content-type",
            "application/x-www-form-urlencoded; charset=utf-8",
        )]);
        let fields = read(&form, Body::from("a=1")).await.unwrap();
        assert_eq!(fields.value("a"), "1");
        let long = "x".repeat(FORM_BYTES_MAX + 1);
        for (headers, body, status) in [
            (form.clone(), long.as_str(), StatusCode::PAYLOAD_TOO_LARGE),
            (headers(&[]), "a=1", StatusCode::UNSUPPORTED_MEDIA_TYPE),
            (
                headers(&[("content-type", "text/plain")]),
                "a=1",
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
            ),
        ] {
            let refused = read(&headers, Body::from(body.to_owned()))
                .await
                .unwrap_err();
            assert_eq!(refused.status(), status);
        }
    }
}
