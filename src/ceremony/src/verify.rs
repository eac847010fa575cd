//! Decides whether a transcript and its signatures fit together, without a token.
//!
//! Mitigation: M24 of `THREAT_MODEL.md`.

use std::collections::BTreeSet;

use aws_lc_rs::signature::{
    RSA_PKCS1_2048_8192_SHA256, RSA_PSS_2048_8192_SHA256, RsaParameters, UnparsedPublicKey,
};

use crate::{
    complete, sha256_hex,
    signatures::{self, SignatureAlgorithm, Signatures, TokenSignature},
    ssh::{AllowedSigners, Key, Signature, SshError},
    transcript::{Status, Token, Transcript, TranscriptError, base64},
};

/// Why a transcript is refused.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// The transcript cannot be read.
    #[error(transparent)]
    Transcript(#[from] TranscriptError),
    /// The file with the signatures cannot be read.
    #[error("the file with the signatures cannot be read, or was changed: {0}")]
    Signatures(#[from] serde_json::Error),
    /// Parts do not fit. Each is a sentence without a full stop.
    #[error("{}", .0.join("\n  "))]
    DoesNotFit(Vec<String>),
}

/// The result of a verification.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verified {
    /// SHA-256 of the transcript, in hexadecimal.
    pub transcript_sha256: String,
    /// Names of the tokens whose signatures are valid.
    pub tokens: Vec<String>,
    /// Names of the custodians whose signatures count.
    pub custodians: Vec<String>,
    /// Signatures that do not count, each with the reason.
    pub not_counted: Vec<String>,
}

/// What a verifier demands.
#[derive(Clone, Copy, Debug)]
pub struct Demands<'a> {
    /// The keys that the verifier trusts.
    pub allowed: &'a AllowedSigners,
    /// Number of custodians who must have signed.
    pub quorum: usize,
    /// SHA-256 of the plan that the verifier has, in hexadecimal.
    pub plan_sha256: Option<&'a str>,
}

/// Verifies a transcript. Every part must fit; signatures of keys that the verifier does not trust do not count.
pub fn verify(
    bytes: &[u8],
    signatures: &str,
    demands: Demands<'_>,
) -> Result<(Transcript, Verified), VerifyError> {
    let transcript = Transcript::parse(bytes)?;
    let signatures = parse(signatures)?;
    let sha256 = sha256_hex(bytes);
    let mut problems = problems_before_custodians(&transcript, &signatures, &sha256)?;
    if let Some(sha256) = demands.plan_sha256
        && sha256 != transcript.plan.sha256
    {
        problems.push(format!(
            "the transcript is of another plan: its plan has the SHA-256 {}, but the given plan has {sha256}",
            transcript.plan.sha256
        ));
    }
    let mut verified = Verified {
        transcript_sha256: sha256,
        tokens: transcript
            .tokens
            .iter()
            .map(|token| token.name.clone())
            .collect(),
        custodians: Vec::new(),
        not_counted: Vec::new(),
    };
    count(
        &transcript,
        &signatures,
        bytes,
        demands.allowed,
        &mut verified,
        &mut problems,
    );
    problems.extend(problem_of_quorum(&transcript, demands.quorum, &verified));
    if problems.is_empty() {
        Ok((transcript, verified))
    } else {
        Err(VerifyError::DoesNotFit(problems))
    }
}

/// Checks everything but the custodians' signatures: what a custodian relies on before signing. Returns the transcript and
/// its SHA-256.
pub fn check(bytes: &[u8], signatures: &Signatures) -> Result<(Transcript, String), VerifyError> {
    let transcript = Transcript::parse(bytes)?;
    let sha256 = sha256_hex(bytes);
    let problems = problems_before_custodians(&transcript, signatures, &sha256)?;
    if problems.is_empty() {
        Ok((transcript, sha256))
    } else {
        Err(VerifyError::DoesNotFit(problems))
    }
}

fn problems_before_custodians(
    transcript: &Transcript,
    signatures: &Signatures,
    sha256: &str,
) -> Result<Vec<String>, VerifyError> {
    let mut problems = transcript.contradictions()?;
    if transcript.status == Status::Complete {
        problems.extend(complete::problems(transcript, &transcript.plan()?));
    } else {
        problems.push("the ceremony is incomplete: a step failed or did not end".to_owned());
    }
    if signatures.transcript_sha256 != sha256 {
        problems.push(format!(
            "the signatures are for a transcript with the SHA-256 {}, but this transcript has {sha256}",
            signatures.transcript_sha256
        ));
    }
    problems.extend(problems_of_tokens(transcript, signatures, sha256));
    Ok(problems)
}

