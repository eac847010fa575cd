//! The four operations on the token, and the self-test (known-answer test) that uses them.
//!
//! Mitigations: M9, M10 of `THREAT_MODEL.md`.

use cryptoki::{
    context::Function,
    error::{Error, RvError},
    mechanism::Mechanism,
    object::ObjectHandle,
};
use keybroker_pkcs11_ffi::Session;
use subtle::ConstantTimeEq as _;
use zeroize::Zeroizing;

use keybroker_core::{
    envelope::{Algorithm, MAC_BYTES, Mac},
    key::{Purpose, WrappingKeyId},
};
use keybroker_worker_protocol::oaep::WrapKey;

use crate::{
    calling,
    classify::{Class, Fault},
    keys::{KeyPair, KeySession, PublicSide},
    mac_key::MacKey,
    oaep,
    sealed::{RecipientPair, SealedKey},
};

/// Size of the buffer for a plaintext, in bytes: the length of the longest modulus. Some modules require a buffer of
/// the length of the modulus.
const PLAINTEXT_BYTES_MAX: usize = 512;
/// Size of the buffer for a MAC, in bytes. The buffer is larger than a MAC, so that a MAC of a wrong length is
/// detected.
const SIGNATURE_BYTES_MAX: usize = 512;
/// Length of the self-test's plaintext, in bytes.
const SELF_TEST_BYTES: usize = 32;

/// Decrypts with the RSA key (`C_Decrypt`).
pub(super) fn decrypt(
    session: &Session,
    pair: &KeyPair,
    algorithm: Algorithm,
    wrapped: &[u8],
) -> Result<Zeroizing<Vec<u8>>, Fault> {
    calling::next("C_Decrypt");
    let mut plaintext = Zeroizing::new(vec![0; PLAINTEXT_BYTES_MAX]);
    let length = session.decrypt_into(
        &oaep::mechanism(algorithm),
        pair.private,
        wrapped,
        &mut plaintext,
    )?;
    plaintext.truncate(length);
    Ok(plaintext)
}

/// Computes a MAC. If the integrity key is on the token, the token computes the MAC with `C_Sign`; otherwise, this
/// process computes the MAC.
pub(super) fn mac(session: &Session, pair: &KeyPair, message: &[u8]) -> Result<Mac, Fault> {
    match &pair.integrity_key {
        MacKey::OnToken(object) => mac_with(session, *object, message),
        MacKey::InWorker(Some(secret)) => Ok(secret.mac(message)),
        MacKey::InWorker(None) => Err(not_unwrapped(pair.id)),
    }
}

fn not_unwrapped(id: WrappingKeyId) -> Fault {
    Fault::new(
        Class::Configuration,
        format!("the integrity key of wrapping key {id} was not unwrapped"),
    )
}

/// Computes a MAC with an integrity key that has no wrapping key yet (`C_Sign`).
pub(super) fn mac_with(session: &Session, key: ObjectHandle, message: &[u8]) -> Result<Mac, Fault> {
    calling::next("C_Sign");
    let mut made = [0; SIGNATURE_BYTES_MAX];
    let length = session.sign_into(&Mechanism::Sha256Hmac, key, message, &mut made)?;
    made.get(..length)
        .and_then(|mac| mac.try_into().ok())
        .ok_or_else(|| {
            Fault::new(
                Class::Untrusted,
                format!("the token made a MAC of {length} bytes instead of {MAC_BYTES}"),
            )
        })
}

