//! Tests whether the token can do sealed releases. All tests use session objects, and the recipients are key pairs in
//! the memory of this process.

use aws_lc_rs::rsa::KeySize;
use cryptoki::{
    error::Error,
    mechanism::Mechanism,
    object::{Attribute, ObjectHandle},
};

use keybroker_core::envelope::Algorithm;
use keybroker_pkcs11_ffi::{Session, WrapMechanism};
use keybroker_worker_protocol::{
    oaep::WrapKey,
    report::{Answer, SUCCEEDED, SealedRelease, Sealing, WORKS},
};

use super::{MODULUS_BITS, code, destroy, name_of, told};
use crate::{
    calling,
    classify::{Class, Fault, is_a_refusal},
    keys::{self, Lifetime, object_template, unwrap_template},
    negative::aes_key,
    oaep,
    open::OpenToken,
    recipients::{Recipient, Recipients},
    sealed::{RecipientPair, SealedKey, is_readable},
};

const PLAINTEXT: [u8; 32] = [0x5e; 32];
const RECIPIENTS: [(KeySize, &str); 3] = [
    (KeySize::Rsa2048, "RSA-2048"),
    (KeySize::Rsa3072, "RSA-3072"),
    (KeySize::Rsa4096, "RSA-4096"),
];
const ALGORITHMS: [(Algorithm, &str); 2] = [
    (Algorithm::RsaOaepSha256, "SHA-256"),
    (Algorithm::RsaOaepSha1, "SHA-1"),
];
const REFUSED: &str = "refused";

/// An operation with an unwrapped object. Returns whether the operation had its effect.
type OnObject = fn(&Session, ObjectHandle) -> Result<bool, Error>;

const KEY: &str = "a sealed wrapping key";
const DECRYPTS: &str = "decrypting with the sealed wrapping key";
const COPIES: &str = "a readable copy of the object";
const CHANGES: &str = "making the object readable";
/// Attempts to unwrap into a readable object, with the value of `CKA_SENSITIVE` in the template of the object.
const UNWRAPS: [(&str, Option<bool>); 3] = [
    (
        "unwrapping into a readable object with CKA_SENSITIVE=true",
        Some(true),
    ),
    (
        "unwrapping into a readable object with CKA_SENSITIVE=false",
        Some(false),
    ),
    (
        "unwrapping into a readable object without CKA_SENSITIVE",
        None,
    ),
];
/// The end of the name of a test with `CKA_UNWRAP_TEMPLATE`.
const WITH_TEMPLATE: &str = ", with CKA_UNWRAP_TEMPLATE";

/// The key pair of a recipient, with a name for the report.
struct KeyOfRecipient {
    name: &'static str,
    pair: RecipientPair,
}

impl KeyOfRecipient {
    fn generate(size: KeySize, name: &'static str) -> Result<Self, Fault> {
        let pair = RecipientPair::generate(size)?;
        Ok(Self { name, pair })
    }

    /// Decrypts the token's answer in software, and compares the plaintext.
    fn open(&self, sealed: &[u8], algorithm: Algorithm) -> Result<(), Fault> {
        if *self.pair.open(sealed, algorithm)? == PLAINTEXT {
            return Ok(());
        }
        Err(Fault::new(Class::Untrusted, "another plaintext"))
    }
}

/// A sealed release that works.
pub(crate) struct Working {
    key: SealedKey,
    recipient: Recipient,
    algorithm: Algorithm,
}

impl Working {
    pub(crate) fn release(&self, session: &Session) -> Result<Vec<u8>, Fault> {
        self.key.release(session, self.recipient, self.algorithm)
    }
}

/// The tests, with their results so far.
pub(crate) struct Tests<'a> {
    token: &'a OpenToken,
    /// The session that keeps the keys of the tests.
    keeper: &'a Session,
    /// The attributes that the token refuses in templates.
    left_out: Vec<String>,
    /// The algorithm with which the user key is wrapped on the token.
    algorithm: Algorithm,
    recipients: Vec<KeyOfRecipient>,
    positive: Vec<Answer>,
    forbidden: Vec<Answer>,
    working: Option<Working>,
}

impl<'a> Tests<'a> {
    /// Tests a sealed wrapping key without `CKA_UNWRAP_TEMPLATE`.
    pub(crate) fn without_template(
        token: &'a OpenToken,
        keeper: &'a Session,
        left_out: Vec<String>,
        algorithm: Algorithm,
    ) -> Result<Self, Fault> {
        let recipients = RECIPIENTS.map(|(size, name)| KeyOfRecipient::generate(size, name));
        let mut tests = Self {
            token,
            keeper,
            left_out,
            algorithm,
            recipients: recipients.into_iter().collect::<Result<_, _>>()?,
            positive: Vec::new(),
            forbidden: Vec::new(),
            working: None,
        };
        let key = tests.key(None);
        note(&mut tests.positive, KEY, &key);
        if let Ok(key) = key {
            tests.releases(&key);
            if tests.working.is_some() {
                tests.misuses(&key)?;
            }
        }
        Ok(tests)
    }

