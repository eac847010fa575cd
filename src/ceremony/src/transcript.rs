//! The transcript: what was done in a ceremony, as canonical JSON. It contains no secret.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{
    canonical::{self, CanonicalError},
    plan::{Plan, PlanError},
    sha256_hex, ssh,
};

/// The format of the transcript, for readers of later releases.
pub const FORMAT: &str = "keybroker-ceremony-transcript/1";
/// Longest transcript, in bytes.
pub const BYTES_MAX: u64 = 8 * 1024 * 1024;

/// Why a text is not a transcript.
#[derive(Debug, thiserror::Error)]
pub enum TranscriptError {
    /// The text is not JSON with the fields of a transcript.
    #[error("this is not a transcript, or it was changed: {0}")]
    Json(#[from] serde_json::Error),
    /// The transcript has another format.
    #[error(
        "the transcript has the format {0:?}, which this release does not know; this release reads {FORMAT:?}"
    )]
    Format(String),
    /// The text is not the canonical form of its content.
    #[error(
        "the transcript is not canonical JSON (RFC 8785), so it was changed after the ceremony; byte {0} is the first one that differs"
    )]
    NotCanonical(usize),
    /// A number has no canonical form.
    #[error("the transcript was changed: {0}")]
    Canonical(#[from] CanonicalError),
    /// The plan in the transcript cannot be read.
    #[error("the plan in the transcript: {0}")]
    Plan(#[from] PlanError),
}

/// Whether the ceremony came to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Status {
    /// Every step was done.
    Complete,
    /// The ceremony was interrupted, or a step failed.
    Incomplete,
}

/// What was done in a ceremony.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Transcript {
    /// [`FORMAT`].
    pub format: String,
    /// Whether the ceremony came to its end.
    pub status: Status,
    /// The title of the plan.
    pub title: String,
    /// Name and version of the program.
    pub program: String,
    /// SHA-256 of the running program file, in hexadecimal.
    pub program_sha256: String,
    /// The plan.
    pub plan: PlanText,
    /// Number of custodians who must sign.
    pub quorum: u64,
    /// The custodians of the plan.
    pub custodians: Vec<Custodian>,
    /// The witnesses of the plan.
    pub witnesses: Vec<String>,
    /// The account that ran the program, such as `local-uid:0`.
    pub operator: String,
    /// Start of the ceremony: RFC 3339 in UTC.
    pub started: String,
    /// Time of the last change of the transcript: RFC 3339 in UTC.
    pub ended: String,
    /// The tokens, with what was done to them.
    pub tokens: Vec<Token>,
    /// The steps that were begun.
    pub steps: Vec<Step>,
}

/// The plan as it was read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlanText {
    /// SHA-256 of the file, in hexadecimal.
    pub sha256: String,
    /// The text of the file.
    pub text: String,
}

/// A custodian.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Custodian {
    /// Name in the plan.
    pub name: String,
    /// SSH public key.
    pub ssh_key: String,
    /// Fingerprint of the SSH public key.
    pub fingerprint: String,
}

/// A token.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Token {
    /// Name in the plan.
    pub name: String,
    /// Path of the module.
    pub module: String,
    /// What the token says about itself. `None` until the token was opened.
    pub identity: Option<Identity>,
    /// Whether the ceremony initialised the token.
    pub initialised: bool,
    /// Serial number of the token that the ceremony initialised, known before the first login.
    pub initialised_serial: Option<String>,
    /// The shares of the security officer's PIN.
    pub so_pin: Option<SoPin>,
    /// The wrapping keys that were generated.
    pub keys: Vec<Key>,
    /// The key that signs the transcript.
    pub signing_key: Option<SigningKey>,
}

