//! Fingerprint phrases: five words for a public key, which two people compare by voice.

use std::{fmt, sync::LazyLock};

use aws_lc_rs::hmac;

/// Number of words in a phrase. Five words of this list have 64 bits.
pub const FINGERPRINT_PHRASE_WORDS: usize = 5;
/// Number of words in the list of the Electronic Frontier Foundation.
const LIST_WORDS: u32 = 7_776;
/// Number of bytes from which the words are chosen.
const CHOICE_BYTES: usize = 32;

/// The list without the lines that name its authors and its license.
static WORDS: LazyLock<Vec<&'static str>> = LazyLock::new(|| {
    let lines = include_str!("eff_long_wordlist.txt").lines();
    lines.filter(|line| !line.starts_with('#')).collect()
});

/// The five words that Bitwarden's clients show for a public key.
///
/// The words depend on the public key and on one further text, which is the e-mail address of the
/// member for a request of a new device, and the identifier of the user for the key pair of an
/// account. An attacker who can choose the key pair finds another key with the same phrase after
/// about 2⁶⁴ attempts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FingerprintPhrase([&'static str; FINGERPRINT_PHRASE_WORDS]);

impl FingerprintPhrase {
    /// Computes the phrase of a public key, a `SubjectPublicKeyInfo` in DER. Both inputs are used
    /// unchanged: clients change neither the case of the e-mail address nor the form of the key.
    pub fn new(text: &str, public_key: &[u8]) -> Self {
        let mut number = choice(text, public_key);
        Self([(); FINGERPRINT_PHRASE_WORDS].map(|()| WORDS[divide(&mut number)]))
    }

    /// The words in the order in which they are shown.
    pub fn words(&self) -> &[&'static str; FINGERPRINT_PHRASE_WORDS] {
        &self.0
    }
}

/// Splits a phrase with hyphens into its words. Four words of the list contain a hyphen themselves.
pub fn split_phrase(text: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut parts = text.split('-').peekable();
    while let Some(part) = parts.next() {
        let joined = parts.peek().map(|next| format!("{part}-{next}"));
        match joined.filter(|joined| WORDS.contains(&&**joined)) {
            Some(joined) => {
                parts.next();
                words.push(joined);
            }
            None => words.push(part.to_owned()),
        }
    }
    words
}

/// The words with hyphens between them, as clients show them.
impl fmt::Display for FingerprintPhrase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join("-"))
    }
}

/// HKDF-Expand-SHA256 with the public key as pseudorandom key and the text as info. One block of
/// output suffices, so the expansion is one HMAC (RFC 5869 section 2.3). HKDF of aws-lc-rs does
/// not accept a pseudorandom key of this length.
fn choice(text: &str, public_key: &[u8]) -> [u8; CHOICE_BYTES] {
    let mut context = hmac::Context::with_key(&hmac::Key::new(hmac::HMAC_SHA256, public_key));
    context.update(text.as_bytes());
    context.update(&[1]);
    let mut block = [0; CHOICE_BYTES];
    block.copy_from_slice(context.sign().as_ref());
    block
}

/// Divides a big-endian number by the length of the list, and returns the remainder.
fn divide(number: &mut [u8; CHOICE_BYTES]) -> usize {
    let mut remainder = 0;
    for byte in number {
        let dividend = remainder * 256 + u32::from(*byte);
        remainder = dividend % LIST_WORDS;
        *byte =
            u8::try_from(dividend / LIST_WORDS).expect("the remainder is less than the divisor");
    }
    usize::try_from(remainder).expect("at least 32 bits")
}

#[cfg(test)]
mod tests {
    use std::{collections::HashSet, path::Path, process::Command};

    use base64ct::{Base64, Encoding as _};

    use super::*;

    const PUBLISHED_KEY: &str =
        include_str!("../../../tests/vectors/bitwarden/fingerprint-public-key.txt");
    const VECTORS: &str = include_str!("../../../tests/vectors/bitwarden/fingerprint-phrases.tsv");

    fn published_key() -> Vec<u8> {
        Base64::decode_vec(PUBLISHED_KEY.trim_end()).unwrap()
    }

    #[test]
    fn the_list_is_complete_and_in_order() {
        assert_eq!(WORDS.len(), usize::try_from(LIST_WORDS).unwrap());
        assert_eq!(WORDS.iter().collect::<HashSet<_>>().len(), WORDS.len());
        assert!(WORDS.is_sorted());
        assert_eq!((WORDS[0], WORDS[7_775]), ("abacus", "zoom"));
    }

    #[test]
    fn published_vector() {
        let phrase =
            FingerprintPhrase::new("a09726a0-9590-49d1-a5f5-afe300b6a515", &published_key());
        assert_eq!(phrase.to_string(), "turban-deftly-anime-chatroom-unselfish");
        assert_eq!(phrase.words()[0], "turban");
    }

    /// Each line has a text, a public key in base64 and the phrase, separated by tabs.
    #[test]
    fn vectors_of_the_second_implementation() {
        let mut count = 0;
        for line in VECTORS.lines() {
            let [text, key, phrase]: [&str; 3] =
                line.split('\t').collect::<Vec<_>>().try_into().unwrap();
            let key = Base64::decode_vec(key).unwrap();
            assert_eq!(
                FingerprintPhrase::new(text, &key).to_string(),
                phrase,
                "{text}"
            );
            count += 1;
        }
        assert!(count >= 60, "{count} vectors");
    }

    /// The file of vectors is what the program beside it computes.
    #[test]
    fn the_second_implementation_still_computes_the_vectors() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/vectors/bitwarden");
        let made = Command::new("python3")
            .arg(folder.join("fingerprint_phrases.py"))
            .output()
            .expect("the second implementation needs python3");
        assert!(made.status.success(), "{made:?}");
        assert_eq!(String::from_utf8(made.stdout).unwrap(), VECTORS);
    }

    #[test]
    fn another_key_or_text_has_another_phrase() {
        let key = published_key();
        let phrase = FingerprintPhrase::new("user@example.com", &key);
        assert_ne!(phrase, FingerprintPhrase::new("User@example.com", &key));
        assert_ne!(
            phrase,
            FingerprintPhrase::new("user@example.com", &key[1..])
        );
    }
}
