//! What needs a real token inside this process: the gate against keys with one attribute wrong, lookup, and the known
//! attacks on PKCS#11.
//!
//! SoftHSM reads its configuration from the environment, which a running test cannot change safely. So each test starts
//! itself again as a child with an environment and a token folder of its own.

use std::{
    env, fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use cryptoki::{
    mechanism::{
        Mechanism, MechanismType,
        rsa::{PkcsMgfType, PkcsOaepParams, PkcsOaepSource},
    },
    object::{Attribute, AttributeType, KeyType, ObjectClass, ObjectHandle},
    session::Session,
};

use super::{
    Pin, Settings,
    admin::{self, Admin, AdminError},
    classify::Class,
    gate::{self, Expected, Found},
    keys,
    open::OpenToken,
};
use crate::key::WrappingKeyId;

const MODULE: &str = "/usr/lib/softhsm/libsofthsm2.so";
const CHILD: &str = "KEYBROKER_TEST_TOKEN_FOLDER";
const USER_PIN: &str = "123456";

/// Runs `body` in a child of this test that has a token folder of its own.
fn with_softhsm(test: &str, body: impl FnOnce(&Path)) {
    if let Some(folder) = env::var_os(CHILD) {
        return body(Path::new(&folder));
    }
    assert!(
        Path::new(MODULE).is_file(),
        "SoftHSM is not installed; run scripts/install.sh"
    );
    let folder = tempfile::tempdir().unwrap();
    let tokens = folder.path().join("tokens");
    fs::create_dir(&tokens).unwrap();
    let conf = folder.path().join("softhsm2.conf");
    let text = format!(
        "directories.tokendir = {}\nobjectstore.backend = file\nlog.level = ERROR\n",
        tokens.display()
    );
    fs::write(&conf, text).unwrap();
    let output = Command::new(env::current_exe().unwrap())
        .args([&format!("hsm::tests::{test}"), "--exact", "--nocapture"])
        .env("SOFTHSM2_CONF", conf)
        .env(CHILD, folder.path())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{text}\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

fn settings() -> Settings {
    Settings {
        module: PathBuf::from(MODULE),
        label: Some("test".to_owned()),
        serial: None,
        uri: None,
        pin_file: None,
        workers: 1,
        sessions_per_worker: 1,
        queue_length_max: 1,
        allow_oaep_sha1: true,
        attribute_exceptions: Vec::new(),
        environment: std::collections::BTreeMap::new(),
    }
}

fn pin(text: &str) -> Pin {
    Pin::from_text(text.to_owned()).unwrap()
}

fn init() {
    admin::init_token(&settings(), "test", &pin("654321"), &pin(USER_PIN), None).unwrap();
}

fn open() -> OpenToken {
    OpenToken::login(&settings(), &pin(USER_PIN), true).unwrap()
}

/// The same attribute with another value, where a template can say so.
fn flipped(attribute: &Attribute) -> Option<Attribute> {
    Some(match attribute {
        Attribute::Token(v) => Attribute::Token(!v),
        Attribute::Private(v) => Attribute::Private(!v),
        Attribute::Sensitive(v) => Attribute::Sensitive(!v),
        Attribute::Extractable(v) => Attribute::Extractable(!v),
        Attribute::Modifiable(v) => Attribute::Modifiable(!v),
        Attribute::Copyable(v) => Attribute::Copyable(!v),
        Attribute::Decrypt(v) => Attribute::Decrypt(!v),
        Attribute::Encrypt(v) => Attribute::Encrypt(!v),
        Attribute::Sign(v) => Attribute::Sign(!v),
        Attribute::SignRecover(v) => Attribute::SignRecover(!v),
        Attribute::Verify(v) => Attribute::Verify(!v),
        Attribute::Wrap(v) => Attribute::Wrap(!v),
        Attribute::Unwrap(v) => Attribute::Unwrap(!v),
        Attribute::Derive(v) => Attribute::Derive(!v),
        Attribute::AllowedMechanisms(_) => {
            Attribute::AllowedMechanisms(vec![MechanismType::RSA_PKCS, MechanismType::SHA512_HMAC])
        }
        _ => return None,
    })
}

/// Templates with exactly one attribute flipped.
fn mutants(template: &[Attribute]) -> Vec<(AttributeType, Vec<Attribute>)> {
    (0..template.len())
        .filter_map(|index| {
            let mut mutant = template.to_vec();
            mutant[index] = flipped(&mutant[index])?;
            Some((mutant[index].attribute_type(), mutant))
        })
        .collect()
}

fn id(number: u8) -> WrappingKeyId {
    WrappingKeyId::from_bytes([number; 16])
}

/// Inspects an object and returns the names that do not pass.
fn refused(session: &Session, object: ObjectHandle, rules: &[gate::Rule]) -> Vec<&'static str> {
    let findings = gate::inspect(session, object, rules, &[]).unwrap();
    let names = findings
        .iter()
        .filter(|finding| !finding.passes())
        .map(|finding| finding.attribute)
        .collect();
    let verdict = gate::require("key", &findings);
    let names: Vec<&'static str> = names;
    match verdict {
        Ok(()) => assert!(names.is_empty()),
        Err(fault) => {
            assert_eq!(fault.class, Class::Untrusted);
            assert!(
                names.iter().all(|name| fault.detail.contains(name)),
                "{fault}"
            );
        }
    }
    names
}

#[test]
fn every_attribute_flipped_alone_is_refused_by_name() {
    with_softhsm("every_attribute_flipped_alone_is_refused_by_name", |_| {
        init();
        let token = open();
        let session = &token.anchor;
        let mut seen = 0;
        for (kind, template) in mutants(&keys::private_template(id(1))) {
            let public = keys::public_template(id(1), 2_048);
            let pair = session.generate_key_pair(&Mechanism::RsaPkcsKeyPairGen, &public, &template);
            let names = refused(session, pair.unwrap().1, gate::RSA_PRIVATE);
            assert_names(kind, gate::RSA_PRIVATE, &names);
            seen += 1;
        }
        for (kind, template) in mutants(&keys::binding_template(id(2))) {
            let key = session.generate_key(&Mechanism::GenericSecretKeyGen, &template);
            let names = refused(session, key.unwrap(), gate::BINDING);
            assert_names(kind, gate::BINDING, &names);
            seen += 1;
        }
        assert!(seen >= 24, "only {seen} attributes were flipped");
    });
}

/// The flipped attribute is named, and nothing but what follows from it: a key that is not sensitive was not always so.
fn assert_names(kind: AttributeType, rules: &[gate::Rule], names: &[&str]) {
    let own = rules.iter().find(|rule| rule.1 == kind).unwrap().0;
    let follows: &[&str] = match own {
        "CKA_SENSITIVE" => &["CKA_ALWAYS_SENSITIVE"],
        "CKA_EXTRACTABLE" => &["CKA_NEVER_EXTRACTABLE"],
        _ => &[],
    };
    assert!(names.contains(&own), "{own}: {names:?}");
    assert!(
        names
            .iter()
            .all(|name| *name == own || follows.contains(name)),
        "{own}: {names:?}"
    );
}

/// A key that was imported says so: it was outside once, whatever its other attributes are now.
#[test]
fn an_imported_key_is_refused() {
    with_softhsm("an_imported_key_is_refused", |_| {
        init();
        let token = open();
        let mut template = keys::binding_template(id(1));
        template.retain(|attribute| !matches!(attribute, Attribute::ValueLen(_)));
        template.push(Attribute::Value(vec![7; 32]));
        let object = token.anchor.create_object(&template).unwrap();
        let names = refused(&token.anchor, object, gate::BINDING);
        assert_eq!(
            names,
            ["CKA_ALWAYS_SENSITIVE", "CKA_NEVER_EXTRACTABLE", "CKA_LOCAL"]
        );
    });
}

#[test]
fn an_exception_lets_an_attribute_be_absent_never_wrong() {
    with_softhsm(
        "an_exception_lets_an_attribute_be_absent_never_wrong",
        |_| {
            init();
            let token = open();
            let mut template = keys::binding_template(id(1));
            template.retain(|attribute| !matches!(attribute, Attribute::AllowedMechanisms(_)));
            let key = token
                .anchor
                .generate_key(&Mechanism::GenericSecretKeyGen, &template)
                .unwrap();
            let exception = ["CKA_ALLOWED_MECHANISMS".to_owned(), "CKA_SIGN".to_owned()];
            let found = |object, exceptions: &[String], name| {
                let findings =
                    gate::inspect(&token.anchor, object, gate::BINDING, exceptions).unwrap();
                findings
                    .into_iter()
                    .find(|f| f.attribute == name)
                    .unwrap()
                    .found
            };
            let name = "CKA_ALLOWED_MECHANISMS";
            let without = found(key, &[], name);
            assert!(matches!(without, Found::Missing | Found::Wrong));
            let mut template = keys::binding_template(id(2));
            let sign = template
                .iter_mut()
                .find(|a| matches!(a, Attribute::Sign(_)))
                .unwrap();
            *sign = Attribute::Sign(false);
            let key = token
                .anchor
                .generate_key(&Mechanism::GenericSecretKeyGen, &template)
                .unwrap();
            assert_eq!(found(key, &exception, "CKA_SIGN"), Found::Wrong);
        },
    );
}

#[test]
fn a_generated_key_passes_and_is_proved() {
    with_softhsm("a_generated_key_passes_and_is_proved", |_| {
        init();
        let admin = Admin::open(&settings(), &pin(USER_PIN), true).unwrap();
        let key = admin.generate_key(2_048).unwrap();
        assert_eq!(key.problem, None);
        assert_eq!(key.modulus_bits, 2_048);
        assert_eq!(key.private.len() + key.binding.len(), 32);
        assert!(
            key.private
                .iter()
                .chain(&key.binding)
                .all(|f| f.found == Found::AsExpected)
        );
        assert!(matches!(key.private[0].expected, Expected::Flag(true)));
        assert_eq!(admin.key_ids().unwrap(), [key.id]);
    });
}

#[test]
fn sha1_is_refused_unless_allowed() {
    with_softhsm("sha1_is_refused_unless_allowed", |_| {
        init();
        let key = Admin::open(&settings(), &pin(USER_PIN), true)
            .unwrap()
            .generate_key(2_048)
            .unwrap();
        let strict = Settings {
            allow_oaep_sha1: false,
            ..settings()
        };
        // The module keeps its login for the process, so this opens a session of the same login.
        let admin = Admin::open(&settings(), &pin(USER_PIN), false);
        drop(admin);
        let checked = Admin::open(&strict, &pin(USER_PIN), false)
            .unwrap()
            .check(key.id)
            .unwrap();
        assert!(checked.problem.unwrap().contains("allow_oaep_sha1 = true"));
    });
}

#[test]
fn two_keys_of_one_id_and_none_are_refused() {
    with_softhsm("two_keys_of_one_id_and_none_are_refused", |_| {
        init();
        let token = open();
        let session = &token.anchor;
        let make = || {
            session
                .generate_key_pair(
                    &Mechanism::RsaPkcsKeyPairGen,
                    &keys::public_template(id(1), 2_048),
                    &keys::private_template(id(1)),
                )
                .unwrap();
        };
        let none = keys::find(session, id(1)).unwrap_err();
        assert!(none.detail.contains("is not on the token"), "{none}");
        make();
        let no_binding = keys::find(session, id(1)).unwrap_err();
        assert!(no_binding.detail.contains("binding key"), "{no_binding}");
        make();
        let two = keys::find(session, id(1)).unwrap_err();
        assert_eq!(two.class, Class::Untrusted);
        assert!(two.detail.contains("more than one"), "{two}");
    });
}

/// Clulow 2003: what decrypts must not unwrap, what is kept must not be wrapped, and no attribute may be turned back.
#[test]
fn the_attacks_on_pkcs11_are_blocked() {
    with_softhsm("the_attacks_on_pkcs11_are_blocked", |_| {
        init();
        let token = open();
        let session = &token.anchor;
        let pair = keys::generate(session, 2_048).unwrap();
        let public = session
            .find_objects(&[
                Attribute::Class(ObjectClass::PUBLIC_KEY),
                Attribute::Id(pair.id.as_bytes().to_vec()),
            ])
            .unwrap()[0];
        let oaep = Mechanism::RsaPkcsOaep(PkcsOaepParams::new(
            MechanismType::SHA1,
            PkcsMgfType::MGF1_SHA1,
            PkcsOaepSource::empty(),
        ));
        assert!(session.wrap_key(&oaep, public, pair.binding).is_err());
        assert!(
            session
                .wrap_key(&Mechanism::AesKeyWrap, pair.binding, pair.private)
                .is_err()
        );
        let into = [
            Attribute::Class(ObjectClass::SECRET_KEY),
            Attribute::KeyType(KeyType::GENERIC_SECRET),
            Attribute::Extractable(true),
            Attribute::Sensitive(false),
        ];
        assert!(
            session
                .unwrap_key(&oaep, pair.private, &[1; 256], &into)
                .is_err()
        );
        assert!(
            session
                .sign(&Mechanism::RsaPkcs, pair.private, b"x")
                .is_err()
        );
        assert!(
            session
                .decrypt(&Mechanism::RsaPkcs, pair.private, &[1; 256])
                .is_err()
        );
        assert!(session.encrypt(&oaep, public, b"x").is_err());
        for object in [pair.private, pair.binding] {
            for toggle in [
                Attribute::Extractable(true),
                Attribute::Sensitive(false),
                Attribute::Unwrap(true),
                Attribute::Wrap(true),
            ] {
                assert!(session.update_attributes(object, &[toggle]).is_err());
            }
            let copy = session.copy_object(object, &[Attribute::Extractable(true)]);
            assert!(copy.is_err());
            for secret in [AttributeType::Value, AttributeType::PrivateExponent] {
                assert!(gate::read(session, object, secret).unwrap().is_none());
            }
        }
    });
}

#[test]
fn selection_names_what_is_wrong() {
    with_softhsm("selection_names_what_is_wrong", |folder| {
        init();
        let class = |settings: &Settings| {
            let error = Admin::open(settings, &pin(USER_PIN), false).unwrap_err();
            assert!(matches!(error, AdminError::Token(_)), "{error:?}");
            error.to_string()
        };
        let other = Settings {
            label: Some("other".to_owned()),
            ..settings()
        };
        assert!(class(&other).contains("no token with label \"other\""));
        let both = Settings {
            serial: Some("1".to_owned()),
            ..settings()
        };
        assert!(class(&both).contains("chosen twice"));
        let no_module = Settings {
            module: folder.join("none.so"),
            ..settings()
        };
        assert!(class(&no_module).contains("no PKCS#11 module at"));
        let text = folder.join("text.so");
        fs::write(&text, "not a library").unwrap();
        fs::set_permissions(&text, fs::Permissions::from_mode(0o755)).unwrap();
        let no_library = Settings {
            module: text,
            ..settings()
        };
        assert!(class(&no_library).contains("is not a PKCS#11 module"));
    });
}

#[test]
fn init_refuses_to_erase_and_labels_may_clash() {
    with_softhsm("init_refuses_to_erase_and_labels_may_clash", |_| {
        init();
        let again = admin::init_token(&settings(), "test", &pin("654321"), &pin(USER_PIN), None);
        assert!(again.unwrap_err().to_string().contains("--erase-serial"));
        let serial = admin::list_tokens(&settings()).unwrap()[0]
            .info
            .serial
            .clone();
        let wrong = admin::init_token(
            &settings(),
            "test",
            &pin("654321"),
            &pin(USER_PIN),
            Some("0000"),
        );
        assert!(
            wrong
                .unwrap_err()
                .to_string()
                .contains("nothing was erased")
        );
        // A second token under the same label, as a restore to the wrong place makes one.
        admin::init_token(&settings(), "second", &pin("654321"), &pin(USER_PIN), None).unwrap();
        let relabelled = admin::init_token(
            &settings(),
            "test",
            &pin("654321"),
            &pin(USER_PIN),
            Some(&serial_of("second")),
        );
        assert!(
            relabelled.is_err(),
            "two tokens of one label cannot be told apart"
        );
        let error = Admin::open(&settings(), &pin(USER_PIN), false).unwrap_err();
        assert!(error.to_string().contains("more than one token"), "{error}");
        let by_serial = Settings {
            label: None,
            serial: Some(serial),
            ..settings()
        };
        assert_eq!(
            Admin::open(&by_serial, &pin(USER_PIN), false)
                .unwrap()
                .info()
                .label,
            "test"
        );
    });
}

fn serial_of(label: &str) -> String {
    let listed = admin::list_tokens(&settings()).unwrap();
    listed
        .into_iter()
        .find(|t| t.info.label == label)
        .unwrap()
        .info
        .serial
}

#[test]
fn a_wrong_pin_is_a_pin_error() {
    with_softhsm("a_wrong_pin_is_a_pin_error", |_| {
        init();
        let error = Admin::open(&settings(), &pin("000000"), false).unwrap_err();
        assert!(matches!(error, AdminError::Pin(_)), "{error:?}");
        assert!(
            error.to_string().contains("PinIncorrect from C_Login"),
            "{error}"
        );
    });
}
