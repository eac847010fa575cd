//! A broker on PostgreSQL under load for hours, with one fault after another: killed workers, an absent token, return codes, lost
//! sessions, a hanging call, a restarted and a frozen database, new certificates, changed policies, a full disk, a rotation with a re-wrap
//! that goes on during the next faults. Memory, descriptors, threads and connections are recorded before each fault.
//!
//! `scripts/soak.sh HOURS` runs it with the release build. `KEYBROKER_TEST_SOAK_SECONDS` is the duration of the load,
//! `KEYBROKER_TEST_SOAK_EVERY_SECONDS` the time from one fault to the next, `KEYBROKER_TEST_SOAK_SEED` selects their order, and
//! `KEYBROKER_TEST_SOAK_FILE` receives the results as JSON. `KEYBROKER_TEST_SOAK_NOTE` is a remark about the conditions of the
//! run, which the results contain.

use std::{
    collections::BTreeMap,
    env, fmt, fs,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use hdrhistogram::Histogram;
use keybroker_proto::{
    CreateUserKeyRequest, GetRewrapRequest, Rewrap, RewrapState, RotateWrappingKeyRequest,
    StartRewrapRequest,
};
use rustix::process::Signal;
use serde_json::{Value, json};
use tokio::{
    task::{JoinSet, block_in_place},
    time::sleep,
};
use tonic::{Request, Status};

use crate::{
    bad_inputs::{limit_files, unlimit_files},
    client::{CALL_TIMEOUT, Caller, NAME, eventually, never_in_a_log, reason, retrying},
    databases::unique,
    faulty::{Fault, Faulty, code},
    faulty_token::name_module,
    process::{Broker, send, until},
    schedules::{Random, number, seed},
    servers::{Kind, Server, section},
    site::{Options, Site, policy_section},
    softhsm,
};

const SECONDS: u64 = 24;
const EVERY_SECONDS: u64 = 2;
/// A run of this length must also show that nothing grows.
const LONG: Duration = Duration::from_hours(1);
const RELEASERS: usize = 4;
const USERS: u64 = 50;
/// Pause of a releaser after each call, and of the enroller.
const BETWEEN_RELEASES: Duration = Duration::from_millis(20);
const BETWEEN_CHANGES: Duration = Duration::from_millis(200);
/// Highest number of rows that a re-wrap moves per second: it goes on during several faults of a long run.
const REWRAP_ROWS_PER_SECOND: u32 = 100;
/// A re-wrap of all rows of a long run takes minutes.
const REWRAP_DONE_WITHIN: Duration = Duration::from_mins(20);
/// Part of the calls that must succeed, if each call follows the retry rule.
const SUCCESS_MIN: f64 = 0.999;
/// Largest growth from the first quarter of a long run to the last.
const MEMORY_GROWTH_MAX: f64 = 1.05;
/// Threads that the last quarter of a long run may have in addition, because the runtime and the allocator start some only when they
/// need them. A fault that leaves a thread behind occurs more often than this.
const MORE_THREADS: f64 = 3.0;
const GROWTH_MAX: f64 = 1.1;
/// Open descriptors that a calm broker may have in addition to those at the beginning: connections to the database.
const MORE_DESCRIPTORS: u64 = 40;

/// What is done to the broker or to what it depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trouble {
    WorkerKilled,
    WorkersKilled,
    TokenAbsent,
    ReturnCode,
    SessionsClosed,
    HandlesChanged,
    CallHangs,
    DatabaseRestarted,
    DatabaseFrozen,
    CertificateRotated,
    PoliciesChanged,
    DiskFull,
    KeyRotated,
}

const TROUBLES: [Trouble; 13] = [
    Trouble::WorkerKilled,
    Trouble::WorkersKilled,
    Trouble::TokenAbsent,
    Trouble::ReturnCode,
    Trouble::SessionsClosed,
    Trouble::HandlesChanged,
    Trouble::CallHangs,
    Trouble::DatabaseRestarted,
    Trouble::DatabaseFrozen,
    Trouble::CertificateRotated,
    Trouble::PoliciesChanged,
    Trouble::DiskFull,
    Trouble::KeyRotated,
];

