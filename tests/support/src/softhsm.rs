//! A separate SoftHSM installation for each test: configuration, token directory, label and PINs.

use std::{
    ffi::OsStr,
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use tempfile::TempDir;

/// Where distributions put the module.
const MODULES: [&str; 4] = [
    "/usr/lib/softhsm/libsofthsm2.so",
    "/usr/lib/x86_64-linux-gnu/softhsm/libsofthsm2.so",
    "/usr/lib/aarch64-linux-gnu/softhsm/libsofthsm2.so",
    "/usr/local/lib/softhsm/libsofthsm2.so",
];

/// The SoftHSM module of this machine.
pub fn module() -> PathBuf {
    MODULES
        .iter()
        .map(PathBuf::from)
        .find(|path| path.exists())
        .expect("SoftHSM is not installed: run scripts/install.sh")
}

/// A SoftHSM installation with one initialised token and no keys.
#[derive(Debug)]
pub struct Token {
    folder: TempDir,
    label: String,
    pin: String,
}

impl Token {
    /// A fresh token without keys.
    pub fn fresh() -> Self {
        let token = Self::uninitialised();
        token.initialise(&token.label);
        token
    }

    /// A SoftHSM configuration whose only slot holds no token yet.
    pub fn uninitialised() -> Self {
        let folder = tempfile::Builder::new()
            .prefix("keybroker-token-")
            .tempdir()
            .unwrap();
        let unique = uuid::Uuid::new_v4().simple().to_string();
        let token = Self {
            label: format!("token-{}", &unique[..8]),
            pin: format!("PIN{}", &unique[8..24]),
            folder,
        };
        fs::create_dir(token.directory()).unwrap();
        fs::write(
            token.configuration(),
            format!(
                "directories.tokendir = {}\nobjectstore.backend = file\nlog.level = ERROR\nslots.removable = false\n",
                token.directory().display()
            ),
        )
        .unwrap();
        write_private(&token.pin_file(), &format!("{}\n", token.pin));
        token
    }

    /// Initialises one more token in a free slot, with the same PINs.
    pub fn initialise(&self, label: &str) {
        let output = self.run(
            "softhsm2-util",
            [
                "--init-token",
                "--free",
                "--label",
                label,
                "--pin",
                &self.pin,
                "--so-pin",
                &self.pin,
            ],
        );
        assert!(output.status.success(), "softhsm2-util: {output:?}");
    }

    /// Runs a program with this SoftHSM in its environment.
    pub fn run<S: AsRef<OsStr>>(
        &self,
        program: &str,
        arguments: impl IntoIterator<Item = S>,
    ) -> Output {
        Command::new(program)
            .args(arguments)
            .env("SOFTHSM2_CONF", self.configuration())
            .output()
            .unwrap_or_else(|error| panic!("{program}: {error}; run scripts/install.sh"))
    }

    /// `pkcs11-tool` logged in to this token.
    pub fn pkcs11_tool(&self, arguments: &[&str]) -> Output {
        let module = module();
        let mut all = vec![
            "--module",
            module.to_str().unwrap(),
            "--token-label",
            &self.label,
        ];
        all.extend(["--login", "--pin", &self.pin]);
        all.extend(arguments);
        self.run("pkcs11-tool", all)
    }

    /// `SOFTHSM2_CONF`.
    pub fn configuration(&self) -> PathBuf {
        self.folder.path().join("softhsm2.conf")
    }

    /// Where SoftHSM keeps its tokens.
    pub fn directory(&self) -> PathBuf {
        self.folder.path().join("tokens")
    }

    /// A file with the user PIN, mode 0600.
    pub fn pin_file(&self) -> PathBuf {
        self.folder.path().join("pin")
    }

    /// The user PIN.
    pub fn pin(&self) -> &str {
        &self.pin
    }

    /// The token's label.
    pub fn label(&self) -> &str {
        &self.label
    }
}

/// Writes a file that only its owner may read.
pub fn write_private(path: &Path, text: &str) {
    fs::write(path, text).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
}

#[test]
fn a_fresh_token_is_there_and_takes_its_pin() {
    let token = Token::fresh();
    let output = token.pkcs11_tool(&["--list-objects"]);
    assert!(output.status.success(), "{output:?}");

    let slots = token.run("softhsm2-util", ["--show-slots"]);
    assert!(String::from_utf8_lossy(&slots.stdout).contains(token.label()));
}
