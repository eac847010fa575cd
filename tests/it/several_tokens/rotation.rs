//! Rotation with several tokens: a new key is used only after each token has a copy, or after an administrator accepts that one is
//! missing.

use std::{fs, path::Path, process::Command, sync::Arc};

use keybroker_proto::WrappingKeyState;

use crate::{
    client::{Caller, eventually},
    client_commands::calling,
    destruction::rewrap,
    keys::{changed, key, not_changed, states, text, wraps_under},
    process::{Broker, until},
    servers::{Kind, Server, section},
    site::{Finished, Options},
};

use super::{
    CALLERS, Load, MATERIAL, Two, callers_when_ready, kill_workers, state_of, until_unusable,
    until_whole,
};

impl Two {
    /// Copies the new objects of one SoftHSM directory to the other, as a vendor's tool copies keys between devices.
    fn copy_objects(from: &Path, to: &Path) {
        let copied = Command::new("cp")
            .args(["--archive", "--no-clobber"])
            .arg(from.join("."))
            .arg(to)
            .status();
        assert!(copied.unwrap().success());
    }

    fn copy_from_a_to_b(&self) {
        Self::copy_objects(&self.site.token.directory(), &self.copy.join("tokens"));
    }

    fn copy_from_b_to_a(&self) {
        Self::copy_objects(&self.copy.join("tokens"), &self.site.token.directory());
    }

    /// Makes other keys on token `b` under this `CKA_ID`.
    fn make_another_key_on_b(&self, id: &str) {
        for make in [
            &["--keypairgen", "--key-type", "rsa:2048"][..],
            &["--keygen", "--key-type", "GENERIC:32"],
        ] {
            let made = Command::new("pkcs11-tool")
                .env("SOFTHSM2_CONF", self.copy.join("softhsm2.conf"))
                .arg("--module")
                .arg(crate::softhsm::module())
                .args(["--login", "--pin", self.site.token.pin()])
                .args(["--token-label", self.site.token.label()])
                .args(make)
                .args(["--id", id, "--label", "another key"])
                .output()
                .unwrap();
            assert!(made.status.success(), "{made:?}");
        }
    }
}

/// The state in which every key is found, with the tokens that the broker shows for the key.
fn shown(value: &serde_json::Value) -> (String, String) {
    (text(value, "state"), text(value, "tokens"))
}

/// Nothing is wrapped under the new key before each token has it. Afterwards, either token does the work of the other.
#[tokio::test(flavor = "multi_thread")]
async fn a_new_key_waits_for_its_copies_and_then_fails_over() {
    let two = Two::fresh(Options::default());
    let older = two.key();
    let broker = Broker::start_on(Arc::clone(&two.site));
    let (enroller, releaser) = callers_when_ready(&broker).await;
    enroller.create("ada", MATERIAL).await.unwrap();
    let load = Load::start(&broker, CALLERS);
    let young = changed(&broker, &["rotate", "--if-older-than", "1"]);
    assert_eq!(text(&young, "id"), older);

    let rotated = changed(&broker, &["rotate", "--bits", "2048"]);
    let new = text(&rotated, "id");
    assert_eq!(text(&rotated, "missing_tokens"), "b");
    assert_eq!(shown(&rotated), ("pre-active".into(), "a".into()));
    let activate = ["activate", new.as_str(), "--backup-confirmed"];
    let lacking = ["token b: the token does not have the key", "`--single`"];
    not_changed(&broker, &activate, "KEY_STATE", &lacking);
    assert_eq!(wraps_under(&broker).await, older);

    two.copy_from_a_to_b();
    let activated = changed(&broker, &activate);
    assert_eq!(shown(&activated), ("active".into(), "a, b".into()));
    assert_eq!(states(&broker).await[&older], WrappingKeyState::Deactivated);
    assert_eq!(wraps_under(&broker).await, new);
    let (calls, failed, _) = load.end().await;
    assert!(calls > 0 && failed == 0, "{failed} of {calls}");

    enroller.create("bob", MATERIAL).await.unwrap();
    for (name, faulty) in [("a", &two.a), ("b", &two.b)] {
        faulty.behave("[token]\nabsent = true\n");
        kill_workers(&broker, name).await;
        until_unusable(&broker, name).await;
        releaser.unwrap("bob").await.unwrap();
        enroller
            .create(&format!("without-{name}"), MATERIAL)
            .await
            .unwrap();
        faulty.behave("");
        until_whole(&broker, name, 1).await;
    }
    assert_eq!(text(&changed(&broker, &["rotate", "--back"]), "id"), older);
    assert_eq!(text(&changed(&broker, &["rotate", "--back"]), "id"), new);
    rewrap(&broker);
    for user in ["ada", "bob", "without-a", "without-b"] {
        releaser.unwrap(user).await.unwrap();
    }

    let (site, _) = broker.stop();
    site.expect_ok(&["store", "check"]);
    site.expect_ok(&["audit", "verify"]);
    for name in ["a", "b"] {
        let checked = site.run(&["--token", name, "token", "check"]);
        assert_eq!(checked.code, Some(0), "{checked:#?}");
    }
    let confirmed = site.sql(&format!(
        "SELECT token FROM wrapping_key_places WHERE lower(hex(key_id)) = '{new}' AND backup_confirmed_us > 0 ORDER BY token"
    ));
    assert_eq!(confirmed.split_whitespace().collect::<Vec<_>>(), ["a", "b"]);
    // A start finds each token with both keys.
    let broker = Broker::start_on(site);
    callers_when_ready(&broker).await;
    for name in ["a", "b"] {
        assert_eq!(state_of(&broker, name).await.wrapping_key_ids.len(), 2);
    }
}

