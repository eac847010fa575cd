//! `keybroker audit envelopes`: lists the revisions under a compromised wrapping key that a re-wrap may move.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use clap::Args;
use serde_json::{Value, json};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use keybroker_audit as audit;
use keybroker_audit::Entry;
use keybroker_broker::rewrap::listed::{EnvelopeDigest, Listed};
use keybroker_core::{call::Timestamp, error::chain, key::WrappingKeyId, state::StateDirectory};
use keybroker_store as store;
use keybroker_store::{PAGE_SIZE_MAX, RevisionPlace, Settings};

use crate::cli::{
    Context, block_on,
    change::audited,
    exit::{Exit, Failure},
};

/// The file that each directory of an audit log has.
const LOG_ID: &str = "log-id";

#[derive(Args, Debug)]
pub(in crate::cli) struct Arguments {
    /// The compromised wrapping key, 32 hexadecimal digits
    #[arg(long, value_name = "ID")]
    wrapping_key: String,
    /// URL of a backup of the database from before the compromise, in the form of `store.url`, with the schema of this release
    #[arg(long, value_name = "URL")]
    backup: Option<String>,
    /// Only entries of logs from before this time count; RFC 3339, such as 2026-01-31T00:00:00Z. Name a time from before the compromise
    #[arg(long, value_name = "TIME", value_parser = moment)]
    before: Timestamp,
    /// Directories of logs [default: all logs below `audit.directory`]
    directories: Vec<PathBuf>,
}

pub(super) fn list(arguments: &Arguments, context: &Context) -> Result<(), Failure> {
    let key = WrappingKeyId::from_hex(&arguments.wrapping_key).ok_or_else(|| {
        let what = format!(
            "{:?} is not a key id of 32 hexadecimal digits",
            arguments.wrapping_key
        );
        Failure::new(Exit::Usage, what)
    })?;
    let config = context.config()?;
    let directories = if arguments.directories.is_empty() {
        logs_below(&config.audit.directory)?
    } else {
        arguments.directories.clone()
    };
    let mut from_logs = BTreeSet::new();
    for directory in &directories {
        from_logs.extend(stored_in(directory, key, arguments.before)?);
    }
    let from_backup = match &arguments.backup {
        Some(url) => block_on(backed_up(url, key))??,
        None => BTreeSet::new(),
    };
    let (of_logs, of_backup) = (from_logs.len(), from_backup.len());
    let listed = Listed::new(from_logs.into_iter().chain(from_backup));
    let state = StateDirectory::below(&config.audit.directory);
    let describe = |entry: &mut Entry| {
        entry.wrapping_key = Some(key);
        entry.count = u64::try_from(listed.len()).ok();
    };
    audited(
        context,
        &config,
        "wrapping_key.list_envelopes",
        describe,
        || {
            let written = listed.write(&state, key);
            written.map_err(|error| Failure::new(Exit::Internal, chain(&error)))
        },
    )?;
    context.output.fields(vec![
        ("wrapping_key", json!(key.to_string())),
        ("logs", json!(directories.len())),
        ("from_logs", json!(of_logs)),
        ("from_backup", json!(of_backup)),
        ("listed", json!(listed.len())),
    ])
}

/// The directories of all logs of this host.
fn logs_below(directory: &Path) -> Result<Vec<PathBuf>, Failure> {
    let unreadable = |error: std::io::Error| {
        let what = format!("cannot read {}: {error}", directory.display());
        Failure::new(Exit::Configuration, what)
    };
    let mut logs = Vec::new();
    for entry in fs::read_dir(directory).map_err(unreadable)? {
        let path = entry.map_err(unreadable)?.path();
        if path.join(LOG_ID).exists() {
            logs.push(path);
        }
    }
    logs.sort();
    Ok(logs)
}

fn moment(text: &str) -> Result<Timestamp, time::error::Parse> {
    let at = OffsetDateTime::parse(text, &Rfc3339)?;
    let micros = at.unix_timestamp_nanos() / 1_000;
    // The years 0 to 9999 fit.
    Ok(Timestamp::from_micros(
        i64::try_from(micros).unwrap_or_default(),
    ))
}

