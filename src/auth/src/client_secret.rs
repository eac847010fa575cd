//! Verifies the secrets of API clients with Argon2id (RFC 9106). Argon2id deliberately costs much
//! memory and time. Therefore Argon2id runs outside the async threads and has a separate limit. An
//! unknown id, a revoked API client and a wrong secret take the same time and get the same answer.
//!
//! An accepted secret is remembered for one minute under a keyed hash, so that most calls need neither Argon2id nor a
//! look-up of the API client. When any API client is changed through this broker, all remembered secrets are forgotten.
//! A change through another broker takes effect after at most one minute.
//!
//! For a day after a secret was last used, the broker also remembers which stored hash the secret
//! matched. After the first minute, the broker looks up the API client again. If the API client
//! still has the matched hash, and the secret is not revoked or expired, the secret is accepted
//! without another Argon2id trial. Therefore wrong secrets from other callers do not delay an API
//! client whose secret this broker accepted before. An API client with a previously accepted secret
//! does not wait for a turn, and the authentication failure limit does not apply to its calls. A
//! call with a secret that was not accepted before waits for a turn in `turns`. Concurrent calls
//! with the same secret share one trial.
//!
//! Not guaranteed: hashes with older parameters may take less or more time to verify than hashes with the current
//! parameters.
//!
//! Mitigation: M20 of `THREAT_MODEL.md`.

use std::{collections::BTreeSet, fmt, sync::Arc, time::Duration};

use argon2::{Argon2, PasswordHash, PasswordHasher as _, PasswordVerifier as _};
use async_trait::async_trait;
use aws_lc_rs::{digest, hmac, rand::SystemRandom};
use moka::sync::Cache;
use serde::{Deserialize, Serialize};
use subtle::ConstantTimeEq as _;
use tokio::sync::OnceCell;
use zeroize::Zeroizing;

use keybroker_core::{
    call::Timestamp,
    client_credential::{ClientCredential, LIVE_SECRETS_MAX},
    error::{Error, Reason},
    key::ClientId,
    metrics,
    principal::{Claims, Credential, Identity, Kind, Principal, Role},
};

use super::refuse;

mod turns;

use turns::{Lane, Turns};

/// Time for which an accepted secret is remembered.
const REMEMBERED: Duration = Duration::from_mins(1);
/// Largest number of accepted secrets that are remembered.
const REMEMBERED_MAX: u64 = 10_000;
/// Time for which the broker remembers which stored hash a secret matched, counted from the last use of the secret.
const PROVEN: Duration = Duration::from_hours(24);
/// Largest number of secrets for which the matching hash is remembered.
const PROVEN_MAX: u64 = 10_000;
/// Largest number of secrets that are tried at the same time.
const TRIALS_MAX: u64 = 10_000;
/// Longest time for which a call waits for its turn to run Argon2id.
const TURN_WAIT_MAX: Duration = Duration::from_secs(2);
/// The delay before a retry for a caller that waited too long.
const RETRY: Duration = Duration::from_secs(1);

/// The `[client_credentials]` section.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// The roles that an administrator may grant to an API client.
    pub grantable_roles: BTreeSet<Role>,
    /// Memory of Argon2id, in KiB.
    pub argon2_memory_kib: u32,
    /// Number of passes of Argon2id over the memory.
    pub argon2_iterations: u32,
    /// Degree of parallelism.
    pub argon2_parallelism: u32,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            // Empty by default. An administrator who could grant `enrol` could replace a user's key with a key that the
            // administrator knows. An administrator who could grant `auditor` could read the actions of all tenants.
            grantable_roles: BTreeSet::new(),
            argon2_memory_kib: 19_456,
            argon2_iterations: 2,
            argon2_parallelism: 1,
        }
    }
}

