//! Commands with a module that crashes, hangs, is missing or is none: the command itself does not crash, ends within a bounded
//! time, and names signal, function and path.

use std::{
    fs,
    os::unix::fs::{PermissionsExt as _, symlink},
    thread,
    time::{Duration, Instant},
};

use crate::{
    expected::{CONFIGURATION, TOKEN},
    faulty::{Fault, code},
    faulty_token,
    site::{Finished, Options, Site},
    softhsm::{self, write_private},
};

/// An id that no key has.
const SOME_ID: &str = "00112233445566778899aabbccddeeff";
/// Every command that needs the module, apart from `store copy` and `token init`.
const COMMANDS: [&[&str]; 7] = [
    &["token", "list"],
    &["token", "check"],
    &["token", "backup-confirmed"],
    &["key", "generate"],
    &["key", "register", SOME_ID],
    &["store", "check"],
    &["config", "check"],
];

/// `config check` reports the module as one problem of the configuration.
fn code_of(arguments: &[&str]) -> i32 {
    match arguments {
        ["config", ..] => CONFIGURATION,
        _ => TOKEN,
    }
}

#[track_caller]
fn names(arguments: &[&str], finished: &Finished, words: &[&str]) {
    assert_eq!(
        finished.code,
        Some(code_of(arguments)),
        "{arguments:?}: {finished:#?}"
    );
    for word in words {
        assert!(
            finished.stderr.contains(word),
            "{arguments:?} does not say {word:?}: {}",
            finished.stderr
        );
    }
}

/// The module by another name, as a vendor's package would install it.
fn set_module(site: &Site, module: &str) {
    site.write_configuration(|text| {
        let real = softhsm::module().display().to_string();
        *text = text.replace(&real, module);
    });
}

fn init_arguments(site: &Site) -> Vec<String> {
    let pin = site.folder().join("so-pin");
    write_private(&pin, "12345678");
    ["token", "init", "--label", "other", "--so-pin-file"]
        .into_iter()
        .map(str::to_owned)
        .chain([pin.display().to_string()])
        .collect()
}

#[test]
fn a_crash_of_the_module_is_named_by_every_command() {
    let (site, faulty) = faulty_token::site(Options::default());
    let path = faulty.module().display().to_string();
    faulty.set("C_Initialize", &Fault::always(code::CRASH));
    for arguments in COMMANDS {
        let finished = site.run(arguments);
        names(
            arguments,
            &finished,
            &["signal 11 (SIGSEGV)", "C_Initialize", &path],
        );
    }
    let init = init_arguments(&site);
    let init: Vec<&str> = init.iter().map(String::as_str).collect();
    names(
        &init,
        &site.run(&init),
        &["signal 11 (SIGSEGV)", "C_Initialize", &path],
    );
    faulty.clear("C_Initialize");
    // In the middle of a command: the function in which it crashed.
    for function in ["C_Login", "C_OpenSession"] {
        faulty.set(function, &Fault::always(code::CRASH));
        names(
            &["token", "check"],
            &site.run(&["token", "check"]),
            &["signal 11 (SIGSEGV)", function, &path],
        );
        faulty.clear(function);
    }
    faulty.set("C_GenerateKeyPair", &Fault::always(code::CRASH));
    names(
        &["key", "generate"],
        &site.run(&["key", "generate"]),
        &["signal 11 (SIGSEGV)", "C_GenerateKeyPair", &path],
    );
    faulty.clear("C_GenerateKeyPair");
    // A crashed login is not taken for a rejected PIN.
    site.expect_ok(&["token", "check"]);
}

/// `serve` says the same of a worker that crashes while it starts.
#[test]
fn a_crash_of_the_module_is_named_by_serve() {
    let (site, faulty) = faulty_token::site(Options::default());
    faulty.set("C_Initialize", &Fault::always(code::CRASH));
    let mut child = site.spawn(site.serve());
    let log = crate::process::until("the cause in the log", || {
        let log = site.log();
        log.contains("SIGSEGV").then_some(log)
    });
    crate::process::send(child.id(), rustix::process::Signal::TERM);
    child.wait().unwrap();
    let path = faulty.module().display().to_string();
    assert!(log.contains("C_Initialize") && log.contains(&path), "{log}");
}

#[test]
fn a_module_that_hangs_is_given_up() {
    let (site, faulty) = faulty_token::site(Options::default());
    let text = fs::read_to_string(site.configuration_file()).unwrap();
    let short = text.replacen("[token]\n", "[token]\ncall_timeout_ms = 1000\n", 1);
    fs::write(site.configuration_file(), short).unwrap();
    let path = faulty.module().display().to_string();
    let hang = Fault {
        milliseconds: 3_600_000,
        ..Fault::always(code::LATE)
    };
    faulty.set("C_OpenSession", &hang);
    let began = Instant::now();
    thread::scope(|scope| {
        for arguments in [
            &["token", "check"][..],
            &["key", "generate"],
            &["store", "check"],
        ] {
            let (site, path) = (&site, &path);
            scope.spawn(move || {
                let finished = site.run(arguments);
                let words = ["did not answer within 1 s", "C_OpenSession", path];
                names(arguments, &finished, &words);
            });
        }
    });
    assert!(
        began.elapsed() < Duration::from_mins(1),
        "{:?}",
        began.elapsed()
    );
    faulty.clear("C_OpenSession");
    faulty.set("C_Initialize", &hang);
    let finished = site.run(&["config", "check"]);
    let words = ["did not answer within 1 s", "C_Initialize", &path];
    names(&["config", "check"], &finished, &words);
    // No worker is left behind.
    let left = fs::read_dir("/proc").unwrap().flatten().filter(|entry| {
        let environment = fs::read(entry.path().join("environ")).unwrap_or_default();
        let folder = site.folder().display().to_string();
        String::from_utf8_lossy(&environment).contains(&folder)
    });
    assert_eq!(left.count(), 0);
}

