//! Several faults of the token at once, chosen by a seed, while callers release and enrol keys. Whatever the token does, no caller
//! receives a wrong key or that of another user, no acknowledged key is lost, no call stays without an answer, and the broker serves
//! again once the faults end.
//!
//! `KEYBROKER_TEST_SCHEDULES` is the number of schedules. Each has a seed, which a failure prints: `KEYBROKER_TEST_SCHEDULE_SEED=N` with one
//! schedule repeats it. `KEYBROKER_TEST_LATENESS_MS` is how late after its deadline an answer may come. The default allows for a busy machine;
//! 100 is what an idle one must keep to.

use std::{
    collections::BTreeMap,
    env, fmt, fs,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use keybroker_proto::{CreateUserKeyRequest, UnwrapUserKeyRequest};
use rustix::process::{Pid, Signal, kill_process};
use tokio::time::{sleep, timeout};
use tonic::Status;
use uuid::Uuid;

use crate::{
    client::{Caller, NAME, eventually, reason},
    faulty::{Fault, Faulty, code},
    faulty_token::site,
    process::Broker,
    site::Options,
};

const SCHEDULES: u64 = 5;
const LATENESS_MS: u64 = 3_000;
/// The deadline of each call, set by the broker: the clients would wait longer.
const DEADLINE: Duration = Duration::from_secs(1);
/// A call without an answer after this time has none.
const ANSWER_MAX: Duration = Duration::from_secs(30);
/// How long callers call while the faults of a schedule last.
const LASTS: Duration = Duration::from_millis(700);
const RELEASERS: usize = 3;
const USERS: u64 = 8;

/// Functions that a release, a change or a new session calls.
const FUNCTIONS: [&str; 10] = [
    "C_VerifyInit",
    "C_Verify",
    "C_DecryptInit",
    "C_Decrypt",
    "C_SignInit",
    "C_Sign",
    "C_OpenSession",
    "C_FindObjectsInit",
    "C_FindObjects",
    "C_Login",
];
/// None of them says that the PIN or a MAC is wrong: those are not faults, and the broker believes them.
const CODES: [i64; 12] = [
    code::HOST_MEMORY,
    code::GENERAL_ERROR,
    code::FUNCTION_FAILED,
    code::DEVICE_ERROR,
    code::DEVICE_MEMORY,
    code::DEVICE_REMOVED,
    code::FUNCTION_CANCELED,
    code::SESSION_CLOSED,
    code::SESSION_COUNT,
    code::SESSION_HANDLE_INVALID,
    code::TOKEN_NOT_PRESENT,
    code::VENDOR_DEFINED,
];
/// Reasons with which a call may be refused meanwhile.
const REASONS: [&str; 4] = ["TOKEN_DOWN", "TOKEN_UNTRUSTED", "QUEUE_FULL", "DEADLINE"];

/// The generator `SplitMix64` (Steele, Lea and Flood, 2014): the schedule of a seed is the same in every release.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    pub(crate) fn one_of<T: Copy>(&mut self, values: &[T]) -> T {
        let at = self.below(u64::try_from(values.len()).unwrap());
        values[usize::try_from(at).unwrap()]
    }

    fn number(&mut self, limit: u64) -> u32 {
        u32::try_from(self.below(limit)).unwrap()
    }
}

/// What happens at one moment of a schedule.
#[derive(Clone, Debug)]
enum Event {
    /// Calls of one function fail, are late, or crash their process.
    Function(&'static str, Fault),
    /// Every session is closed, the login ends or the handles change, at the next call of a function.
    Action(&'static str, &'static str),
    /// The token is not there for so many milliseconds.
    Absent(u64),
    /// One worker is killed.
    Kill,
}

/// The events of a seed, each with its moment in milliseconds.
struct Schedule {
    seed: u64,
    events: Vec<(u64, Event)>,
}

impl fmt::Debug for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "KEYBROKER_TEST_SCHEDULE_SEED={} KEYBROKER_TEST_SCHEDULES=1",
            self.seed
        )?;
        for (at, event) in &self.events {
            writeln!(f, "  after {at} ms: {event:?}")?;
        }
        Ok(())
    }
}