/// What a signing key signs for a transcript with this SHA-256. Some tokens sign only short messages in one call, so the
/// message does not have the transcript itself.
pub fn statement(transcript_sha256: &str) -> String {
    format!("keybroker-ceremony-statement/1\nSHA-256 of the transcript: {transcript_sha256}\n")
}

/// Reads the file with the signatures.
pub fn parse(text: &str) -> Result<Signatures, VerifyError> {
    let parsed: Signatures = serde_json::from_str(text)?;
    if parsed.format != signatures::FORMAT {
        let what = format!(
            "the file with the signatures has the format {:?}, but this release reads {:?}",
            parsed.format,
            signatures::FORMAT
        );
        return Err(VerifyError::DoesNotFit(vec![what]));
    }
    Ok(parsed)
}

/// Whether a signature of a custodian fits: the key is that of the custodian in the transcript, and it signed the bytes.
/// Returns the name of the custodian.
pub fn custodian_of<'a>(
    transcript: &'a Transcript,
    bytes: &[u8],
    signature: &Signature,
) -> Result<&'a str, SignerError> {
    let custodian = transcript
        .custodians
        .iter()
        .find(|one| Key::parse(&one.ssh_key).is_ok_and(|key| key == *signature.key()))
        .ok_or_else(|| SignerError::Unknown(signature.key().fingerprint()))?;
    signature.verify(bytes)?;
    Ok(&custodian.name)
}

/// Why a signature is not one of a custodian.
#[derive(Debug, thiserror::Error)]
pub enum SignerError {
    /// The key belongs to no custodian.
    #[error("the key {0} that signed belongs to no custodian of the plan")]
    Unknown(String),
    /// The signature is not valid.
    #[error(transparent)]
    Signature(#[from] SshError),
}

fn problems_of_tokens(
    transcript: &Transcript,
    signatures: &Signatures,
    sha256: &str,
) -> Vec<String> {
    let message = statement(sha256);
    let mut problems = Vec::new();
    for token in &transcript.tokens {
        let of_token = |one: &&TokenSignature| one.token == token.name;
        let found: Vec<&TokenSignature> = signatures.tokens.iter().filter(of_token).collect();
        let problem = match found[..] {
            [] => Some("there is no signature of its signing key".to_owned()),
            [signature] => problem_of_token(token, signature, message.as_bytes()),
            [..] => Some("there are two signatures of its signing key".to_owned()),
        };
        problems.extend(problem.map(|one| format!("token {}: {one}", token.name)));
    }
    for signature in &signatures.tokens {
        if !transcript
            .tokens
            .iter()
            .any(|token| token.name == signature.token)
        {
            problems.push(format!(
                "there is a signature of token {:?}, which is not in the transcript",
                signature.token
            ));
        }
    }
    problems
}

fn problem_of_token(token: &Token, signature: &TokenSignature, message: &[u8]) -> Option<String> {
    let Some(public) = token
        .signing_key
        .as_ref()
        .and_then(|key| base64(&key.public_key))
    else {
        return Some("the transcript has no public key of its signing key".to_owned());
    };
    let Some(made) = base64(&signature.signature) else {
        return Some(
            "its signature is not base 64, so the file with the signatures was changed".to_owned(),
        );
    };
    let is_valid = verifies(&public, signature.algorithm, message, &made);
    (!is_valid).then(|| {
        "its signature does not fit the transcript: the transcript, the public key or the signature was changed"
            .to_owned()
    })
}

/// Whether a signing key made a signature. `public` is a DER SubjectPublicKeyInfo.
pub fn verifies(
    public: &[u8],
    algorithm: SignatureAlgorithm,
    message: &[u8],
    signature: &[u8],
) -> bool {
    let parameters: &RsaParameters = match algorithm {
        SignatureAlgorithm::RsaPssSha256 => &RSA_PSS_2048_8192_SHA256,
        SignatureAlgorithm::RsaPkcs1Sha256 => &RSA_PKCS1_2048_8192_SHA256,
    };
    UnparsedPublicKey::new(parameters, public)
        .verify(message, signature)
        .is_ok()
}

/// Counts the custodians who signed.
fn count(
    transcript: &Transcript,
    signatures: &Signatures,
    bytes: &[u8],
    allowed: &AllowedSigners,
    verified: &mut Verified,
    problems: &mut Vec<String>,
) {
    let mut seen = BTreeSet::new();
    for one in &signatures.custodians {
        let name = &one.custodian;
        let signature = match Signature::parse(&one.signature) {
            Ok(signature) => signature,
            Err(error) => {
                problems.push(format!("the signature of {name}: {error}"));
                continue;
            }
        };
        match custodian_of(transcript, bytes, &signature) {
            Err(error) => problems.push(format!("the signature of {name}: {error}")),
            Ok(signer) if signer != name => {
                problems.push(format!(
                    "the signature of {name} was made with the key of {signer}"
                ));
            }
            Ok(signer) if !seen.insert(signer) => {
                problems.push(format!("there are two signatures of {name}"));
            }
            Ok(_) if !allowed.allows(name, signature.key()) => verified.not_counted.push(format!(
                "{name}: the list of allowed signers does not have {} for {name}",
                signature.key().fingerprint()
            )),
            Ok(_) => verified.custodians.push(name.clone()),
        }
    }
}

fn problem_of_quorum(
    transcript: &Transcript,
    demanded: usize,
    verified: &Verified,
) -> Option<String> {
    let planned = usize::try_from(transcript.quorum).unwrap_or(usize::MAX);
    let needed = demanded.max(planned);
    let given = verified.custodians.len();
    (given < needed).then(|| {
        let mut what = format!(
            "{needed} custodians must sign, but {given} valid signatures count: {} more",
            needed.saturating_sub(given)
        );
        for reason in &verified.not_counted {
            what.push_str("; not counted: ");
            what.push_str(reason);
        }
        what
    })
}

#[cfg(test)]
mod tests {
    use aws_lc_rs::{
        encoding::{AsDer, PublicKeyX509Der},
        rand::SystemRandom,
        rsa::{KeyPair, KeySize},
        signature::{KeyPair as _, RSA_PKCS1_SHA256},
    };
    use base64ct::{Base64, Encoding as _};