/// A module that answers that the room for its slots is too small, again and again, and needs no more than before.
#[test]
fn a_list_of_slots_that_never_fits_is_given_up() {
    let (site, faulty) = faulty_token::site(Options::default());
    faulty.set(
        "C_GetSlotList",
        &Fault {
            skip: 1,
            ..Fault::always(code::BUFFER_TOO_SMALL)
        },
    );
    for arguments in [&["token", "list"][..], &["token", "check"]] {
        let finished = site.run(arguments);
        names(arguments, &finished, &["BufferTooSmall from C_GetSlotList"]);
    }
    faulty.clear("C_GetSlotList");
    site.expect_ok(&["token", "check"]);
}

#[test]
fn a_file_that_is_no_module_is_named_for_what_it_is() {
    let site = Site::fresh(Options::default());
    let folder = site.folder().join("modules");
    fs::create_dir(&folder).unwrap();
    let real = fs::read(softhsm::module()).unwrap();
    // e_machine of the ELF header: aarch64 is 183, x86-64 is 62.
    let mut other = real.clone();
    let machine: u16 = if cfg!(target_arch = "aarch64") {
        62
    } else {
        183
    };
    other[18..20].copy_from_slice(&machine.to_le_bytes());
    let made_for = if machine == 62 { "x86-64" } else { "aarch64" };
    let cases: [(&str, &[u8], &str); 4] = [
        ("other.so", &other, made_for),
        ("text.so", b"not a shared library", "not a shared library"),
        ("empty.so", b"", "not a shared library"),
        // The dynamic linker itself crashes in the missing part.
        ("cut.so", &real[..4_096], "while it loaded"),
    ];
    for (name, content, word) in cases {
        let path = folder.join(name);
        fs::write(&path, content).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        let shown = path.display().to_string();
        set_module(&site, &shown);
        for arguments in COMMANDS {
            names(arguments, &site.run(arguments), &[&shown, word]);
        }
        // The one that is cut crashes each worker, and the broker tries again.
        if name != "cut.so" {
            let served = site.serve_to_its_end();
            names(&["serve"], &served, &[&shown, word]);
        }
    }
    // A shared library without PKCS#11.
    let library = folder.join("libm.so");
    symlink(math_library(), &library).unwrap();
    set_module(&site, &library.display().to_string());
    for arguments in COMMANDS {
        names(arguments, &site.run(arguments), &["C_GetFunctionList"]);
    }
    set_module(&site, "/nowhere/libpkcs11.so");
    for arguments in COMMANDS {
        names(arguments, &site.run(arguments), &["/nowhere/libpkcs11.so"]);
    }
}

fn math_library() -> String {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let libc = maps
        .lines()
        .filter_map(|line| line.split_whitespace().last())
        .find(|path| path.ends_with("/libc.so.6"))
        .unwrap();
    libc.replace("/libc.so.6", "/libm.so.6")
}

/// The process that talks to the database never maps the module, and the module's process never opens the database.
#[test]
fn the_module_is_in_a_process_of_its_own() {
    let (site, faulty) = faulty_token::site(Options::default());
    faulty.set(
        "C_Verify",
        &Fault {
            milliseconds: 1_000,
            ..Fault::times(code::LATE, 1)
        },
    );
    let mut child = site.spawn(site.command(&["store", "check"]));
    crate::process::until("the call", || {
        (faulty.count("C_Verify begins") > 0).then_some(())
    });
    let maps = |pid: u32| fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
    let command = child.id();
    let children = fs::read_to_string(format!("/proc/{command}/task/{command}/children")).unwrap();
    let worker: u32 = children.trim().parse().expect("one worker");
    let path = faulty.module().display().to_string();
    // Where the kernel lets us look: both processes are not dumpable.
    if let Ok(text) = fs::read_to_string(format!("/proc/{command}/maps")) {
        assert!(!text.contains(&path), "{text}");
        assert!(maps(worker).contains(&path));
    }
    assert_eq!(child.wait().unwrap().code(), Some(0), "{}", site.log());
    let noted = fs::read_to_string(faulty.folder().join("calls")).unwrap();
    assert!(
        noted.contains(&format!("{worker} C_Verify")),
        "{worker}: {noted}"
    );
    assert!(
        !noted.contains(&format!("{command} C_")),
        "{command}: {noted}"
    );
}
