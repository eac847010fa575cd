//! `keybroker bitwarden` against the real broker, with an account that Bitwarden's own client made.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::PathBuf,
    process::{Command, Stdio},
};

use serde_json::Value;
use tempfile::TempDir;

use super::site::{ADA, BOB, RestSite};
use crate::{identity::user, site::Finished, softhsm::write_private};

const EMAIL: &str = "test@bitwarden.com";
const PASSWORD: &str = "asdfasdfasdf";
const MASTER_KEY: &str = "ySXq1RVLKEaV1eoQE/ui9aFKIvXTl9PAXwp1MljfF50=";
const PROTECTED: &str = "2.Q/2PhzcC7GdeiMHhWguYAQ==|GpqzVdr0go0ug5cZh1n+uixeBC3oC90CIe0hd/HWA/pTRDZ8ane4fmsEIcuc8eMKUt55Y2q/fbNzsYu41YTZzzsJUSeqVjT8/iTQtgnNdpo=|dwI+uyvZ1h/iZ03VQ+/wrGEFYVewBUUl/syYgjsNMbE=";
/// `the diary of ada`, made with OpenSSL under the account's user key.
const ITEM: &str = include_str!("../../vectors/bitwarden/item.txt");

struct Desk {
    folder: TempDir,
}

impl Desk {
    fn new() -> Self {
        let desk = Self {
            folder: tempfile::tempdir().unwrap(),
        };
        desk.write("password", &format!("{PASSWORD}\n"));
        desk.write("protected", &format!("{PROTECTED}\n"));
        desk.write("item", ITEM);
        desk
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        write_private(&self.path(name), text);
    }

    /// A token of the account's user.
    fn write_token(&self, name: &str, rest: &RestSite) {
        let mut claims = user(ADA);
        claims["email"] = EMAIL.into();
        self.write(name, &rest.identity.mint(claims, serde_json::json!({})));
    }

    /// Runs a command in the folder; words are split at spaces.
    fn run(&self, line: &str) -> Finished {
        let mut command = Command::new(env!("CARGO_BIN_EXE_keybroker"));
        command
            .current_dir(self.folder.path())
            .arg("bitwarden")
            .args(line.split_whitespace())
            .stdin(Stdio::null());
        Finished::from(command.output().unwrap())
    }

    #[track_caller]
    fn ok(&self, line: &str) -> Value {
        let finished = self.run(&format!("{line} -o json"));
        assert_eq!(finished.code, Some(0), "{line}: {finished:#?}");
        serde_json::from_str(&finished.stdout).unwrap()
    }

    #[track_caller]
    fn fails(&self, line: &str, code: i32, words: &str) {
        let finished = self.run(line);
        assert_eq!(finished.code, Some(code), "{line}: {finished:#?}");
        assert!(finished.stderr.contains(words), "{line}: {finished:#?}");
        assert!(
            finished.stderr.contains("\nhint: "),
            "{line}: {finished:#?}"
        );
        assert_eq!(finished.stdout, "", "{line}");
    }
}

#[test]
fn an_account_migrates_and_unlocks() {
    let (rest, desk) = (RestSite::open(), Desk::new());
    desk.write_token("ada", &rest);
    desk.write("bob", &rest.token(BOB));
    fs::copy(rest.broker.site.pki.ca_file(), desk.path("ca")).unwrap();
    let url = format!("--url https://localhost:{} --ca-file ca", rest.tls.port());
    let account = format!("--email {EMAIL} --password-file password");

    let derived = desk.ok(&format!("derive {account} --out key"));
    assert_eq!(
        derived["authentication_hash"],
        "8HT+qrqqhBaGEIHp9mwuv1ivoW9r6yaauAkOCYbe+SM="
    );
    let mode = fs::metadata(desk.path("key")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);

    let fetch = format!("fetch {url} --token-file ada");
    desk.fails(&fetch, 10, "404 Not Found: KEY_NOT_FOUND");
    let enrol = format!("enrol {url} --token-file ada --master-key-file key");
    let enrolled = desk.ok(&format!("{enrol} --protected-key-file protected"));
    assert_eq!(
        (
            &enrolled["method"],
            &enrolled["opens_protected_key"],
            &enrolled["read_back"]
        ),
        (&"POST".into(), &true.into(), &true.into())
    );
    assert_eq!(
        (&enrolled["user"], &enrolled["email"]),
        (&ADA.into(), &EMAIL.into())
    );
    let again = desk.run(&enrol);
    assert!(
        again
            .stderr
            .contains(&format!("is for user {ADA} ({EMAIL})"))
    );
    desk.fails(&enrol, 10, "400 Bad Request: KEY_EXISTS");
    assert_eq!(desk.ok(&fetch)["key"], MASTER_KEY);
    desk.ok(&format!("{fetch} --out fetched"));
    assert_eq!(
        fs::read(desk.path("fetched")).unwrap(),
        fs::read(desk.path("key")).unwrap()
    );
    desk.fails(&format!("{fetch} --out fetched"), 2, "never overwrites");

    let unlock = format!("unlock {url} --token-file ada --protected-key-file protected");
    let unlocked = desk.ok(&unlock);
    assert_eq!(
        (&unlocked["user_key_bytes"], &unlocked["key_from"]),
        (&64.into(), &"broker".into())
    );
    desk.ok(&format!("{unlock} --item-file item --out diary"));
    assert_eq!(
        fs::read_to_string(desk.path("diary")).unwrap(),
        "the diary of ada"
    );
    let shown = desk.run(&format!("{unlock} --item-file item"));
    assert_eq!(shown.stdout, "the diary of ada", "{shown:#?}");
    desk.fails(
        &format!("unlock {url} --token-file bob --protected-key-file protected"),
        10,
        "404 Not Found: KEY_NOT_FOUND",
    );
    // Without TLS, as told.
    let plain = format!(
        "--url http://127.0.0.1:{}/ --token-file ada",
        rest.plain.port()
    );
    desk.fails(&format!("fetch {plain}"), 2, "not https");
    assert_eq!(
        desk.ok(&format!("fetch {plain} --allow-http"))["key"],
        MASTER_KEY
    );
}

