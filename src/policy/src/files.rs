//! Finds, checks and reads the operator's policy files, and enforces limits on their number and length.

use std::{fs, mem, path::Path, string::FromUtf8Error};

use aws_lc_rs::digest;

use keybroker_core::{
    error::chain,
    trusted_file::{self, Purpose},
};

use super::{
    Settings,
    problem::{Problem, Problems, Source},
};

/// Largest number of policy files.
pub(super) const FILES_MAX: usize = 64;
/// Longest file, in bytes.
pub(super) const FILE_BYTES_MAX: u64 = 64 * 1024;
/// Longest file name, in bytes. If a policy has no id, the audit log contains the name of its file.
const NAME_BYTES_MAX: usize = 64;
/// Largest number of ignored files that are reported by name.
const IGNORED_MAX: usize = 8;
const SUFFIX: &str = ".cedar";
const POLICIES: Purpose = Purpose::trust("other users could decide who obtains keys");

/// Reads the operator's files, sorted by name. Returns no files if no directory is configured.
pub(super) fn read(settings: &Settings) -> Result<Vec<Source>, Problems> {
    let Some(directory) = &settings.directory else {
        return Ok(Vec::new());
    };
    let directory = &trusted_file::check_directory(directory, POLICIES).map_err(|error| {
        let remedy = if error.is_missing() {
            "; create the directory, or correct `[policy] directory`"
        } else {
            ""
        };
        Problem::of(format!("{error}{remedy}"))
    })?;
    let shown = directory.display();
    let unreadable = |error: std::io::Error| Problem::of(format!("cannot read {shown}: {error}"));
    let mut names = Vec::new();
    for entry in fs::read_dir(directory).map_err(unreadable)? {
        let name = entry.map_err(unreadable)?.file_name();
        let name = name.to_string_lossy();
        // Hidden files are temporary files of an editor, or links inside a mounted ConfigMap.
        if !name.starts_with('.') && name.ends_with(SUFFIX) {
            names.push(name.into_owned());
        }
        if names.len() > FILES_MAX {
            let what = format!(
                "{shown} contains more than {FILES_MAX} files with the suffix {SUFFIX}; combine some of them"
            );
            return Err(Problem::of(what).into());
        }
    }
    names.sort();
    let mut problems = Vec::new();
    let mut sources = Vec::new();
    for name in names {
        match read_file(&directory.join(&name), &name) {
            Ok(text) => sources.push(Source { name, text }),
            Err(error) => problems.push(Problem::in_file(&name, chain(&error))),
        }
    }
    if problems.is_empty() {
        Ok(sources)
    } else {
        Err(Problems(problems))
    }
}

/// Returns the sorted names of a few files that are not read because their names do not end in
/// `.cedar`.
pub(super) fn ignored(settings: &Settings) -> Vec<String> {
    let directory = settings.directory.as_deref();
    let entries = directory.and_then(|directory| fs::read_dir(directory).ok());
    let names = entries
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.file_name().to_string_lossy().into_owned()));
    let mut ignored: Vec<String> = names
        .filter(|name| !name.starts_with('.') && !name.ends_with(SUFFIX))
        .take(IGNORED_MAX)
        .collect();
    ignored.sort();
    ignored
}

/// Returns the SHA-256 over the names and contents of all files.
pub(super) fn digest(sources: &[Source]) -> [u8; 32] {
    let mut context = digest::Context::new(&digest::SHA256);
    for part in sources.iter().flat_map(|one| [&one.name, &one.text]) {
        context.update(&u64::try_from(part.len()).unwrap_or(0).to_be_bytes());
        context.update(part.as_bytes());
    }
    let digest = context.finish();
    digest.as_ref().try_into().expect("SHA-256 gives 32 bytes")
}

/// The reason why a policy file cannot be read.
#[derive(Debug, thiserror::Error)]
enum FileError {
    #[error(
        "a file name must be at most {NAME_BYTES_MAX} bytes of [A-Za-z0-9._-], because the audit log shows it"
    )]
    Name,
    #[error(transparent)]
    File(#[from] trusted_file::Error),
    #[error("the file is not UTF-8; save it as UTF-8")]
    NotUtf8(#[from] FromUtf8Error),
}

fn read_file(path: &Path, name: &str) -> Result<String, FileError> {
    let stem = name.strip_suffix(SUFFIX).unwrap_or(name);
    let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if stem.is_empty() || name.len() > NAME_BYTES_MAX || !name.chars().all(is_plain) {
        return Err(FileError::Name);
    }
    let mut bytes = trusted_file::read(path, FILE_BYTES_MAX, POLICIES)?;
    let text = String::from_utf8(mem::take(&mut *bytes))?;
    // A byte order mark at the start of a file is not part of a policy.
    Ok(text
        .strip_prefix('\u{feff}')
        .map(str::to_owned)
        .unwrap_or(text))
}
