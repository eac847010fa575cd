//! SSH public keys, the signatures of `ssh-keygen -Y sign`, and lists of allowed signers.
//!
//! The crate `ssh-key` parses keys and signatures. `aws-lc-rs` verifies, so that this program has one cryptographic
//! library for it. Key types: Ed25519, Ed25519 on a security key (FIDO), and RSA with at least 2048 bits.
//!
//! Mitigation: M24 of `THREAT_MODEL.md`.

use aws_lc_rs::signature::{
    self, ED25519, RSA_PKCS1_2048_8192_SHA256, RSA_PKCS1_2048_8192_SHA512, UnparsedPublicKey,
};
use ssh_key::{Algorithm, HashAlg, PublicKey, SshSig, public::KeyData};

/// Namespace of the signatures of a transcript (`ssh-keygen -Y sign -n`). A signature for another purpose has another
/// namespace.
pub const NAMESPACE: &str = "keybroker-ceremony";
/// The flag of a security key for "a person touched the key" (PROTOCOL.u2f).
const USER_PRESENT: u8 = 1;
/// Length of flags and counter after the signature of a security key, in bytes.
const SECURITY_KEY_TRAILER_BYTES: usize = 5;
/// Beginnings of the types of keys that `ssh-keygen` makes and this program does not support.
const UNSUPPORTED_TYPES: [&str; 3] = ["ecdsa-", "sk-ecdsa-", "ssh-dss"];
const SUPPORTED: &str =
    "use ssh-ed25519, sk-ssh-ed25519@openssh.com or ssh-rsa with at least 2048 bits";

/// Why a key, a signature or a list of allowed signers cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SshError {
    /// The text is not an SSH public key.
    #[error("this is not an SSH public key in one line, as in a file id_ed25519.pub ({0})")]
    Key(String),
    /// The type of the key is not supported.
    #[error("the key has the type {0}; {SUPPORTED}")]
    KeyType(String),
    /// The text is not a signature of `ssh-keygen -Y sign`.
    #[error("this is not a signature of `ssh-keygen -Y sign` ({0})")]
    Signature(String),
    /// The signature was made for another purpose.
    #[error(
        "the signature has the namespace {0:?} instead of {NAMESPACE:?}; sign with `ssh-keygen -Y sign -n {NAMESPACE}`"
    )]
    Namespace(String),
    /// The signature does not fit the transcript.
    #[error(
        "the signature does not fit the transcript: one of the two was changed, or the signature is of another file"
    )]
    DoesNotFit,
    /// The security key signed without being touched.
    #[error("the security key signed without being touched")]
    NotTouched,
    /// A line of the list of allowed signers cannot be used.
    #[error("line {line}: {source}")]
    AllowedSigners {
        /// Number of the line, from 1.
        line: usize,
        /// The problem with its remedy.
        source: Box<SignerError>,
    },
}

/// The reason why a line of the list of allowed signers cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SignerError {
    /// The line has fewer than two parts.
    #[error("a line has the names of a signer, a blank, and an SSH public key")]
    Parts,
    /// The name of a signer is empty or a pattern.
    #[error("the name of a signer must be written in full, without patterns")]
    Name,
    /// The line has an option other than `namespaces`.
    #[error("only the option namespaces=\"…\" is supported; write the key without other options")]
    Option,
    /// The value of the option `namespaces` does not end.
    #[error("the option namespaces has no closing quote")]
    Quote,
    /// The key cannot be used.
    #[error(transparent)]
    Key(#[from] SshError),
}

/// An SSH public key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Key(KeyData);

impl Key {
    /// Reads a key in one line: type, base 64, optional comment.
    pub fn parse(text: &str) -> Result<Self, SshError> {
        let text = text.trim();
        let kind = text.split_whitespace().next().unwrap_or_default();
        let key = PublicKey::from_openssh(text).map_err(|error| {
            if UNSUPPORTED_TYPES
                .iter()
                .any(|start| kind.starts_with(start))
            {
                SshError::KeyType(kind.to_owned())
            } else {
                SshError::Key(error.to_string())
            }
        })?;
        Self::supported(key.key_data().clone())
    }

    fn supported(data: KeyData) -> Result<Self, SshError> {
        match &data {
            KeyData::Ed25519(_) | KeyData::SkEd25519(_) => Ok(Self(data)),
            KeyData::Rsa(key) => {
                let modulus = key.n.as_positive_bytes().unwrap_or_default();
                if modulus.len() < 256 {
                    return Err(SshError::KeyType(format!(
                        "ssh-rsa with {} bits",
                        modulus.len() * 8
                    )));
                }
                Ok(Self(data))
            }
            other => Err(SshError::KeyType(other.algorithm().as_str().to_owned())),
        }
    }