/// The minimum parameters of Argon2id that OWASP recommends (Password Storage Cheat Sheet): memory
/// in KiB, and number of passes. All pairs in this list are equally strong.
const FLOOR: [(u32, u32); 5] = [
    (47_104, 1),
    (19_456, 2),
    (12_288, 3),
    (9_216, 4),
    (7_168, 5),
];
const MEMORY_KIB_MAX: u32 = 1_048_576;
const ITERATIONS_MAX: u32 = 16;
const PARALLELISM_MAX: u32 = 16;

impl Settings {
    /// Returns the reason why the parameters of Argon2id are not accepted, or `None` if they are accepted.
    pub fn problem(&self) -> Option<String> {
        let (memory, iterations) = (self.argon2_memory_kib, self.argon2_iterations);
        if !FLOOR
            .iter()
            .any(|(kib, passes)| memory >= *kib && iterations >= *passes)
        {
            return Some(format!(
                "[client_credentials]: {memory} KiB and {iterations} iterations of Argon2 are below the minimum that \
                 OWASP recommends; 19456 KiB and 2 iterations are enough"
            ));
        }
        let is_too_much = memory > MEMORY_KIB_MAX
            || iterations > ITERATIONS_MAX
            || !(1..=PARALLELISM_MAX).contains(&self.argon2_parallelism);
        is_too_much.then(|| {
            format!(
                "[client_credentials]: at most {MEMORY_KIB_MAX} KiB, {ITERATIONS_MAX} iterations and a parallelism of 1 to \
                 {PARALLELISM_MAX} are allowed, because every login takes this memory and time"
            )
        })
    }

    /// Hashes a secret with the parameters in `self`. Returns a PHC string.
    pub fn hash(&self, secret: &[u8]) -> Result<String, Error> {
        let broken =
            |error: &dyn fmt::Display| Error::new(Reason::Bug, format!("Argon2id: {error}"));
        let hashed = self.argon2().hash_password(secret);
        hashed
            .map(|hash| hash.to_string())
            .map_err(|error| broken(&error))
    }

    fn params(&self) -> argon2::Params {
        argon2::Params::new(
            self.argon2_memory_kib,
            self.argon2_iterations,
            self.argon2_parallelism,
            None,
        )
        .expect("the configuration was checked")
    }

    fn argon2(&self) -> Argon2<'static> {
        Argon2::from(self.params())
    }

    /// Whether a hash was made with parameters that are weaker than the current parameters.
    fn is_weaker(&self, hash: &PasswordHash) -> bool {
        argon2::Params::try_from(hash).is_ok_and(|made| {
            made.m_cost() < self.argon2_memory_kib || made.t_cost() < self.argon2_iterations
        })
    }
}

/// The directory of API clients. The broker implements this trait and verifies the rows of the API clients with the
/// token.
#[async_trait]
pub trait Directory: Send + Sync + fmt::Debug + 'static {
    /// Returns an API client, or `None` if the API client does not exist.
    async fn client(&self, id: ClientId) -> Result<Option<ClientCredential>, Error>;

    /// Returns a number that changes whenever an API client is changed through this broker.
    fn generation(&self) -> u64;

    /// Records the current time as the last use of a secret.
    fn note_use(&self, id: ClientId, secret: u32);

    /// Replaces the weak hash of an accepted secret with the stronger hash `phc`.
    fn improve(&self, credential: ClientCredential, secret: u32, phc: String);
}

/// Verifies the secrets of API clients.
pub struct Secrets {
    settings: Settings,
    directory: Arc<dyn Directory>,
    /// The accepted secrets, as HMACs under a random key of this process. Therefore the memory contains no unkeyed hash
    /// with which an attacker could check guesses.
    remembered: Cache<Tag, Known>,
    /// The stored hashes that secrets matched. The key of the cache is the HMAC of a client id and a secret.
    proven: Cache<Tag, Proof>,
    /// The running trials, by the HMAC of id and secret and the generation of the directory.
    trials: Cache<(Tag, u64), Arc<Trial>>,
    key: hmac::Key,
    turns: Turns,
    /// A hash that no secret matches. The list of hashes is filled with this hash up to the fixed
    /// length of the list.
    dummy: Arc<str>,
}

