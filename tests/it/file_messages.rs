//! Mistakes with the files and directories that the configuration and the command line name: the message names the file, the
//! cause and the remedy. Each mistake is made for real, with the real binary.

use std::{
    fs,
    os::unix::fs::{PermissionsExt as _, chown},
    path::Path,
    process::{Command, Stdio},
};

use keybroker_test_support::skip::is_root;
use rustix::process::Signal;

use crate::{
    expected::{AUDIT, CONFIGURATION, INTERRUPTED, OTHER_USER, PIN, STORE, TOKEN, UNTRUSTED, says},
    faulty::{Fault, code},
    faulty_token,
    process::{can_mount, send, until},
    site::{Finished, Options, Site},
    softhsm::{self, write_private},
};

/// Runs a command in a mount namespace of its own, after shell commands that change mounts below the directory `$1`. Absent
/// without the right to mount.
fn run_mounted(
    site: &Site,
    directory: &Path,
    mounts: &str,
    arguments: &[&str],
) -> Option<Finished> {
    if !can_mount(&format!("{arguments:?}")) {
        return None;
    }
    let plain = site.command(arguments);
    let mut command = Command::new("unshare");
    command
        .args(["--mount", "sh", "-euc"])
        .arg(format!("{mounts}\nshift; exec \"$@\""))
        .arg("sh")
        .arg(directory)
        .arg(plain.get_program())
        .args(plain.get_args());
    Some(site.run_to_its_end(command))
}

const READ_ONLY: &str = "mount --bind \"$1\" \"$1\"; mount -o remount,bind,ro \"$1\"";
/// Copies the directory to a file system of its own, and fills that.
const FULL: &str = "copy=$(mktemp -d); cp -a \"$1/.\" \"$copy\"; mount -t tmpfs -o size=1m,mode=700 none \"$1\"; \
                    cp -a \"$copy/.\" \"$1\"; rm -r \"$copy\"; dd if=/dev/zero of=\"$1/filler\" bs=4k 2>/dev/null || true";

/// Forms of a configuration file that cannot be read, and words of the message.
const FORMS: [(&str, &[u8], &[&str]); 3] = [
    (
        "UTF-16",
        b"\xff\xfe[\0t\0o\0k\0e\0n\0]\0",
        &["is UTF-16", "hint: save the file as UTF-8"],
    ),
    (
        "Latin-1",
        b"# Schl\xfcssel\n",
        &["is not UTF-8", "hint: save the file as UTF-8"],
    ),
    ("nothing", b"", &["missing field"]),
];

#[test]
fn each_form_of_a_configuration_file_that_cannot_be_read_is_named() {
    let site = Site::without_keys(Options::default());
    let file = site.configuration_file();
    for (what, content, words) in FORMS {
        fs::write(&file, content).unwrap();
        says(what, &site.run(&["config", "check"]), CONFIGURATION, words);
    }
    fs::remove_file(&file).unwrap();
    fs::create_dir(&file).unwrap();
    says(
        "a directory",
        &site.run(&["config", "check"]),
        CONFIGURATION,
        &["is a directory", "hint: pass a file with --config"],
    );
    // A byte order mark in front of a good one is no mistake.
    fs::remove_dir(&file).unwrap();
    site.write_configuration(|text| text.insert(0, '\u{feff}'));
    site.expect_ok(&["config", "check"]);
}

/// A command with a configuration that does not exist.
fn elsewhere(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_keybroker"));
    command.args(["--config", "nothere.toml"]).args(arguments);
    command
}

#[test]
fn a_relative_path_that_is_missing_is_named_once() {
    let site = Site::without_keys(Options::default());
    let finished = site.run_to_its_end(elsewhere(&["config", "check"]));
    says(
        "relative",
        &finished,
        CONFIGURATION,
        &["cannot read nothere.toml: No such file"],
    );
    assert_eq!(
        finished.stderr.matches("nothere").count(),
        1,
        "{finished:#?}"
    );
}

#[test]
fn a_path_with_a_tilde_is_said_not_to_be_expanded() {
    let site = Site::without_keys(Options::default());
    let pin = site.token.pin_file().display().to_string();
    site.replace_once(&pin, "~/pin");
    let finished = site.run(&["config", "check"]);
    let words = ["[token] `pin_file`", "absolute path", "`~` is not expanded"];
    says("a tilde", &finished, CONFIGURATION, &words);
    assert_eq!(finished.stderr.matches("~/pin").count(), 1, "{finished:#?}");
}

