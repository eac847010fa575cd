//! Several faults of the token at once, chosen by a seed, while callers release and enrol keys. Whatever the token does, no caller
//! receives a wrong key or that of another user, no acknowledged key is lost, no call stays without an answer, and the broker serves
//! again once the faults end.
//!
//! `KEYBROKER_TEST_SCHEDULES` is the number of schedules. Each has a seed, which a failure prints: `KEYBROKER_TEST_SCHEDULE_SEED=N` with one
//! schedule repeats it. `KEYBROKER_TEST_SCHEDULE_BROKERS` brokers, each with a token and a database of its own, run schedules at the same
//! time. `KEYBROKER_TEST_SCHEDULE_FILE` is a file for the results. `KEYBROKER_TEST_LATENESS_MS` is how late after its deadline an answer may come. The default allows for a busy machine;
//! 100 is what an idle one must keep to.

use std::{
    collections::BTreeMap,
    env, fs,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

mod plan;

use keybroker_proto::{CreateUserKeyRequest, UnwrapUserKeyRequest};
pub(crate) use plan::Random;
use plan::{Event, Schedule};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;
use tokio::{
    task::JoinSet,
    time::{sleep, timeout},
};
use tonic::Status;
use uuid::Uuid;

use crate::{
    client::{Caller, NAME, eventually, reason},
    faulty::Faulty,
    faulty_token::site,
    process::Broker,
    site::Options,
    soak::machine,
};

const SCHEDULES: u64 = 5;
const LATENESS_MS: u64 = 3_000;
/// The results contain the number of answers that were later than this. On a busy machine, the callers alone can be later.
const LATENESS_GOAL: Duration = Duration::from_millis(100);
/// The deadline of each call, set by the broker: the clients would wait longer.
const DEADLINE: Duration = Duration::from_secs(1);
/// A call without an answer after this time has none.
const ANSWER_MAX: Duration = Duration::from_secs(30);
/// How long callers call while the faults of a schedule last.
const LASTS: Duration = Duration::from_millis(700);
const RELEASERS: usize = 3;
/// How long a caller waits between two calls. With shorter pauses, the callers use most of the processor time, so that few schedules
/// can run at the same time. Every fault of a schedule concerns one of the next eight calls of a function.
const PAUSE: Duration = Duration::from_millis(50);
const USERS: u64 = 8;

/// Reasons with which a call may be refused meanwhile.
const REASONS: [&str; 4] = ["TOKEN_DOWN", "TOKEN_UNTRUSTED", "QUEUE_FULL", "DEADLINE"];

/// What the callers have seen in all schedules.
#[derive(Default)]
struct Seen {
    answers: AtomicU64,
    refusals: Mutex<BTreeMap<String, u64>>,
    latest: Mutex<Duration>,
    /// Answers that came later after their deadline than the goal permits.
    late: AtomicU64,
    /// How often the file of a token was restored from its copy.
    restored: AtomicU64,
}

/// What the environment asks for.
#[derive(Clone, Copy, Debug)]
struct Plan {
    first: u64,
    schedules: u64,
    brokers: u64,
    lateness: Duration,
}

/// Everything that lasts longer than a schedule.
struct World {
    broker: Broker,
    faulty: Faulty,
    releaser: Caller,
    enroller: Caller,
    seen: Arc<Seen>,
    /// Number of keys that were sent for enrolment.
    enrolled: Arc<AtomicU64>,
}

fn material(user: &str) -> Vec<u8> {
    format!("the only key of the user {user}").into_bytes()
}

/// A call without a deadline of its own, and how late its answer came.
async fn answered<T>(
    seen: &Seen,
    call: impl Future<Output = Result<T, Status>>,
) -> Result<T, String> {
    let begun = Instant::now();
    let answer = timeout(ANSWER_MAX, call)
        .await
        .expect("a call has an answer");
    let late = begun.elapsed().saturating_sub(DEADLINE);
    if late > LATENESS_GOAL {
        seen.late.fetch_add(1, Ordering::Relaxed);
    }
    let mut latest = seen.latest.lock().unwrap();
    *latest = late.max(*latest);
    seen.answers.fetch_add(1, Ordering::Relaxed);
    answer.map_err(|status| reason(&status))
}

async fn release(caller: &Caller, user: &str, seen: &Seen) -> Result<(), String> {
    let request = UnwrapUserKeyRequest {
        user: user.to_owned(),
        key_name: NAME.to_owned(),
        recipient: None,
    };
    let mut keys = caller.keys.clone();
    let key = answered(seen, keys.unwrap_user_key(request)).await?;
    assert_eq!(
        key.into_inner().key_material,
        material(user),
        "the key of {user}"
    );
    Ok(())
}

async fn enrol(caller: &Caller, user: &str, seen: &Seen) -> Result<(), String> {
    let request = CreateUserKeyRequest {
        user: user.to_owned(),
        key_name: NAME.to_owned(),
        key_material: material(user),
        request_id: String::new(),
    };
    let mut keys = caller.keys.clone();
    answered(seen, keys.create_user_key(request)).await?;
    Ok(())
}

/// The content of the files of a token, as an administrator backs them up.
struct Backup(Vec<(PathBuf, Vec<u8>)>);

impl Backup {
    fn of(tokens: &Path) -> Self {
        let folders = fs::read_dir(tokens).unwrap();
        let files = folders.flat_map(|folder| fs::read_dir(folder.unwrap().path()).unwrap());
        let files = files.map(|file| file.unwrap().path());
        Self(
            files
                .map(|file| (file.clone(), fs::read(&file).unwrap()))
                .collect(),
        )
    }

    /// SoftHSM rewrites the file of the token at each login. A process that is killed at this moment can leave an empty file.
    fn restore_emptied(&self, seen: &Seen) {
        for (file, content) in &self.0 {
            let is_emptied =
                !content.is_empty() && fs::metadata(file).is_ok_and(|now| now.len() == 0);
            if is_emptied {
                eprintln!(
                    "restoring {}, which a killed worker left empty",
                    file.display()
                );
                fs::write(file, content).unwrap();
                seen.restored.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}

impl World {
    async fn start(seen: Arc<Seen>) -> Self {
        let (site, faulty) = site(Options {
            workers: 2,
            limits: format!("call_timeout_max_ms = {}", DEADLINE.as_millis()),
            ..Options::default()
        });
        let broker = Broker::start_on(site);
        let world = Self {
            releaser: Caller::of(&broker, "releaser"),
            enroller: Caller::of(&broker, "enroller"),
            broker,
            faulty,
            seen,
            enrolled: Arc::default(),
        };
        for user in (0..USERS).map(|user| format!("u{user}")) {
            // The deadline may pass on a busy machine: with the request id a key that was stored is no conflict.
            let id = Uuid::new_v4().to_string();
            let key = material(&user);
            eventually(|| world.enroller.create_with_id(&user, &key, &id)).await;
        }
        world
    }

    /// Calls until `stop`; returns the users whose enrolment was acknowledged.
    fn call(&self, stop: &Arc<AtomicBool>) -> Vec<tokio::task::JoinHandle<Vec<String>>> {
        let refused = |seen: &Seen, reason: String| {
            assert!(REASONS.contains(&reason.as_str()), "refused with {reason}");
            *seen.refusals.lock().unwrap().entry(reason).or_default() += 1;
        };
        let mut callers: Vec<_> = (0..RELEASERS)
            .map(|number| {
                let (caller, seen) = (self.releaser.clone(), Arc::clone(&self.seen));
                let stop = Arc::clone(stop);
                tokio::spawn(async move {
                    let mut turn = u64::try_from(number).unwrap();
                    while !stop.load(Ordering::Relaxed) {
                        turn += 1;
                        if let Err(reason) =
                            release(&caller, &format!("u{}", turn % USERS), &seen).await
                        {
                            refused(&seen, reason);
                        }
                        sleep(PAUSE).await;
                    }
                    Vec::new()
                })
            })
            .collect();
        let (caller, seen) = (self.enroller.clone(), Arc::clone(&self.seen));
        let (stop, enrolled) = (Arc::clone(stop), Arc::clone(&self.enrolled));
        callers.push(tokio::spawn(async move {
            let mut acknowledged = Vec::new();
            while !stop.load(Ordering::Relaxed) {
                let user = format!("new{}", enrolled.fetch_add(1, Ordering::Relaxed));
                match enrol(&caller, &user, &seen).await {
                    Ok(()) => acknowledged.push(user),
                    Err(reason) => refused(&seen, reason),
                }
                sleep(PAUSE).await;
            }
            acknowledged
        }));
        callers
    }

    /// One schedule, and the return to service after it.
    async fn run(&self, schedule: &Schedule) {
        let stop = Arc::new(AtomicBool::new(false));
        let backup = Backup::of(&self.broker.site.token.directory());
        let callers = self.call(&stop);
        let begun = Instant::now();
        let mut functions = Vec::new();
        for (at, event) in &schedule.events {
            sleep(Duration::from_millis(*at).saturating_sub(begun.elapsed())).await;
            match event {
                Event::Function(function, fault) => {
                    self.faulty.set(function, fault);
                    functions.push(*function);
                }
                Event::Action(function, action) => self.faulty.behave(&format!(
                    "[[rule]]\nname = \"seed {}, after {at} ms\"\nfunction = \"{function}\"\non = {{ call = 1 }}\ndo = {{ {action} = true }}\n",
                    schedule.seed
                )),
                Event::Absent(milliseconds) => {
                    self.faulty.behave("[token]\nabsent = true\n");
                    sleep(Duration::from_millis(*milliseconds)).await;
                    self.faulty.behave("");
                }
                Event::Kill => {
                    if let Some(worker) = self.broker.workers().first() {
                        let pid = Pid::from_raw(i32::try_from(*worker).unwrap()).unwrap();
                        // Another fault may have ended it a moment ago.
                        let _ended = kill_process(pid, Signal::KILL);
                    }
                }
            }
        }
        sleep(LASTS.saturating_sub(begun.elapsed())).await;
        stop.store(true, Ordering::Relaxed);
        let mut acknowledged = Vec::new();
        for caller in callers {
            acknowledged.extend(caller.await.unwrap());
        }
        self.faulty.behave("");
        functions.sort_unstable();
        functions.dedup();
        for function in functions {
            self.faulty.clear(function);
        }
        backup.restore_emptied(&self.seen);
        for user in (0..USERS)
            .map(|user| format!("u{user}"))
            .chain(acknowledged)
        {
            let key = eventually(|| self.releaser.unwrap(&user)).await;
            assert_eq!(key.key_material, material(&user), "the key of {user}");
        }
    }
}

pub(crate) fn number(variable: &str) -> Option<u64> {
    let text = env::var(variable).ok()?;
    Some(text.parse().unwrap())
}

/// The seed that a variable selects. CI always has the same one, so that a change and not chance makes a run fail there.
pub(crate) fn seed(variable: &str) -> u64 {
    let is_ci = env::var("CI").is_ok_and(|value| value == "true");
    let chosen = number(variable).or(is_ci.then_some(1));
    chosen.unwrap_or_else(|| {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        now.as_secs() * 1_000_000
    })
}

impl Plan {
    fn from_environment() -> Self {
        Self {
            first: seed("KEYBROKER_TEST_SCHEDULE_SEED"),
            schedules: number("KEYBROKER_TEST_SCHEDULES").unwrap_or(SCHEDULES),
            brokers: number("KEYBROKER_TEST_SCHEDULE_BROKERS").unwrap_or(1),
            lateness: Duration::from_millis(
                number("KEYBROKER_TEST_LATENESS_MS").unwrap_or(LATENESS_MS),
            ),
        }
    }

    /// Runs schedules on a new broker until no seed is left. Returns the broker: at its end, the test searches its log for a long time, and
    /// callers of another broker would wait meanwhile.
    async fn run_on_a_broker(self, next: Arc<AtomicU64>, seen: Arc<Seen>) -> World {
        let mut world = World::start(seen).await;
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= self.first + self.schedules {
                return world;
            }
            let schedule = Schedule::of(seed);
            // Shown only when the test fails, with what the broker logged.
            eprintln!("{schedule:?}");
            world.run(&schedule).await;
            let latest = *world.seen.latest.lock().unwrap();
            assert!(
                latest <= self.lateness,
                "an answer {latest:?} after its deadline, at the latest in {schedule:?}"
            );
            assert!(
                world.broker.is_running(),
                "the front is the same process after {schedule:?}"
            );
        }
    }

    /// Writes the results to the file that the environment names.
    fn publish(self, seen: &Seen, lasted: Duration) {
        let Ok(file) = env::var("KEYBROKER_TEST_SCHEDULE_FILE") else {
            return;
        };
        let results = json!({
            "scenario": "schedules of faults",
            "commit": env::var("KEYBROKER_TEST_COMMIT").ok(),
            "machine": machine(),
            "first_seed": self.first,
            "schedules": self.schedules,
            "brokers": self.brokers,
            "seconds": lasted.as_secs(),
            "answers": seen.answers.load(Ordering::Relaxed),
            "refused": *seen.refusals.lock().unwrap(),
            "answers_over_100_ms_late": seen.late.load(Ordering::Relaxed),
            "latest_after_deadline_ms": seen.latest.lock().unwrap().as_secs_f64() * 1_000.0,
            "lateness_permitted_ms": self.lateness.as_secs_f64() * 1_000.0,
            "token_files_restored": seen.restored.load(Ordering::Relaxed),
        });
        fs::write(file, serde_json::to_string_pretty(&results).unwrap() + "\n").unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_schedule_of_faults_gives_a_wrong_key_or_a_call_without_an_answer() {
    let plan = Plan::from_environment();
    eprintln!("{plan:?}");
    let (begun, seen) = (Instant::now(), Arc::new(Seen::default()));
    let next = Arc::new(AtomicU64::new(plan.first));
    let mut brokers = JoinSet::new();
    for _ in 0..plan.brokers {
        brokers.spawn(plan.run_on_a_broker(Arc::clone(&next), Arc::clone(&seen)));
    }
    // A failed assertion ends the whole test at once, not only its broker.
    let mut worlds = Vec::new();
    while let Some(ended) = brokers.join_next().await {
        worlds.push(ended.unwrap());
    }
    plan.publish(&seen, begun.elapsed());
    eprintln!(
        "{} schedules, {} answers, the latest {:?} after its deadline; refused: {:?}",
        plan.schedules,
        seen.answers.load(Ordering::Relaxed),
        seen.latest.lock().unwrap(),
        seen.refusals.lock().unwrap()
    );
}
