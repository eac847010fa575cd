//! Keeps the workers alive: starts them one after another, asks each for a canary every second, replaces one that crashes,
//! hangs or loses its token, and stops trying when the PIN was refused.
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
use tokio::sync::watch;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::call::{Deadline, Timestamp};

use super::{
    Error, ExpectedKey, Serving, Settings, TokenInfo, TokenState, WorkerInfo,
    latch::PinLatch,
    link::Link,
    queue::Queue,
    start::{self, Started},
    wire::FailureClass,
};

mod minder;
#[cfg(test)]
mod tests;
mod token;

const TICK: Duration = Duration::from_millis(250);
/// Between attempts to start a worker while the token is away: short, so that service is full soon after it returns.
const BACKOFF_MIN: Duration = Duration::from_millis(250);
const BACKOFF_MAX: Duration = Duration::from_secs(1);
/// Between attempts while a key or an attribute is wrong: only an administrator can mend that.
const BACKOFF_UNTRUSTED: Duration = Duration::from_secs(10);

/// The cause that is no alarm.
const STOPPING: &str = "the broker is stopping";

/// Why the first start failed for a cause that no waiting mends.
#[derive(Clone, Debug)]
pub struct StartupError {
    /// What, what it means, what to do.
    pub message: String,
    /// Whether a key or an attribute is wrong, rather than the configuration.
    pub untrusted: bool,
}

/// The front's side of the token.
#[derive(Debug)]
pub struct Supervisor {
    settings: Settings,
    expected: Vec<ExpectedKey>,
    program: PathBuf,
    queue: Queue,
    /// Keys and token as the last worker found them.
    found: ArcSwap<start::Found>,
    serving: watch::Sender<Serving>,
    /// Held while the workers in the queue, or `serving`, change: the one follows from the other.
    changing: Mutex<()>,
    settled: watch::Sender<bool>,
    startup_error: Mutex<Option<StartupError>>,
    last_canary_us: AtomicU64,
    generation: AtomicU64,
    latch: PinLatch,
    stop: CancellationToken,
    tasks: TaskTracker,
}

impl Supervisor {
    /// Starts in the background, on the current runtime, and returns at once. The keys are those that must be on the token.
    pub fn start(settings: Settings, keys: Vec<ExpectedKey>, program: PathBuf) -> Arc<Self> {
        let supervisor = Self::idle(settings, keys, program);
        let run = Arc::clone(&supervisor).run();
        supervisor.tasks.spawn(run);
        supervisor
    }

    fn idle(settings: Settings, keys: Vec<ExpectedKey>, program: PathBuf) -> Arc<Self> {
        Arc::new(Self {
            queue: Queue::new(settings.queue_length_max),
            latch: PinLatch::default(),
            found: ArcSwap::default(),
            serving: watch::Sender::new(Serving::Down("the workers are starting".to_owned())),
            changing: Mutex::default(),
            settled: watch::Sender::new(false),
            startup_error: Mutex::default(),
            last_canary_us: AtomicU64::new(0),
            generation: AtomicU64::new(0),
            stop: CancellationToken::new(),
            tasks: TaskTracker::new(),
            settings,
            expected: keys,
            program,
        })
    }

    /// Resolves when the first attempt has ended, with what it ended in.
    pub async fn settled(&self) -> Serving {
        let mut settled = self.settled.subscribe();
        // The sender is ours, so the wait cannot fail.
        let waited = settled.wait_for(|settled| *settled).await.is_ok();
        debug_assert!(waited);
        self.serving.borrow().clone()
    }

