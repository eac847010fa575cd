//! Combines several tokens: gives each job to an available token that contains the job's key.
//!
//! Each token has its own [`Supervisor`], with its own workers, queue, PIN latch and metrics. The pool only decides
//! which token gets a job. A job changes nothing on a token, so a job that failed on one token can be repeated on
//! another token. Therefore the failure of one token causes no failed call if another token can serve the call before
//! its deadline. With one token, the pool passes each job to the supervisor of this token.
//!
//! The list of tokens can change while the broker serves ([`Pool::reconfigure`]). A job keeps the list with which it began. If a
//! token was removed meanwhile, the job fails on this token, and another token of the list gets it.
//!
//! Mitigation: M7 of `THREAT_MODEL.md`.

use std::{
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
use tokio::task::JoinSet;
use tokio_util::task::TaskTracker;

use keybroker_core::{
    call::Deadline, envelope::Algorithm, key::WrappingKeyId, state::StateDirectory,
};
use keybroker_worker_protocol::{ExpectedKey, Settings, wire::request};

use crate::{
    Caller, Error, Serving, StartupError, Supervisor, Token,
    job::Output,
    queue::{Kind, Offer},
};

use attempts::{Attempts, Done};

mod attempts;
mod changes;
mod state;
#[cfg(test)]
mod tests;
mod token;

/// Time for which a token that did not answer in time gets no jobs that another token can do. Meanwhile, self-tests
/// check the workers of the token, and a hanging worker is replaced.
const SUSPECTED: Duration = Duration::from_secs(1);
/// If a token had no job for this time, the token gets the next job that it is expected to finish in a quarter of the
/// time until the job's deadline. Without probes, the estimates for an unused token would never change.
const PROBE_INTERVAL: Duration = Duration::from_secs(1);
const PROBE_PARTS: u32 = 4;
/// Delay before a retry, in the error for a key that no token has yet.
const ABSENT_RETRY: Duration = Duration::from_secs(1);
/// Time that a start waits for the other tokens after every key has an available token.
const OTHERS_TIMEOUT: Duration = Duration::from_secs(2);

/// A token of a pool: its settings, and the keys that must be on it.
#[derive(Clone, Debug)]
pub struct Entry {
    /// The settings of the token.
    pub settings: Settings,
    /// The keys that the token must contain. The broker does not open a token without keys.
    pub keys: Vec<ExpectedKey>,
}

/// One or several tokens.
#[derive(Debug)]
pub struct Pool {
    members: ArcSwap<Members>,
    /// A lock that is held while the list of tokens changes.
    changing: Mutex<()>,
    /// The workers of removed tokens, which finish their jobs.
    leaving: TaskTracker,
    program: PathBuf,
    state: StateDirectory,
}

/// The tokens at one moment.
#[derive(Clone, Debug)]
struct Members {
    /// The tokens with keys, by descending priority.
    opened: Vec<Arc<Member>>,
    /// The tokens for which no key is registered. The broker does not open tokens without registered keys.
    unused: Vec<Settings>,
    /// Epoch of the pool: the times of its members are milliseconds since this moment.
    epoch: Instant,
}

/// One token of a pool.
#[derive(Debug)]
struct Member {
    priority: u8,
    supervisor: Arc<Supervisor>,
    /// Time until which the token is suspected of hanging, in milliseconds since the epoch of the pool.
    suspected_until_ms: AtomicU64,
    /// Time at which the token last got a job, in milliseconds since the epoch of the pool.
    last_job_ms: AtomicU64,
}

/// A job's requirements for a token.
#[derive(Clone, Copy, Debug)]
struct Need {
    kind: Kind,
    /// The algorithm of the envelope that the job decrypts.
    algorithm: Option<Algorithm>,
    /// A second key that the token must contain: the new wrapping key of a re-wrap.
    second: Option<WrappingKeyId>,
}

/// A token that was chosen for a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Choice {
    /// Index of the token in `Members::opened`.
    member: usize,
    /// Expected time until the job is done; `None` if no worker is ready and the job waits for a worker.
    expected: Option<Duration>,
}

impl Member {
    fn new(supervisor: Arc<Supervisor>, priority: u8) -> Self {
        Self {
            priority,
            supervisor,
            suspected_until_ms: AtomicU64::new(0),
            last_job_ms: AtomicU64::new(0),
        }
    }

    /// Whether the token contains the keys of a job and supports the algorithm of the job's envelope. A token whose
    /// OAEP supports SHA-256 supports SHA-1, too.
    fn holds(&self, need: Need) -> bool {
        let Some(own) = self.supervisor.algorithm(need.kind.key()) else {
            return false;
        };
        let can_decrypt =
            need.algorithm != Some(Algorithm::RsaOaepSha256) || own == Algorithm::RsaOaepSha256;
        let has_second = need
            .second
            .is_none_or(|key| self.supervisor.algorithm(key).is_some());
        can_decrypt && has_second
    }

