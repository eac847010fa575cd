//! `keybroker ceremony sign` collects the signatures of custodians, and `keybroker ceremony verify` checks all of them.

use std::path::PathBuf;

use clap::Args;
use serde_json::json;

use keybroker_ceremony::{
    page, plan, sha256_hex,
    ssh::{AllowedSigners, Signature},
    transcript::{Status, Transcript},
    verify::{self, Demands, VerifyError},
};

use crate::{
    cli::{
        Context,
        exit::{Exit, Failure},
    },
    output_file,
};

use super::{Files, internal, read, read_signatures, read_text, read_transcript, usage};

/// Longest list of allowed signers, in bytes.
const ALLOWED_SIGNERS_BYTES_MAX: u64 = 1024 * 1024;

#[derive(Args, Debug)]
pub(in crate::cli) struct Sign {
    /// Transcript of the ceremony
    transcript: PathBuf,
    /// File that `ssh-keygen -Y sign` wrote; repeat the option for further custodians
    #[arg(long = "signature", value_name = "FILE", required = true)]
    signatures: Vec<PathBuf>,
}

#[derive(Args, Debug)]
pub(in crate::cli) struct Show {
    /// Transcript of the ceremony
    transcript: PathBuf,
}

#[derive(Args, Debug)]
pub(in crate::cli) struct Verify {
    /// Transcript of the ceremony; its signatures are in the file beside it with `.signatures` at the end of the name
    transcript: PathBuf,
    /// List of the custodians' SSH keys that you trust, in the format of `ssh-keygen -Y verify -f`
    #[arg(long, value_name = "FILE")]
    allowed_signers: PathBuf,
    /// Number of custodians who must have signed; at least the quorum of the plan
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    quorum: u16,
    /// Also check that the ceremony followed this plan
    #[arg(long, value_name = "FILE")]
    plan: Option<PathBuf>,
    /// Also check that the ceremony made the wrapping key with this fingerprint, as `key list` shows it
    #[arg(long, value_name = "SHA256")]
    key: Option<String>,
}

impl From<VerifyError> for Failure {
    fn from(error: VerifyError) -> Self {
        Self::new(Exit::Verification, error.to_string())
    }
}

/// Prints what a custodian signs, from the transcript itself.
pub(super) fn show(arguments: &Show, context: &Context) -> Result<(), Failure> {
    let files = Files::beside(&arguments.transcript);
    let bytes = read_transcript(&files.transcript)?;
    let signatures = verify::parse(&read_signatures(&files.signatures)?)?;
    let (transcript, sha256) = verify::check(&bytes, &signatures)?;
    let page = page::of_transcript(&transcript, &sha256);
    if context.output.is_json() {
        let shown = json!({"transcript_sha256": sha256, "page": page});
        return context.output.json(&shown);
    }
    context.output.text(page.trim_end())
}

pub(super) fn sign(arguments: &Sign, context: &Context) -> Result<(), Failure> {
    let files = Files::beside(&arguments.transcript);
    let bytes = read_transcript(&files.transcript)?;
    let transcript = Transcript::parse(&bytes).map_err(VerifyError::from)?;
    if transcript.status != Status::Complete {
        let what =
            "the ceremony is incomplete: a step failed or did not end, so there is nothing to sign";
        return Err(Failure::new(Exit::Verification, what));
    }
    let mut signatures = verify::parse(&read_signatures(&files.signatures)?)?;
    verify::check(&bytes, &signatures)?;
    for path in &arguments.signatures {
        let refused =
            |what: String| Failure::new(Exit::Verification, format!("{}: {what}", path.display()));
        let text = read_signatures(path)?;
        let signature = Signature::parse(&text).map_err(|error| refused(error.to_string()))?;
        let custodian = verify::custodian_of(&transcript, &bytes, &signature)
            .map_err(|error| refused(error.to_string()))?;
        signatures.add(custodian, &text);
    }
    let text = signatures.to_text().map_err(|error| internal(&error))?;
    output_file::replace_durably(&files.signatures, &text).map_err(|error| {
        usage(format!(
            "cannot write {}: {error}",
            files.signatures.display()
        ))
    })?;
    let has_signed = |name: &String| {
        signatures
            .custodians
            .iter()
            .any(|one| one.custodian == *name)
    };
    let rows = transcript.custodians.iter().map(|one| {
        vec![
            ("custodian", json!(one.name)),
            ("fingerprint", json!(one.fingerprint)),
            ("signed", json!(has_signed(&one.name))),
        ]
    });
    context
        .output
        .list(rows.collect(), "the plan has no custodian")
}

pub(super) fn verify(arguments: &Verify, context: &Context) -> Result<(), Failure> {
    let files = Files::beside(&arguments.transcript);
    let bytes = read_transcript(&files.transcript)?;
    let list = read_text(&arguments.allowed_signers, ALLOWED_SIGNERS_BYTES_MAX)?;
    let allowed = AllowedSigners::parse(&list)
        .map_err(|error| usage(format!("{}: {error}", arguments.allowed_signers.display())))?;
    let plan = match &arguments.plan {
        Some(path) => Some(sha256_hex(&read(path, plan::BYTES_MAX)?)),
        None => None,
    };
    let signatures = read_signatures(&files.signatures)?;
    let demands = Demands {
        allowed: &allowed,
        quorum: arguments.quorum.into(),
        plan_sha256: plan.as_deref(),
    };
    let (transcript, verified) = verify::verify(&bytes, &signatures, demands)?;
    let keys = || transcript.tokens.iter().flat_map(|token| &token.keys);
    if let Some(wanted) = &arguments.key
        && !keys().any(|key| key.fingerprint == *wanted)
    {
        let what = format!("the ceremony made no wrapping key with the fingerprint {wanted}");
        return Err(Failure::new(Exit::Verification, what));
    }
    for reason in &verified.not_counted {
        context
            .output
            .note(&format!("note: a signature does not count: {reason}"));
    }
    context.output.fields(vec![
        ("title", json!(transcript.title)),
        ("transcript_sha256", json!(verified.transcript_sha256)),
        ("plan_sha256", json!(transcript.plan.sha256)),
        ("started", json!(transcript.started)),
        ("ended", json!(transcript.ended)),
        ("tokens", json!(verified.tokens.join(", "))),
        ("serials", json!(joined(&mut serials(&transcript)))),
        (
            "keys",
            json!(joined(&mut keys().map(|key| &key.fingerprint))),
        ),
        ("custodians", json!(verified.custodians.join(", "))),
        ("quorum", json!(arguments.quorum)),
    ])
}

/// The serial numbers of the tokens.
fn serials(transcript: &Transcript) -> impl Iterator<Item = &String> {
    let identities = transcript.tokens.iter().flat_map(|token| &token.identity);
    identities.map(|identity| &identity.serial)
}

fn joined(texts: &mut dyn Iterator<Item = &String>) -> String {
    texts.map(String::as_str).collect::<Vec<_>>().join(", ")
}
