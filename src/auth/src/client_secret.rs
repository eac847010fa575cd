//! Secrets of API clients: Argon2id (RFC 9106), off the async threads and under a separate limit, because it costs memory and
//! time on purpose. An unknown id, a revoked client and a wrong secret cost the same and are answered alike.
//!
//! A secret that was accepted is remembered for a minute under a keyed hash, so that most calls pay neither for Argon2 nor for a look-up.
//! A change of any client through this broker empties that memory; a change through another broker is seen when it runs out.
//!
//! For a day after its last use it is also remembered which stored hash the secret matched. After the minute the client is looked up
//! again, and while it still has that hash, and the hash is not revoked or expired, the secret is accepted without another trial. So
//! wrong secrets, however many, do not delay a client that this broker knows: it waits for no turn and needs no failures left.
//! Secrets that were not accepted before wait for a turn in `turns`. Calls that show the same secret at the same time share one trial.
//!
//! Not promised: that hashes made with older parameters take as long as today's.
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

/// How long a verified secret is remembered.
const REMEMBERED: Duration = Duration::from_mins(1);
/// Verified secrets that are remembered.
const REMEMBERED_MAX: u64 = 10_000;
/// How long after its last use it is remembered which stored hash a secret matched.
const PROVEN: Duration = Duration::from_hours(24);
/// Secrets of which that is known.
const PROVEN_MAX: u64 = 10_000;
/// Secrets that are tried at the same time.
const TRIALS_MAX: u64 = 10_000;
/// How long a call waits for its turn to be verified.
const TURN_WAIT_MAX: Duration = Duration::from_secs(2);
/// What a caller is told that waited for too long.
const RETRY: Duration = Duration::from_secs(1);

/// The `[client_credentials]` section.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Roles that an administrator may give to an API client.
    pub grantable_roles: BTreeSet<Role>,
    /// Memory of Argon2id, in KiB.
    pub argon2_memory_kib: u32,
    /// Passes over it.
    pub argon2_iterations: u32,
    /// Lanes.
    pub argon2_parallelism: u32,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            // An administrator who could grant `enrol` could replace a user's key with a known one, and one who could grant
            // `auditor` could read what all tenants did.
            grantable_roles: BTreeSet::new(),
            argon2_memory_kib: 19_456,
            argon2_iterations: 2,
            argon2_parallelism: 1,
        }
    }
}

/// OWASP's least parameters of Argon2id (Password Storage Cheat Sheet): memory in KiB, and passes. Each is as good as the others.
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
    /// What is wrong with the parameters.
    pub fn problem(&self) -> Option<String> {
        let (memory, iterations) = (self.argon2_memory_kib, self.argon2_iterations);
        if !FLOOR
            .iter()
            .any(|(kib, passes)| memory >= *kib && iterations >= *passes)
        {
            return Some(format!(
                "[client_credentials]: {memory} KiB and {iterations} iterations are below the least that OWASP recommends; \
                 19456 KiB and 2 are enough"
            ));
        }
        let is_too_much = memory > MEMORY_KIB_MAX
            || iterations > ITERATIONS_MAX
            || !(1..=PARALLELISM_MAX).contains(&self.argon2_parallelism);
        is_too_much.then(|| {
            format!(
                "[client_credentials]: at most {MEMORY_KIB_MAX} KiB, {ITERATIONS_MAX} iterations, and a parallelism of 1 to \
                 {PARALLELISM_MAX}: each login pays for it"
            )
        })
    }

    /// The hash of a secret with these parameters, as a PHC string.
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

    /// Whether a hash was made with less than is asked for now.
    fn is_weaker(&self, hash: &PasswordHash) -> bool {
        argon2::Params::try_from(hash).is_ok_and(|made| {
            made.m_cost() < self.argon2_memory_kib || made.t_cost() < self.argon2_iterations
        })
    }
}

