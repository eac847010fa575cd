//! Keys that an administrator made with another tool, under a `CKA_ID` of the tool's own, are registered and used like any other.

use std::{fs, process::Command, sync::Arc};

use crate::{
    client::{Caller, stores_and_releases},
    faulty::{Faulty, VARIABLE},
    faulty_token,
    process::Broker,
    site::{Options, Site},
    softhsm::write_private,
    wire::get,
};

const UNTRUSTED: i32 = 6;
const USAGE: i32 = 2;
/// As Java and EJBCA name keys: 20 bytes.
pub(crate) const PRIVATE: &str = "00112233445566778899aabbccddeeff01234567";
/// As a person names them.
pub(crate) const INTEGRITY: &str = "0a";

/// A tool that makes keys with the attributes that are needed, whatever it is asked for.
const TOOL: &str = r#"
[[attribute]]
name = "CKA_MODIFIABLE"
parts = ["private", "secret"]
in_template.replace = false
[[attribute]]
name = "CKA_COPYABLE"
parts = ["private", "secret"]
in_template.replace = false
[[attribute]]
name = "CKA_EXTRACTABLE"
parts = ["private", "secret"]
in_template.replace = false
[[attribute]]
name = "CKA_SENSITIVE"
parts = ["private", "secret"]
in_template.replace = true
[[attribute]]
name = "CKA_PRIVATE"
parts = ["private", "secret"]
in_template.replace = true
[[attribute]]
name = "CKA_DECRYPT"
parts = ["private"]
in_template.replace = true
[[attribute]]
name = "CKA_SIGN"
parts = ["private"]
in_template.replace = false
[[attribute]]
name = "CKA_SIGN_RECOVER"
parts = ["private"]
in_template.replace = false
[[attribute]]
name = "CKA_UNWRAP"
parts = ["private", "secret"]
in_template.replace = false
[[attribute]]
name = "CKA_DERIVE"
parts = ["private", "secret"]
in_template.replace = false
[[attribute]]
name = "CKA_ALLOWED_MECHANISMS"
parts = ["private"]
in_template.replace = ["CKM_RSA_PKCS_OAEP"]
[[attribute]]
name = "CKA_SIGN"
parts = ["secret"]
in_template.replace = true
[[attribute]]
name = "CKA_VERIFY"
parts = ["secret"]
in_template.replace = true
[[attribute]]
name = "CKA_ENCRYPT"
parts = ["secret"]
in_template.replace = false
[[attribute]]
name = "CKA_DECRYPT"
parts = ["secret"]
in_template.replace = false
[[attribute]]
name = "CKA_WRAP"
parts = ["secret"]
in_template.replace = false
[[attribute]]
name = "CKA_ALLOWED_MECHANISMS"
parts = ["secret"]
in_template.replace = ["CKM_SHA256_HMAC"]
"#;

/// Runs `pkcs11-tool` on the token of the site, through the scriptable module.
fn pkcs11_tool(site: &Site, faulty: &Faulty, arguments: &[&str]) {
    let output = Command::new("pkcs11-tool")
        .arg("--module")
        .arg(faulty.module())
        .args(["--token-label", site.token.label(), "--login", "--pin"])
        .arg(site.token.pin())
        .args(arguments)
        .env("SOFTHSM2_CONF", site.token.configuration())
        .env(VARIABLE, faulty.folder())
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
}

fn make_rsa_pair(site: &Site, faulty: &Faulty, id: &str) {
    let pair = ["--keypairgen", "--key-type", "rsa:2048", "--id", id];
    pkcs11_tool(site, faulty, &pair);
}

fn make_integrity_key(site: &Site, faulty: &Faulty, id: &str) {
    let key = ["--keygen", "--key-type", "GENERIC:32", "--id", id];
    pkcs11_tool(site, faulty, &key);
}

