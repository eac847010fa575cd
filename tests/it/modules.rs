//! PKCS#11 modules of several makers, each with a token of its own for one test, behind the real binary.

use std::{
    env, fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::Arc,
};

use keybroker_test_support::skip::skip;
use rustix::process::Signal;

use crate::{
    conformance::Conforming,
    process::{send, until},
    site::{Options, Site},
    softhsm::{self, write_private},
};

/// Set in a test that runs in namespaces of its own.
const IN_NAMESPACES: &str = "KEYBROKER_TEST_IN_NAMESPACES";
const USER_PIN: &str = "71035624";
const REMEDY: &str =
    "run scripts/install.sh --tools; these tests need the real modules and do not skip";

/// A maker's module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Maker {
    /// SoftHSM, as Debian has it.
    SoftHsm,
    /// Kryoptic, built by `scripts/kryoptic.sh`.
    Kryoptic,
    /// The soft token of opencryptoki, as Debian has it.
    Opencryptoki,
    /// p11-kit, as Debian has it: its server has SoftHSM, and its client module is the one that is used.
    P11Kit,
    /// pkcs11-proxy, built by `scripts/pkcs11-proxy.sh`: its daemon has SoftHSM, and its module is the one that is used.
    Pkcs11Proxy,
    /// The softoken of NSS, as Debian has it.
    Nss,
}

impl Maker {
    /// The name of the published report, without its end.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::SoftHsm => "softhsm-2.6",
            Self::Kryoptic => "kryoptic-1.5",
            Self::Opencryptoki => "opencryptoki-3.8",
            Self::P11Kit => "p11-kit-remote-0.24",
            Self::Pkcs11Proxy => "pkcs11-proxy-2018",
            Self::Nss => "nss-3.87",
        }
    }

    /// The label of the token.
    fn label(self) -> &'static str {
        match self {
            // NSS has two tokens, whose labels are fixed.
            Self::Nss => "NSS Certificate DB",
            _ => "conformance",
        }
    }

    /// The PIN of the security officer: opencryptoki's soft token has this one from the start.
    fn so_pin(self) -> &'static str {
        match self {
            Self::Opencryptoki => "87654321",
            _ => "60481759",
        }
    }

    /// What the token cannot express.
    fn exceptions(self) -> &'static [&'static str] {
        match self {
            Self::Opencryptoki | Self::Nss => &["CKA_COPYABLE", "CKA_ALLOWED_MECHANISMS"],
            Self::P11Kit => &["CKA_ALLOWED_MECHANISMS"],
            _ => &[],
        }
    }
}

/// A site on the token of a maker.
pub(crate) struct Stand {
    pub(crate) maker: Maker,
    pub(crate) site: Arc<Site>,
    /// A process that the module needs, ended with the stand.
    daemon: Option<Daemon>,
}

impl Stand {
    /// A token that has been initialised by the real command, without keys, and a migrated database.
    pub(crate) fn new(maker: Maker) -> Self {
        let site = Site::without_keys(Options::default());
        let mut stand = Self {
            maker,
            site: Arc::new(site),
            daemon: None,
        };
        fs::create_dir(stand.folder()).unwrap();
        stand.prepare();
        write_private(&stand.pin_file(), USER_PIN);
        stand.configure(maker.exceptions());
        stand.site.expect_ok(&["store", "migrate"]);
        if !matches!(maker, Maker::Nss | Maker::P11Kit | Maker::Pkcs11Proxy) {
            stand.initialise();
        }
        stand
    }

    /// Folder of everything that belongs to the token.
    fn folder(&self) -> PathBuf {
        self.site.folder().join("module")
    }

    fn pin_file(&self) -> PathBuf {
        self.site.folder().join("user-pin")
    }

    /// Initialises the token by the real command.
    fn initialise(&self) {
        let so_pin = self.site.folder().join("so-pin");
        write_private(&so_pin, self.maker.so_pin());
        let listed = self.site.expect_ok(&["-o", "json", "token", "list"]);
        assert!(listed.contains("\"initialised\": false"), "{listed}");
        let so_pin = so_pin.to_str().unwrap();
        self.site
            .expect_ok(&["token", "init", "--so-pin-file", so_pin]);
    }

