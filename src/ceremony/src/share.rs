//! Shares of a security officer's PIN (Shamir's secret sharing over GF(256)).
//!
//! A share is written as one line that a person can copy: its number, a hyphen, and groups of four characters.
//!
//! ```text
//! 2-0G1C-7TQ2-…-9XKM
//! ```
//!
//! The characters are Crockford's base 32, which has no I, L, O and U. The bytes are: format version, threshold, number
//! of the share, set (4 random bytes that all shares of one split have), share value, checksum (4 bytes of SHA-256). The
//! checksum finds mistyped characters. The digest of the share in the transcript finds a share of another ceremony, and
//! a share that was changed on purpose.
//!
//! The crate `blahaj` splits and combines. It is the maintained fork of `sharks` without the biased coefficients of
//! RUSTSEC-2024-0398. Its arithmetic is not in constant time, which does not matter here: one person runs the command once.
//!
//! Shares below the threshold say nothing about the PIN, except its length. With the public digests of the other shares,
//! guesses of the PIN can be tested. The PIN has at least 120 random bits, so that this is of no use.
//!
//! Mitigation: M23 of `THREAT_MODEL.md`.

use std::{collections::BTreeSet, convert::Infallible, fmt};

use aws_lc_rs::digest;
use blahaj::Sharks;
use rand_core::{TryCryptoRng, TryRng};
use zeroize::{Zeroize as _, Zeroizing};

/// Format version of the bytes of a share.
const VERSION: u8 = 1;
/// Version, threshold, number and set.
const HEAD_BYTES: usize = 3 + SET_BYTES;
const SET_BYTES: usize = 4;
const CHECKSUM_BYTES: usize = 4;
const CHECKSUM_DOMAIN: &[u8] = b"keybroker/ceremony-share-checksum/v1";
const DIGEST_DOMAIN: &[u8] = b"keybroker/ceremony-share/v1";
/// Crockford's base 32.
const ALPHABET: &[u8; 32] = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ";
/// Characters in a group.
const GROUP: usize = 4;
/// Longest line of a share, in characters.
const LINE_MAX: usize = 400;

/// Largest number of shares, and so of custodians.
pub const SHARES_MAX: usize = 32;

/// Why a text is not a share, or why shares do not give a PIN. No message contains any part of a share.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ShareError {
    /// The text does not have the form of a share.
    #[error("this is not a share: a share is its number, a hyphen and groups of four characters")]
    Form,
    /// The checksum does not match, so at least one character is wrong.
    #[error(
        "share {number} is mistyped: its checksum does not fit; compare every character and type the share again"
    )]
    Mistyped {
        /// The number that was typed before the first hyphen.
        number: u8,
    },
    /// The share has a newer format.
    #[error(
        "share {number} has format {version}, which this release does not know; use the release that made it"
    )]
    Version {
        /// Number of the share.
        number: u8,
        /// The format.
        version: u8,
    },
    /// Two of the shares come from different splits.
    #[error(
        "the shares {one} and {other} do not belong together: they were made in different ceremonies"
    )]
    OtherSet {
        /// Number of the first share.
        one: u8,
        /// Number of the share that does not belong to it.
        other: u8,
    },
    /// The same share was given twice.
    #[error("share {0} was given twice; each share counts once")]
    Twice(u8),
    /// There are fewer shares than the threshold.
    #[error("{needed} shares are needed, but {given} were given: {} more", needed - given)]
    TooFew {
        /// The threshold.
        needed: usize,
        /// Number of different shares.
        given: usize,
    },
    /// The threshold or the number of shares is not permitted.
    #[error("a PIN can be split into at most {SHARES_MAX} shares, of which at least 2 are needed")]
    Numbers,
    /// The random generator failed.
    #[error("the random generator failed")]
    Random,
    /// The library for secret sharing refused the shares.
    #[error("the shares do not give a PIN")]
    Combine,
}

/// A share of a PIN. The value is overwritten when it is dropped.
#[derive(Clone, PartialEq, Eq)]
pub struct Share {
    threshold: u8,
    number: u8,
    set: [u8; SET_BYTES],
    value: Zeroizing<Vec<u8>>,
}

impl fmt::Debug for Share {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Share({}, redacted)", self.number)
    }
}

impl Share {
    /// Number of the share, from 1.
    pub fn number(&self) -> u8 {
        self.number
    }

    /// The number of shares that give the PIN.
    pub fn threshold(&self) -> usize {
        self.threshold.into()
    }

    /// The digest of the share for the transcript: SHA-256, in hexadecimal. The value of a share is as long as the PIN
    /// and random, so that the digest does not help to guess it. Custodians who lack one share can use its digest to test
    /// guesses of the PIN.
    pub fn digest(&self) -> String {
        let mut context = digest::Context::new(&digest::SHA256);
        context.update(DIGEST_DOMAIN);
        context.update(&self.bytes());
        hex::encode(context.finish())
    }

