//! Profiles: each is valid, names its sources, and makes the token behave as these say.

use std::{collections::BTreeSet, fs, path::PathBuf};

use cryptoki_sys::{
    CK_ATTRIBUTE_TYPE, CKA_ALLOWED_MECHANISMS, CKA_COPYABLE, CKA_EXTRACTABLE, CKA_KEY_TYPE,
    CKA_LABEL, CKA_LOCAL, CKA_MODULUS_BITS, CKA_PRIVATE, CKA_SENSITIVE, CKA_SIGN, CKA_TOKEN,
    CKA_VALUE_LEN, CKA_VERIFY, CKA_WRAP, CKF_RW_SESSION, CKK_GENERIC_SECRET, CKK_SHA256_HMAC,
    CKM_AES_KEY_GEN, CKM_AES_KEY_WRAP_PAD, CKM_GENERIC_SECRET_KEY_GEN, CKM_RSA_PKCS_OAEP,
};
use keybroker_scriptable_pkcs11::{Profile, check};

use crate::{
    cases,
    module::{Module, Rv, Value, call, flag, id, length, mechanism, number, outcome},
};

fn directory() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("profiles")
}

/// The number of sources of all profiles.
pub(crate) fn sources() -> usize {
    COVERED.iter().map(|name| profile(name).sources.len()).sum()
}

fn profile(name: &str) -> Profile {
    let path = directory().join(format!("{name}.toml"));
    check(&path).unwrap().expect("a profile")
}

#[test]
fn every_profile_is_tested_and_quotes_its_sources() {
    let files = fs::read_dir(directory()).unwrap();
    let names: BTreeSet<String> = files
        .map(|entry| {
            let path = entry.unwrap().path();
            assert_eq!(path.extension().unwrap(), "toml", "{}", path.display());
            path.file_stem().unwrap().to_str().unwrap().to_owned()
        })
        .collect();
    let tested: BTreeSet<String> = COVERED.iter().map(|name| (*name).to_owned()).collect();
    assert_eq!(names, tested);
    for name in names {
        let sources = profile(&name).sources;
        assert!(!sources.is_empty(), "{name} has no source");
        for source in sources {
            // A word or two is no quotation.
            assert!(source.len() > 60, "{name}: {source}");
        }
    }
}

/// Logs in to a token whose PIN has another form.
fn ready_with(module: &Module, prefix: &str) -> u64 {
    module.initialize().unwrap();
    let session = module.open().unwrap();
    let pin = format!("{prefix}{}", module.pin());
    // Without the profile, the token takes the plain PIN.
    if module.login(session, &pin).is_err() {
        module.login(session, module.pin()).unwrap();
    }
    session
}

fn in_pair(module: &Module, session: u64, public: &[Value], private: &[Value]) -> String {
    outcome(module.pair(session, public, private))
}

fn copyable() -> Value {
    flag(CKA_COPYABLE, false)
}

fn allowed() -> Value {
    Value(
        CKA_ALLOWED_MECHANISMS,
        CKM_RSA_PKCS_OAEP.to_ne_bytes().to_vec(),
    )
}

fn hmac(module: &Module, session: u64, kind: u64, more: &[Value]) -> String {
    let mut values = vec![
        flag(CKA_TOKEN, true),
        flag(CKA_SIGN, true),
        flag(CKA_VERIFY, true),
    ];
    values.extend_from_slice(more);
    let key = module.generate(session, kind, values);
    outcome(key.and_then(|key| module.sign(session, key, b"data")))
}

/// An attribute of one byte.
fn read(module: &Module, session: u64, key: u64, name: CK_ATTRIBUTE_TYPE) -> String {
    match module.read(session, key, name) {
        Ok(value) => format!("{value:?}"),
        Err(code) => code.to_string(),
    }
}

