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
    client::{Caller, NAME},
    faulty::{Fault, code},
    faulty_token::site,
    process::{Broker, until},
    site::Options,
};

const MATERIAL: &[u8] = b"material of this user";
const HANG_MS: u32 = 30_000;
const DEADLINE: Duration = Duration::from_secs(4);
const CALLERS: usize = 3;

/// Latencies of callers that call one after another until they are told to stop.
struct Load {
    stop: Arc<AtomicBool>,
    callers: Vec<tokio::task::JoinHandle<Vec<Duration>>>,
}

impl Load {
    fn start(broker: &Broker) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let callers = (0..CALLERS)
            .map(|_| {
                let (releaser, stop) = (Caller::of(broker, "releaser"), Arc::clone(&stop));
                tokio::spawn(async move {
                    let mut times = Vec::new();
                    while !stop.load(Ordering::Relaxed) {
                        let began = Instant::now();
                        let key = releaser.unwrap("ada").await.unwrap();
                        assert_eq!(key.key_material, MATERIAL);
                        times.push(began.elapsed());
                    }
                    times
                })
            })
            .collect();
        Self { stop, callers }
    }

    /// All latencies, sorted.
    async fn end(self) -> Vec<Duration> {
        self.stop.store(true, Ordering::Relaxed);
        let mut all = Vec::new();
        for caller in self.callers {
            all.extend(caller.await.unwrap());
        }
        all.sort();
        all
    }
}

fn percentile(sorted: &[Duration], percent: usize) -> Duration {
    sorted[(sorted.len() * percent / 100).min(sorted.len() - 1)]
}

async fn latencies_for(broker: &Broker, time: Duration) -> Vec<Duration> {
    let load = Load::start(broker);
    tokio::time::sleep(time).await;
    load.end().await
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
    let quiet_for = Duration::from_secs(if measured { 10 } else { 1 });
    let alone = latencies_for(&broker, quiet_for).await;
    let (mut beside, mut answered, mut replaced) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..hangs {
        let workers = until("two workers", || {
            let workers = broker.workers();
            (workers.len() == 2).then_some(workers)
        });
        let before = faulty.count("C_Decrypt begins");
        // A job that is repeated would hang as well, if the fault were for the next call only and not for one process.
        faulty.set(
            "C_Decrypt",
            &Fault {
                milliseconds: HANG_MS,
                pid: workers[0],
                ..Fault::times(code::LATE, 1)
            },
        );
        // Calls until one of them meets the fault: the others are answered at once.
        let releaser = Caller::of(&broker, "releaser");
        let began = loop {
            let began = Instant::now();
            let request = Request::new(UnwrapUserKeyRequest {
                user: "ada".to_owned(),
                key_name: NAME.to_owned(),
            });
            let ended = releaser.keys.clone().unwrap_user_key(request).await;
            match ended {
                Ok(_) => assert!(faulty.count("C_Decrypt begins") > before),
                Err(status) => {
                    assert_eq!(crate::client::reason(&status), "DEADLINE", "{status:?}");
                    answered.push(began.elapsed());
                    break began;
                }
            }
        };
        let load = Load::start(&broker);
        until("another worker", || {
            let now = broker.workers();
            (now.len() == 2 && !now.contains(&workers[0])).then_some(())
        });
        replaced.push(began.elapsed().saturating_sub(DEADLINE));
        beside.extend(load.end().await);
        faulty.clear("C_Decrypt");
    }
    beside.sort();
    let longest = |times: &[Duration]| times.iter().max().copied().unwrap();
    println!(
        "{hangs} calls hung: answered after {:?} at most; worker replaced {:?} after that deadline at most; p99 of the others {:?} \
         alone ({} calls), {:?} beside a hanging call ({} calls), none of which failed",
        longest(&answered),
        longest(&replaced),
        percentile(&alone, 99),
        alone.len(),
        percentile(&beside, 99),
        beside.len(),
    );
    assert!(longest(&answered) >= DEADLINE);
    assert!(longest(&answered) < DEADLINE + Duration::from_secs(2));
    if measured {
        assert!(longest(&replaced) < Duration::from_secs(3), "{replaced:?}");
    }
}
