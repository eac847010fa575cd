//! `integrity_key = "worker"`: integrity keys of tokens without keys for HMAC, in the memory of the workers.

use std::{fs, os::unix::fs::PermissionsExt as _, path::PathBuf, sync::Arc};

use aws_lc_rs::digest;
use rustix::process::Signal;
use serde_json::Value;

use keybroker_core::envelope::Algorithm;
use keybroker_worker_protocol::oaep::WrapKey;

use crate::{
    client::{Caller, eventually, stores_and_releases},
    expected::{CONFIGURATION, TOKEN, UNTRUSTED, says},
    faulty_token,
    process::{Broker, send, until},
    site::{Options, Site},
    softhsm::write_private,
    wire::get,
};

const GENERATE: [&str; 6] = ["-o", "json", "key", "generate", "--bits", "2048"];

/// Where the files are.
pub(crate) fn directory(site: &Site) -> PathBuf {
    site.folder().join("integrity-keys")
}

/// Permits integrity keys in the memory of the workers.
pub(crate) fn permit(site: &Site) {
    let directory = directory(site);
    fs::create_dir(&directory).unwrap();
    fs::set_permissions(&directory, fs::Permissions::from_mode(0o700)).unwrap();
    edit(site, |text| {
        let lines = format!(
            "[token]\nintegrity_key = \"worker\"\nintegrity_key_directory = \"{}\"\n",
            directory.display()
        );
        text.replacen("[token]\n", &lines, 1)
    });
}

/// Adds the digest that `key generate` or `key register` showed to the configuration.
fn pin(site: &Site, made: &str) {
    let made: Value = serde_json::from_str(made).unwrap();
    let text = |name: &str| made[name].as_str().unwrap().to_owned();
    add_digest(site, &text("id"), &text("integrity_key_sha256"));
}

/// Adds the digest of each file to the configuration, as `sha256sum` shows it.
pub(crate) fn pin_files(site: &Site) {
    for entry in fs::read_dir(directory(site)).unwrap() {
        let path = entry.unwrap().path();
        let id = path.file_stem().unwrap().to_str().unwrap();
        add_digest(site, id, &sha256(&fs::read(&path).unwrap()));
    }
}

fn add_digest(site: &Site, id: &str, digest: &str) {
    edit(site, |text| {
        let section = format!("[token.integrity_key_digests]\n{id} = \"{digest}\"\n\n[store]\n");
        text.replacen("[store]\n", &section, 1)
    });
}

fn sha256(bytes: &[u8]) -> String {
    hex::encode(digest::digest(&digest::SHA256, bytes))
}

fn edit(site: &Site, change: impl FnOnce(String) -> String) {
    let file = site.configuration_file();
    write_private(&file, &change(fs::read_to_string(&file).unwrap()));
}

/// The real token as a TPM shows itself: it makes no secret keys.
fn site() -> Site {
    let site = Site::without_keys(Options::default());
    faulty_token::put_before(&site).set_profile("tpm2");
    site.expect_ok(&["store", "migrate"]);
    site
}

/// A site with a key whose integrity key is in the workers, and the file of that key.
fn ready() -> (Site, PathBuf) {
    let site = site();
    permit(&site);
    let made = site.expect_ok(&GENERATE);
    pin(&site, &made);
    let made: Value = serde_json::from_str(&made).unwrap();
    let file = PathBuf::from(made["integrity_key_file"].as_str().unwrap());
    (site, file)
}

