//! A negative test uses a key for an operation that must fail. In contrast to the attribute check, a negative test
//! does not rely on the attributes that the token reports. If the token performs the operation, the test fails: the
//! token is not used, and the message contains the name of the test.
//!
//! If an exception in the configuration accepts a failed test, the failure is reported, but the token is still used. An
//! exception never accepts a key that can be read, wrapped, or copied with weaker attributes.
//!
//! Mitigation: M16 of `THREAT_MODEL.md`.

use aws_lc_rs::rsa::{Pkcs1PublicEncryptingKey, PublicEncryptingKey};
use cryptoki::{
    error::Error,
    mechanism::Mechanism,
    object::{Attribute, AttributeType, ObjectHandle},
};
use keybroker_core::key::Purpose;
use keybroker_pkcs11_ffi::{Session, WrapMechanism};

use crate::{
    classify::{Class, Fault, is_a_refusal},
    keys::{KeyPair, KeySession, PublicSide},
    operation::SelfTest,
};

mod attempts;
pub(crate) mod survey;

pub(crate) use attempts::aes_key;

use attempts::{
    Helpers, PART_BYTES, SECRET_KEY_BYTES, copies, decrypts, decrypts_oaep, derives, oaep_sha1,
    of_a_part, on_unwrapped, readable, readable_template, sets, signs, unwraps, unwraps_bytes,
    verifies, with_known_data, wraps, wraps_under_rsa, wraps_with, wraps_with_gcm,
    wraps_with_rsa_aes,
};

/// The IV may have any value, because the wrapped key is never unwrapped.
const IV: [u8; 16] = [0; 16];

/// The keys that are tested.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Subject {
    /// Keys that protect records. Only tests that cannot change a key are run on keys in use.
    InUse,
    /// Session keys that were made for testing.
    Throwaway,
}

/// An operation that must fail.
#[derive(Clone, Copy)]
pub struct NegativeTest {
    /// The name of the test in `token.spared_tests` and in messages.
    pub name: &'static str,
    /// The security consequence if the operation succeeds, as a sentence without a full stop.
    pub meaning: &'static str,
    /// Name of the attribute exception that accepts a failure of this test.
    pub accepted_by: Option<&'static str>,
    /// Whether the operation changes a key if it succeeds. A test that may change a key is run only on keys that were
    /// made for testing.
    pub changes_the_key: bool,
    /// Whether the test needs an integrity key that is an object on the token. If the integrity key is not on the
    /// token, the test is not run.
    needs_integrity_object: bool,
    /// The purpose of the keys with which the test is run; `None` for all keys.
    pub purpose: Option<Purpose>,
    /// Whether `token.spared_tests` may contain the test. Tests that try to read, wrap or copy a key are always run.
    pub can_be_spared: bool,
    run: fn(&Subjects<'_>) -> Result<Done, Error>,
}

impl std::fmt::Debug for NegativeTest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("NegativeTest").field(&self.name).finish()
    }
}

/// The result of a test in which no call failed unexpectedly.
#[derive(Debug)]
enum Done {
    /// The forbidden operation succeeded.
    It,
    /// The forbidden operation succeeded, and the object that the operation made could not be removed.
    Kept(Fault),
    /// The operation had no effect that an attacker can use, or the token does not offer the operation for any key.
    Nothing,
    /// The test cannot be run, because the token does not perform the operation even with a permitted key.
    NotMade,
}

/// The objects that a test uses.
struct Subjects<'a> {
    /// A session that only this test uses.
    session: &'a Session,
    pair: &'a KeyPair,
    self_test: &'a SelfTest,
    helpers: Helpers,
    /// A ciphertext with the padding of PKCS #1 v1.5.
    pkcs1: Option<&'a [u8]>,
}

impl Subjects<'_> {
    /// Returns the handle of the integrity key.
    fn integrity(&self) -> ObjectHandle {
        let object = self.pair.integrity_key.object();
        object.expect("a test that needs it is run only if there is one")
    }
}

impl NegativeTest {
    /// Returns whether the test can be run with this key.
    fn applies_to(&self, pair: &KeyPair) -> bool {
        let has_object = !self.needs_integrity_object || pair.integrity_key.object().is_some();
        has_object && self.purpose.is_none_or(|purpose| purpose == pair.purpose)
    }
}