/// Verifies a MAC with `C_Verify`. If the token does not have `C_Verify`, computes the MAC with `C_Sign` and compares
/// both MACs in constant time. If the integrity key is not on the token, this process verifies the MAC. The error for a
/// wrong MAC is [`Class::Input`] or, on some tokens, [`Class::Ambiguous`].
pub(super) fn verify(
    session: &Session,
    pair: &KeyPair,
    message: &[u8],
    mac: &[u8],
) -> Result<(), Fault> {
    if mac.len() != MAC_BYTES {
        return Err(Fault::new(Class::Input, "the MAC has the wrong length"));
    }
    let object = match &pair.integrity_key {
        MacKey::OnToken(object) => *object,
        MacKey::InWorker(Some(secret)) if secret.verifies(message, mac) => return Ok(()),
        MacKey::InWorker(Some(_)) => {
            return Err(Fault::new(Class::Input, "the MAC does not verify"));
        }
        MacKey::InWorker(None) => return Err(not_unwrapped(pair.id)),
    };
    calling::next("C_Verify");
    match session.verify(&Mechanism::Sha256Hmac, object, message, mac) {
        Ok(()) => Ok(()),
        Err(
            Error::NullFunctionPointer
            | Error::Pkcs11(RvError::FunctionNotSupported, Function::VerifyInit | Function::Verify),
        ) => {
            let right = self::mac(session, pair, message).map_err(not_about_the_mac)?;
            if bool::from(right.ct_eq(mac)) {
                Ok(())
            } else {
                Err(Fault::new(Class::Input, "the MAC does not verify"))
            }
        }
        Err(error) => Err(verify_fault(error)),
    }
}

/// Classifies a failed verification. Only `CKR_SIGNATURE_INVALID` and `CKR_SIGNATURE_LEN_RANGE`
/// from `C_Verify` itself mean that the MAC is wrong (PKCS#11 2.40, section 5.12). If `C_Verify`
/// returns another return code, the self-test shows whether the token works.
fn verify_fault(error: Error) -> Fault {
    let states_it = matches!(
        error,
        Error::Pkcs11(
            RvError::SignatureInvalid | RvError::SignatureLenRange,
            Function::Verify
        )
    );
    let fault = Fault::from(error);
    if states_it {
        fault
    } else {
        not_about_the_mac(fault)
    }
}

/// Changes the class of a fault from [`Class::Input`] to [`Class::Ambiguous`], because the fault
/// does not show that the MAC is wrong.
fn not_about_the_mac(fault: Fault) -> Fault {
    let class = match fault.class {
        Class::Input => Class::Ambiguous,
        class => class,
    };
    Fault { class, ..fault }
}

/// The self-test of one key: a ciphertext with its known plaintext. Each worker creates the self-test once and runs it
/// often.
#[derive(Clone, Debug)]
pub(super) struct SelfTest {
    algorithm: Algorithm,
    plaintext: [u8; SELF_TEST_BYTES],
    wrapped: Vec<u8>,
}

impl SelfTest {
    /// Creates the self-test by encrypting a random plaintext with the public key.
    pub(super) fn new(public: &PublicSide, algorithm: Algorithm) -> Result<Self, Fault> {
        let unfit = |what: String| Fault::new(Class::Untrusted, what);
        let mut plaintext = [0; SELF_TEST_BYTES];
        aws_lc_rs::rand::fill(&mut plaintext)
            .map_err(|_| unfit("the random generator failed".to_owned()))?;
        let wrapped = WrapKey::new(&public.spki, algorithm)
            .and_then(|key| key.wrap(&plaintext))
            .map_err(|error| unfit(error.to_string()))?;
        Ok(Self {
            algorithm,
            plaintext,
            wrapped,
        })
    }

    pub(super) fn algorithm(&self) -> Algorithm {
        self.algorithm
    }

    /// The known plaintext.
    pub(super) fn plaintext(&self) -> &[u8] {
        &self.plaintext
    }

    /// The ciphertext of the known plaintext.
    pub(super) fn wrapped(&self) -> &[u8] {
        &self.wrapped
    }