impl Schedule {
    fn of(seed: u64) -> Self {
        let mut random = Random(seed);
        let count = 2 + random.below(4);
        let mut events: Vec<(u64, Event)> = (0..count)
            .map(|_| (random.below(500), Self::event(&mut random)))
            .collect();
        events.sort_by_key(|(at, _)| *at);
        Self { seed, events }
    }

    fn event(random: &mut Random) -> Event {
        let function = random.one_of(&FUNCTIONS);
        let fault = |code, random: &mut Random| Fault {
            skip: random.number(4),
            times: Some(1 + random.number(4)),
            ..Fault::always(code)
        };
        match random.below(12) {
            0..=3 => {
                let code = random.one_of(&CODES);
                Event::Function(function, fault(code, random))
            }
            // The function did its work, and says that it failed.
            4 => {
                let code = code::after(random.one_of(&CODES));
                Event::Function(function, fault(code, random))
            }
            5 | 6 => {
                let milliseconds = 20 + random.number(2_000);
                let late = fault(code::LATE, random);
                Event::Function(
                    function,
                    Fault {
                        milliseconds,
                        ..late
                    },
                )
            }
            7 => Event::Function(
                function,
                Fault {
                    times: Some(1),
                    ..fault(code::CRASH, random)
                },
            ),
            8 | 9 => {
                let action = random.one_of(&["close_sessions", "logout", "new_handles"]);
                Event::Action(function, action)
            }
            10 => Event::Absent(50 + random.below(500)),
            _ => Event::Kill,
        }
    }
}

/// What the callers have seen in all schedules.
#[derive(Default)]
struct Seen {
    answers: AtomicU64,
    refusals: Mutex<BTreeMap<String, u64>>,
    latest: Mutex<Duration>,
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
    fn restore_emptied(&self) {
        for (file, content) in &self.0 {
            let is_emptied =
                !content.is_empty() && fs::metadata(file).is_ok_and(|now| now.len() == 0);
            if is_emptied {
                eprintln!(
                    "restoring {}, which a killed worker left empty",
                    file.display()
                );
                fs::write(file, content).unwrap();
            }
        }
    }
}

impl World {
    async fn start() -> Self {
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
            seen: Arc::default(),
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
                sleep(Duration::from_millis(20)).await;
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
        backup.restore_emptied();
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

#[tokio::test(flavor = "multi_thread")]
async fn no_schedule_of_faults_gives_a_wrong_key_or_a_call_without_an_answer() {
    let count = number("KEYBROKER_TEST_SCHEDULES").unwrap_or(SCHEDULES);
    let first = seed("KEYBROKER_TEST_SCHEDULE_SEED");
    let lateness = number("KEYBROKER_TEST_LATENESS_MS").unwrap_or(LATENESS_MS);
    println!("the seed of the first schedule is {first}");
    let mut world = World::start().await;
    for seed in first..first + count {
        let schedule = Schedule::of(seed);
        // Shown only when the test fails, with what the broker logged.
        println!("{schedule:?}");
        world.run(&schedule).await;
        let latest = *world.seen.latest.lock().unwrap();
        assert!(
            latest <= Duration::from_millis(lateness),
            "an answer {latest:?} after its deadline"
        );
        assert!(world.broker.is_running(), "the front is the same process");
    }
    let seen = &world.seen;
    let refusals = seen.refusals.lock().unwrap();
    println!(
        "{count} schedules, {} answers, the latest {:?} after its deadline; refused: {refusals:?}",
        seen.answers.load(Ordering::Relaxed),
        seen.latest.lock().unwrap()
    );
}

/// A seed repeats its schedule, and another one has another.
#[test]
fn a_schedule_is_repeated_by_its_seed() {
    let text = |seed| format!("{:?}", Schedule::of(seed).events);
    assert_eq!(text(7), text(7));
    assert_ne!(text(7), text(8));
    let many: Vec<String> = (0..200).map(text).collect();
    for part in [
        "Kill",
        "Absent",
        "logout",
        "new_handles",
        "close_sessions",
        "C_Login",
        "C_FindObjects",
    ] {
        assert!(
            many.iter().any(|schedule| schedule.contains(part)),
            "{part}"
        );
    }
}