    use super::*;
    use crate::{
        plan::tests::{ADA, BOB, text},
        script,
        ssh::{NAMESPACE, tests::Person},
        transcript::{
            Attribute, Identity, Key as WrappingKey, ShareDigest, SigningKey, SoPin, Step,
            tests::begun,
        },
    };

    struct Ceremony {
        people: [Person; 2],
        transcript: Transcript,
        bytes: Vec<u8>,
        signatures: Signatures,
        signing_key: KeyPair,
    }

    fn public(key: &KeyPair) -> (String, String) {
        let der = AsDer::<PublicKeyX509Der<'_>>::as_der(key.public_key()).unwrap();
        (
            Base64::encode_string(der.as_ref()),
            sha256_hex(der.as_ref()),
        )
    }

    fn attributes(object: &str) -> Vec<Attribute> {
        let attribute = |finding: &str| Attribute {
            object: object.to_owned(),
            finding: finding.to_owned(),
            passes: true,
        };
        ["CKA_SENSITIVE is true", "CKA_EXTRACTABLE is false"]
            .map(attribute)
            .to_vec()
    }

    /// Adds everything that the steps of the plan make.
    fn completed(transcript: &mut Transcript, wrapping: &KeyPair, signing: &KeyPair) {
        transcript.status = Status::Complete;
        let steps = script::steps(&transcript.plan().unwrap());
        transcript.steps = steps[..6]
            .iter()
            .map(|step| Step {
                number: step.number,
                what: step.what.clone(),
                started: "2026-11-30T04:00:00Z".to_owned(),
                ended: Some("2026-11-30T04:01:00Z".to_owned()),
                result: "done".to_owned(),
            })
            .collect();
        let token = &mut transcript.tokens[0];
        token.initialised = true;
        token.initialised_serial = Some("0123".to_owned());
        token.identity = Some(Identity {
            module_sha256: "ab".repeat(32),
            library: "library".to_owned(),
            label: "keybroker".to_owned(),
            serial: "0123".to_owned(),
            manufacturer: "maker".to_owned(),
            model: "model".to_owned(),
            hardware_version: "1.0".to_owned(),
            firmware_version: "1.0".to_owned(),
        });
        let share = |number: u64, custodian: &str| ShareDigest {
            number,
            custodian: custodian.to_owned(),
            sha256: format!("{number:064}"),
        };
        token.so_pin = Some(SoPin {
            threshold: 2,
            characters: 24,
            shares: vec![share(1, "ada"), share(2, "bob")],
        });
        let (public_key, fingerprint) = public(wrapping);
        token.keys.push(WrappingKey {
            name: "first".to_owned(),
            id: "00".repeat(16),
            bits: 2_048,
            algorithm: "RSA-OAEP-SHA-256".to_owned(),
            public_key,
            fingerprint,
            integrity_key: "token".to_owned(),
            attributes: attributes("RSA private key"),
            self_test: "passed".to_owned(),
            tests_not_run: Vec::new(),
        });
        let (public_key, fingerprint) = public(signing);
        token.signing_key = Some(SigningKey {
            id: "01".to_owned(),
            public_key,
            fingerprint,
            attributes: attributes("signing key"),
        });
    }

