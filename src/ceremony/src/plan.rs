//! The plan of a ceremony: a TOML file that custodians and auditors read before the ceremony.

use std::{collections::BTreeSet, path::PathBuf};

use serde::Deserialize;

use crate::{sha256_hex, share, ssh};

/// Longest plan, in bytes.
pub const BYTES_MAX: u64 = 256 * 1024;
/// Number of characters of a security officer's PIN, unless the plan says otherwise. A character has 5 bits.
const SO_PIN_CHARACTERS: usize = 24;
/// Permitted numbers of characters. The digests of the shares are public, so that custodians who lack one share can test
/// guesses of the PIN without the token. With 24 characters, they need about 2^119 attempts.
const SO_PIN_CHARACTERS_PERMITTED: std::ops::RangeInclusive<usize> = 24..=64;
/// The algorithms of a wrapping key.
pub(crate) const ALGORITHMS: [&str; 2] = ["RSA-OAEP-SHA-256", "RSA-OAEP-SHA-1"];
/// Longest label of a token, in bytes (PKCS #11 version 3.1, section 5.5.7, `C_InitToken`).
const LABEL_BYTES_MAX: usize = 32;
/// Longest name of a person, a key or a token, in bytes.
const NAME_BYTES_MAX: usize = 64;
/// Longest title, in bytes.
const TITLE_BYTES_MAX: usize = 200;

/// Why a plan cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// The text is not a TOML document with the fields of a plan.
    #[error("{0}")]
    Toml(String),
    /// The fields contradict each other or are out of range. Each problem is one line.
    #[error("{}", .0.join("\n  "))]
    Problems(Vec<String>),
}

/// A plan. Unknown fields are refused.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// What the ceremony is for, in one line.
    pub title: String,
    /// Number of custodians who must sign the transcript.
    pub quorum: usize,
    /// Whether the wrapping key is registered in the database of the configuration.
    #[serde(default = "yes")]
    pub register: bool,
    /// Names of further people who are present, such as auditors.
    #[serde(default)]
    pub witnesses: Vec<String>,
    /// The people who sign the transcript and keep the shares.
    #[serde(rename = "custodian", default)]
    pub custodians: Vec<Custodian>,
    /// The tokens.
    #[serde(rename = "token", default)]
    pub tokens: Vec<Token>,
    /// SHA-256 of the file, in hexadecimal.
    #[serde(skip)]
    pub sha256: String,
}

fn yes() -> bool {
    true
}

/// A person who signs the transcript and keeps a share.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Custodian {
    /// Name in messages, in the transcript and in the list of allowed signers.
    pub name: String,
    /// SSH public key, as in a file `id_ed25519.pub`.
    pub ssh_key: String,
}

/// A token of the configuration, with what the ceremony does to it.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Token {
    /// `token.name` of the configuration.
    #[serde(default = "default_name")]
    pub name: String,
    /// `token.module` of the configuration.
    pub module: PathBuf,
    /// `token.label` of the configuration.
    pub label: Option<String>,
    /// `token.serial` of the configuration.
    pub serial: Option<String>,
    /// `token.uri` of the configuration.
    pub uri: Option<String>,
    /// Whether the ceremony initialises a blank token.
    #[serde(default)]
    pub initialise: bool,
    /// Number of shares that give the security officer's PIN. There is one share for each custodian.
    pub so_pin_threshold: Option<usize>,
    /// Number of characters of the security officer's PIN.
    pub so_pin_characters: Option<usize>,
    /// The wrapping keys to generate.
    #[serde(rename = "key", default)]
    pub keys: Vec<Key>,
}

fn default_name() -> String {
    "default".to_owned()
}

/// A wrapping key to generate. Its integrity key is generated with it.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Key {
    /// Name of the key in the script and in the transcript.
    pub name: String,
    /// Id of the key, 32 hexadecimal digits. Without an id, the token's worker chooses a random id.
    pub id: Option<String>,
    /// Length of the RSA modulus in bits: 2048, 3072 or 4096.
    #[serde(default = "default_bits")]
    pub bits: u32,
    /// The algorithm that the key must have: `RSA-OAEP-SHA-256` or `RSA-OAEP-SHA-1`. Without this field, the key has the
    /// best algorithm of the token that the configuration permits.
    pub algorithm: Option<String>,
}

fn default_bits() -> u32 {
    3_072
}

impl Token {
    /// Number of characters of the security officer's PIN.
    pub fn so_pin_characters(&self) -> usize {
        self.so_pin_characters.unwrap_or(SO_PIN_CHARACTERS)
    }