const CODES: [i64; 6] = [
    code::GENERAL_ERROR,
    code::FUNCTION_FAILED,
    code::DEVICE_ERROR,
    code::DEVICE_MEMORY,
    code::SESSION_HANDLE_INVALID,
    code::VENDOR_DEFINED,
];

/// The policies that are loaded in turn. Both permit the same.
const POLICIES: [&str; 2] = [
    "@id(\"only-from-here\") forbid (principal, action, resource) unless { context.peer.isLoopback() };\n",
    "@id(\"only-from-this-machine\") forbid (principal, action, resource) unless { context.peer.isLoopback() };\n",
];
const POLICY_FILE: &str = "soak.cedar";

/// The calls since the last sample.
struct Period {
    latency_us: Histogram<u64>,
    calls: u64,
}

impl Default for Period {
    fn default() -> Self {
        Self {
            latency_us: Histogram::new_with_bounds(1, 600_000_000, 3).unwrap(),
            calls: 0,
        }
    }
}

/// What the callers have seen.
#[derive(Default)]
struct Seen {
    calls: AtomicU64,
    attempts: AtomicU64,
    /// The reasons of calls that failed although they were repeated.
    failures: Mutex<BTreeMap<String, u64>>,
    /// The reasons of refused attempts.
    refusals: Mutex<BTreeMap<String, u64>>,
    period: Mutex<Period>,
    acknowledged: Mutex<Vec<String>>,
}

impl Seen {
    /// Makes one call by the retry rule, and records it.
    async fn call<T, F: Future<Output = Result<T, Status>>>(
        &self,
        mut attempt: impl FnMut() -> F,
    ) -> Option<T> {
        let begun = Instant::now();
        let result = retrying(|| {
            let answer = attempt();
            async {
                self.attempts.fetch_add(1, Ordering::Relaxed);
                let answer = answer.await;
                if let Err(status) = &answer {
                    count(&self.refusals, reason(status));
                }
                answer
            }
        })
        .await;
        self.calls.fetch_add(1, Ordering::Relaxed);
        let micros = u64::try_from(begun.elapsed().as_micros()).unwrap();
        let mut period = self.period.lock().unwrap();
        period.calls += 1;
        period.latency_us.saturating_record(micros);
        drop(period);
        match result {
            Ok(answer) => Some(answer),
            Err(status) => {
                count(&self.failures, reason(&status));
                None
            }
        }
    }

    fn failed(&self) -> u64 {
        self.failures.lock().unwrap().values().sum()
    }
}

fn count(counts: &Mutex<BTreeMap<String, u64>>, name: String) {
    *counts.lock().unwrap().entry(name).or_default() += 1;
}

/// The beginning of all keys, which no log may contain. A search for thousands of different keys would take hours.
const SECRET: &str = "the only key of the user";

fn material(user: &str) -> Vec<u8> {
    format!("{SECRET} {user}").into_bytes()
}

async fn enrol(caller: &Caller, user: &str, request_id: &str) -> Result<(), Status> {
    let mut request = Request::new(CreateUserKeyRequest {
        user: user.to_owned(),
        key_name: NAME.to_owned(),
        key_material: material(user),
        request_id: request_id.to_owned(),
    });
    request.set_timeout(CALL_TIMEOUT);
    caller.keys.clone().create_user_key(request).await?;
    Ok(())
}

/// One row of the results: the broker while nothing is done to it.
#[derive(Clone, Debug)]
struct Sample {
    at: Duration,
    calls: u64,
    p50_ms: f64,
    p99_ms: f64,
    max_ms: f64,
    front: Process,
    workers: Vec<Process>,
    connections: u64,
}

/// What one process holds.
#[derive(Clone, Debug)]
struct Process {
    resident_kib: u64,
    descriptors: u64,
    /// The number of threads with each name.
    threads: BTreeMap<String, u64>,
}

