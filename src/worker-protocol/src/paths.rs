//! Checks that other users cannot change the files to which the settings refer.
//!
//! Mitigation: M15 of `THREAT_MODEL.md`.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Read as _},
    path::{Path, PathBuf},
};

use rustix::fs::{Access, access};

use keybroker_core::trusted_file::{self, Purpose};

/// The environment variable with the path of SoftHSM's configuration file.
const SOFTHSM_VARIABLE: &str = "SOFTHSM2_CONF";
/// The configuration file that SoftHSM in Debian reads if the variable is not set.
const SOFTHSM_DEFAULT: &str = "/etc/softhsm/softhsm2.conf";
const MODULE: Purpose = Purpose::trust("other users could replace the code that receives the PIN");
const ENVIRONMENT: Purpose =
    Purpose::trust("other users could change what the PKCS#11 module reads or loads");

/// The reason why a file to which the settings refer must not be used.
#[derive(Debug, thiserror::Error)]
pub enum PathError {
    /// The module does not exist.
    #[error(
        "no PKCS#11 module at {}: {source}; install the vendor's package (Debian: softhsm2) or correct `token.module`",
        path.display()
    )]
    NoModule {
        /// The configured path.
        path: PathBuf,
        /// The error of the attempt to open the module.
        source: Box<trusted_file::Error>,
    },
    /// Other users can change the module.
    #[error("the PKCS#11 module: {0}")]
    Module(#[source] trusted_file::Error),
    /// The file is not a shared library for this machine.
    #[error("{}: {problem}; correct `token.module`", path.display())]
    NotALibrary {
        /// The path of the module.
        path: PathBuf,
        /// The problem of the file.
        problem: String,
    },
    /// Other users can change a file to which a variable of the module's environment refers.
    #[error("[token.environment] {name}: {source}")]
    Environment {
        /// The name of the variable.
        name: String,
        /// The problem of the file.
        source: Box<trusted_file::Error>,
    },
}

/// Checks that the module exists, that other users cannot replace it, and that it is a shared
/// library for this machine. The check is important because the module receives the PIN.
pub fn check_module(path: &Path) -> Result<(), PathError> {
    let file = match trusted_file::open(path, MODULE) {
        // The loader opens the path again later. Between the check and the loading, only root and
        // the user of this process can change the target of the path.
        Ok(file) => file,
        Err(source) if source.is_missing() => {
            let path = path.to_owned();
            let source = Box::new(source);
            return Err(PathError::NoModule { path, source });
        }
        Err(error) => return Err(PathError::Module(error)),
    };
    match elf_problem(&file) {
        None => Ok(()),
        Some(problem) => Err(PathError::NotALibrary {
            path: path.to_owned(),
            problem,
        }),
    }
}

/// Length of the first fields of an ELF header, up to and including `e_machine`. These fields are
/// the same in 32-bit and 64-bit files.
const ELF_BYTES: usize = 20;
/// Values of `e_machine`, each with the name of the machine.
const MACHINES: [(u16, &str); 8] = [
    (3, "32-bit x86"),
    (20, "32-bit PowerPC"),
    (21, "PowerPC"),
    (22, "s390x"),
    (40, "32-bit ARM"),
    (62, "x86-64"),
    (183, "aarch64"),
    (243, "RISC-V"),
];

/// Returns the reason why a file is not a shared library for this machine. Without this check, the
/// dynamic linker would report only "No such file or directory" for a library of another machine.
fn elf_problem(mut file: &File) -> Option<String> {
    let mut header = [0; ELF_BYTES];
    if file.read_exact(&mut header).is_err() || !header.starts_with(b"\x7fELF") {
        return Some("the file is not a shared library".to_owned());
    }
    // The value 2 in byte 5 of the ELF header means big endian.
    let pair = [header[18], header[19]];
    let machine = if header[5] == 2 {
        u16::from_be_bytes(pair)
    } else {
        u16::from_le_bytes(pair)
    };
    let ours = match std::env::consts::ARCH {
        "x86_64" => 62,
        "aarch64" => 183,
        // On other types of machine, only the dynamic linker checks the library.
        _ => return None,
    };
    let name = |number: u16| {
        let known = MACHINES.iter().find(|(known, _)| *known == number);
        known.map_or_else(
            || format!("machine {number}"),
            |(_, name)| (*name).to_owned(),
        )
    };
    (machine != ours).then(|| {
        format!(
            "the file was built for {}, but this machine is {}: install the module for the architecture of this machine",
            name(machine),
            name(ours)
        )
    })
}

