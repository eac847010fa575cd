//! A PKCS#11 module that fails on command, with the real SoftHSM behind it: the scriptable module, with a script that a test
//! changes while it runs.

use std::{
    collections::BTreeMap,
    env,
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use keybroker_scriptable_pkcs11::{CALLS_FILE, Profile, SCRIPT_FILE, SCRIPT_VARIABLE, check};

/// Environment variable that names the folder of the script.
pub const VARIABLE: &str = SCRIPT_VARIABLE;

/// The scriptable module, as Cargo has built it for this test: this crate depends on it.
pub fn module() -> PathBuf {
    let test = env::current_exe().unwrap();
    let mut folders = test.ancestors().skip(1);
    folders
        .find_map(|folder| {
            let name = "libkeybroker_scriptable_pkcs11.so";
            [folder.join(name), folder.join("deps").join(name)]
                .into_iter()
                .find(|path| path.is_file())
        })
        .unwrap_or_else(|| panic!("the scriptable module is not beside {}", test.display()))
}

/// The names of the profiles of the scriptable module, in order.
pub fn profiles() -> Vec<String> {
    let folder = profile_file("any");
    let files = fs::read_dir(folder.parent().unwrap()).unwrap();
    let mut names: Vec<String> = files
        .map(|entry| {
            let path = entry.unwrap().path();
            path.file_stem().unwrap().to_str().unwrap().to_owned()
        })
        .collect();
    names.sort();
    names
}

/// What a profile says of the product that it describes.
pub fn profile(name: &str) -> Profile {
    let path = profile_file(name);
    check(&path)
        .unwrap()
        .unwrap_or_else(|| panic!("{} is no profile", path.display()))
}

fn profile_file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../scriptable-module/profiles")
        .join(format!("{name}.toml"))
}

/// Return codes of PKCS#11.
pub mod code {
    /// `CKR_GENERAL_ERROR`.
    pub const GENERAL_ERROR: i64 = 0x05;
    /// `CKR_FUNCTION_FAILED`.
    pub const FUNCTION_FAILED: i64 = 0x06;
    /// `CKR_ARGUMENTS_BAD`.
    pub const ARGUMENTS_BAD: i64 = 0x07;
    /// `CKR_CANT_LOCK`.
    pub const CANT_LOCK: i64 = 0x0a;
    /// `CKR_DEVICE_ERROR`.
    pub const DEVICE_ERROR: i64 = 0x30;
    /// `CKR_DEVICE_MEMORY`.
    pub const DEVICE_MEMORY: i64 = 0x31;
    /// `CKR_DEVICE_REMOVED`.
    pub const DEVICE_REMOVED: i64 = 0x32;
    /// `CKR_HOST_MEMORY`.
    pub const HOST_MEMORY: i64 = 0x02;
    /// `CKR_FUNCTION_CANCELED`.
    pub const FUNCTION_CANCELED: i64 = 0x50;
    /// `CKR_BUFFER_TOO_SMALL`.
    pub const BUFFER_TOO_SMALL: i64 = 0x150;
    /// `CKR_SESSION_CLOSED`.
    pub const SESSION_CLOSED: i64 = 0xb0;
    /// `CKR_TOKEN_NOT_PRESENT`.
    pub const TOKEN_NOT_PRESENT: i64 = 0xe0;
    /// `CKR_USER_ALREADY_LOGGED_IN`.
    pub const USER_ALREADY_LOGGED_IN: i64 = 0x100;
    /// A code of the vendor.
    pub const VENDOR_DEFINED: i64 = 0x8000_0001;
    /// `CKR_SESSION_COUNT`.
    pub const SESSION_COUNT: i64 = 0xb1;
    /// `CKR_SESSION_HANDLE_INVALID`.
    pub const SESSION_HANDLE_INVALID: i64 = 0xb3;
    /// Not a return code: the real function is called and its failure is hidden.
    pub const NEVER_FAILS: i64 = 0;
    /// Not a return code: the real function is called, late.
    pub const LATE: i64 = -1;