    /// The fingerprint as `ssh-keygen -l` shows it: `SHA256:…`.
    pub fn fingerprint(&self) -> String {
        self.0.fingerprint(HashAlg::Sha256).to_string()
    }
}

/// A signature of `ssh-keygen -Y sign`.
#[derive(Clone, Debug)]
pub struct Signature {
    parsed: SshSig,
    key: Key,
}

impl Signature {
    /// Reads a signature in its text form, which begins with `-----BEGIN SSH SIGNATURE-----`.
    pub fn parse(text: &str) -> Result<Self, SshError> {
        let unreadable = |error: ssh_key::Error| SshError::Signature(error.to_string());
        // `ssh-keygen` writes lines of 70 characters, and the reader of `ssh-key` expects exactly these.
        let parsed = SshSig::from_pem(text.trim_start()).map_err(unreadable)?;
        let key = Key::supported(parsed.public_key().clone())?;
        if parsed.namespace() != NAMESPACE {
            return Err(SshError::Namespace(parsed.namespace().to_owned()));
        }
        Ok(Self { parsed, key })
    }

    /// The key that signed, according to the signature.
    pub fn key(&self) -> &Key {
        &self.key
    }

    /// Whether the key of the signature signed the message.
    pub fn verify(&self, message: &[u8]) -> Result<(), SshError> {
        let signed = SshSig::signed_data(NAMESPACE, self.parsed.hash_alg(), message)
            .map_err(|error| SshError::Signature(error.to_string()))?;
        let bytes = self.parsed.signature_bytes();
        let result = match (&self.key.0, self.parsed.algorithm()) {
            (KeyData::Ed25519(key), Algorithm::Ed25519) => {
                UnparsedPublicKey::new(&ED25519, key.0).verify(&signed, bytes)
            }
            (KeyData::SkEd25519(key), Algorithm::SkEd25519) => {
                let (bytes, message, flags) = of_security_key(bytes, key.application(), &signed)?;
                if flags & USER_PRESENT == 0 {
                    return Err(SshError::NotTouched);
                }
                UnparsedPublicKey::new(&ED25519, key.public_key().0).verify(&message, bytes)
            }
            (KeyData::Rsa(key), Algorithm::Rsa { hash: Some(hash) }) => {
                let components = signature::RsaPublicKeyComponents {
                    n: key.n.as_positive_bytes().unwrap_or_default(),
                    e: key.e.as_positive_bytes().unwrap_or_default(),
                };
                let algorithm = match hash {
                    HashAlg::Sha256 => &RSA_PKCS1_2048_8192_SHA256,
                    _ => &RSA_PKCS1_2048_8192_SHA512,
                };
                components.verify(algorithm, &signed, bytes)
            }
            (_, other) => return Err(SshError::KeyType(other.as_str().to_owned())),
        };
        result.map_err(|_| SshError::DoesNotFit)
    }
}

/// The signature, the signed message and the flags of a security key (PROTOCOL.u2f): the key signs the digest of the
/// application, flags, a counter and the digest of the message.
fn of_security_key<'a>(
    bytes: &'a [u8],
    application: &str,
    signed: &[u8],
) -> Result<(&'a [u8], Vec<u8>, u8), SshError> {
    let short = || SshError::Signature("the signature of the security key is too short".to_owned());
    let split = bytes
        .len()
        .checked_sub(SECURITY_KEY_TRAILER_BYTES)
        .ok_or_else(short)?;
    let (bytes, trailer) = bytes.split_at(split);
    let digest = |bytes: &[u8]| aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, bytes);
    let mut message = digest(application.as_bytes()).as_ref().to_vec();
    message.extend_from_slice(trailer);
    message.extend_from_slice(digest(signed).as_ref());
    let flags = *trailer.first().ok_or_else(short)?;
    Ok((bytes, message, flags))
}

/// A list of allowed signers, in the format of `ssh-keygen -Y verify -f` (ssh-keygen(1), "ALLOWED SIGNERS").
///
/// Of the options, only `namespaces` is supported. A line with another option is refused, because ignoring the option
/// could accept a key that the option excludes.
#[derive(Clone, Debug, Default)]
pub struct AllowedSigners {
    entries: Vec<(Vec<String>, Key)>,
}