const DIGESTS: &str = "[token.integrity_key_digests]";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_without_keys_for_hmac_serves_once_the_digest_of_the_file_is_configured() {
    let site = site();
    let refused = site.run(&GENERATE);
    says(
        "by default",
        &refused,
        TOKEN,
        &["the integrity key is then outside the token"],
    );
    permit(&site);
    let made = site.run(&GENERATE[2..]);
    says("key generate", &made, 0, &[DIGESTS, "The backup must also"]);
    let id = made.stdout.lines().next().unwrap();
    let id = id.split_whitespace().last().unwrap();
    let file = directory(&site).join(format!("{id}.json"));
    let mode = fs::metadata(&file).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o600);
    for (command, code) in [
        (["config", "check"], CONFIGURATION),
        (["token", "check"], UNTRUSTED),
        (["store", "check"], TOKEN),
    ] {
        says(&command.concat(), &site.run(&command), code, &[DIGESTS, id]);
    }
    says("serve", &site.serve_to_its_end(), TOKEN, &[DIGESTS, id]);
    pin_files(&site);
    site.expect_ok(&["config", "check"]);
    let sentence = "a person who reads the memory of a worker";
    let checked = site.run(&["token", "check"]);
    says("token check", &checked, 0, &[sentence]);
    let row = format!(
        "the workers unwrap the integrity key from {}",
        file.display()
    );
    assert!(checked.stdout.contains(&row), "{checked:#?}");
    let listed = site.expect_ok(&["-o", "json", "key", "list"]);
    let listed: Value = serde_json::from_str(&listed).unwrap();
    assert_eq!(listed[0]["integrity_key"], "worker", "{listed}");
    assert_eq!(listed[0]["integrity_cka_id"], Value::Null);
    let confirmed = site.run(&["token", "backup-confirmed"]);
    says("backup", &confirmed, 0, &[&file.display().to_string()]);

    let broker = Broker::start_on(Arc::new(site));
    stores_and_releases(&broker).await;
    let ready = get(broker.status, "/readyz");
    assert!(ready.contains(sentence), "{ready}");
    // The next worker unwraps the integrity key again.
    let worker = until("a worker", || broker.workers().first().copied());
    send(worker, Signal::KILL);
    let releaser = Caller::of(&broker, "releaser");
    let released = eventually(|| releaser.unwrap("ada")).await;
    assert_eq!(released.key_material, b"material of ada");
    let (site, status) = broker.stop();
    assert!(status.success(), "{status}");
    assert!(site.log().contains(sentence), "{}", site.log());
    let audited = site.audit();
    let risk = audited.lines().find(|line| line.contains("risks_accepted"));
    assert!(
        risk.is_some_and(|line| line.contains(sentence)),
        "{audited}"
    );
    // Who changes the file must change the configuration too, which the audit log shows.
    let pinned = format!("{id} has {}", sha256(&fs::read(&file).unwrap()));
    assert!(risk.is_some_and(|line| line.contains(&pinned)), "{audited}");
    site.expect_ok(&["store", "check"]);
}

/// A person who has the public key can wrap an integrity key of their own, and make the MACs of any rows with it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_integrity_key_that_an_attacker_wrapped_is_refused_by_name() {
    let (site, file) = ready();
    let original = fs::read_to_string(&file).unwrap();
    let mut content: Value = serde_json::from_str(&original).unwrap();
    content["ciphertext"] = Value::String(wrapped_by_an_attacker(&site, &content));
    write_private(&file, &serde_json::to_string_pretty(&content).unwrap());
    let words = ["was changed", file.to_str().unwrap(), "restore the file"];
    for (command, code) in [
        (["config", "check"], CONFIGURATION),
        (["token", "check"], UNTRUSTED),
        (["store", "check"], UNTRUSTED),
        (["token", "backup-confirmed"], UNTRUSTED),
    ] {
        says(&command.concat(), &site.run(&command), code, &words);
    }
    says("serve", &site.serve_to_its_end(), UNTRUSTED, &words);

    // With the digest of that file in the configuration, the worker uses the key, and the rows that were written before do not
    // verify.
    let forged = sha256(&fs::read(&file).unwrap());
    let configured = fs::read_to_string(site.configuration_file()).unwrap();
    let pinned = sha256(original.as_bytes());
    edit(&site, |text| text.replace(&pinned, &forged));
    let checked = site.run(&["token", "check"]);
    let words = "the MAC of the registry row does not verify";
    says("token check", &checked, UNTRUSTED, &[words]);
    write_private(&file, &original);
    edit(&site, |_| configured);
    site.expect_ok(&["token", "check"]);
}

/// Wraps an integrity key under the public key of the token, as hexadecimal digits.
fn wrapped_by_an_attacker(site: &Site, content: &Value) -> String {
    let output = site.token.pkcs11_tool(&[
        "--read-object",
        "--type",
        "pubkey",
        "--id",
        content["wrapping_key"].as_str().unwrap(),
    ]);
    assert!(output.status.success(), "{output:?}");
    let algorithm = [Algorithm::RsaOaepSha256, Algorithm::RsaOaepSha1]
        .into_iter()
        .find(|algorithm| content["algorithm"] == algorithm.as_str())
        .unwrap();
    let id = hex::decode(content["wrapping_key"].as_str().unwrap()).unwrap();
    let plaintext = [b"keybroker/integrity-key/v1".as_slice(), &id, &[7; 32]].concat();
    let public = WrapKey::new(&output.stdout, algorithm).unwrap();
    hex::encode(public.wrap(&plaintext).unwrap())
}

