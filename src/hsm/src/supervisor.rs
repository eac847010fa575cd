//! Starts the workers one after another, and runs a self-test on each worker every second. Replaces a worker that
//! crashes, hangs or loses its token. The state machine [`machine::Machine`] makes the decisions, and this module
//! carries them out.
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
use tokio::sync::{Notify, watch};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use keybroker_core::{
    call::{Deadline, Timestamp},
    envelope::Algorithm,
    key::WrappingKeyId,
    state::StateDirectory,
};
use keybroker_worker_protocol::{ExpectedKey, Settings, unpadded, wire::FailureClass};

use crate::{
    Error, Serving, TokenKey, TokenState, WorkerInfo,
    found::Found,
    job::Job,
    link::Link,
    measures::{Measures, Reading},
    queue::Queue,
    start::{self, Started},
};

use alerts::{Alerts, Line};
use keys::Recheck;
use machine::{Action, Event, Loss, Machine};

mod alerts;
mod keys;
mod machine;
mod monitor;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
pub(crate) mod token;

const TICK: Duration = Duration::from_millis(250);

/// The cause that is reported while the broker shuts down.
const STOPPING: &str = "the broker is stopping";
/// The cause that is reported after the token was removed from the configuration.
const REMOVED: &str = "the token was removed from the configuration";

/// The reason for a failed first start, if only an administrator can repair the cause.
#[derive(Clone, Debug)]
pub struct StartupError {
    /// A message with the cause, its effect and the action that an administrator must take.
    pub message: String,
    /// Whether a key or an attribute is wrong; `false` if the configuration is wrong.
    pub untrusted: bool,
}

/// The front's side of the token.
#[derive(Debug)]
pub struct Supervisor {
    settings: Settings,
    /// The keys that must be on the token. A worker that started with an earlier list is replaced.
    expected: ArcSwap<Vec<ExpectedKey>>,
    program: PathBuf,
    state: StateDirectory,
    queue: Queue,
    measures: Measures,
    /// The token, and the keys that every worker serves.
    found: ArcSwap<Found>,
    serving: watch::Sender<Serving>,
    /// The lock is also held while the workers in the queue or `serving` change, so that the
    /// workers and `serving` always match.
    machine: Mutex<Decider>,
    /// Notified when the state machine decides that a worker must be started.
    start: Notify,
    settled: watch::Sender<bool>,
    startup_error: Mutex<Option<StartupError>>,
    last_self_test_us: AtomicU64,
    generation: AtomicU64,
    stop: CancellationToken,
    tasks: TaskTracker,
}

/// The state machine, its clock and its alerts.
#[derive(Debug)]
struct Decider {
    machine: Machine,
    alerts: Alerts,
    recheck: Recheck,
    epoch: Instant,
}

impl Decider {
    /// Returns the error for callers while the token is unavailable, with the expected time until a worker is ready.
    fn down(&self, cause: &str) -> Error {
        Error::Down {
            cause: cause.to_owned(),
            retry_after: self.machine.expected_wait(self.epoch.elapsed()),
        }
    }

    /// Returns the error for callers in this state, or `None` if calls are served in this state.
    fn refusal(&self, serving: &Serving) -> Option<Error> {
        match serving {
            Serving::Up => None,
            Serving::Down(cause) => Some(self.down(cause)),
            Serving::Untrusted(cause) => Some(Error::Untrusted(cause.clone())),
        }
    }
}

impl Supervisor {
    /// Starts the supervisor in the background on the current runtime and returns immediately. `keys` are the keys that
    /// must be on the token.
    pub fn start(
        settings: Settings,
        keys: Vec<ExpectedKey>,
        program: PathBuf,
        state: StateDirectory,
    ) -> Arc<Self> {
        let supervisor = Self::idle(settings, keys, program, state);
        let run = Arc::clone(&supervisor).run();
        supervisor.tasks.spawn(run);
        supervisor
    }