/// What a token says about itself, and the digest of its module.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Identity {
    /// SHA-256 of the module's file, in hexadecimal.
    pub module_sha256: String,
    /// Manufacturer, description and version of the module.
    pub library: String,
    /// Label of the token.
    pub label: String,
    /// Serial number of the token.
    pub serial: String,
    /// Manufacturer of the token.
    pub manufacturer: String,
    /// Model of the token.
    pub model: String,
    /// Version of the hardware.
    pub hardware_version: String,
    /// Version of the firmware.
    pub firmware_version: String,
}

/// The shares of a security officer's PIN.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SoPin {
    /// Number of shares that give the PIN.
    pub threshold: u64,
    /// Number of characters of the PIN.
    pub characters: u64,
    /// The shares.
    pub shares: Vec<ShareDigest>,
}

/// The digest of a share, with the custodian who got it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShareDigest {
    /// Number of the share.
    pub number: u64,
    /// Name of the custodian.
    pub custodian: String,
    /// Digest of the share (`Share::digest`).
    pub sha256: String,
}

/// A wrapping key that was generated.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Key {
    /// Name in the plan.
    pub name: String,
    /// Id of the key.
    pub id: String,
    /// Length of the modulus in bits.
    pub bits: u64,
    /// The algorithm that the token supports and the configuration permits.
    pub algorithm: String,
    /// DER SubjectPublicKeyInfo in base 64.
    pub public_key: String,
    /// SHA-256 of the DER SubjectPublicKeyInfo, in hexadecimal.
    pub fingerprint: String,
    /// Where the integrity key is: `token` or `worker`.
    pub integrity_key: String,
    /// The attributes that were read back.
    pub attributes: Vec<Attribute>,
    /// The result of the self-test: `passed`.
    pub self_test: String,
    /// Names of the negative tests that the token cannot run.
    pub tests_not_run: Vec<String>,
}

/// An attribute that was read back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Attribute {
    /// The object: `RSA private key`, `integrity key` or `signing key`.
    pub object: String,
    /// What was found and what is required.
    pub finding: String,
    /// Whether the value is the required one.
    pub passes: bool,
}

/// The key that signs the transcript.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SigningKey {
    /// `CKA_ID` of the key.
    pub id: String,
    /// DER SubjectPublicKeyInfo in base 64.
    pub public_key: String,
    /// SHA-256 of the DER SubjectPublicKeyInfo, in hexadecimal.
    pub fingerprint: String,
    /// The attributes that were read back.
    pub attributes: Vec<Attribute>,
}

/// A step that was begun.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Step {
    /// Number of the step in the script.
    pub number: u64,
    /// What the step does.
    pub what: String,
    /// Start: RFC 3339 in UTC.
    pub started: String,
    /// End: RFC 3339 in UTC. `None` if the step did not end.
    pub ended: Option<String>,
    /// `done`, `begun`, or the reason why the step failed.
    pub result: String,
}

impl Transcript {
    /// A transcript at the start of a ceremony.
    pub fn begin(
        plan: &Plan,
        text: &str,
        program: String,
        program_sha256: String,
        operator: String,
        now: &str,
    ) -> Result<Self, ssh::SshError> {
        Ok(Self {
            format: FORMAT.to_owned(),
            status: Status::Incomplete,
            title: plan.title.trim().to_owned(),
            program,
            program_sha256,
            plan: PlanText {
                sha256: plan.sha256.clone(),
                text: text.to_owned(),
            },
            quorum: u64::try_from(plan.quorum).unwrap_or(u64::MAX),
            custodians: custodians(plan)?,
            witnesses: plan.witnesses.clone(),
            operator,
            started: now.to_owned(),
            ended: now.to_owned(),
            tokens: plan.tokens.iter().map(Token::begin).collect(),
            steps: Vec::new(),
        })
    }

    /// The bytes of the transcript: canonical JSON without a line end.
    pub fn to_canonical(&self) -> Result<String, CanonicalError> {
        canonical::to_string(&serde_json::to_value(self)?)
    }