/// A file that is lost, or that others can read, or settings that do not permit such keys any more.
#[test]
fn a_missing_file_and_settings_without_the_word_are_refused_by_name() {
    let (site, file) = ready();
    let path = file.to_str().unwrap();
    let kept = fs::read_to_string(&file).unwrap();
    let refuses = |what: &str, words: &[&str]| {
        says(what, &site.serve_to_its_end(), TOKEN, words);
        says(what, &site.run(&["token", "check"]), UNTRUSTED, words);
        says(what, &site.run(&["store", "check"]), TOKEN, words);
        let backup = site.run(&["token", "backup-confirmed"]);
        says(what, &backup, TOKEN, words);
    };
    fs::remove_file(&file).unwrap();
    refuses("lost", &[path, "restore the file from a backup"]);
    // It never makes another key for a key that is registered.
    let id = file.file_stem().unwrap().to_str().unwrap();
    let again = site.run(&["key", "register", id]);
    assert_ne!(again.code, Some(0), "{again:#?}");
    assert!(!file.exists());

    write_private(&file, &kept);
    fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
    refuses("readable for others", &[path, "chmod 600"]);
    write_private(&file, &kept);
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
    site.expect_ok(&["token", "check"]);

    let configured = fs::read_to_string(site.configuration_file()).unwrap();
    edit(&site, |text| {
        let of_worker = |line: &&str| !line.contains("integrity_key") && !line.starts_with(id);
        let lines: Vec<&str> = text.lines().filter(of_worker).collect();
        lines.join("\n") + "\n"
    });
    refuses("without the word", &[id, "does not permit"]);
    edit(&site, |_| configured);
    site.expect_ok(&["token", "check"]);
}

/// A file whose digest is configured was in use. Its loss, together with that of the registry row, must not lead to another key.
#[test]
fn a_lost_row_and_a_lost_file_do_not_lead_to_another_key() {
    let (site, file) = ready();
    let id = file.file_stem().unwrap().to_str().unwrap().to_owned();
    let kept = fs::read_to_string(&file).unwrap();
    site.sql("DELETE FROM wrapping_keys");
    fs::remove_file(&file).unwrap();
    let refused = site.run(&["key", "register", &id]);
    assert_ne!(refused.code, Some(0), "{refused:#?}");
    assert!(
        !refused
            .stderr
            .contains("move the file to another directory"),
        "{refused:#?}"
    );
    assert!(!file.exists());
    write_private(&file, &kept);
    site.expect_ok(&["key", "register", &id]);
    assert_eq!(fs::read_to_string(&file).unwrap(), kept);
    site.expect_ok(&["token", "check"]);
}

/// A key that was made with its integrity key on the token keeps it when its row is lost, also if the settings permit the other kind.
#[test]
fn a_lost_row_does_not_replace_an_integrity_key_on_the_token() {
    let site = Site::fresh(Options::default());
    let id = site.sql("SELECT lower(hex(key_id)) FROM wrapping_keys");
    let id = id.trim();
    permit(&site);
    site.sql("DELETE FROM wrapping_keys");
    let refused = site.run(&["key", "register", id]);
    let remedy = format!("--integrity-id {id}");
    says("key register", &refused, UNTRUSTED, &[&remedy]);
    let left = fs::read_dir(directory(&site)).unwrap();
    assert_eq!(left.count(), 0);
    site.expect_ok(&["key", "register", id, "--integrity-id", id]);
    let listed = site.expect_ok(&["-o", "json", "key", "list"]);
    assert!(listed.contains("\"integrity_key\": \"token\""), "{listed}");
}

/// What the registry row says of the place of the integrity key is under the row's MAC.
#[test]
fn a_row_that_names_an_object_of_the_token_instead_is_refused() {
    let (site, _) = ready();
    let kept = site.sql("SELECT hex(integrity_cka_id) FROM wrapping_keys");
    assert_eq!(
        hex::decode(kept.trim()).unwrap(),
        b"keybroker/integrity-key-in-worker/v1"
    );
    for other in ["", "0a"] {
        site.sql(&format!(
            "UPDATE wrapping_keys SET integrity_cka_id = x'{other}'"
        ));
        let checked = site.run(&["token", "check"]);
        says(other, &checked, UNTRUSTED, &["is not on the token"]);
    }
    site.sql(&format!(
        "UPDATE wrapping_keys SET integrity_cka_id = x'{}'",
        kept.trim()
    ));
    site.expect_ok(&["token", "check"]);
}

