//! Files and directories that decide who is trusted, what is loaded or what is configured, while another user could change
//! them: refused by name in `config check`, at start, and on reload.

use std::{
    fmt::Write as _,
    fs::{self, Permissions},
    os::unix::fs::{PermissionsExt as _, chown, symlink},
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
};

use keybroker_test_support::skip::is_root;
use rcgen::KeyPair;
use rustix::{
    fs::{CWD, FileType, Mode, mknodat},
    process::{Signal, geteuid},
};

use crate::{
    client::{Caller, eventually, refused},
    expected::{CONFIGURATION, OTHER_USER, PIN, TOKEN},
    faulty::{Fault, code},
    faulty_token,
    process::{Broker, can_mount, children_of, is_alive, send, until},
    site::{Finished, Options, Site, policy_section},
    softhsm::{self, write_private},
};

const MATERIAL: &[u8] = b"material of this user";

/// What is wrong with a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Harm {
    OtherOwner,
    GroupWritable,
    WorldWritable,
    WritableParent,
    LinkThroughWritable,
    Fifo,
}

const HARMS: [Harm; 6] = [
    Harm::OtherOwner,
    Harm::GroupWritable,
    Harm::WorldWritable,
    Harm::WritableParent,
    Harm::LinkThroughWritable,
    Harm::Fifo,
];

/// Those that can be arranged here: a file can be given away by root alone.
fn harms() -> impl Iterator<Item = Harm> {
    let is_root = is_root("files of another user");
    HARMS
        .into_iter()
        .filter(move |harm| is_root || *harm != Harm::OtherOwner)
}

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