    /// The sealed release that works, if there is one.
    pub(crate) fn working(&self) -> Option<&Working> {
        self.working.as_ref()
    }

    /// Tests a sealed wrapping key with `CKA_UNWRAP_TEMPLATE`, and returns all results. The value of this attribute
    /// contains addresses. If a module passes the value to another process unchanged, the other process may crash, so
    /// the report makes this test after all other tests with keys.
    pub(crate) fn with_template(mut self) -> Result<SealedRelease, Fault> {
        self.enforcement()?;
        let reason = self.reason();
        Ok(SealedRelease {
            result: match reason {
                Some(_) => Sealing::Unavailable,
                None if self.is_enforced() => Sealing::Enforced,
                None => Sealing::Worker,
            },
            reason,
            positive: self.positive,
            forbidden: self.forbidden,
        })
    }

    fn enforcement(&mut self) -> Result<(), Fault> {
        let Some(working) = &self.working else {
            return Ok(());
        };
        let (recipient, algorithm) = (working.recipient, working.algorithm);
        let key = self.key(Some(&unwrap_template()));
        note(&mut self.positive, &format!("{KEY}{WITH_TEMPLATE}"), &key);
        let Ok(key) = key else {
            return Ok(());
        };
        let released = self.release(&key, &self.recipients[0], recipient, algorithm);
        note(
            &mut self.positive,
            &format!("a sealed release{WITH_TEMPLATE}"),
            &released,
        );
        if released.is_ok() {
            self.unwraps(&key, WITH_TEMPLATE)?;
        }
        Ok(())
    }

    /// Returns the reason why the token cannot be used for sealed release.
    fn reason(&self) -> Option<String> {
        let is_reason = |answer: &&Answer| match &self.working {
            None => answer.result != WORKS,
            Some(_) => {
                answer.result == SUCCEEDED && [DECRYPTS, COPIES, CHANGES].contains(&&*answer.name)
            }
        };
        let mut answers = self.positive.iter().chain(&self.forbidden);
        let answer = answers.find(is_reason)?;
        Some(format!("{}: {}", answer.name, answer.result))
    }

    fn is_enforced(&self) -> bool {
        let refuses = |name: &str| {
            let mut answers = self.forbidden.iter();
            answers.any(|answer| answer.name == name && answer.result.starts_with(REFUSED))
        };
        let unwraps_safely = |end: &str| {
            let mut names = UNWRAPS.iter().map(|(name, _)| format!("{name}{end}"));
            names.all(|name| refuses(&name))
        };
        let is_kept = [COPIES, CHANGES].into_iter().all(refuses);
        is_kept && (unwraps_safely("") || unwraps_safely(WITH_TEMPLATE))
    }

    /// Makes a sealed wrapping key, and wraps the known plaintext under it in software.
    fn key(&self, unwrapped: Option<&[Attribute]>) -> Result<SealedKey, Fault> {
        let id = keys::no_id();
        let adapted = |template| {
            keys::adapted(template, Lifetime::Session, |attribute| {
                self.left_out.contains(&name_of(attribute))
            })
        };
        let public = adapted(keys::public_template(id, MODULUS_BITS));
        let private = adapted(keys::sealed_template(id));
        let mechanism = Mechanism::RsaPkcsKeyPairGen;
        calling::next("C_GenerateKeyPair");
        let (_, private) = match unwrapped {
            Some(unwrapped) => self
                .keeper
                .generate_unwrapping_pair(&mechanism, &public, &private, unwrapped)?,
            None => self
                .keeper
                .generate_key_pair(&mechanism, &public, &private)?,
        };
        let public = keys::public_side_of(self.keeper, private, "sealed wrapping key")?;
        let wrapped = WrapKey::new(&public.spki, self.algorithm)
            .and_then(|key| key.wrap(&PLAINTEXT))
            .map_err(|error| Fault::new(Class::Untrusted, error.to_string()))?;
        Ok(SealedKey {
            private,
            algorithm: self.algorithm,
            wrapped,
        })
    }

