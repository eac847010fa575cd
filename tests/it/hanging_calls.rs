//! A call of the module that does not return: what its caller, the other callers and the worker see of it.

use std::{
    env,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use keybroker_proto::UnwrapUserKeyRequest;
use tonic::Request;

use crate::{
    client::{Caller, NAME, reason},
    faulty::{Fault, Faulty, code},
    faulty_token::site,
    process::{Broker, until},
    site::Options,
};

const MATERIAL: &[u8] = b"material of this user";
const HANG_MS: u32 = 30_000;
const DEADLINE: Duration = Duration::from_secs(4);
const CALLERS: usize = 3;

/// Callers that call one after another until they are told to stop.
struct Load {
    stop: Arc<AtomicBool>,
    callers: Vec<tokio::task::JoinHandle<Seen>>,
}

/// What callers saw.
#[derive(Default)]
struct Seen {
    /// How long each successful call took.
    times: Vec<Duration>,
    /// Calls that were not answered before their deadline.
    late: usize,
}

impl Load {
    fn start(broker: &Broker) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let callers = (0..CALLERS)
            .map(|_| {
                let (releaser, stop) = (Caller::of(broker, "releaser"), Arc::clone(&stop));
                tokio::spawn(async move {
                    let mut seen = Seen::default();
                    while !stop.load(Ordering::Relaxed) {
                        let began = Instant::now();
                        match releaser.unwrap("ada").await {
                            Ok(key) => {
                                assert_eq!(key.key_material, MATERIAL);
                                seen.times.push(began.elapsed());
                            }
                            Err(status) => {
                                assert_eq!(reason(&status), "DEADLINE", "{status:?}");
                                seen.late += 1;
                            }
                        }
                    }
                    seen
                })
            })
            .collect();
        Self { stop, callers }
    }

    /// Adds what the callers saw.
    async fn end(self, all: &mut Seen) {
        self.stop.store(true, Ordering::Relaxed);
        for caller in self.callers {
            let seen = caller.await.unwrap();
            all.times.extend(seen.times);
            all.late += seen.late;
        }
    }
}

impl Seen {
    fn p99(&mut self) -> Duration {
        self.times.sort();
        self.times[self.times.len() * 99 / 100]
    }
}

/// Makes a call that hangs, and waits for its answer. Returns when it began, and the worker that it hangs in.
async fn hanging_call(broker: &Broker, faulty: &Faulty) -> (Instant, u32) {
    const ATTEMPTS: usize = 20;
    const CALLS: usize = 100;
    let releaser = Caller::of(broker, "releaser");
    for attempt in 0..ATTEMPTS {
        let workers = until("two workers", || {
            let workers = broker.workers();
            (workers.len() == 2).then_some(workers)
        });
        let worker = workers[attempt % 2];
        // For one worker, because the job is repeated in the other one.
        faulty.set(
            "C_Decrypt",
            &Fault {
                milliseconds: HANG_MS,
                pid: worker,
                ..Fault::times(code::LATE, 1)
            },
        );
        for _ in 0..CALLS {
            let began = Instant::now();
            let request = Request::new(UnwrapUserKeyRequest {
                user: "ada".to_owned(),
                key_name: NAME.to_owned(),
                recipient: None,
            });
            if let Err(status) = releaser.keys.clone().unwrap_user_key(request).await {
                assert_eq!(reason(&status), "DEADLINE", "{status:?}");
                return (began, worker);
            }
            // A self-test met the fault instead, and the worker is replaced for that.
            if !broker.workers().contains(&worker) {
                break;
            }
        }
        faulty.clear("C_Decrypt");
    }
    panic!("no call met the fault");
}

/// One call of one of two workers hangs for 30 s. Its caller is answered at the deadline, no other call fails, and the worker is
/// replaced.
///
/// `KEYBROKER_TEST_HANGS=20` lets so many calls hang, one after another, and gives the figures; the suite lets one hang.
#[tokio::test(flavor = "multi_thread")]
async fn a_hanging_call_costs_only_its_own_caller() {
    let hangs = env::var("KEYBROKER_TEST_HANGS").ok();
    let measured = hangs.is_some();
    let hangs: usize = hangs.map_or(1, |text| text.parse().unwrap());
    let (site, faulty) = site(Options {
        workers: 2,
        // A change of the deadline by the client would be watched by the client, too, in other words.
        limits: format!("call_timeout_max_ms = {}", DEADLINE.as_millis()),
        ..Options::default()
    });
    let broker = Broker::start_on(site);
    Caller::of(&broker, "enroller")
        .create("ada", MATERIAL)
        .await
        .unwrap();
    let (mut alone, mut beside) = (Seen::default(), Seen::default());
    let load = Load::start(&broker);
    // As long as there is something to compare with; nothing waits for its end.
    tokio::time::sleep(Duration::from_secs(if measured { 10 } else { 1 })).await;
    load.end(&mut alone).await;
    let (mut answered, mut replaced) = (Vec::new(), Vec::new());
    for _ in 0..hangs {
        let (began, hung) = hanging_call(&broker, &faulty).await;
        answered.push(began.elapsed());
        let load = Load::start(&broker);
        until("another worker", || {
            let now = broker.workers();
            (now.len() == 2 && !now.contains(&hung)).then_some(())
        });
        replaced.push(began.elapsed().saturating_sub(DEADLINE));
        load.end(&mut beside).await;
        faulty.clear("C_Decrypt");
    }
    let longest = |times: &[Duration]| times.iter().max().copied().unwrap();
    println!(
        "{hangs} calls hung: answered after {:?} at most; worker replaced {:?} after that deadline at most; others alone: {} calls, p99 \
         {:?}, {} late; beside a hanging call: {} calls, p99 {:?}, {} late",
        longest(&answered),
        longest(&replaced),
        alone.times.len(),
        alone.p99(),
        alone.late,
        beside.times.len(),
        beside.p99(),
        beside.late,
    );
    // The timeout in the call's metadata is rounded down to milliseconds.
    assert!(longest(&answered) + Duration::from_millis(10) >= DEADLINE);
    assert!(beside.times.len() > CALLERS);
    // A busy machine may take longer for a call than its deadline.
    if measured {
        assert!(longest(&answered) < DEADLINE + Duration::from_secs(1));
        assert!(longest(&replaced) < Duration::from_secs(3), "{replaced:?}");
        assert_eq!(alone.late + beside.late, 0);
    }
}