    /// Reads the bytes of a transcript, which must be canonical.
    pub fn parse(bytes: &[u8]) -> Result<Self, TranscriptError> {
        let value: Value = serde_json::from_slice(bytes)?;
        if let Some(Value::String(format)) = value.get("format")
            && format != FORMAT
        {
            return Err(TranscriptError::Format(format.clone()));
        }
        let canonical = canonical::to_string(&value)?;
        if canonical.as_bytes() != bytes {
            let pairs = canonical.bytes().zip(bytes);
            let same = pairs.take_while(|(one, other)| one == *other).count();
            return Err(TranscriptError::NotCanonical(same));
        }
        Ok(serde_json::from_value(value)?)
    }

    /// The plan in the transcript, parsed again.
    pub fn plan(&self) -> Result<Plan, TranscriptError> {
        Ok(Plan::parse(&self.plan.text)?)
    }

    /// The parts that contradict each other, each as a sentence without a full stop. Nothing contradicts in a transcript
    /// that the ceremony wrote.
    pub fn contradictions(&self) -> Result<Vec<String>, TranscriptError> {
        let mut found = Vec::new();
        if sha256_hex(self.plan.text.as_bytes()) != self.plan.sha256 {
            found.push(
                "the plan in the transcript does not have the SHA-256 that the transcript names"
                    .to_owned(),
            );
        }
        let plan = self.plan()?;
        if custodians(&plan).ok().as_ref() != Some(&self.custodians) {
            found.push(
                "the custodians of the transcript are not those of the plan in it".to_owned(),
            );
        }
        if u64::try_from(plan.quorum) != Ok(self.quorum) {
            found.push("the quorum of the transcript is not that of the plan in it".to_owned());
        }
        let planned: Vec<&str> = plan.tokens.iter().map(|one| one.name.as_str()).collect();
        let actual: Vec<&str> = self.tokens.iter().map(|one| one.name.as_str()).collect();
        if planned != actual {
            found.push(format!(
                "the transcript has the tokens {actual:?}, but the plan in it has {planned:?}"
            ));
        }
        for token in &self.tokens {
            let keys = token
                .keys
                .iter()
                .map(|key| (&key.name, &key.public_key, &key.fingerprint));
            let signing = token.signing_key.as_ref();
            let name = "signing key".to_owned();
            let all = keys.chain(signing.map(|key| (&name, &key.public_key, &key.fingerprint)));
            for (name, public, fingerprint) in all {
                let der = base64(public);
                if der.is_none_or(|der| sha256_hex(&der) != *fingerprint) {
                    found.push(format!(
                        "token {}: the fingerprint of {name} is not that of its public key",
                        token.name
                    ));
                }
            }
        }
        Ok(found)
    }
}

/// Decodes base 64 with padding.
pub(crate) fn base64(text: &str) -> Option<Vec<u8>> {
    use base64ct::Encoding as _;
    base64ct::Base64::decode_vec(text).ok()
}

pub(crate) fn custodians(plan: &Plan) -> Result<Vec<Custodian>, ssh::SshError> {
    let one = |custodian: &crate::plan::Custodian| {
        Ok(Custodian {
            name: custodian.name.clone(),
            ssh_key: custodian.ssh_key.trim().to_owned(),
            fingerprint: ssh::Key::parse(&custodian.ssh_key)?.fingerprint(),
        })
    };
    plan.custodians.iter().map(one).collect()
}

impl Token {
    fn begin(token: &crate::plan::Token) -> Self {
        Self {
            name: token.name.clone(),
            module: token.module.display().to_string(),
            ..Self::default()
        }
    }