    /// The mechanism that decrypts the ciphertext.
    pub(super) fn mechanism(&self) -> Mechanism<'static> {
        oaep::mechanism(self.algorithm)
    }

    /// Uses the RSA key on the token and compares the plaintext. A plain wrapping key decrypts. A sealed wrapping key makes a
    /// sealed release to a key pair of this process.
    pub(super) fn open(&self, on: &KeySession, pair: &KeyPair) -> Result<(), Fault> {
        match pair.purpose {
            Purpose::Plain => self.decrypt(&on.session, pair),
            Purpose::Sealed => self.compare(&self.release(on, pair)?, pair),
        }
    }

    /// Decrypts with a plain wrapping key on the token and compares the plaintext.
    pub(super) fn decrypt(&self, session: &Session, pair: &KeyPair) -> Result<(), Fault> {
        let plaintext = decrypt(session, pair, self.algorithm, &self.wrapped)?;
        self.compare(&plaintext, pair)
    }

    fn compare(&self, plaintext: &[u8], pair: &KeyPair) -> Result<(), Fault> {
        if bool::from(plaintext.ct_eq(&self.plaintext)) {
            return Ok(());
        }
        Err(Fault::new(
            Class::Untrusted,
            format!(
                "the token failed the self-test of key {}: the token decrypted the known ciphertext to a wrong plaintext",
                pair.id
            ),
        ))
    }

    fn release(&self, on: &KeySession, pair: &KeyPair) -> Result<Zeroizing<Vec<u8>>, Fault> {
        let recipient = RecipientPair::of_process()?;
        let imported = on
            .recipients
            .borrow_mut()
            .object(&on.session, recipient.public.spki())?;
        let sealed = self
            .sealed(pair)
            .release(&on.session, imported, self.algorithm)?;
        recipient.open(&sealed, self.algorithm)
    }

    /// The known ciphertext, for a sealed wrapping key.
    pub(super) fn sealed(&self, pair: &KeyPair) -> SealedKey {
        SealedKey {
            private: pair.private,
            algorithm: self.algorithm,
            wrapped: self.wrapped.clone(),
        }
    }

    /// Uses the RSA key on the token and compares the plaintext, then computes a MAC and verifies it.
    pub(super) fn check(&self, on: &KeySession, pair: &KeyPair) -> Result<(), Fault> {
        self.open(on, pair)?;
        self.makes_a_mac(&on.session, pair)
    }

    fn makes_a_mac(&self, session: &Session, pair: &KeyPair) -> Result<(), Fault> {
        let mac = mac(session, pair, &self.plaintext)?;
        verify(session, pair, &self.plaintext, &mac)
    }

    /// Checks that the token can compute and verify a MAC. The error for a token without HMAC names HMAC as the cause.
    fn authenticates(&self, session: &Session, pair: &KeyPair) -> Result<(), Fault> {
        let made = self.makes_a_mac(session, pair);
        made.map_err(|fault| {
            if !is_refusal(&fault) {
                return fault;
            }
            Fault::new(
                fault.class,
                format!(
                    "the token does not support HMAC-SHA-256 with integrity key {} ({fault}), and without HMAC-SHA-256 \
                     the broker cannot detect forged rows in the database; if the token's keys for HMAC-SHA-256 are of \
                     another kind, set `integrity_key` in [token]",
                    pair.id
                ),
            )
        })
    }

    /// Checks that the token rejects a wrong MAC. A token that accepts every MAC would make every row of the database
    /// valid.
    fn refuses_forgery(&self, session: &Session, pair: &KeyPair) -> Result<(), Fault> {
        let mut forged = mac(session, pair, &self.plaintext)?;
        forged[0] ^= 1;
        match verify(session, pair, &self.plaintext, &forged) {
            Err(fault) if matches!(fault.class, Class::Input | Class::Ambiguous) => Ok(()),
            Err(fault) => Err(fault),
            Ok(()) => Err(Fault::new(
                Class::Untrusted,
                format!(
                    "the token accepts a wrong MAC of integrity key {}: MACs of this token protect nothing, and the \
                     token must not be used",
                    pair.id
                ),
            )),
        }
    }
}

