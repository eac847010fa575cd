//! Tests the functions that the broker needs, and the token's answers to invalid input.

use aws_lc_rs::{
    hmac,
    rsa::{
        OAEP_SHA1_MGF1SHA1, OAEP_SHA256_MGF1SHA256, OAEP_SHA384_MGF1SHA384, OaepAlgorithm,
        OaepPublicEncryptingKey, PublicEncryptingKey,
    },
};
use cryptoki::{
    error::Error,
    mechanism::{
        Mechanism, MechanismType,
        rsa::{PkcsMgfType, PkcsOaepParams, PkcsOaepSource},
    },
    object::{Attribute, KeyType, ObjectHandle},
};

use keybroker_pkcs11_ffi::Session;
use keybroker_worker_protocol::report::{Report, WORKS};

use super::{Kind, Probe, answer, code, destroy, left_out, secret_template, told};
use crate::{
    calling,
    classify::{Class, Fault},
    keys::{KeyPair, PublicSide},
    open::OpenToken,
};

pub(super) const OAEP_SHA1: &str = "RSA-OAEP with SHA-1";
pub(super) const OAEP_SHA256: &str = "RSA-OAEP with SHA-256";
pub(super) const MAC: &str = "HMAC-SHA-256 with the integrity key";
pub(super) const VERIFY: &str = "C_Verify with the integrity key";

const LABEL: &[u8] = b"keybroker";
const OTHER_LABEL: &[u8] = b"another label";
const MESSAGE: &[u8] = b"keybroker token report";
const PLAINTEXT: [u8; 32] = [0x5a; 32];
const KNOWN_KEY: [u8; 32] = [0x0b; 32];
const MAC_BYTES: usize = 32;

/// A hash function of OAEP.
struct Hash {
    name: &'static str,
    software: &'static OaepAlgorithm,
    digest: MechanismType,
    mgf: PkcsMgfType,
}

const HASHES: [Hash; 3] = [
    Hash {
        name: OAEP_SHA1,
        software: &OAEP_SHA1_MGF1SHA1,
        digest: MechanismType::SHA1,
        mgf: PkcsMgfType::MGF1_SHA1,
    },
    Hash {
        name: OAEP_SHA256,
        software: &OAEP_SHA256_MGF1SHA256,
        digest: MechanismType::SHA256,
        mgf: PkcsMgfType::MGF1_SHA256,
    },
    Hash {
        name: "RSA-OAEP with SHA-384",
        software: &OAEP_SHA384_MGF1SHA384,
        digest: MechanismType::SHA384,
        mgf: PkcsMgfType::MGF1_SHA384,
    },
];

impl Hash {
    fn mechanism<'a>(&self, label: Option<&'a [u8]>) -> Mechanism<'a> {
        let source = label.map_or_else(PkcsOaepSource::empty, PkcsOaepSource::data_specified);
        Mechanism::RsaPkcsOaep(PkcsOaepParams::new(self.digest, self.mgf, source))
    }

    /// Encrypts the known plaintext with the public key, in software.
    fn wrap(&self, public: &PublicSide, label: Option<&[u8]>) -> Result<Vec<u8>, Fault> {
        let failed = |_| Fault::new(Class::Untrusted, "the public key cannot be used");
        let key = PublicEncryptingKey::from_der(&public.spki)
            .map_err(|_| Fault::new(Class::Untrusted, "the public key cannot be used"))?;
        let key = OaepPublicEncryptingKey::new(key).map_err(failed)?;
        let mut ciphertext = vec![0; key.ciphertext_size()];
        key.encrypt(self.software, &PLAINTEXT, &mut ciphertext, label)
            .map_err(failed)?;
        Ok(ciphertext)
    }
}

/// Tests the functions that the broker needs, with one key pair.
pub(super) fn try_all(
    session: &Session,
    pair: &KeyPair,
    public: &PublicSide,
    report: &mut Report,
) -> Result<(), Fault> {
    let left_out: Vec<&str> = left_out(report).collect();
    let mut answers = vec![told("an RSA pair of 2048 bits", WORKS)];
    for bits in [3_072, 4_096] {
        let made = Kind::RsaPair.make(session, bits, &left_out);
        answers.push(answer(format!("an RSA pair of {bits} bits"), &made));
        if let Ok(object) = made {
            destroy(session, object);
        }
    }
    for hash in &HASHES {
        for label in [None, Some(LABEL)] {
            let ciphertext = hash.wrap(public, label)?;
            calling::next("C_Decrypt");
            let decrypted = session.decrypt(&hash.mechanism(label), pair.private, &ciphertext);
            let name = match label {
                None => hash.name.to_owned(),
                Some(_) => format!("{} and a label", hash.name),
            };
            answers.push(match decrypted {
                Ok(plaintext) if plaintext != PLAINTEXT => told(name, "another plaintext"),
                decrypted => answer(name, &decrypted),
            });
        }
    }
    if let Some(integrity_key) = pair.integrity_key.object() {
        calling::next("C_Sign");
        let mac = session.sign(&Mechanism::Sha256Hmac, integrity_key, MESSAGE);
        answers.push(match &mac {
            Ok(mac) if mac.len() != MAC_BYTES => told(MAC, format!("{} bytes", mac.len())),
            mac => answer(MAC, mac),
        });
        if let Ok(mac) = &mac {
            calling::next("C_Verify");
            let verified = session.verify(&Mechanism::Sha256Hmac, integrity_key, MESSAGE, mac);
            answers.push(answer(VERIFY, &verified));
        }
    }
    answers.push(known_mac(session));
    let own_type = secret_template(KeyType::SHA256_HMAC);
    calling::next("C_GenerateKey");
    let made = session.generate_key(&Mechanism::GenericSecretKeyGen, &own_type);
    answers.push(answer("an integrity key of type CKK_SHA256_HMAC", &made));
    if let Ok(object) = made {
        destroy(session, object);
    }
    report.positive.extend(answers);
    Ok(())
}