/// The configuration names a PIN file, too.
#[test]
fn a_pin_file_of_an_option_is_named_with_the_option() {
    let site = Site::without_keys(Options::default());
    for (option, arguments) in [
        (
            "--pin-file",
            &["token", "check", "--pin-file", "nothere"][..],
        ),
        (
            "--so-pin-file",
            &["token", "init", "--label", "x", "--so-pin-file", "nothere"],
        ),
    ] {
        let words = format!("{option}: cannot read nothere: No such file");
        says(option, &site.run(arguments), PIN, &[&words]);
    }
}

/// Several listeners often have the same files.
#[test]
fn a_bad_file_of_several_listeners_is_reported_once() {
    let site = Site::without_keys(Options::default());
    site.write_configuration(|text| {
        let begin = text.find("[[listener]]").unwrap();
        let end = text.find("\n[limits]").unwrap();
        let second = text[begin..end].replacen("127.0.0.1:0", "127.0.0.2:0", 1);
        text.insert_str(end, &format!("\n{second}\n"));
    });
    site.pki
        .issue_server_with(|one| one.subject_alt_names.clear());
    let finished = site.run(&["config", "check"]);
    let words = ["[[listener]] 127.0.0.1:0, 127.0.0.2:0: ", "no DNS name"];
    says("two listeners", &finished, CONFIGURATION, &words);
    assert_eq!(
        finished.stderr.matches("no DNS name").count(),
        1,
        "{finished:#?}"
    );
}

#[test]
fn a_host_that_no_machine_has_is_refused() {
    let site = Site::without_keys(Options {
        store: Some("url = \"postgres://kb@local host/kb\"".to_owned()),
        ..Options::default()
    });
    says(
        "a blank",
        &site.run(&["config", "check"]),
        CONFIGURATION,
        &["[store]: `url`: the URL has ' ' in the host"],
    );
}

/// A policy under another name has no effect, and a mistake is reported in one place.
#[test]
fn each_mistake_with_files_of_policies_is_named() {
    let site = Site::without_keys(Options::default());
    let policies = site.folder().join("policies");
    fs::create_dir(&policies).unwrap();
    let directory = policies.to_str().unwrap().to_owned();
    let write = |name: &str, text: &str| fs::write(policies.join(name), text).unwrap();
    let section = format!("\n[policy]\ndirectory = \"{directory}\"\n");
    site.write_configuration(|text| text.push_str(&section));

    let good = "\u{feff}forbid (principal == Keybroker::Service::\"URI:spiffe://nowhere/bakcup\", action, resource);\n";
    write("site.cedar", good);
    write("site.cedar.bak", good);
    write("b.Cedar", good);
    for arguments in [
        &["config", "check"][..],
        &["policy", "check"],
        &["policy", "check", "--directory", &directory],
    ] {
        let finished = site.run(arguments);
        let words = [
            "site.cedar.bak is not read",
            "b.Cedar is not read",
            "bakcup",
        ];
        says(&format!("{arguments:?}"), &finished, 0, &words);
    }
    let finished = site.run_to_its_end(elsewhere(&["policy", "check", "--directory", &directory]));
    says("no configuration", &finished, 0, &["were not compared"]);
    assert!(
        finished.stdout.contains("unknown_principals  -"),
        "{finished:#?}"
    );

    write("site.cedar", "permit (principal, action, resource)\n");
    let finished = site.run(&["policy", "check"]);
    says(
        "no semicolon",
        &finished,
        CONFIGURATION,
        &["a policy ends with a semicolon"],
    );
    let both = format!("{}{}", finished.stdout, finished.stderr);
    assert_eq!(both.matches("end of input").count(), 1, "{finished:#?}");

    write("site.cedar", "// Schl");
    fs::write(policies.join("site.cedar"), b"// Schl\xfcssel\n").unwrap();
    let finished = site.run(&["policy", "check"]);
    says(
        "Latin-1",
        &finished,
        CONFIGURATION,
        &["site.cedar", "save it as UTF-8"],
    );
}

#[test]
fn a_file_that_is_no_database_is_named_with_its_path() {
    let site = Site::without_keys(Options::default());
    let database = site.database();
    let shown = database.to_str().unwrap();
    write_private(&database, &"a text under this name\n".repeat(100));
    for arguments in [
        &["store", "status"][..],
        &["store", "migrate"],
        &["key", "list"],
    ] {
        let words = [shown, "is not a SQLite database", "to another file"];
        says(
            &format!("{arguments:?}"),
            &site.run(arguments),
            STORE,
            &words,
        );
    }
    says(
        "config check",
        &site.run(&["config", "check"]),
        CONFIGURATION,
        &[shown, "is not a SQLite database"],
    );
}