/// The command reports a failed connection itself: no line of a library's log stands before it, and no colour in a file.
#[test]
fn a_broker_that_is_not_trusted_is_reported_once() {
    let (rest, desk) = (RestSite::open(), Desk::new());
    desk.write_token("ada", &rest);
    let failed = desk.run(&format!(
        "fetch --url https://localhost:{} --token-file ada",
        rest.tls.port()
    ));
    assert!(failed.stderr.starts_with("error: "), "{failed:#?}");
    assert!(failed.stderr.contains("\nhint: "), "{failed:#?}");
    assert!(!failed.stderr.contains('\u{1b}'), "{failed:#?}");
}

#[test]
fn keys_that_do_not_fit_are_not_enrolled() {
    let (rest, desk) = (RestSite::open(), Desk::new());
    desk.write_token("ada", &rest);
    desk.write("bad", "nonsense");
    fs::copy(rest.broker.site.pki.ca_file(), desk.path("ca")).unwrap();
    let broker = format!("--url https://localhost:{} --ca-file ca", rest.tls.port());
    let account = format!("--email {EMAIL} --password-file password");
    let enrol = format!("enrol {broker} --token-file ada --protected-key-file protected");
    // The wrong KDF, the wrong address.
    let wrong = format!("{enrol} {account} --iterations 600001");
    desk.fails(&wrong, 12, "the key is wrong");
    let wrong = format!("{enrol} --email ada@example.org --password-file password");
    desk.fails(
        &wrong,
        2,
        "the access token's e-mail address is test@bitwarden.com",
    );
    desk.fails(
        &format!("{enrol} {account} --user {BOB}"),
        2,
        &format!("the access token's user is {ADA}"),
    );
    desk.fails(&format!("fetch {broker} --token-file ada"), 10, "404");
    desk.fails(
        &format!("fetch {broker} --token-file bad"),
        10,
        "401 Unauthorized: CREDENTIAL",
    );
    let nobody = "fetch --url https://localhost:1 --token-file ada";
    desk.fails(nobody, 11, "cannot reach");
    let unknown_ca = format!(
        "fetch --url https://localhost:{} --token-file ada",
        rest.tls.port()
    );
    desk.fails(&unknown_ca, 11, "cannot reach");
    // Replacing needs the proof that the account opens with the new key.
    let replaced = desk.run(&format!(
        "enrol {broker} --token-file ada {account} --replace"
    ));
    assert_eq!(replaced.code, Some(2), "{replaced:#?}");
    let nameless = desk.run(&format!("{enrol} {account} --replace"));
    assert_eq!(nameless.code, Some(2), "{nameless:#?}");
    assert!(nameless.stderr.contains("--user"), "{nameless:#?}");
    let another = format!("{enrol} {account} --replace --user {BOB}");
    desk.fails(&another, 2, "the access token's user is");
    desk.fails(&format!("fetch {broker} --token-file ada"), 10, "404");
    let replaced = desk.ok(&format!("{enrol} {account} --replace --user {ADA}"));
    assert_eq!(replaced["method"], "PUT");
}

