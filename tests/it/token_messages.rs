//! Mistakes with PIN, token and softhsm2.conf: the message names the file or the token, the cause and the remedy.

use std::{fs, os::unix::fs::chown};

use keybroker_test_support::skip::is_root;

use crate::{
    expected::{CONFIGURATION, OTHER_USER, PIN, TOKEN, UNTRUSTED, USAGE, says},
    faulty::{Fault, flag},
    faulty_token,
    site::{Options, Site},
    softhsm::{self, write_private},
};

/// `CKR_PIN_LEN_RANGE`.
const PIN_LEN_RANGE: i64 = 0xa2;

/// A file with a PIN of the security officer, for `--so-pin-file`.
fn so_pin(site: &Site, pin: &str) -> String {
    let path = site.folder().join("so-pin");
    write_private(&path, pin);
    path.display().to_string()
}

fn serial(site: &Site) -> String {
    let listed = site.expect_ok(&["-o", "json", "token", "list"]);
    let listed: serde_json::Value = serde_json::from_str(&listed).unwrap();
    let mut tokens = listed.as_array().unwrap().iter();
    let token = tokens.find(|token| token["label"] == site.token.label());
    token.unwrap()["serial"].as_str().unwrap().to_owned()
}

#[test]
fn a_wrong_pin_names_its_file_and_what_the_token_counts() {
    let (site, faulty) = faulty_token::site(Options::default());
    let file = site.token.pin_file();
    write_private(&file, "0000000000");
    faulty.set_flags(flag::USER_PIN_COUNT_LOW);
    let shown = file.display().to_string();
    let checked = site.run(&["token", "check"]);
    says(
        "checked",
        &checked,
        PIN,
        &[
            &shown,
            "rejected the PIN",
            "PinIncorrect from C_Login",
            "counts wrong PINs",
        ],
    );
    says(
        "token check",
        &site.run(&["token", "check"]),
        PIN,
        &[&shown, "no login was tried"],
    );
}

#[test]
fn each_form_of_a_bad_pin_file_is_named_without_a_login() {
    let (site, faulty) = faulty_token::site(Options::default());
    let file = site.token.pin_file();
    let shown = file.display().to_string();
    let forms: [(&[u8], &str); 8] = [
        (b"1234\n5678\n", "more than one line"),
        (b"1234\r\n5678\r\n", "more than one line"),
        (b"12\x0734", "control character"),
        (b"1234 \n", "blank"),
        (b"\xef\xbb\xbf1234\n", "byte order mark"),
        (b"\xff\xfe1\x002\x003\x00", "UTF-8"),
        (b"", "empty"),
        (&[b'1'; 256], "longer than 255 bytes"),
    ];
    let before = faulty.count("C_Login begins");
    for (content, word) in forms {
        write_private(&file, "");
        fs::write(&file, content).unwrap();
        says(
            "token check",
            &site.run(&["token", "check"]),
            PIN,
            &[&shown, word],
        );
        says(
            "config check",
            &site.run(&["config", "check"]),
            CONFIGURATION,
            &[&shown, word],
        );
    }
    fs::remove_file(&file).unwrap();
    says(
        "token check",
        &site.run(&["token", "check"]),
        PIN,
        &[&shown],
    );
    fs::create_dir(&file).unwrap();
    says(
        "token check",
        &site.run(&["token", "check"]),
        PIN,
        &[&shown, "is a directory"],
    );
    assert_eq!(faulty.count("C_Login begins"), before);
    // A line end of Windows is not part of the PIN.
    fs::remove_dir(&file).unwrap();
    write_private(&file, &format!("{}\r\n", site.token.pin()));
    site.expect_ok(&["token", "check"]);
}

#[test]
fn each_mistake_with_softhsm2_conf_is_named() {
    let site = Site::fresh(Options::default());
    let conf = site.token.configuration();
    let shown = conf.display().to_string();
    let good = fs::read_to_string(&conf).unwrap();
    let commands: [&[&str]; 3] = [
        &["token", "list"],
        &["token", "check"],
        &["config", "check"],
    ];
    let each = |words: &[&str]| {
        for arguments in commands {
            let finished = site.run(arguments);
            let code = if arguments[0] == "config" {
                CONFIGURATION
            } else {
                TOKEN
            };
            says("finished", &finished, code, words);
        }
    };
    fs::remove_file(&conf).unwrap();
    each(&["SOFTHSM2_CONF", "there is no file", &shown]);
    let nowhere = site.folder().join("no-tokens");
    fs::write(
        &conf,
        format!("directories.tokendir = {}\n", nowhere.display()),
    )
    .unwrap();
    each(&[
        "token directory",
        nowhere.to_str().unwrap(),
        "does not exist",
    ]);
    fs::write(&conf, &good).unwrap();
    site.expect_ok(&["config", "check"]);
    site.expect_ok(&["token", "check"]);
}