/// A key on one token only is used if an administrator accepts it, and its copy is registered later, without a restart.
#[tokio::test(flavor = "multi_thread")]
async fn a_copy_is_registered_beside_a_running_broker() {
    let two = Two::fresh(Options::default());
    let broker = Broker::start_on(Arc::clone(&two.site));
    let (enroller, releaser) = callers_when_ready(&broker).await;
    let unknown = key(&broker, "admin", &["rotate", "--token", "c"]);
    assert!(unknown.stderr.contains("a, b"), "{unknown:#?}");

    let rotated = changed(&broker, &["rotate", "--bits", "2048", "--token", "b"]);
    let new = text(&rotated, "id");
    assert_eq!(shown(&rotated), ("pre-active".into(), "b".into()));
    let single = ["key", "activate", new.as_str(), "--single"];
    let activated = Finished::from(calling(&broker, &single, "admin", &[]).output().unwrap());
    assert_eq!(activated.code, Some(0), "{activated:#?}");
    for part in [
        "only on these tokens: b",
        "have no copy: a",
        "key find-copies",
    ] {
        assert!(activated.stderr.contains(part), "{part}: {activated:#?}");
    }
    enroller.create("ada", MATERIAL).await.unwrap();
    let find = ["find-copies", new.as_str()];
    let absent = ["no copy", "token a: the token does not have the key"];
    not_changed(&broker, &find, "KEY_STATE", &absent);

    two.copy_from_b_to_a();
    let found = changed(&broker, &find);
    assert_eq!(shown(&found), ("active".into(), "a, b".into()));
    not_changed(&broker, &find, "KEY_STATE", &["every token"]);
    two.b.behave("[token]\nabsent = true\n");
    kill_workers(&broker, "b").await;
    until_unusable(&broker, "b").await;
    releaser.unwrap("ada").await.unwrap();
    two.b.behave("");
    until_whole(&broker, "b", 1).await;

    let denied = key(&broker, "auditor", &find);
    assert!(denied.stderr.contains("POLICY"), "{denied:#?}");
    let (site, _) = broker.stop();
    assert!(site.audit().contains("wrapping_key.find_copies"));
    site.expect_ok(&["store", "check"]);
    site.expect_ok(&["--token", "a", "token", "check"]);
}

