//! A PKCS#11 module that fails on command, with the real SoftHSM behind it: see `faulty.c`.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

/// Environment variable that names the folder of faults.
pub(crate) const VARIABLE: &str = "KEYBROKER_FAULTS";

/// Return codes of PKCS#11.
pub(crate) mod code {
    pub(crate) const GENERAL_ERROR: i64 = 0x05;
    pub(crate) const FUNCTION_FAILED: i64 = 0x06;
    pub(crate) const DEVICE_ERROR: i64 = 0x30;
    pub(crate) const DEVICE_MEMORY: i64 = 0x31;
    pub(crate) const DEVICE_REMOVED: i64 = 0x32;
    pub(crate) const HOST_MEMORY: i64 = 0x02;
    pub(crate) const FUNCTION_CANCELED: i64 = 0x50;
    pub(crate) const SESSION_CLOSED: i64 = 0xb0;
    pub(crate) const TOKEN_NOT_PRESENT: i64 = 0xe0;
    pub(crate) const USER_ALREADY_LOGGED_IN: i64 = 0x100;
    pub(crate) const VENDOR_DEFINED: i64 = 0x8000_0001;
    pub(crate) const SESSION_COUNT: i64 = 0xb1;
    pub(crate) const SESSION_HANDLE_INVALID: i64 = 0xb3;
    /// None: the real function is called and its failure is hidden.
    pub(crate) const NEVER_FAILS: i64 = 0;
    /// None: the real function is called, late.
    pub(crate) const LATE: i64 = -1;

    /// The real function is called, and its success is called by this code.
    pub(crate) const fn after(code: i64) -> i64 {
        AFTER + code
    }

    /// Above every code.
    const AFTER: i64 = 1 << 40;

    /// The real function is called, and whatever it fails with is called by this code.
    pub(crate) const fn instead(code: i64) -> i64 {
        -code
    }
}

/// Flags of `CK_TOKEN_INFO`.
pub(crate) mod flag {
    pub(crate) const USER_PIN_COUNT_LOW: u64 = 0x0001_0000;
    pub(crate) const USER_PIN_FINAL_TRY: u64 = 0x0002_0000;
    pub(crate) const USER_PIN_LOCKED: u64 = 0x0004_0000;
    pub(crate) const SO_PIN_FINAL_TRY: u64 = 0x0020_0000;
    pub(crate) const SO_PIN_LOCKED: u64 = 0x0040_0000;
}

/// What befalls a function of the module.
pub(crate) struct Fault {
    /// Return code, or one of those that are none.
    pub(crate) code: i64,
    /// Calls that pass before it begins.
    pub(crate) skip: u32,
    /// Calls that it hits; absent for all.
    pub(crate) times: Option<u32>,
    /// Slept before.
    pub(crate) milliseconds: u32,
    /// The one process that it hits; 0 for all.
    pub(crate) pid: u32,
}

impl Fault {
    /// Each call, from now on.
    pub(crate) fn always(code: i64) -> Self {
        Self {
            code,
            skip: 0,
            times: None,
            milliseconds: 0,
            pid: 0,
        }
    }

    /// The next calls, this many.
    pub(crate) fn times(code: i64, times: u32) -> Self {
        Self {
            times: Some(times),
            ..Self::always(code)
        }
    }
}

/// The module, and the folder of its faults.
pub(crate) struct Faulty {
    folder: PathBuf,
}

impl Faulty {
    /// Compiles the module in front of the real one, into a folder that goes away with the test. The C compiler is there: the product's own libraries need it.
    pub(crate) fn in_folder(folder: PathBuf, real: &Path) -> Self {
        fs::create_dir_all(&folder).unwrap();
        let faulty = Self { folder };
        let output = Command::new("cc")
            .args(["-O1", "-shared", "-fPIC", "-o"])
            .arg(faulty.module())
            .arg(format!("-DREAL_MODULE=\"{}\"", real.display()))
            .arg(concat!(
                env!("CARGO_MANIFEST_DIR"),
                "/../../tests/it/faulty.c"
            ))
            .arg("-ldl")
            .output()
            .unwrap_or_else(|error| panic!("cc: {error}; run scripts/install.sh"));
        assert!(output.status.success(), "cc: {output:?}");
        faulty
    }

    /// The module's path.
    pub(crate) fn module(&self) -> PathBuf {
        self.folder().join("faulty.so")
    }

    /// What [`VARIABLE`] must be.
    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// From now on.
    pub(crate) fn set(&self, function: &str, fault: &Fault) {
        let times = fault.times.map_or(-1, i64::from);
        let text = format!(
            "{} {times} {} {} {}\n",
            fault.skip, fault.code, fault.milliseconds, fault.pid
        );
        self.write(function, &text);
    }

    /// Under another name first: a call never reads half of it.
    fn write(&self, name: &str, text: &str) {
        let partial = self.folder().join("partial");
        fs::write(&partial, text).unwrap();
        fs::rename(partial, self.folder().join(name)).unwrap();
    }

    /// What the token shows of itself, from now on: these flags besides its own.
    pub(crate) fn set_flags(&self, flags: u64) {
        self.write("flags", &format!("{flags}\n"));
    }

    /// From now on texts are padded with NUL instead of blanks.
    pub(crate) fn pad_with_nul(&self) {
        self.write("nul", "");
    }

    /// As if it had never been.
    pub(crate) fn clear(&self, function: &str) {
        fs::remove_file(self.folder().join(function)).unwrap();
    }

    /// How many calls so far have a line that ends like this: `C_Login begins`, `C_Login ends 0`.
    pub(crate) fn count(&self, line: &str) -> usize {
        let calls = fs::read_to_string(self.folder().join("calls")).unwrap_or_default();
        calls
            .lines()
            .filter(|call| call.split_once(' ').is_some_and(|(_, what)| what == line))
            .count()
    }
}