fn fifo(path: &Path) {
    mknodat(CWD, path, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
}

/// One file in a separate directory. Harm is undone when it is dropped.
struct Harmed {
    file: PathBuf,
    kept: PathBuf,
    mode: u32,
    /// What a refusal must name.
    component: PathBuf,
}

impl Harmed {
    fn new(file: &Path, harm: Harm) -> Self {
        let parent = file.parent().unwrap();
        let mode = fs::metadata(file).unwrap().permissions().mode() & 0o7777;
        let kept = parent.with_extension("kept");
        let mut component = file.to_owned();
        match harm {
            Harm::OtherOwner => chown(file, Some(OTHER_USER), None).unwrap(),
            Harm::GroupWritable => set_mode(file, mode | 0o020),
            Harm::WorldWritable => set_mode(file, mode | 0o002),
            Harm::WritableParent => {
                set_mode(parent, 0o777);
                parent.clone_into(&mut component);
            }
            Harm::LinkThroughWritable => {
                let open = parent.with_extension("open");
                fs::create_dir(&open).unwrap();
                set_mode(&open, 0o777);
                fs::rename(file, &kept).unwrap();
                symlink(&kept, open.join("link")).unwrap();
                symlink(open.join("link"), file).unwrap();
                component = open;
            }
            Harm::Fifo => {
                fs::rename(file, &kept).unwrap();
                fifo(file);
            }
        }
        Self {
            file: file.to_owned(),
            kept,
            mode,
            component,
        }
    }

    fn is_named_in(&self, text: &str) -> bool {
        text.contains(self.component.to_str().unwrap())
    }
}

impl Drop for Harmed {
    fn drop(&mut self) {
        let parent = self.file.parent().unwrap();
        if self.kept.exists() {
            fs::rename(&self.kept, &self.file).unwrap();
        }
        fs::remove_dir_all(parent.with_extension("open")).ok();
        if geteuid().is_root() {
            chown(&self.file, Some(0), None).unwrap();
        }
        set_mode(&self.file, self.mode);
        set_mode(parent, 0o755);
    }
}

/// A site whose files each have a separate directory.
struct Trust {
    site: Arc<Site>,
}

/// File name, mode.
const FILES: [(&str, u32); 9] = [
    ("module", 0o644),
    ("softhsm2.conf", 0o644),
    ("pin", 0o600),
    ("server.pem", 0o644),
    ("server.key", 0o600),
    ("ca.pem", 0o644),
    ("crl.pem", 0o644),
    ("mine.cedar", 0o644),
    ("issuer.pem", 0o644),
];
/// Those of a database server and of an issuer that is asked over HTTP.
const SERVER_FILES: [(&str, u32); 3] = [
    ("database-ca.pem", 0o644),
    ("database-password", 0o600),
    ("issuer-ca.pem", 0o644),
];

impl Trust {
    fn new() -> Self {
        let site = Site::fresh(Options::default());
        site.pki.revoke(&[], 86_400);
        let trust = Self {
            site: Arc::new(site),
        };
        let site = &trust.site;
        for (name, mode) in FILES.into_iter().chain(SERVER_FILES) {
            let path = trust.file(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            let copied = match name {
                "module" => softhsm::module(),
                "softhsm2.conf" => site.token.configuration(),
                "pin" => site.token.pin_file(),
                "server.pem" => site.pki.certificate_file("server"),
                "server.key" => site.pki.key_file("server"),
                "crl.pem" => site.pki.crl_file(),
                _ => site.pki.ca_file(),
            };
            fs::copy(copied, &path).unwrap();
            set_mode(&path, mode);
        }
        fs::write(trust.file("mine.cedar"), "").unwrap();
        let issuer = KeyPair::generate().unwrap().public_key_pem();
        fs::write(trust.file("issuer.pem"), issuer).unwrap();
        write_private(&trust.file("database-password"), "password\n");
        trust.configure("");
        trust
    }

    /// The directory is as hard to change as the file in it: it is what a policy set is read from.
    fn file(&self, name: &str) -> PathBuf {
        let directory = self
            .site
            .folder()
            .join("trust")
            .join(name.replace('.', "-"));
        directory.join(name)
    }

    fn configure(&self, more: &str) {
        let site = &self.site;
        let at = |name: &str| self.file(name).display().to_string();
        site.write_configuration(|text| {
            for (from, to) in [
                (softhsm::module(), "module"),
                (site.token.configuration(), "softhsm2.conf"),
                (site.token.pin_file(), "pin"),
                (site.pki.certificate_file("server"), "server.pem"),
                (site.pki.key_file("server"), "server.key"),
                (site.pki.ca_file(), "ca.pem"),
            ] {
                *text = text.replace(from.to_str().unwrap(), &at(to));
            }
            let list = format!("[listener.tls]\nclient_crl_file = \"{}\"", at("crl.pem"));
            *text = text.replace("[listener.tls]", &list);
            let policies = self.file("mine.cedar");
            write!(
                text,
                "\n[policy]\ndirectory = \"{}\"\n\n[[issuer]]\nname = \"vault\"\nissuer = \"https://vault.example\"\nprofile = \
                 \"bitwarden\"\npem_file = \"{}\"\n{more}",
                policies.parent().unwrap().display(),
                at("issuer.pem"),
            )
            .unwrap();
        });
    }

    /// With a database server and an issuer that is asked, neither of which is there.
    fn with_servers() -> Self {
        let trust = Self::new();
        let more = format!(
            "\n[[issuer]]\nname = \"other\"\nissuer = \"https://other.example\"\nprofile = \"bitwarden\"\ntenant = \
             \"other\"\nca_file = \"{}\"\n",
            trust.file("issuer-ca.pem").display()
        );
        trust.configure(&more);
        let path = trust.site.configuration_file();
        let text = fs::read_to_string(&path).unwrap();
        let sqlite = format!("url = \"sqlite:{}\"", trust.site.database().display());
        let server = format!(
            "url = \"postgres://me@127.0.0.1:1/keys\"\nca_file = \"{}\"\npassword_file = \"{}\"",
            trust.file("database-ca.pem").display(),
            trust.file("database-password").display()
        );
        assert!(text.contains(&sqlite));
        fs::write(&path, text.replace(&sqlite, &server)).unwrap();
        trust
    }
}

#[track_caller]
fn names(finished: &Finished, codes: &[i32], harmed: &Harmed, harm: Harm) {
    assert!(
        finished.code.is_some_and(|code| codes.contains(&code))
            && harmed.is_named_in(&finished.stderr),
        "{} {harm:?}: {finished:#?}",
        harmed.file.display()
    );
}

#[test]
fn config_check_names_every_file_that_another_user_could_change() {
    let trust = Trust::with_servers();
    let check = || trust.site.run(&["config", "check"]);
    let good = check();
    assert_eq!(good.code, Some(0), "{good:#?}");
    for gave in [
        "1 certificate in the chain, 1 client authority, 1 revocation list",
        "[store] `ca_file`: 1 authority",
    ] {
        assert!(good.stderr.contains(gave), "{gave}: {good:#?}");
    }
    for harm in harms() {
        for (name, _) in FILES.into_iter().chain(SERVER_FILES) {
            let harmed = Harmed::new(&trust.file(name), harm);
            names(&check(), &[CONFIGURATION], &harmed, harm);
        }
    }
    assert_eq!(check().code, Some(0));
}

/// It decides what every command does.
#[test]
fn a_configuration_that_another_user_could_change_is_not_read() {
    let site = Site::without_keys(Options::default());
    let moved = site.folder().join("configuration/keybroker.toml");
    fs::create_dir(moved.parent().unwrap()).unwrap();
    fs::copy(site.configuration_file(), &moved).unwrap();
    let run = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_keybroker"));
        command.arg("--config").arg(&moved).args(arguments);
        site.run_to_its_end(command)
    };
    assert_eq!(run(&["config", "check"]).code, Some(0));
    for harm in harms() {
        let harmed = Harmed::new(&moved, harm);
        for arguments in [&["config", "check"][..], &["serve"], &["token", "list"]] {
            names(&run(arguments), &[CONFIGURATION], &harmed, harm);
        }
    }
    let text = format!("\u{feff}{}", fs::read_to_string(&moved).unwrap());
    fs::write(&moved, text).unwrap();
    assert_eq!(run(&["config", "check"]).code, Some(0));
}

#[test]
fn serve_does_not_start_with_a_file_that_another_user_could_change() {
    let trust = Trust::new();
    for harm in harms() {
        for (name, _) in FILES {
            // The broker stays up without a PIN: see below.
            if name == "pin" {
                continue;
            }
            let harmed = Harmed::new(&trust.file(name), harm);
            let finished = trust.site.serve_to_its_end();
            names(&finished, &[CONFIGURATION, 4], &harmed, harm);
        }
    }
    let trust = Trust::with_servers();
    for harm in harms() {
        for (name, _) in SERVER_FILES {
            let harmed = Harmed::new(&trust.file(name), harm);
            let mut finished = trust.site.serve_to_its_end();
            // Its own code: the database cannot be reached either.
            finished.code = finished
                .code
                .map(|code| if code == 0 { 0 } else { CONFIGURATION });
            names(&finished, &[CONFIGURATION], &harmed, harm);
        }
    }
}

/// The old state stays in use, the alert names the file, and the repaired file counts again.
#[tokio::test(flavor = "multi_thread")]
async fn on_reload_a_file_that_another_user_could_change_is_not_taken_over() {
    let trust = Trust::new();
    let broker = Broker::start_on(Arc::clone(&trust.site));
    let site = &broker.site;
    let enroller = Caller::of(&broker, "enroller");
    enroller.create("ada", MATERIAL).await.unwrap();
    for harm in harms() {
        for name in [
            "server.pem",
            "server.key",
            "ca.pem",
            "crl.pem",
            "mine.cedar",
        ] {
            let before = site.log().len();
            let harmed = Harmed::new(&trust.file(name), harm);
            broker.signal(Signal::HUP);
            until(&format!("{name} {harm:?} to be refused"), || {
                let log = site.log();
                let alerts = log[before..]
                    .lines()
                    .filter(|line| line.contains("\"alert\""));
                alerts
                    .into_iter()
                    .any(|line| harmed.is_named_in(line))
                    .then_some(())
            });
            // Over a connection that is accepted now.
            let releaser = Caller::of(&broker, "releaser");
            assert_eq!(releaser.unwrap("ada").await.unwrap().key_material, MATERIAL);
        }
    }
    let before = site.log().len();
    let harmed = Harmed::new(&trust.file("issuer.pem"), Harm::WritableParent);
    until("the keys of the issuer to be refused", || {
        harmed.is_named_in(&site.log()[before..]).then_some(())
    });
    drop(harmed);
    until("the keys of the issuer to be read", || {
        site.log()[before..]
            .contains("the issuer's key set is available again")
            .then_some(())
    });
}

/// A worker that is started later reads module, environment and PIN again.
#[tokio::test(flavor = "multi_thread")]
async fn a_later_worker_is_not_given_a_file_that_another_user_could_change() {
    for (name, harm) in [
        ("pin", Harm::Fifo),
        ("pin", Harm::WritableParent),
        ("module", Harm::WorldWritable),
        ("softhsm2.conf", Harm::LinkThroughWritable),
    ] {
        let trust = Trust::new();
        let broker = Broker::start_on(Arc::clone(&trust.site));
        let enroller = Caller::of(&broker, "enroller");
        enroller.create("ada", MATERIAL).await.unwrap();
        let harmed = Harmed::new(&trust.file(name), harm);
        let worker = until("a worker", || broker.workers().first().copied());
        send(worker, Signal::KILL);
        until(&format!("{name} {harm:?} to be refused"), || {
            harmed.is_named_in(&broker.site.log()).then_some(())
        });
        assert!(enroller.create("bob", MATERIAL).await.is_err());
        drop(harmed);
        if name == "pin" {
            write_private(&trust.file("pin"), &format!("{}\n", trust.site.token.pin()));
        }
        eventually(|| enroller.create("eve", MATERIAL)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fifo_as_pin_file_hangs_nothing() {
    let site = Site::fresh(Options::default());
    let pin_file = site.token.pin_file();
    fs::remove_file(&pin_file).unwrap();
    fifo(&pin_file);
    for (arguments, code) in [
        (["token", "check"], PIN),
        (["config", "check"], CONFIGURATION),
    ] {
        let mut command = site.command(&arguments);
        command.env("SOFTHSM2_CONF", site.token.configuration());
        let finished = site.run_to_its_end(command);
        assert_eq!(finished.code, Some(code), "{finished:#?}");
        assert!(finished.stderr.contains("named pipe"), "{finished:#?}");
    }
    let broker = Broker::start_on(Arc::new(site));
    let enroller = Caller::of(&broker, "enroller");
    refused(enroller.create("ada", MATERIAL).await, "TOKEN_UNTRUSTED");
    assert!(broker.site.log().contains("named pipe"));
}

/// It would keep the sessions of the token from the next front.
#[test]
fn a_worker_that_hangs_in_the_module_does_not_outlive_a_killed_front() {
    let site = Site::fresh(Options::default());
    let faulty = faulty_token::put_before(&site);
    faulty.set(
        "C_Login",
        &Fault {
            milliseconds: 600_000,
            ..Fault::always(code::LATE)
        },
    );
    let mut front = site.spawn(site.serve());
    until("the worker to hang", || {
        (faulty.count("C_Login begins") > 0).then_some(())
    });
    let workers = children_of(front.id());
    assert!(!workers.is_empty());
    front.kill().unwrap();
    front.wait().unwrap();
    until("the worker to end", || {
        workers.iter().all(|pid| !is_alive(*pid)).then_some(())
    });
}

/// Shell commands that make a mount namespace look like a container, which does not see `/run` of the host.
const CONTAINER: &str = "mount -t tmpfs tmpfs /run\nunset INVOCATION_ID";
/// Shell commands that make a mount namespace look like that of a systemd service.
const SERVICE: &str = "mount -t tmpfs tmpfs /run\nmkdir -p /run/systemd/system";

/// The same for a service that does not see `/run` of the host.
const SERVICE_WITHOUT_RUN: &str =
    "mount -t tmpfs tmpfs /run\nexport INVOCATION_ID=0123456789abcdef0123456789abcdef";

/// Runs `config check` after commands of the shell in a mount namespace of its own, with `$1` as the policy directory.
fn check_after(site: &Site, directory: &Path, commands: &str) -> Option<Finished> {
    run_after(site, directory, commands, &["config", "check"])
}

/// The same with another command of the binary.
fn run_after(
    site: &Site,
    directory: &Path,
    commands: &str,
    arguments: &[&str],
) -> Option<Finished> {
    if !can_mount("read-only mounts") {
        return None;
    }
    let mut command = Command::new("unshare");
    command
        .args(["--mount", "sh", "-euc"])
        .arg(format!("{commands}\nshift; exec \"$@\""))
        .arg("sh")
        .arg(directory)
        .arg(env!("CARGO_BIN_EXE_keybroker"))
        .arg("--config")
        .arg(site.configuration_file())
        .args(arguments);
    Some(site.run_to_its_end(command))
}

/// Kubernetes mounts a Secret or `ConfigMap` with mode 1777 and read-only, and its files are links into `..data`.
#[test]
fn a_volume_as_kubernetes_mounts_it_is_trusted() {
    let site = Site::without_keys(Options::default());
    let directory = site.folder().join("policies");
    fs::create_dir(&directory).unwrap();
    site.write_configuration(|text| {
        text.push_str(&policy_section(&directory));
        let certificate = site.pki.certificate_file("server").display().to_string();
        let mounted = directory.join("tls.crt").display().to_string();
        *text = text.replace(&certificate, &mounted);
    });
    let fill = format!(
        "mount -t tmpfs -o mode=1777 tmpfs \"$1\"\ncd \"$1\"\nmkdir ..2026_11_21\ntouch ..2026_11_21/mine.cedar\n\
         cp '{}' ..2026_11_21/tls.crt\nln -s ..2026_11_21 ..data\nln -s ..data/mine.cedar ..data/tls.crt .\n\
         chmod 0644 ..data/*",
        site.pki.certificate_file("server").display()
    );
    let mounted = format!("{CONTAINER}\n{fill}\nmount -o remount,ro \"$1\"");
    let Some(finished) = check_after(&site, &directory, &mounted) else {
        return;
    };
    assert_eq!(finished.code, Some(0), "{finished:#?}");
    // In a volume that can be written, every user who sees it could add a policy.
    let finished = check_after(&site, &directory, &fill).unwrap();
    assert_eq!(finished.code, Some(CONFIGURATION), "{finished:#?}");
    assert!(finished.stderr.contains("chmod go-w"), "{finished:#?}");
}

/// `ProtectSystem=strict` of systemd shows a service the host's own file system read-only. Others can still write to it.
#[test]
fn the_hosts_own_file_system_is_not_trusted_because_it_is_mounted_read_only() {
    let site = Site::without_keys(Options::default());
    let directory = site.folder().join("policies");
    fs::create_dir(&directory).unwrap();
    set_mode(&directory, 0o777);
    site.write_configuration(|text| text.push_str(&policy_section(&directory)));
    let remount =
        format!("{CONTAINER}\nmount --bind \"$1\" \"$1\"\nmount -o remount,bind,ro \"$1\"");
    let Some(finished) = check_after(&site, &directory, &remount) else {
        return;
    };
    let is_apart =
        rustix::fs::stat(&directory).unwrap().st_dev != rustix::fs::stat("/").unwrap().st_dev;
    let expected = if is_apart { 0 } else { CONFIGURATION };
    assert_eq!(finished.code, Some(expected), "{finished:#?}");
}

/// systemd shows a service also the other file systems of the host read-only, such as a `/var` of its own, while others write to them.
#[test]
fn a_read_only_view_of_a_service_is_not_trusted_whichever_file_system_it_shows() {
    let site = Site::without_keys(Options::default());
    let directory = site.policy_directory();
    let view = "mount -t tmpfs -o mode=0777 tmpfs \"$1\"\nmount -o remount,bind,ro \"$1\"";
    for (beside, expected) in [
        (CONTAINER, 0),
        (SERVICE, CONFIGURATION),
        (SERVICE_WITHOUT_RUN, CONFIGURATION),
    ] {
        let Some(finished) = check_after(&site, &directory, &format!("{beside}\n{view}")) else {
            return;
        };
        assert_eq!(finished.code, Some(expected), "{beside}: {finished:#?}");
        if expected == CONFIGURATION {
            let shown = directory.to_str().unwrap();
            assert!(finished.stderr.contains(shown), "{finished:#?}");
            assert!(finished.stderr.contains("mode 0777"), "{finished:#?}");
        }
    }
}

/// A worker has the environment of the configuration alone, so it does not see that systemd started the front.
#[test]
fn a_worker_trusts_a_read_only_view_no_more_than_the_front_that_started_it() {
    for name in ["module", "pin"] {
        let trust = Trust::new();
        let directory = trust.site.folder().join("view");
        fs::create_dir(&directory).unwrap();
        let file = trust.file(name);
        let moved = directory.join("file");
        let configuration = trust.site.configuration_file();
        let text = fs::read_to_string(&configuration).unwrap();
        let (before, after) = (file.display().to_string(), moved.display().to_string());
        assert!(text.contains(&before), "{text}");
        fs::write(&configuration, text.replace(&before, &after)).unwrap();
        let view = format!(
            "mount -t tmpfs -o mode=0777 tmpfs \"$1\"\ncp -pL '{}' \"$1/file\"\nmount -o remount,bind,ro \"$1\"",
            file.display()
        );
        let refused = if name == "pin" { PIN } else { TOKEN };
        for (beside, expected) in [(CONTAINER, 0), (SERVICE_WITHOUT_RUN, refused)] {
            let commands = format!("{beside}\n{view}");
            let check = ["token", "check"];
            let Some(finished) = run_after(&trust.site, &directory, &commands, &check) else {
                return;
            };
            assert_eq!(finished.code, Some(expected), "{name}: {finished:#?}");
            let is_named = |finished: &Finished| {
                finished.stderr.contains(directory.to_str().unwrap())
                    && finished.stderr.contains("mode 0777")
            };
            assert_eq!(is_named(&finished), expected != 0, "{name}: {finished:#?}");
            // The worker of `serve`. Without a PIN the broker would stay up.
            if expected == TOKEN {
                let finished = run_after(&trust.site, &directory, &commands, &["serve"]).unwrap();
                assert_eq!(finished.code, Some(TOKEN), "{name}: {finished:#?}");
                assert!(is_named(&finished), "{name}: {finished:#?}");
            }
        }
    }
}

/// The server on the other side of a read-only mount can write to the directory of its socket, and so can others there.
#[test]
fn the_directory_of_a_socket_is_examined_in_a_read_only_mount_too() {
    let site = Site::without_keys(Options::default());
    let directory = site.folder().join("sockets");
    fs::create_dir(&directory).unwrap();
    site.write_configuration(|text| {
        let url = format!("sqlite:{}", site.database().display());
        let socket = format!("postgres://keybroker@/keys?socket={}", directory.display());
        assert!(text.contains(&url), "{text}");
        *text = text.replace(&url, &socket);
    });
    let mounts = format!(
        "{CONTAINER}\nmount -t tmpfs -o mode=0777 tmpfs \"$1\"\nmount -o remount,bind,ro \"$1\""
    );
    let Some(finished) = check_after(&site, &directory, &mounts) else {
        return;
    };
    assert_eq!(finished.code, Some(CONFIGURATION), "{finished:#?}");
    assert!(finished.stderr.contains("mode 0777"), "{finished:#?}");
}

/// A Secret without `defaultMode`, or one of Compose: `chmod` would fail there.
#[test]
fn a_secret_on_a_read_only_mount_is_refused_with_a_remedy_that_works_there() {
    let site = Site::without_keys(Options::default());
    let directory = site.folder().join("secrets");
    fs::create_dir(&directory).unwrap();
    site.write_configuration(|text| {
        let pin_file = site.token.pin_file().display().to_string();
        let mounted = directory.join("pin").display().to_string();
        *text = text.replace(&pin_file, &mounted);
    });
    let mount = |mode: &str| {
        format!(
            "{CONTAINER}\nmount -t tmpfs -o mode=1777 tmpfs \"$1\"\necho 1234 >\"$1/pin\"\nchmod {mode} \"$1/pin\"\n\
             mount -o remount,ro \"$1\""
        )
    };
    let Some(finished) = check_after(&site, &directory, &mount("0444")) else {
        return;
    };
    assert_eq!(finished.code, Some(CONFIGURATION), "{finished:#?}");
    let said = &finished.stderr;
    assert!(
        said.contains("defaultMode") && !said.contains("chmod"),
        "{said}"
    );
    let finished = check_after(&site, &directory, &mount("0440")).unwrap();
    assert_eq!(finished.code, Some(0), "{finished:#?}");
    // Root does not need the group, so it is reported.
    assert!(
        finished.stderr.contains("group 0 can read this secret"),
        "{finished:#?}"
    );
}

#[test]
fn every_file_may_be_a_credential_of_systemd() {
    let site = Site::without_keys(Options::default());
    let pki = &site.pki;
    let credentials = site.folder().join("credentials");
    fs::create_dir(&credentials).unwrap();
    let files = [
        pki.certificate_file("server"),
        pki.key_file("server"),
        pki.ca_file(),
        site.token.pin_file(),
    ];
    for file in &files {
        fs::copy(file, credentials.join(file.file_name().unwrap())).unwrap();
    }
    site.write_configuration(|text| {
        for file in &files {
            let name = file.file_name().unwrap().to_str().unwrap();
            let credential = format!("$CREDENTIALS_DIRECTORY/{name}");
            *text = text.replace(file.to_str().unwrap(), &credential);
        }
    });
    let mut command = site.command(&["config", "check"]);
    command.env("CREDENTIALS_DIRECTORY", &credentials);
    let finished = site.run_to_its_end(command);
    assert_eq!(finished.code, Some(0), "{finished:#?}");
    let mut command = site.command(&["config", "check"]);
    command.env_remove("CREDENTIALS_DIRECTORY");
    let finished = site.run_to_its_end(command);
    assert_eq!(finished.code, Some(CONFIGURATION), "{finished:#?}");
    assert!(finished.stderr.contains("LoadCredential="), "{finished:#?}");
}

/// The authority decides which broker is given key material.
#[test]
fn a_client_reads_no_file_that_another_user_could_change() {
    let site = Site::without_keys(Options::default());
    let folder = |name: &str| {
        let folder = site.folder().join(name);
        fs::create_dir(&folder).unwrap();
        folder.join(name)
    };
    let [ca, cert, key] = ["ca", "cert", "key"].map(folder);
    fs::copy(site.pki.certificate_file("releaser"), &cert).unwrap();
    fs::copy(site.pki.key_file("releaser"), &key).unwrap();
    // Joined, behind a byte order mark: both authorities count.
    let authority = fs::read_to_string(site.pki.ca_file()).unwrap();
    let authority = authority.trim_end();
    fs::write(&ca, format!("\u{feff}{authority}{authority}")).unwrap();
    let private = fs::read_to_string(&key).unwrap();
    fs::write(&key, format!("\u{feff}{}", private.replace('\n', "\r\n"))).unwrap();
    let health = || {
        let mut command = site.command(&["client", "--endpoint", "https://127.0.0.1:1"]);
        command.arg("--ca").arg(&ca).arg("--cert").arg(&cert);
        command.arg("--key").arg(&key).arg("health");
        site.run_to_its_end(command)
    };
    let good = health();
    assert!(good.stderr.contains("cannot reach"), "{good:#?}");
    for harm in harms() {
        for file in [&ca, &cert, &key] {
            let harmed = Harmed::new(file, harm);
            names(&health(), &[2], &harmed, harm);
        }
    }
    fs::write(
        &ca,
        format!(
            "{authority}\n{}",
            authority.replacen("-----BEGIN", "----BEGIN", 1)
        ),
    )
    .unwrap();
    let refused = health();
    assert!(
        refused.stderr.contains("looks like a BEGIN"),
        "{refused:#?}"
    );
}