impl Process {
    /// `None` if the process has ended.
    fn of(pid: u32) -> Option<Self> {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let number = |name: &str| -> Option<u64> {
            let line = status.lines().find_map(|line| line.strip_prefix(name))?;
            line.split_whitespace().next()?.parse().ok()
        };
        let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).ok()?.count();
        Some(Self {
            resident_kib: number("VmRSS:")?,
            descriptors: u64::try_from(descriptors).ok()?,
            threads: threads(pid)?,
        })
    }

    fn thread_count(&self) -> u64 {
        self.threads.values().sum()
    }

    fn json(&self) -> Value {
        json!({
            "resident_kib": self.resident_kib,
            "descriptors": self.descriptors,
            "threads": self.thread_count(),
            "threads_by_name": self.threads,
        })
    }
}

/// The number of threads of a process with each name. `None` if the process has ended.
fn threads(pid: u32) -> Option<BTreeMap<String, u64>> {
    let mut found = BTreeMap::new();
    for thread in fs::read_dir(format!("/proc/{pid}/task")).ok()?.flatten() {
        // A thread that ends meanwhile has no name.
        if let Ok(name) = fs::read_to_string(thread.path().join("comm")) {
            *found.entry(name.trim().to_owned()).or_default() += 1;
        }
    }
    Some(found)
}

impl Sample {
    fn json(&self) -> Value {
        let workers: Vec<Value> = self.workers.iter().map(Process::json).collect();
        json!({
            "at_s": self.at.as_secs_f64(),
            "calls": self.calls,
            "p50_ms": self.p50_ms,
            "p99_ms": self.p99_ms,
            "max_ms": self.max_ms,
            "front": self.front.json(),
            "workers": workers,
            "database_connections": self.connections,
        })
    }
}

/// The broker, its token, its database, and its callers.
struct World {
    broker: Broker,
    faulty: Faulty,
    server: Server,
    database: String,
    releaser: Caller,
    enroller: Caller,
    admin: Caller,
    seen: Arc<Seen>,
    begun: Instant,
    policy_version: usize,
}

impl World {
    async fn start() -> Self {
        never_in_a_log(SECRET.as_bytes());
        let server = Server::start(Kind::PostgreSql);
        let database = server.database();
        let site = Site::fresh(Options {
            workers: 2,
            store: Some(section(&server.settings(&database))),
            ..Options::default()
        });
        let policies = site.policy_directory();
        fs::write(policies.join(POLICY_FILE), POLICIES[0]).unwrap();
        let faulty = Faulty::in_folder(site.folder().join("faulty"), &softhsm::module());
        site.write_configuration(|text| {
            text.push_str(&policy_section(&policies));
            name_module(text, &faulty);
        });
        let broker = Broker::start_limited(Arc::new(site));
        let world = Self {
            releaser: Caller::of(&broker, "releaser"),
            enroller: Caller::of(&broker, "enroller"),
            admin: Caller::of(&broker, "admin"),
            broker,
            faulty,
            server,
            database,
            seen: Arc::default(),
            begun: Instant::now(),
            policy_version: 0,
        };
        for number in 0..USERS {
            let user = format!("u{number}");
            let id = unique();
            eventually(|| enrol(&world.enroller, &user, &id)).await;
        }
        // From now on, each rotation returns to the other one of two keys.
        world
            .rotate(RotateWrappingKeyRequest {
                modulus_bits: 2_048,
                without_backup: true,
                ..Default::default()
            })
            .await;
        world
    }

    /// Starts the callers, which call until `stop`.
    fn load(&self, stop: &Arc<AtomicBool>) -> JoinSet<()> {
        let mut load = JoinSet::new();
        for number in 0..RELEASERS {
            let (caller, seen) = (self.releaser.clone(), Arc::clone(&self.seen));
            let stop = Arc::clone(stop);
            let mut turn = u64::try_from(number).unwrap();
            load.spawn(async move {
                while !stop.load(Ordering::Relaxed) {
                    turn += 1;
                    let user = format!("u{}", turn % USERS);
                    if let Some(key) = seen.call(|| caller.unwrap(&user)).await {
                        assert_eq!(key.key_material, material(&user), "the key of {user}");
                    }
                    sleep(BETWEEN_RELEASES).await;
                }
            });
        }
        let (caller, seen) = (self.enroller.clone(), Arc::clone(&self.seen));
        let stop = Arc::clone(stop);
        load.spawn(async move {
            let mut number = 0_u64;
            while !stop.load(Ordering::Relaxed) {
                number += 1;
                let (user, id) = (format!("new{number}"), unique());
                let made = seen.call(|| enrol(&caller, &user, &id)).await;
                if made.is_some() {
                    seen.acknowledged.lock().unwrap().push(user);
                }
                sleep(BETWEEN_CHANGES).await;
            }
        });
        load
    }