/// A token with keys that a tool made, and a database without any.
pub(crate) fn site() -> (Site, Faulty) {
    let site = Site::without_keys(Options::default());
    let faulty = faulty_token::put_before(&site);
    faulty.behave(TOOL);
    make_rsa_pair(&site, &faulty, PRIVATE);
    make_integrity_key(&site, &faulty, INTEGRITY);
    faulty.behave("");
    site.expect_ok(&["store", "migrate"]);
    (site, faulty)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_of_another_tool_is_registered_and_used() {
    let (site, _faulty) = site();
    let checked = site.run(&["token", "check"]);
    let named = format!("key register {PRIVATE} --integrity-id HEX");
    assert!(checked.stderr.contains(&named), "{checked:#?}");
    let alone = site.run(&["key", "register", PRIVATE]);
    assert_eq!(alone.code, Some(UNTRUSTED), "{alone:#?}");
    assert!(alone.stderr.contains("integrity key"), "{alone:#?}");
    for bad in ["", "0", &"00".repeat(256)] {
        let refused = site.run(&["key", "register", bad]);
        assert_eq!(refused.code, Some(USAGE), "{bad}: {refused:#?}");
    }

    let register = ["key", "register", PRIVATE, "--integrity-id", INTEGRITY];
    let shown = site.expect_ok(&register);
    assert!(
        shown.contains(PRIVATE) && shown.contains(INTEGRITY),
        "{shown}"
    );
    let again = site.run(&register);
    assert!(again.stderr.contains("is already registered"), "{again:#?}");
    site.expect_ok(&["token", "check"]);
    site.expect_ok(&["token", "backup-confirmed"]);

    let broker = Broker::start_on(Arc::new(site));
    stores_and_releases(&broker).await;
    let (site, _) = broker.stop();
    site.expect_ok(&["store", "check"]);
}

/// The MAC of the row covers where the objects are, and one from before does not verify for a row that says it.
#[test]
fn a_row_that_names_other_objects_is_refused() {
    let (site, faulty) = site();
    site.expect_ok(&["key", "register", PRIVATE, "--integrity-id", INTEGRITY]);
    faulty.behave(TOOL);
    make_integrity_key(&site, &faulty, "0b");
    faulty.behave("");
    site.sql("UPDATE wrapping_keys SET integrity_cka_id = x'0b'");
    let checked = site.run(&["token", "check"]);
    assert_eq!(checked.code, Some(UNTRUSTED), "{checked:#?}");
    assert!(
        checked.stderr.contains("registry row does not verify"),
        "{checked:#?}"
    );
    site.sql("UPDATE wrapping_keys SET integrity_cka_id = x'0a'");
    site.expect_ok(&["token", "check"]);
    site.sql("UPDATE wrapping_keys SET private_cka_id = x'', integrity_cka_id = x''");
    let checked = site.run(&["token", "check"]);
    assert_eq!(checked.code, Some(UNTRUSTED), "{checked:#?}");
}

/// The id of a key whose `CKA_ID` cannot be one follows from its public key: records name it, so a lost row is registered again under it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_whose_row_was_lost_is_registered_under_the_same_id_again() {
    let (site, _faulty) = site();
    let register = ["key", "register", PRIVATE, "--integrity-id", INTEGRITY];
    site.expect_ok(&register);
    site.expect_ok(&["token", "backup-confirmed"]);
    let broker = Broker::start_on(Arc::new(site));
    let enroller = Caller::of(&broker, "enroller");
    enroller.create("ada", b"material of ada").await.unwrap();
    let (site, _) = broker.stop();
    site.sql("DELETE FROM wrapping_keys");
    site.expect_ok(&register);
    site.expect_ok(&["token", "backup-confirmed"]);
    let broker = Broker::start_on(site);
    let releaser = Caller::of(&broker, "releaser");
    let released = releaser.unwrap("ada").await.unwrap();
    assert_eq!(released.key_material, b"material of ada");
}

