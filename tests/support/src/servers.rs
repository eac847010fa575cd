//! Real database servers, started by the tests: each with its own data directory, sockets and port, and stopped by its process
//! id. No test uses a service that runs already.

use std::{
    fs,
    io::{Read as _, Write as _},
    os::unix::fs::{PermissionsExt as _, chown},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::{Duration, Instant},
};

use keybroker_store::Settings;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::ports::Port;

/// How long a server may take to start or to stop, on a machine that is busy with other tests.
const START_TIMEOUT: Duration = Duration::from_mins(1);
const REMEDY: &str = "run scripts/install.sh; the store's tests need real servers and do not skip";
/// The user that the servers run as when the tests run as root: neither server runs as root.
const UNPRIVILEGED: u32 = 65_534;

/// The database server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// PostgreSQL.
    PostgreSql,
    /// MariaDB.
    MariaDb,
}

/// A running server.
#[derive(Debug)]
pub struct Server {
    /// Which server it is.
    pub kind: Kind,
    folder: TempDir,
    /// Files of its clients: the server's folder belongs to the user it runs as, whom the broker does not trust.
    client: TempDir,
    port: Port,
    arguments: Vec<String>,
    child: Option<Child>,
    databases: AtomicU32,
}

/// A folder in memory, where there is enough: the tests make many small databases.
fn fast_folder() -> PathBuf {
    const ENOUGH_BYTES: u64 = 2 << 30;
    let memory = Path::new("/dev/shm");
    let free = rustix::fs::statvfs(memory).map_or(0, |stat| stat.f_bavail * stat.f_frsize);
    if free >= ENOUGH_BYTES {
        memory.to_owned()
    } else {
        std::env::temp_dir()
    }
}

fn as_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// The path of a program of the server's package; where several versions are installed, of the newest.
fn program(name: &str) -> PathBuf {
    let mut folders: Vec<PathBuf> = Vec::new();
    if let Ok(versions) = fs::read_dir("/usr/lib/postgresql") {
        folders.extend(versions.flatten().map(|version| version.path().join("bin")));
    }
    folders.sort_by_key(|path| {
        let version = path
            .parent()
            .and_then(Path::file_name)
            .and_then(|name| name.to_str());
        version.and_then(|version| version.parse::<u32>().ok())
    });
    folders.reverse();
    let path = std::env::var_os("PATH").unwrap_or_default();
    folders.extend(std::env::split_paths(&path));
    folders.extend(["/usr/sbin", "/usr/local/sbin", "/sbin"].map(PathBuf::from));
    folders
        .into_iter()
        .map(|folder| folder.join(name))
        .find(|path| path.exists())
        .unwrap_or_else(|| panic!("{name} is not installed; {REMEDY}"))
}

/// A command that ends with this process (by the signal `end`) and does not run as root.
pub fn unprivileged(name: &str, end: &str) -> Command {
    let mut command = Command::new("setpriv");
    if as_root() {
        let nobody = UNPRIVILEGED.to_string();
        command.args(["--reuid", &nobody, "--regid", &nobody, "--clear-groups"]);
    }
    command.args(["--pdeathsig", end, "--"]).arg(program(name));
    // The unprivileged user may not be able to enter the current directory.
    command.current_dir("/").env("LC_ALL", "C");
    command
}

/// Settings for a database behind a socket of the user that the servers run as.
pub fn socket_settings(url: String) -> Settings {
    Settings {
        socket_users: Some(vec![UNPRIVILEGED.to_string()]),
        ..Settings::new(url)
    }
}

/// The lines of the section `[store]` for settings that [`socket_settings`] made.
pub fn section(settings: &Settings) -> String {
    let users = settings.socket_users.as_deref().unwrap_or_default();
    format!(
        "url = \"{}\"\nsocket_users = {users:?}",
        settings.url.as_str()
    )
}