/// All tests, in the order in which they are run.
pub const TESTS: &[NegativeTest] = &[
    never(
        "read-private-exponent",
        "the private exponent can be read",
        |on| readable(on, on.pair.private, AttributeType::PrivateExponent),
    ),
    never(
        "read-prime",
        "a prime factor of the modulus can be read",
        |on| readable(on, on.pair.private, AttributeType::Prime1),
    ),
    on_object(never(
        "read-integrity-key",
        "the integrity key can be read",
        |on| readable(on, on.integrity(), AttributeType::Value),
    )),
    never(
        "wrap-private-aes-kw",
        "the RSA private key can be wrapped with CKM_AES_KEY_WRAP",
        |on| wraps(on, &Mechanism::AesKeyWrap, on.pair.private),
    ),
    never(
        "wrap-private-aes-kw-pad",
        "the RSA private key can be wrapped with CKM_AES_KEY_WRAP_PAD",
        |on| wraps(on, &Mechanism::AesKeyWrapPad, on.pair.private),
    ),
    never(
        "wrap-private-aes-kw-pkcs7",
        "the RSA private key can be wrapped with CKM_AES_KEY_WRAP_PKCS7",
        |on| wraps_with(on, WrapMechanism::AesKeyWrapPkcs7, on.pair.private),
    ),
    never(
        "wrap-private-aes-kwp",
        "the RSA private key can be wrapped with CKM_AES_KEY_WRAP_KWP",
        |on| wraps_with(on, WrapMechanism::AesKeyWrapKwp, on.pair.private),
    ),
    never(
        "wrap-private-aes-cbc",
        "the RSA private key can be wrapped with CKM_AES_CBC_PAD",
        |on| wraps(on, &Mechanism::AesCbcPad(IV), on.pair.private),
    ),
    never(
        "wrap-private-aes-gcm",
        "the RSA private key can be wrapped with CKM_AES_GCM",
        |on| wraps_with_gcm(on, on.pair.private),
    ),
    never(
        "wrap-private-rsa-aes",
        "the RSA private key can be wrapped under any RSA public key with CKM_RSA_AES_KEY_WRAP",
        |on| wraps_with_rsa_aes(on, on.pair.private),
    ),
    on_object(never(
        "wrap-integrity-aes-kw",
        "the integrity key can be wrapped with CKM_AES_KEY_WRAP",
        |on| wraps(on, &Mechanism::AesKeyWrap, on.integrity()),
    )),
    on_object(never(
        "wrap-integrity-aes-kw-pad",
        "the integrity key can be wrapped with CKM_AES_KEY_WRAP_PAD",
        |on| wraps(on, &Mechanism::AesKeyWrapPad, on.integrity()),
    )),
    on_object(never(
        "wrap-integrity-aes-kw-pkcs7",
        "the integrity key can be wrapped with CKM_AES_KEY_WRAP_PKCS7",
        |on| wraps_with(on, WrapMechanism::AesKeyWrapPkcs7, on.integrity()),
    )),
    on_object(never(
        "wrap-integrity-aes-kwp",
        "the integrity key can be wrapped with CKM_AES_KEY_WRAP_KWP",
        |on| wraps_with(on, WrapMechanism::AesKeyWrapKwp, on.integrity()),
    )),
    on_object(never(
        "wrap-integrity-aes-cbc",
        "the integrity key can be wrapped with CKM_AES_CBC_PAD",
        |on| wraps(on, &Mechanism::AesCbcPad(IV), on.integrity()),
    )),
    on_object(never(
        "wrap-integrity-aes-cbc-unpadded",
        "the integrity key can be wrapped with CKM_AES_CBC",
        |on| wraps(on, &Mechanism::AesCbc(IV), on.integrity()),
    )),
    on_object(never(
        "wrap-integrity-aes-ecb",
        "the integrity key can be wrapped with CKM_AES_ECB",
        |on| wraps(on, &Mechanism::AesEcb, on.integrity()),
    )),
    on_object(never(
        "wrap-integrity-aes-gcm",
        "the integrity key can be wrapped with CKM_AES_GCM",
        |on| wraps_with_gcm(on, on.integrity()),
    )),
    on_object(never(
        "wrap-integrity-rsa-oaep",
        "the integrity key can be wrapped under any RSA public key with CKM_RSA_PKCS_OAEP",
        |on| wraps_under_rsa(on, &oaep_sha1()),
    )),
    on_object(never(
        "wrap-integrity-rsa-pkcs1",
        "the integrity key can be wrapped under any RSA public key with CKM_RSA_PKCS",
        |on| wraps_under_rsa(on, &Mechanism::RsaPkcs),
    )),
    on_object(never(
        "wrap-integrity-rsa-aes",
        "the integrity key can be wrapped under any RSA public key with CKM_RSA_AES_KEY_WRAP",
        |on| wraps_with_rsa_aes(on, on.integrity()),
    )),
    on_object(never(
        "derive-integrity-part",
        "a separate key can be derived from a part of the integrity key, and the derived key is short enough to be guessed",
        |on| derives(on, &of_a_part(), on.integrity(), PART_BYTES, &[]),
    )),
    on_object(never(
        "derive-integrity-readable",
        "a readable key can be derived from the integrity key",
        |on| {
            derives(
                on,
                &with_known_data(),
                on.integrity(),
                SECRET_KEY_BYTES,
                &readable_template(),
            )
        },
    )),
    on_object(unless(
        "CKA_DERIVE",
        "derive-integrity",
        "keys can be derived from the integrity key",
        |on| {
            derives(
                on,
                &with_known_data(),
                on.integrity(),
                SECRET_KEY_BYTES,
                &[],
            )
        },
    )),
    unless(
        "CKA_DERIVE",
        "derive-private",
        "keys can be derived from the RSA private key",
        |on| {
            derives(
                on,
                &with_known_data(),
                on.pair.private,
                SECRET_KEY_BYTES,
                &[],
            )
        },
    ),
    never(
        "copy-private-extractable",
        "an extractable copy of the RSA private key can be made",
        |on| copies(on, on.pair.private, Some(Attribute::Extractable(true))),
    ),
    never(
        "copy-private-readable",
        "a readable copy of the RSA private key can be made",
        |on| copies(on, on.pair.private, Some(Attribute::Sensitive(false))),
    ),
    on_object(never(
        "copy-integrity-extractable",
        "an extractable copy of the integrity key can be made",
        |on| copies(on, on.integrity(), Some(Attribute::Extractable(true))),
    )),
    on_object(never(
        "copy-integrity-readable",
        "a readable copy of the integrity key can be made",
        |on| copies(on, on.integrity(), Some(Attribute::Sensitive(false))),
    )),
    unless(
        "CKA_COPYABLE",
        "copy-private",
        "the RSA private key can be copied",
        |on| copies(on, on.pair.private, None),
    ),
    on_object(unless(
        "CKA_COPYABLE",
        "copy-integrity",
        "the integrity key can be copied",
        |on| copies(on, on.integrity(), None),
    )),
    unless(
        "CKA_ALLOWED_MECHANISMS",
        "decrypt-raw",
        "the RSA private key decrypts without padding (CKM_RSA_X_509)",
        |on| decrypts(on, &Mechanism::RsaX509, Some(on.self_test.wrapped())),
    ),
    unless(
        "CKA_ALLOWED_MECHANISMS",
        "decrypt-pkcs1",
        "the RSA private key decrypts with PKCS #1 v1.5 padding (CKM_RSA_PKCS)",
        |on| decrypts(on, &Mechanism::RsaPkcs, on.pkcs1),
    ),
    unless(
        "CKA_SIGN",
        "sign",
        "the RSA private key signs (CKM_RSA_PKCS)",
        |on| signs(on, &Mechanism::RsaPkcs, on.pair.private),
    ),
    plain(unless(
        "CKA_UNWRAP",
        "unwrap",
        "the RSA private key unwraps keys into objects",
        unwraps,
    )),
    sealed(never(
        "decrypt-sealed",
        "the RSA private key of a sealed wrapping key decrypts user keys",
        |on| decrypts_oaep(on, on.self_test.wrapped()),
    )),
    sealed(unless(
        "CKA_ALLOWED_MECHANISMS",
        "unwrap-pkcs1",
        "the RSA private key unwraps with PKCS #1 v1.5 padding (CKM_RSA_PKCS)",
        |on| match on.pkcs1 {
            Some(wrapped) => unwraps_bytes(on, &Mechanism::RsaPkcs, wrapped),
            None => Ok(Done::NotMade),
        },
    )),
    sealed(never(
        "copy-object-readable",
        "a readable copy of an unwrapped user key can be made",
        |on| {
            on_unwrapped(on, |object| {
                copies(on, object, Some(Attribute::Sensitive(false)))
            })
        },
    )),
    sealed(never(
        "set-object-readable",
        "an unwrapped user key can be made readable",
        |on| on_unwrapped(on, |object| sets(on, object, Attribute::Sensitive(false))),
    )),
    on_object(unless(
        "CKA_ALLOWED_MECHANISMS",
        "hmac-sha224",
        "the integrity key makes MACs with another hash (CKM_SHA224_HMAC)",
        |on| signs(on, &Mechanism::Sha224Hmac, on.integrity()),
    )),
    on_object(unless(
        "CKA_ALLOWED_MECHANISMS",
        "hmac-sha512",
        "the integrity key makes MACs with another hash (CKM_SHA512_HMAC)",
        |on| signs(on, &Mechanism::Sha512Hmac, on.integrity()),
    )),
    input("verify-short-mac", "a truncated MAC verifies", |on| {
        verifies(on, 31)
    }),
    input("verify-empty-mac", "an empty MAC verifies", |on| {
        verifies(on, 0)
    }),
    plain(input(
        "decrypt-truncated",
        "a truncated ciphertext decrypts",
        // The ciphertext is truncated at its end. If only a leading zero byte were removed, the ciphertext would be the
        // same number, which some tokens accept.
        |on| {
            let wrapped = on.self_test.wrapped();
            decrypts_oaep(on, &wrapped[..wrapped.len() - 1])
        },
    )),
    plain(input(
        "decrypt-extended",
        "a ciphertext that is too long can be decrypted",
        |on| decrypts_oaep(on, &[on.self_test.wrapped(), &[0]].concat()),
    )),
    sealed(input(
        "unwrap-truncated",
        "a truncated ciphertext can be unwrapped",
        |on| {
            let wrapped = on.self_test.wrapped();
            unwraps_bytes(on, &on.self_test.mechanism(), &wrapped[..wrapped.len() - 1])
        },
    )),
    sealed(input(
        "unwrap-extended",
        "a ciphertext that is too long can be unwrapped",
        |on| {
            let extended = [on.self_test.wrapped(), &[0]].concat();
            unwraps_bytes(on, &on.self_test.mechanism(), &extended)
        },
    )),
    changes(
        "set-private-extractable",
        "the RSA private key can be made extractable",
        |on| sets(on, on.pair.private, Attribute::Extractable(true)),
    ),
    changes(
        "set-private-readable",
        "the RSA private key can be made readable",
        |on| sets(on, on.pair.private, Attribute::Sensitive(false)),
    ),
    on_object(changes(
        "set-integrity-extractable",
        "the integrity key can be made extractable",
        |on| sets(on, on.integrity(), Attribute::Extractable(true)),
    )),
    on_object(changes(
        "set-integrity-readable",
        "the integrity key can be made readable",
        |on| sets(on, on.integrity(), Attribute::Sensitive(false)),
    )),
];