/// The HMAC of a client id and a secret, under a key of this process.
type Tag = [u8; 32];
/// A trial, which gives one answer to all concurrent calls with the same secret.
type Trial = OnceCell<Result<Known, Error>>;

#[derive(Clone)]
struct Known {
    principal: Arc<Principal>,
    id: ClientId,
    secret: u32,
    expires: Option<Timestamp>,
    generation: u64,
}

impl fmt::Debug for Secrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Secrets")
            .field("settings", &self.settings)
            .finish_non_exhaustive()
    }
}

/// The secret that matched.
struct Match {
    number: u32,
    better: Option<String>,
}

/// Proof that a secret matched a stored hash in a trial with Argon2id. While the API client still
/// has a hash in `hashes`, the secret needs no further trial.
#[derive(Clone, Debug)]
struct Proof {
    /// SHA-256 of the matched hash, and of the stronger hash that may have replaced the matched hash.
    hashes: [[u8; 32]; 2],
    number: u32,
}

impl Proof {
    fn of(credential: &ClientCredential, matched: &Match) -> Option<Self> {
        let number = matched.number;
        let mut secrets = credential.document.secrets.iter();
        let phc = &secrets.find(|secret| secret.number == number)?.phc;
        let better = matched.better.as_ref().unwrap_or(phc);
        Some(Self {
            hashes: [sha256(phc), sha256(better)],
            number,
        })
    }

    /// Returns the number of the valid secret to which this proof applies. Also returns `None` if
    /// the hash has weak parameters, so that a trial replaces the hash with a stronger hash.
    fn holds(&self, credential: &ClientCredential, settings: &Settings) -> Option<u32> {
        let mut live = credential.document.live_secrets(Timestamp::now());
        let secret = live.find(|secret| secret.number == self.number)?;
        let hash = sha256(&secret.phc);
        let is_it = self.hashes.iter().any(|known| known.ct_eq(&hash).into());
        let is_strong = PasswordHash::new(&secret.phc).is_ok_and(|hash| !settings.is_weaker(&hash));
        (is_it && is_strong).then_some(self.number)
    }
}

fn sha256(text: &str) -> [u8; 32] {
    let digest = digest::digest(&digest::SHA256, text.as_bytes());
    digest.as_ref().try_into().expect("SHA-256 gives 32 bytes")
}

impl Secrets {
    /// Creates an empty cache.
    pub fn new(settings: Settings, directory: Arc<dyn Directory>) -> Result<Self, Error> {
        let broken = |_| Error::new(Reason::Bug, "no random bytes");
        let key = hmac::Key::generate(hmac::HMAC_SHA256, &SystemRandom::new()).map_err(broken)?;
        let unused = keybroker_core::client_credential::PlainSecret::fresh();
        let unused = unused.ok_or_else(|| Error::new(Reason::Bug, "no random bytes"))?;
        let dummy = settings.hash(unused.expose().as_bytes())?;
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Ok(Self {
            settings,
            directory,
            remembered: Cache::builder()
                .max_capacity(REMEMBERED_MAX)
                .time_to_live(REMEMBERED)
                .build(),
            proven: Cache::builder()
                .max_capacity(PROVEN_MAX)
                .time_to_live(PROVEN)
                .build(),
            trials: Cache::new(TRIALS_MAX),
            key,
            // Trials use at most half of the cores, so that other calls continue.
            turns: Turns::new(cores.div_ceil(2)),
            dummy: dummy.into(),
        })
    }

