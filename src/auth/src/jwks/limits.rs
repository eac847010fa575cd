//! The limits of key sets and of their keys.

/// Maximum length of a key set or a discovery document, in bytes.
pub(crate) const SET_BYTES_MAX: usize = 64 * 1024;
/// Largest number of keys in a key set. Providers usually publish two or three keys.
pub(crate) const KEYS_MAX: usize = 64;
/// Accepted lengths of an RSA modulus, in bits. A shorter modulus can be factored, and the verifying library refuses a
/// longer modulus.
pub(crate) const RSA_BITS: std::ops::RangeInclusive<usize> = 2_048..=8_192;
/// Smallest public exponent (FIPS 186-5 section 5.1).
pub(crate) const EXPONENT_MIN: u32 = 65_537;
/// Longest public exponent that the verifying library accepts, in bits.
pub(crate) const EXPONENT_BITS_MAX: usize = 33;
