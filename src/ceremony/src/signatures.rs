//! The file with the signatures of a transcript. It lies beside the transcript, so that the transcript never changes.

use serde::{Deserialize, Serialize};

/// The format of the file, for readers of later releases.
pub const FORMAT: &str = "keybroker-ceremony-signatures/1";
/// Longest file, in bytes.
pub const BYTES_MAX: u64 = 1024 * 1024;

/// The signatures of a transcript.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Signatures {
    /// [`FORMAT`].
    pub format: String,
    /// SHA-256 of the transcript, in hexadecimal.
    pub transcript_sha256: String,
    /// The signatures of the tokens.
    pub tokens: Vec<TokenSignature>,
    /// The signatures of the custodians.
    pub custodians: Vec<CustodianSignature>,
}

/// The signature of a token's signing key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenSignature {
    /// Name of the token in the plan.
    pub token: String,
    /// The algorithm.
    pub algorithm: SignatureAlgorithm,
    /// The signature in base 64.
    pub signature: String,
}

/// The algorithm of a token's signature.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SignatureAlgorithm {
    /// RSASSA-PSS with SHA-256, MGF1 with SHA-256, and a salt of 32 bytes.
    #[serde(rename = "RSA-PSS-SHA-256")]
    RsaPssSha256,
    /// RSASSA-PKCS1-v1_5 with SHA-256.
    #[serde(rename = "RSA-PKCS1-SHA-256")]
    RsaPkcs1Sha256,
}

/// The signature of a custodian's SSH key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CustodianSignature {
    /// Name of the custodian in the plan.
    pub custodian: String,
    /// The text that `ssh-keygen -Y sign` wrote.
    pub signature: String,
}

impl Signatures {
    /// A file without signatures.
    pub fn new(transcript_sha256: String) -> Self {
        Self {
            format: FORMAT.to_owned(),
            transcript_sha256,
            ..Self::default()
        }
    }

    /// The text of the file.
    pub fn to_text(&self) -> Result<String, serde_json::Error> {
        Ok(serde_json::to_string_pretty(self)? + "\n")
    }

    /// Adds a custodian's signature. A signature that the custodian gave before is replaced.
    pub fn add(&mut self, custodian: &str, signature: &str) {
        self.custodians.retain(|one| one.custodian != custodian);
        self.custodians.push(CustodianSignature {
            custodian: custodian.to_owned(),
            signature: signature.to_owned(),
        });
        self.custodians
            .sort_by(|one, other| one.custodian.cmp(&other.custodian));
    }
}