#[test]
fn a_new_kdf_keeps_the_user_key() {
    let desk = Desk::new();
    let account = format!("--email {EMAIL} --password-file password");
    let old = format!("{account} --protected-key-file protected");
    let changed = desk.ok(&format!(
        "change-kdf {old} --new-kdf argon2id --out protected-2"
    ));
    assert_eq!(
        changed["new_authentication_hash"],
        "0UxDVLCruT75iJoCSuqfCxNaPPGDt5wyVRIjdYVSHP0="
    );
    let text = fs::read_to_string(desk.path("protected-2")).unwrap();
    assert_eq!(changed["protected_key"], text.trim_end());
    let finished = desk.run(&format!("change-kdf {old} --new-kdf argon2id"));
    assert!(
        finished.stderr.contains("nothing has changed yet"),
        "{finished:#?}"
    );
    let new = format!("{account} --kdf argon2id --protected-key-file protected-2");
    desk.ok(&format!("unlock {new} --item-file item --out diary"));
    assert_eq!(
        fs::read_to_string(desk.path("diary")).unwrap(),
        "the diary of ada"
    );
    desk.fails(
        &format!("unlock {account} --protected-key-file protected-2"),
        12,
        "the key is wrong",
    );
}

#[test]
fn strong_accounts_open_with_a_warning_and_a_salt_takes_the_place_of_the_address() {
    let desk = Desk::new();
    let account = format!("--email {EMAIL} --password-file password");
    desk.fails(
        &format!("change-kdf {account} --protected-key-file protected --new-kdf argon2id --new-iterations 11"),
        2,
        "must be 2 to 10",
    );
    let strong = desk.run(&format!(
        "derive {account} --kdf argon2id --iterations 11 --memory-mib 16"
    ));
    assert_eq!(strong.code, Some(0), "{strong:#?}");
    assert!(
        strong.stderr.contains("that Bitwarden clients offer"),
        "{strong:#?}"
    );
    // The salt that a server names: the address, written as it makes the key, or another text.
    let opened = format!("unlock {account} --protected-key-file protected --salt");
    desk.ok(&format!("{opened} {EMAIL}"));
    desk.fails(&format!("{opened} another"), 12, "the key is wrong");
}

#[test]
fn what_cannot_be_used_is_explained() {
    let desk = Desk::new();
    desk.write("short", "AAAA");
    desk.write("cut", &PROTECTED[..60]);
    desk.write("empty", "");
    desk.write("open", PASSWORD);
    fs::set_permissions(desk.path("open"), fs::Permissions::from_mode(0o644)).unwrap();
    let account = format!("--email {EMAIL} --password-file password");
    desk.fails(
        &format!("derive {account} --iterations 4999"),
        2,
        "must be 5000 to",
    );
    desk.fails(
        &format!("derive {account} --parallelism 4"),
        2,
        "parameters of Argon2id",
    );
    desk.fails(
        &format!("derive --email {EMAIL}"),
        2,
        "no source specified for the master password",
    );
    desk.fails(
        &format!("unlock {account} --protected-key-file cut"),
        2,
        "not an encrypted string",
    );
    for (line, words) in [
        (
            format!("derive --email {EMAIL} --password-file open"),
            "chmod 600",
        ),
        (
            format!("derive --email {EMAIL} --password-file empty"),
            "1 to 4096 bytes",
        ),
        (
            "unlock --master-key-file short --protected-key-file protected".to_owned(),
            "neither 32 bytes nor the base64 of 32 bytes",
        ),
    ] {
        let finished = desk.run(&line);
        assert_eq!(finished.code, Some(2), "{line}: {finished:#?}");
        assert!(finished.stderr.contains(words), "{line}: {finished:#?}");
    }
    // Whose key it is that opens the account is said, and asked for once.
    let own = desk.ok(&format!("unlock {account} --protected-key-file protected"));
    assert_eq!(own["key_from"], "password");
    for both in [
        format!("unlock {account} --token-file open --protected-key-file protected"),
        "unlock --master-key-file short --token-fd 0 --protected-key-file protected".to_owned(),
    ] {
        desk.fails(&both, 2, "both an access token and a local key were given");
    }
    let nobodys = desk.run("unlock --password-file password --protected-key-file protected");
    assert_eq!(nobodys.code, Some(2), "{nobodys:#?}");
    assert!(nobodys.stderr.contains("--email"), "{nobodys:#?}");
    let weak = desk.run(&format!("derive {account} --iterations 5000"));
    assert_eq!(weak.code, Some(0), "{weak:#?}");
    assert!(weak.stderr.contains("600,000 iterations"), "{weak:#?}");
    for shown in [weak.stdout, weak.stderr] {
        assert!(!shown.contains(PASSWORD), "{shown}");
    }
}