    /// A cause of the first attempt's failure that only an administrator can mend.
    pub fn startup_error(&self) -> Option<StartupError> {
        self.startup_error
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Takes no more jobs, lets those under way end, closes the sockets and waits for the workers.
    pub async fn drain_and_stop(&self, deadline: Deadline) {
        self.set_serving(&self.changing(), &Serving::Down(STOPPING.to_owned()));
        let idle = async {
            while self.queue.len() > 0 || self.queue.links().iter().any(|l| l.in_flight() > 0) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        if tokio::time::timeout(deadline.remaining(), idle)
            .await
            .is_err()
        {
            tracing::warn!("jobs still on the token at the end of the drain");
        }
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }

    async fn run(self: Arc<Self>) {
        let mut next_attempt = Instant::now();
        let mut backoff = BACKOFF_MIN;
        let mut ticks = tokio::time::interval(TICK);
        loop {
            tokio::select! {
                () = self.stop.cancelled() => return,
                _ = ticks.tick() => {}
            }
            self.publish_metrics();
            let missing = self.queue.links().len() < self.settings.workers;
            if !missing || Instant::now() < next_attempt || !self.latch.may_try(&self.settings) {
                continue;
            }
            let started = self.start_worker().await;
            let failed = started.is_err();
            match started {
                Ok(()) => {
                    backoff = BACKOFF_MIN;
                    next_attempt = Instant::now();
                    ticks.reset_immediately();
                }
                Err(failure) => {
                    backoff = self.note_failed_start(&failure, backoff);
                    next_attempt = Instant::now() + backoff;
                }
            }
            // One worker serves, even when the next does not start: a token may allow fewer than the configuration asks for.
            let full = self.queue.links().len() >= self.settings.workers;
            if full || failed {
                self.settled.send_replace(true);
            }
        }
    }

    /// Starts one worker and hands it to the queue. Fails when the broker stops meanwhile.
    async fn start_worker(self: &Arc<Self>) -> Result<(), start::Failure> {
        let Started {
            child,
            stream,
            pid,
            found,
        } = start::worker(&self.program, &self.settings, &self.expected, &self.stop).await?;
        let generation = self.generation.fetch_add(1, Ordering::Relaxed) + 1;
        let link = Link::new(generation, pid, self.settings.sessions_per_worker, stream);
        tracing::info!(pid, generation, token = %found.info.label, "token worker ready");
        self.found.store(Arc::new(found));
        self.note_canary();
        self.welcome(&link);
        self.tasks.spawn(Arc::clone(self).mind(link, child));
        Ok(())
    }

    fn note_failed_start(&self, failure: &start::Failure, backoff: Duration) -> Duration {
        let first = !*self.settled.borrow() && self.generation.load(Ordering::Relaxed) == 0;
        let detail = failure.detail.clone();
        match failure.class {
            FailureClass::Pin => {
                self.latch.set(failure.pin_version.clone());
                tracing::error!(alarm = "pin-latched", cause = %detail, "no login is tried until the PIN file changes");
                self.set_serving_unless_up(&Serving::Untrusted(detail));
                return BACKOFF_MAX;
            }
            FailureClass::Untrusted | FailureClass::KeyMissing | FailureClass::Configuration
                if first =>
            {
                *self
                    .startup_error
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner) = Some(StartupError {
                    message: detail.clone(),
                    untrusted: failure.class != FailureClass::Configuration,
                });
            }
            _ => {}
        }
        tracing::warn!(cause = %detail, "a token worker did not start");
        // A key that was there once is away with its token, and comes back with it.
        let untrusted = failure.class == FailureClass::Untrusted
            || first && failure.class == FailureClass::KeyMissing;
        if untrusted {
            self.set_serving_unless_up(&Serving::Untrusted(detail));
            BACKOFF_UNTRUSTED
        } else {
            self.set_serving_unless_up(&Serving::Down(detail));
            (backoff * 2).min(BACKOFF_MAX)
        }
    }

    fn changing(&self) -> MutexGuard<'_, ()> {
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes in a worker that is ready.
    fn welcome(&self, link: &Arc<Link>) {
        let changing = self.changing();
        self.queue.add(Arc::clone(link));
        self.set_serving(&changing, &Serving::Up);
    }

    /// Gives a worker no more jobs. When it was the last one, nothing serves, with this cause; if it was let go before, the
    /// cause was said then.
    fn dismiss(&self, link: &Link, cause: &Serving) {
        let changing = self.changing();
        if self.queue.remove(link.generation()) && !self.queue.has_links() {
            self.set_serving(&changing, cause);
        }
    }

    fn set_serving_unless_up(&self, serving: &Serving) {
        let changing = self.changing();
        if !self.queue.has_links() {
            self.set_serving(&changing, serving);
        }
    }

    /// The guard is that of `changing`. Once it stops it does nothing else.
    fn set_serving(&self, _changing: &MutexGuard<'_, ()>, serving: &Serving) {
        let changed = self.serving.send_if_modified(|current| {
            let stopping = matches!(current, Serving::Down(cause) if cause == STOPPING);
            let changed = current != serving && !stopping;
            if changed {
                current.clone_from(serving);
            }
            changed
        });
        if !changed {
            return;
        }
        match serving {
            Serving::Up => tracing::info!("the token serves"),
            Serving::Down(cause) if cause == STOPPING => tracing::info!("no more token jobs"),
            Serving::Down(cause) => {
                tracing::error!(alarm = "token-down", %cause, "the token does not serve");
                self.queue.fail_all(&Error::Down(cause.clone()));
            }
            Serving::Untrusted(cause) => {
                tracing::error!(alarm = "token-untrusted", %cause, "the token must not be used");
                self.queue.fail_all(&Error::Untrusted(cause.clone()));
            }
        }
    }

    fn note_canary(&self) {
        let now = u64::try_from(Timestamp::now().micros()).unwrap_or(0);
        self.last_canary_us.store(now, Ordering::Relaxed);
    }

    fn last_canary(&self) -> Option<Timestamp> {
        match self.last_canary_us.load(Ordering::Relaxed) {
            0 => None,
            micros => i64::try_from(micros).ok().map(Timestamp::from_micros),
        }
    }

    fn publish_metrics(&self) {
        let gauge = |name: &'static str, value: usize| {
            metrics::gauge!(name).set(f64::from(u32::try_from(value).unwrap_or(u32::MAX)));
        };
        gauge("keybroker_token_workers", self.queue.links().len());
        gauge("keybroker_token_queue_length", self.queue.len());
        let up = *self.serving.borrow() == Serving::Up;
        gauge("keybroker_token_serving", usize::from(up));
        if let Some(last) = self.last_canary() {
            let age = Timestamp::now().micros().saturating_sub(last.micros());
            let seconds = Duration::from_micros(u64::try_from(age).unwrap_or(0)).as_secs_f64();
            metrics::gauge!("keybroker_token_canary_age_seconds").set(seconds);
        }
    }

    fn current_state(&self) -> TokenState {
        let found = self.found.load();
        TokenState {
            serving: self.serving.borrow().clone(),
            info: found.known().then(|| found.info.clone()),
            keys: Arc::clone(&found.keys),
            workers: self
                .queue
                .links()
                .iter()
                .map(|link| WorkerInfo {
                    pid: link.pid(),
                    sessions: link.sessions(),
                    jobs_in_flight: link.in_flight(),
                    generation: link.generation(),
                })
                .collect(),
            queue_length: self.queue.len(),
            last_canary: self.last_canary(),
        }
    }
}

impl Default for start::Found {
    fn default() -> Self {
        Self {
            info: TokenInfo {
                label: String::new(),
                serial: String::new(),
                model: String::new(),
            },
            keys: Arc::new([]),
            wrap: std::collections::HashMap::new(),
        }
    }
}
