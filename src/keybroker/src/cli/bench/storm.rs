//! The scenario `storm`: many members fetch their keys over REST within a short time. Each member
//! uses a new TLS connection and a separate access token.

use std::{
    collections::BTreeMap,
    thread,
    time::{Duration, Instant},
};

use base64ct::{Base64, Encoding as _};
use serde_json::json;

use crate::cli::{exit::Failure, output::Field};

use super::{
    Arguments, Bench, block_on_until_interrupted,
    cpu::CpuTime,
    document::{Results, figure},
    internal,
    issuer::Issuer,
    latencies::Latencies,
    memory::Memory,
    open_loop::{self, Random},
    processors,
    rest::{Rest, Version},
    seed,
    served::{Changed, Served},
    users::{User, Users},
};

const MEMBERS: u32 = 1_000;
/// Goal for the time within which a member gets the key.
const GOAL: Duration = Duration::from_secs(10);
/// Maximum time for which a member waits for an answer. Clients of Bitwarden wait for at least half
/// a minute.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Number of connections that are open at the same time if every member waits until [`TIMEOUT`].
pub(super) fn at_once(arguments: &Arguments) -> u64 {
    let members = u64::from(members(arguments));
    let arriving = members * TIMEOUT.as_secs() / arguments.seconds.max(1);
    members.min(arriving.saturating_add(1))
}

fn members(arguments: &Arguments) -> u32 {
    arguments.members.unwrap_or(MEMBERS)
}

/// The outcome of a member's request.
struct Done {
    /// Time between the start of the storm and the arrival of the member.
    arrived: Duration,
    took: Duration,
    outcome: Outcome,
}

enum Outcome {
    Key,
    /// No answer within [`TIMEOUT`].
    Late,
    /// The broker asked the member to try again later.
    Refused(String),
    Failed(String),
}

pub(super) fn run(bench: &Bench<'_>) -> Result<Results, Failure> {
    let users = Users::members(members(bench.arguments));
    // The records are written before the broker starts, in the tenant of the temporary issuer.
    seed::seed(
        bench.context,
        bench.config,
        Issuer::tenant()?,
        users.clone(),
    )?;
    block_on_until_interrupted(measure(bench, users))
}

async fn measure(bench: &Bench<'_>, users: Users) -> Result<Results, Failure> {
    let (arguments, output) = (bench.arguments, bench.context.output);
    let mut changed = Changed::copy_of(bench)?;
    let issuer = Issuer::trusted_by(&mut changed)?;
    output.note("signing access tokens");
    let tokens = sign(&issuer, &users)?;
    let broker = Served::start(bench, Some(changed)).await?;
    let rest = Rest::of(bench, &broker)?;
    output.note("measuring the storm");
    let times = arrivals(
        users.count(),
        arguments.duration(),
        arguments.schedule_seed(),
    );
    let (before, cpu) = (Memory::of(broker.pid)?, Cpu::now(broker.pid)?);
    let (began, mut counts) = (Instant::now(), Counts::new());
    let unsent = open_loop::run(
        times.clone().into_iter(),
        move |number, due| {
            let (rest, token) = (rest.clone(), tokens[number].clone());
            let user = users.user(u32::try_from(number).unwrap_or_default());
            let arrived = times[number];
            async move {
                let outcome = tokio::time::timeout(TIMEOUT, fetch(&rest, &user, &token)).await;
                Done {
                    arrived,
                    took: due.elapsed(),
                    outcome: outcome.unwrap_or(Outcome::Late),
                }
            }
        },
        |done| counts.count(done),
    )
    .await?;
    let seconds = began.elapsed().as_secs_f64();
    let cpu = Cpu::now(broker.pid)?.since(&cpu);
    let after = Memory::of(broker.pid)?;
    let members = members(arguments);
    let mut row = vec![
        ("members", json!(members)),
        ("arrival_seconds", json!(arguments.seconds)),
        ("seconds", figure(seconds)),
        ("unsent", json!(unsent)),
        ("front_kib_before", json!(before.kib)),
        ("front_kib_after", json!(after.kib)),
        ("memory", json!(after.measure.name())),
    ];
    row.extend(counts.fields());
    row.extend(cpu.map(|(name, ms)| (name, figure(ms / f64::from(members)))));
    Ok(Results {
        arguments: vec![
            ("members", json!(members)),
            ("timeout_s", json!(TIMEOUT.as_secs())),
            ("schedule_seed", json!(arguments.schedule_seed())),
        ],
        rows: vec![row],
        timeline: counts.timeline(),
        failure: counts.failure(),
    })
}