    /// Adds the site's own SoftHSM token to the configuration. The tokens have the names `soft` and `kryoptic`.
    pub(crate) fn configure_beside_softhsm(&self) {
        let written = fs::read_to_string(self.site.configuration_file()).unwrap();
        let (kryoptic, _) = written.split_once("[store]").unwrap();
        let kryoptic = kryoptic.replace("[token]", "[[token]]\nname = \"kryoptic\"");
        self.site.write_configuration(|text| {
            let named = text.replacen("[token]", "[[token]]\nname = \"soft\"", 1);
            *text = named.replacen("[store]", &format!("{kryoptic}[store]"), 1);
        });
    }

    /// Writes the configuration with these attribute exceptions.
    pub(crate) fn configure(&self, exceptions: &[&str]) {
        let (_, rest) = {
            let mut text = String::new();
            self.site.write_configuration(|all| text.clone_from(all));
            let at = text.find("[store]").unwrap();
            (text[..at].to_owned(), text[at..].to_owned())
        };
        let environment: Vec<String> = self
            .environment()
            .iter()
            .map(|(name, value)| format!("{name} = {value:?}\n"))
            .collect();
        let environment = environment.concat();
        let string = self.initialize_string().map_or_else(String::new, |text| {
            format!("initialize_string = {text:?}\n")
        });
        let head = format!(
            "[token]\nmodule = \"{}\"\nlabel = {:?}\npin_file = \"{}\"\nworkers = 2\nallow_oaep_sha1 = {}\n\
             attribute_exceptions = {exceptions:?}\n{string}\n[token.environment]\n{environment}\n",
            self.module().display(),
            self.maker.label(),
            self.pin_file().display(),
            matches!(
                self.maker,
                Maker::SoftHsm | Maker::P11Kit | Maker::Pkcs11Proxy
            ),
        );
        self.site.write_configuration(|text| *text = head + &rest);
    }

    fn module(&self) -> PathBuf {
        match self.maker {
            Maker::SoftHsm => softhsm::module(),
            Maker::Kryoptic => self.folder().join("kryoptic.so"),
            Maker::Opencryptoki => installed(&[
                "/usr/lib/x86_64-linux-gnu/opencryptoki/libopencryptoki.so.0",
                "/usr/lib/aarch64-linux-gnu/opencryptoki/libopencryptoki.so.0",
            ]),
            Maker::P11Kit => installed(&[
                "/usr/lib/x86_64-linux-gnu/pkcs11/p11-kit-client.so",
                "/usr/lib/aarch64-linux-gnu/pkcs11/p11-kit-client.so",
            ]),
            Maker::Pkcs11Proxy => self.folder().join("libpkcs11-proxy.so"),
            Maker::Nss => installed(&[
                "/usr/lib/x86_64-linux-gnu/libsoftokn3.so",
                "/usr/lib/aarch64-linux-gnu/libsoftokn3.so",
            ]),
        }
    }

    fn environment(&self) -> Vec<(&'static str, String)> {
        let path = |path: PathBuf| path.to_str().unwrap().to_owned();
        match self.maker {
            Maker::SoftHsm => vec![("SOFTHSM2_CONF", path(self.folder().join("softhsm2.conf")))],
            Maker::Kryoptic => vec![("KRYOPTIC_CONF", path(self.objects().join("token.sql")))],
            Maker::Opencryptoki | Maker::Nss => Vec::new(),
            Maker::P11Kit => vec![(
                "P11_KIT_SERVER_ADDRESS",
                format!("unix:path={}", path(self.folder().join("server"))),
            )],
            Maker::Pkcs11Proxy => vec![("PKCS11_PROXY_SOCKET", path(self.folder().join("socket")))],
        }
    }

    fn initialize_string(&self) -> Option<String> {
        (self.maker == Maker::Nss).then(|| {
            let folder = self.objects();
            format!(
                "configdir='sql:{}' certPrefix='' keyPrefix='' secmod='secmod.db' flags=",
                folder.display()
            )
        })
    }

    /// Where the module keeps its objects, and nothing else.
    fn objects(&self) -> PathBuf {
        match self.maker {
            Maker::P11Kit | Maker::Pkcs11Proxy => self.site.token.directory(),
            _ => self.folder().join("objects"),
        }
    }

