//! The four operations on the token, and the known-answer canary made of them.
//!
//! Mitigation: M9 of `THREAT_MODEL.md`.

use cryptoki::{
    mechanism::{
        Mechanism, MechanismType,
        rsa::{PkcsMgfType, PkcsOaepParams, PkcsOaepSource},
    },
    session::Session,
};
use subtle::ConstantTimeEq as _;
use zeroize::Zeroizing;

use crate::envelope::{Algorithm, MAC_BYTES, Mac};

use super::{
    classify::{Class, Fault},
    keys::{KeyPair, PublicSide},
    oaep::WrapKey,
};

/// Length of the canary's plaintext, in bytes.
const CANARY_BYTES: usize = 32;

fn oaep(algorithm: Algorithm) -> Mechanism<'static> {
    let (hash, mgf) = match algorithm {
        Algorithm::RsaOaepSha256 => (MechanismType::SHA256, PkcsMgfType::MGF1_SHA256),
        Algorithm::RsaOaepSha1 => (MechanismType::SHA1, PkcsMgfType::MGF1_SHA1),
    };
    Mechanism::RsaPkcsOaep(PkcsOaepParams::new(hash, mgf, PkcsOaepSource::empty()))
}

/// `C_Decrypt` with the RSA key.
pub(super) fn decrypt(
    session: &Session,
    pair: &KeyPair,
    algorithm: Algorithm,
    wrapped: &[u8],
) -> Result<Zeroizing<Vec<u8>>, Fault> {
    let plaintext = session.decrypt(&oaep(algorithm), pair.private, wrapped)?;
    Ok(Zeroizing::new(plaintext))
}

/// `C_Sign` with the binding key.
pub(super) fn mac(session: &Session, pair: &KeyPair, message: &[u8]) -> Result<Mac, Fault> {
    let mac = session.sign(&Mechanism::Sha256Hmac, pair.binding, message)?;
    mac.try_into().map_err(|mac: Vec<u8>| {
        Fault::new(
            Class::Untrusted,
            format!(
                "the token made a MAC of {} bytes, not {MAC_BYTES}",
                mac.len()
            ),
        )
    })
}

/// `C_Verify` with the binding key. A MAC that is wrong is [`Class::Input`] or, on some tokens, [`Class::Ambiguous`].
pub(super) fn verify(
    session: &Session,
    pair: &KeyPair,
    message: &[u8],
    mac: &[u8],
) -> Result<(), Fault> {
    if mac.len() != MAC_BYTES {
        return Err(Fault::new(Class::Input, "a MAC of another length"));
    }
    Ok(session.verify(&Mechanism::Sha256Hmac, pair.binding, message, mac)?)
}

/// What the token must be able to do with one key, with an answer that is known. Made once per worker, checked often.
#[derive(Clone, Debug)]
pub(super) struct Canary {
    algorithm: Algorithm,
    plaintext: [u8; CANARY_BYTES],
    wrapped: Vec<u8>,
}

impl Canary {
    /// Makes a ciphertext with the public key.
    pub(super) fn new(public: &PublicSide, algorithm: Algorithm) -> Result<Self, Fault> {
        let unfit = |what: String| Fault::new(Class::Untrusted, what);
        let mut plaintext = [0; CANARY_BYTES];
        aws_lc_rs::rand::fill(&mut plaintext)
            .map_err(|_| unfit("the random generator failed".to_owned()))?;
        let wrapped = WrapKey::new(&public.spki, algorithm)
            .and_then(|key| key.wrap(&plaintext))
            .map_err(unfit)?;
        Ok(Self {
            algorithm,
            plaintext,
            wrapped,
        })
    }

    pub(super) fn algorithm(&self) -> Algorithm {
        self.algorithm
    }

    /// Decrypts on the token and compares.
    pub(super) fn decrypt(&self, session: &Session, pair: &KeyPair) -> Result<(), Fault> {
        let plaintext = decrypt(session, pair, self.algorithm, &self.wrapped)?;
        if bool::from(plaintext.as_slice().ct_eq(&self.plaintext)) {
            return Ok(());
        }
        Err(Fault::new(
            Class::Untrusted,
            format!("the token decrypted the canary of key {} wrongly", pair.id),
        ))
    }

    /// Decrypts on the token and compares; makes and verifies a MAC.
    pub(super) fn check(&self, session: &Session, pair: &KeyPair) -> Result<(), Fault> {
        self.decrypt(session, pair)?;
        let mac = mac(session, pair, &self.plaintext)?;
        verify(session, pair, &self.plaintext, &mac)
    }
}

/// What the token can do, found out by doing it: OAEP with SHA-256, else with SHA-1 where the operator allows it.
pub(super) fn probe(
    session: &Session,
    pair: &KeyPair,
    public: &PublicSide,
    allow_oaep_sha1: bool,
) -> Result<Canary, Fault> {
    let sha256 = Canary::new(public, Algorithm::RsaOaepSha256)?;
    let refusal = match sha256.check(session, pair) {
        Ok(()) => return Ok(sha256),
        Err(fault) if fault.class == Class::Untrusted => return Err(fault),
        Err(fault) => fault,
    };
    let sha1 = Canary::new(public, Algorithm::RsaOaepSha1)?;
    match sha1.check(session, pair) {
        Ok(()) if allow_oaep_sha1 => Ok(sha1),
        Ok(()) => Err(Fault::new(
            Class::Configuration,
            format!(
                "the token cannot do RSA-OAEP with SHA-256 ({refusal}), only with SHA-1; if that is what \
                 you want, say `allow_oaep_sha1 = true` in [token]"
            ),
        )),
        Err(fault) => Err(Fault::new(
            fault.class,
            format!(
                "the token does RSA-OAEP neither with SHA-256 ({refusal}) nor with SHA-1 ({fault})"
            ),
        )),
    }
}
