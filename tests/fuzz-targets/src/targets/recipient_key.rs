//! The public keys of recipients of sealed releases, which callers send.

use aws_lc_rs::rsa::PublicEncryptingKey;
use keybroker_worker_protocol::{
    oaep,
    recipient::{RecipientKey, SPKI_BYTES_MAX},
};

pub(crate) const WORDS: &[&str] = &[
    "\x30\x0d\x06\x09",
    "\x02\x03\x01\0\x01",
    "\x02\x01\x03",
    "\x03",
    "\0",
];

/// Reads the public key of a recipient.
///
/// # Panics
/// If a key is accepted that another library does not read, or that is not exactly one key of a permitted length.
pub fn recipient_key(bytes: &[u8]) -> bool {
    let Ok(key) = RecipientKey::from_spki(bytes) else {
        return false;
    };
    assert_eq!(key.spki(), bytes);
    assert!(bytes.len() <= SPKI_BYTES_MAX);
    assert_eq!(key.fingerprint(), oaep::fingerprint(bytes));
    let modulus = key.modulus();
    assert!([256, 384, 512].contains(&modulus.len()));
    assert!(modulus[0] >= 0x80, "the modulus fills its bytes");
    // A number is divisible by 3, 5 and 17 as the sum of its bytes is, because 256 leaves the rest 1.
    let sum: u32 = modulus.iter().map(|byte| u32::from(*byte)).sum();
    assert!(modulus[modulus.len() - 1] % 2 == 1);
    assert!([3, 5, 17].iter().all(|prime| !sum.is_multiple_of(*prime)));
    let read = PublicEncryptingKey::from_der(bytes).unwrap();
    assert_eq!(read.key_size_bytes(), modulus.len());
    true
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let lengths = [256, 384, 512];
    let seeds = lengths.into_iter().map(|length| {
        let candidates = (1_u16..).step_by(2).map(|end| {
            let mut modulus = vec![0xa5; length];
            modulus[length - 2..].copy_from_slice(&end.to_be_bytes());
            oaep::spki(&modulus, &[1, 0, 1]).unwrap().0
        });
        let mut accepted = candidates.filter(|spki| RecipientKey::from_spki(spki).is_ok());
        accepted.next().unwrap()
    });
    seeds.collect()
}