/// The digests of the envelopes under a wrapping key that a broker stored before a time, according to a log without problems.
fn stored_in(
    directory: &Path,
    key: WrappingKeyId,
    before: Timestamp,
) -> Result<Vec<EnvelopeDigest>, Failure> {
    let report = audit::verify(directory)?;
    if !report.problems.is_empty() {
        let what = format!(
            "the log in {} was changed after it was written, so its entries prove nothing:\n  {}",
            directory.display(),
            report.problems.join("\n  ")
        );
        return Err(Failure::new(Exit::Verification, what)
            .hint("pass the directory of an unchanged copy of the log, or leave this log out"));
    }
    let digest = |line: &str| digest_in(line, key, before);
    let lines = audit::tail_matching(directory, usize::MAX, |line| digest(line).is_some())?;
    Ok(lines.iter().filter_map(|line| digest(line)).collect())
}

/// The digest of an envelope under a wrapping key that was stored before a time according to a line of a log. A change whose outcome
/// was found out after a crash counts, too. A restore does not count: its material is that of a stored row, which a person who knows
/// the wrapping key may have made.
fn digest_in(line: &str, key: WrappingKeyId, before: Timestamp) -> Option<EnvelopeDigest> {
    const ACTIONS: [&str; 2] = ["user_key.create", "user_key.replace"];
    let entry: Value = serde_json::from_str(line).ok()?;
    let text = |field: &str| entry[field].as_str().unwrap_or_default();
    let is_stored = ["outcome", "recovered"].contains(&text("kind")) && text("outcome") == "ok";
    let is_of_key = text("wrapping_key") == key.to_string();
    let is_earlier = entry["time_us"]
        .as_i64()
        .is_some_and(|at_us| at_us < before.micros());
    if !is_earlier || !is_stored || !is_of_key || !ACTIONS.contains(&text("action")) {
        return None;
    }
    let mut digest = EnvelopeDigest::default();
    hex::decode_to_slice(text("digest"), &mut digest).ok()?;
    Some(digest)
}

/// The digests of the envelopes under a wrapping key in a backup.
async fn backed_up(url: &str, key: WrappingKeyId) -> Result<BTreeSet<EnvelopeDigest>, Failure> {
    let store = store::open(&Settings::new(url)).await?;
    let mut digests = BTreeSet::new();
    let mut place = RevisionPlace::START;
    loop {
        let rows = store.revisions_under(key, &place, PAGE_SIZE_MAX).await?;
        let Some(last) = rows.last() else { break };
        place = last.place.clone();
        let read = rows.iter().filter_map(|row| row.row.as_ref().ok());
        digests.extend(read.map(|row| Listed::digest_of(&row.envelope)));
    }
    store.close().await;
    Ok(digests)
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: WrappingKeyId = WrappingKeyId::from_bytes([0x0a; 16]);

    #[test]
    fn only_the_early_outcome_of_new_material_counts() {
        let digest = "ab".repeat(32);
        let line = |action: &str, kind: &str, outcome: &str, key: &str| {
            json!({
                "action": action, "kind": kind, "outcome": outcome, "wrapping_key": key, "digest": digest, "time_us": 99,
            })
            .to_string()
        };
        let key = KEY.to_string();
        let before = Timestamp::from_micros(100);
        let stored = |line: &str| digest_in(line, KEY, before) == Some([0xab; 32]);
        assert!(stored(&line("user_key.create", "outcome", "ok", &key)));
        assert!(stored(&line("user_key.replace", "recovered", "ok", &key)));
        for other in [
            line("user_key.create", "intent", "ok", &key),
            line("user_key.create", "outcome", "failed", &key),
            line("user_key.create", "outcome", "ok", &"0b".repeat(16)),
            line("user_key.restore", "outcome", "ok", &key),
            line("wrapping_key.rewrap_batch", "outcome", "ok", &key),
            line("user_key.delete", "outcome", "ok", &key).replace("digest", "other"),
            line("user_key.create", "outcome", "ok", &key).replace("99", "100"),
            line("user_key.create", "outcome", "ok", &key).replace("time_us", "other"),
            "not JSON".to_owned(),
        ] {
            assert_eq!(digest_in(&other, KEY, before), None, "{other}");
        }
    }

    #[test]
    fn a_time_has_a_zone() {
        let at = moment("2026-01-31T01:00:00.5+01:00").unwrap();
        assert_eq!(at.to_string(), "2026-01-31T00:00:00.5Z");
        for wrong in ["", "2026-01-31", "2026-01-31T00:00:00"] {
            assert!(moment(wrong).is_err(), "{wrong}");
        }
    }
}
