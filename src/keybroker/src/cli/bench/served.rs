//! The measured broker: a running broker, or a broker that is started for the measurement and stopped
//! afterwards.

use std::{
    fs::{self, DirBuilder, OpenOptions},
    io::Write as _,
    net::SocketAddr,
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    process::{Child, Stdio},
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process};
use serde::Deserialize;
use tokio::time::{Instant, sleep};
use toml::{Table, Value};
use uuid::Uuid;

use crate::{
    cli::exit::{Exit, Failure},
    server::Api,
    telemetry,
};

use super::{Bench, bare, internal};

/// Maximum wait for the broker to open its listeners, and for the broker to exit.
const START_TIMEOUT: Duration = Duration::from_mins(1);
const START_PAUSE: Duration = Duration::from_millis(50);
const STOP_PAUSE: Duration = Duration::from_millis(5);

pub(super) struct Served {
    pub(super) pid: u32,
    pub(super) endpoint: String,
    pub(super) status: SocketAddr,
    /// The addresses of the started broker's listeners, in the order of the configuration.
    pub(super) listeners: Vec<SocketAddr>,
    started: Option<Started>,
}

/// A private directory for the files of a broker that this command starts. Dropping this value
/// removes the directory.
pub(super) struct Folder(PathBuf);

impl Folder {
    /// In a directory of mode 0700, no other user can create a ready file or change a configuration.
    pub(super) fn create() -> Result<Self, Failure> {
        let path = std::env::temp_dir().join(format!("keybroker-bench-{}", Uuid::new_v4()));
        DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .map_err(internal)?;
        Ok(Self(path))
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }

    pub(super) fn write(&self, name: &str, text: &str) -> Result<PathBuf, Failure> {
        let path = self.0.join(name);
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&path)
            .map_err(internal)?;
        file.write_all(text.as_bytes()).map_err(internal)?;
        Ok(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _gone_already = fs::remove_dir_all(&self.0);
    }
}

/// A changed copy of the configuration, for the broker that this command starts. The operator's
/// file is not changed, and the copy is removed together with its directory.
pub(super) struct Changed {
    pub(super) folder: Folder,
    pub(super) configuration: Table,
}

impl Changed {
    /// Copies the configuration.
    pub(super) fn copy_of(bench: &Bench<'_>) -> Result<Self, Failure> {
        let text = fs::read_to_string(bench.context.config_file()).map_err(internal)?;
        Ok(Self {
            folder: Folder::create()?,
            configuration: toml::from_str(&text).map_err(internal)?,
        })
    }

    /// Adds a table to an array of tables.
    pub(super) fn push(&mut self, array: &str, table: Table) -> Result<(), Failure> {
        let tables = self
            .configuration
            .entry(array)
            .or_insert_with(|| Value::Array(Vec::new()));
        let tables = tables.as_array_mut();
        let tables = tables.ok_or_else(|| internal(format!("`{array}` is not an array")))?;
        tables.push(Value::Table(table));
        Ok(())
    }

    /// Sets the address of a listener.
    fn set_address(&mut self, listener: usize, address: SocketAddr) {
        let listeners = self.configuration.get_mut("listener");
        let tables = listeners.and_then(Value::as_array_mut);
        let table = tables
            .and_then(|tables| tables.get_mut(listener))
            .and_then(Value::as_table_mut);
        if let Some(table) = table {
            table.insert("address".to_owned(), address.to_string().into());
        }
    }
}

/// The broker that this command started, and the directory of its ready file.
struct Started {
    child: Child,
    folder: Folder,
    configuration: PathBuf,
}

#[derive(Deserialize)]
struct Ready {
    listeners: Vec<SocketAddr>,
    status: SocketAddr,
}

/// The durations of the stop and of the start in a restart.
#[derive(Clone, Copy, Debug)]
pub(super) struct RestartTime {
    /// Time from SIGTERM to the end of the process.
    pub(super) stop: Duration,
    /// Time from the start of the next process until its listeners accept connections.
    pub(super) start: Duration,
}