/// What is set in the shell and not in `[token.environment]` is named, because it worked in the vendor's tool.
#[test]
fn a_variable_of_the_shell_that_is_not_passed_on_is_named() {
    let site = Site::fresh(Options::default());
    let line = format!(
        "SOFTHSM2_CONF = \"{}\"\n",
        site.token.configuration().display()
    );
    site.replace_once(&line, "");
    for arguments in [
        &["token", "check"][..],
        &["key", "generate"],
        &["store", "check"],
    ] {
        let mut command = site.command(arguments);
        command.env("SOFTHSM2_CONF", site.token.configuration());
        let finished = site.run_to_its_end(command);
        says(
            "finished",
            &finished,
            TOKEN,
            &[
                "passes these environment variables on",
                "SOFTHSM2_CONF",
                "[token.environment]",
            ],
        );
    }
    // Nothing of it is said of a failure that has another cause.
    site.write_configuration(|_| {});
    let so_pin = so_pin(&site, "12345678");
    let label = site.token.label();
    let mut command = site.command(&["token", "init", "--label", label, "--so-pin-file", &so_pin]);
    command.env("OTHER_PKCS11_CONF", "/nowhere");
    let finished = site.run_to_its_end(command);
    says("finished", &finished, TOKEN, &["already exists (serial "]);
    assert!(
        !finished.stderr.contains("OTHER_PKCS11_CONF"),
        "{finished:#?}"
    );
}

#[test]
fn a_wrong_or_short_pin_at_init_changes_nothing() {
    let (site, faulty) = faulty_token::site(Options::default());
    let serial = serial(&site);
    let label = site.token.label().to_owned();
    let init = |so_pin: &str| {
        site.run(&[
            "token",
            "init",
            "--label",
            &label,
            "--erase-serial",
            &serial,
            "--so-pin-file",
            so_pin,
        ])
    };
    let wrong = so_pin(&site, "87654321-wrong");
    says(
        "a wrong PIN",
        &init(&wrong),
        PIN,
        &[
            &wrong,
            "rejected the security officer's PIN",
            "Nothing was changed",
        ],
    );
    let short = so_pin(&site, "123");
    let attempts = faulty.count("C_InitToken begins");
    says(
        "a short PIN",
        &init(&short),
        PIN,
        &[
            "security officer's PIN has 3 bytes",
            "accepts PINs of 4 to 255",
            "Nothing was changed",
        ],
    );
    let pin = site.token.pin().to_owned();
    write_private(&site.token.pin_file(), "123");
    let user_file = format!("PIN file {}", site.token.pin_file().display());
    let long = so_pin(&site, "12345678");
    says(
        "a long PIN",
        &init(&long),
        PIN,
        &[&user_file, "user PIN has 3 bytes", "Nothing was changed"],
    );
    assert_eq!(faulty.count("C_InitToken begins"), attempts);
    write_private(&site.token.pin_file(), &pin);
    site.expect_ok(&["token", "check"]);
}

/// A token that takes another length of PIN than it says: what the token is now, and how to go on.
#[test]
fn a_token_left_without_a_user_pin_says_how_to_go_on() {
    let (site, faulty) = faulty_token::site(Options::default());
    faulty.set("C_InitPIN", &Fault::always(PIN_LEN_RANGE));
    let so_pin = so_pin(&site, "12345678");
    let init = [
        "token",
        "init",
        "--label",
        "second",
        "--so-pin-file",
        &so_pin,
    ];
    let made = site.run(&init);
    says(
        "made",
        &made,
        TOKEN,
        &[
            "\"second\"",
            "is initialised, but has no user PIN",
            "PinLenRange from C_InitPIN",
            "--erase-serial ",
        ],
    );
    let (_, rest) = made.stderr.split_once("--erase-serial ").unwrap();
    let serial: String = rest.chars().take_while(char::is_ascii_hexdigit).collect();
    faulty.clear("C_InitPIN");
    site.expect_ok(&[&init[..], &["--erase-serial", &serial]].concat());
}

#[test]
fn lengths_that_no_key_or_label_has_are_refused_first() {
    let site = Site::without_keys(Options::default());
    for bits in ["2049", "1024", "8192", "0", "x"] {
        let made = site.run(&["key", "generate", "--bits", bits]);
        says("made", &made, USAGE, &["2048", "3072", "4096"]);
    }
    let label = "a label of thirty-seven bytes, at all";
    assert_eq!(label.len(), 37);
    let configured = format!("label = \"{}\"", site.token.label());
    site.replace_once(&configured, &format!("label = \"{label}\""));
    says(
        "config check",
        &site.run(&["config", "check"]),
        CONFIGURATION,
        &["`label` has 37 bytes", "at most 32"],
    );
    site.write_configuration(|_| {});
    let so_pin = so_pin(&site, "12345678");
    let made = site.run(&["token", "init", "--label", label, "--so-pin-file", &so_pin]);
    says(
        "made",
        &made,
        TOKEN,
        &["longer than 32 bytes", "Nothing was changed"],
    );
}