    fn idle(
        settings: Settings,
        keys: Vec<ExpectedKey>,
        program: PathBuf,
        state: StateDirectory,
    ) -> Arc<Self> {
        let measures = Measures::of(&settings.name);
        Arc::new(Self {
            queue: Queue::new(&settings, &measures),
            measures,
            found: ArcSwap::default(),
            serving: watch::Sender::new(Serving::Down("the workers are starting".to_owned())),
            machine: Mutex::new(Decider {
                machine: Machine::new(settings.workers),
                alerts: Alerts::default(),
                recheck: Recheck::default(),
                epoch: Instant::now(),
            }),
            start: Notify::new(),
            settled: watch::Sender::new(false),
            startup_error: Mutex::default(),
            last_self_test_us: AtomicU64::new(0),
            generation: AtomicU64::new(0),
            stop: CancellationToken::new(),
            tasks: TaskTracker::new(),
            settings,
            expected: ArcSwap::from_pointee(keys::in_order(keys)),
            program,
            state,
        })
    }

    /// Waits until the first attempt to start the workers has ended. Returns the state after this attempt.
    pub async fn settled(&self) -> Serving {
        let mut settled = self.settled.subscribe();
        // The supervisor owns the sender of this channel, so the wait cannot fail.
        let waited = settled.wait_for(|settled| *settled).await.is_ok();
        debug_assert!(waited);
        self.serving.borrow().clone()
    }