/// Tests HMAC with a known key, which is a session object.
fn known_mac(session: &Session) -> keybroker_worker_protocol::report::Answer {
    let name = "HMAC-SHA-256 with a known key";
    let mut template = secret_template(KeyType::GENERIC_SECRET);
    template.push(Attribute::Value(KNOWN_KEY.to_vec()));
    calling::next("C_CreateObject");
    let key = match session.create_object(&template) {
        Ok(key) => key,
        Err(error) => return told(name, format!("not made: {}", code(&error))),
    };
    calling::next("C_Sign");
    let mac = session.sign(&Mechanism::Sha256Hmac, key, MESSAGE);
    destroy(session, key);
    let software = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, &KNOWN_KEY), MESSAGE);
    match mac {
        Ok(mac) if mac != software.as_ref() => told(name, "another MAC"),
        mac => answer(name, &mac),
    }
}

/// Tests the token's answers to invalid input. Each test has its own session.
pub(super) fn wrong_input(
    token: &OpenToken,
    probe: &Probe,
    report: &mut Report,
) -> Result<(), Fault> {
    let hash = HASHES
        .iter()
        .find(|hash| {
            let worked = report.positive.iter().find(|row| row.name == hash.name);
            worked.is_some_and(|row| row.result == WORKS)
        })
        .expect("a self-test was made with one of them");
    let good = hash.wrap(&probe.public, None)?;
    let labelled = hash.wrap(&probe.public, Some(LABEL))?;
    let mut damaged = good.clone();
    damaged[40] ^= 1;
    let decrypts = |ciphertext: &[u8], label| -> Result<String, Fault> {
        let session = token.session(&[])?;
        calling::next("C_Decrypt");
        let mechanism = hash.mechanism(label);
        let result = session
            .session
            .decrypt(&mechanism, probe.pair.private, ciphertext);
        Ok(accepted(&result))
    };
    report.errors.extend([
        told("a damaged ciphertext", decrypts(&damaged, None)?),
        told("a truncated ciphertext", decrypts(&good[1..], None)?),
        told(
            "a ciphertext that is not below the modulus",
            decrypts(&vec![0xff; good.len()], None)?,
        ),
        told(
            "an OAEP label for a ciphertext without a label",
            decrypts(&good, Some(OTHER_LABEL))?,
        ),
        told("another label", decrypts(&labelled, Some(OTHER_LABEL))?),
    ]);
    match probe.pair.integrity_key.object() {
        Some(integrity_key) => wrong_macs(token, integrity_key, report),
        None => Ok(()),
    }
}

fn wrong_macs(
    token: &OpenToken,
    integrity_key: ObjectHandle,
    report: &mut Report,
) -> Result<(), Fault> {
    let mac = {
        let session = token.session(&[])?;
        calling::next("C_Sign");
        session
            .session
            .sign(&Mechanism::Sha256Hmac, integrity_key, MESSAGE)?
    };
    let verifies = |mac: &[u8]| -> Result<String, Fault> {
        let session = token.session(&[])?;
        calling::next("C_Verify");
        let result = session
            .session
            .verify(&Mechanism::Sha256Hmac, integrity_key, MESSAGE, mac);
        Ok(accepted(&result))
    };
    let mut forged = mac.clone();
    forged[0] ^= 1;
    report.errors.extend([
        told("a wrong MAC", verifies(&forged)?),
        told(
            "the first 31 bytes of a MAC, with the last byte next to them in memory",
            verifies(&mac[..MAC_BYTES - 1])?,
        ),
    ]);
    Ok(())
}

fn accepted<T>(result: &Result<T, Error>) -> String {
    result
        .as_ref()
        .err()
        .map_or_else(|| "ACCEPTED".to_owned(), code)
}