    /// A complete transcript, signed by a key and by both custodians.
    fn ceremony() -> Ceremony {
        let people = [(); 2].map(|()| Person::new(&["-t", "ed25519"]));
        let plan = text()
            .replace(ADA, &people[0].public())
            .replace(BOB, &people[1].public());
        let mut transcript = begun(&plan);
        let signing_key = KeyPair::generate(KeySize::Rsa3072).unwrap();
        let wrapping = KeyPair::generate(KeySize::Rsa2048).unwrap();
        completed(&mut transcript, &wrapping, &signing_key);
        signed(people, transcript, signing_key)
    }

    fn signed(people: [Person; 2], transcript: Transcript, signing_key: KeyPair) -> Ceremony {
        let bytes = transcript.to_canonical().unwrap().into_bytes();
        let sha256 = sha256_hex(&bytes);
        let message = statement(&sha256);
        let mut signatures = Signatures::new(sha256);
        let mut made = vec![0; signing_key.public_modulus_len()];
        signing_key
            .sign(
                &RSA_PKCS1_SHA256,
                &SystemRandom::new(),
                message.as_bytes(),
                &mut made,
            )
            .unwrap();
        signatures.tokens.push(TokenSignature {
            token: "default".to_owned(),
            algorithm: SignatureAlgorithm::RsaPkcs1Sha256,
            signature: Base64::encode_string(&made),
        });
        for (person, name) in people.iter().zip(["ada", "bob"]) {
            signatures.add(name, &person.sign(&bytes, NAMESPACE));
        }
        Ceremony {
            people,
            transcript,
            bytes,
            signatures,
            signing_key,
        }
    }

    type Change = fn(&mut Transcript);

    /// Everybody signs what they are given, so only the plan shows what is wrong.
    fn assert_contradictions(changes: &[(Change, &str)]) {
        let mut ceremony = ceremony();
        let good = ceremony.transcript.clone();
        for (change, expected) in changes {
            let mut changed = good.clone();
            change(&mut changed);
            ceremony = signed(ceremony.people, changed, ceremony.signing_key);
            let message = ceremony.refusal(&ceremony.bytes);
            assert!(message.contains(expected), "{expected}: {message}");
            // A custodian is told before signing.
            let checked = check(&ceremony.bytes, &ceremony.signatures);
            assert!(checked.unwrap_err().to_string().contains(expected));
        }
    }

    #[test]
    fn steps_and_tokens_that_are_not_those_of_the_plan_are_refused() {
        assert_contradictions(&[
            (|one| one.title = "another".to_owned(), "title"),
            (|one| one.witnesses.clear(), "witnesses"),
            (
                |one| identity(one).serial.push('x'),
                "not the one that was initialised",
            ),
            (|one| one.steps.clear(), "0 steps, but the plan has 6"),
            (|one| one.steps[4].what.push('x'), "step 5 is not that"),
            (|one| one.steps[4].number = 9, "step 5 is not that"),
            (
                |one| one.steps[4].result = "failed: x".to_owned(),
                "step 5 was not done",
            ),
            (|one| one.steps[4].ended = None, "step 5 was not done"),
            (|one| one.tokens[0].module.push('x'), "module"),
            (|one| one.tokens[0].initialised = false, "`initialise"),
            (|one| one.tokens[0].identity = None, "what the token is"),
            (
                |one| identity(one).label.push('x'),
                "its label is \"keybrokerx\"",
            ),
            (|one| identity(one).module_sha256.clear(), "of its module"),
        ]);
    }