/// Each failure names its token and changes nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_cannot_take_part_in_a_rotation_is_named() {
    let two = Two::fresh(Options::default());
    let older = two.key();
    let broker = Broker::start_on(Arc::clone(&two.site));
    callers_when_ready(&broker).await;
    let on_b = ["rotate", "--bits", "2048", "--token", "b"];
    for (function, code) in [
        ("C_GenerateKeyPair", "CKR_DEVICE_MEMORY"),
        ("C_GenerateKey", "CKR_FUNCTION_NOT_SUPPORTED"),
    ] {
        let rule = format!(
            "[[rule]]\nname = \"full\"\nfunction = \"{function}\"\ndo = {{ return = \"{code}\" }}\n"
        );
        two.b.behave(&rule);
        let refused = key(&broker, "admin", &on_b);
        assert_ne!(refused.code, Some(0), "{refused:#?}");
        assert!(refused.stderr.contains("token b: "), "{refused:#?}");
        two.b.behave("");
    }
    two.b.behave("[token]\nabsent = true\n");
    not_changed(&broker, &on_b, "TOKEN_DOWN", &["token b: "]);
    two.b.behave("");
    assert_eq!(states(&broker).await.len(), 1);

    let rotated = changed(&broker, &["rotate", "--bits", "2048", "--token", "a"]);
    let new = text(&rotated, "id");
    let activate = ["activate", new.as_str(), "--backup-confirmed"];
    two.b.behave("[token]\nabsent = true\n");
    let away = ["token b: the token could not be searched"];
    not_changed(&broker, &activate, "KEY_STATE", &away);
    two.b.behave("");

    two.make_another_key_on_b(&new);
    for how in ["--backup-confirmed", "--single"] {
        let arguments = ["activate", new.as_str(), how];
        let other = ["token b: the copy", "must not be used"];
        not_changed(&broker, &arguments, "TOKEN_UNTRUSTED", &other);
    }
    assert_eq!(wraps_under(&broker).await, older);
    assert_eq!(states(&broker).await[&new], WrappingKeyState::PreActive);
    until_whole(&broker, "b", 1).await;
}

/// Two brokers on one database server: the broker that did not make the change uses the new key on both of its tokens.
async fn another_broker_follows(kind: Kind) {
    let server = Server::start(kind);
    let database = server.database();
    let two = Two::fresh(Options {
        store: Some(section(&server.settings(&database))),
        ..Options::default()
    });
    let brokers = ["one", "two"].map(|name| {
        two.configure("");
        let file = two.site.configuration_file();
        let text = fs::read_to_string(&file).unwrap();
        let own = format!("[audit]\ninstance = \"{name}\"\n");
        fs::write(&file, text.replacen("[audit]\n", &own, 1)).unwrap();
        Broker::start_on(Arc::clone(&two.site))
    });
    let [one, other] = &brokers;
    for broker in [one, other] {
        callers_when_ready(broker).await;
    }
    let new = text(&changed(one, &["rotate", "--bits", "2048"]), "id");
    two.copy_from_a_to_b();
    changed(one, &["activate", &new, "--backup-confirmed"]);
    until("the other broker has the key on both tokens", || {
        let list = ["-o", "json", "client", "wrapping-keys"];
        let listed = Finished::from(calling(other, &list, "admin", &[]).output().unwrap());
        let keys: serde_json::Value = serde_json::from_str(&listed.stdout).unwrap_or_default();
        let mut keys = keys.as_array().into_iter().flatten();
        keys.any(|key| text(key, "id") == new && text(key, "tokens") == "a, b")
            .then_some(())
    });
    let enroller = Caller::of(other, "enroller");
    let created = eventually(|| enroller.create("ada", MATERIAL)).await;
    assert_eq!(hex::encode(created.wrapping_key_id), new);
    two.a.behave("[token]\nabsent = true\n");
    for broker in [one, other] {
        kill_workers(broker, "a").await;
        until_unusable(broker, "a").await;
        let releaser = Caller::of(broker, "releaser");
        releaser.unwrap("ada").await.unwrap();
    }
    two.a.behave("");
}

#[tokio::test(flavor = "multi_thread")]
async fn another_broker_follows_on_postgresql() {
    another_broker_follows(Kind::PostgreSql).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn another_broker_follows_on_mariadb() {
    another_broker_follows(Kind::MariaDb).await;
}