    /// Records the broker, and the calls since the last sample.
    fn sample(&self) -> Sample {
        let period = std::mem::take(&mut *self.seen.period.lock().unwrap());
        let ms = |micros: u64| Duration::from_micros(micros).as_secs_f64() * 1_000.0;
        let query = format!(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = '{}' AND pid <> pg_backend_pid();",
            self.database
        );
        let connections = block_in_place(|| self.server.sql(&self.database, &query));
        Sample {
            at: self.begun.elapsed(),
            calls: period.calls,
            p50_ms: ms(period.latency_us.value_at_quantile(0.5)),
            p99_ms: ms(period.latency_us.value_at_quantile(0.99)),
            max_ms: ms(period.latency_us.max()),
            front: Process::of(self.broker.pid()).expect("the front runs"),
            workers: self
                .broker
                .workers()
                .into_iter()
                .filter_map(Process::of)
                .collect(),
            connections: connections.trim().parse().unwrap(),
        }
    }

    /// Does one thing to the broker, and undoes it. Returns the time from then until a call of each kind succeeds.
    async fn cause(&mut self, trouble: Trouble, random: &mut Random) -> Duration {
        self.make(trouble, random).await;
        let ended = Instant::now();
        let (user, id) = (unique(), unique());
        eventually(|| self.releaser.unwrap("u0")).await;
        eventually(|| enrol(&self.enroller, &user, &id)).await;
        self.seen.acknowledged.lock().unwrap().push(user);
        ended.elapsed()
    }

    async fn make(&mut self, trouble: Trouble, random: &mut Random) {
        match trouble {
            Trouble::WorkerKilled => self.kill_workers(1),
            Trouble::WorkersKilled => self.kill_workers(usize::MAX),
            Trouble::TokenAbsent => {
                self.faulty.behave("[token]\nabsent = true\n");
                sleep(Duration::from_secs(1)).await;
                self.faulty.behave("");
            }
            Trouble::ReturnCode => {
                let function = random.one_of(&["C_Decrypt", "C_Verify", "C_Sign", "C_OpenSession"]);
                self.faulty
                    .set(function, &Fault::always(random.one_of(&CODES)));
                sleep(Duration::from_millis(500)).await;
                self.faulty.clear(function);
            }
            Trouble::SessionsClosed => self.act_once("close_sessions"),
            Trouble::HandlesChanged => self.act_once("new_handles"),
            Trouble::CallHangs => {
                let late = Fault {
                    milliseconds: 20_000,
                    ..Fault::times(code::LATE, 1)
                };
                self.faulty.set("C_Decrypt", &late);
                sleep(Duration::from_millis(500)).await;
                self.faulty.clear("C_Decrypt");
            }
            Trouble::DatabaseRestarted => block_in_place(|| {
                self.server.stop();
                self.server.run();
            }),
            Trouble::DatabaseFrozen => {
                self.server.signal_all(Signal::STOP);
                sleep(Duration::from_secs(1)).await;
                self.server.signal_all(Signal::CONT);
            }
            Trouble::CertificateRotated => {
                let site = Arc::clone(&self.broker.site);
                self.reload("TLS files reloaded", || site.pki.issue_server());
                // New connections get the new certificate.
                self.releaser = Caller::of(&self.broker, "releaser");
                self.enroller = Caller::of(&self.broker, "enroller");
                self.admin = Caller::of(&self.broker, "admin");
            }
            Trouble::PoliciesChanged => {
                self.policy_version += 1;
                let text = POLICIES[self.policy_version % POLICIES.len()];
                let file = self.broker.site.folder().join("policies").join(POLICY_FILE);
                let new = file.with_extension("new");
                self.reload("policies reloaded", || {
                    fs::write(&new, text).unwrap();
                    fs::rename(&new, &file).unwrap();
                });
            }
            Trouble::DiskFull => {
                limit_files(&self.broker, 0);
                sleep(Duration::from_millis(500)).await;
                unlimit_files(&self.broker);
            }
            Trouble::KeyRotated => {
                self.rotate(RotateWrappingKeyRequest {
                    back: true,
                    ..Default::default()
                })
                .await;
                self.start_rewrap(REWRAP_ROWS_PER_SECOND).await;
            }
        }
    }