/// Where API clients are known. The broker's side: their documents are verified on the token before they are handed out.
#[async_trait]
pub trait Directory: Send + Sync + fmt::Debug + 'static {
    /// A client, if there is one.
    async fn client(&self, id: ClientId) -> Result<Option<ClientCredential>, Error>;

    /// Another number after each change of any client through this broker.
    fn generation(&self) -> u64;

    /// A secret was good.
    fn note_use(&self, id: ClientId, secret: u32);

    /// A secret was accepted, and its hash is weaker than it should be: this is a stronger one.
    fn improve(&self, credential: ClientCredential, secret: u32, phc: String);
}

/// Knows the secrets of API clients.
pub struct Secrets {
    settings: Settings,
    directory: Arc<dyn Directory>,
    /// Under a key of this process, so that a look into its memory gives no hash to guess against.
    remembered: Cache<Tag, Known>,
    /// Under the same key: which stored hashes they matched.
    proven: Cache<Tag, Proof>,
    /// Under the same key, and the generation that they look at.
    trials: Cache<(Tag, u64), Arc<Trial>>,
    key: hmac::Key,
    turns: Turns,
    /// A hash that no secret fits.
    dummy: Arc<str>,
}

/// A secret and its id, under a key of this process.
type Tag = [u8; 32];
/// One answer for all who ask at the same time.
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

/// Which of a client's secrets was shown.
struct Match {
    number: u32,
    better: Option<String>,
}

/// Argon2id found that a secret matches these stored hashes, so it needs no trial while its client has one of them.
#[derive(Clone, Debug)]
struct Proof {
    /// SHA-256 of the hash that was there, and of the better one that may have replaced it.
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

    /// Which live secret of the client it is about. A hash that is weaker than it should be is left to a trial, which replaces it.
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
    /// With nothing remembered.
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
            // Half of the cores: calls that have nothing to do with it go on.
            turns: Turns::new(cores.div_ceil(2)),
            dummy: dummy.into(),
        })
    }

    /// Whose secret it is. `budget` is asked before a trial that costs much, unless the secret was accepted recently;
    /// its error is the answer then.
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
            // Held until the trial is over.
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

    /// Tries a secret, or waits for the trial of it that is under way.
    async fn shared_trial(
        &self,
        id: &str,
        secret: Zeroizing<Vec<u8>>,
        tag: Tag,
        generation: u64,
    ) -> Result<Known, Error> {
        // With the generation: a call that arrives after a change is not answered from the state before it.
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
        // Held until the trial is over, by existing clients alone.
        let _place;
        match (id, &proof) {
            (None, _) => credential = None,
            (Some(id), Some(_)) => {
                credential = self.directory.client(id).await?;
                _place = None;
            }
            (Some(id), None) => {
                // Before the database and the token are asked, because their capacity is limited, too.
                let place = self.turns.place(id).ok_or_else(overloaded)?;
                let _lookup = self.turns.lookup().ok_or_else(overloaded)?;
                credential = self.directory.client(id).await?;
                _place = credential.is_some().then_some(place);
            }
        }
        if let (Some(proof), Some(credential)) = (&proof, &credential)
            && let Some(number) = proof.holds(credential, &self.settings)
        {
            // Once more, so that it counts from the last use.
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
            return refuse("there is no API client of this id");
        };
        let Some(matched) = matched else {
            return refuse(if credential.document.revoked.is_some() {
                "this API client was revoked"
            } else if credential.document.live_secrets(now).next().is_none() {
                "every secret of this API client has expired or was revoked"
            } else {
                "this is no secret of this API client, or one that has expired or was revoked"
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
    let detail = "too many client secrets are being verified";
    Error::new(Reason::Rate, detail).retry_after(RETRY)
}

/// The hashes that a secret is compared with: the same number for every id.
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
            // The parameters are those of the hash.
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
        claims: Claims::default(),
    }
}

#[cfg(test)]
mod tests;
