//! Words to the service manager where there is one (`sd_notify`): ready, reloading, stopping, and the watchdog.
//!
//! Before each watchdog notification the process asks itself for `/livez` over a socket pair that no other process can reach. So
//! the runtime schedules tasks, polls sockets and serves HTTP, and no local user can stop the notifications by filling the status
//! listener. Token, database and audit log are left out: a restart repairs none of them, and a restart in the middle of an outage makes
//! the outage longer.

use std::{io, time::Duration};

use axum::Router;
use sd_notify::NotifyState;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::UnixStream,
    task::JoinHandle,
    time::{self, MissedTickBehavior},
};
use tokio_util::sync::CancellationToken;

use super::status;

const PROBE: &[u8] = b"GET /livez HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
const ALIVE: &[u8] = b"HTTP/1.1 200 ";
/// Pings in the time that the manager waits for one: two may be late.
const PINGS_PER_TIMEOUT: u32 = 3;

/// The manager's side of a broker that serves. The pings end when it is dropped.
#[derive(Debug)]
pub(super) struct Manager {
    stopping: CancellationToken,
    pings: Option<JoinHandle<()>>,
}

impl Manager {
    /// The listeners accept connections. From now on the watchdog is notified, where the manager asked for it, as long as `probes` answers.
    pub(super) fn serving(probes: Router) -> Self {
        say(&[NotifyState::Ready]);
        let stopping = CancellationToken::new();
        let pings = sd_notify::watchdog_enabled().map(|timeout| {
            tracing::info!(timeout_s = timeout.as_secs_f64(), "feeding the watchdog");
            tokio::spawn(ping(probes, timeout / PINGS_PER_TIMEOUT, stopping.clone()))
        });
        Self { stopping, pings }
    }

    /// The drain begins. From now on a ping says only that the runtime schedules.
    pub(super) fn stopping(&self) {
        self.stopping.cancel();
        say(&[NotifyState::Stopping, NotifyState::Status("draining")]);
    }
}

impl Drop for Manager {
    fn drop(&mut self) {
        if let Some(pings) = &self.pings {
            pings.abort();
        }
    }
}

/// Files are being read again.
pub(super) fn reloading() {
    match NotifyState::monotonic_usec_now() {
        Ok(now) => say(&[NotifyState::Reloading, now]),
        Err(error) => tracing::warn!(%error, "no monotonic clock"),
    }
}

/// The files have been read again.
pub(super) fn reloaded() {
    say(&[NotifyState::Ready]);
}

/// One line for `systemctl status`: what is wrong, or nothing. The words may come from the vendor's module, and a line end
/// among them would begin a new message.
pub(super) fn health(detail: &str) {
    let line = if detail.is_empty() {
        "serving".to_owned()
    } else {
        detail.replace(char::is_control, " ")
    };
    say(&[NotifyState::Status(&line)]);
}

/// Does nothing without a manager. An unreachable manager is no reason to stop serving.
fn say(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::warn!(%error, "the service manager was not told");
    }
}

async fn ping(probes: Router, interval: Duration, stopping: CancellationToken) {
    let mut ticks = time::interval(interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let alive = tokio::select! {
            () = stopping.cancelled() => Ok(()),
            alive = probe(&probes, interval) => alive,
        };
        match alive {
            Ok(()) => say(&[NotifyState::Watchdog]),
            Err(error) => {
                keybroker_core::alert!(Watchdog, %error, "the process did not answer its own /livez in time");
            }
        }
    }
}

/// Asks for `/livez` over a socket pair. The other end is served in a separate task, as each connection is.
async fn probe(probes: &Router, timeout: Duration) -> io::Result<()> {
    let (mut stream, served) = UnixStream::pair()?;
    let serving = tokio::spawn(status::answer(served, probes.clone()));
    let answered = time::timeout(timeout, async {
        stream.write_all(PROBE).await?;
        let mut answer = [0; ALIVE.len()];
        stream.read_exact(&mut answer).await?;
        if answer == ALIVE {
            Ok(())
        } else {
            Err(io::Error::other("another answer than 200"))
        }
    })
    .await;
    serving.abort();
    answered.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

#[cfg(test)]
mod tests {
    use axum::{http::StatusCode, routing::get};

    use super::*;

    #[tokio::test]
    async fn only_a_good_answer_is_life() {
        for (status, is_good) in [
            (StatusCode::OK, true),
            (StatusCode::SERVICE_UNAVAILABLE, false),
            (StatusCode::NOT_FOUND, false),
        ] {
            let probes = Router::new().route("/livez", get(async move || status));
            let answer = probe(&probes, Duration::from_secs(30)).await;
            assert_eq!(answer.is_ok(), is_good, "{status}");
        }
    }

    #[tokio::test]
    async fn silence_is_no_life() {
        let never = get(async || std::future::pending::<StatusCode>().await);
        let probes = Router::new().route("/livez", never);
        let error = probe(&probes, Duration::from_millis(50)).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }
}