/// Signs the access tokens of all members, on all processors.
fn sign(issuer: &Issuer, users: &Users) -> Result<Vec<String>, Failure> {
    let numbers: Vec<u32> = (0..users.count()).collect();
    let part = numbers
        .len()
        .div_ceil(usize::try_from(processors()).unwrap_or(1));
    thread::scope(|scope| {
        let threads: Vec<_> = numbers
            .chunks(part.max(1))
            .map(|numbers| {
                scope.spawn(|| {
                    let users = numbers.iter().map(|number| users.user(*number));
                    users
                        .map(|user| issuer.access_token(user.key.user.as_str()))
                        .collect::<Result<Vec<_>, _>>()
                })
            })
            .collect();
        let mut tokens = Vec::with_capacity(numbers.len());
        for thread in threads {
            tokens.extend(thread.join().map_err(|_| internal("signing failed"))??);
        }
        Ok(tokens)
    })
}

/// Times of arrival, uniformly distributed and sorted.
fn arrivals(count: u32, duration: Duration, seed: u64) -> Vec<Duration> {
    let mut random = Random::new(seed);
    let mut times: Vec<Duration> = (0..count)
        .map(|_| duration.mul_f64(random.fraction()))
        .collect();
    times.sort_unstable();
    times
}

async fn fetch(rest: &Rest, user: &User, token: &str) -> Outcome {
    let answer = match rest.connect(Version::Http1).await {
        Ok(mut connection) => rest.fetch(&mut connection, token).await,
        Err(error) => Err(error),
    };
    let answer = match answer {
        Ok(answer) => answer,
        Err(error) => return Outcome::Failed(error),
    };
    match answer.status {
        200 if answer.key() == Some(&Base64::encode_string(user.material.expose())) => Outcome::Key,
        200 => Outcome::Failed("the key differs from the enrolled key".to_owned()),
        429 | 503 => Outcome::Refused(answer.describe()),
        _ => Outcome::Failed(answer.describe()),
    }
}

/// The numbers of members in a storm, by the outcome of their requests. Every member is counted
/// once.
struct Counts {
    keys: u64,
    within_goal: u64,
    late: u64,
    refused: u64,
    failed: u64,
    first_failure: String,
    /// Number of members without a key, by cause.
    causes: BTreeMap<String, u64>,
    times: Latencies,
    /// For each second, the numbers of members who arrived, who got the key, and who did not get
    /// the key.
    seconds: BTreeMap<u64, [u64; 3]>,
}

impl Counts {
    fn new() -> Self {
        Self {
            keys: 0,
            within_goal: 0,
            late: 0,
            refused: 0,
            failed: 0,
            first_failure: String::new(),
            causes: BTreeMap::new(),
            times: Latencies::new(),
            seconds: BTreeMap::new(),
        }
    }

    fn count(&mut self, done: Done) {
        let answered = (done.arrived + done.took).as_secs();
        self.seconds.entry(done.arrived.as_secs()).or_default()[0] += 1;
        let column = if matches!(done.outcome, Outcome::Key) {
            1
        } else {
            2
        };
        self.seconds.entry(answered).or_default()[column] += 1;
        let cause = match done.outcome {
            Outcome::Key => {
                self.keys += 1;
                self.within_goal += u64::from(done.took <= GOAL);
                self.times.record(done.took);
                return;
            }
            Outcome::Late => {
                self.late += 1;
                format!("no answer within {} s", TIMEOUT.as_secs())
            }
            Outcome::Refused(cause) => {
                self.refused += 1;
                cause
            }
            Outcome::Failed(cause) => {
                self.failed += 1;
                if self.first_failure.is_empty() {
                    self.first_failure.clone_from(&cause);
                }
                cause
            }
        };
        *self.causes.entry(cause).or_default() += 1;
    }

