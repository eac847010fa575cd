//! Its own installation for each test: token, certificates, database, audit log, configuration, and the commands
//! of the real binary on it.

use std::{
    fmt::Write as _,
    fs,
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;
use tempfile::TempDir;

use crate::{
    client,
    pki::{self, Pki},
    process::WAIT_MAX,
    softhsm::{self, Token},
};

/// What a test wants otherwise than the default.
pub(crate) struct Options {
    /// Modulus length of the wrapping key.
    pub(crate) rsa_bits: u32,
    /// `[token] workers`.
    pub(crate) workers: usize,
    /// `[token] sessions_per_worker`.
    pub(crate) sessions_per_worker: usize,
    /// Lines for the `[limits]` section.
    pub(crate) limits: String,
    /// Lines for the `[store]` section, instead of those for a SQLite file.
    pub(crate) store: Option<String>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            rsa_bits: 2048,
            workers: 1,
            sessions_per_worker: 2,
            limits: String::new(),
            store: None,
        }
    }
}

/// Token, certificates, database, audit log and configuration: everything but a running broker.
pub(crate) struct Site {
    folder: TempDir,
    options: Options,
    /// The token.
    pub(crate) token: Token,
    /// The certificates.
    pub(crate) pki: Pki,
}

impl Site {
    /// Ready to serve: schema migrated, one wrapping key generated and registered by the real commands.
    pub(crate) fn fresh(options: Options) -> Self {
        let site = Self::without_keys(options);
        let bits = site.options.rsa_bits.to_string();
        site.expect_ok(&["store", "migrate"]);
        site.expect_ok(&["key", "generate", "--bits", &bits]);
        site
    }

    /// A token without keys and no database yet.
    pub(crate) fn without_keys(options: Options) -> Self {
        let site = Self {
            folder: tempfile::Builder::new()
                .prefix("keybroker-site-")
                .tempdir()
                .unwrap(),
            options,
            token: Token::fresh(),
            pki: Pki::fresh(),
        };
        fs::create_dir(site.data_directory()).unwrap();
        site.write_configuration(|_| {});
        site
    }

    /// Writes the configuration anew, after `edit` has changed its text.
    pub(crate) fn write_configuration(&self, edit: impl FnOnce(&mut String)) {
        let mut text = self.configuration();
        edit(&mut text);
        fs::write(self.configuration_file(), text).unwrap();
    }

    /// Edits the configuration as it is.
    pub(crate) fn edit_configuration(&self, edit: impl FnOnce(&mut String)) {
        let mut text = fs::read_to_string(self.configuration_file()).unwrap();
        edit(&mut text);
        fs::write(self.configuration_file(), text).unwrap();
    }

    /// Replaces the first occurrence of a text in the configuration, which must have it.
    pub(crate) fn replace_once(&self, from: &str, to: &str) {
        self.write_configuration(|text| {
            assert!(text.contains(from), "{from}");
            *text = text.replacen(from, to, 1);
        });
    }

    /// A new directory of policies. The configuration is written anew and names it.
    pub(crate) fn policy_directory(&self) -> PathBuf {
        let directory = self.folder().join("policies");
        fs::create_dir(&directory).unwrap();
        self.write_configuration(|text| text.push_str(&policy_section(&directory)));
        directory
    }

    fn configuration(&self) -> String {
        let mut text = format!(
            r#"
[token]
module = "{module}"
label = "{label}"
pin_file = "{pin}"
workers = {workers}
sessions_per_worker = {sessions}
allow_oaep_sha1 = true

[token.environment]
SOFTHSM2_CONF = "{softhsm}"

[store]
{store}

[audit]
directory = "{audit}"

[status]
address = "127.0.0.1:0"

[[listener]]
address = "127.0.0.1:0"
apis = ["grpc", "admin"]

[listener.tls]
certificate_file = "{certificate}"
key_file = "{key}"
client_ca_file = "{ca}"

[limits]
{limits}
"#,
            module = softhsm::module().display(),
            label = self.token.label(),
            pin = self.token.pin_file().display(),
            workers = self.options.workers,
            sessions = self.options.sessions_per_worker,
            softhsm = self.token.configuration().display(),
            store =
                self.options.store.clone().unwrap_or_else(|| {
                    format!("url = \"sqlite:{}\"", self.database().display())
                }),
            audit = self.audit_directory().display(),
            certificate = self.pki.certificate_file("server").display(),
            key = self.pki.key_file("server").display(),
            ca = self.pki.ca_file().display(),
            limits = self.options.limits,
        );
        for (client, role) in pki::PRINCIPALS {
            write!(
                text,
                "\n[[principal]]\nsan = \"URI:{}\"\nroles = [\"{role}\"]\nkey_names = [\"*\"]\n",
                pki::uri(client)
            )
            .unwrap();
        }
        text
    }

