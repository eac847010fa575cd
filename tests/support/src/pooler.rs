//! `PgBouncer` in front of a PostgreSQL server.

use std::{
    fs,
    os::unix::net::UnixStream,
    process::{Child, Stdio},
    thread,
    time::{Duration, Instant},
};

use keybroker_store::Settings;

use crate::{
    ports::Port,
    servers::{Server, give, socket_settings, unprivileged},
};

const STARTED_WITHIN: Duration = Duration::from_secs(30);

/// A running `PgBouncer`, which ends with this value.
#[derive(Debug)]
pub struct Pooler {
    child: Child,
    settings: Settings,
    _port: Port,
}

impl Pooler {
    /// Starts one in this pool mode in front of a server, for one of its databases.
    pub fn start(server: &Server, database: &str, mode: &str) -> Self {
        let folder = server.folder().join(mode);
        fs::create_dir(&folder).unwrap();
        let port = Port::reserve();
        let socket = server.socket();
        let server_port = socket.extension().unwrap().to_str().unwrap();
        let configuration = folder.join("pgbouncer.ini");
        fs::write(
            &configuration,
            format!(
                "[databases]\n\
                 * = host={server_folder} port={server_port} user=admin\n\
                 [pgbouncer]\n\
                 listen_port = {port}\n\
                 unix_socket_dir = {folder}\n\
                 auth_type = any\n\
                 pool_mode = {mode}\n",
                server_folder = server.folder().display(),
                folder = folder.display(),
                port = port.number(),
            ),
        )
        .unwrap();
        give(&configuration, 0o600);
        give(&folder, 0o755);
        let child = unprivileged("pgbouncer", "KILL")
            .arg("--quiet")
            .arg(&configuration)
            .stdin(Stdio::null())
            .spawn()
            .expect("pgbouncer is not installed; run scripts/install.sh");
        let socket = folder.join(format!(".s.PGSQL.{}", port.number()));
        let begun = Instant::now();
        while UnixStream::connect(&socket).is_err() {
            assert!(begun.elapsed() < STARTED_WITHIN, "pgbouncer does not start");
            thread::sleep(Duration::from_millis(10));
        }
        let url = format!("postgres://admin@/{database}?socket={}", socket.display());
        Self {
            child,
            settings: socket_settings(url),
            _port: port,
        }
    }

    /// For clients of the pooler.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }
}

impl Drop for Pooler {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}