    /// Tests a release to each recipient with each algorithm, beginning with the algorithm with which user keys are
    /// wrapped. A release works if every recipient can open it.
    fn releases(&mut self, key: &SealedKey) {
        let mut imported = Recipients::default();
        let mut algorithms = ALGORITHMS;
        algorithms.sort_by_key(|(algorithm, _)| *algorithm != self.algorithm);
        for (algorithm, hash) in algorithms {
            let mut first = None;
            let mut is_complete = self.working.is_none();
            for recipient in &self.recipients {
                let name = format!("a sealed release to {} with {hash}", recipient.name);
                let released = imported
                    .object(self.keeper, recipient.pair.public.spki())
                    .and_then(|object| {
                        self.release(key, recipient, object, algorithm)?;
                        Ok(object)
                    });
                note(&mut self.positive, &name, &released);
                is_complete &= released.is_ok();
                first = first.or(released.ok());
            }
            if let (Some(recipient), true) = (first, is_complete) {
                self.working = Some(Working {
                    key: key.clone(),
                    recipient,
                    algorithm,
                });
            }
        }
    }

    /// Makes a sealed release in a separate session, and opens it in software.
    fn release(
        &self,
        key: &SealedKey,
        recipient: &KeyOfRecipient,
        object: Recipient,
        algorithm: Algorithm,
    ) -> Result<(), Fault> {
        let session = self.token.session(&[])?;
        let sealed = key.release(&session.session, object, algorithm)?;
        recipient.open(&sealed, algorithm)
    }

    /// Tests forbidden operations with the key and with the unwrapped object.
    fn misuses(&mut self, key: &SealedKey) -> Result<(), Fault> {
        let decrypts = |session: &Session| {
            calling::next("C_Decrypt");
            let mechanism = oaep::mechanism(key.algorithm);
            let decrypted = session.decrypt(&mechanism, key.private, &key.wrapped);
            decrypted.map(|_| true)
        };
        self.forbid(DECRYPTS, key, decrypts)?;
        self.unwraps(key, "")?;
        let attempts: [(&str, OnObject); 3] = [
            (COPIES, copies),
            (CHANGES, sets),
            ("wrapping the object under an AES key", wraps),
        ];
        for (name, attempt) in attempts {
            self.forbid(name, key, |session| {
                let object = key.unwrap(session, &object_template())?;
                let done = attempt(session, object);
                destroy(session, object);
                done
            })?;
        }
        Ok(())
    }

    /// Tries to unwrap into a readable object, with several templates of the object.
    fn unwraps(&mut self, key: &SealedKey, end: &str) -> Result<(), Fault> {
        for (name, sensitive) in UNWRAPS {
            self.forbid(&format!("{name}{end}"), key, |session| {
                key.unwraps_readable(session, sensitive)
            })?;
        }
        Ok(())
    }

    /// Tries a forbidden operation in a separate session. `attempt` returns whether the operation had its effect. A
    /// refusal is a valid result only if the token still unwraps with this key, because a busy token refuses everything.
    fn forbid(
        &mut self,
        name: &str,
        key: &SealedKey,
        attempt: impl FnOnce(&Session) -> Result<bool, Error>,
    ) -> Result<(), Fault> {
        let attempted = attempt(&self.token.session(&[])?.session);
        let unwraps = || -> Result<(), Fault> {
            let session = self.token.session(&[])?;
            key.with_unwrapped(&session.session, |_| Ok(()))
        };
        let result = match &attempted {
            Ok(true) => SUCCEEDED.to_owned(),
            Ok(false) => REFUSED.to_owned(),
            Err(error) if is_a_refusal(error) && unwraps().is_ok() => {
                format!("{REFUSED}: {}", code(error))
            }
            Err(error) => format!("not answered: {}", code(error)),
        };
        self.forbidden.push(told(name, result));
        Ok(())
    }
}

fn note<T>(answers: &mut Vec<Answer>, name: &str, result: &Result<T, Fault>) {
    let failure = result.as_ref().err().map(ToString::to_string);
    answers.push(told(name, failure.unwrap_or_else(|| WORKS.to_owned())));
}

fn copies(session: &Session, object: ObjectHandle) -> Result<bool, Error> {
    calling::next("C_CopyObject");
    let template = [Attribute::Token(false), Attribute::Sensitive(false)];
    let copy = session.copy_object(object, &template)?;
    let is_readable = is_readable(session, copy);
    destroy(session, copy);
    is_readable
}

fn sets(session: &Session, object: ObjectHandle) -> Result<bool, Error> {
    calling::next("C_SetAttributeValue");
    session.update_attributes(object, &[Attribute::Sensitive(false)])?;
    is_readable(session, object)
}

/// Wraps an object under an AES key with each of three mechanisms, until a mechanism works.
fn wraps(session: &Session, object: ObjectHandle) -> Result<bool, Error> {
    let aes = aes_key(session)?;
    calling::next("C_WrapKey");
    let kwp = || session.wrap_key_with(WrapMechanism::AesKeyWrapKwp, aes, object);
    session
        .wrap_key(&Mechanism::AesKeyWrap, aes, object)
        .or_else(|_| session.wrap_key(&Mechanism::AesKeyWrapPad, aes, object))
        .or_else(|error| kwp().unwrap_or(Err(error)))
        .map(|_| true)
}