impl AllowedSigners {
    /// Reads a list. Empty lines and lines that begin with `#` are ignored.
    pub fn parse(text: &str) -> Result<Self, SshError> {
        let mut entries = Vec::new();
        for (index, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let entry = Self::entry(line).map_err(|source| SshError::AllowedSigners {
                line: index + 1,
                source: Box::new(source),
            })?;
            entries.extend(entry);
        }
        Ok(Self { entries })
    }

    /// Reads one line. `None` if the key is for other namespaces.
    fn entry(line: &str) -> Result<Option<(Vec<String>, Key)>, SignerError> {
        let (principals, rest) = line.split_once([' ', '\t']).ok_or(SignerError::Parts)?;
        let principals: Vec<String> = principals
            .trim_matches('"')
            .split(',')
            .map(str::to_owned)
            .collect();
        if principals
            .iter()
            .any(|name| name.is_empty() || name.contains(['*', '?', '!']))
        {
            return Err(SignerError::Name);
        }
        let rest = rest.trim_start();
        let has_options =
            !rest.starts_with("ssh-") && !rest.starts_with("sk-") && !rest.starts_with("ecdsa-");
        if !has_options {
            let key = Key::parse(rest)?;
            return Ok(Some((principals, key)));
        }
        let list = rest
            .strip_prefix("namespaces=\"")
            .ok_or(SignerError::Option)?;
        let (list, key) = list.split_once('"').ok_or(SignerError::Quote)?;
        let key = key.strip_prefix([' ', '\t']).ok_or(SignerError::Option)?;
        let key = Key::parse(key)?;
        let is_ours = list.split(',').any(|namespace| namespace == NAMESPACE);
        Ok(is_ours.then_some((principals, key)))
    }

    /// Whether the list allows this person to sign with this key.
    pub fn allows(&self, name: &str, key: &Key) -> bool {
        self.entries
            .iter()
            .any(|(names, allowed)| allowed == key && names.iter().any(|one| one == name))
    }

    /// Number of keys that may sign transcripts.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether no key may sign transcripts.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::{fs, process::Command};