    fn fields(&self) -> Vec<Field> {
        vec![
            ("with_key", json!(self.keys)),
            ("within_10_s", json!(self.within_goal)),
            ("late", json!(self.late)),
            ("refused", json!(self.refused)),
            ("failed", json!(self.failed)),
            ("causes", json!(self.causes)),
            ("p50_ms", figure(self.times.quantile_ms(0.5))),
            ("p99_ms", figure(self.times.quantile_ms(0.99))),
            ("max_ms", figure(self.times.max_ms())),
        ]
    }

    fn failure(&self) -> Option<String> {
        let (count, first) = (self.failed, &self.first_failure);
        (count > 0).then(|| {
            format!(
                "{count} members got neither a key nor a request to try again later; the first error: {first}"
            )
        })
    }

    fn timeline(&self) -> Vec<Vec<Field>> {
        let seconds = self.seconds.iter();
        seconds
            .map(|(second, [arrived, keys, without])| {
                vec![
                    ("second", json!(second)),
                    ("arrived", json!(arrived)),
                    ("with_key", json!(keys)),
                    ("without_key", json!(without)),
                ]
            })
            .collect()
    }
}

/// CPU times of the front, the workers and this program.
struct Cpu([CpuTime; 3]);

impl Cpu {
    fn now(front: u32) -> Result<Self, Failure> {
        Ok(Self([
            CpuTime::of(front)?,
            CpuTime::of_children(front)?,
            CpuTime::of(std::process::id())?,
        ]))
    }

    fn since(&self, before: &Self) -> [(&'static str, f64); 3] {
        let [front, workers, load] = &self.0;
        let [front_before, workers_before, load_before] = &before.0;
        [
            ("front_cpu_ms_per_member", front.since_ms(front_before)),
            ("worker_cpu_ms_per_member", workers.since_ms(workers_before)),
            ("load_cpu_ms_per_member", load.since_ms(load_before)),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_arrive_in_order_and_within_the_time() {
        let duration = Duration::from_mins(1);
        let times = arrivals(10_000, duration, 1);
        assert_eq!(times, arrivals(10_000, duration, 1));
        assert!(times.is_sorted() && times.iter().all(|time| *time < duration));
        let first_half = times.iter().filter(|time| **time < duration / 2).count();
        assert!((4_700..5_300).contains(&first_half), "{first_half}");
    }

    #[test]
    fn every_member_is_counted_once() {
        let mut counts = Counts::new();
        let second = Duration::from_secs(1);
        for (took, outcome) in [
            (1, Outcome::Key),
            (11, Outcome::Key),
            (30, Outcome::Late),
            (0, Outcome::Refused("status 429, QUEUE_FULL".to_owned())),
            (0, Outcome::Failed("status 500, BUG".to_owned())),
        ] {
            counts.count(Done {
                arrived: second,
                took: second * took,
                outcome,
            });
        }
        let number = |name: &str| {
            let fields = counts.fields();
            fields
                .iter()
                .find(|field| field.0 == name)
                .unwrap()
                .1
                .as_u64()
                .unwrap()
        };
        assert_eq!((number("with_key"), number("within_10_s")), (2, 1));
        assert_eq!(
            number("with_key") + number("late") + number("refused") + number("failed"),
            5
        );
        let sum = |column: &str| -> u64 {
            let rows = counts.timeline();
            let fields = rows.iter().flatten().filter(|field| field.0 == column);
            fields.map(|field| field.1.as_u64().unwrap()).sum()
        };
        assert_eq!(
            (sum("arrived"), sum("with_key"), sum("without_key")),
            (5, 2, 3)
        );
    }
}