    /// Not a return code: the process crashes.
    pub const CRASH: i64 = 1 << 41;

    /// The real function is called, and this code is returned when it succeeds.
    pub const fn after(code: i64) -> i64 {
        AFTER + code
    }

    /// Above every code.
    pub(super) const AFTER: i64 = 1 << 40;

    /// The real function is called, and this code is returned when it fails.
    pub const fn instead(code: i64) -> i64 {
        -code
    }
}

/// Flags of `CK_TOKEN_INFO`.
pub mod flag {
    /// A wrong user PIN was given at least once.
    pub const USER_PIN_COUNT_LOW: u64 = 0x0001_0000;
    /// One more wrong user PIN locks the token.
    pub const USER_PIN_FINAL_TRY: u64 = 0x0002_0000;
    /// The user PIN is locked.
    pub const USER_PIN_LOCKED: u64 = 0x0004_0000;
    /// One more wrong SO PIN locks the token.
    pub const SO_PIN_FINAL_TRY: u64 = 0x0020_0000;
    /// The SO PIN is locked.
    pub const SO_PIN_LOCKED: u64 = 0x0040_0000;
}

/// What happens to the calls of a function of the module.
#[derive(Clone, Debug)]
pub struct Fault {
    /// A return code, or one of the values in [`code`] that are not return codes.
    pub code: i64,
    /// Number of calls that pass before the fault begins.
    pub skip: u32,
    /// Number of calls that fail; absent for all.
    pub times: Option<u32>,
    /// Milliseconds that each call sleeps first.
    pub milliseconds: u32,
    /// Process id of the one process that it applies to; 0 for all.
    pub pid: u32,
}

impl Fault {
    /// Every call from now on.
    pub fn always(code: i64) -> Self {
        Self {
            code,
            skip: 0,
            times: None,
            milliseconds: 0,
            pid: 0,
        }
    }

    /// The next `times` calls.
    pub fn times(code: i64, times: u32) -> Self {
        Self {
            times: Some(times),
            ..Self::always(code)
        }
    }
}

/// The module, and the folder of its script.
#[derive(Debug)]
pub struct Faulty {
    folder: PathBuf,
    script: Mutex<Script>,
}

/// What the script is made of.
#[derive(Debug)]
struct Script {
    real: PathBuf,
    /// The profile of a product that it begins with.
    profile: Option<PathBuf>,
    /// The rule of each function.
    rules: BTreeMap<String, String>,
    flags: u64,
    nul: bool,
    /// The time that the token shows.
    clock: Option<String>,
    /// Further tables.
    behaviour: String,
}

impl Faulty {
    /// Puts the module into `folder`, in front of the real one.
    pub fn in_folder(folder: PathBuf, real: &Path) -> Self {
        fs::create_dir_all(&folder).unwrap();
        let script = Script {
            real: real.to_owned(),
            profile: None,
            rules: BTreeMap::new(),
            flags: 0,
            nul: false,
            clock: None,
            behaviour: String::new(),
        };
        let faulty = Self {
            folder,
            script: Mutex::new(script),
        };
        fs::copy(module(), faulty.module()).unwrap();
        faulty.edit(|_| ());
        faulty
    }

    /// The module's path.
    pub fn module(&self) -> PathBuf {
        self.folder().join("faulty.so")
    }

    /// The value that [`VARIABLE`] must have.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Applies `fault` to `function` from now on.
    pub fn set(&self, function: &str, fault: &Fault) {
        let rule = fault.rule(function);
        self.edit(|script| {
            script.rules.insert(function.to_owned(), rule);
        });
    }

    /// From now on the token shows `flags` besides its own.
    pub fn set_flags(&self, flags: u64) {
        self.edit(|script| script.flags = flags);
    }