    fn bytes(&self) -> Zeroizing<Vec<u8>> {
        let mut bytes = Zeroizing::new(Vec::with_capacity(HEAD_BYTES + self.value.len()));
        bytes.extend([VERSION, self.threshold, self.number]);
        bytes.extend(self.set);
        bytes.extend(self.value.iter());
        bytes
    }

    /// The line that the custodian writes down.
    pub fn to_line(&self) -> Zeroizing<String> {
        let mut bytes = Zeroizing::new(Vec::with_capacity(
            HEAD_BYTES + self.value.len() + CHECKSUM_BYTES,
        ));
        bytes.extend(self.bytes().iter());
        let checksum = checksum(&bytes);
        bytes.extend(checksum);
        let code = encode(&bytes);
        let mut line = Zeroizing::new(String::with_capacity(LINE_MAX));
        line.push_str(&self.number.to_string());
        for group in code.as_bytes().chunks(GROUP) {
            line.push('-');
            line.extend(group.iter().copied().map(char::from));
        }
        line
    }

    /// Reads a line. Small letters, spaces instead of hyphens, and I, L and O instead of 1, 1 and 0 are accepted.
    pub fn from_line(line: &str) -> Result<Self, ShareError> {
        let line = line.trim();
        if line.len() > LINE_MAX {
            return Err(ShareError::Form);
        }
        let (number, code) = line.split_once(['-', ' ']).ok_or(ShareError::Form)?;
        let number: u8 = number.parse().map_err(|_| ShareError::Form)?;
        let mistyped = ShareError::Mistyped { number };
        let bytes = decode(code).ok_or_else(|| mistyped.clone())?;
        let split = bytes.len().checked_sub(CHECKSUM_BYTES);
        let (content, sum) = bytes
            .split_at_checked(split.unwrap_or(0))
            .ok_or(ShareError::Form)?;
        if content.len() <= HEAD_BYTES || checksum(content) != *sum {
            return Err(mistyped);
        }
        let [version, threshold, inner, ..] = *content else {
            return Err(mistyped);
        };
        if version != VERSION {
            return Err(ShareError::Version { number, version });
        }
        // The number before the hyphen is the only part that the checksum does not cover.
        if inner != number || number == 0 || threshold < 2 {
            return Err(mistyped);
        }
        let mut set = [0; SET_BYTES];
        set.copy_from_slice(&content[3..HEAD_BYTES]);
        Ok(Self {
            threshold,
            number,
            set,
            value: Zeroizing::new(content[HEAD_BYTES..].to_vec()),
        })
    }
}

fn checksum(content: &[u8]) -> [u8; CHECKSUM_BYTES] {
    let mut context = digest::Context::new(&digest::SHA256);
    context.update(CHECKSUM_DOMAIN);
    context.update(content);
    let digest = context.finish();
    let mut sum = [0; CHECKSUM_BYTES];
    sum.copy_from_slice(&digest.as_ref()[..CHECKSUM_BYTES]);
    sum
}

/// Writes bytes in base 32, five bits for each character. Missing bits of the last character are zero.
fn encode(bytes: &[u8]) -> Zeroizing<String> {
    let mut code = Zeroizing::new(String::with_capacity(bytes.len().div_ceil(5) * 8));
    let (mut buffer, mut bits) = (0_u32, 0_u32);
    for byte in bytes {
        buffer = (buffer << 8) | u32::from(*byte);
        bits += 8;
        while bits >= 5 {
            bits -= 5;
            push_character(&mut code, buffer >> bits);
        }
    }
    if bits > 0 {
        push_character(&mut code, buffer << (5 - bits));
    }
    buffer.zeroize();
    code
}

fn push_character(code: &mut String, value: u32) {
    let index = usize::try_from(value & 31).expect("five bits");
    code.push(char::from(ALPHABET[index]));
}

/// Reads base 32. Returns `None` for another character, or if the bits after the last whole byte are not zero.
fn decode(code: &str) -> Option<Zeroizing<Vec<u8>>> {
    let mut bytes = Zeroizing::new(Vec::with_capacity(code.len()));
    let (mut buffer, mut bits) = (0_u32, 0_u32);
    for character in code.bytes().filter(|byte| !matches!(byte, b'-' | b' ')) {
        let character = match character.to_ascii_uppercase() {
            b'O' => b'0',
            b'I' | b'L' => b'1',
            other => other,
        };
        let value = ALPHABET.iter().position(|known| *known == character)?;
        buffer = ((buffer << 5) | u32::try_from(value).ok()?) & 0xfff;
        bits += 5;
        if bits >= 8 {
            bits -= 8;
            bytes.push(u8::try_from((buffer >> bits) & 0xff).ok()?);
        }
    }
    let rest = buffer & ((1 << bits) - 1);
    buffer.zeroize();
    (rest == 0 && bits < 5).then_some(bytes)
}