    /// The selector of the token in the form `label "…"`.
    pub fn selector(&self) -> String {
        match (&self.label, &self.serial, &self.uri) {
            (Some(label), ..) => format!("label {label:?}"),
            (None, Some(serial), _) => format!("serial {serial:?}"),
            (None, None, uri) => format!("uri {:?}", uri.as_deref().unwrap_or_default()),
        }
    }

    fn problems(&self, custodians: usize) -> Vec<String> {
        let mut problems = Vec::new();
        let selectors = [&self.label, &self.serial, &self.uri];
        if selectors.iter().filter(|one| one.is_some()).count() != 1 {
            problems.push("set exactly one of `label`, `serial` and `uri`".to_owned());
        }
        for text in selectors.into_iter().flatten() {
            if text.is_empty() || text.chars().any(char::is_control) {
                problems.push(
                    "`label`, `serial` or `uri` is empty or has a control character".to_owned(),
                );
            }
        }
        match (self.initialise, self.so_pin_threshold) {
            (false, None) => {}
            (false, Some(_)) => problems.push(
                "`so_pin_threshold` needs `initialise = true`: only a new PIN of the security officer can be split"
                    .to_owned(),
            ),
            (true, None) => problems.push(
                "`initialise = true` needs `so_pin_threshold`: the ceremony makes the PIN of the security officer, and \
                 no person has the complete PIN"
                    .to_owned(),
            ),
            (true, Some(threshold)) if !(2..=custodians).contains(&threshold) => problems.push(format!(
                "`so_pin_threshold` is {threshold}, and must be from 2 to the number of custodians, which is {custodians}"
            )),
            (true, Some(_)) => {}
        }
        if self.initialise && self.label.is_none() {
            problems.push(
                "`initialise = true` needs `label`: the new token gets this label".to_owned(),
            );
        }
        if self.initialise
            && self
                .label
                .as_ref()
                .is_some_and(|label| label.len() > LABEL_BYTES_MAX || label.trim() != label)
        {
            problems.push(format!(
                "`label` of a new token must have at most {LABEL_BYTES_MAX} bytes, and no blank at its start or end"
            ));
        }
        if !SO_PIN_CHARACTERS_PERMITTED.contains(&self.so_pin_characters()) {
            problems.push(format!(
                "`so_pin_characters` is {}, and must be from {} to {}",
                self.so_pin_characters(),
                SO_PIN_CHARACTERS_PERMITTED.start(),
                SO_PIN_CHARACTERS_PERMITTED.end()
            ));
        }
        for key in &self.keys {
            problems.extend(
                key.problems()
                    .into_iter()
                    .map(|one| format!("key {:?}: {one}", key.name)),
            );
        }
        problems
    }
}

impl Key {
    fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        if ![2_048, 3_072, 4_096].contains(&self.bits) {
            problems.push(format!(
                "`bits` is {}, and must be 2048, 3072 or 4096",
                self.bits
            ));
        }
        let is_id = |id: &String| {
            id.len() == 32
                && id
                    .bytes()
                    .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
        };
        if self.id.as_ref().is_some_and(|id| !is_id(id)) {
            problems.push("`id` must have 32 hexadecimal digits in lower case".to_owned());
        }
        if let Some(other) = &self.algorithm
            && !ALGORITHMS.contains(&other.as_str())
        {
            problems.push(format!(
                "`algorithm` is {other:?}, and must be one of {}",
                ALGORITHMS.join(", ")
            ));
        }
        problems
    }
}

impl Plan {
    /// Parses and checks the text of a plan.
    pub fn parse(text: &str) -> Result<Self, PlanError> {
        let mut plan: Self = toml::from_str(text).map_err(|error| {
            let line = error.span().map_or(1, |span| {
                text.get(..span.start).unwrap_or(text).matches('\n').count() + 1
            });
            PlanError::Toml(format!(
                "line {line}: {}",
                error.message().trim_end().replace('\n', "; ")
            ))
        })?;
        plan.sha256 = sha256_hex(text.as_bytes());
        let problems = plan.problems();
        if problems.is_empty() {
            Ok(plan)
        } else {
            Err(PlanError::Problems(problems))
        }
    }

    /// The custodian with this name.
    pub fn custodian(&self, name: &str) -> Option<&Custodian> {
        self.custodians.iter().find(|one| one.name == name)
    }

    fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let title = self.title.trim();
        if title.is_empty() || title.len() > TITLE_BYTES_MAX || title.chars().any(char::is_control)
        {
            problems.push(format!(
                "`title` must have 1 to {TITLE_BYTES_MAX} bytes and no control characters"
            ));
        }
        for witness in &self.witnesses {
            if witness.is_empty()
                || witness.len() > NAME_BYTES_MAX
                || witness.chars().any(char::is_control)
            {
                problems.push(format!(
                    "a name in `witnesses` must have 1 to {NAME_BYTES_MAX} bytes and no control characters"
                ));
            }
        }
        problems.extend(self.problems_of_custodians());
        problems.extend(self.problems_of_tokens());
        problems
    }

    fn problems_of_custodians(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let count = self.custodians.len();
        if count == 0 || count > share::SHARES_MAX {
            problems.push(format!(
                "the plan has {count} [[custodian]], and must have 1 to {}",
                share::SHARES_MAX
            ));
        }
        if !(1..=count.max(1)).contains(&self.quorum) {
            problems.push(format!(
                "`quorum` is {}, and must be from 1 to the number of custodians, which is {count}",
                self.quorum
            ));
        }
        let names = self.custodians.iter().map(|one| one.name.as_str());
        problems.extend(problems_of_names("custodian", names));
        let mut keys = BTreeSet::new();
        for custodian in &self.custodians {
            match ssh::Key::parse(&custodian.ssh_key) {
                Err(error) => problems.push(format!("custodian {:?}: `ssh_key`: {error}", custodian.name)),
                Ok(key) if !keys.insert(key.fingerprint()) => problems.push(format!(
                    "custodian {:?}: another custodian has the same SSH key, so one person would count twice",
                    custodian.name
                )),
                Ok(_) => {}
            }
        }
        problems
    }

    fn problems_of_tokens(&self) -> Vec<String> {
        let mut problems = Vec::new();
        if self.tokens.is_empty() {
            problems.push("the plan has no [[token]]".to_owned());
        }
        problems.extend(problems_of_names(
            "token",
            self.tokens.iter().map(|one| one.name.as_str()),
        ));
        let mut selectors = BTreeSet::new();
        for token in &self.tokens {
            if !selectors.insert((&token.module, token.selector())) {
                problems.push(format!(
                    "token {:?}: another [[token]] has the same module and the same selector",
                    token.name
                ));
            }
        }
        let keys = || self.tokens.iter().flat_map(|token| &token.keys);
        problems.extend(problems_of_names(
            "key",
            keys().map(|one| one.name.as_str()),
        ));
        let ids: Vec<&String> = keys().filter_map(|key| key.id.as_ref()).collect();
        if ids.iter().collect::<BTreeSet<_>>().len() != ids.len() {
            problems.push("two keys have the same `id`".to_owned());
        }
        match keys().count() {
            0 if !self.tokens.is_empty() => {
                problems.push("no token has a [[token.key]], so there is no key to generate".to_owned());
            }
            count if count > 1 && self.register => problems.push(format!(
                "the plan has {count} keys, but only one key can be registered as the first active key: set `register = \
                 false`, and register the keys with `keybroker key register` afterwards"
            )),
            _ => {}
        }
        for token in &self.tokens {
            let found = token.problems(self.custodians.len());
            problems.extend(
                found
                    .into_iter()
                    .map(|one| format!("token {:?}: {one}", token.name)),
            );
        }
        problems
    }
}

