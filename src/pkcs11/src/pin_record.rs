//! The record of the PINs that were sent to tokens. The record is stored in the state directory, so that it remains
//! when a process ends.
//!
//! For each serial number, the record contains a salted Argon2id hash of the PIN. The hash identifies a PIN. The PIN
//! file is not sufficient, because a new version of a file or of a Kubernetes Secret can contain the old PIN. A worker
//! or an admin worker reads the PIN and compares the PIN with the hash. The front never reads a PIN.
//!
//! Not protected: an attacker who can read the state directory can find a short PIN by brute force. The state directory
//! is as confidential as the PIN file.
//!
//! Mitigation: M15 of `THREAT_MODEL.md`.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    time::Duration,
};

use argon2::{Algorithm, Argon2, Params, Version};
use serde::{Deserialize, Serialize};

use keybroker_core::state::{Error as StateError, Lock, StateDirectory};
use keybroker_worker_protocol::Pin;

use crate::login_policy::Standing;

const FACT: &str = "pins.json";
const LOCK: &str = "pins.lock";
/// Longest wait for another process to release the lock. Even on a slow device, a login takes less than this time.
const LOCK_TIMEOUT: Duration = Duration::from_secs(10);
/// Version of the record's format.
const FORMAT: u32 = 1;
/// Largest number of PINs per token, and largest number of tokens in the record. If there are too many PINs, the oldest
/// PIN is removed. If there are too many tokens, the token with the lowest serial number is removed.
const PINS_MAX: usize = 8;
const TOKENS_MAX: usize = 32;
/// Largest number of names for one token. The configuration has at most 16 tokens.
const NAMES_MAX: usize = 16;
const SALT_BYTES: usize = 16;
const HASH_BYTES: usize = 32;
/// Parameters of Argon2id: the first choice of the OWASP Password Storage Cheat Sheet. A worker computes one hash
/// during its start.
const MEMORY_KIB: u32 = 19_456;
const ITERATIONS: u32 = 2;

/// Reason why the record cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The state directory cannot be used.
    #[error(transparent)]
    State(#[from] StateError),
    /// The content of the record is damaged.
    #[error(
        "the record of PINs ({FACT} in the state directory) is damaged; `keybroker token retry-pin` replaces it"
    )]
    Damaged(#[source] serde_json::Error),
    /// A later release wrote the record.
    #[error(
        "the record of PINs ({FACT} in the state directory) has format {0}, which a later release wrote"
    )]
    Format(u32),
    /// There is no random salt, or not enough memory for the hash.
    #[error("cannot compute the hash of the PIN: {0}")]
    Hash(&'static str),
}

/// The record of the PINs that one broker instance has sent to tokens.
#[derive(Clone, Debug)]
pub struct PinRecord {
    state: StateDirectory,
    /// The configured name of the token; empty if a command concerns every token.
    token: String,
    /// The configured name of the token, if the token is a declared copy of another token with the same serial number.
    copy: Option<String>,
}

/// The record in its stored form.
#[derive(Debug, Serialize, Deserialize)]
struct Fact {
    format: u32,
    /// The configured names of the tokens whose next login may use the last attempt with the operator's permission.
    #[serde(default)]
    final_try_allowed_for: BTreeSet<String>,
    /// The PINs of each token, by its serial number. The key of a declared copy also contains the name of the copy.
    #[serde(default)]
    tokens: BTreeMap<String, TokenPins>,
}

impl Fact {
    fn empty() -> Self {
        Self {
            format: FORMAT,
            final_try_allowed_for: BTreeSet::new(),
            tokens: BTreeMap::new(),
        }
    }
}

/// The PINs of one token, oldest first.
#[derive(Debug, Default, Serialize, Deserialize)]
struct TokenPins {
    /// The configured names under which the token was used; empty in a record of an earlier release.
    #[serde(default)]
    names: BTreeSet<String>,
    /// The salt in hexadecimal digits. Argon2id gets the digits and not the decoded bytes.
    salt: String,
    pins: Vec<KnownPin>,
}

#[derive(Debug, Serialize, Deserialize)]
struct KnownPin {
    /// The hash in hexadecimal digits.
    hash: String,
    #[serde(flatten)]
    standing: Standing,
}

impl PinRecord {
    /// Returns the record in a state directory.
    pub fn new(state: StateDirectory) -> Self {
        Self {
            state,
            token: String::new(),
            copy: None,
        }
    }

    /// Returns the record for the token with this configured name.
    #[must_use]
    pub fn of_token(mut self, name: &str) -> Self {
        name.clone_into(&mut self.token);
        self
    }

