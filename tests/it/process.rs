//! The running broker: the real binary as a process, its workers, signals to it.

use std::{
    fs,
    net::SocketAddr,
    process::{Child, Command, ExitStatus},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};

use keybroker_test_support::skip::skip;

use crate::site::{Options, Site};

/// Longest wait for the broker to start, to stop, or for anything else that should take far less.
pub(crate) const WAIT_MAX: Duration = Duration::from_secs(30);

/// Asks again until `probe` answers, at most for [`WAIT_MAX`].
pub(crate) fn until<T>(what: &str, probe: impl FnMut() -> Option<T>) -> T {
    until_within(WAIT_MAX, what, probe)
}

/// Asks again until `probe` answers, at most for `wait`.
pub(crate) fn until_within<T>(
    wait: Duration,
    what: &str,
    mut probe: impl FnMut() -> Option<T>,
) -> T {
    let deadline = Instant::now() + wait;
    while Instant::now() < deadline {
        if let Some(found) = probe() {
            return found;
        }
        thread::sleep(Duration::from_millis(10));
    }
    panic!("waited {wait:?} for {what}");
}

/// Whether a process here may have mounts of its own. If not, says what is not tested.
pub(crate) fn can_mount(what: &str) -> bool {
    let probe = Command::new("unshare").args(["--mount", "true"]).output();
    let can_mount = probe.is_ok_and(|output| output.status.success());
    if !can_mount {
        // Also in CI: an unprivileged container lacks no part that could be installed.
        skip(&format!("{what}: needs the right to mount"));
    }
    can_mount
}

/// A running `keybroker serve`. Killed when dropped; its log is shown when the test fails.
pub(crate) struct Broker {
    /// Where it runs.
    pub(crate) site: Arc<Site>,
    /// Address of the gRPC listener.
    pub(crate) grpc: SocketAddr,
    /// Addresses of all gRPC listeners, in the order of the configuration.
    pub(crate) listeners: Vec<SocketAddr>,
    /// Address of `/livez`, `/readyz` and `/metrics`.
    pub(crate) status: SocketAddr,
    child: Child,
}

impl Broker {
    /// A fresh site with a broker that serves.
    pub(crate) fn start(options: Options) -> Self {
        Self::start_on(Arc::new(Site::fresh(options)))
    }

    /// Starts on a site and waits until the ready file is there.
    pub(crate) fn start_on(site: Arc<Site>) -> Self {
        Self::start_as(site, Site::serve)
    }

    /// Like [`Broker::start_on`], with the signal ignored that the kernel sends at the limit of file sizes. With
    /// `prlimit` a test can then fill the disk of this process alone, without root and without a mount.
    pub(crate) fn start_limited(site: Arc<Site>) -> Self {
        Self::start_as(site, |site| {
            site.serve_through("trap '' XFSZ; exec \"$0\" \"$@\"")
        })
    }

    /// Starts by another command than [`Site::serve`], such as that with more in its environment.
    pub(crate) fn start_as(site: Arc<Site>, command: impl FnOnce(&Site) -> Command) -> Self {
        let mut child = site.spawn(command(&site));
        let deadline = Instant::now() + WAIT_MAX;
        let addresses = loop {
            if let Ok(text) = fs::read_to_string(site.ready_file()) {
                break loopback_addresses(&text);
            }
            let ended = child.try_wait().unwrap();
            if ended.is_some() || Instant::now() > deadline {
                child.kill().ok();
                child.wait().ok();
                panic!("the broker did not start ({ended:?}):\n{}", site.log());
            }
            thread::sleep(Duration::from_millis(10));
        };
        let [listeners @ .., status] = &addresses[..] else {
            panic!("the ready file names {addresses:?}")
        };
        Self {
            site,
            grpc: listeners[0],
            listeners: listeners.to_vec(),
            status: *status,
            child,
        }
    }

    /// Process id of the front.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal to the front alone.
    pub(crate) fn signal(&self, signal: Signal) {
        send(self.child.id(), signal);
    }

    /// SIGTERM, and waits for the end.
    pub(crate) fn stop(mut self) -> (Arc<Site>, ExitStatus) {
        self.signal(Signal::TERM);
        let status = self.wait();
        (Arc::clone(&self.site), status)
    }

    /// SIGKILL, and waits for the end.
    pub(crate) fn kill(mut self) -> Arc<Site> {
        self.signal(Signal::KILL);
        self.wait();
        Arc::clone(&self.site)
    }

    /// Waits for the end, however it comes.
    pub(crate) fn wait(&mut self) -> ExitStatus {
        let child = &mut self.child;
        until("the broker to end", || child.try_wait().unwrap())
    }

    /// Whether the front has not ended.
    pub(crate) fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Process ids of the token workers now alive.
    pub(crate) fn workers(&self) -> Vec<u32> {
        children_of(self.pid())
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
        if thread::panicking() {
            eprintln!("--- log of the broker ---\n{}", self.site.log());
        } else {
            self.site.assert_no_secrets();
        }
    }
}

/// Sends a signal to one process that this test started, or that its broker started.
pub(crate) fn send(pid: u32, signal: Signal) {
    let pid = Pid::from_raw(pid.try_into().unwrap()).unwrap();
    kill_process(pid, signal).unwrap();
}

/// Stops a process, and waits until each of its threads stands still: the signal alone does not wait for them.
pub(crate) fn freeze(pid: u32) {
    send(pid, Signal::STOP);
    until("the process to stand still", || {
        let threads = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
        threads
            .map(|thread| fs::read_to_string(thread.unwrap().path().join("stat")).unwrap())
            .all(|stat| {
                let (_, rest) = stat.rsplit_once(')').unwrap();
                rest.starts_with(" T")
            })
            .then_some(())
    });
}

/// Whether a process is alive: there, and not a zombie.
pub(crate) fn is_alive(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat"))
        .ok()
        .and_then(|stat| {
            stat.rsplit_once(')')
                .map(|(_, rest)| !rest.starts_with(" Z"))
        })
        .unwrap_or(false)
}

pub(crate) fn children_of(parent: u32) -> Vec<u32> {
    let mut children = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        else {
            continue;
        };
        let Ok(stat) = fs::read_to_string(entry.path().join("stat")) else {
            continue;
        };
        // After the name in brackets: state, parent.
        let field = |n| {
            stat.rsplit_once(") ")
                .and_then(|(_, rest)| rest.split(' ').nth(n))
        };
        if field(1) == Some(&parent.to_string()) && field(0) != Some("Z") {
            children.push(pid);
        }
    }
    children
}

/// The ready file names each listener's address in the order of the configuration, then that of the status listener.
fn loopback_addresses(text: &str) -> Vec<SocketAddr> {
    text.split(|c: char| !(c.is_ascii_digit() || c == '.' || c == ':'))
        .filter_map(|word| word.trim_matches(':').parse().ok())
        .collect()
}

#[test]
fn the_ready_file_may_be_lines_or_json() {
    let expected: Vec<SocketAddr> = vec![
        "127.0.0.1:1".parse().unwrap(),
        "127.0.0.1:2".parse().unwrap(),
    ];
    for text in [
        "listener 127.0.0.1:1\nstatus 127.0.0.1:2\n",
        r#"{"listeners":["127.0.0.1:1"],"status":"127.0.0.1:2"}"#,
    ] {
        assert_eq!(loopback_addresses(text), expected);
    }
}