#[test]
fn a_damaged_database_is_told_from_another_file() {
    let site = Site::fresh(Options::default());
    let database = site.database();
    let length = fs::metadata(&database).unwrap().len();
    let file = fs::OpenOptions::new().write(true).open(&database).unwrap();
    file.set_len(length / 2).unwrap();
    for side in ["-wal", "-shm"] {
        fs::remove_file(format!("{}{side}", database.display())).ok();
    }
    let words = ["contains damaged data", "SQLite", "restore a backup"];
    says("half of it", &site.run(&["key", "list"]), STORE, &words);
}

/// The remedy is that of the cause: not the owner of the directory, but its file system.
#[test]
fn a_file_system_that_cannot_be_written_is_named_as_such() {
    let site = Site::fresh(Options::default());
    let (data, audit) = (site.data_directory(), site.audit_directory());
    let forgetful = format!("rm -r \"$1/state\"; {FULL}");
    let read_only = "mounted read-only";
    for (directory, mounts, arguments, exit, words) in [
        (
            &data,
            READ_ONLY,
            &["store", "migrate"][..],
            STORE,
            read_only,
        ),
        (
            &data,
            READ_ONLY,
            &["config", "check"],
            CONFIGURATION,
            read_only,
        ),
        (
            &audit,
            READ_ONLY,
            &["config", "check"],
            CONFIGURATION,
            read_only,
        ),
        (&audit, READ_ONLY, &["store", "migrate"], AUDIT, read_only),
        (&data, FULL, &["store", "status"], STORE, "free space"),
        (&data, FULL, &["key", "generate"], STORE, "free space"),
        (&audit, FULL, &["store", "migrate"], AUDIT, "free space"),
        // Without its record of PINs.
        (&audit, &forgetful, &["token", "check"], TOKEN, "free space"),
    ] {
        let what = format!("{mounts}: {arguments:?}");
        if let Some(finished) = run_mounted(&site, directory, mounts, arguments) {
            says(&what, &finished, exit, &[words]);
        }
    }
}

/// Reads that another user tries say which user to be.
#[test]
fn a_file_that_cannot_be_read_says_which_user_to_be() {
    if !is_root("commands of another user") {
        return;
    }
    let site = Site::fresh(Options::default());
    // The other user must find the configuration, and nothing else.
    fs::set_permissions(site.folder(), fs::Permissions::from_mode(0o755)).unwrap();
    fs::set_permissions(site.configuration_file(), fs::Permissions::from_mode(0o644)).unwrap();
    let audit = site.audit_directory();
    for (arguments, exit) in [
        (&["audit", "verify"][..], AUDIT),
        (&["audit", "show"], AUDIT),
        (&["key", "list"], STORE),
        (&["store", "status"], STORE),
        (&["store", "migrate"], AUDIT),
    ] {
        fs::set_permissions(site.data_directory(), fs::Permissions::from_mode(0o700)).unwrap();
        let plain = site.command(arguments);
        let mut command = Command::new("setpriv");
        command
            .args(["--reuid", &OTHER_USER.to_string(), "--clear-groups", "--"])
            .arg(plain.get_program())
            .args(plain.get_args());
        let finished = site.run_to_its_end(command);
        says(
            &format!("{arguments:?}"),
            &finished,
            exit,
            &["run the command as user 0"],
        );
    }
    chown(&audit, Some(0), None).unwrap();
}

#[test]
fn an_audit_log_that_did_not_begin_yet_is_told_from_one_that_is_gone() {
    let site = Site::without_keys(Options::default());
    for arguments in [&["audit", "verify"][..], &["audit", "show"]] {
        let words = ["a broker begins its audit log at its first start"];
        says(
            &format!("{arguments:?}"),
            &site.run(arguments),
            AUDIT,
            &words,
        );
    }
}

#[test]
fn an_audit_directory_that_others_can_use_is_named_with_the_remedy() {
    let site = Site::without_keys(Options::default());
    let directory = site.audit_directory();
    fs::create_dir(&directory).unwrap();
    fs::set_permissions(&directory, fs::Permissions::from_mode(0o755)).unwrap();
    let remedy = format!("run `chmod 700 {}`", directory.display());
    for (arguments, exit) in [
        (&["store", "migrate"][..], AUDIT),
        (&["config", "check"], CONFIGURATION),
    ] {
        let words = ["has mode 0755", &remedy];
        says(
            &format!("{arguments:?}"),
            &site.run(arguments),
            exit,
            &words,
        );
    }
}

#[test]
fn a_backup_without_a_registered_key_is_not_confirmed() {
    let site = Site::without_keys(Options::default());
    site.expect_ok(&["store", "migrate"]);
    let finished = site.run(&["token", "backup-confirmed"]);
    let words = [
        "no wrapping key of this token is registered",
        "hint: run `keybroker key generate`",
    ];
    says("no key", &finished, UNTRUSTED, &words);
}

