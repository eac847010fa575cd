//! `keybroker key import`: imports the private key of a Bitwarden organisation, the only kind of key that is imported.

use std::path::{Path, PathBuf};

use base64ct::{Base64, Encoding as _};
use clap::{Args, ValueEnum};
use serde_json::json;
use zeroize::Zeroizing;

use crate::cli::{
    Context,
    change::audited,
    exit::{Exit, Failure},
    pin::{UserPin, log_in},
    secrets::Source,
};
use keybroker_audit::Entry;
use keybroker_bitwarden::{EncString, SymmetricKey};
use keybroker_core::{
    organization::Guid,
    pem,
    trusted_file::{self, Purpose},
};
use keybroker_worker_protocol::private_key::PrivateParts;

const PRIVATE_KEY: Purpose = Purpose::secret("private key of an organisation");
/// Longest file with a private key, in bytes. A PKCS#8 key of RSA-2048 has about 1,220 bytes, and its encrypted form about 1,750.
const FILE_BYTES_MAX: u64 = 16 * 1_024;
/// Length of the symmetric key of an organisation, in bytes.
const SYMMETRIC_BYTES: usize = 64;

/// The purpose of an imported key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum ImportPurpose {
    /// The key of a Bitwarden organisation, for `keybroker bitwarden approvals`
    Organization,
}

#[derive(Args, Debug)]
pub(in crate::cli) struct Import {
    /// Purpose of the key
    #[arg(long, value_name = "PURPOSE")]
    purpose: ImportPurpose,
    /// GUID of the organisation
    #[arg(long, value_name = "GUID")]
    organization: String,
    /// File with the private key, readable only by its owner: PKCS#8 in PEM or DER without a password, or the organisation's
    /// encrypted private key as the server sends it
    #[arg(long, value_name = "FILE")]
    key_file: PathBuf,
    /// File with the symmetric key of the organisation (64 bytes, raw or in base64), which decrypts an encrypted private key
    #[arg(long, value_name = "FILE")]
    organization_key_file: Option<PathBuf>,
    #[command(flatten)]
    pin: UserPin,
}

pub(super) fn import(arguments: &Import, context: &Context) -> Result<(), Failure> {
    let ImportPurpose::Organization = arguments.purpose;
    let organization = Guid::parse(&arguments.organization).ok_or_else(|| {
        let what = format!("--organization {:?} is not a GUID", arguments.organization);
        Failure::new(Exit::Usage, what)
    })?;
    let config = context.config_for_token()?;
    let pkcs8 = private_key(arguments)?;
    let id = organization.key_id();
    let admin = log_in(&config, &arguments.pin.get(config.token())?, true, &[])?;
    let describe = |entry: &mut Entry| entry.wrapping_key = Some(id);
    let key = audited(
        context,
        &config,
        "organization_key.import",
        describe,
        || Ok(admin.import_organization_key(id, &pkcs8)?),
    )?;
    drop(pkcs8);
    context.output.note(
        "This key was imported: copies of it exist outside the token, and the token cannot prove otherwise. Destroy the files from \
         which you imported it, and limit who can decrypt the organisation's encrypted private key on the server \
         (docs/bitwarden-approvals.md).",
    );
    let attributes: Vec<_> = key.attributes.iter().map(|found| &found.verdict).collect();
    context.output.fields(vec![
        ("organization", json!(organization.to_string())),
        ("cka_id", json!(id.to_string())),
        ("origin", json!("imported")),
        ("public_key_sha256", json!(key.fingerprint.to_string())),
        ("attributes", json!(attributes)),
    ])
}

/// Reads the private key, and decrypts it if it is encrypted.
fn private_key(arguments: &Import) -> Result<Zeroizing<Vec<u8>>, Failure> {
    let path = &arguments.key_file;
    let refuse =
        |why: String| Failure::new(Exit::Usage, format!("--key-file {}: {why}", path.display()));
    let bytes = trusted_file::read(path, FILE_BYTES_MAX, PRIVATE_KEY)
        .map_err(|error| refuse(error.to_string()))?;
    let encrypted = std::str::from_utf8(&bytes)
        .ok()
        .and_then(|text| EncString::parse(text.trim()).ok());
    let der = match (encrypted, &arguments.organization_key_file) {
        (Some(encrypted), Some(file)) => decrypt(&encrypted, file)?,
        (Some(_), None) => {
            return Err(refuse("the private key is encrypted".to_owned())
                .hint("pass the symmetric key of the organisation with --organization-key-file"));
        }
        (None, Some(_)) => {
            let is_plain =
                bytes.starts_with(b"-----BEGIN ") || PrivateParts::from_pkcs8(&bytes).is_ok();
            let what = if is_plain {
                "the private key is not encrypted, so --organization-key-file is not needed"
            } else {
                "not an encrypted private key as the server sends it (`2.…|…|…`)"
            };
            return Err(refuse(what.to_owned()));
        }
        (None, None) if bytes.starts_with(b"-----BEGIN ") => {
            let key = pem::private_key(&bytes).map_err(|error| refuse(error.to_string()))?;
            Zeroizing::new(key.secret_der().to_vec())
        }
        (None, None) => bytes,
    };
    // The worker checks the key again. This check gives a message about the file before the token is opened.
    PrivateParts::from_pkcs8(&der).map_err(|error| refuse(error.to_string()))?;
    Ok(der)
}

/// Decrypts the organisation's encrypted private key, which is the base64 of the PKCS#8 key or the PKCS#8 key itself.
fn decrypt(encrypted: &EncString, file: &Path) -> Result<Zeroizing<Vec<u8>>, Failure> {
    let source = Source {
        what: "--organization-key-file",
        file: Some(file),
        descriptor: None,
    };
    let failed = |error: keybroker_bitwarden::Error| {
        Failure::new(Exit::Verification, error.to_string())
            .hint("check that both files belong to the same organisation")
    };
    let key = SymmetricKey::from_bytes(source.key(SYMMETRIC_BYTES)?).map_err(failed)?;
    let plain = key.decrypt(encrypted).map_err(failed)?;
    let text = std::str::from_utf8(&plain).ok();
    let decoded = text.and_then(|text| Base64::decode_vec(text.trim()).ok());
    Ok(decoded.map_or(plain, Zeroizing::new))
}
