//! Negative tests: what must fail with a key is tried. The attribute check believes what a token says of a key; these
//! tests do not. If the token performs one of the operations, the test fails: the token is not used, and the message
//! names the test.
//!
//! A failed test that a named exception of the configuration accepts is reported instead of refused. No exception
//! accepts a key that can be read, wrapped, or copied with weaker attributes.
//!
//! Mitigation: M16 of `THREAT_MODEL.md`.

use cryptoki::{
    context::Function,
    error::{Error, RvError},
    mechanism::Mechanism,
    object::{Attribute, AttributeType, KeyType, ObjectClass, ObjectHandle},
    session::Session,
};

use crate::{
    calling,
    classify::{Class, Fault, classify},
    keys::{KeyPair, KeySession},
    operation::SelfTest,
};

/// Length of the AES key that the keys are wrapped under, in bytes.
const AES_KEY_BYTES: u64 = 32;
/// Any: nothing is ever unwrapped again.
const IV: [u8; 16] = [0; 16];

/// Whose keys are tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Subject {
    /// Keys that records are wrapped under: only what changes nothing if it succeeds.
    InUse,
    /// Keys that were made to be tried, and end with the session.
    Throwaway,
}

/// One thing that must fail.
#[derive(Clone, Copy)]
pub struct NegativeTest {
    /// Its name in `token.spared_tests` and in messages.
    pub name: &'static str,
    /// What it would mean if the token did it, as a sentence without its end.
    pub meaning: &'static str,
    /// The exception that gives it away.
    pub accepted_by: Option<&'static str>,
    /// Whether it changes a key when it succeeds, so that it is run on throwaway keys only.
    pub changes_the_key: bool,
    run: fn(&Subjects<'_>) -> Result<Done, Error>,
}

impl std::fmt::Debug for NegativeTest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("NegativeTest").field(&self.name).finish()
    }
}

/// What the token did in a test that it did not fail by a return code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Done {
    /// What must fail.
    It,
    /// Nothing that matters: an empty answer, or the test cannot be made on this token.
    Nothing,
}

/// What a test has at hand: a session for itself, the keys, and an AES key to wrap them under.
struct Subjects<'a> {
    session: &'a Session,
    pair: &'a KeyPair,
    self_test: &'a SelfTest,
    aes: Option<ObjectHandle>,
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
    never(
        "read-integrity-key",
        "the integrity key can be read",
        |on| readable(on, on.pair.binding, AttributeType::Value),
    ),
    never(
        "wrap-private-aes-kw",
        "the RSA private key can be wrapped with CKM_AES_KEY_WRAP",
        |on| wraps(on, &Mechanism::AesKeyWrap, on.pair.private),
    ),
    never(
        "wrap-private-aes-kwp",
        "the RSA private key can be wrapped with CKM_AES_KEY_WRAP_PAD",
        |on| wraps(on, &Mechanism::AesKeyWrapPad, on.pair.private),
    ),
    never(
        "wrap-private-aes-cbc",
        "the RSA private key can be wrapped with CKM_AES_CBC_PAD",
        |on| wraps(on, &Mechanism::AesCbcPad(IV), on.pair.private),
    ),
    never(
        "wrap-integrity-aes-kw",
        "the integrity key can be wrapped with CKM_AES_KEY_WRAP",
        |on| wraps(on, &Mechanism::AesKeyWrap, on.pair.binding),
    ),
    never(
        "wrap-integrity-aes-kwp",
        "the integrity key can be wrapped with CKM_AES_KEY_WRAP_PAD",
        |on| wraps(on, &Mechanism::AesKeyWrapPad, on.pair.binding),
    ),
    never(
        "wrap-integrity-aes-cbc",
        "the integrity key can be wrapped with CKM_AES_CBC_PAD",
        |on| wraps(on, &Mechanism::AesCbcPad(IV), on.pair.binding),
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
    never(
        "copy-integrity-extractable",
        "an extractable copy of the integrity key can be made",
        |on| copies(on, on.pair.binding, Some(Attribute::Extractable(true))),
    ),
    never(
        "copy-integrity-readable",
        "a readable copy of the integrity key can be made",
        |on| copies(on, on.pair.binding, Some(Attribute::Sensitive(false))),
    ),
    unless(
        "CKA_COPYABLE",
        "copy-private",
        "the RSA private key can be copied",
        |on| copies(on, on.pair.private, None),
    ),
    unless(
        "CKA_COPYABLE",
        "copy-integrity",
        "the integrity key can be copied",
        |on| copies(on, on.pair.binding, None),
    ),
    unless(
        "CKA_ALLOWED_MECHANISMS",
        "decrypt-raw",
        "the RSA private key decrypts without padding (CKM_RSA_X_509)",
        |on| decrypts(on, &Mechanism::RsaX509),
    ),
    unless(
        "CKA_ALLOWED_MECHANISMS",
        "decrypt-pkcs1",
        "the RSA private key decrypts with PKCS #1 v1.5 padding (CKM_RSA_PKCS)",
        |on| decrypts(on, &Mechanism::RsaPkcs),
    ),
    unless(
        "CKA_SIGN",
        "sign",
        "the RSA private key signs (CKM_RSA_PKCS)",
        |on| {
            calling::next("C_Sign");
            on.session
                .sign(&Mechanism::RsaPkcs, on.pair.private, b"keybroker")
                .map(|_| Done::It)
        },
    ),
    unless(
        "CKA_UNWRAP",
        "unwrap",
        "the RSA private key unwraps keys into objects",
        unwraps,
    ),
    unless(
        "CKA_ALLOWED_MECHANISMS",
        "hmac-sha224",
        "the integrity key makes MACs with another hash (CKM_SHA224_HMAC)",
        |on| {
            calling::next("C_Sign");
            on.session
                .sign(&Mechanism::Sha224Hmac, on.pair.binding, b"keybroker")
                .map(|_| Done::It)
        },
    ),
    unless(
        "CKA_ALLOWED_MECHANISMS",
        "hmac-sha512",
        "the integrity key makes MACs with another hash (CKM_SHA512_HMAC)",
        |on| {
            calling::next("C_Sign");
            on.session
                .sign(&Mechanism::Sha512Hmac, on.pair.binding, b"keybroker")
                .map(|_| Done::It)
        },
    ),
    never(
        "verify-short-mac",
        "a MAC that is cut short verifies",
        |on| verifies(on, 31),
    ),
    never("verify-empty-mac", "an empty MAC verifies", |on| {
        verifies(on, 0)
    }),
    never(
        "decrypt-truncated",
        "a ciphertext that is cut short decrypts",
        |on| decrypts_oaep(on, &on.self_test.wrapped()[1..]),
    ),
    never(
        "decrypt-extended",
        "a ciphertext that is too long decrypts",
        |on| decrypts_oaep(on, &[on.self_test.wrapped(), &[0]].concat()),
    ),
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
    changes(
        "set-integrity-extractable",
        "the integrity key can be made extractable",
        |on| sets(on, on.pair.binding, Attribute::Extractable(true)),
    ),
    changes(
        "set-integrity-readable",
        "the integrity key can be made readable",
        |on| sets(on, on.pair.binding, Attribute::Sensitive(false)),
    ),
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
        run,
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

/// What the settings say of the tests.
#[derive(Clone, Copy, Debug)]
pub(super) struct Terms<'a> {
    /// Exceptions by name: what they give up is reported, not refused.
    pub(super) exceptions: &'a [String],
    /// Tests that the token is spared, by name.
    pub(super) spared: &'a [String],
}