/// Returns the problem of SoftHSM's configuration file, if any. SoftHSM's own message contains
/// neither the file nor the cause. `environment` is the environment of the module.
pub fn softhsm_problem(module: &Path, environment: &BTreeMap<String, String>) -> Option<String> {
    let named = environment.get(SOFTHSM_VARIABLE);
    let is_softhsm = module
        .file_name()
        .is_some_and(|name| name.to_string_lossy().contains("softhsm"));
    let (path, origin) = match named {
        Some(path) => (
            path.as_str(),
            format!("[token.environment] {SOFTHSM_VARIABLE}"),
        ),
        None if is_softhsm => (
            SOFTHSM_DEFAULT,
            format!(
                "{SOFTHSM_VARIABLE} is not in [token.environment], so SoftHSM reads its default configuration file"
            ),
        ),
        None => return None,
    };
    let user = rustix::process::geteuid().as_raw();
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Some(format!(
                "{origin}: there is no file {path}; create it with the line `directories.tokendir = DIRECTORY`"
            ));
        }
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            return Some(format!(
                "{origin}: user {user} cannot read {path}; change its owner or mode"
            ));
        }
        Err(error) => return Some(format!("{origin}: cannot read {path}: {error}")),
    };
    let directory = text.lines().find_map(|line| {
        let (name, value) = line.split_once('=')?;
        (name.trim() == "directories.tokendir").then(|| value.trim())
    });
    let Some(directory) = directory.filter(|directory| !directory.is_empty()) else {
        return Some(format!(
            "{origin}: {path} has no line `directories.tokendir = DIRECTORY`"
        ));
    };
    let directory = Path::new(directory);
    let shown = directory.display();
    if !directory.is_dir() {
        return Some(format!(
            "{origin}: the token directory {shown} in {path} does not exist; create it, owned by user {user}, with mode \
             0700"
        ));
    }
    // SoftHSM must be able to write, because it rewrites the file of a token at each login.
    let needed = Access::READ_OK | Access::WRITE_OK | Access::EXEC_OK;
    access(directory, needed).is_err().then(|| {
        format!(
            "{origin}: user {user} cannot read and write the token directory {shown} of {path}; change its owner or mode"
        )
    })
}