    #[test]
    fn shares_that_are_not_those_of_the_plan_are_refused() {
        assert_contradictions(&[
            (|one| one.tokens[0].so_pin = None, "no shares"),
            (|one| so_pin(one).threshold = 1, "threshold"),
            (|one| so_pin(one).characters = 16, "length of the PIN"),
            (
                |one| drop(so_pin(one).shares.pop()),
                "one for each custodian",
            ),
            (
                |one| so_pin(one).shares[1].custodian = "ada".to_owned(),
                "one for each custodian",
            ),
            (
                |one| so_pin(one).shares[1].number = 1,
                "one for each custodian",
            ),
            (
                |one| so_pin(one).shares[1].sha256 = format!("{:064}", 1),
                "digests",
            ),
        ]);
    }

    #[test]
    fn keys_that_are_not_those_of_the_plan_are_refused() {
        assert_contradictions(&[
            (|one| one.tokens[0].keys.clear(), "0 wrapping keys"),
            (|one| key(one).name = "other".to_owned(), "key other"),
            (|one| key(one).bits = 4_096, "2048 bits"),
            (|one| key(one).algorithm = "none".to_owned(), "algorithm"),
            (|one| key(one).integrity_key.clear(), "integrity key"),
            (
                |one| key(one).self_test = "wrong".to_owned(),
                "self-test did not pass",
            ),
            (
                |one| key(one).attributes[0].passes = false,
                "does not pass: CKA_SENSITIVE",
            ),
            (
                |one| drop(key(one).attributes.pop()),
                "CKA_EXTRACTABLE was not read",
            ),
            (|one| one.tokens[0].signing_key = None, "no signing key"),
            (
                |one| signing_key(one).attributes.clear(),
                "signing key: the attribute",
            ),
            (
                |one| {
                    let (public_key, fingerprint) = {
                        let key = key(one);
                        (key.public_key.clone(), key.fingerprint.clone())
                    };
                    let signing = signing_key(one);
                    (signing.public_key, signing.fingerprint) = (public_key, fingerprint);
                },
                "RSA with 3072 bits",
            ),
            (
                |one| {
                    let signing = one.tokens[0].signing_key.clone().unwrap();
                    let key = key(one);
                    (key.public_key, key.fingerprint) = (signing.public_key, signing.fingerprint);
                },
                "the same public key",
            ),
        ]);
    }

    fn signing_key(transcript: &mut Transcript) -> &mut SigningKey {
        transcript.tokens[0].signing_key.as_mut().unwrap()
    }

    fn identity(transcript: &mut Transcript) -> &mut Identity {
        transcript.tokens[0].identity.as_mut().unwrap()
    }

    fn so_pin(transcript: &mut Transcript) -> &mut SoPin {
        transcript.tokens[0].so_pin.as_mut().unwrap()
    }

    fn key(transcript: &mut Transcript) -> &mut WrappingKey {
        &mut transcript.tokens[0].keys[0]
    }

    impl Ceremony {
        fn allowed(&self) -> AllowedSigners {
            let list = format!(
                "ada {}\nbob {}\n",
                self.people[0].public(),
                self.people[1].public()
            );
            AllowedSigners::parse(&list).unwrap()
        }

        fn verify_with(&self, bytes: &[u8], quorum: usize) -> Result<Verified, VerifyError> {
            let demands = Demands {
                allowed: &self.allowed(),
                quorum,
                plan_sha256: Some(&self.transcript.plan.sha256),
            };
            let text = self.signatures.to_text().unwrap();
            verify(bytes, &text, demands).map(|(_, verified)| verified)
        }

        fn refusal(&self, bytes: &[u8]) -> String {
            self.verify_with(bytes, 2).unwrap_err().to_string()
        }
    }

    #[test]
    fn a_signed_transcript_verifies() {
        let ceremony = ceremony();
        let verified = ceremony.verify_with(&ceremony.bytes, 2).unwrap();
        assert_eq!(verified.custodians, ["ada", "bob"]);
        assert_eq!(verified.tokens, ["default"]);
        assert!(verified.not_counted.is_empty());
    }

