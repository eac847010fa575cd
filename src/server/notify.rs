//! Words to the service manager where there is one (`sd_notify`): ready, reloading, stopping, and the watchdog.
//!
//! The watchdog is fed by what a probe would see: this process answers `/livez` on its own status listener, so the runtime
//! schedules, its sockets are polled and a connection is served. Token, database and audit log are left out: a restart
//! cures none of them, and one in the middle of an outage makes it longer.

use std::{io, net::SocketAddr, time::Duration};

use sd_notify::NotifyState;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    task::JoinHandle,
    time::{self, MissedTickBehavior},
};
use tokio_util::sync::CancellationToken;

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
    /// The doors are open. From now on the watchdog is fed, where the manager asked for it.
    pub(super) fn serving(status: SocketAddr) -> Self {
        say(&[NotifyState::Ready]);
        let stopping = CancellationToken::new();
        let pings = sd_notify::watchdog_enabled().map(|timeout| {
            tracing::info!(timeout_s = timeout.as_secs_f64(), "feeding the watchdog");
            tokio::spawn(ping(status, timeout / PINGS_PER_TIMEOUT, stopping.clone()))
        });
        Self { stopping, pings }
    }

    /// The drain begins. The status listener ends with it, so from now on a ping says only that the runtime schedules.
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
/// among them would begin a message of their own.
pub(super) fn health(detail: &str) {
    let line = if detail.is_empty() {
        "serving".to_owned()
    } else {
        detail.replace(char::is_control, " ")
    };
    say(&[NotifyState::Status(&line)]);
}

/// Does nothing without a manager. A manager that does not listen is no reason to stop serving.
fn say(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::warn!(%error, "the service manager was not told");
    }
}

async fn ping(status: SocketAddr, interval: Duration, stopping: CancellationToken) {
    let mut ticks = time::interval(interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let alive = tokio::select! {
            () = stopping.cancelled() => Ok(()),
            alive = probe(status, interval) => alive,
        };
        match alive {
            Ok(()) => say(&[NotifyState::Watchdog]),
            Err(error) => {
                tracing::error!(alarm = "watchdog", %error, "no answer from our own /livez");
            }
        }
    }
}

async fn probe(status: SocketAddr, patience: Duration) -> io::Result<()> {
    time::timeout(patience, async {
        let mut stream = TcpStream::connect(status).await?;
        stream.write_all(PROBE).await?;
        let mut answer = [0; ALIVE.len()];
        stream.read_exact(&mut answer).await?;
        if answer == ALIVE {
            Ok(())
        } else {
            Err(io::Error::other("another answer than 200"))
        }
    })
    .await
    .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    const SHORT: Duration = Duration::from_millis(300);

    #[tokio::test]
    async fn only_a_good_answer_is_life() {
        for (answer, good) in [
            (&b"HTTP/1.1 200 OK\r\n\r\n"[..], true),
            (b"HTTP/1.1 503 Service Unavailable\r\n\r\n", false),
            (b"HTTP/1.1", false),
            (b"", false),
        ] {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            let server = tokio::spawn(async move {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut request = vec![0; PROBE.len()];
                stream.read_exact(&mut request).await.unwrap();
                stream.write_all(answer).await.unwrap();
            });
            assert_eq!(probe(address, SHORT).await.is_ok(), good, "{answer:?}");
            server.await.unwrap();
        }
    }

    #[tokio::test]
    async fn silence_is_no_life() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let error = probe(address, SHORT).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        drop(listener);
        assert!(probe(address, SHORT).await.is_err());
    }
}