    /// Causes one trouble after another, until this time has passed.
    async fn run(&mut self, seed: u64, lasts: Duration, every: Duration) -> Results {
        let mut random = Random(seed);
        let stop = Arc::new(AtomicBool::new(false));
        let mut load = self.load(&stop);
        // Connections and caches are made by the first calls.
        sleep(every).await;
        let mut samples = vec![self.sample()];
        let (mut recoveries, mut troubles) = (Vec::new(), Vec::new());
        let begun = Instant::now();
        while begun.elapsed() < lasts {
            let next = Instant::now() + every;
            let trouble = troubles.pop().unwrap_or_else(|| {
                troubles = shuffled(&mut random);
                troubles.pop().expect("there are troubles")
            });
            let recovery = self.cause(trouble, &mut random).await;
            recoveries.push((self.begun.elapsed(), trouble, recovery));
            while let Some(ended) = load.try_join_next() {
                ended.expect("the callers call until they are told to stop");
            }
            sleep(next.saturating_duration_since(Instant::now())).await;
            samples.push(self.sample());
            assert!(self.broker.is_running(), "the front ended");
        }
        stop.store(true, Ordering::Relaxed);
        while let Some(ended) = load.join_next().await {
            ended.expect("no caller received another key");
        }
        samples.push(self.sample());
        Results {
            seed,
            lasted: begun.elapsed(),
            samples,
            recoveries,
            calls: self.seen.calls.load(Ordering::Relaxed),
            failed: self.seen.failed(),
        }
    }

    async fn rotate(&self, request: RotateWrappingKeyRequest) {
        let rotated = eventually(|| async {
            let mut control = self.admin.control.clone();
            control.rotate_wrapping_key(request.clone()).await
        })
        .await;
        assert!(rotated.into_inner().changed, "{request:?}");
    }

    /// Starts a re-wrap, unless an earlier one still moves rows: that one goes on, to the key that is in use now.
    async fn start_rewrap(&self, rows_per_second_max: u32) {
        let request = StartRewrapRequest {
            rows_per_second_max,
            ..Default::default()
        };
        eventually(|| async {
            let mut control = self.admin.control.clone();
            control.start_rewrap(request.clone()).await
        })
        .await;
    }

    async fn rewrap_done(&self) -> Rewrap {
        let begun = Instant::now();
        loop {
            let status = eventually(|| async {
                let mut control = self.admin.control.clone();
                control.get_rewrap(GetRewrapRequest {}).await
            });
            let rewrap = status.await.into_inner().rewrap.unwrap();
            if rewrap.state() == RewrapState::Done {
                return rewrap;
            }
            assert!(begun.elapsed() < REWRAP_DONE_WITHIN, "{rewrap:?}");
            sleep(Duration::from_millis(200)).await;
        }
    }

    fn kill_workers(&self, most: usize) {
        for worker in self.broker.workers().into_iter().take(most) {
            send(worker, Signal::KILL);
        }
    }

    /// Lets the module do something at the next call of a function.
    fn act_once(&self, action: &str) {
        let at = self.begun.elapsed().as_millis();
        self.faulty.behave(&format!(
            "[[rule]]\nname = \"{action} after {at} ms\"\nfunction = \"C_Decrypt\"\non = {{ call = 1 }}\ndo = {{ {action} = true }}\n"
        ));
    }

