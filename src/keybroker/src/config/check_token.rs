//! Checks the values of the settings of one token.

use std::ops::RangeInclusive;

use keybroker_core::{key::WrappingKeyId, trusted_file};
use keybroker_hsm::Settings;
use keybroker_pkcs11::{NEGATIVE_TESTS, attribute_check};
use keybroker_worker_protocol::integrity_file::{self, IntegrityFileError};

/// Length of `CK_TOKEN_INFO.label` in bytes.
const LABEL_BYTES: usize = 32;
/// Maximum number of integrity keys in the memory of the workers. The maximum limits the length of
/// the audit entry that contains the digests of all integrity key files.
const INTEGRITY_KEYS_MAX: usize = 100;

/// The problems of the settings that `serve` needs to select a token and to log in.
pub(super) fn selection_problems(token: &Settings) -> Vec<String> {
    let mut problems = Vec::new();
    let selectors = [&token.label, &token.serial, &token.uri];
    if selectors
        .iter()
        .filter(|selector| selector.is_some())
        .count()
        != 1
    {
        problems.push(
            "[token]: set exactly one of `label`, `serial` and `uri` to select the token"
                .to_owned(),
        );
    }
    if token.pin_file.is_none() && !token.is_without_login() {
        problems.push(
            "[token]: set `pin_file` to a file that contains the user PIN and that only this user can read"
                .to_owned(),
        );
    }
    problems
}

/// The problems of a token's settings that are relevant to every command.
pub(super) fn token_problems(token: &Settings) -> Vec<String> {
    let mut problems = Vec::new();
    let mut range = |name: &str, value: usize, range: RangeInclusive<usize>| {
        if !range.contains(&value) {
            problems.push(format!(
                "[token]: `{name}` is {value}; it must be {} to {}",
                range.start(),
                range.end()
            ));
        }
    };
    range("workers", token.workers, 1..=64);
    range("sessions_per_worker", token.sessions_per_worker, 1..=256);
    range("queue_length_max", token.queue_length_max, 1..=65_536);
    for (principal, weight) in &token.weights {
        range(
            &format!("weights.{principal:?}"),
            usize::try_from(*weight).unwrap_or(usize::MAX),
            1..=100,
        );
    }
    let call_timeout_ms = usize::try_from(token.call_timeout_ms).unwrap_or(usize::MAX);
    range("call_timeout_ms", call_timeout_ms, 1_000..=600_000);
    if let Some(label) = token
        .label
        .as_ref()
        .filter(|label| label.len() > LABEL_BYTES)
    {
        problems.push(format!(
            "[token]: `label` has {} bytes; the label of a token has at most {LABEL_BYTES} bytes",
            label.len()
        ));
    }
    problems.extend(environment_problems(token));
    problems.extend(integrity_key_problems(token));
    for exception in &token.attribute_exceptions {
        if !attribute_check::EXCEPTIONS
            .iter()
            .any(|known| known.attribute == exception)
        {
            problems.push(format!(
                "[token]: `attribute_exceptions` has {exception:?}, for which no exception is allowed; {}",
                if attribute_check::is_checked(exception) {
                    "without this attribute a key could leave the token"
                } else {
                    "the broker does not check an attribute with this name"
                }
            ));
        }
    }
    for test in &token.spared_tests {
        match NEGATIVE_TESTS.iter().find(|known| known.name == test) {
            Some(known) if known.can_be_spared => {}
            Some(_) => problems.push(format!(
                "[token]: `spared_tests` has {test:?}, which cannot be omitted: this test shows that the keys cannot \
                 leave the token"
            )),
            None => problems.push(format!(
                "[token]: `spared_tests` has {test:?}, which is not a negative test; docs/tokens.md lists the \
                 negative tests"
            )),
        }
    }
    problems
}

/// Returns the problems of the settings for integrity keys in the memory of the workers.
pub(super) fn integrity_key_problems(token: &Settings) -> Vec<String> {
    if !token.permits_integrity_key_in_worker() {
        let is_set =
            token.integrity_key_directory.is_some() || !token.integrity_key_digests.is_empty();
        return is_set
            .then(|| {
                "[token]: `integrity_key_directory` and `integrity_key_digests` are for `integrity_key = \
                 \"worker\"`, which is not set; set `integrity_key`, or remove the other two settings"
                    .to_owned()
            })
            .into_iter()
            .collect();
    }
    let mut problems = Vec::new();
    match &token.integrity_key_directory {
        None => problems.push(IntegrityFileError::NoDirectory.to_string()),
        Some(path) if !trusted_file::is_absolute(path) => problems.push(format!(
            "[token] `integrity_key_directory` is {}",
            trusted_file::not_absolute(path)
        )),
        Some(_) => {}
    }
    if token.integrity_key_digests.len() > INTEGRITY_KEYS_MAX {
        problems.push(format!(
            "[token.integrity_key_digests] has more than {INTEGRITY_KEYS_MAX} entries"
        ));
    }
    for (id, digest) in &token.integrity_key_digests {
        // The check compares the id as a string, because an id in capital letters would not match
        // the name of any file.
        let is_id = WrappingKeyId::from_hex(id).is_some_and(|known| known.to_string() == *id);
        if !is_id {
            problems.push(format!(
                "[token.integrity_key_digests]: {id:?} is not the id of a wrapping key: 32 lower-case hexadecimal digits"
            ));
        }
        if !integrity_file::is_sha256(digest) {
            problems.push(format!(
                "[token.integrity_key_digests]: {id:?} has the digest {digest:?}, which is not a SHA-256 as `sha256sum` prints it: \
                 64 lower-case hexadecimal digits"
            ));
        }
    }
    problems
}

/// Returns a problem for each environment variable with an invalid name or value.
fn environment_problems(token: &Settings) -> Vec<String> {
    let is_bad = |name: &str, value: &str| {
        name.is_empty() || name.contains(['=', '\0']) || value.contains('\0')
    };
    token
        .environment
        .iter()
        .filter(|(name, value)| is_bad(name, value))
        .map(|(name, _)| {
            format!(
                "[token.environment]: {name:?} cannot be set: a name must not be empty or contain `=`, and name \
                 and value must not contain a zero byte"
            )
        })
        .collect()
}