    /// Returns the record for a declared copy of another token. The PINs of a copy and of its original are recorded
    /// separately, although both tokens have the same serial number. An empty name means that the token is not a
    /// declared copy.
    #[must_use]
    pub fn of_copy(mut self, name: &str) -> Self {
        self.copy = (!name.is_empty()).then(|| name.to_owned());
        self
    }

    /// Returns the map key of a token in the record.
    fn key(&self, serial: &str) -> String {
        match &self.copy {
            None => serial.to_owned(),
            // The map key of a copy differs from every serial number, because a serial number has at most 16
            // characters.
            Some(name) => format!("{serial} (copy {name})"),
        }
    }

    /// Records the operator's permission to use the rejected PINs of this token once more. With `allow_final_try`, the
    /// permission also applies if one more wrong PIN would lock the token. The PINs of another token stay rejected.
    /// Returns the number of PINs that may be used again. If the configuration has only one token, all PINs in the record
    /// belong to this token.
    pub fn allow_retry(
        &self,
        allow_final_try: bool,
        is_only_token: bool,
    ) -> Result<usize, RecordError> {
        let _lock = self.state.lock(LOCK, LOCK_TIMEOUT)?;
        // A damaged record is replaced.
        let mut fact = match self.read() {
            Err(RecordError::Damaged(_)) => Fact::empty(),
            read => read?,
        };
        let mut forgotten = 0;
        let is_this = |token: &&mut TokenPins| is_only_token || token.names.contains(&self.token);
        for token in fact.tokens.values_mut().filter(is_this) {
            token.pins.retain_mut(|pin| match &mut pin.standing {
                Standing::Proven { failing_since } => {
                    forgotten += usize::from(failing_since.take().is_some());
                    true
                }
                Standing::Unproven { .. } | Standing::Rejected { .. } => {
                    forgotten += 1;
                    false
                }
            });
        }
        if allow_final_try {
            fact.final_try_allowed_for.insert(self.token.clone());
        } else {
            fact.final_try_allowed_for.remove(&self.token);
        }
        self.write(&fact)?;
        Ok(forgotten)
    }

    /// Removes the PINs of a token after its initialisation, because the token has a new PIN.
    pub fn forget(&self, serial: &str) -> Result<(), RecordError> {
        let _lock = self.state.lock(LOCK, LOCK_TIMEOUT)?;
        let mut fact = self.read()?;
        if fact.tokens.remove(&self.key(serial)).is_none() {
            return Ok(());
        }
        self.write(&fact)
    }

    /// Begins a login with a PIN on the token with this serial number. Until the returned value is dropped, no other
    /// process of this broker instance can log in.
    pub(super) fn begin(&self, serial: &str, pin: &Pin) -> Result<Login<'_>, RecordError> {
        let lock = self.state.lock(LOCK, LOCK_TIMEOUT)?;
        let mut fact = self.read()?;
        let key = self.key(serial);
        if !fact.tokens.contains_key(&key) && fact.tokens.len() >= TOKENS_MAX {
            fact.tokens.pop_first();
        }
        let token = fact.tokens.entry(key.clone()).or_default();
        let is_new_name = token.names.len() < NAMES_MAX && token.names.insert(self.token.clone());
        if token.salt.len() != 2 * SALT_BYTES {
            let mut salt = [0; SALT_BYTES];
            aws_lc_rs::rand::fill(&mut salt)
                .map_err(|_| RecordError::Hash("the random generator failed"))?;
            token.salt = hex::encode(salt);
            token.pins.clear();
        }
        let hash = hash(pin, &token.salt)?;
        if is_new_name {
            // Another token had this name before.
            for (_, other) in fact.tokens.iter_mut().filter(|(serial, _)| **serial != key) {
                other.names.remove(&self.token);
            }
            self.write(&fact)?;
        }
        Ok(Login {
            record: self,
            fact,
            key,
            hash,
            _lock: lock,
        })
    }

    fn read(&self) -> Result<Fact, RecordError> {
        let Some(bytes) = self.state.read(FACT)? else {
            return Ok(Fact::empty());
        };
        let fact: Fact = serde_json::from_slice(&bytes).map_err(RecordError::Damaged)?;
        if fact.format > FORMAT {
            return Err(RecordError::Format(fact.format));
        }
        Ok(fact)
    }

    fn write(&self, fact: &Fact) -> Result<(), RecordError> {
        let bytes = serde_json::to_vec(fact).map_err(RecordError::Damaged)?;
        Ok(self.state.write(FACT, &bytes)?)
    }
}

/// A login that has begun and has no result yet.
pub(super) struct Login<'a> {
    record: &'a PinRecord,
    fact: Fact,
    /// The key of the token in the record.
    key: String,
    hash: String,
    _lock: Lock,
}

impl fmt::Debug for Login<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Login")
            .field("key", &self.key)
            .finish_non_exhaustive()
    }
}