#[test]
fn an_integrity_key_of_another_wrapping_key_is_not_registered() {
    let (site, faulty) = site();
    site.expect_ok(&["key", "register", PRIVATE, "--integrity-id", INTEGRITY]);
    faulty.behave(TOOL);
    make_rsa_pair(&site, &faulty, "0d");
    faulty.behave("");
    let refused = site.run(&["key", "register", "0d", "--integrity-id", INTEGRITY]);
    assert_eq!(refused.code, Some(USAGE), "{refused:#?}");
    assert!(
        refused.stderr.contains("a separate integrity key"),
        "{refused:#?}"
    );
    assert_eq!(site.sql("SELECT count(*) FROM wrapping_keys").trim(), "1");
}

/// A row that was altered is not called registered.
#[test]
fn registering_again_tells_an_altered_row_from_a_good_one() {
    let (site, _faulty) = site();
    let register = ["key", "register", PRIVATE, "--integrity-id", INTEGRITY];
    site.expect_ok(&register);
    for (edit, words) in [
        ("sequence = sequence", "is already registered"),
        ("sequence = sequence + 1", "was altered"),
    ] {
        site.sql(&format!("UPDATE wrapping_keys SET {edit}"));
        let refused = site.run(&register);
        assert_eq!(refused.code, Some(UNTRUSTED), "{refused:#?}");
        assert!(refused.stderr.contains(words), "{refused:#?}");
    }
}

/// `pkcs11-tool` counts the length in bytes. A person who takes it for bits gets a key that is found by trying all values.
#[test]
fn a_short_integrity_key_is_not_registered() {
    let (site, faulty) = site();
    faulty.behave(TOOL);
    let short = ["--keygen", "--key-type", "GENERIC:8", "--id", "0c"];
    pkcs11_tool(&site, &faulty, &short);
    faulty.behave("");
    let refused = site.run(&["key", "register", PRIVATE, "--integrity-id", "0c"]);
    assert_eq!(refused.code, Some(UNTRUSTED), "{refused:#?}");
    let finding = "CKA_VALUE_LEN is not at least 32 bytes";
    assert!(refused.stderr.contains(finding), "{refused:#?}");
    assert_eq!(site.sql("SELECT count(*) FROM wrapping_keys").trim(), "0");
}

#[test]
fn a_key_that_was_imported_is_not_registered() {
    let (site, faulty) = site();
    // What the token reports of a key that was created from its value.
    faulty.behave(
        "[[attribute]]\nname = \"CKA_LOCAL\"\nparts = [\"private\"]\non_read.value = false\n\
         [[attribute]]\nname = \"CKA_NEVER_EXTRACTABLE\"\nparts = [\"private\"]\non_read.value = false\n\
         [[attribute]]\nname = \"CKA_ALWAYS_SENSITIVE\"\nparts = [\"private\"]\non_read.value = false\n",
    );
    let refused = site.run(&["key", "register", PRIVATE, "--integrity-id", INTEGRITY]);
    assert_eq!(refused.code, Some(UNTRUSTED), "{refused:#?}");
    assert!(refused.stderr.contains("was imported"), "{refused:#?}");
    assert_eq!(site.sql("SELECT count(*) FROM wrapping_keys").trim(), "0");
}

/// What the page on tokens says of keys that `pkcs11-tool` and `p11tool` make, run as it stands there: on SoftHSM the attributes are
/// named that no option sets, and no setting that would not help.
#[test]
fn keys_of_general_tools_are_refused_by_name() {
    let page = include_str!("../../docs/tokens.md");
    let site = Site::without_keys(Options::default());
    site.expect_ok(&["store", "migrate"]);
    let module = crate::softhsm::module().display().to_string();
    let commands: Vec<&str> = page
        .lines()
        .filter(|line| line.starts_with("pkcs11-tool ") || line.starts_with("p11tool "))
        .collect();
    assert_eq!(commands.len(), 3, "{commands:?}");
    for command in commands {
        let command = command
            .replace("MODULE", &module)
            .replace("LABEL", site.token.label())
            .replace("rsa:3072", "rsa:2048")
            .replace("--bits 3072", "--bits 2048");
        let made = Command::new("sh")
            .args(["-c", &command])
            .env("SOFTHSM2_CONF", site.token.configuration())
            .env("PIN", site.token.pin())
            .env("GNUTLS_PIN", site.token.pin())
            .output()
            .unwrap();
        assert!(
            made.status.success(),
            "{command}: {made:?}; run scripts/install.sh"
        );
    }
    let wrong = [
        "CKA_MODIFIABLE is not false",
        "CKA_COPYABLE is not false",
        "CKA_UNWRAP is not false",
    ];
    for id in ["01", "03"] {
        let refused = site.run(&["key", "register", id, "--integrity-id", "02"]);
        assert_eq!(refused.code, Some(UNTRUSTED), "{refused:#?}");
        for words in wrong {
            assert!(refused.stderr.contains(words), "{words}: {refused:#?}");
        }
        assert!(
            refused.stderr.contains("No setting accepts"),
            "{refused:#?}"
        );
    }
    assert_eq!(site.sql("SELECT count(*) FROM wrapping_keys").trim(), "0");
}