    /// Gives the module what it needs before a token can be initialised.
    fn prepare(&mut self) {
        let objects = self.objects();
        fs::create_dir_all(&objects).unwrap();
        fs::set_permissions(&objects, fs::Permissions::from_mode(0o700)).unwrap();
        match self.maker {
            Maker::SoftHsm => {
                let text = format!(
                    "directories.tokendir = {}\nobjectstore.backend = file\nlog.level = ERROR\n",
                    objects.display()
                );
                fs::write(self.folder().join("softhsm2.conf"), text).unwrap();
            }
            Maker::Kryoptic => {
                // Beside the objects: the folder that it is built in may be writable for others.
                fs::copy(kryoptic(), self.module()).unwrap();
            }
            Maker::Opencryptoki => self.daemon = Some(opencryptoki(&objects)),
            Maker::P11Kit => self.daemon = Some(self.p11_kit()),
            Maker::Pkcs11Proxy => {
                let built = pkcs11_proxy().expect("the test has looked for it");
                fs::copy(built.join("libpkcs11-proxy.so"), self.module()).unwrap();
                self.daemon = Some(self.pkcs11_proxy(&built.join("pkcs11-daemon")));
            }
            Maker::Nss => {
                let password = self.folder().join("password");
                write_private(&password, USER_PIN);
                let mut certutil = Command::new("certutil");
                certutil
                    .args(["-N", "-d", &format!("sql:{}", objects.display()), "-f"])
                    .arg(&password);
                succeeds(certutil);
            }
        }
    }

    /// A token of SoftHSM for a server.
    fn initialise_for_server(&self) {
        let mut util = Command::new("softhsm2-util");
        util.args(["--init-token", "--free", "--label", self.maker.label()])
            .args(["--pin", USER_PIN, "--so-pin", self.maker.so_pin()])
            .env("SOFTHSM2_CONF", self.site.token.configuration());
        succeeds(util);
    }

    /// The daemon, with a SoftHSM token of its own.
    fn pkcs11_proxy(&self, program: &Path) -> Daemon {
        self.initialise_for_server();
        // The daemon takes a folder, and the module the path of the socket without its end.
        let socket = self.folder().join("socket.pkcs11");
        let child = Command::new(program)
            .arg(softhsm::module())
            .env("SOFTHSM2_CONF", self.site.token.configuration())
            .env("PKCS11_DAEMON_SOCKET", self.folder())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        until("the socket of pkcs11-proxy", || {
            socket.exists().then_some(())
        });
        Daemon::Child(child)
    }

    /// The server, with a SoftHSM token of its own.
    fn p11_kit(&self) -> Daemon {
        let token = &self.site.token;
        self.initialise_for_server();
        let socket = self.folder().join("server");
        let child = Command::new("p11-kit")
            .args(["server", "--foreground", "--name"])
            .arg(&socket)
            .arg("--provider")
            .arg(softhsm::module())
            .arg(format!("pkcs11:token={}", self.maker.label()))
            .env("SOFTHSM2_CONF", token.configuration())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap_or_else(|error| panic!("p11-kit: {error}; {REMEDY}"));
        until("the socket of p11-kit", || socket.exists().then_some(()));
        Daemon::Child(child)
    }
}

impl Conforming for Stand {
    fn site(&self) -> &Arc<Site> {
        &self.site
    }

    fn workers(&self) -> usize {
        2
    }

    fn make_key(&self) {
        self.site.expect_ok(&["key", "generate", "--bits", "2048"]);
    }

    fn back_up(&self) -> PathBuf {
        let copy = self.folder().join("backup");
        copy_folder(&self.objects(), &copy);
        copy
    }

    fn lose(&self) {
        empty(&self.objects());
    }

    fn restore(&self, copy: &Path) {
        self.lose();
        copy_folder(copy, &self.objects());
    }
}

fn installed(paths: &[&str]) -> PathBuf {
    paths
        .iter()
        .map(PathBuf::from)
        .find(|path| path.exists())
        .unwrap_or_else(|| panic!("none of {paths:?} is there; {REMEDY}"))
}

/// The module as `scripts/kryoptic.sh` has built it.
fn kryoptic() -> PathBuf {
    let manifest = include_str!("../kryoptic/Cargo.toml");
    let (_, rest) = manifest.split_once("kryoptic = { version = \"=").unwrap();
    let (version, _) = rest.split_once('"').unwrap();
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let path = root.join(format!("target/kryoptic/libkryoptic-{version}.so"));
    assert!(
        path.exists(),
        "{} is not there: run scripts/kryoptic.sh, which builds it",
        path.display()
    );
    path
}

/// Where `scripts/pkcs11-proxy.sh` has built pkcs11-proxy; absent if it has not.
pub(crate) fn pkcs11_proxy() -> Option<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let folder = root.join("target/pkcs11-proxy");
    folder.join("pkcs11-daemon").exists().then_some(folder)
}

/// A process that a module needs.
enum Daemon {
    Child(Child),
    /// One that went into the background and told its process id.
    Pid(u32),
}