impl Login<'_> {
    /// Returns the history of this PIN on this token.
    pub(super) fn standing(&self) -> Option<&Standing> {
        let token = self.fact.tokens.get(&self.key)?;
        let known = token.pins.iter().find(|pin| pin.hash == self.hash)?;
        Some(&known.standing)
    }

    /// Whether the operator allowed a login even if the token has only one attempt left.
    pub(super) fn final_try_allowed(&self) -> bool {
        self.fact.final_try_allowed_for.contains(&self.record.token)
    }

    /// Records the history of the PIN if it has changed, and removes the operator's permission to use the token's last
    /// attempt.
    pub(super) fn set(&mut self, standing: Option<Standing>) -> Result<(), RecordError> {
        let had_permission = self.fact.final_try_allowed_for.remove(&self.record.token);
        if self.standing() == standing.as_ref() && !had_permission {
            return Ok(());
        }
        let token = self.fact.tokens.entry(self.key.clone()).or_default();
        token.pins.retain(|pin| pin.hash != self.hash);
        if let Some(standing) = standing {
            if matches!(standing, Standing::Proven { .. }) {
                // A token has only one user PIN, so another PIN that the token accepted earlier is no longer valid.
                token
                    .pins
                    .retain(|pin| !matches!(pin.standing, Standing::Proven { .. }));
            }
            if token.pins.len() >= PINS_MAX {
                token.pins.remove(0);
            }
            token.pins.push(KnownPin {
                hash: self.hash.clone(),
                standing,
            });
        }
        self.record.write(&self.fact)
    }
}

