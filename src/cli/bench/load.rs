//! The load: a closed loop of connections, each with one call under way, every answer compared with what was enrolled.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use aws_lc_rs::hmac;
use hdrhistogram::Histogram;
use tonic::{Request, transport::Channel};

use crate::{
    cli::{
        connect::{self, Connection},
        exit::{Exit, Failure},
    },
    proto::{
        CreateUserKeyRequest, UnwrapUserKeyRequest, user_key_service_client::UserKeyServiceClient,
    },
};

use super::cpu::CpuTime;

const KEY_NAME: &str = "bench";
/// Calls under way while users are enrolled.
const ENROL_AT_ONCE: usize = 16;
/// Longest latency that the histogram tells apart, in microseconds.
const LATENCY_US_MAX: u64 = 60_000_000;

/// What to measure.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub(super) connection: Connection,
    pub(super) endpoint: String,
    pub(super) connections: usize,
    pub(super) users: usize,
    pub(super) warm_up: Duration,
    pub(super) duration: Duration,
    /// Process id of the front.
    pub(super) front: u32,
}

/// What was measured.
#[derive(Debug)]
pub(super) struct Measured {
    pub(super) operations: u64,
    pub(super) errors: u64,
    pub(super) first_error: String,
    pub(super) seconds: f64,
    pub(super) latency_us: Histogram<u64>,
    pub(super) front_cpu_ms: f64,
    pub(super) worker_cpu_ms: f64,
    pub(super) load_cpu_ms: f64,
}

impl Measured {
    /// The number of operations, at least one, to divide by.
    pub(super) fn operations_f64(&self) -> f64 {
        f64::from(u32::try_from(self.operations.max(1)).unwrap_or(u32::MAX))
    }
}

/// What one connection saw.
struct Seen {
    operations: u64,
    errors: u64,
    first_error: String,
    latency_us: Histogram<u64>,
}

impl Seen {
    fn new() -> Result<Self, Failure> {
        let latency_us = Histogram::new_with_bounds(1, LATENCY_US_MAX, 3)
            .map_err(|error| Failure::new(Exit::Internal, error.to_string()))?;
        Ok(Self {
            operations: 0,
            errors: 0,
            first_error: String::new(),
            latency_us,
        })
    }
}

pub(super) async fn run(plan: &Plan) -> Result<Measured, Failure> {
    let mut channels = Vec::with_capacity(plan.connections);
    for _ in 0..plan.connections.max(1) {
        channels.push(plan.connection.connect(&plan.endpoint).await?);
    }
    enrol(plan, &channels).await?;
    let measuring = Arc::new(AtomicBool::new(false));
    let stop = Arc::new(AtomicBool::new(false));
    let tasks: Vec<_> = channels
        .into_iter()
        .enumerate()
        .map(|(number, channel)| {
            let flags = (Arc::clone(&measuring), Arc::clone(&stop));
            tokio::spawn(one_connection(channel, number, plan.clone(), flags))
        })
        .collect();
    tokio::time::sleep(plan.warm_up).await;
    let ourselves = std::process::id();
    let cpu = || {
        (
            CpuTime::of(plan.front),
            CpuTime::of_children(plan.front),
            CpuTime::of(ourselves),
        )
    };
    let (began, before) = (Instant::now(), cpu());
    measuring.store(true, Ordering::Relaxed);
    tokio::time::sleep(plan.duration).await;
    measuring.store(false, Ordering::Relaxed);
    let (seconds, after) = (began.elapsed().as_secs_f64(), cpu());
    stop.store(true, Ordering::Relaxed);
    let mut all = Seen::new()?;
    for task in tasks {
        let seen = task
            .await
            .map_err(|error| Failure::new(Exit::Internal, error.to_string()))??;
        all.operations += seen.operations;
        all.errors += seen.errors;
        if all.first_error.is_empty() {
            all.first_error = seen.first_error;
        }
        all.latency_us
            .add(&seen.latency_us)
            .map_err(|error| Failure::new(Exit::Internal, error.to_string()))?;
    }
    Ok(Measured {
        operations: all.operations,
        errors: all.errors,
        first_error: all.first_error,
        seconds,
        latency_us: all.latency_us,
        front_cpu_ms: after.0.since_ms(before.0),
        worker_cpu_ms: after.1.since_ms(before.1),
        load_cpu_ms: after.2.since_ms(before.2),
    })
}

/// The key of a user: known to whoever knows its number, so that nothing has to be remembered. 32 bytes.
fn material(number: usize) -> Vec<u8> {
    let key = hmac::Key::new(hmac::HMAC_SHA256, b"keybroker bench");
    hmac::sign(&key, user(number).as_bytes()).as_ref().to_vec()
}

fn user(number: usize) -> String {
    format!("bench-{number:07}")
}

/// Creates the users' keys. Those of an earlier run are used again.
async fn enrol(plan: &Plan, channels: &[Channel]) -> Result<(), Failure> {
    let workers = ENROL_AT_ONCE.min(plan.users.max(1));
    let tasks: Vec<_> = (0..workers)
        .map(|worker| {
            let mut client = UserKeyServiceClient::new(channels[worker % channels.len()].clone());
            let users = plan.users;
            tokio::spawn(async move {
                for number in (worker..users).step_by(workers) {
                    let request = CreateUserKeyRequest {
                        user: user(number),
                        key_name: KEY_NAME.to_owned(),
                        key_material: material(number),
                        request_id: String::new(),
                    };
                    match client.create_user_key(Request::new(request)).await {
                        Err(status) if status.code() != tonic::Code::AlreadyExists => {
                            return Err(connect::failure(&status));
                        }
                        _ => {}
                    }
                }
                Ok(())
            })
        })
        .collect();
    for task in tasks {
        task.await
            .map_err(|error| Failure::new(Exit::Internal, error.to_string()))??;
    }
    Ok(())
}

async fn one_connection(
    channel: Channel,
    number: usize,
    plan: Plan,
    (measuring, stop): (Arc<AtomicBool>, Arc<AtomicBool>),
) -> Result<Seen, Failure> {
    let mut client = UserKeyServiceClient::new(channel);
    let mut seen = Seen::new()?;
    // Each connection begins elsewhere and takes every user in turn.
    let mut next = number * plan.users / plan.connections.max(1);
    while !stop.load(Ordering::Relaxed) {
        next = (next + 1) % plan.users.max(1);
        let request = UnwrapUserKeyRequest {
            user: user(next),
            key_name: KEY_NAME.to_owned(),
        };
        let began = Instant::now();
        let counted = measuring.load(Ordering::Relaxed);
        let error = match client.unwrap_user_key(Request::new(request)).await {
            Ok(answer) if answer.get_ref().key_material == material(next) => None,
            Ok(_) => Some("a released key is not the one that was enrolled".to_owned()),
            Err(status) => Some(connect::failure(&status).message),
        };
        if !counted {
            continue;
        }
        if let Some(error) = error {
            seen.errors += 1;
            seen.first_error = error;
            continue;
        }
        seen.operations += 1;
        let micros = u64::try_from(began.elapsed().as_micros()).unwrap_or(LATENCY_US_MAX);
        seen.latency_us.saturating_record(micros.max(1));
    }
    Ok(seen)
}