    /// From now on the token behaves like this product: see [`profile`].
    pub fn set_profile(&self, name: &str) {
        profile(name);
        self.edit(|script| script.profile = Some(profile_file(name)));
    }

    /// From now on, texts are padded with NUL instead of blanks.
    pub fn pad_with_nul(&self) {
        self.edit(|script| script.nul = true);
    }

    /// From now on the token shows this time (`CKF_CLOCK_ON_TOKEN`).
    pub fn set_clock(&self, time: &str) {
        self.edit(|script| script.clock = Some(time.to_owned()));
    }

    /// From now on the token behaves as these tables of the script say.
    pub fn behave(&self, tables: &str) {
        self.edit(|script| tables.clone_into(&mut script.behaviour));
    }

    /// Removes the fault of `function`.
    pub fn clear(&self, function: &str) {
        self.edit(|script| {
            let removed = script.rules.remove(function);
            assert!(removed.is_some(), "{function} has no fault");
        });
    }

    /// Writes the script under another name first: the module never reads half of it.
    fn edit(&self, change: impl FnOnce(&mut Script)) {
        let mut script = self.script.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut script);
        let partial = self.folder().join("partial");
        fs::write(&partial, script.text()).unwrap();
        fs::rename(partial, self.folder().join(SCRIPT_FILE)).unwrap();
    }

    /// The number of calls so far that left this line in the module's log, such as `C_Login begins` or `C_Login ends 0`.
    pub fn count(&self, line: &str) -> usize {
        let calls = fs::read_to_string(self.folder().join(CALLS_FILE)).unwrap_or_default();
        calls
            .lines()
            .filter(|call| call.split_once(' ').is_some_and(|(_, what)| what == line))
            .count()
    }
}

impl Fault {
    /// The rule of the script. Each has a unique name, so that its calls are counted from the start.
    fn rule(&self, function: &str) -> String {
        let mut text = format!(
            "[[rule]]\nname = \"{}\"\nfunction = \"{function}\"\non = {{ skip = {}",
            uuid::Uuid::new_v4(),
            self.skip
        );
        if let Some(times) = self.times {
            write!(text, ", times = {times}").unwrap();
        }
        if self.pid != 0 {
            write!(text, ", process = {}", self.pid).unwrap();
        }
        write!(text, " }}\ndo = {{ delay_ms = {}", self.milliseconds).unwrap();
        match self.code {
            code::CRASH => text.push_str(", segfault = true"),
            code::LATE => (),
            code::NEVER_FAILS => text.push_str(", return = \"CKR_OK\", when = \"failed\""),
            after if after >= code::AFTER => {
                let code = after - code::AFTER;
                write!(text, ", return = {code}, when = \"succeeded\"").unwrap();
            }
            instead if instead < 0 => {
                write!(text, ", return = {}, when = \"failed\"", -instead).unwrap();
            }
            code => write!(text, ", return = {code}").unwrap(),
        }
        text.push_str(" }\n");
        text
    }
}

impl Script {
    fn text(&self) -> String {
        let mut text = format!("module = '{}'\nlog_calls = true\n", self.real.display());
        if let Some(profile) = &self.profile {
            writeln!(text, "include = ['{}']", profile.display()).unwrap();
        }
        // Otherwise the behaviour may have the table.
        match &self.clock {
            None if self.flags == 0 && !self.nul => {}
            None => writeln!(text, "[token]\nset_flags = [{}]", self.flags).unwrap(),
            Some(time) => writeln!(
                text,
                "[token]\nset_flags = [\"CKF_CLOCK_ON_TOKEN\", {}]\nutc_time = \"{time}\"",
                self.flags
            )
            .unwrap(),
        }
        if self.nul {
            text.push_str("pad = \"nul\"\n");
        }
        text.extend(self.rules.values().map(String::as_str));
        text.push_str(&self.behaviour);
        text
    }
}