fn hash(pin: &Pin, salt: &str) -> Result<String, RecordError> {
    let params = Params::new(MEMORY_KIB, ITERATIONS, 1, Some(HASH_BYTES))
        .map_err(|_| RecordError::Hash("the Argon2 parameters are not valid"))?;
    let mut hash = [0; HASH_BYTES];
    Argon2::new(Algorithm::Argon2id, Version::V0x13, params)
        .hash_password_into(pin.expose().as_bytes(), salt.as_bytes(), &mut hash)
        .map_err(|_| RecordError::Hash("not enough memory"))?;
    Ok(hex::encode(hash))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pin(text: &str) -> Pin {
        Pin::from_text(text.to_owned()).unwrap()
    }

    fn rejected() -> Standing {
        Standing::Rejected {
            answer: "PinIncorrect from C_Login".to_owned(),
        }
    }

    fn proven() -> Standing {
        Standing::Proven {
            failing_since: None,
        }
    }

    fn record(folder: &tempfile::TempDir) -> PinRecord {
        PinRecord::new(StateDirectory::below(folder.path()))
    }

    fn standing(record: &PinRecord, serial: &str, text: &str) -> Option<Standing> {
        record
            .begin(serial, &pin(text))
            .unwrap()
            .standing()
            .cloned()
    }

    fn set(record: &PinRecord, serial: &str, text: &str, standing: Standing) {
        let mut login = record.begin(serial, &pin(text)).unwrap();
        login.set(Some(standing)).unwrap();
    }

    #[test]
    fn a_pin_is_known_by_its_content_and_the_serial_number() {
        let folder = tempfile::tempdir().unwrap();
        set(&record(&folder), "1", "123456", rejected());
        // Another process reads the same state.
        let again = record(&folder);
        assert_eq!(standing(&again, "1", "123456"), Some(rejected()));
        assert_eq!(standing(&again, "1", "123457"), None);
        assert_eq!(standing(&again, "2", "123456"), None);
        let file = folder
            .path()
            .join(keybroker_core::state::DIRECTORY)
            .join(FACT);
        let text = std::fs::read_to_string(file).unwrap();
        assert!(!text.contains("123456"), "{text}");
    }

    /// Two configured tokens with the same serial number share the record, because both may be the same token. A
    /// declared copy is a different token.
    #[test]
    fn only_a_declared_copy_has_a_record_of_its_own() {
        let folder = tempfile::tempdir().unwrap();
        let original = record(&folder);
        set(&original, "1", "123456", rejected());
        let undeclared = record(&folder).of_copy("");
        assert_eq!(standing(&undeclared, "1", "123456"), Some(rejected()));
        let copy = record(&folder).of_copy("b");
        assert_eq!(standing(&copy, "1", "123456"), None);
        set(&copy, "1", "123456", proven());
        assert_eq!(standing(&original, "1", "123456"), Some(rejected()));
        copy.forget("1").unwrap();
        assert_eq!(standing(&copy, "1", "123456"), None);
        assert_eq!(standing(&original, "1", "123456"), Some(rejected()));
    }

    #[test]
    fn a_retry_forgets_what_was_rejected_and_keeps_what_was_proven() {
        let folder = tempfile::tempdir().unwrap();
        let record = record(&folder);
        set(&record, "1", "right", proven());
        set(&record, "1", "wrong", rejected());
        assert_eq!(record.allow_retry(true, true).unwrap(), 1);
        assert_eq!(standing(&record, "1", "right"), Some(proven()));
        let mut login = record.begin("1", &pin("wrong")).unwrap();
        assert_eq!(login.standing(), None);
        // The permission is valid for one login.
        assert!(login.final_try_allowed());
        login.set(Some(rejected())).unwrap();
        drop(login);
        assert!(
            !record
                .begin("1", &pin("wrong"))
                .unwrap()
                .final_try_allowed()
        );
    }

    /// An operator who corrected the PIN of one token must not spend the last attempt of another token.
    #[test]
    fn a_retry_concerns_one_token() {
        let folder = tempfile::tempdir().unwrap();
        let [a, b] = ["a", "b"].map(|name| record(&folder).of_token(name));
        set(&a, "1", "wrong", rejected());
        set(&b, "2", "wrong", rejected());
        assert_eq!(a.allow_retry(true, false).unwrap(), 1);
        assert_eq!(standing(&b, "2", "wrong"), Some(rejected()));
        let mut login = b.begin("2", &pin("wrong")).unwrap();
        assert!(!login.final_try_allowed());
        login.set(Some(rejected())).unwrap();
        drop(login);
        let mut login = a.begin("1", &pin("wrong")).unwrap();
        assert!(
            login.final_try_allowed(),
            "another token took the permission"
        );
        login.set(Some(rejected())).unwrap();
        drop(login);
        assert!(!a.begin("1", &pin("wrong")).unwrap().final_try_allowed());
    }

    /// The names of two tokens were exchanged in the configuration.
    #[test]
    fn a_retry_follows_the_name_of_a_token() {
        let folder = tempfile::tempdir().unwrap();
        let [a, b] = ["a", "b"].map(|name| record(&folder).of_token(name));
        set(&a, "1", "wrong", rejected());
        set(&b, "2", "wrong", rejected());
        assert_eq!(standing(&b, "1", "wrong"), Some(rejected()));
        assert_eq!(standing(&a, "2", "wrong"), Some(rejected()));
        assert_eq!(a.allow_retry(false, false).unwrap(), 1);
        assert_eq!(standing(&b, "1", "wrong"), Some(rejected()));
        assert_eq!(standing(&a, "2", "wrong"), None);
    }

    #[test]
    fn an_initialised_token_knows_no_pin() {
        let folder = tempfile::tempdir().unwrap();
        let record = record(&folder);
        set(&record, "1", "wrong", rejected());
        set(&record, "2", "wrong", rejected());
        record.forget("1").unwrap();
        record.forget("3").unwrap();
        assert_eq!(standing(&record, "1", "wrong"), None);
        assert_eq!(standing(&record, "2", "wrong"), Some(rejected()));
    }

    #[test]
    fn the_pin_before_is_not_proven_any_more() {
        let folder = tempfile::tempdir().unwrap();
        let record = record(&folder);
        set(&record, "1", "old", proven());
        set(&record, "1", "new", proven());
        assert_eq!(standing(&record, "1", "old"), None);
    }

    #[test]
    fn the_record_stays_small() {
        let folder = tempfile::tempdir().unwrap();
        let record = record(&folder);
        let long = Standing::Rejected {
            answer: "x".repeat(100),
        };
        let mut fact = record.read().unwrap();
        for token in 0..TOKENS_MAX {
            let pins = (0..PINS_MAX).map(|_| KnownPin {
                hash: "0".repeat(2 * HASH_BYTES),
                standing: long.clone(),
            });
            let token_pins = TokenPins {
                names: ["one-token".to_owned(), "another".to_owned()].into(),
                salt: "0".repeat(2 * SALT_BYTES),
                pins: pins.collect(),
            };
            fact.tokens.insert(format!("{token:016}"), token_pins);
        }
        record.write(&fact).unwrap();
        set(&record, "another", "1234", long);
        assert_eq!(record.read().unwrap().tokens.len(), TOKENS_MAX);
    }

    #[test]
    fn a_damaged_record_is_said_and_replaced_by_the_operator() {
        let folder = tempfile::tempdir().unwrap();
        let record = record(&folder);
        record.state.write(FACT, b"{").unwrap();
        let error = record.begin("1", &pin("1234")).unwrap_err();
        assert!(error.to_string().contains("retry-pin"), "{error}");
        record.allow_retry(false, true).unwrap();
        record.begin("1", &pin("1234")).unwrap();
    }
}
