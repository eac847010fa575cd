//! SHA-256 digests as text.

use std::fmt::Write as _;

use aws_lc_rs::digest;

/// The SHA-256 of bytes, as hexadecimal digits.
pub(super) fn sha256(bytes: &[u8]) -> String {
    hex_of(digest::digest(&digest::SHA256, bytes))
}

/// A digest or a MAC as hexadecimal digits.
pub(super) fn hex_of(digest: impl AsRef<[u8]>) -> String {
    let bytes = digest.as_ref();
    let mut text = String::with_capacity(bytes.len() * 2);
    for byte in bytes {
        // Writing to a String cannot fail.
        let _written = write!(text, "{byte:02x}");
    }
    text
}