impl Served {
    /// Uses the running broker of `--attach`, or starts a broker with the changed configuration or,
    /// without changes, with the operator's configuration.
    pub(super) async fn start(
        bench: &Bench<'_>,
        changed: Option<Changed>,
    ) -> Result<Self, Failure> {
        let arguments = bench.arguments;
        if let (Some(pid), Some(endpoint)) = (arguments.attach, &arguments.connection.endpoint) {
            return Ok(Self {
                pid,
                endpoint: endpoint.clone(),
                status: arguments.status.unwrap_or(bench.config.status.address),
                listeners: Vec::new(),
                started: None,
            });
        }
        let listener = bench
            .config
            .listeners
            .iter()
            .position(|listener| listener.apis.contains(&Api::Grpc))
            .ok_or_else(|| {
                Failure::new(Exit::Configuration, "no [[listener]] has `grpc` in `apis`")
            })?;
        let (folder, configuration) = match changed {
            None => (Folder::create()?, bench.context.config_file().to_owned()),
            Some(changed) => {
                let text = toml::to_string(&changed.configuration).map_err(internal)?;
                let path = changed.folder.write("keybroker.toml", &text)?;
                (changed.folder, path)
            }
        };
        let mut started = Started::spawn(folder, configuration)?;
        let ready = started.wait().await?;
        let address = ready.listeners.get(listener).ok_or_else(|| {
            internal("the ready file lists fewer listeners than the configuration")
        })?;
        let named = arguments.connection.endpoint.clone();
        Ok(Self {
            pid: started.child.id(),
            endpoint: named.unwrap_or_else(|| format!("https://{address}")),
            status: ready.status,
            listeners: ready.listeners,
            started: Some(started),
        })
    }

    /// Starts a broker whose listeners have the same addresses after each restart, even if the
    /// configuration has port 0.
    pub(super) async fn start_with_fixed_addresses(bench: &Bench<'_>) -> Result<Self, Failure> {
        let first = Self::start(bench, None).await?;
        let mut changed = Changed::copy_of(bench)?;
        for (number, address) in first.listeners.iter().enumerate() {
            changed.set_address(number, *address);
        }
        drop(first);
        Self::start(bench, Some(changed)).await
    }

    /// Stops the broker with SIGTERM and starts it again.
    pub(super) async fn restart(&mut self) -> Result<RestartTime, Failure> {
        let Some(started) = &mut self.started else {
            return Err(internal(
                "`bench` cannot restart a broker that it did not start",
            ));
        };
        let began = Instant::now();
        started.terminate();
        while started.child.try_wait().map_err(internal)?.is_none() {
            if began.elapsed() > START_TIMEOUT {
                let what = "the broker did not end within a minute after SIGTERM";
                return Err(Failure::new(Exit::Verification, what)
                    .hint("warnings of the broker, if any, are shown above"));
            }
            sleep(STOP_PAUSE).await;
        }
        let stop = began.elapsed();
        let began = Instant::now();
        started.start()?;
        let ready = started.wait().await?;
        self.pid = started.child.id();
        self.status = ready.status;
        Ok(RestartTime {
            stop,
            start: began.elapsed(),
        })
    }
}

impl Started {
    fn spawn(folder: Folder, configuration: PathBuf) -> Result<Self, Failure> {
        let child = serve(&configuration, &folder)?;
        Ok(Self {
            child,
            folder,
            configuration,
        })
    }

    /// Starts the next process after the previous process has ended.
    fn start(&mut self) -> Result<(), Failure> {
        self.child = serve(&self.configuration, &self.folder)?;
        Ok(())
    }

    async fn wait(&mut self) -> Result<Ready, Failure> {
        let until = Instant::now() + START_TIMEOUT;
        while Instant::now() < until && matches!(self.child.try_wait(), Ok(None)) {
            if let Ok(text) = fs::read_to_string(ready_file(&self.folder)) {
                return serde_json::from_str(&text).map_err(internal);
            }
            sleep(START_PAUSE).await;
        }
        let what = "the broker that was started for the measurement did not become ready";
        Err(Failure::new(Exit::Unreachable, what).hint(
            "the broker's error message is shown above; to measure a running broker, pass --attach PID --endpoint URL",
        ))
    }

    fn terminate(&self) {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        if let Some(pid) = pid {
            let _ended_already = kill_process(pid, Signal::TERM);
        }
    }
}

fn ready_file(folder: &Folder) -> PathBuf {
    folder.path().join("ready")
}

/// Starts a broker. An existing ready file is removed first, so that the file of the previous
/// process is not read.
fn serve(configuration: &Path, folder: &Folder) -> Result<Child, Failure> {
    let ready_file = ready_file(folder);
    let _none_yet = fs::remove_file(&ready_file);
    bare::ourselves(configuration)?
        .arg("serve")
        .arg("--ready-file")
        .arg(ready_file)
        .env(telemetry::FILTER_VARIABLE, "warn")
        .stdout(Stdio::null())
        .spawn()
        .map_err(internal)
}

impl Drop for Started {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            self.terminate();
        }
        let _reaped = self.child.wait();
    }
}