    /// Whether the estimates of the token are old and the job can be a probe. A job can be a probe if it would finish
    /// before its deadline even on a much slower token.
    fn is_due_for_a_probe(&self, now_ms: u64, expected: Duration, caller: &Caller) -> bool {
        let idle_ms = now_ms.saturating_sub(self.last_job_ms.load(Ordering::Relaxed));
        idle_ms >= millis(PROBE_INTERVAL) && expected * PROBE_PARTS <= caller.deadline().remaining()
    }
}

impl Pool {
    /// Starts the workers of every token in the background on the current runtime and returns immediately.
    pub fn start(entries: Vec<Entry>, program: PathBuf, state: StateDirectory) -> Arc<Self> {
        let is_one = entries.len() == 1;
        let (used, unused): (Vec<_>, Vec<_>) = entries
            .into_iter()
            .partition(|entry| is_one || !entry.keys.is_empty());
        let opened = used.into_iter().map(|Entry { settings, keys }| {
            let priority = settings.priority;
            let supervisor = Supervisor::start(settings, keys, program.clone(), state.clone());
            Arc::new(Member::new(supervisor, priority))
        });
        let opened = opened.collect();
        let unused: Vec<Settings> = unused.into_iter().map(|one| one.settings).collect();
        for token in &unused {
            changes::warn_of_unused(&token.name);
        }
        Arc::new(Self::of(Members::new(opened, unused), program, state))
    }

    fn of(members: Members, program: PathBuf, state: StateDirectory) -> Self {
        Self {
            members: ArcSwap::from_pointee(members),
            changing: Mutex::default(),
            leaving: TaskTracker::new(),
            program,
            state,
        }
    }

    /// Returns the token that the broker uses: all tokens of this pool together.
    pub fn token(self: &Arc<Self>) -> Arc<dyn Token> {
        Arc::<Self>::clone(self)
    }

    fn members(&self) -> Arc<Members> {
        self.members.load_full()
    }

    fn lock_changes(&self) -> MutexGuard<'_, ()> {
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until the first attempt to start the workers of each token has ended. The wait for a token is short if the
    /// other tokens already serve every key. Returns the state after the wait.
    pub async fn settled(&self) -> Serving {
        let members = self.members();
        if let [only] = members.opened.as_slice() {
            return only.supervisor.settled().await;
        }
        let mut starting: JoinSet<Serving> = members
            .supervisors()
            .map(|supervisor| async move { supervisor.settled().await })
            .collect();
        while starting.join_next().await.is_some() {
            if members.serving() == Serving::Up {
                let others = async { while starting.join_next().await.is_some() {} };
                // A token that starts later is used as soon as it is ready.
                let _in_time = tokio::time::timeout(OTHERS_TIMEOUT, others).await;
                break;
            }
        }
        members.serving()
    }

    /// Returns the reason why no token can serve, if only an administrator can repair the cause.
    pub fn startup_error(&self) -> Option<StartupError> {
        let members = self.members();
        if let [only] = members.opened.as_slice() {
            return only.supervisor.startup_error();
        }
        let errors: Option<Vec<(String, StartupError)>> = members
            .opened
            .iter()
            .map(|member| {
                let error = member.supervisor.startup_error()?;
                Some((member.supervisor.name().to_owned(), error))
            })
            .collect();
        let errors = errors.filter(|errors| !errors.is_empty())?;
        Some(StartupError {
            untrusted: errors.iter().any(|(_, error)| error.untrusted),
            message: errors
                .iter()
                .map(|(name, error)| format!("token {name}: {}", error.message))
                .collect::<Vec<_>>()
                .join("; "),
        })
    }

    /// Accepts no more jobs, lets running jobs finish and waits for the workers of every token to end.
    pub async fn drain_and_stop(&self, deadline: Deadline) {
        let mut stopping: JoinSet<()> = self
            .members()
            .supervisors()
            .map(|supervisor| async move { supervisor.drain_and_stop(deadline).await })
            .collect();
        while stopping.join_next().await.is_some() {}
        self.leaving.close();
        let left = tokio::time::timeout_at(deadline.instant().into(), self.leaving.wait());
        if left.await.is_err() {
            tracing::warn!("workers of removed tokens are still running at the end of the drain");
        }
    }
}

impl Members {
    fn new(mut opened: Vec<Arc<Member>>, unused: Vec<Settings>) -> Self {
        // The sort is stable, so tokens of equal priority keep the order of the configuration.
        opened.sort_by_key(|member| std::cmp::Reverse(member.priority));
        Self {
            opened,
            unused,
            epoch: Instant::now(),
        }
    }

    /// Returns the supervisor if there is only one token.
    fn only(&self) -> Option<&Arc<Supervisor>> {
        match self.opened.as_slice() {
            [only] if self.unused.is_empty() => Some(&only.supervisor),
            _ => None,
        }
    }

