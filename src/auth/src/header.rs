//! The `authorization` header of a call (RFC 9110 section 11.6.2).

use base64ct::{Base64, Encoding as _};
use zeroize::Zeroizing;

/// Longest base64 form of `id:secret`, in bytes.
const BASIC_BYTES_MAX: usize = 512;

/// The name of the authentication scheme of API clients.
pub(super) const BASIC: &[u8] = b"basic";

/// The credential of a call.
pub(super) enum Presented<'a> {
    /// An access token (RFC 6750) of any length. The verifier checks the length of an access token and counts access
    /// tokens that are too long.
    Bearer(&'a [u8]),
    /// The id and secret of an API client (RFC 7617).
    Basic {
        id: Zeroizing<String>,
        secret: Zeroizing<Vec<u8>>,
    },
}

/// Reads the credential of a call, which must have exactly one `authorization` header. If there
/// were two headers, a proxy in front of the broker might check one header while the broker uses
/// the other header.
pub(super) fn read<'a>(values: &[&'a [u8]]) -> Result<Presented<'a>, &'static str> {
    let [value] = values else {
        return Err("the call has several `authorization` headers");
    };
    let value = value.trim_ascii();
    if value.is_empty() {
        return Err("the `authorization` header is empty");
    }
    let space = value.iter().position(|byte| *byte == b' ');
    let Some((scheme, rest)) = space.map(|at| value.split_at(at)) else {
        return Err("the `authorization` header has a scheme without a credential");
    };
    let rest = rest.trim_ascii();
    if scheme.eq_ignore_ascii_case(b"bearer") {
        Ok(Presented::Bearer(rest))
    } else if scheme.eq_ignore_ascii_case(BASIC) {
        basic(rest)
    } else {
        Err("the scheme of the `authorization` header is neither Bearer nor Basic")
    }
}

fn basic<'a>(encoded: &[u8]) -> Result<Presented<'a>, &'static str> {
    const MALFORMED: &str = "the Basic `authorization` header is not base64 of `id:secret`";
    if encoded.len() > BASIC_BYTES_MAX {
        return Err(MALFORMED);
    }
    let mut buffer = Zeroizing::new([0; BASIC_BYTES_MAX]);
    let decoded = Base64::decode(encoded, &mut buffer[..]).map_err(|_| MALFORMED)?;
    let colon = decoded.iter().position(|byte| *byte == b':');
    let (id, secret) = decoded.split_at(colon.ok_or(MALFORMED)?);
    let id = str::from_utf8(id).map_err(|_| MALFORMED)?;
    Ok(Presented::Basic {
        id: Zeroizing::new(id.to_owned()),
        secret: Zeroizing::new(secret[1..].to_vec()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_header_of_a_known_scheme_is_read() {
        for header in ["Bearer abc", "bearer  abc", "BEARER abc "] {
            let read = read(&[header.as_bytes()]);
            assert!(matches!(read, Ok(Presented::Bearer(b"abc"))), "{header}");
        }
        // The example of RFC 7617, and a secret that contains a colon.
        for (header, expected) in [
            ("Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ==", "open sesame"),
            ("basic QWxhZGRpbjpvcGVuOnNlc2FtZQ==", "open:sesame"),
        ] {
            let Ok(Presented::Basic { id, secret }) = read(&[header.as_bytes()]) else {
                panic!("{header}");
            };
            assert_eq!((id.as_str(), &secret[..]), ("Aladdin", expected.as_bytes()));
        }
    }

    #[test]
    fn anything_else_is_refused() {
        let long_basic = format!("Basic {}", "QUFB".repeat(200));
        for header in [
            "",
            " ",
            "Bearer",
            "Basic",
            "Digest abc",
            "Basic abc",
            "Basic QWxhZGRpbg==",
            "Basic /zph",
            &long_basic,
        ] {
            assert!(read(&[header.as_bytes()]).is_err(), "{header}");
        }
        assert!(read(&[b"Bearer a", b"Bearer a"]).is_err());
    }
}