/// One heading for each key, because the id of a key would fill each line.
#[test]
fn the_attribute_check_is_shown_under_the_id_of_each_key() {
    let site = Site::fresh(Options::default());
    let shown = site.expect_ok(&["token", "check"]);
    let (heading, table) = shown.split_once('\n').unwrap();
    let id = heading.strip_prefix("key ").unwrap();
    assert_eq!(id.len(), 32, "{shown}");
    assert!(!table.contains(id), "{shown}");
    let columns: Vec<&str> = table.lines().next().unwrap().split_whitespace().collect();
    assert_eq!(columns, ["object", "attribute", "verdict", "passes"]);
    assert!(
        shown.lines().all(|line| line.chars().count() <= 100),
        "{shown}"
    );
}

/// A command that is interrupted in a change says what was under way, and where its outcome can be seen.
#[test]
fn an_interrupted_command_says_what_was_under_way() {
    let (site, faulty) = faulty_token::site(Options::default());
    let slow = Fault {
        milliseconds: 600_000,
        ..Fault::always(code::LATE)
    };
    faulty.set("C_GenerateKeyPair", &slow);
    let mut command = site.command(&["key", "generate"]);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command.spawn().unwrap();
    until("the generation", || {
        (faulty.count("C_GenerateKeyPair begins") > 0).then_some(())
    });
    send(child.id(), Signal::INT);
    let finished = Finished::from(child.wait_with_output().unwrap());
    let words = [
        "interrupted during `wrapping_key.generate`",
        "hint: `keybroker token check`",
    ];
    says("a change", &finished, INTERRUPTED, &words);
}

/// A public key in PKCS #1.
fn pkcs1_key(folder: &Path) -> Vec<u8> {
    let openssl = |arguments: &[&str]| {
        let mut command = Command::new("openssl");
        let output = command
            .args(arguments)
            .current_dir(folder)
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        output.stdout
    };
    openssl(&["genrsa", "-out", "rsa.key", "2048"]);
    openssl(&["rsa", "-RSAPublicKey_out", "-in", "rsa.key"])
}

/// A chain in the wrong order, files of other programs, and another machine's module.
#[test]
fn each_file_that_another_program_would_accept_is_named_with_the_remedy() {
    let site = Site::without_keys(Options::default());
    let folder = site.folder().to_owned();
    let write = |name: &str, bytes: &[u8]| {
        let path = folder.join(name);
        fs::write(&path, bytes).unwrap();
        path.display().to_string()
    };
    // The first bytes of a shared library of another machine: 183 is aarch64, 62 is x86-64.
    let machine = if cfg!(target_arch = "x86_64") {
        183
    } else {
        62
    };
    let mut library = [0_u8; 64];
    library[..6].copy_from_slice(b"\x7fELF\x02\x01");
    (library[16], library[18]) = (3, machine);
    let module = softhsm::module().display().to_string();
    let foreign = write("foreign.so", &library);

    let [ca, server] = [site.pki.ca_file(), site.pki.certificate_file("server")];
    let [ca, server_text] = [&ca, &server].map(|path| fs::read_to_string(path).unwrap());
    let chain = write("chain.pem", format!("{ca}{server_text}").as_bytes());
    let server = server.display().to_string();

    let pkcs1 = write("pkcs1.pem", &pkcs1_key(&folder));
    let issuer = format!(
        "\n[[issuer]]\nname = \"sso\"\nissuer = \"https://sso.example\"\naudience = [\"kb\"]\npem_file = \"{pkcs1}\"\n\n[[principal]]"
    );
    for (what, from, to, words) in [
        (
            "another machine",
            module.as_str(),
            foreign.as_str(),
            &["was built for", "this machine is", "install the module"][..],
        ),
        (
            "the issuer first",
            &server,
            &chain,
            &["put the server's certificate first"],
        ),
        (
            "PKCS #1",
            "\n[[principal]]",
            &issuer,
            &["RSA PUBLIC KEY", "openssl rsa -RSAPublicKey_in"],
        ),
        (
            "an IPv6 address with a port",
            "url = \"sqlite:",
            "url = \"postgres://u@[::1]5433/kb\" # ",
            &["write a `:` before the port"],
        ),
        (
            "a credential without systemd",
            &server,
            "$CREDENTIALS_DIRECTORY/server.pem",
            &["CREDENTIALS_DIRECTORY is not set", "LoadCredential="],
        ),
    ] {
        site.write_configuration(|_| {});
        site.replace_once(from, to);
        says(what, &site.run(&["config", "check"]), CONFIGURATION, words);
    }
}