/// Random bytes of `aws-lc-rs` for the library of secret sharing, which expects a generator that never fails. A failure
/// is remembered, and the shares are then discarded.
struct Random {
    has_failed: bool,
}

impl TryRng for Random {
    type Error = Infallible;

    fn try_next_u32(&mut self) -> Result<u32, Infallible> {
        let mut bytes = [0; 4];
        self.try_fill_bytes(&mut bytes)?;
        Ok(u32::from_le_bytes(bytes))
    }

    fn try_next_u64(&mut self) -> Result<u64, Infallible> {
        let mut bytes = [0; 8];
        self.try_fill_bytes(&mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    fn try_fill_bytes(&mut self, bytes: &mut [u8]) -> Result<(), Infallible> {
        self.has_failed |= aws_lc_rs::rand::fill(bytes).is_err();
        Ok(())
    }
}

impl TryCryptoRng for Random {}

/// Splits a PIN into `count` shares, of which any `threshold` give the PIN.
pub fn split(pin: &str, threshold: usize, count: usize) -> Result<Vec<Share>, ShareError> {
    if threshold < 2 || threshold > count || count > SHARES_MAX || pin.is_empty() {
        return Err(ShareError::Numbers);
    }
    let mut set = [0; SET_BYTES];
    aws_lc_rs::rand::fill(&mut set).map_err(|_| ShareError::Random)?;
    let mut random = Random { has_failed: false };
    let threshold = u8::try_from(threshold).map_err(|_| ShareError::Numbers)?;
    let values: Vec<Zeroizing<Vec<u8>>> = Sharks(threshold)
        .dealer_rng(pin.as_bytes(), &mut random)
        .take(count)
        .map(|share| Zeroizing::new(Vec::from(&share)))
        .collect();
    if random.has_failed {
        return Err(ShareError::Random);
    }
    let share = |value: &Zeroizing<Vec<u8>>| {
        let (number, value) = value.split_first().ok_or(ShareError::Combine)?;
        Ok(Share {
            threshold,
            number: *number,
            set,
            value: Zeroizing::new(value.to_vec()),
        })
    };
    values.iter().map(share).collect()
}

/// Combines shares. Shares beyond the threshold are used too, so that one that does not fit gives another result.
pub fn combine(shares: &[Share]) -> Result<Zeroizing<String>, ShareError> {
    let first = shares.first().ok_or(ShareError::TooFew {
        needed: 2,
        given: 0,
    })?;
    let mut numbers = BTreeSet::new();
    for share in shares {
        let is_other = share.set != first.set
            || share.threshold != first.threshold
            || share.value.len() != first.value.len();
        if is_other {
            let (one, other) = (first.number, share.number);
            return Err(ShareError::OtherSet { one, other });
        }
        if !numbers.insert(share.number) {
            return Err(ShareError::Twice(share.number));
        }
    }
    let (needed, given) = (first.threshold(), numbers.len());
    if given < needed {
        return Err(ShareError::TooFew { needed, given });
    }
    // The library overwrites its shares when they are dropped.
    let values = shares
        .iter()
        .map(|share| {
            let mut value = Zeroizing::new(Vec::with_capacity(share.value.len() + 1));
            value.push(share.number);
            value.extend(share.value.iter());
            blahaj::Share::try_from(value.as_slice()).map_err(|_| ShareError::Combine)
        })
        .collect::<Result<Vec<_>, _>>()?;
    let scheme = Sharks(first.threshold);
    let combined = scheme.recover(&values).map_err(|_| ShareError::Combine)?;
    let combined = Zeroizing::new(combined);
    let pin = std::str::from_utf8(&combined).map_err(|_| ShareError::Combine)?;
    Ok(Zeroizing::new(pin.to_owned()))
}

/// Makes a PIN of random characters of the alphabet, with 5 bits each.
pub fn random_pin(characters: usize) -> Result<Zeroizing<String>, ShareError> {
    let mut bytes = Zeroizing::new(vec![0; characters]);
    aws_lc_rs::rand::fill(&mut bytes).map_err(|_| ShareError::Random)?;
    let mut pin = Zeroizing::new(String::with_capacity(characters));
    for byte in bytes.iter() {
        push_character(&mut pin, u32::from(*byte));
    }
    Ok(pin)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PIN: &str = "6XW1QJ4TZ0RK8M2C7NQA";

    fn shares() -> Vec<Share> {
        split(PIN, 3, 5).unwrap()
    }

    #[test]
    fn any_three_of_five_shares_give_the_pin_and_two_do_not() {
        let shares = shares();
        for left_out in 0..5 {
            for other in left_out + 1..5 {
                let some: Vec<Share> = (0..5)
                    .filter(|index| *index != left_out && *index != other)
                    .map(|index| shares[index].clone())
                    .collect();
                assert_eq!(combine(&some).unwrap().as_str(), PIN);
                let refused = combine(&some[..2]).unwrap_err();
                assert_eq!(
                    refused,
                    ShareError::TooFew {
                        needed: 3,
                        given: 2
                    }
                );
                assert!(refused.to_string().contains("1 more"), "{refused}");
            }
        }
        assert_eq!(combine(&shares).unwrap().as_str(), PIN);
    }

    #[test]
    fn a_share_is_written_and_read_back() {
        for share in shares() {
            let line = share.to_line();
            assert_eq!(Share::from_line(&line).unwrap(), share);
            let other = line
                .to_lowercase()
                .replace('-', " ")
                .replace('0', "o")
                .replace('1', "l");
            // The number at the beginning stays a number.
            let other = format!("{}{}", &line[..1], &other[1..]);
            assert_eq!(Share::from_line(&other).unwrap(), share);
            assert!(
                line[2..].split('-').all(|group| group.len() <= 4),
                "{}",
                line.len()
            );
        }
    }

    #[test]
    fn every_wrong_character_is_noticed() {
        let share = shares().remove(0);
        let line = share.to_line();
        for place in 0..line.len() {
            let old = line.as_bytes()[place];
            for new in *ALPHABET {
                let is_same = new == old;
                let mut bytes = line.as_bytes().to_vec();
                bytes[place] = new;
                let text = String::from_utf8(bytes).unwrap();
                if old == b'-' || is_same {
                    continue;
                }
                let read = Share::from_line(&text);
                assert!(read.is_err(), "place {place}");
                if place > 1 {
                    assert_eq!(
                        read.unwrap_err(),
                        ShareError::Mistyped {
                            number: share.number()
                        }
                    );
                }
            }
        }
        for cut in 0..line.len() {
            assert!(Share::from_line(&line[..cut]).is_err(), "{cut}");
        }
    }

    #[test]
    fn shares_of_two_splits_and_the_same_share_twice_are_named() {
        let (one, other) = (shares(), shares());
        let mixed = [one[0].clone(), one[1].clone(), other[2].clone()];
        assert_eq!(
            combine(&mixed),
            Err(ShareError::OtherSet { one: 1, other: 3 })
        );
        let twice = [one[0].clone(), one[1].clone(), one[1].clone()];
        assert_eq!(combine(&twice), Err(ShareError::Twice(2)));
        assert_eq!(
            combine(&[]),
            Err(ShareError::TooFew {
                needed: 2,
                given: 0
            })
        );
    }

    #[test]
    fn a_changed_share_gives_another_pin_or_none() {
        let mut some = shares()[..3].to_vec();
        some[1].value[0] ^= 1;
        let combined = combine(&some);
        assert!(combined.map_or(true, |pin| pin.as_str() != PIN));
    }

    #[test]
    fn numbers_that_protect_nothing_are_refused() {
        for (threshold, count) in [(0, 3), (1, 3), (4, 3), (2, 33)] {
            assert_eq!(split(PIN, threshold, count), Err(ShareError::Numbers));
        }
        assert_eq!(split("", 2, 3), Err(ShareError::Numbers));
    }

    #[test]
    fn digests_differ_and_nothing_shows_a_share() {
        let shares = shares();
        let digests: BTreeSet<String> = shares.iter().map(Share::digest).collect();
        assert_eq!(digests.len(), 5);
        assert_eq!(format!("{:?}", shares[0]), "Share(1, redacted)");
        assert_ne!(shares[0].digest(), split(PIN, 3, 5).unwrap()[0].digest());
    }

    #[test]
    fn a_random_pin_has_the_length_and_the_alphabet() {
        let pin = random_pin(24).unwrap();
        assert_eq!(pin.len(), 24);
        assert!(pin.bytes().all(|byte| ALPHABET.contains(&byte)));
        assert_ne!(pin, random_pin(24).unwrap());
    }

    proptest! {
        #[test]
        fn bytes_are_read_back(bytes in proptest::collection::vec(any::<u8>(), 0..80)) {
            let code = encode(&bytes);
            let decoded = decode(&code).unwrap();
            prop_assert_eq!(&*decoded, &bytes);
        }

        #[test]
        fn no_line_makes_the_reader_panic(line in ".{0,120}") {
            let _either = Share::from_line(&line);
        }

        #[test]
        fn every_pin_survives_every_permitted_split(
            pin in "[ -~]{1,64}", threshold in 2_usize..8, more in 0_usize..8,
        ) {
            let shares = split(&pin, threshold, threshold + more).unwrap();
            let combined = combine(&shares[more..]).unwrap();
            prop_assert_eq!(combined.as_str(), pin);
        }
    }
}