    /// Returns the reason for a failed first start, if only an administrator can repair the cause.
    pub fn startup_error(&self) -> Option<StartupError> {
        self.startup_error
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Accepts no more jobs, lets running jobs finish, closes the sockets and waits for the workers to end.
    pub async fn drain_and_stop(&self, deadline: Deadline) {
        self.drain(STOPPING, deadline).await;
    }

    /// Does the same as [`drain_and_stop`](Self::drain_and_stop) for a token that was removed from the configuration. Afterwards, the
    /// metrics no longer report a state of the token.
    pub(crate) async fn remove(&self, deadline: Deadline) {
        self.drain(REMOVED, deadline).await;
        self.measures.retract();
        tracing::info!(token = %self.settings.name, "the workers of the removed token have ended");
    }

    async fn drain(&self, cause: &str, deadline: Deadline) {
        {
            let mut decider = self.decider();
            self.apply(&mut decider, Event::Stop);
            self.serving.send_replace(Serving::Down(cause.to_owned()));
            tracing::info!(token = %self.settings.name, "the broker no longer accepts token jobs");
            if !self.queue.has_links() {
                self.queue.fail_all(&decider.down(cause));
            }
        }
        let idle = async {
            while self.queue.len() > 0 || self.queue.links().iter().any(|l| l.in_flight() > 0) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        if tokio::time::timeout(deadline.remaining(), idle)
            .await
            .is_err()
        {
            tracing::warn!("token jobs are still running at the end of the drain");
        }
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }

    async fn run(self: Arc<Self>) {
        let mut ticks = tokio::time::interval(TICK);
        loop {
            tokio::select! {
                () = self.stop.cancelled() => return,
                // A worker is started in a separate task, so that this loop continues to tick. The state machine
                // requests only one start at a time.
                () = self.start.notified() => {
                    let start = Arc::clone(&self).start_worker();
                    self.tasks.spawn(start);
                }
                _ = ticks.tick() => {
                    self.publish_metrics();
                    self.recheck_keys();
                    self.apply(&mut self.decider(), Event::Tick);
                }
            }
        }
    }

    /// Starts one worker and adds it to the queue, unless the broker stops first.
    async fn start_worker(self: Arc<Self>) {
        let expected = self.expected.load_full();
        let started = start::worker(
            &self.program,
            &self.settings,
            &expected,
            &self.state,
            &self.stop,
        )
        .await;
        let failed = started.is_err();
        match started {
            Ok(started) => self.take_in(started, &expected),
            Err(failure) => self.note_failed_start(failure),
        }
        self.publish_metrics();
        // The token is usable with one worker, even if the next worker does not start. A token may allow fewer sessions
        // than the configuration requires.
        if failed || self.decider().machine.is_full() {
            self.settled.send_replace(true);
        }
    }

    /// Adds a worker that is ready. `expected` is the list of keys with which the worker started.
    fn take_in(self: &Arc<Self>, started: Started, expected: &Arc<Vec<ExpectedKey>>) {
        let Started {
            child,
            stream,
            pid,
            found,
        } = started;
        let generation = self.generation.fetch_add(1, Ordering::Relaxed) + 1;
        let sessions = self.settings.sessions_per_worker;
        let found = Arc::new(found);
        let link = Link::new(generation, pid, sessions, stream, Arc::clone(&found));
        if !keys::are_same(expected, &self.expected.load()) {
            link.outdate();
        }
        tracing::info!(
            token = %self.settings.name, pid, generation, label = %found.info.label, "token worker ready"
        );
        self.note_self_test();
        let assurance = self.settings.assurance_of(&link.found().info);
        self.measures.publish_assurance(assurance);
        self.admit(&link);
        self.tasks.spawn(Arc::clone(self).monitor(link, child));
    }

    fn note_failed_start(&self, failure: start::Failure) {
        let first = !*self.settled.borrow() && self.generation.load(Ordering::Relaxed) == 0;
        let (why, detail) = (failure.why(first), failure.detail);
        let is_final = matches!(
            failure.class,
            Some(FailureClass::Untrusted | FailureClass::KeyMissing | FailureClass::Configuration)
        );
        if first && is_final {
            *self
                .startup_error
                .lock()
                .unwrap_or_else(PoisonError::into_inner) = Some(StartupError {
                message: detail.clone(),
                untrusted: failure.class != Some(FailureClass::Configuration),
            });
        }
        tracing::warn!(token = %self.settings.name, cause = %detail, "a token worker did not start");
        self.apply(&mut self.decider(), Event::NotReady(why, detail));
    }

    fn decider(&self) -> MutexGuard<'_, Decider> {
        self.machine.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a ready worker to the queue.
    fn admit(&self, link: &Arc<Link>) {
        let mut decider = self.decider();
        self.queue.add(Arc::clone(link));
        self.outdate_others(&mut decider, link);
        self.apply(&mut decider, Event::Ready);
        self.publish_keys();
    }

    /// Gives no more jobs to a lost worker. If the loss of a worker has several causes, only the
    /// first cause is reported.
    fn dismiss(&self, link: &Link, loss: Loss, cause: &str) {
        let mut decider = self.decider();
        if self.queue.remove(link.generation()) {
            self.apply(&mut decider, Event::Lost(loss, cause.to_owned()));
            self.publish_keys();
        }
        if !self.queue.has_links() {
            self.queue.fail_with_alternative(&decider.down(cause));
        }
    }

    /// Passes an event to the state machine and carries out its decisions.
    fn apply(&self, decider: &mut Decider, event: Event) {
        let now = decider.epoch.elapsed();
        decider.machine.set_outdated(self.outdated());
        for action in decider.machine.on(now, event) {
            match action {
                Action::Start => self.start.notify_one(),
                Action::Serve(serving) => self.serve(decider, &serving),
                Action::Alert(alert, cause) => {
                    if let Some(line) = decider.alerts.raise(now, alert, cause) {
                        log(&self.settings.name, &line);
                    }
                }
                Action::Retire => self.retire_oldest(),
            }
        }
        for line in decider.alerts.due(now) {
            log(&self.settings.name, &line);
        }
    }

    fn serve(&self, decider: &Decider, serving: &Serving) {
        let token = &self.settings.name;
        match serving {
            Serving::Up => tracing::info!(%token, "the token serves"),
            Serving::Down(cause) => tracing::info!(%token, %cause, "the token is unavailable"),
            Serving::Untrusted(cause) => tracing::info!(%token, %cause, "the token is not trusted"),
        }
        self.serving.send_replace(serving.clone());
        if let Some(error) = decider.refusal(serving) {
            self.queue.fail_all(&error);
        }
    }

    fn down(&self, cause: &str) -> Error {
        self.decider().down(cause)
    }

    /// Queues the jobs of a lost worker again, for another worker. Repeating a job is safe, because
    /// a job changes nothing on the token. If a job was already lost with `losses_max` workers, the
    /// job fails, because it may have caused the losses. If another token can do a job, the job
    /// fails on this token, so that the other token gets the job.
    fn take_back(&self, jobs: Vec<Job>, losses_max: u32, cause: &str) {
        let decider = self.decider();
        let refusal = decider.refusal(&self.serving.borrow());
        for job in jobs {
            let is_repeated = refusal.is_none()
                && job.losses < losses_max
                && !job.has_alternative
                && !job.work.is_self_test();
            if is_repeated {
                job.span.in_scope(
                    || tracing::warn!(%cause, "a job is repeated: its token worker was lost"),
                );
                self.queue.push_again(Job {
                    losses: job.losses + 1,
                    ..job
                });
            } else {
                let error = refusal.clone().unwrap_or_else(|| decider.down(cause));
                job.answer(Err(error), Duration::ZERO);
            }
        }
    }

    fn note_self_test(&self) {
        let now = u64::try_from(Timestamp::now().micros()).unwrap_or(0);
        self.last_self_test_us.store(now, Ordering::Relaxed);
    }

    fn last_self_test(&self) -> Option<Timestamp> {
        match self.last_self_test_us.load(Ordering::Relaxed) {
            0 => None,
            micros => i64::try_from(micros).ok().map(Timestamp::from_micros),
        }
    }

    fn publish_metrics(&self) {
        let age_of = |last: Timestamp| {
            let age = Timestamp::now().micros().saturating_sub(last.micros());
            Duration::from_micros(u64::try_from(age).unwrap_or(0))
        };
        self.measures.publish(&Reading {
            workers: self.queue.links().len(),
            queue_length: self.queue.len(),
            is_serving: *self.serving.borrow() == Serving::Up,
            is_pin_latched: self.decider().machine.latched().is_some(),
            self_test_age: self.last_self_test().map(age_of),
        });
    }

    fn current_state(&self) -> TokenState {
        let found = self.found.load();
        let note = {
            let decider = self.decider();
            let latched = decider.machine.latched();
            let due = decider.machine.due();
            latched
                .map(|cause| format!("no other worker can log in: {cause}"))
                .or_else(|| due.map(|cause| format!("a worker is being replaced: {cause}")))
        };
        TokenState {
            name: self.settings.name.clone(),
            priority: self.settings.priority,
            serving: self.serving.borrow().clone(),
            note,
            info: found.known().then(|| found.info.clone()),
            assurance: found
                .known()
                .then(|| self.settings.assurance_of(&found.info)),
            keys: Arc::clone(&found.keys),
            unusable: Arc::clone(&found.unusable),
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
            last_self_test: self.last_self_test(),
            is_checking_keys: self.outdated() > 0,
            tokens: Vec::new(),
        }
    }

    /// Returns the configured name of the token.
    pub(crate) fn name(&self) -> &str {
        &self.settings.name
    }

    pub(crate) fn measures(&self) -> &Measures {
        &self.measures
    }

    pub(crate) fn queue(&self) -> &Queue {
        &self.queue
    }

    /// The keys that must be on the token.
    pub(crate) fn expected(&self) -> Arc<Vec<ExpectedKey>> {
        self.expected.load_full()
    }

    /// Returns the algorithm with which a key wraps, or `None` if a worker does not serve the key.
    pub(crate) fn algorithm(&self, key: WrappingKeyId) -> Option<Algorithm> {
        let found = self.found.load();
        found.wrap.get(&key).map(|key| key.algorithm())
    }

    /// Whether a worker found this key, and the token has the serial number with which the key was registered. A declared copy has
    /// the serial number of its original.
    pub(crate) fn is_home_of(&self, key: &ExpectedKey) -> bool {
        let found = self.found.load();
        self.settings.copy_of.is_none()
            && found.wrap.contains_key(&key.id)
            && found.info.serial == unpadded(&key.token_serial)
    }

    /// Returns the keys that a worker serves.
    pub(crate) fn keys(&self) -> Vec<WrappingKeyId> {
        let found = self.found.load();
        found.keys.iter().map(|key| key.id).collect()
    }

    /// Returns a key with the properties that the workers read from the token.
    pub(crate) fn token_key(&self, key: WrappingKeyId) -> Option<TokenKey> {
        let found = self.found.load();
        found.keys.iter().find(|one| one.id == key).cloned()
    }

    /// Whether a worker is ready or expected soon.
    pub(crate) fn is_serving(&self) -> bool {
        *self.serving.borrow() == Serving::Up
    }
}

fn log(token: &str, line: &Line) {
    let (cause, count) = (&line.cause, line.count);
    keybroker_core::alert!(raise line.alert, %token, %cause, count, "{}", line.alert.meaning());
}
