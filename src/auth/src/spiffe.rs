//! SPIFFE ids: `spiffe://<trust domain>/<path>` (SPIFFE-ID and X509-SVID standards).
//!
//! SPIFFE ids are compared bytewise, so an id must have exactly one spelling. An id is refused if
//! other software might treat it as equal to an id with another spelling.
//!
//! Mitigation: M2 of `THREAT_MODEL.md`.

/// Longest trust domain, in bytes.
const TRUST_DOMAIN_BYTES_MAX: usize = 255;
/// Longest id, in bytes.
const ID_BYTES_MAX: usize = 2_048;
const SCHEME: &str = "spiffe://";

/// The reason why a string is not a valid SPIFFE id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IdError {
    /// The id is too long.
    #[error("the id has more than {ID_BYTES_MAX} bytes")]
    Length,
    /// The scheme is not `spiffe`, or contains capital letters.
    #[error("the id does not begin with {SCHEME:?}, in lower case")]
    Scheme,
    /// The id identifies a trust domain and not a workload.
    #[error("the id has no path, so it identifies a trust domain and not a workload")]
    NoPath,
    /// A segment of the path is empty.
    #[error("the id has an empty path, a double slash or a slash at its end")]
    EmptySegment,
    /// A segment of the path is `.` or `..`, which refers to another segment.
    #[error("the path of the id contains `.` or `..`")]
    DotSegment,
    /// The path contains a character that is not allowed.
    #[error("the path of the id contains characters other than [a-zA-Z0-9._-] and /")]
    PathCharacter,
    /// The trust domain is not valid.
    #[error("the trust domain must be 1 to {TRUST_DOMAIN_BYTES_MAX} bytes of [a-z0-9._-]")]
    TrustDomain,
}

/// Whether a URI has the scheme of SPIFFE ids, even if the URI is not a valid SPIFFE id.
pub fn is_claimed(uri: &str) -> bool {
    let scheme = uri.split_once(':').map(|(scheme, _)| scheme);
    scheme.is_some_and(|scheme| scheme.eq_ignore_ascii_case("spiffe"))
}

/// Returns the trust domain of a workload's id.
pub fn trust_domain(id: &str) -> Result<&str, IdError> {
    if id.len() > ID_BYTES_MAX {
        return Err(IdError::Length);
    }
    let Some(rest) = id.strip_prefix(SCHEME) else {
        return Err(IdError::Scheme);
    };
    let Some((domain, path)) = rest.split_once('/') else {
        return Err(IdError::NoPath);
    };
    check_trust_domain(domain)?;
    for segment in path.split('/') {
        if segment.is_empty() {
            return Err(IdError::EmptySegment);
        }
        if matches!(segment, "." | "..") {
            return Err(IdError::DotSegment);
        }
        if !segment
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte))
        {
            return Err(IdError::PathCharacter);
        }
    }
    Ok(domain)
}

/// Checks a trust domain. A trust domain must not contain a port, a user or capital letters.
pub fn check_trust_domain(domain: &str) -> Result<(), IdError> {
    let is_good = (1..=TRUST_DOMAIN_BYTES_MAX).contains(&domain.len())
        && domain
            .bytes()
            .all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'_' | b'-'));
    if is_good {
        Ok(())
    } else {
        Err(IdError::TrustDomain)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_have_one_way_to_be_written() {
        for (id, domain) in [
            ("spiffe://example.org/vault", "example.org"),
            (
                "spiffe://prod.example_1-x/ns/Apps/sa/v1.0",
                "prod.example_1-x",
            ),
        ] {
            assert_eq!(trust_domain(id), Ok(domain));
        }
        let long = format!("spiffe://example.org/{}", "x".repeat(ID_BYTES_MAX));
        let long_domain = format!("spiffe://{}/x", "x".repeat(256));
        for bad in [
            "SPIFFE://example.org/x",
            "spiffe:example.org/x",
            "spiffe://example.org",
            "spiffe://example.org/",
            "spiffe:///x",
            "spiffe://Example.org/x",
            "spiffe://example.org:443/x",
            "spiffe://user@example.org/x",
            "spiffe://example.org//x",
            "spiffe://example.org/x/",
            "spiffe://example.org/./x",
            "spiffe://example.org/a/../x",
            "spiffe://example.org/%61",
            "spiffe://example.org/x?y",
            "spiffe://example.org/x#y",
            "spiffe://example.org/ü",
            &long,
            &long_domain,
        ] {
            assert!(is_claimed(bad), "{bad}");
            assert!(trust_domain(bad).is_err(), "{bad}");
        }
        assert!(!is_claimed("https://example.org/spiffe"));
    }
}