    /// Changes files, and waits until the broker uses them. It may notice the change before the signal.
    fn reload(&self, line: &str, change: impl FnOnce()) {
        let lines = || self.broker.site.log().matches(line).count();
        let before = lines();
        change();
        self.broker.signal(Signal::HUP);
        block_in_place(|| until(line, || (lines() > before).then_some(())));
    }
}

/// All troubles in an order that the seed selects.
fn shuffled(random: &mut Random) -> Vec<Trouble> {
    let mut troubles = TROUBLES.to_vec();
    for last in (1..troubles.len()).rev() {
        let other = random.below(u64::try_from(last + 1).unwrap());
        troubles.swap(last, usize::try_from(other).unwrap());
    }
    troubles
}

/// The medians of the first and of the last quarter of the samples.
fn quarters(samples: &[Sample], value: impl Fn(&Sample) -> u64) -> (f64, f64) {
    let median = |part: &[Sample]| {
        let mut values: Vec<u64> = part.iter().map(&value).collect();
        values.sort_unstable();
        f64::from(u32::try_from(values[values.len() / 2]).unwrap())
    };
    let quarter = samples.len().div_ceil(4);
    let (first, last) = (&samples[..quarter], &samples[samples.len() - quarter..]);
    (median(first), median(last))
}

/// The median of the last quarter of the samples, divided by that of the first quarter.
fn growth(samples: &[Sample], value: impl Fn(&Sample) -> u64) -> f64 {
    let (first, last) = quarters(samples, value);
    last / first
}

/// The facts that make the figures of two machines comparable.
pub(crate) fn machine() -> Value {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let cpus = read("/proc/cpuinfo");
    let model = cpus
        .lines()
        .find_map(|line| line.strip_prefix("model name"))
        .and_then(|rest| rest.split_once(':'))
        .map_or(env::consts::ARCH, |(_, model)| model.trim());
    json!({
        "cpu": model,
        "cores": std::thread::available_parallelism().unwrap().get(),
        "kernel": read("/proc/sys/kernel/osrelease").trim(),
    })
}

/// The results of a run.
struct Results {
    seed: u64,
    lasted: Duration,
    samples: Vec<Sample>,
    /// When each trouble ended, and the time from then until a call of each kind succeeded.
    recoveries: Vec<(Duration, Trouble, Duration)>,
    calls: u64,
    failed: u64,
}

impl Results {
    fn success(&self) -> f64 {
        let part = |count: u64| f64::from(u32::try_from(count).unwrap());
        1.0 - part(self.failed) / part(self.calls)
    }

    /// Writes the results to the file that the environment names, and returns their text.
    fn publish(&self, seen: &Seen) -> String {
        if let Ok(file) = env::var("KEYBROKER_TEST_SOAK_FILE") {
            let text = serde_json::to_string_pretty(&self.json(seen)).unwrap();
            fs::write(file, text + "\n").unwrap();
        }
        format!(
            "{self}failures: {:?}\nrefused attempts: {:?}",
            seen.failures.lock().unwrap(),
            seen.refusals.lock().unwrap()
        )
    }

    fn check(&self, lasts: Duration) {
        assert!(self.success() >= SUCCESS_MIN, "{self}");
        let (first, last) = (&self.samples[0], self.samples.last().unwrap());
        assert_eq!(last.workers.len(), first.workers.len());
        assert!(
            last.front.descriptors <= first.front.descriptors + MORE_DESCRIPTORS,
            "{first:?} {last:?}"
        );
        if lasts >= LONG {
            let grown = |value: fn(&Sample) -> u64| growth(&self.samples, value);
            assert!(grown(|sample| sample.front.resident_kib) <= MEMORY_GROWTH_MAX);
            assert!(grown(|sample| sample.front.descriptors) <= GROWTH_MAX);
            let (first, last) = quarters(&self.samples, |sample| sample.front.thread_count());
            assert!(last <= first + MORE_THREADS, "{first} and {last} threads");
        }
    }

