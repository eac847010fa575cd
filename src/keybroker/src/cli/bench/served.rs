//! The measured broker: a running broker, or a broker that is started for the measurement and stopped
//! afterwards.

use std::{
    fs::{self, DirBuilder},
    net::SocketAddr,
    os::unix::fs::DirBuilderExt as _,
    path::PathBuf,
    process::{Child, Stdio},
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process};
use serde::Deserialize;
use tokio::time::{Instant, sleep};
use uuid::Uuid;

use crate::{
    cli::{
        Context,
        exit::{Exit, Failure},
    },
    config::Config,
    server::Api,
    telemetry,
};

use super::{Arguments, bare};

/// Longest wait for the broker to open its listeners.
const START_TIMEOUT: Duration = Duration::from_mins(1);
const START_PAUSE: Duration = Duration::from_millis(50);

pub(super) struct Served {
    pub(super) pid: u32,
    pub(super) endpoint: String,
    pub(super) status: SocketAddr,
    _started: Option<Started>,
}

/// The broker that this command started, and the directory of its ready file.
struct Started {
    child: Child,
    folder: PathBuf,
}

#[derive(Deserialize)]
struct Ready {
    listeners: Vec<SocketAddr>,
    status: SocketAddr,
}

impl Served {
    pub(super) async fn start(
        arguments: &Arguments,
        context: &Context,
        config: &Config,
    ) -> Result<Self, Failure> {
        if let (Some(pid), Some(endpoint)) = (arguments.attach, &arguments.connection.endpoint) {
            return Ok(Self {
                pid,
                endpoint: endpoint.clone(),
                status: arguments.status.unwrap_or(config.status.address),
                _started: None,
            });
        }
        let listener = config
            .listeners
            .iter()
            .position(|listener| listener.apis.contains(&Api::Grpc))
            .ok_or_else(|| {
                Failure::new(Exit::Configuration, "no [[listener]] has `grpc` in `apis`")
            })?;
        let mut started = Started::spawn(context)?;
        let ready = started.wait().await?;
        let address = ready.listeners.get(listener).ok_or_else(|| {
            Failure::new(
                Exit::Internal,
                "the ready file lists fewer listeners than the configuration",
            )
        })?;
        let named = arguments.connection.endpoint.clone();
        Ok(Self {
            pid: started.child.id(),
            endpoint: named.unwrap_or_else(|| format!("https://{address}")),
            status: ready.status,
            _started: Some(started),
        })
    }
}

impl Started {
    fn spawn(context: &Context) -> Result<Self, Failure> {
        let internal = |error: std::io::Error| Failure::new(Exit::Internal, error.to_string());
        // In a directory of mode 0700, no other user can create a ready file.
        let folder = std::env::temp_dir().join(format!("keybroker-bench-{}", Uuid::new_v4()));
        DirBuilder::new()
            .mode(0o700)
            .create(&folder)
            .map_err(internal)?;
        let child = bare::ourselves(context)?
            .arg("serve")
            .arg("--ready-file")
            .arg(folder.join("ready"))
            .env(telemetry::FILTER_VARIABLE, "warn")
            .stdout(Stdio::null())
            .spawn()
            .map_err(internal)?;
        Ok(Self { child, folder })
    }

    async fn wait(&mut self) -> Result<Ready, Failure> {
        let until = Instant::now() + START_TIMEOUT;
        while Instant::now() < until && matches!(self.child.try_wait(), Ok(None)) {
            if let Ok(text) = fs::read_to_string(self.folder.join("ready")) {
                return serde_json::from_str(&text)
                    .map_err(|error| Failure::new(Exit::Internal, error.to_string()));
            }
            sleep(START_PAUSE).await;
        }
        let failure = Failure::new(
            Exit::Unreachable,
            "the broker that was started for the measurement did not become \
         ready",
        );
        Err(failure.hint(
            "the broker's error message is shown above; to measure a running broker, pass --attach PID --endpoint URL",
        ))
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        if let Some(pid) = pid {
            let _ended_already = kill_process(pid, Signal::TERM);
        }
        let _reaped = self.child.wait();
        let _gone_already = fs::remove_dir_all(&self.folder);
    }
}