    /// The share with this number.
    pub fn share(&self, number: u8) -> Option<&ShareDigest> {
        let shares = self.so_pin.as_ref()?.shares.iter();
        shares
            .into_iter()
            .find(|share| share.number == u64::from(number))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::plan::tests::text;

    /// A transcript of the plan, at its start.
    pub(crate) fn begun(text: &str) -> Transcript {
        let plan = Plan::parse(text).unwrap();
        let begun = Transcript::begin(
            &plan,
            text,
            "keybroker 0.1.0".to_owned(),
            "00".repeat(32),
            "local-uid:0".to_owned(),
            "2026-11-30T04:00:00Z",
        );
        begun.unwrap()
    }

    #[test]
    fn a_transcript_is_read_back() {
        let transcript = begun(&text());
        let bytes = transcript.to_canonical().unwrap();
        assert!(bytes.starts_with("{\"custodians\":[{"), "{bytes}");
        assert_eq!(Transcript::parse(bytes.as_bytes()).unwrap(), transcript);
        assert_eq!(transcript.contradictions().unwrap(), Vec::<String>::new());
    }

    #[test]
    fn another_form_of_the_same_content_is_refused() {
        let bytes = begun(&text()).to_canonical().unwrap();
        let value: Value = serde_json::from_str(&bytes).unwrap();
        for other in [
            serde_json::to_string_pretty(&value).unwrap(),
            format!("{bytes}\n"),
            format!(" {bytes}"),
        ] {
            let refused = Transcript::parse(other.as_bytes()).unwrap_err();
            assert!(
                matches!(refused, TranscriptError::NotCanonical(_)),
                "{refused}"
            );
        }
        let twice = bytes.replacen("\"quorum\":2", "\"quorum\":1,\"quorum\":2", 1);
        assert!(Transcript::parse(twice.as_bytes()).is_err());
        let newer = bytes.replace(FORMAT, "keybroker-ceremony-transcript/2");
        let refused = Transcript::parse(newer.as_bytes()).unwrap_err().to_string();
        assert!(refused.contains("this release reads"), "{refused}");
        let unknown = bytes.replacen("\"custodians\"", "\"custodianz\"", 1);
        assert!(matches!(
            Transcript::parse(unknown.as_bytes()),
            Err(TranscriptError::Json(_))
        ));
    }

    /// One token must not stand for two tokens of the plan by its name.
    #[test]
    fn each_token_of_the_plan_is_in_the_transcript() {
        let two = text().replacen(
            "[[token]]",
            "[[token]]\nname = \"a\"\nmodule = \"/other.so\"\nlabel = \"keybroker\"\n[[token]]\nname = \"b\"",
            1,
        );
        let two = two.replacen("witnesses", "register = false\nwitnesses", 1);
        let mut transcript = begun(&two);
        assert_eq!(transcript.contradictions().unwrap(), Vec::<String>::new());
        transcript.tokens.truncate(1);
        transcript.tokens[0].name = "a, b".to_owned();
        let found = transcript.contradictions().unwrap().join("\n");
        assert!(found.contains("the transcript has the tokens"), "{found}");
        let plan = transcript.plan().unwrap();
        let found = crate::complete::problems(&transcript, &plan).join("\n");
        assert!(found.contains("1 tokens, but the plan has 2"), "{found}");
    }

    #[test]
    fn contradictions_are_named() {
        let good = begun(&text());
        let found = |change: fn(&mut Transcript)| {
            let mut changed = good.clone();
            change(&mut changed);
            changed.contradictions().unwrap().join("\n")
        };
        assert!(found(|one| one.plan.text.push('\n')).contains("SHA-256"));
        assert!(found(|one| one.quorum = 1).contains("quorum"));
        assert!(found(|one| one.custodians[0].name = "eve".to_owned()).contains("custodians"));
        assert!(found(|one| one.tokens[0].name = "other".to_owned()).contains("tokens"));
        assert!(found(|one| one.tokens.clear()).contains("tokens"));
        let key = |one: &mut Transcript| {
            one.tokens[0].signing_key = Some(SigningKey {
                id: String::new(),
                public_key: "AAAA".to_owned(),
                fingerprint: "00".repeat(32),
                attributes: Vec::new(),
            });
        };
        assert!(found(key).contains("fingerprint of signing key"));
    }
}