/// The problems of names that must be different and simple.
fn problems_of_names<'a>(what: &str, names: impl Iterator<Item = &'a str>) -> Vec<String> {
    let mut problems = Vec::new();
    let mut seen = BTreeSet::new();
    for name in names {
        let is_simple = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'_' | b'-');
        if name.is_empty() || name.len() > NAME_BYTES_MAX || !name.bytes().all(is_simple) {
            problems.push(format!(
                "the name {name:?} of a {what} must have 1 to {NAME_BYTES_MAX} bytes of [a-z0-9._-]"
            ));
        }
        if !seen.insert(name) {
            problems.push(format!("two entries have the name {name:?} of a {what}"));
        }
    }
    problems
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) const ADA: &str =
        "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAILM+rvN+ot98qgEN796jTiQfZfG1KaT0PtFDJ/XFSqti ada";
    pub(crate) const BOB: &str =
        "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIM4TwXBLygQzVn56l7GMn0jHItrTaZ8dWvLpzDOgm5t0 bob";

    /// A plan with two custodians and one token.
    pub(crate) fn text() -> String {
        format!(
            r#"
title = "The first key"
quorum = 2
witnesses = ["Grace Example, auditor"]

[[custodian]]
name = "ada"
ssh_key = "{ADA}"

[[custodian]]
name = "bob"
ssh_key = "{BOB}"

[[token]]
module = "/usr/lib/softhsm/libsofthsm2.so"
label = "keybroker"
initialise = true
so_pin_threshold = 2

[[token.key]]
name = "first"
bits = 2048
"#
        )
    }

    fn refusal(from: &str, to: &str) -> String {
        let text = text();
        assert!(text.contains(from), "{from}");
        Plan::parse(&text.replacen(from, to, 1))
            .unwrap_err()
            .to_string()
    }

    #[test]
    fn a_plan_is_read() {
        let text = text();
        let plan = Plan::parse(&text).unwrap();
        assert_eq!(plan.sha256, sha256_hex(text.as_bytes()));
        assert_eq!(plan.custodians.len(), 2);
        assert!(plan.register && plan.custodian("bob").is_some());
        assert_eq!(plan.tokens[0].name, "default");
        assert_eq!(plan.tokens[0].so_pin_characters(), 24);
        assert_eq!(plan.tokens[0].selector(), "label \"keybroker\"");
    }

    /// The example is the manual of the plan, so it has every field.
    #[test]
    fn the_example_is_a_plan_and_has_every_field() {
        let example = include_str!("../../../softhsm/ceremony.example.toml");
        assert_eq!(Plan::parse(example).unwrap().custodians.len(), 3);
        let written: Vec<&str> = example
            .lines()
            .map(|line| {
                line.strip_prefix("# ")
                    .filter(|rest| rest.contains(" = "))
                    .unwrap_or(line)
            })
            .filter(|line| line.starts_with('[') || line.contains(" = "))
            .filter(|line| !line.starts_with("serial") && !line.starts_with("uri"))
            .collect();
        let written = written.join("\n");
        let plan = Plan::parse(&written).unwrap_or_else(|error| panic!("{error}\n{written}"));
        let (token, key) = (&plan.tokens[0], &plan.tokens[0].keys[0]);
        assert!(plan.register && !plan.witnesses.is_empty() && token.so_pin_characters == Some(24));
        assert!(key.id.is_some() && key.algorithm.is_some() && key.bits == default_bits());
        assert_eq!(token.name, default_name());
        assert!(example.contains("# serial = ") && example.contains("# uri = "));
    }

    #[test]
    fn every_mistake_is_named() {
        for (from, to, expected) in [
            ("quorum = 2", "quorum = 3", "`quorum` is 3"),
            ("quorum = 2", "quorum = 0", "`quorum` is 0"),
            ("title = \"The first key\"", "title = \"\"", "`title`"),
            (
                "name = \"bob\"",
                "name = \"ada\"",
                "two entries have the name \"ada\"",
            ),
            ("name = \"bob\"", "name = \"Bob B\"", "[a-z0-9._-]"),
            (BOB, ADA, "would count twice"),
            (BOB, "ssh-ed25519 AAAA", "`ssh_key`"),
            (
                "so_pin_threshold = 2",
                "so_pin_threshold = 3",
                "must be from 2",
            ),
            (
                "so_pin_threshold = 2",
                "so_pin_threshold = 1",
                "must be from 2",
            ),
            ("so_pin_threshold = 2", "", "needs `so_pin_threshold`"),
            ("initialise = true", "", "needs `initialise = true`"),
            ("label = \"keybroker\"", "serial = \"1\"", "needs `label`"),
            (
                "label = \"keybroker\"",
                "label = \"a\"\nserial = \"1\"",
                "exactly one of",
            ),
            ("bits = 2048", "bits = 1024", "`bits` is 1024"),
            ("bits = 2048", "id = \"00\"", "`id` must have 32"),
            (
                "bits = 2048",
                "algorithm = \"RSA\"",
                "`algorithm` is \"RSA\"",
            ),
            ("bits = 2048", "so_pin = \"1234\"", "line 22: unknown field"),
            (
                "so_pin_threshold = 2",
                "so_pin_threshold = 2\nso_pin_characters = 8",
                "from 24 to 64",
            ),
            (
                "bits = 2048",
                "[[token.key]]\nname = \"second\"",
                "only one key can be registered",
            ),
        ] {
            let message = refusal(from, to);
            assert!(message.contains(expected), "{to}: {message}");
        }
        let all = text();
        let (before, _) = all.split_once("[[token.key]]").unwrap();
        let message = Plan::parse(before).unwrap_err().to_string();
        assert!(message.contains("no key to generate"), "{message}");
    }

    /// The token would refuse these plans only after the custodians wrote down their shares.
    #[test]
    fn mistakes_that_a_token_would_refuse_late_are_named() {
        for (from, to, expected) in [
            (
                "label = \"keybroker\"",
                "label = \"keybroker-with-a-label-that-is-too-long\"",
                "at most 32 bytes",
            ),
            (
                "label = \"keybroker\"",
                "label = \"keybroker \"",
                "no blank",
            ),
            (
                "[[token]]",
                "[[token]]\nname = \"a\"\nmodule = \"/usr/lib/softhsm/libsofthsm2.so\"\nlabel = \"keybroker\"\n[[token]]",
                "the same selector",
            ),
        ] {
            let message = refusal(from, to);
            assert!(message.contains(expected), "{to}: {message}");
        }
    }
}