    /// Verifies a secret and returns the principal of its API client. `budget` is called before a costly trial, unless
    /// the secret was accepted recently. If `budget` returns an error, this function returns the error.
    pub async fn verify<T: Send>(
        &self,
        id: &str,
        secret: Zeroizing<Vec<u8>>,
        budget: impl FnOnce() -> Result<T, Error> + Send,
    ) -> Result<Arc<Principal>, Error> {
        let tag = self.tag(id, &secret);
        let generation = self.directory.generation();
        let known = if let Some(known) = self.remembered(&tag, generation) {
            known
        } else {
            let is_proven = self.proven.contains_key(&tag);
            // The trial keeps its turn until the trial ends.
            let _turn = (!is_proven).then(budget).transpose()?;
            self.shared_trial(id, secret, tag, generation).await?
        };
        self.directory.note_use(known.id, known.secret);
        Ok(known.principal)
    }

    fn remembered(&self, tag: &Tag, generation: u64) -> Option<Known> {
        let now = Timestamp::now();
        self.remembered.get(tag).filter(|known| {
            known.generation == generation && known.expires.is_none_or(|expires| now < expires)
        })
    }

    /// Tries a secret, or waits for a running trial of the same secret.
    async fn shared_trial(
        &self,
        id: &str,
        secret: Zeroizing<Vec<u8>>,
        tag: Tag,
        generation: u64,
    ) -> Result<Known, Error> {
        // The key of the cache includes the generation. Therefore a call after a change of an API client never gets a
        // cached result from before the change.
        let trial = self
            .trials
            .get_with((tag, generation), || Arc::new(OnceCell::new()));
        let outcome = trial.get_or_init(|| async {
            let outcome = self.try_secret(id, secret, tag, generation).await;
            match &outcome {
                Ok(known) => self.remembered.insert(tag, known.clone()),
                Err(error) if error.reason() == Reason::Credential => self.proven.invalidate(&tag),
                Err(_) => {}
            }
            self.trials.invalidate(&(tag, generation));
            outcome
        });
        outcome.await.clone()
    }

    async fn try_secret(
        &self,
        id: &str,
        secret: Zeroizing<Vec<u8>>,
        tag: Tag,
        generation: u64,
    ) -> Result<Known, Error> {
        let id = ClientId::from_hex(id);
        let proof = self.proven.get(&tag);
        let credential;
        // The trial occupies its place until the trial ends. Only trials for existing API clients
        // occupy a place.
        let _place;
        match (id, &proof) {
            (None, _) => credential = None,
            (Some(id), Some(_)) => {
                credential = self.directory.client(id).await?;
                _place = None;
            }
            (Some(id), None) => {
                // The trial takes a place before the look-up, to limit the number of look-ups,
                // which need the database and the token.
                let place = self.turns.place(id).ok_or_else(overloaded)?;
                let _lookup = self.turns.lookup().ok_or_else(overloaded)?;
                credential = self.directory.client(id).await?;
                _place = credential.is_some().then_some(place);
            }
        }
        if let (Some(proof), Some(credential)) = (&proof, &credential)
            && let Some(number) = proof.holds(credential, &self.settings)
        {
            // The proof is inserted again, so that it is kept for a day after the last use of the
            // secret.
            self.proven.insert(tag, proof.clone());
            let matched = Match {
                number,
                better: None,
            };
            return Ok(self.accepted(credential.clone(), matched, generation));
        }
        let now = Timestamp::now();
        let live = credential.as_ref().filter(|credential| {
            let mut live = credential.document.live_secrets(now);
            live.next().is_some()
        });
        let lane = match (live, &proof) {
            (None, _) => Lane::Unknown,
            (Some(_), Some(_)) => Lane::Proven,
            (Some(credential), None) => Lane::Known(credential.id),
        };
        let turn = self.turns.wait(lane, TURN_WAIT_MAX).await;
        let turn = turn.ok_or_else(overloaded)?;
        let hashes = Hashes::of(credential.as_ref(), now, &self.dummy);
        let settings = self.settings.clone();
        let verifying = tokio::task::spawn_blocking(move || {
            let matched = hashes.matching(&secret, &settings);
            drop(turn);
            matched
        });
        let panicked = |panic| Error::new(Reason::Bug, format!("Argon2id: {panic}"));
        let matched = verifying.await.map_err(panicked)?;
        let Some(credential) = credential else {
            return refuse("no API client has this id");
        };
        let Some(matched) = matched else {
            return refuse(if credential.document.revoked.is_some() {
                "this API client was revoked"
            } else if credential.document.live_secrets(now).next().is_none() {
                "every secret of this API client has expired or was revoked"
            } else {
                "the secret is wrong, expired or revoked"
            });
        };
        if let Some(proof) = Proof::of(&credential, &matched) {
            self.proven.insert(tag, proof);
        }
        Ok(self.accepted(credential, matched, generation))
    }