    use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair as _};
    use ssh_key::public::{Ed25519PublicKey, SkEd25519};

    use super::*;
    use crate::plan::tests::{ADA, BOB};

    /// A person with a real SSH key.
    pub(crate) struct Person {
        folder: tempfile::TempDir,
    }

    impl Person {
        pub(crate) fn new(kind: &[&str]) -> Self {
            let folder = tempfile::tempdir().unwrap();
            let made = Command::new("ssh-keygen")
                .args(["-q", "-N", "", "-C", "", "-f"])
                .arg(folder.path().join("id"))
                .args(kind)
                .output()
                .expect("ssh-keygen is not installed: run scripts/install.sh");
            assert!(made.status.success(), "{made:?}");
            Self { folder }
        }

        pub(crate) fn public(&self) -> String {
            let text = fs::read_to_string(self.folder.path().join("id.pub")).unwrap();
            text.trim().to_owned()
        }

        pub(crate) fn sign(&self, message: &[u8], namespace: &str) -> String {
            let file = self.folder.path().join("message");
            fs::write(&file, message).unwrap();
            let signature = self.folder.path().join("message.sig");
            fs::remove_file(&signature).ok();
            let signed = Command::new("ssh-keygen")
                .args(["-Y", "sign", "-q", "-n", namespace, "-f"])
                .arg(self.folder.path().join("id"))
                .arg(&file)
                .output()
                .unwrap();
            assert!(signed.status.success(), "{signed:?}");
            fs::read_to_string(signature).unwrap()
        }
    }

    #[test]
    fn signatures_of_ssh_keygen_verify_and_changed_ones_do_not() {
        for kind in [&["-t", "ed25519"][..], &["-t", "rsa", "-b", "2048"]] {
            let person = Person::new(kind);
            let text = person.sign(b"transcript", NAMESPACE);
            let signature = Signature::parse(&text).unwrap();
            assert_eq!(signature.key(), &Key::parse(&person.public()).unwrap());
            signature.verify(b"transcript").unwrap();
            assert_eq!(signature.verify(b"transcripT"), Err(SshError::DoesNotFit));
            let other = Person::new(kind).sign(b"transcript", NAMESPACE);
            assert_ne!(Signature::parse(&other).unwrap().key(), signature.key());
        }
    }

    #[test]
    fn a_signature_for_another_purpose_and_other_texts_are_refused() {
        let person = Person::new(&["-t", "ed25519"]);
        let other = person.sign(b"transcript", "file");
        assert_eq!(
            Signature::parse(&other).unwrap_err(),
            SshError::Namespace("file".to_owned())
        );
        for text in ["", "-----BEGIN SSH SIGNATURE-----", &person.public()] {
            assert!(
                matches!(Signature::parse(text), Err(SshError::Signature(_))),
                "{text}"
            );
        }
        let good = person.sign(b"transcript", NAMESPACE);
        let middle = good.len() / 2;
        for at in [middle - 2, middle, middle + 3] {
            let mut bytes = good.clone().into_bytes();
            bytes[at] = if bytes[at] == b'A' { b'B' } else { b'A' };
            let changed = String::from_utf8(bytes).unwrap();
            let verified = Signature::parse(&changed).and_then(|one| one.verify(b"transcript"));
            assert!(changed == good || verified.is_err(), "{at}");
        }
    }

    #[test]
    fn other_types_of_keys_are_refused_with_the_supported_ones() {
        let message = Key::parse(&Person::new(&["-t", "ecdsa"]).public())
            .unwrap_err()
            .to_string();
        assert!(message.contains("ssh-ed25519"), "{message}");
        let message = Key::parse(&Person::new(&["-t", "rsa", "-b", "1024"]).public()).unwrap_err();
        assert!(message.to_string().contains("1024 bits"), "{message}");
        assert!(matches!(Key::parse("ssh-ed25519"), Err(SshError::Key(_))));
    }

    /// `ssh-keygen` cannot make such a signature without a device, so it is made here as PROTOCOL.u2f says.
    #[test]
    fn a_security_key_must_have_been_touched() {
        let pair = Ed25519KeyPair::from_seed_unchecked(&[7; 32]).unwrap();
        let public: [u8; 32] = pair.public_key().as_ref().try_into().unwrap();
        let key = KeyData::SkEd25519(SkEd25519::new(Ed25519PublicKey(public), "ssh:"));
        let signature = |flags: u8| {
            let signed = SshSig::signed_data(NAMESPACE, HashAlg::Sha512, b"transcript").unwrap();
            let trailer = [flags, 0, 0, 0, 9];
            let bytes = [&[0; 64][..], &trailer].concat();
            let (_, message, _) = of_security_key(&bytes, "ssh:", &signed).unwrap();
            let bytes = [pair.sign(&message).as_ref(), &trailer].concat();
            let made = ssh_key::Signature::new(Algorithm::SkEd25519, bytes).unwrap();
            let parsed = SshSig::new(key.clone(), NAMESPACE, HashAlg::Sha512, made).unwrap();
            Signature {
                parsed,
                key: Key(key.clone()),
            }
        };
        signature(USER_PRESENT).verify(b"transcript").unwrap();
        assert_eq!(
            signature(USER_PRESENT).verify(b"other"),
            Err(SshError::DoesNotFit)
        );
        assert_eq!(
            signature(0).verify(b"transcript"),
            Err(SshError::NotTouched)
        );
    }

    #[test]
    fn allowed_signers_are_read_as_ssh_keygen_reads_them() {
        let text = format!(
            "# people\n\nada {ADA}\nbob,robert namespaces=\"file,{NAMESPACE}\" {BOB}\neve namespaces=\"file\" {ADA}\n"
        );
        let allowed = AllowedSigners::parse(&text).unwrap();
        let (ada, bob) = (Key::parse(ADA).unwrap(), Key::parse(BOB).unwrap());
        assert!(allowed.allows("ada", &ada) && allowed.allows("robert", &bob));
        assert!(!allowed.allows("ada", &bob) && !allowed.allows("eve", &ada));
        assert_eq!(allowed.len(), 2);
        for (line, expected) in [
            (format!("* {ADA}"), "without patterns"),
            (
                format!("ada cert-authority {ADA}"),
                "only the option namespaces",
            ),
            (
                format!("ada valid-before=\"20300101\" {ADA}"),
                "only the option namespaces",
            ),
            (
                format!("ada namespaces=\"file\",cert-authority {ADA}"),
                "only the option namespaces",
            ),
            ("ada".to_owned(), "a line has"),
            ("ada ssh-ed25519 AAAA".to_owned(), "not an SSH public key"),
        ] {
            let message = AllowedSigners::parse(&format!("\n{line}"))
                .unwrap_err()
                .to_string();
            assert!(
                message.contains(expected) && message.starts_with("line 2"),
                "{message}"
            );
        }
    }
}