const fn never(
    name: &'static str,
    meaning: &'static str,
    run: fn(&Subjects<'_>) -> Result<Done, Error>,
) -> NegativeTest {
    NegativeTest {
        name,
        meaning,
        accepted_by: None,
        changes_the_key: false,
        needs_integrity_object: false,
        purpose: None,
        can_be_spared: false,
        run,
    }
}

const fn on_object(test: NegativeTest) -> NegativeTest {
    NegativeTest {
        needs_integrity_object: true,
        ..test
    }
}

/// Makes a test of plain wrapping keys only.
const fn plain(test: NegativeTest) -> NegativeTest {
    NegativeTest {
        purpose: Some(Purpose::Plain),
        ..test
    }
}

/// Makes a test of sealed wrapping keys only.
const fn sealed(test: NegativeTest) -> NegativeTest {
    NegativeTest {
        purpose: Some(Purpose::Sealed),
        ..test
    }
}

/// Makes a test that sends invalid input, which the token must reject.
const fn input(
    name: &'static str,
    meaning: &'static str,
    run: fn(&Subjects<'_>) -> Result<Done, Error>,
) -> NegativeTest {
    NegativeTest {
        can_be_spared: true,
        ..never(name, meaning, run)
    }
}

const fn unless(
    exception: &'static str,
    name: &'static str,
    meaning: &'static str,
    run: fn(&Subjects<'_>) -> Result<Done, Error>,
) -> NegativeTest {
    NegativeTest {
        accepted_by: Some(exception),
        can_be_spared: true,
        ..never(name, meaning, run)
    }
}

const fn changes(
    name: &'static str,
    meaning: &'static str,
    run: fn(&Subjects<'_>) -> Result<Done, Error>,
) -> NegativeTest {
    NegativeTest {
        changes_the_key: true,
        ..never(name, meaning, run)
    }
}

/// The settings for the tests.
#[derive(Clone, Copy, Debug)]
pub(super) struct Terms<'a> {
    /// The configured attribute exceptions. If an exception accepts a failed test, the risk is reported, and the token
    /// is used.
    pub(super) exceptions: &'a [String],
    /// The names of the tests that are not run.
    pub(super) spared: &'a [String],
}

/// The results of negative tests that do not prevent the use of the token.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Report {
    /// The meanings of failed tests that an exception accepts.
    pub(super) given_away: Vec<&'static str>,
    /// The names of the tests that cannot be run on this token.
    pub(super) not_made: Vec<&'static str>,
}

/// Runs the tests on one key. Each test gets its own session, because some tokens leave a failed operation active in
/// its session.
pub(super) fn run(
    open: impl Fn() -> Result<KeySession, Fault>,
    pair: &KeyPair,
    public: &PublicSide,
    self_test: &SelfTest,
    subject: Subject,
    terms: Terms<'_>,
) -> Result<Report, Fault> {
    let mut report = Report::default();
    let is_wanted = |test: &NegativeTest| {
        let is_spared = terms.spared.iter().any(|name| name == test.name);
        !(is_spared || test.changes_the_key && subject == Subject::InUse)
    };
    for_each_wanted(
        open,
        pair,
        public,
        self_test,
        is_wanted,
        |test, result, _| {
            match result {
                Ok(Done::Nothing) => {}
                Ok(Done::NotMade) => report.not_made.push(test.name),
                Ok(Done::Kept(fault)) => {
                    let left = "the object that a negative test made was not removed; find and remove it with the vendor's tool";
                    return Err(succeeded(test, pair).with(&format!("{left} ({fault})")));
                }
                Ok(Done::It) if is_accepted(test, terms) => report.given_away.push(test.meaning),
                Ok(Done::It) => return Err(succeeded(test, pair)),
                Err(error) if is_a_refusal(&error) => {}
                Err(error) => return Err(Fault::from(error).about(test.name)),
            }
            Ok(())
        },
    )?;
    Ok(report)
}

/// Runs the requested tests that apply to the key, and passes each result and the session of the test to `take`. The
/// run ends if a session cannot be opened or `take` returns an error.
fn for_each_wanted(
    open: impl Fn() -> Result<KeySession, Fault>,
    pair: &KeyPair,
    public: &PublicSide,
    self_test: &SelfTest,
    is_wanted: impl Fn(&NegativeTest) -> bool,
    mut take: impl FnMut(&'static NegativeTest, Result<Done, Error>, &KeySession) -> Result<(), Fault>,
) -> Result<(), Fault> {
    let keeper = open()?;
    let helpers = Helpers::make(&keeper.session, pair);
    let pkcs1 = pkcs1_ciphertext(public, self_test);
    for test in TESTS {
        if !test.applies_to(pair) || !is_wanted(test) {
            continue;
        }
        let session = open()?;
        let result = (test.run)(&Subjects {
            session: &session.session,
            pair,
            self_test,
            helpers,
            pkcs1: pkcs1.as_deref(),
        });
        take(test, result, &session)?;
    }
    Ok(())
}

fn is_accepted(test: &NegativeTest, terms: Terms<'_>) -> bool {
    test.accepted_by
        .is_some_and(|exception| terms.exceptions.iter().any(|name| name == exception))
}

/// Makes a ciphertext in software. Returns `None` if the library does not support this public key.
fn pkcs1_ciphertext(public: &PublicSide, self_test: &SelfTest) -> Option<Vec<u8>> {
    let key = PublicEncryptingKey::from_der(&public.spki).ok()?;
    let key = Pkcs1PublicEncryptingKey::new(key).ok()?;
    let mut ciphertext = vec![0; key.ciphertext_size()];
    key.encrypt(self_test.plaintext(), &mut ciphertext).ok()?;
    Some(ciphertext)
}

fn succeeded(test: &NegativeTest, pair: &KeyPair) -> Fault {
    let NegativeTest { name, meaning, .. } = test;
    let way_out = test.accepted_by.map_or_else(String::new, |exception| {
        format!(
            ". If the token cannot prevent this, set `attribute_exceptions = [\"{exception}\"]` in [token] to accept the risk"
        )
    });
    Fault::new(
        Class::Untrusted,
        format!(
            "key {} must not be used: {meaning}, although the attributes of the key forbid this (test `{name}`){way_out}",
            pair.id
        ),
    )
}