/// Runs the tests on one key, each in a session for itself, because some tokens leave a failed operation stuck in theirs. Returns
/// the meanings of those that succeeded and are excused.
pub(super) fn run(
    open: impl Fn() -> Result<KeySession, Fault>,
    pair: &KeyPair,
    self_test: &SelfTest,
    subject: Subject,
    terms: Terms<'_>,
) -> Result<Vec<&'static str>, Fault> {
    let keeper = open()?;
    // Without one the wrap tests cannot be made. The key ends with its session.
    let aes = aes_key(&keeper.session).ok();
    let mut given_away = Vec::new();
    for test in TESTS {
        let is_spared = terms.spared.iter().any(|name| name == test.name);
        if is_spared || test.changes_the_key && subject == Subject::InUse {
            continue;
        }
        let session = open()?;
        let subjects = Subjects {
            session: &session.session,
            pair,
            self_test,
            aes,
        };
        match (test.run)(&subjects) {
            Ok(Done::Nothing) => {}
            Ok(Done::It) => {
                let is_excused = test
                    .accepted_by
                    .is_some_and(|exception| terms.exceptions.iter().any(|name| name == exception));
                if !is_excused {
                    return Err(succeeded(test, pair));
                }
                given_away.push(test.meaning);
            }
            Err(error) if is_a_refusal(&error) => {}
            Err(error) => return Err(Fault::from(error).about(test.name)),
        }
    }
    Ok(given_away)
}

fn succeeded(test: &NegativeTest, pair: &KeyPair) -> Fault {
    let NegativeTest { name, meaning, .. } = test;
    let way_out = test.accepted_by.map_or_else(String::new, |exception| {
        format!(
            ". If the token cannot prevent it, `attribute_exceptions = [\"{exception}\"]` in [token] accepts it"
        )
    });
    Fault::new(
        Class::Untrusted,
        format!(
            "key {} must not be used: {meaning}, although its attributes forbid it (test `{name}`){way_out}",
            pair.id
        ),
    )
}

