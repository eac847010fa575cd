//! Checks that detect unusable public keys: keys for which anyone can forge signatures, and keys
//! that are not valid.
//!
//! Sources: NIST SP 800-89 section 5.3.3 and FIPS 186-5 (RSA), SEC 1 section 3.2.2 (NIST curves),
//! RFC 8032 (Ed25519), and Chalkias, Garillot and Nikolaenko 2020 (Ed25519 keys of small order).
//! The checks do not find an RSA modulus that is prime or whose factors are close to each other.
//! Tests for prime moduli and close factors would take too long for a key set that is read every
//! few seconds.

use aws_lc_rs::signature::{self, ParsedPublicKey, VerificationAlgorithm};
use curve25519_dalek::edwards::CompressedEdwardsY;
use rsa::BigUint;

use super::{EXPONENT_BITS_MAX, EXPONENT_MIN, RSA_BITS, error::KeyError};

/// An RSA modulus must have no prime factor below this value.
const FACTOR_MIN: u32 = 1 << 16;

/// First byte of an uncompressed point (SEC 1 section 2.3.3).
const UNCOMPRESSED: u8 = 4;
/// The point at infinity (SEC 1 section 2.3.3).
const INFINITY: [u8; 1] = [0];

/// Checks the modulus and the exponent of an RSA key; both numbers are big-endian.
pub(super) fn check_rsa(modulus: &[u8], exponent: &[u8]) -> Result<(), KeyError> {
    let (modulus, exponent) = (
        BigUint::from_bytes_be(modulus),
        BigUint::from_bytes_be(exponent),
    );
    let bits = modulus.bits();
    if !RSA_BITS.contains(&bits) {
        return Err(KeyError::ModulusBits(bits));
    }
    let is_even = |number: &BigUint| number.to_bytes_le().first().is_none_or(|low| low % 2 == 0);
    if is_even(&modulus) {
        return Err(KeyError::EvenModulus);
    }
    if exponent < BigUint::from(EXPONENT_MIN) {
        return Err(KeyError::SmallExponent(exponent));
    }
    if is_even(&exponent) || exponent.bits() > EXPONENT_BITS_MAX {
        return Err(KeyError::Exponent);
    }
    match small_factor(&modulus) {
        Some(factor) => Err(KeyError::Factor(factor)),
        None => Ok(()),
    }
}

/// Returns the smallest prime factor of an odd number, if the factor is below [`FACTOR_MIN`].
fn small_factor(modulus: &BigUint) -> Option<u32> {
    let is_divisor = |number: &BigUint, divisor: u32| number % divisor == BigUint::from(0_u8);
    // Each step tests three divisors with only one division of the long number, because this
    // division is costly. If a divisor is not prime, its prime factors are smaller divisors, which
    // were tested before.
    (3..FACTOR_MIN).step_by(6).find_map(|first| {
        let divisors = [first, first + 2, first + 4];
        let product: u64 = divisors.map(u64::from).into_iter().product();
        let rest = modulus % BigUint::from(product);
        divisors
            .into_iter()
            .find(|divisor| is_divisor(&rest, *divisor))
    })
}

/// Checks a point on a NIST curve, in the encoding of SEC 1.
pub(super) fn check_nist(
    point: &[u8],
    coordinate_bytes: usize,
    algorithm: &'static dyn VerificationAlgorithm,
) -> Result<(), KeyError> {
    if point == INFINITY {
        return Err(KeyError::Infinity);
    }
    if point.len() != 1 + 2 * coordinate_bytes || point.first() != Some(&UNCOMPRESSED) {
        return Err(KeyError::Point(coordinate_bytes));
    }
    ParsedPublicKey::new(algorithm, point)
        .map(drop)
        .map_err(KeyError::OffCurve)
}

/// Checks an Ed25519 key. With a key of small order, one signature is valid for many messages.
pub(super) fn check_ed25519(key: &[u8]) -> Result<(), KeyError> {
    let encoded =
        CompressedEdwardsY::from_slice(key).map_err(|_| KeyError::Ed25519Length(key.len()))?;
    let point = encoded.decompress().ok_or(KeyError::Ed25519Point)?;
    if point.is_small_order() {
        return Err(KeyError::Ed25519SmallOrder);
    }
    if point.compress() != encoded {
        return Err(KeyError::Ed25519Encoding);
    }
    ParsedPublicKey::new(&signature::ED25519, key)
        .map(drop)
        .map_err(KeyError::Ed25519)
}