    fn supervisors(&self) -> impl Iterator<Item = Arc<Supervisor>> {
        self.opened
            .iter()
            .map(|member| Arc::clone(&member.supervisor))
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.epoch.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn suspect(&self, member: usize) {
        if let Some(member) = self.opened.get(member) {
            let until = self.now_ms() + millis(SUSPECTED);
            member.suspected_until_ms.store(until, Ordering::Relaxed);
        }
    }

    /// Chooses a token for a job among the tokens that are not in `tried`. A token of lower priority is chosen only if
    /// no token of higher priority can do the job in time. Among tokens of equal priority, or if no token can do the
    /// job in time, the token that would finish first is chosen.
    fn choose(&self, need: Need, caller: &Caller, tried: &[usize]) -> Option<Choice> {
        let now_ms = self.now_ms();
        let mut in_time: Option<(u8, Choice)> = None;
        let (mut late, mut suspected): (Option<Choice>, Option<Choice>) = (None, None);
        for (at, member) in self.opened.iter().enumerate() {
            if in_time.is_some_and(|(priority, _)| priority > member.priority) {
                break;
            }
            if tried.contains(&at) || !member.holds(need) {
                continue;
            }
            let choice = |expected| Choice {
                member: at,
                expected: Some(expected),
            };
            match member.supervisor.queue().offer(need.kind, caller) {
                Offer::NoWorker => {}
                Offer::TooLate(expected) => keep_sooner(&mut late, choice(expected)),
                Offer::InTime(expected) => {
                    if member.suspected_until_ms.load(Ordering::Relaxed) > now_ms {
                        keep_sooner(&mut suspected, choice(expected));
                        continue;
                    }
                    if member.is_due_for_a_probe(now_ms, expected, caller) {
                        return Some(choice(expected));
                    }
                    let mut best = in_time.map(|(_, best)| best);
                    keep_sooner(&mut best, choice(expected));
                    in_time = best.map(|best| (member.priority, best));
                }
            }
        }
        in_time
            .map(|(_, choice)| choice)
            .or(suspected)
            .or(late)
            .or_else(|| self.awaited(need, tried))
    }

    /// Returns the token on which a job waits for a worker, because no token has a ready worker.
    fn awaited(&self, need: Need, tried: &[usize]) -> Option<Choice> {
        let waits = |serves: bool| {
            self.opened.iter().enumerate().position(|(at, member)| {
                !tried.contains(&at)
                    && member.holds(need)
                    && member.supervisor.is_serving() == serves
            })
        };
        let member = waits(true).or_else(|| waits(false))?;
        Some(Choice {
            member,
            expected: None,
        })
    }

    /// Runs a job on a token that contains its key. If the token fails or is late and enough time is left, another
    /// token gets the same job. The caller gets the first answer.
    async fn run(
        &self,
        need: Need,
        caller: &Caller,
        job: impl Fn() -> request::Job + Send + Sync,
    ) -> Result<Output, Error> {
        let mut attempts = Attempts::default();
        let Some(mut choice) = self.choose(need, caller, &[]) else {
            return Err(self.absent(need.kind.key()));
        };
        loop {
            attempts.begin(choice.member);
            // A token without a worker is no alternative: repeating the job on the chosen token is faster.
            let alternative = self.choose(need, caller, attempts.tried());
            let has_alternative = alternative.is_some_and(|choice| choice.expected.is_some());
            if let Some(member) = self.opened.get(choice.member) {
                member.last_job_ms.store(self.now_ms(), Ordering::Relaxed);
                let running = member.supervisor.run_job(job(), caller, has_alternative);
                attempts.run(choice.member, Box::pin(running));
            }
            let mut patience = attempts::patience(choice.expected, caller.deadline());
            choice = loop {
                let done = match tokio::time::timeout(patience, attempts.first_done()).await {
                    Ok(done) => done,
                    Err(_) => Done::Late(attempts.latest()),
                };
                match done {
                    Done::Answered(result) => return result,
                    Done::Failed(member, error) => {
                        attempts.fail(error);
                        if let Some(next) = self.choose(need, caller, attempts.tried()) {
                            self.count_failover(member);
                            break next;
                        }
                        if !attempts.are_running() {
                            return Err(attempts.error());
                        }
                    }
                    Done::Late(member) => {
                        let next = self.choose(need, caller, attempts.tried());
                        // On a token without a worker, the job would only wait again.
                        if let Some(next) = next.filter(|next| next.expected.is_some()) {
                            if self.has_worker(member) {
                                self.suspect(member);
                            }
                            self.count_failover(member);
                            break next;
                        }
                        patience = attempts::AGAIN;
                    }
                }
            };
        }
    }

    fn has_worker(&self, member: usize) -> bool {
        let member = self.opened.get(member);
        member.is_some_and(|member| member.supervisor.queue().has_links())
    }

    fn count_failover(&self, member: usize) {
        if let Some(member) = self.opened.get(member) {
            member.supervisor.measures().failovers.increment(1);
        }
    }

    /// Returns the error for a key that no worker has found yet.
    fn absent(&self, key: WrappingKeyId) -> Error {
        Error::Down {
            cause: match self.unserved_cause(key) {
                Some(cause) => cause,
                None => format!("no token of the configuration has wrapping key {key}"),
            },
            retry_after: ABSENT_RETRY,
        }
    }
}

fn keep_sooner(best: &mut Option<Choice>, other: Choice) {
    if best.is_none_or(|best| other.expected < best.expected) {
        *best = Some(other);
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