/// Any code refuses, but one that says that the token is gone or has no room.
fn is_a_refusal(error: &Error) -> bool {
    match error {
        Error::Pkcs11(code, _) => !matches!(classify(*code), Class::TokenLost | Class::BackOff),
        Error::NotSupported | Error::NullFunctionPointer => true,
        _ => false,
    }
}

/// An AES key that ends with the session and may wrap.
fn aes_key(session: &Session) -> Result<ObjectHandle, Error> {
    let template = [
        Attribute::Class(ObjectClass::SECRET_KEY),
        Attribute::KeyType(KeyType::AES),
        Attribute::ValueLen(AES_KEY_BYTES.into()),
        Attribute::Token(false),
        Attribute::Private(true),
        Attribute::Sensitive(true),
        Attribute::Extractable(false),
        Attribute::Wrap(true),
    ];
    calling::next("C_GenerateKey");
    session.generate_key(&Mechanism::AesKeyGen, &template)
}

fn readable(on: &Subjects<'_>, object: ObjectHandle, kind: AttributeType) -> Result<Done, Error> {
    calling::next("C_GetAttributeValue");
    let read = on.session.get_attributes(object, &[kind])?;
    let is_there = read.iter().any(|attribute| match attribute {
        Attribute::PrivateExponent(value) | Attribute::Prime1(value) | Attribute::Value(value) => {
            !value.is_empty()
        }
        _ => false,
    });
    Ok(if is_there { Done::It } else { Done::Nothing })
}

fn wraps(on: &Subjects<'_>, mechanism: &Mechanism<'_>, key: ObjectHandle) -> Result<Done, Error> {
    let Some(aes) = on.aes else {
        return Ok(Done::Nothing);
    };
    calling::next("C_WrapKey");
    let wrapped = on.session.wrap_key(mechanism, aes, key)?;
    Ok(if wrapped.is_empty() {
        Done::Nothing
    } else {
        Done::It
    })
}

fn copies(on: &Subjects<'_>, key: ObjectHandle, weaker: Option<Attribute>) -> Result<Done, Error> {
    let template: Vec<Attribute> = [Attribute::Token(false)]
        .into_iter()
        .chain(weaker)
        .collect();
    calling::next("C_CopyObject");
    let copy = on.session.copy_object(key, &template)?;
    calling::next("C_DestroyObject");
    // It ends with the session at the latest.
    let _destroyed = on.session.destroy_object(copy);
    Ok(Done::It)
}

/// A token may refuse the mechanism when the operation begins or when it is done. If it goes as far as the ciphertext, it has
/// accepted the mechanism.
fn decrypts(on: &Subjects<'_>, mechanism: &Mechanism<'_>) -> Result<Done, Error> {
    calling::next("C_Decrypt");
    match on
        .session
        .decrypt(mechanism, on.pair.private, on.self_test.wrapped())
    {
        Ok(_) => Ok(Done::It),
        Err(Error::Pkcs11(
            RvError::EncryptedDataInvalid | RvError::EncryptedDataLenRange,
            Function::Decrypt,
        )) => Ok(Done::It),
        Err(error) => Err(error),
    }
}

fn decrypts_oaep(on: &Subjects<'_>, wrapped: &[u8]) -> Result<Done, Error> {
    calling::next("C_Decrypt");
    let plaintext = on
        .session
        .decrypt(&on.self_test.mechanism(), on.pair.private, wrapped)?;
    Ok(if plaintext.is_empty() {
        Done::Nothing
    } else {
        Done::It
    })
}

fn unwraps(on: &Subjects<'_>) -> Result<Done, Error> {
    let template = [
        Attribute::Class(ObjectClass::SECRET_KEY),
        Attribute::KeyType(KeyType::GENERIC_SECRET),
        Attribute::Token(false),
        Attribute::Private(true),
    ];
    calling::next("C_UnwrapKey");
    let object = on.session.unwrap_key(
        &on.self_test.mechanism(),
        on.pair.private,
        on.self_test.wrapped(),
        &template,
    )?;
    calling::next("C_DestroyObject");
    // It ends with the session at the latest.
    let _destroyed = on.session.destroy_object(object);
    Ok(Done::It)
}

/// A MAC of which only the first bytes are shown.
fn verifies(on: &Subjects<'_>, length: usize) -> Result<Done, Error> {
    const MESSAGE: &[u8] = b"keybroker";
    calling::next("C_Sign");
    let mac = on
        .session
        .sign(&Mechanism::Sha256Hmac, on.pair.binding, MESSAGE)?;
    calling::next("C_Verify");
    on.session.verify(
        &Mechanism::Sha256Hmac,
        on.pair.binding,
        MESSAGE,
        &mac[..length.min(mac.len())],
    )?;
    Ok(Done::It)
}

fn sets(on: &Subjects<'_>, key: ObjectHandle, attribute: Attribute) -> Result<Done, Error> {
    calling::next("C_SetAttributeValue");
    on.session.update_attributes(key, &[attribute])?;
    Ok(Done::It)
}