/// The keys are visible without a login, as on a token of a cloud whose credentials control the access.
const WITHOUT_LOGIN: &str = "[token]\nclear_flags = [\"CKF_LOGIN_REQUIRED\"]\n";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_whose_access_is_controlled_outside_pkcs11_need_a_word_and_no_login() {
    let site = Site::without_keys(Options::default());
    let faulty = faulty_token::put_before(&site);
    let private =
        "name = \"CKA_PRIVATE\"\nparts = [\"private\", \"secret\"]\nin_template.replace = ";
    faulty.behave(&TOOL.replace(&format!("{private}true"), &format!("{private}false")));
    make_rsa_pair(&site, &faulty, PRIVATE);
    make_integrity_key(&site, &faulty, INTEGRITY);
    faulty.behave(WITHOUT_LOGIN);
    site.expect_ok(&["store", "migrate"]);
    let register = ["key", "register", PRIVATE, "--integrity-id", INTEGRITY];
    let refused = site.run(&register);
    assert_eq!(refused.code, Some(UNTRUSTED), "{refused:#?}");
    let word = "access_control = \"outside-pkcs11\"";
    assert!(refused.stderr.contains(word), "{refused:#?}");

    // Without a PIN, too.
    let file = site.configuration_file();
    let text = fs::read_to_string(&file).unwrap();
    let lines = text.lines().filter(|line| !line.starts_with("pin_file"));
    let text = lines.collect::<Vec<_>>().join("\n");
    let token = format!("[token]\n{word}\n");
    write_private(&file, &text.replacen("[token]\n", &token, 1));
    site.expect_ok(&register);
    let checked = site.run(&["token", "check"]);
    assert_eq!(checked.code, Some(0), "{checked:#?}");
    let sentence = "every program that has the vendor's credentials can use the keys";
    assert!(checked.stderr.contains(sentence), "{checked:#?}");
    let generated = site.run(&["key", "generate", "--bits", "2048"]);
    assert!(generated.stderr.contains("vendor's tool"), "{generated:#?}");

    let broker = Broker::start_on(Arc::new(site));
    stores_and_releases(&broker).await;
    let ready = get(broker.status, "/readyz");
    assert!(
        ready.contains("ready, but token:") && ready.contains(sentence),
        "{ready}"
    );
    let (site, _) = broker.stop();
    assert_eq!(faulty.count("C_Login begins"), 3, "only before the word");
    let log = site.log();
    assert!(log.contains(sentence), "{log}");
    let entry = |text: &str| {
        let lines = text.lines();
        lines
            .filter(|line| line.contains("token.risks_accepted"))
            .count()
    };
    assert_eq!(entry(&site.audit()), 1, "{}", site.audit());
    assert!(site.audit().contains(sentence));

    // Once for each change.
    let (site, _) = Broker::start_on(site).stop();
    assert_eq!(entry(&site.audit()), 1, "{}", site.audit());

    // A token that demands a login is not used without one.
    faulty.behave("");
    let refused = site.run(&["token", "check"]);
    assert!(
        refused.stderr.contains("CKF_LOGIN_REQUIRED"),
        "{refused:#?}"
    );
}