    /// Folder of everything but token and certificates.
    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The configuration file.
    pub(crate) fn configuration_file(&self) -> PathBuf {
        self.folder().join("keybroker.toml")
    }

    /// Folder of the SQLite file and nothing else.
    pub(crate) fn data_directory(&self) -> PathBuf {
        self.folder().join("data")
    }

    /// The SQLite file.
    pub(crate) fn database(&self) -> PathBuf {
        self.data_directory().join("keybroker.db")
    }

    /// `[audit] directory`.
    pub(crate) fn audit_directory(&self) -> PathBuf {
        self.folder().join("audit")
    }

    /// The folder of the log that commands write. Beside the logs there is the state directory, in no particular order.
    pub(crate) fn log_of_commands(&self) -> PathBuf {
        let is_of_commands = |path: &PathBuf| {
            let name = path.file_name().and_then(|name| name.to_str());
            name.is_some_and(|name| name.starts_with("cli-"))
        };
        let entries = fs::read_dir(self.audit_directory()).unwrap();
        let mut paths = entries.map(|entry| entry.unwrap().path());
        paths.find(is_of_commands).unwrap()
    }

    /// What the broker wrote to its standard output and error, over all its runs.
    pub(crate) fn log_file(&self) -> PathBuf {
        self.folder().join("broker.log")
    }

