//! The `authorization` header.

use base64ct::{Base64, Encoding as _};

use keybroker_auth::fuzzing;

pub(crate) const WORDS: &[&str] = &[
    "Basic ", "Bearer ", " ", "=", "==", "Og==", "Ojo=", ",", "basic", "bearer",
];

/// Reads a credential from the header.
///
/// # Panics
/// If the credential is not what the header has.
pub fn authorization(value: &[u8]) -> bool {
    let Some((first, secret)) = fuzzing::authorization(value) else {
        return false;
    };
    let value = value.trim_ascii();
    let (scheme, rest) = value.split_at(value.iter().position(|byte| *byte == b' ').unwrap());
    let rest = rest.trim_ascii();
    if scheme.eq_ignore_ascii_case(b"bearer") {
        assert_eq!((first.as_slice(), secret.as_slice()), (rest, &b""[..]));
    } else {
        assert!(scheme.eq_ignore_ascii_case(b"basic"));
        assert!(!first.contains(&b':'));
        let both = [&first[..], b":", &secret].concat();
        assert_eq!(Base64::encode_string(&both).as_bytes(), rest);
    }
    true
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    [
        "Bearer abc.def.ghi",
        "Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ==",
        "basic QWxhZGRpbjpvcGVuOnNlc2FtZQ==",
        "Basic Og==",
    ]
    .map(|text| text.as_bytes().to_vec())
    .to_vec()
}
