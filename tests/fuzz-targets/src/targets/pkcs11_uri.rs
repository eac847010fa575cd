//! `token.uri`: PKCS#11 URIs that name a token (RFC 7512).

use std::fmt::Write as _;

use keybroker_pkcs11::fuzzing;

pub(crate) const WORDS: &[&str] = &[
    "pkcs11:",
    "token=",
    "serial=",
    "manufacturer=",
    "model=",
    "object=",
    ";",
    "=",
    "?",
    "%",
    "%20",
    "%c3%a9",
    "%00",
    "%ff",
    "?pin-value=",
];

const NAMES: [&str; 4] = ["token", "serial", "manufacturer", "model"];

/// Reads a URI.
///
/// # Panics
/// If an accepted one does not mean the same once every byte of its values is percent-encoded.
pub fn pkcs11_uri(bytes: &[u8]) -> bool {
    let Some(parts) = str::from_utf8(bytes).ok().and_then(fuzzing::token_uri) else {
        return false;
    };
    assert!(parts.iter().any(Option::is_some));
    let mut again = "PKCS11:".to_owned();
    for (name, value) in NAMES.iter().zip(&parts) {
        if let Some(value) = value {
            write!(again, ";{name}=").unwrap();
            for byte in value.bytes() {
                write!(again, "%{byte:02X}").unwrap();
            }
        }
    }
    assert_eq!(fuzzing::token_uri(&again), Some(parts));
    true
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    [
        "pkcs11:token=keybroker;serial=0123456789abcdef",
        "pkcs11:token=My%20token;manufacturer=SoftHSM%20project;model=SoftHSM%20v2",
        "PKCS11:serial=",
    ]
    .map(|text| text.as_bytes().to_vec())
    .to_vec()
}