/// Determines whether the token can use a key for OAEP with SHA-256 or, if the operator allows SHA-1, with SHA-1. Also
/// checks that the token rejects a wrong MAC. `open` returns a new session for each attempt, because some tokens leave
/// a failed operation active in its session.
pub(super) fn probe(
    open: impl Fn() -> Result<KeySession, Fault>,
    id: WrappingKeyId,
    public: &PublicSide,
    allow_oaep_sha1: bool,
) -> Result<SelfTest, Fault> {
    let on_session = |work: &dyn Fn(&KeySession, &KeyPair) -> Result<(), Fault>| {
        let session = open()?;
        let pair = session.pair(id).expect("it was opened with this key");
        work(&session, pair)
    };
    let attempt = |algorithm| {
        let self_test = SelfTest::new(public, algorithm)?;
        on_session(&|session, pair| self_test.open(session, pair))?;
        Ok(self_test)
    };
    let self_test = choose(attempt, allow_oaep_sha1)?;
    let authenticates = || on_session(&|on, pair| self_test.authenticates(&on.session, pair));
    authenticates().or_else(|fault| match fault.class {
        // The token may have been busy, so the operation is repeated once.
        Class::Ambiguous => authenticates(),
        _ => Err(fault),
    })?;
    on_session(&|on, pair| self_test.refuses_forgery(&on.session, pair))?;
    Ok(self_test)
}

/// Returns whether this error can mean that the token does not support the operation.
fn is_refusal(fault: &Fault) -> bool {
    matches!(
        fault.class,
        Class::Input | Class::Ambiguous | Class::Configuration
    )
}

/// Selects the first supported algorithm. SHA-1 is selected only if the token rejects SHA-256 twice, because a
/// transient error must not cause the use of the weaker hash function.
fn choose<T>(
    attempt: impl Fn(Algorithm) -> Result<T, Fault>,
    allow_oaep_sha1: bool,
) -> Result<T, Fault> {
    let sha256 = || attempt(Algorithm::RsaOaepSha256);
    let again = |fault| {
        if is_refusal(&fault) {
            sha256()
        } else {
            Err(fault)
        }
    };
    let refusal = match sha256().or_else(again) {
        Ok(works) => return Ok(works),
        Err(fault) if is_refusal(&fault) => fault,
        Err(fault) => return Err(fault),
    };
    match attempt(Algorithm::RsaOaepSha1) {
        Ok(works) if allow_oaep_sha1 => Ok(works),
        Ok(_) => Err(Fault::new(
            Class::Configuration,
            format!(
                "the token supports RSA-OAEP only with SHA-1, not with SHA-256 ({refusal}); to accept \
                 SHA-1, set `allow_oaep_sha1 = true` in [token]"
            ),
        )),
        Err(fault) => Err(Fault::new(
            fault.class,
            format!(
                "the token supports RSA-OAEP neither with SHA-256 ({refusal}) nor with SHA-1 ({fault})"
            ),
        )),
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    /// Returns the chosen algorithm if SHA-256 fails `failures` times with an error of this class.
    fn chosen(failures: u32, class: Class) -> Result<Algorithm, Class> {
        let left = Cell::new(failures);
        let attempt = |algorithm| {
            if algorithm == Algorithm::RsaOaepSha256 && left.get() > 0 {
                left.set(left.get() - 1);
                return Err(Fault::new(class, "refused"));
            }
            Ok(algorithm)
        };
        choose(attempt, true).map_err(|fault| fault.class)
    }

    #[test]
    fn only_a_token_that_cannot_do_sha256_gets_sha1() {
        for class in [Class::Input, Class::Ambiguous, Class::Configuration] {
            assert_eq!(chosen(1, class), Ok(Algorithm::RsaOaepSha256));
            assert_eq!(chosen(2, class), Ok(Algorithm::RsaOaepSha1));
        }
        for class in [Class::SessionLost, Class::TokenLost, Class::BackOff] {
            assert_eq!(chosen(1, class), Err(class));
        }
    }
}
