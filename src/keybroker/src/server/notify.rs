//! If a service manager runs the broker, notifies the service manager of the states ready,
//! reloading and stopping (`sd_notify`), and sends watchdog notifications.
//!
//! Before each watchdog notification, the process requests `/livez` from itself over a socket pair,
//! which no other process can access. An answer shows that the runtime schedules tasks, polls
//! sockets and serves HTTP. A local user cannot stop the notifications by flooding the status
//! listener. The token, the database and the audit log are not checked, because a restart would not
//! repair them and would prolong an outage.

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
/// Number of watchdog notifications within the service manager's timeout. With three notifications,
/// the service manager tolerates two late notifications.
const PINGS_PER_TIMEOUT: u32 = 3;

/// The notifications of a running broker. Dropping this value ends the watchdog notifications.
#[derive(Debug)]
pub(super) struct Manager {
    stopping: CancellationToken,
    pings: Option<JoinHandle<()>>,
}

impl Manager {
    /// Notifies the service manager that the listeners accept connections. If the service manager
    /// has a watchdog, the broker notifies the watchdog as long as `probes` answers.
    pub(super) fn serving(probes: Router) -> Self {
        say(&[NotifyState::Ready]);
        let stopping = CancellationToken::new();
        let pings = sd_notify::watchdog_enabled().map(|timeout| {
            tracing::info!(
                timeout_s = timeout.as_secs_f64(),
                "the broker sends watchdog notifications to the service manager"
            );
            tokio::spawn(ping(probes, timeout / PINGS_PER_TIMEOUT, stopping.clone()))
        });
        Self { stopping, pings }
    }

    /// Notifies the service manager that the drain begins. During the drain, the watchdog
    /// notifications show only that the runtime schedules tasks.
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

/// Notifies the service manager that the broker is reading its files again.
pub(super) fn reloading() {
    match NotifyState::monotonic_usec_now() {
        Ok(now) => say(&[NotifyState::Reloading, now]),
        Err(error) => tracing::warn!(
            %error,
            "cannot read the monotonic clock, so the service manager is not notified of the reload"
        ),
    }
}

/// Notifies the service manager that the broker has read its files again.
pub(super) fn reloaded() {
    say(&[NotifyState::Ready]);
}

/// Sets the line for `systemctl status`. Replaces control characters, because the vendor's module
/// may have written the text, and a line end would start a new message.
pub(super) fn health(detail: &str) {
    let line = if detail.is_empty() {
        "serving".to_owned()
    } else {
        detail.replace(char::is_control, " ")
    };
    say(&[NotifyState::Status(&line)]);
}

/// Sends states to the service manager, if a service manager runs the broker. An unreachable
/// service manager does not stop the broker.
fn say(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::warn!(%error, "cannot notify the service manager");
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
                keybroker_core::alert!(Watchdog, %error, "the process did not answer its own request for /livez in \
                 time");
            }
        }
    }
}

/// Requests `/livez` over a socket pair. A separate task serves the other end of the socket pair in
/// the same way as other connections.
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
            Err(io::Error::other(
                "the status of the answer from /livez is not 200",
            ))
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