/// A run that was cut short between the token and the database.
#[test]
fn an_rsa_key_without_a_file_gets_an_integrity_key_when_it_is_registered() {
    let (site, file) = ready();
    let id = file.file_stem().unwrap().to_str().unwrap().to_owned();
    let register = ["-o", "json", "key", "register", &id];
    site.sql("DELETE FROM wrapping_keys");
    // The file is there and its digest is configured: it is used.
    let registered: Value = serde_json::from_str(&site.expect_ok(&register)).unwrap();
    assert_eq!(registered["integrity_key"], "worker");
    assert_eq!(registered["integrity_key_file"], Value::Null);
    site.expect_ok(&["token", "check"]);

    // Nothing but the RSA pair is there.
    site.sql("DELETE FROM wrapping_keys");
    fs::remove_file(&file).unwrap();
    edit(&site, |text| {
        let lines: Vec<&str> = text.lines().filter(|line| !line.starts_with(&id)).collect();
        lines.join("\n").replace(DIGESTS, "") + "\n"
    });
    let checked = site.run(&["token", "check"]);
    says(
        "unregistered",
        &checked,
        UNTRUSTED,
        &["checks and registers it", &id],
    );
    let made = site.expect_ok(&register);
    // The file of this run, which is not pinned yet, is not replaced by the next.
    site.sql("DELETE FROM wrapping_keys");
    let kept = fs::read(&file).unwrap();
    let again = site.run(&register);
    says(
        "again",
        &again,
        CONFIGURATION,
        &["move the file to another", DIGESTS],
    );
    assert_eq!(fs::read(&file).unwrap(), kept);
    pin(&site, &made);
    site.expect_ok(&register);
    site.expect_ok(&["token", "check"]);
}

/// The directory is looked at before anything is made on the token.
#[test]
fn a_directory_that_cannot_take_the_file_leaves_nothing_on_the_token() {
    let site = site();
    permit(&site);
    let directory = directory(&site);
    for (mode, words) in [
        (None, "integrity_key_directory"),
        (Some(0o777), "integrity_key_directory"),
    ] {
        match mode {
            None => fs::rename(&directory, site.folder().join("elsewhere")).unwrap(),
            Some(mode) => {
                fs::rename(site.folder().join("elsewhere"), &directory).unwrap();
                fs::set_permissions(&directory, fs::Permissions::from_mode(mode)).unwrap();
            }
        }
        let generated = site.run(&GENERATE);
        says("key generate", &generated, CONFIGURATION, &[words]);
    }
    let objects = site.token.pkcs11_tool(&["--list-objects"]);
    let listed = String::from_utf8_lossy(&objects.stdout);
    assert!(!listed.contains(" Object;"), "{listed}");
}

/// Everything that the settings alone show.
#[test]
fn settings_that_do_not_fit_are_reported() {
    let site = site();
    let check = |lines: &str, words: &[&str]| {
        let kept = fs::read_to_string(site.configuration_file()).unwrap();
        edit(&site, |text| {
            text.replacen("[token]\n", &format!("[token]\n{lines}\n"), 1)
        });
        says(lines, &site.run(&["config", "check"]), CONFIGURATION, words);
        edit(&site, |_| kept);
    };
    check("integrity_key = \"worker\"", &["`integrity_key_directory`"]);
    check(
        "integrity_key_directory = \"/var/lib/keybroker\"",
        &["`integrity_key = \"worker\"`, which is not set"],
    );
    let worker = "integrity_key = \"worker\"\nintegrity_key_directory = ";
    check(&format!("{worker}\"keys\""), &["must be an absolute path"]);
    let exists = site.folder().display().to_string();
    check(
        &format!("{worker}\"{exists}\"\nintegrity_key_digests = {{ \"0A\" = \"12\" }}"),
        &["not the id of a wrapping key", "not a SHA-256"],
    );
    check(&format!("{worker}\"{exists}/missing\""), &["missing"]);
}