    /// The log so far.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.log_file()).unwrap_or_default()
    }

    /// All lines of the audit log that the broker and the commands wrote.
    pub(crate) fn audit(&self) -> String {
        let mut text = String::new();
        let mut folders = vec![self.audit_directory()];
        while let Some(folder) = folders.pop() {
            let Ok(entries) = fs::read_dir(folder) else {
                continue;
            };
            for entry in entries.flatten() {
                if entry.path().is_dir() {
                    folders.push(entry.path());
                } else if entry
                    .path()
                    .extension()
                    .is_none_or(|extension| extension != "jsonl")
                {
                    // What the instance remembers is no line of the log.
                } else if let Ok(part) = fs::read_to_string(entry.path()) {
                    text += &part;
                }
            }
        }
        text
    }

    /// The entries of an action in the audit log.
    pub(crate) fn entries(&self, action: &str) -> Vec<Value> {
        let audit = self.audit();
        let entries = audit
            .lines()
            .map(|line| serde_json::from_str::<Value>(line).unwrap());
        entries.filter(|entry| entry["action"] == action).collect()
    }

    /// Neither log nor audit shows key material or the PIN. Every broker is checked when it is dropped.
    pub(crate) fn assert_no_secrets(&self) {
        for (what, text) in [("the log", self.log()), ("the audit log", self.audit())] {
            assert!(!text.contains(self.token.pin()), "{what} shows the PIN");
            client::assert_no_material(what, text.as_bytes());
        }
    }

    /// The real binary with this configuration. `KEYBROKER_TEST_PROGRAM` names another build of it, such as the release build for
    /// the figures of docs/reliability.md.
    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let program = std::env::var_os("KEYBROKER_TEST_PROGRAM");
        let mut command =
            Command::new(program.unwrap_or_else(|| env!("CARGO_BIN_EXE_keybroker").into()));
        command
            .arg("--config")
            .arg(self.configuration_file())
            .args(arguments)
            .stdin(Stdio::null());
        command
    }

    /// Runs a one-shot command to its end.
    pub(crate) fn run(&self, arguments: &[&str]) -> Finished {
        Finished::from(self.command(arguments).output().unwrap())
    }

    /// Runs a one-shot command that must succeed, and returns its standard output.
    pub(crate) fn expect_ok(&self, arguments: &[&str]) -> String {
        let finished = self.run(arguments);
        assert_eq!(finished.code, Some(0), "{arguments:?}: {finished:#?}");
        finished.stdout
    }

    /// `serve` with a ready file.
    pub(crate) fn serve(&self) -> Command {
        let ready_file = self.ready_file();
        self.command(&["serve", "--ready-file", ready_file.to_str().unwrap()])
    }

    /// `serve` started by a line of shell that ends in `exec "$0" "$@"`.
    pub(crate) fn serve_through(&self, line: &str) -> Command {
        let plain = self.serve();
        let mut shell = Command::new("sh");
        shell
            .args(["-c", line])
            .arg(plain.get_program())
            .args(plain.get_args());
        shell
    }

    /// Written by `serve` once it accepts calls.
    pub(crate) fn ready_file(&self) -> PathBuf {
        self.folder().join("ready")
    }

    /// Starts `serve` in the background; what it prints goes to the log file.
    pub(crate) fn spawn(&self, mut command: Command) -> Child {
        fs::remove_file(self.ready_file()).ok();
        let log = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.log_file())
            .unwrap();
        command
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap()
    }

    /// Runs `serve` when it is expected to give up by itself, at most for [`WAIT_MAX`].
    pub(crate) fn serve_to_its_end(&self) -> Finished {
        self.run_to_its_end(self.serve())
    }

    /// Runs a command that is expected to end by itself, at most for [`WAIT_MAX`].
    pub(crate) fn run_to_its_end(&self, mut command: Command) -> Finished {
        fs::remove_file(self.ready_file()).ok();
        let [out, err] = ["out", "err"].map(|name| self.folder().join(name));
        let mut child = command
            .stdin(Stdio::null())
            .stdout(fs::File::create(&out).unwrap())
            .stderr(fs::File::create(&err).unwrap())
            .spawn()
            .unwrap();
        let deadline = Instant::now() + WAIT_MAX;
        while child.try_wait().unwrap().is_none() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(10));
        }
        child.kill().ok();
        Finished {
            code: child.wait().unwrap().code(),
            stdout: fs::read_to_string(out).unwrap(),
            stderr: fs::read_to_string(err).unwrap(),
        }
    }

    /// Runs SQL on the database while no broker has it open.
    pub(crate) fn sql(&self, statements: &str) -> String {
        let output = Command::new("sqlite3")
            // A broker that serves writes beside it: wait for its lock instead of failing at once.
            .args(["-bail", "-batch", "-cmd", ".timeout 10000"])
            .arg(self.database())
            .arg(statements)
            .output()
            .unwrap_or_else(|error| panic!("sqlite3: {error}; run scripts/install.sh"));
        assert!(output.status.success(), "{statements}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }
}

/// Another process that holds the write lock of a SQLite database, until it is released or dropped.
pub(crate) struct WriteLock(Child);

impl WriteLock {
    /// Takes the lock of this file; returns when it is held.
    pub(crate) fn take(file: &Path) -> Self {
        let mut holder = Command::new("sqlite3")
            // A broker that serves writes beside it: wait for its lock instead of failing at once.
            .args(["-bail", "-batch", "-cmd", ".timeout 30000"])
            .args(["-cmd", "BEGIN IMMEDIATE", "-cmd", "SELECT 'held'"])
            .arg(file)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("sqlite3: {error}; run scripts/install.sh"));
        let mut line = String::new();
        let output = BufReader::new(holder.stdout.take().unwrap()).read_line(&mut line);
        assert_eq!((output.unwrap(), line.as_str()), (5, "held\n"));
        Self(holder)
    }

    /// Gives the lock back; returns when it is free.
    pub(crate) fn release(mut self) {
        drop(self.0.stdin.take());
        assert!(self.0.wait().unwrap().success());
    }
}

impl Drop for WriteLock {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// How a command ended.
#[derive(Debug)]
pub(crate) struct Finished {
    /// Exit code; absent when a signal ended it.
    pub(crate) code: Option<i32>,
    /// Standard output.
    pub(crate) stdout: String,
    /// Standard error.
    pub(crate) stderr: String,
}

/// The section of the configuration that names a directory of policies.
pub(crate) fn policy_section(directory: &Path) -> String {
    format!("\n[policy]\ndirectory = \"{}\"\n", directory.display())
}

impl From<Output> for Finished {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code(),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }
}