    fn accepted(&self, credential: ClientCredential, matched: Match, generation: u64) -> Known {
        let number = matched.number;
        let secrets = &credential.document.secrets;
        let secret = secrets.iter().find(|secret| secret.number == number);
        let known = Known {
            principal: Arc::new(Principal::authenticated(identity(&credential))),
            id: credential.id,
            secret: number,
            expires: secret.and_then(|secret| secret.expires),
            generation,
        };
        if let Some(phc) = matched.better {
            self.directory.improve(credential, number, phc);
        }
        known
    }

    fn tag(&self, id: &str, secret: &[u8]) -> Tag {
        let mut context = hmac::Context::with_key(&self.key);
        context.update(&u64::try_from(id.len()).unwrap_or(u64::MAX).to_be_bytes());
        context.update(id.as_bytes());
        context.update(secret);
        let tag = context.sign();
        tag.as_ref().try_into().expect("HMAC-SHA256 gives 32 bytes")
    }
}

fn overloaded() -> Error {
    metrics::CLIENT_SECRETS_REFUSED.increment();
    let detail = "too many client secrets are being verified at the moment";
    Error::new(Reason::Rate, detail).retry_after(RETRY)
}

/// The hashes with which a secret is compared. The number of hashes is the same for every id, so
/// the duration of a trial does not show whether an API client exists.
struct Hashes(Vec<(Option<u32>, String)>);

impl Hashes {
    fn of(credential: Option<&ClientCredential>, now: Timestamp, dummy: &str) -> Self {
        let live = credential
            .into_iter()
            .flat_map(|it| it.document.live_secrets(now));
        let mut hashes: Vec<_> = live
            .take(LIVE_SECRETS_MAX)
            .map(|secret| (Some(secret.number), secret.phc.clone()))
            .collect();
        hashes.resize_with(LIVE_SECRETS_MAX, || (None, dummy.to_owned()));
        Self(hashes)
    }

    fn matching(self, secret: &[u8], settings: &Settings) -> Option<Match> {
        let mut matched = None;
        for (number, phc) in self.0 {
            let Ok(hash) = PasswordHash::new(&phc) else {
                continue;
            };
            // `verify_password` takes the parameters from the hash.
            let is_good = Argon2::default().verify_password(secret, &hash).is_ok();
            if let (true, Some(number)) = (is_good, number) {
                let is_weak = settings.is_weaker(&hash);
                matched = Some((number, is_weak));
            }
        }
        let (number, is_weak) = matched?;
        Some(Match {
            number,
            better: is_weak.then(|| settings.hash(secret).ok()).flatten(),
        })
    }
}

fn identity(credential: &ClientCredential) -> Identity {
    let grant = credential.document.grant();
    Identity {
        name: credential.id.principal_name(),
        credential: Credential::ClientSecret,
        kind: Kind::Service,
        users: grant.users(),
        key_names: grant.key_names(),
        tenant: grant.tenant,
        roles: grant.roles,
        subject: None,
        mapping: None,
        claims: Claims::default(),
    }
}

#[cfg(test)]
mod tests;