/// Refuses files and directories in `token.environment` that other users could change, such as the
/// file in `SOFTHSM2_CONF`. The environment of a module contains the names of files from which the
/// module reads the location of its keys, or loads further code. The value of a variable is checked
/// if it is the absolute path of an existing file or directory, or a colon-separated list of such
/// paths (`LD_LIBRARY_PATH`).
pub fn check_environment(environment: &BTreeMap<String, String>) -> Result<(), PathError> {
    for (name, value) in environment {
        let whole = Path::new(value);
        let parts: Vec<&Path> = if whole.exists() {
            vec![whole]
        } else {
            value.split(':').map(Path::new).collect()
        };
        for path in parts.into_iter().filter(|path| path.is_absolute()) {
            trusted_file::check_if_present(path, ENVIRONMENT).map_err(|source| {
                PathError::Environment {
                    name: name.clone(),
                    source: Box::new(source),
                }
            })?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    /// The beginning of a shared library for this machine.
    fn library() -> Vec<u8> {
        let program = fs::read(std::env::current_exe().unwrap()).unwrap();
        program[..64].to_vec()
    }

    #[test]
    fn a_module_of_another_machine_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let module = folder.path().join("module.so");
        let check = |content: &[u8]| {
            fs::write(&module, content).unwrap();
            fs::set_permissions(&module, fs::Permissions::from_mode(0o755)).unwrap();
            check_module(&module)
        };
        check(&library()).unwrap();
        for (number, name) in MACHINES {
            let mut other = library();
            other[18..20].copy_from_slice(&number.to_le_bytes());
            let said = check(&other).map_or_else(|error| error.to_string(), |()| String::new());
            let is_ours = other == library();
            assert_eq!(
                said.contains(&format!("was built for {name},")),
                !is_ours,
                "{said}"
            );
        }
        for content in [
            &b""[..],
            b"MZ",
            b"#!/bin/sh\n# a script of more than twenty bytes",
        ] {
            let said = check(content).unwrap_err().to_string();
            assert!(said.contains("is not a shared library"), "{said}");
        }
    }

    #[test]
    fn each_mistake_with_the_file_of_softhsm_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("softhsm2.conf");
        let tokens = folder.path().join("tokens");
        let shown = file.display().to_string();
        let environment = BTreeMap::from([("SOFTHSM2_CONF".to_owned(), shown.clone())]);
        let problem = || softhsm_problem(Path::new("/usr/lib/other.so"), &environment);
        let missing = problem().unwrap();
        assert!(
            missing.contains(&format!("there is no file {shown}")),
            "{missing}"
        );
        fs::write(&file, "log.level = INFO\n").unwrap();
        let without = problem().unwrap();
        assert!(
            without.contains("has no line `directories.tokendir"),
            "{without}"
        );
        fs::write(
            &file,
            format!("# a comment\ndirectories.tokendir = {}\n", tokens.display()),
        )
        .unwrap();
        let absent = problem().unwrap();
        assert!(
            absent.contains(&format!("{} in {shown} does not exist", tokens.display())),
            "{absent}"
        );
        fs::create_dir(&tokens).unwrap();
        assert_eq!(problem(), None);
        // Root can read every file, so root cannot have the problems of the next two tests.
        if !rustix::process::geteuid().is_root() {
            fs::set_permissions(&tokens, fs::Permissions::from_mode(0o500)).unwrap();
            assert!(
                problem()
                    .unwrap()
                    .contains("cannot read and write the token directory")
            );
            fs::set_permissions(&file, fs::Permissions::from_mode(0o000)).unwrap();
            assert!(problem().unwrap().contains("cannot read"));
        }
        let none = softhsm_problem(Path::new("/usr/lib/other.so"), &BTreeMap::new());
        assert_eq!(none, None);
    }

    #[test]
    fn a_module_that_other_users_can_replace_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let module = folder.path().join("module.so");
        let problem = check_module(&module).unwrap_err().to_string();
        assert!(problem.contains("no PKCS#11 module at"), "{problem}");
        let problem = check_module(folder.path()).unwrap_err().to_string();
        assert!(problem.contains("is a directory"), "{problem}");
        fs::write(&module, library()).unwrap();
        for (mode, good) in [(0o755, true), (0o644, true), (0o775, false), (0o646, false)] {
            fs::set_permissions(&module, fs::Permissions::from_mode(mode)).unwrap();
            assert_eq!(check_module(&module).is_ok(), good, "{mode:o}");
        }
    }

    #[test]
    fn what_the_environment_of_the_module_names_cannot_be_changed_by_others() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("softhsm2.conf");
        fs::write(&file, "").unwrap();
        let shown = file.display().to_string();
        let check = |value: &str| {
            check_environment(&BTreeMap::from([("VARIABLE".to_owned(), value.to_owned())]))
        };
        let list = format!("/usr/lib:{shown}");
        for value in [shown.as_str(), &list, "/nowhere", "text", "/dev/null", ""] {
            check(value).unwrap();
        }
        fs::set_permissions(&file, fs::Permissions::from_mode(0o664)).unwrap();
        for value in [shown.as_str(), &list] {
            let problem = check(value).unwrap_err().to_string();
            assert!(
                problem.contains("VARIABLE") && problem.contains("chmod go-w"),
                "{problem}"
            );
        }
    }
}