/// SoftHSM has RSA-OAEP with SHA-1 only: without the permission for it no pair is made that no command removes.
#[test]
fn a_token_without_sha256_gets_no_orphan_pair() {
    let site = Site::without_keys(Options::default());
    site.expect_ok(&["store", "migrate"]);
    site.replace_once("allow_oaep_sha1 = true", "allow_oaep_sha1 = false");
    let made = site.run(&["key", "generate"]);
    says(
        "made",
        &made,
        UNTRUSTED,
        &["SHA-256", "allow_oaep_sha1 = true", "No key was made"],
    );
    let objects = || {
        let listed = site.token.pkcs11_tool(&["--list-objects"]);
        String::from_utf8(listed.stdout).unwrap()
    };
    assert!(!objects().contains("Object;"), "{}", objects());
    site.write_configuration(|_| {});
    site.expect_ok(&["key", "generate", "--bits", "2048"]);
    // One private, one public and one secret key: nothing is left of the pair of the try.
    assert_eq!(objects().matches("Object;").count(), 3, "{}", objects());
}

#[test]
fn config_check_examines_the_token() {
    let (site, faulty) = faulty_token::site(Options::default());
    let good = site.run(&["config", "check"]);
    assert_eq!(good.code, Some(0), "{good:#?}");
    let label = site.token.label().to_owned();
    for word in [label.as_str(), "lists RSA-OAEP for", "token check"] {
        assert!(good.stderr.contains(word), "{good:#?}");
    }
    let logins = faulty.count("C_Login begins");
    for (flags, word) in [
        (flag::USER_PIN_LOCKED, "locked user PIN"),
        (flag::USER_PIN_FINAL_TRY, "locks after one more wrong PIN"),
    ] {
        faulty.set_flags(flags);
        says(
            "config check",
            &site.run(&["config", "check"]),
            CONFIGURATION,
            &[&label, word],
        );
    }
    faulty.set_flags(0);
    site.expect_ok(&["config", "check"]);
    assert_eq!(faulty.count("C_Login begins"), logins);

    // No token of this label.
    let text = fs::read_to_string(site.configuration_file()).unwrap();
    let other = text.replacen(&format!("label = \"{label}\""), "label = \"another\"", 1);
    fs::write(site.configuration_file(), other).unwrap();
    says(
        "config check",
        &site.run(&["config", "check"]),
        CONFIGURATION,
        &["no token matches", &label],
    );
}

#[test]
fn config_check_says_when_no_token_was_looked_for_or_none_is_there() {
    let site = Site::fresh(Options::default());
    let directory = site.token.directory();
    fs::rename(&directory, directory.with_extension("away")).unwrap();
    fs::create_dir(&directory).unwrap();
    let none = site.run(&["config", "check"]);
    assert_eq!(none.code, Some(0), "{none:#?}");
    assert!(
        none.stderr.contains("shows no initialised token"),
        "{none:#?}"
    );
    let module = format!("module = \"{}\"", softhsm::module().display());
    site.replace_once(&module, "module = \"/nowhere/p11.so\"");
    let missing = site.run(&["config", "check"]);
    says(
        "missing",
        &missing,
        CONFIGURATION,
        &["/nowhere/p11.so", "the token was not examined"],
    );
}

/// Root may read everything, and a file of root's in the broker's directories would stop the broker.
#[test]
fn root_is_told_which_user_to_be() {
    // Only root can give a file to another user.
    if !is_root("a PIN file of another user") {
        return;
    }
    let site = Site::fresh(Options::default());
    let file = site.token.pin_file();
    chown(&file, Some(OTHER_USER), None).unwrap();
    let words = [
        file.to_str().unwrap(),
        "belongs to user 65534",
        "as user 65534",
    ];
    says("token check", &site.run(&["token", "check"]), PIN, &words);
    chown(&file, Some(0), None).unwrap();
    chown(site.audit_directory(), Some(OTHER_USER), None).unwrap();
    for arguments in [&["key", "generate"][..], &["token", "retry-pin"]] {
        let made = site.run(arguments);
        assert_ne!(made.code, Some(0), "{made:#?}");
        let said = &made.stderr;
        assert!(said.contains("belongs to user 65534"), "{said}");
        assert!(said.contains("run the command as user 65534"), "{said}");
    }
}