impl Drop for Daemon {
    fn drop(&mut self) {
        match self {
            Self::Child(child) => {
                child.kill().ok();
                child.wait().ok();
            }
            Self::Pid(pid) => send(*pid, Signal::TERM),
        }
    }
}

/// Runs a test again as root of mount, IPC and process namespaces of its own, which end with it. Returns whether this is that run.
///
/// opencryptoki has fixed paths, shared memory, and a daemon: only so can a test have one for itself.
pub(crate) fn in_namespaces(test: &str) -> bool {
    if env::var_os(IN_NAMESPACES).is_some() {
        return true;
    }
    let unshare = ["unshare", "--mount", "--ipc", "--pid"];
    let options = ["--fork", "--mount-proc", "--kill-child"];
    let mut words: Vec<&str> = Vec::new();
    if !rustix::process::geteuid().is_root() {
        words.extend(["sudo", "-n", "--preserve-env"]);
    }
    words.extend(unshare.iter().chain(&options));
    let mut probe = Command::new(words[0]);
    if let Ok(probe) = probe.args(&words[1..]).arg("true").output()
        && !probe.status.success()
    {
        // Also in CI: an unprivileged container lacks no part that could be installed.
        let cause = String::from_utf8_lossy(&probe.stderr);
        skip(&format!(
            "{test}: needs namespaces of its own: {}",
            cause.trim()
        ));
        return false;
    }
    let output = Command::new(words[0])
        .args(&words[1..])
        .arg(env::current_exe().unwrap())
        .args([test, "--exact", "--nocapture"])
        .env(IN_NAMESPACES, "1")
        .output()
        .unwrap_or_else(|error| panic!("{}: {error}; {REMEDY}", words[0]));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success() && text.contains("1 passed"),
        "the run in namespaces of its own (util-linux, root or sudo) failed: {text}\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    false
}

/// Starts the slot daemon with the soft token alone, whose objects are in a folder of the test.
fn opencryptoki(objects: &Path) -> Daemon {
    assert!(
        env::var_os(IN_NAMESPACES).is_some(),
        "only in namespaces of its own"
    );
    fs::create_dir_all(objects.join("swtok/TOK_OBJ")).unwrap();
    let folder = objects.parent().unwrap();
    let conf = folder.join("opencryptoki.conf");
    fs::write(
        &conf,
        "version opencryptoki-3.1\nslot 3\n{\nstdll = libpkcs11_sw.so\n}\n",
    )
    .unwrap();
    // Its files belong to the group pkcs11, which is that of root here.
    let group = folder.join("group");
    let groups = fs::read_to_string("/etc/group").unwrap();
    let others: String = groups
        .lines()
        .filter(|line| !line.starts_with("pkcs11:"))
        .map(|line| line.to_owned() + "\n")
        .collect();
    fs::write(&group, others + "pkcs11:x:0:root\n").unwrap();
    let tmpfs = |on: &str| {
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", "mode=0755", "tmpfs", on]);
        succeeds(mount);
    };
    let bind = |from: &Path, on: &str| {
        let mut mount = Command::new("mount");
        mount.arg("--bind").arg(from).arg(on);
        succeeds(mount);
    };
    tmpfs("/run");
    // The soft token shares its state between processes there, under a name that every other run has as well.
    tmpfs("/dev/shm");
    fs::create_dir_all("/run/lock/opencryptoki/swtok").unwrap();
    fs::create_dir_all("/var/log/opencryptoki").unwrap();
    tmpfs("/var/log/opencryptoki");
    bind(objects, "/var/lib/opencryptoki");
    bind(&conf, "/etc/opencryptoki/opencryptoki.conf");
    bind(&group, "/etc/group");
    succeeds(Command::new("/usr/sbin/pkcsslotd"));
    until("the slot daemon", || {
        Path::new("/run/pkcsslotd.socket").exists().then_some(())
    });
    let pid = until("the process id of the slot daemon", || {
        let text = fs::read_to_string("/run/pkcsslotd.pid").ok()?;
        text.trim().parse().ok()
    });
    Daemon::Pid(pid)
}

fn succeeds(mut command: Command) -> Output {
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("{command:?}: {error}; {REMEDY}"));
    assert!(output.status.success(), "{command:?}: {output:?}");
    output
}

pub(crate) fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    let mut copy = Command::new("cp");
    copy.arg("-a").arg(from.join(".")).arg(to);
    succeeds(copy);
}

pub(crate) fn empty(folder: &Path) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            fs::remove_dir_all(path).unwrap();
        } else {
            fs::remove_file(path).unwrap();
        }
    }
}