    fn json(&self, seen: &Seen) -> Value {
        let samples: Vec<Value> = self.samples.iter().map(Sample::json).collect();
        let faults: Vec<Value> = self
            .recoveries
            .iter()
            .map(|(at, trouble, recovery)| {
                json!({
                    "at_s": at.as_secs_f64(),
                    "fault": format!("{trouble:?}"),
                    "recovery_s": recovery.as_secs_f64(),
                })
            })
            .collect();
        json!({
            "scenario": "soak",
            "commit": env::var("KEYBROKER_TEST_COMMIT").ok(),
            "machine": machine(),
            "note": env::var("KEYBROKER_TEST_SOAK_NOTE").ok(),
            "seed": self.seed,
            "seconds": self.lasted.as_secs(),
            "calls": self.calls,
            "attempts": seen.attempts.load(Ordering::Relaxed),
            "failed": self.failed,
            "failures": *seen.failures.lock().unwrap(),
            "refused_attempts": *seen.refusals.lock().unwrap(),
            "success": self.success(),
            "memory_growth": growth(&self.samples, |sample| sample.front.resident_kib),
            "descriptor_growth": growth(&self.samples, |sample| sample.front.descriptors),
            "thread_growth": growth(&self.samples, |sample| sample.front.thread_count()),
            "samples": samples,
            "faults": faults,
        })
    }
}

impl fmt::Display for Results {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{} faults in {:?} (seed {}): {} calls, {} failed, success {:.5}",
            self.recoveries.len(),
            self.lasted,
            self.seed,
            self.calls,
            self.failed,
            self.success()
        )?;
        for trouble in TROUBLES {
            let of_it = self
                .recoveries
                .iter()
                .filter(|(_, caused, _)| *caused == trouble);
            let slowest = of_it.clone().map(|(.., recovery)| *recovery).max();
            writeln!(
                f,
                "  {trouble:?}: {} times, slowest recovery {slowest:?}",
                of_it.count()
            )?;
        }
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_fault_of_a_long_run_fails_a_call_or_leaves_anything_behind() {
    let seconds = number("KEYBROKER_TEST_SOAK_SECONDS").unwrap_or(SECONDS);
    let every = number("KEYBROKER_TEST_SOAK_EVERY_SECONDS").unwrap_or(EVERY_SECONDS);
    let (lasts, every) = (Duration::from_secs(seconds), Duration::from_secs(every));
    let seed = seed("KEYBROKER_TEST_SOAK_SEED");
    println!("the seed is {seed}");
    let mut world = World::start().await;
    let results = world.run(seed, lasts, every).await;
    let seen = Arc::clone(&world.seen);
    println!("{}", results.publish(&seen));
    results.check(lasts);
    // What the faults left of a re-wrap is moved now, so that one key is enough for every row.
    world.rewrap_done().await;
    world.start_rewrap(0).await;
    let rewrap = world.rewrap_done().await;
    assert_eq!((rewrap.left, rewrap.failed), (0, 0), "{rewrap:?}");
    let acknowledged = std::mem::take(&mut *seen.acknowledged.lock().unwrap());
    assert!(!acknowledged.is_empty(), "no key was enrolled");
    for user in acknowledged {
        let key = eventually(|| world.releaser.unwrap(&user)).await;
        assert_eq!(key.key_material, material(&user), "the key of {user}");
    }
    let World { broker, .. } = world;
    let (site, status) = block_in_place(|| broker.stop());
    assert!(status.success(), "{status}");
    site.expect_ok(&["audit", "verify"]);
    site.expect_ok(&["store", "check"]);
}

/// A seed repeats its order, and every fault occurs once before one occurs again.
#[test]
fn the_order_of_faults_is_repeated_by_its_seed() {
    let order = |seed| {
        let mut random = Random(seed);
        [shuffled(&mut random), shuffled(&mut random)]
    };
    assert_eq!(order(7), order(7));
    assert_ne!(order(7), order(8));
    for part in order(9) {
        assert_eq!(part.len(), TROUBLES.len());
        assert!(TROUBLES.iter().all(|trouble| part.contains(trouble)));
    }
}