fn expect_ok(what: &str, output: &Output) {
    assert!(
        output.status.success(),
        "{what}: {}\n{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

/// Gives a file to the user that the servers run as.
pub fn give(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    if as_root() {
        chown(path, Some(UNPRIVILEGED), Some(UNPRIVILEGED)).unwrap();
    }
}

impl Server {
    /// Makes a data directory and starts a server on it.
    pub fn start(kind: Kind) -> Self {
        Self::start_with(kind, |_| Vec::new())
    }

    /// The same, with further arguments, which may name files in the server's folder.
    pub fn start_with(kind: Kind, arguments: impl FnOnce(&Path) -> Vec<String>) -> Self {
        let folder = tempfile::Builder::new()
            .prefix("keybroker-db-")
            .tempdir_in(fast_folder())
            .unwrap();
        give(folder.path(), 0o755);
        let data = folder.path().join("data");
        fs::create_dir(&data).unwrap();
        give(&data, 0o700);
        let mut server = Self {
            kind,
            port: Port::reserve(),
            arguments: arguments(folder.path()),
            folder,
            client: tempfile::tempdir().unwrap(),
            child: None,
            databases: AtomicU32::new(0),
        };
        server.initialise();
        server.run();
        server
    }

    fn data(&self) -> String {
        self.folder.path().join("data").display().to_string()
    }

    fn initialise(&self) {
        let mut command = match self.kind {
            Kind::PostgreSql => {
                let mut command = unprivileged("initdb", "KILL");
                command.args([
                    "--no-sync",
                    "--encoding=UTF8",
                    "--locale=C",
                    "--username=admin",
                ]);
                command.args([
                    "--auth-local=trust",
                    "--auth-host=scram-sha-256",
                    "-D",
                    &self.data(),
                ]);
                command
            }
            Kind::MariaDb => {
                let mut command = unprivileged("mariadb-install-db", "KILL");
                command.args(["--no-defaults", "--auth-root-authentication-method=normal"]);
                command.args(["--skip-test-db", "--skip-name-resolve"]);
                command
                    .arg("--innodb-log-file-size=16M")
                    .arg(format!("--datadir={}", self.data()));
                command
            }
        };
        // MariaDB names temporary files by its process id, which another PID namespace may have as well.
        command.env("TMPDIR", self.folder.path());
        let output = command.stdin(Stdio::null()).output();
        expect_ok("cannot make a database cluster", &output.expect(REMEDY));
    }

    /// Starts the server on its data directory and waits until it answers.
    pub fn run(&mut self) {
        let folder = self.folder.path().display().to_string();
        let log = fs::File::options()
            .create(true)
            .append(true)
            .open(self.log_file())
            .unwrap();
        let mut command = match self.kind {
            Kind::PostgreSql => {
                let mut command = unprivileged("postgres", "INT");
                command.args([
                    "-D",
                    &self.data(),
                    "-k",
                    &folder,
                    "-p",
                    &self.port.number().to_string(),
                ]);
                command.args([
                    "-c",
                    "listen_addresses=127.0.0.1",
                    // In the data directory and not in /dev/shm, where a server that is killed leaves it behind.
                    "-c",
                    "dynamic_shared_memory_type=mmap",
                    "-c",
                    "shared_buffers=16MB",
                ]);
                command
            }
            Kind::MariaDb => {
                let mut command = unprivileged("mariadbd", "TERM");
                command
                    .arg("--no-defaults")
                    .arg(format!("--datadir={}", self.data()));
                command.arg(format!("--socket={}", self.socket().display()));
                command
                    .arg(format!("--pid-file={folder}/pid"))
                    .arg(format!("--port={}", self.port.number()));
                command.args(["--bind-address=127.0.0.1", "--innodb-buffer-pool-size=16M"]);
                command.args(["--innodb-log-file-size=16M", "--performance-schema=OFF"]);
                command
            }
        };
        command
            .args(&self.arguments)
            .env("TMPDIR", &folder)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        self.child = Some(command.spawn().expect(REMEDY));
        let deadline = Instant::now() + START_TIMEOUT;
        while !self.try_sql("", "SELECT 1").status.success() {
            let ended = self.child.as_mut().unwrap().try_wait().unwrap();
            if ended.is_some() || Instant::now() > deadline {
                let log = fs::read_to_string(self.log_file()).unwrap_or_default();
                // PostgreSQL does not start while a process of a killed server is still ending.
                let end = log.lines().rev().take(3);
                let too_early = end.into_iter().any(|line| line.contains("is still in use"));
                if ended.is_some() && too_early && Instant::now() < deadline {
                    thread::sleep(Duration::from_millis(50));
                    self.child = Some(command.spawn().expect(REMEDY));
                    continue;
                }
                panic!("the server did not start ({ended:?}):\n{log}");
            }
            thread::sleep(Duration::from_millis(50));
        }
    }

    /// The same, with other further arguments.
    pub fn run_with(&mut self, arguments: Vec<String>) {
        self.arguments = arguments;
        self.run();
    }

    fn log_file(&self) -> PathBuf {
        self.folder.path().join("log")
    }

    /// Path of the socket that the server listens on.
    pub fn socket(&self) -> PathBuf {
        self.folder.path().join(match self.kind {
            Kind::PostgreSql => format!(".s.PGSQL.{}", self.port.number()),
            Kind::MariaDb => "socket".to_owned(),
        })
    }

    /// The server's folder.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Folder of files for clients, which belong to the user who runs the tests.
    pub fn client_folder(&self) -> &Path {
        self.client.path()
    }

    /// The id of the server's main process.
    pub fn pid(&self) -> Pid {
        Pid::from_child(self.child.as_ref().expect("it runs"))
    }

    /// Sends a signal to the server's main process.
    pub fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).unwrap();
    }

    /// Sends a signal to every process of the server.
    pub fn signal_all(&self, signal: Signal) {
        let children = children_of(self.pid());
        self.signal(signal);
        for child in children {
            // It may have ended meanwhile.
            let _gone = kill_process(child, signal);
        }
    }

    /// Stops it in order, but without waiting for its clients.
    pub fn stop(&mut self) {
        self.end(match self.kind {
            Kind::PostgreSql => Signal::INT,
            Kind::MariaDb => Signal::TERM,
        });
    }

    /// Sends SIGKILL to every process of the server: as when its machine loses power, except that the kernel keeps its buffers.
    pub fn kill(&mut self) {
        self.signal_all(Signal::KILL);
        self.wait();
    }

    fn end(&mut self, signal: Signal) {
        self.signal(signal);
        self.wait();
    }

    fn wait(&mut self) {
        let deadline = Instant::now() + START_TIMEOUT;
        let child = self.child.as_mut().unwrap();
        while child.try_wait().unwrap().is_none() {
            assert!(Instant::now() < deadline, "the server did not end");
            thread::sleep(Duration::from_millis(5));
        }
        self.child = None;
    }

    fn try_sql(&self, database: &str, statements: &str) -> Output {
        let mut command = match self.kind {
            Kind::PostgreSql => {
                let mut command = Command::new(program("psql"));
                let database = if database.is_empty() {
                    "postgres"
                } else {
                    database
                };
                command.args([
                    "-X",
                    "-q",
                    "-A",
                    "-t",
                    "-v",
                    "ON_ERROR_STOP=1",
                    "-U",
                    "admin",
                ]);
                command.args(["-h", &self.folder.path().display().to_string()]);
                let port = self.port.number().to_string();
                command.args(["-p", &port, "-d", database, "-f", "-"]);
                command
            }
            Kind::MariaDb => {
                let mut command = Command::new(program("mariadb"));
                command.args([
                    "--no-defaults",
                    "-u",
                    "root",
                    "--batch",
                    "--skip-column-names",
                    "--binary-as-hex",
                ]);
                command
                    .arg(format!("--socket={}", self.socket().display()))
                    .arg(database);
                command
            }
        };
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command
            .spawn()
            .unwrap_or_else(|error| panic!("{error}; {REMEDY}"));
        // It may end at once when the server is not there.
        let _broken = child.stdin.take().unwrap().write_all(statements.as_bytes());
        let mut output = Output {
            status: std::process::ExitStatus::default(),
            stdout: Vec::new(),
            stderr: Vec::new(),
        };
        child
            .stdout
            .take()
            .unwrap()
            .read_to_end(&mut output.stdout)
            .unwrap();
        child
            .stderr
            .take()
            .unwrap()
            .read_to_end(&mut output.stderr)
            .unwrap();
        output.status = child.wait().unwrap();
        output
    }

    /// Runs SQL as the administrator, with the server's own client.
    pub fn sql(&self, database: &str, statements: &str) -> String {
        let output = self.try_sql(database, statements);
        expect_ok(statements, &output);
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// A new, empty database. On PostgreSQL with a locale that does not compare bytewise, where the version has one.
    pub fn database(&self) -> String {
        let name = format!("keys{}", self.databases.fetch_add(1, Ordering::Relaxed));
        match self.kind {
            Kind::PostgreSql => {
                let version: u32 = self
                    .sql("", "SHOW server_version_num")
                    .trim()
                    .parse()
                    .unwrap();
                let locale = if version >= 150_000 {
                    "LOCALE_PROVIDER icu ICU_LOCALE 'en-US'"
                } else {
                    ""
                };
                self.sql(
                    "",
                    &format!("CREATE DATABASE {name} TEMPLATE template0 {locale}"),
                );
            }
            Kind::MariaDb => {
                self.sql("", &format!("CREATE DATABASE {name}"));
            }
        }
        name
    }

    /// Settings that reach a database through the socket.
    pub fn settings(&self, database: &str) -> Settings {
        let socket = self.socket();
        socket_settings(match self.kind {
            Kind::PostgreSql => format!("postgres://admin@/{database}?socket={}", socket.display()),
            Kind::MariaDb => format!("mysql://root@/{database}?socket={}", socket.display()),
        })
    }

    /// Settings that reach a database over the network, with the password in a file.
    pub fn network_settings(&self, host: &str, database: &str) -> Settings {
        let password = "hunter2";
        let scheme = match self.kind {
            Kind::PostgreSql => {
                let known = self.sql("", "SELECT 1 FROM pg_roles WHERE rolname = 'keybroker'");
                if known.is_empty() {
                    let create = format!("CREATE ROLE keybroker LOGIN PASSWORD '{password}'");
                    self.sql("", &create);
                }
                self.sql("", &format!("ALTER DATABASE {database} OWNER TO keybroker"));
                "postgres"
            }
            Kind::MariaDb => {
                self.sql(
                    "",
                    &format!(
                        "CREATE OR REPLACE USER keybroker@'127.0.0.1' IDENTIFIED BY '{password}'; \
                         CREATE OR REPLACE USER keybroker@localhost IDENTIFIED BY '{password}'; \
                         GRANT ALL ON {database}.* TO keybroker@'127.0.0.1', keybroker@localhost"
                    ),
                );
                "mysql"
            }
        };
        let file = self.client_folder().join("password");
        fs::write(&file, format!("{password}\n")).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
        Settings {
            password_file: Some(file),
            ..Settings::new(format!(
                "{scheme}://keybroker@{host}:{}/{database}",
                self.port.number()
            ))
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let running = self.child.as_mut().map(Child::try_wait);
        if matches!(running, Some(Ok(None))) {
            // Also when it was stopped by SIGSTOP.
            self.signal_all(Signal::CONT);
            self.kill();
        }
        if thread::panicking() {
            let log = fs::read_to_string(self.log_file()).unwrap_or_default();
            let tail: Vec<_> = log.lines().rev().take(30).collect();
            eprintln!(
                "--- end of the {:?} log, newest first ---\n{}",
                self.kind,
                tail.join("\n")
            );
        }
    }
}

fn children_of(parent: Pid) -> Vec<Pid> {
    let mut children = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Ok(stat) = fs::read_to_string(entry.path().join("stat")) else {
            continue;
        };
        // After the name in brackets: state, parent.
        let found = stat
            .rsplit_once(") ")
            .and_then(|(_, rest)| rest.split(' ').nth(1));
        if found == Some(&parent.as_raw_nonzero().to_string())
            && let Some(pid) = entry
                .file_name()
                .to_str()
                .and_then(|name| name.parse().ok())
        {
            children.extend(Pid::from_raw(pid));
        }
    }
    children
}