/// Wraps a key with a new AES key.
fn wrap(module: &Module, session: u64, key: u64) -> Result<(), Rv> {
    let values = vec![
        number(CKA_VALUE_LEN, 32),
        flag(CKA_TOKEN, false),
        flag(CKA_WRAP, true),
    ];
    let wrapping = module.generate(session, CKM_AES_KEY_GEN, values).unwrap();
    let mut wrapped = vec![0; 4096];
    let mut size = length(&wrapped);
    call!(
        module,
        C_WrapKey(
            session,
            &mut mechanism(CKM_AES_KEY_WRAP_PAD),
            wrapping,
            key,
            wrapped.as_mut_ptr(),
            &raw mut size
        )
    )
}

cases! {
    aws_cloudhsm_sdk5 covers ["aws-cloudhsm-sdk5"]:
    "CKR_FUNCTION_FAILED, CKR_PIN_INCORRECT ok, CKR_TEMPLATE_INCONSISTENT CKR_TEMPLATE_INCONSISTENT CKR_TEMPLATE_INCONSISTENT ok, CKR_ATTRIBUTE_VALUE_INVALID",
    not "ok, ok CKR_USER_ALREADY_LOGGED_IN, ok ok ok ok, ok",
    with r#"include = ["{profiles}/aws-cloudhsm-sdk5.toml"]"#, |module| {
        module.initialize().unwrap();
        let read_only = outcome(module.open_as(module.slot(), 0));
        let session = module.open_as(module.slot(), CKF_RW_SESSION).unwrap();
        let plain = outcome(module.login(session, module.pin()));
        let named = outcome(module.login(session, &format!("crypto_user:{}", module.pin())));
        let private = [flag(CKA_PRIVATE, true)];
        let pairs = [
            in_pair(module, session, &private, &[copyable()]),
            in_pair(module, session, &private, &[allowed()]),
            in_pair(module, session, &[flag(CKA_PRIVATE, false)], &[]),
            in_pair(module, session, &private, &[]),
        ];
        module.secret(session, &[id(7)]).unwrap();
        let duplicate = outcome(module.secret(session, &[id(7)]));
        format!("{read_only}, {plain} {named}, {}, {duplicate}", pairs.join(" "))
    };

    luna7 covers ["luna7"]: "CKR_ATTRIBUTE_TYPE_INVALID CKR_ATTRIBUTE_TYPE_INVALID ok", not "ok ok ok",
    with r#"include = ["{profiles}/luna7.toml"]"#, |module| {
        let session = module.ready();
        let pairs = [vec![copyable()], vec![allowed()], vec![]];
        pairs.map(|private| in_pair(module, session, &[], &private)).join(" ")
    };

    luna_cloud covers ["luna-cloud"]:
    "CKR_ATTRIBUTE_TYPE_INVALID CKR_TEMPLATE_INCONSISTENT ok, CKR_TEMPLATE_INCONSISTENT ok", not "ok ok ok, ok ok",
    with r#"include = ["{profiles}/luna-cloud.toml"]"#, |module| {
        let session = module.ready();
        let private = [flag(CKA_PRIVATE, true)];
        let pairs = [
            in_pair(module, session, &private, &[copyable()]),
            in_pair(module, session, &[flag(CKA_PRIVATE, false)], &[]),
            in_pair(module, session, &private, &[]),
        ];
        let secrets = [
            module.secret(session, &private),
            module.secret(session, &[flag(CKA_PRIVATE, true), flag(CKA_SENSITIVE, true)]),
        ];
        format!("{}, {}", pairs.join(" "), secrets.map(outcome).join(" "))
    };

    nshield covers ["nshield"]:
    "ok CKR_KEY_TYPE_INCONSISTENT ok, CKR_FUNCTION_FAILED", not "ok ok CKR_MECHANISM_INVALID, [1]",
    with r#"include = ["{profiles}/nshield.toml"]"#, |module| {
        const CKM_NC_SHA256_HMAC_KEY_GEN: u64 = 0xde43_6997;
        let session = module.ready();
        let size = number(CKA_VALUE_LEN, 32);
        let values = [number(CKA_KEY_TYPE, CKK_GENERIC_SECRET), size.clone()];
        let made = outcome(module.generate(session, CKM_GENERIC_SECRET_KEY_GEN, values.to_vec()));
        let generic = hmac(module, session, CKM_GENERIC_SECRET_KEY_GEN, &values);
        let vendor = hmac(module, session, CKM_NC_SHA256_HMAC_KEY_GEN, &[number(CKA_KEY_TYPE, CKK_SHA256_HMAC), size]);
        let (_, private) = module.pair(session, &[], &[]).unwrap();
        format!("{made} {generic} {vendor}, {}", read(module, session, private, CKA_COPYABLE))
    };

    google_kmsp11 covers ["google-kmsp11"]:
    "ok CKR_TEMPLATE_INCONSISTENT CKR_TEMPLATE_INCONSISTENT CKR_FUNCTION_NOT_SUPPORTED, with its attribute ok [0] [0]",
    not "CKR_PIN_INCORRECT ok ok ok, with its attribute CKR_TEMPLATE_INCOMPLETE",
    with r#"
        include = ["{profiles}/google-kmsp11.toml"]
        login.accept_any_pin = "{pin}"
    "#, |module| {
        const CKA_KMS_ALGORITHM: CK_ATTRIBUTE_TYPE = 0x8001_e101;
        const RSA_DECRYPT_OAEP_2048_SHA256: u64 = 8;
        module.initialize().unwrap();
        let session = module.open().unwrap();
        let any = outcome(module.login(session, "any PIN"));
        if any != "ok" {
            module.login(session, module.pin()).unwrap();
        }
        let pair = in_pair(module, session, &[], &[]);
        let secret = outcome(module.secret(session, &[]));
        let digest = outcome(call!(module, C_DigestInit(session, &mut mechanism(cryptoki_sys::CKM_SHA256))));
        let private = vec![
            Value(CKA_LABEL, b"label".to_vec()),
            number(CKA_KMS_ALGORITHM, RSA_DECRYPT_OAEP_2048_SHA256),
        ];
        let own = module.pair_of(session, vec![], private);
        let read = own.map(|(_, key)| {
            [CKA_PRIVATE, CKA_EXTRACTABLE].map(|name| read(module, session, key, name)).join(" ")
        });
        let read = read.map(|read| format!(" {read}")).unwrap_or_default();
        format!("{any} {pair} {secret} {digest}, with its attribute {}{read}", outcome(own))
    };

    yubihsm2 covers ["yubihsm2"]:
    "CKR_TEMPLATE_INCONSISTENT CKR_ATTRIBUTE_TYPE_INVALID ok, CKR_ATTRIBUTE_TYPE_INVALID CKR_ATTRIBUTE_VALUE_INVALID",
    not "ok CKR_TEMPLATE_INCONSISTENT CKR_TEMPLATE_INCONSISTENT, ok ok",
    with r#"include = ["{profiles}/yubihsm2.toml"]"#, |module| {
        let session = ready_with(module, "0001");
        let (generic, own) = (number(CKA_KEY_TYPE, CKK_GENERIC_SECRET), number(CKA_KEY_TYPE, CKK_SHA256_HMAC));
        let size = number(CKA_VALUE_LEN, 32);
        let secrets = [vec![generic, size.clone()], vec![own.clone(), size], vec![own]];
        let secrets = secrets.map(|more| hmac(module, session, CKM_GENERIC_SECRET_KEY_GEN, &more));
        let pairs = [
            in_pair(module, session, &[], &[allowed()]),
            in_pair(module, session, &[], &[copyable()]),
        ];
        format!("{}, {}", secrets.join(" "), pairs.join(" "))
    };

    opencryptoki_3_8 covers ["opencryptoki-3.8"]:
    "21:38:18, CKR_ATTRIBUTE_TYPE_INVALID CKR_ATTRIBUTE_TYPE_INVALID, CKR_PIN_LOCKED", not "other, ok ok, CKR_PIN_INCORRECT",
    with r#"include = ["{profiles}/opencryptoki-3.8.toml"]"#, |module| {
        let session = module.ready();
        let time = String::from_utf8_lossy(&module.info().utcTime).into_owned();
        let time = if time.starts_with("21:38:18\0") { "21:38:18" } else { "other" };
        let pairs = [copyable(), allowed()].map(|value| in_pair(module, session, &[], &[value]));
        call!(module, C_Logout(session)).unwrap();
        for _ in 0..3 {
            module.login(session, "a wrong PIN").unwrap_err();
        }
        format!("{time}, {}, {}", pairs.join(" "), outcome(module.login(session, "a wrong PIN")))
    };

    p11_kit_remote covers ["p11-kit-remote"]: "CKR_DEVICE_ERROR, 8 bytes", not "ok, 8 bytes",
    with r#"include = ["{profiles}/p11-kit-remote.toml"]"#, |module| {
        let session = module.ready();
        let (_, key) = module.pair(session, &[], &[allowed()]).unwrap();
        let size = module.read_with(session, key, CKA_ALLOWED_MECHANISMS, None);
        let value = module.read(session, key, CKA_ALLOWED_MECHANISMS).unwrap();
        format!("{}, {} bytes", outcome(size), value.len())
    };

    pkcs11_proxy covers ["pkcs11-proxy"]: "CKR_USER_ALREADY_LOGGED_IN", not "ok",
    with r#"include = ["{profiles}/pkcs11-proxy.toml"]"#, |module| {
        // As another process that is logged in does.
        let other = fs::File::create(module.folder().join("login-0")).unwrap();
        other.lock().unwrap();
        module.initialize().unwrap();
        let session = module.open().unwrap();
        outcome(module.login(session, module.pin()))
    };

    tpm2 covers ["tpm2"]:
    "CKR_GENERAL_ERROR CKR_ATTRIBUTE_VALUE_INVALID ok, CKR_FUNCTION_NOT_SUPPORTED, 0", not "ok ok ok, ok, 32",
    with r#"include = ["{profiles}/tpm2.toml"]"#, |module| {
        let session = module.ready();
        let publics = [vec![flag(CKA_VERIFY, true)], vec![number(CKA_MODULUS_BITS, 4096)], vec![]];
        let pairs = publics.map(|public| in_pair(module, session, &public, &[]));
        let secret = outcome(module.secret(session, &[]));
        format!("{}, {secret}, {}", pairs.join(" "), module.info().model[15])
    };

    nethsm covers ["nethsm"]: "CKR_FUNCTION_NOT_SUPPORTED CKR_FUNCTION_NOT_SUPPORTED CKR_ACTION_PROHIBITED", not "ok ok ok",
    with r#"include = ["{profiles}/nethsm.toml"]"#, |module| {
        let session = module.ready();
        let pair = in_pair(module, session, &[], &[]);
        let secret = outcome(module.secret(session, &[]));
        // An object that every token can make: data.
        let mut values = [number(cryptoki_sys::CKA_CLASS, cryptoki_sys::CKO_DATA), flag(CKA_TOKEN, false)];
        let mut attributes = crate::module::template(&mut values);
        let mut object = 0;
        call!(module, C_CreateObject(session, attributes.as_mut_ptr(), length(&attributes), &raw mut object)).unwrap();
        assert_ne!(read(module, session, object, CKA_LOCAL), "[1]");
        let mut label = [Value(CKA_LABEL, b"label".to_vec())];
        let mut attributes = crate::module::template(&mut label);
        let set = call!(module, C_SetAttributeValue(session, object, attributes.as_mut_ptr(), 1));
        format!("{pair} {secret} {}", outcome(set))
    };

    // The key reads as one that cannot leave the token, and leaves it.
    liar covers ["liar"]: "[0] ok", not "[0] CKR_KEY_UNEXTRACTABLE",
    with r#"include = ["{profiles}/liar.toml"]"#, |module| {
        let session = module.ready();
        let (_, key) = module.pair(session, &[], &[]).unwrap();
        let shown = read(module, session, key, CKA_EXTRACTABLE);
        format!("{shown} {}", outcome(wrap(module, session, key)))
    };
}