    #[test]
    fn every_changed_byte_is_refused() {
        let ceremony = ceremony();
        let step = (ceremony.bytes.len() / 97).max(1);
        for place in (0..ceremony.bytes.len()).step_by(step) {
            let mut changed = ceremony.bytes.clone();
            changed[place] ^= 1;
            let message = ceremony.refusal(&changed);
            assert!(!message.is_empty(), "{place}");
        }
        let text = String::from_utf8(ceremony.bytes.clone()).unwrap();
        let changed = text.replacen("local-uid:0", "local-uid:1", 1);
        let message = ceremony.refusal(changed.as_bytes());
        for expected in [
            "SHA-256",
            "token default: its signature does not fit",
            "the signature of ada",
        ] {
            assert!(message.contains(expected), "{message}");
        }
    }

    #[test]
    fn a_changed_signature_is_refused_with_its_owner() {
        let mut ceremony = ceremony();
        let (ada, bob) = (
            ceremony.signatures.custodians[0].clone(),
            ceremony.signatures.custodians[1].clone(),
        );
        ceremony.signatures.custodians[0]
            .signature
            .clone_from(&bob.signature);
        let message = ceremony.refusal(&ceremony.bytes);
        assert!(
            message.contains("the signature of ada was made with the key of bob"),
            "{message}"
        );
        ceremony.signatures.custodians = vec![ada.clone(), ada.clone(), bob];
        let message = ceremony.refusal(&ceremony.bytes);
        assert!(message.contains("two signatures of ada"), "{message}");
        let twice = ceremony.signatures.tokens[0].clone();
        ceremony.signatures.tokens.push(twice);
        let message = ceremony.refusal(&ceremony.bytes);
        assert!(
            message.contains("two signatures of its signing key"),
            "{message}"
        );
        ceremony.signatures.tokens.pop();
        let made = &mut ceremony.signatures.tokens[0];
        made.algorithm = SignatureAlgorithm::RsaPssSha256;
        let message = ceremony.refusal(&ceremony.bytes);
        assert!(
            message.contains("token default: its signature does not fit"),
            "{message}"
        );
        ceremony.signatures.tokens.clear();
        let message = ceremony.refusal(&ceremony.bytes);
        assert!(
            message.contains("no signature of its signing key"),
            "{message}"
        );
    }

    #[test]
    fn too_few_signatures_are_refused_with_the_missing_number() {
        let mut ceremony = ceremony();
        assert!(ceremony.verify_with(&ceremony.bytes, 3).is_err());
        ceremony.signatures.custodians.pop();
        let message = ceremony
            .verify_with(&ceremony.bytes, 1)
            .unwrap_err()
            .to_string();
        assert!(
            message.contains("2 custodians must sign, but 1 valid"),
            "{message}"
        );
        assert!(message.contains("1 more"), "{message}");
    }

    #[test]
    fn a_key_that_the_verifier_does_not_trust_does_not_count() {
        let ceremony = ceremony();
        let list = format!(
            "ada {}\nbob {}\n",
            ceremony.people[0].public(),
            Person::new(&["-t", "ed25519"]).public()
        );
        let demands = Demands {
            allowed: &AllowedSigners::parse(&list).unwrap(),
            quorum: 2,
            plan_sha256: None,
        };
        let text = ceremony.signatures.to_text().unwrap();
        let message = verify(&ceremony.bytes, &text, demands)
            .unwrap_err()
            .to_string();
        assert!(message.contains("not counted: bob"), "{message}");
    }

    #[test]
    fn an_incomplete_transcript_and_another_plan_are_refused() {
        let mut ceremony = ceremony();
        ceremony.transcript.status = Status::Incomplete;
        let bytes = ceremony.transcript.to_canonical().unwrap();
        let message = ceremony.refusal(bytes.as_bytes());
        assert!(message.contains("incomplete"), "{message}");
        let demands = Demands {
            allowed: &ceremony.allowed(),
            quorum: 2,
            plan_sha256: Some("00"),
        };
        let text = ceremony.signatures.to_text().unwrap();
        let message = verify(&ceremony.bytes, &text, demands)
            .unwrap_err()
            .to_string();
        assert!(message.contains("another plan"), "{message}");
    }

    #[test]
    fn a_person_outside_the_plan_is_no_custodian() {
        let ceremony = ceremony();
        let other = Person::new(&["-t", "ed25519"]).sign(&ceremony.bytes, NAMESPACE);
        let signature = Signature::parse(&other).unwrap();
        let refused = custodian_of(&ceremony.transcript, &ceremony.bytes, &signature).unwrap_err();
        assert!(matches!(refused, SignerError::Unknown(_)), "{refused}");
    }
}
