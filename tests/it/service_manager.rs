//! What the broker tells systemd, read from a real datagram socket as systemd would.

use std::{
    fs,
    os::unix::net::UnixDatagram,
    path::Path,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use rustix::process::Signal;

use crate::{
    listeners::floods::crowd,
    process::{Broker, WAIT_MAX, freeze, send, until},
    site::{Options, Site},
};

/// Short, so that a test sees many pings; far above what a busy machine delays one by.
const WATCHDOG: Duration = Duration::from_secs(3);
const INTERVAL: Duration = Duration::from_secs(1);

/// The receiving end of `NOTIFY_SOCKET`.
struct Manager {
    socket: UnixDatagram,
    folder: tempfile::TempDir,
}

impl Manager {
    fn listen() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = UnixDatagram::bind(folder.path().join("notify")).unwrap();
        Self { socket, folder }
    }

    fn address(&self) -> std::path::PathBuf {
        self.folder.path().join("notify")
    }

    fn start(&self, site: &Arc<Site>) -> Broker {
        Broker::start_as(Arc::clone(site), |site| {
            let mut command = site.serve();
            command
                .env("NOTIFY_SOCKET", self.address())
                .env("WATCHDOG_USEC", WATCHDOG.as_micros().to_string());
            command
        })
    }

    /// The next message, if one comes in time.
    fn next(&self, timeout: Duration) -> Option<String> {
        let mut buffer = [0; 4_096];
        self.socket.set_read_timeout(Some(timeout)).unwrap();
        let length = self.socket.recv(&mut buffer).ok()?;
        Some(String::from_utf8(buffer[..length].to_vec()).unwrap())
    }

    /// Everything that waits to be read.
    fn drain(&self) -> Vec<String> {
        std::iter::from_fn(|| self.next(Duration::from_millis(1))).collect()
    }

    /// Reads until each of the lines was there, in any order.
    fn expect_all(&self, lines: &[&str]) {
        let mut missing: Vec<&str> = lines.to_vec();
        let deadline = Instant::now() + WAIT_MAX;
        while !missing.is_empty() && Instant::now() < deadline {
            if let Some(message) = self.next(Duration::from_millis(100)) {
                missing.retain(|line| !message.lines().any(|one| one == *line));
            }
        }
        assert!(missing.is_empty(), "no {missing:?}");
    }

    /// Reads until a message has the line.
    fn expect(&self, line: &str) -> String {
        let deadline = Instant::now() + WAIT_MAX;
        let mut seen = Vec::new();
        while Instant::now() < deadline {
            if let Some(message) = self.next(Duration::from_millis(100)) {
                if message.lines().any(|one| one == line) {
                    return message;
                }
                seen.push(message);
            }
        }
        panic!("no {line}; there was {seen:?}");
    }
}

#[test]
fn the_manager_hears_of_ready_reload_and_stop() {
    let manager = Manager::listen();
    let site = Arc::new(Site::fresh(Options::default()));
    let broker = manager.start(&site);
    // Health is looked at in a separate task, which may be the first to speak.
    manager.expect_all(&["READY=1", "STATUS=serving"]);
    // The listeners were open before it reported READY.
    assert!(site.ready_file().exists());
    std::net::TcpStream::connect(broker.grpc).unwrap();

    broker.signal(Signal::HUP);
    let reloading = manager.expect("RELOADING=1");
    assert!(reloading.contains("\nMONOTONIC_USEC="), "{reloading}");
    manager.expect("READY=1");

    let (_, status) = broker.stop();
    assert!(status.success(), "{status}");
    manager.expect("STOPPING=1");
    assert!(!manager.drain().iter().any(|m| m.contains("READY=1")));
}

/// A broker that is stopped by a debugger, a full machine or a deadlock answers no probe; a token that is away is another
/// matter.
#[test]
fn the_watchdog_is_fed_by_the_process_and_not_by_the_token() {
    let manager = Manager::listen();
    let site = Arc::new(Site::fresh(Options::default()));
    let broker = manager.start(&site);
    for _ in 0..3 {
        manager.expect("WATCHDOG=1");
    }

    freeze(broker.pid());
    manager.drain();
    assert_eq!(manager.next(INTERVAL * 2), None);
    send(broker.pid(), Signal::CONT);
    manager.expect("WATCHDOG=1");

    let tokens = site.token.directory();
    let away = tokens.with_extension("away");
    fs::rename(&tokens, &away).unwrap();
    until("the broker to notice", || {
        site.log().contains("token-down").then_some(())
    });
    manager.drain();
    for _ in 0..3 {
        manager.expect("WATCHDOG=1");
    }
    fs::rename(&away, &tokens).unwrap();
}

/// The status listener is open to every local user, and the notifications do not depend on it.
#[test]
fn a_crowd_at_the_status_listener_does_not_stop_the_watchdog() {
    let manager = Manager::listen();
    let site = Arc::new(Site::fresh(Options::default()));
    let broker = manager.start(&site);
    manager.expect("WATCHDOG=1");
    let mut held = Vec::new();
    for _ in 0..3 {
        held.push(crowd(broker.status));
        manager.drain();
        // A new one, which was sent while the connections were there.
        manager.expect("WATCHDOG=1");
    }
    assert!(
        !site
            .log()
            .contains("did not answer its own request for /livez")
    );
}

/// Nobody listens, or nobody ever did: the broker serves all the same.
#[test]
fn a_manager_that_is_gone_stops_nothing() {
    let manager = Manager::listen();
    let site = Arc::new(Site::fresh(Options::default()));
    let broker = manager.start(&site);
    manager.expect("READY=1");
    let gone: &Path = &manager.address();
    fs::remove_file(gone).unwrap();
    drop(manager);
    until("a ping that nobody hears", || {
        site.log()
            .contains("cannot notify the service manager")
            .then_some(())
    });
    thread::sleep(INTERVAL);
    std::net::TcpStream::connect(broker.grpc).unwrap();
    let (_, status) = broker.stop();
    assert!(status.success(), "{status}");
}

/// `keybroker probe` is what a container's health check runs: alive and ready are different questions.
#[test]
fn a_probe_tells_alive_from_ready() {
    let broker = Broker::start(Options::default());
    let site = &broker.site;
    let status = broker.status.to_string();
    let probe = |question: &str| site.run(&["probe", question, "--status", &status]);
    assert_eq!(
        site.expect_ok(&["probe", "live", "--status", &status]),
        "alive\n"
    );
    assert_eq!(site.expect_ok(&["probe", "--status", &status]), "ready\n");

    let tokens = site.token.directory();
    let away = tokens.with_extension("away");
    fs::rename(&tokens, &away).unwrap();
    let finished = until("the broker to notice", || {
        let finished = probe("ready");
        (finished.code != Some(0)).then_some(finished)
    });
    assert_eq!(finished.code, Some(10), "{finished:#?}");
    assert!(
        finished.stderr.contains("not ready: token"),
        "{finished:#?}"
    );
    assert_eq!(probe("live").code, Some(0));
    fs::rename(&away, &tokens).unwrap();

    let site = broker.kill();
    let finished = site.run(&["probe", "live", "--status", &status, "--timeout-ms", "500"]);
    assert_eq!(finished.code, Some(11), "{finished:#?}");
}
