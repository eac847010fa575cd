//! Attributes in templates and when they are read, and what the token demands of objects.

use cryptoki_sys::{
    CKA_COPYABLE, CKA_EXTRACTABLE, CKA_ID, CKA_KEY_TYPE, CKA_LABEL, CKA_MODIFIABLE, CKA_PRIVATE,
    CKA_SENSITIVE, CKA_SIGN, CKA_TOKEN, CKA_VALUE_LEN, CKA_VERIFY, CKK_GENERIC_SECRET,
    CKK_SHA256_HMAC, CKM_GENERIC_SECRET_KEY_GEN,
};

use crate::{
    cases,
    module::{Module, Rv, Value, flag, id, number, outcome},
};

/// An attribute as a text.
fn shown(result: Result<Vec<u8>, Rv>) -> String {
    match result {
        Ok(bytes) if bytes.is_empty() => "empty".to_owned(),
        Ok(bytes) => hex::encode(bytes),
        Err(code) => code.to_string(),
    }
}

/// Makes a secret key with this attribute and reads it back.
fn made(module: &Module, value: Value) -> String {
    let session = module.ready();
    let name = value.0;
    match module.secret(session, &[value]) {
        Ok(key) => shown(module.read(session, key, name)),
        Err(code) => code.to_string(),
    }
}

fn hmac_template() -> Vec<Value> {
    vec![
        number(CKA_KEY_TYPE, CKK_SHA256_HMAC),
        flag(CKA_TOKEN, false),
        flag(CKA_SIGN, true),
        flag(CKA_VERIFY, true),
    ]
}

/// A mechanism of a vendor.
const VENDOR_MECHANISM: u64 = 0x8000_1234;

cases! {
    refuses_an_attribute covers ["attribute.in_template.refuse"]: "CKR_ATTRIBUTE_TYPE_INVALID ok", not "ok ok",
    with r#"
        [[attribute]]
        name = "CKA_COPYABLE"
        in_template = { refuse = "CKR_ATTRIBUTE_TYPE_INVALID" }
    "#, |module| {
        let session = module.ready();
        let refused = outcome(module.secret(session, &[flag(CKA_COPYABLE, false)]));
        format!("{refused} {}", outcome(module.secret(session, &[])))
    };

    refuses_a_value covers ["attribute.in_template.when"]: "ok CKR_TEMPLATE_INCONSISTENT ok", not "ok ok ok",
    with r#"
        [[attribute]]
        name = "CKA_PRIVATE"
        in_template = { refuse = "CKR_TEMPLATE_INCONSISTENT", when = false }
    "#, |module| {
        let session = module.ready();
        let values = [vec![flag(CKA_PRIVATE, true)], vec![flag(CKA_PRIVATE, false)], vec![]];
        values.map(|values| outcome(module.secret(session, &values))).join(" ")
    };

    demands_a_value covers ["attribute.in_template.unless"]:
    "ok CKR_TEMPLATE_INCONSISTENT CKR_TEMPLATE_INCONSISTENT", not "ok ok ok",
    with r#"
        [[attribute]]
        name = "CKA_PRIVATE"
        in_template = { refuse = "CKR_TEMPLATE_INCONSISTENT", unless = true }
    "#, |module| {
        let session = module.ready();
        let values = [vec![flag(CKA_PRIVATE, true)], vec![flag(CKA_PRIVATE, false)], vec![]];
        values.map(|values| outcome(module.secret(session, &values))).join(" ")
    };

    ignores_an_attribute covers ["attribute.in_template.leave_out"]: "01", not "00",
    with r#"
        [[attribute]]
        name = "CKA_MODIFIABLE"
        in_template = { leave_out = true }
    "#, |module| made(module, flag(CKA_MODIFIABLE, false));

    makes_another_value covers ["attribute.in_template.replace"]: "01 01", not "00 00",
    with r#"
        [[attribute]]
        name = "CKA_EXTRACTABLE"
        in_template = { replace = true }
    "#, |module| {
        let given = made(module, flag(CKA_EXTRACTABLE, false));
        let session = module.open().unwrap();
        let key = module.secret(session, &[]).unwrap();
        format!("{given} {}", shown(module.read(session, key, CKA_EXTRACTABLE)))
    };

    does_not_have_an_attribute covers ["attribute.on_read.absent"]: "CKR_ATTRIBUTE_TYPE_INVALID", not "00",
    with r#"
        [[attribute]]
        name = "CKA_COPYABLE"
        on_read = { absent = true }
    "#, |module| made(module, flag(CKA_COPYABLE, false));

    fails_to_read_an_attribute covers ["attribute.on_read.fail"]: "CKR_FUNCTION_FAILED", not "00",
    with r#"
        [[attribute]]
        name = "CKA_COPYABLE"
        on_read = { fail = "CKR_FUNCTION_FAILED" }
    "#, |module| made(module, flag(CKA_COPYABLE, false));

    reads_an_empty_attribute covers ["attribute.on_read.empty"]: "empty", not "07",
    with r#"
        [[attribute]]
        name = "CKA_ID"
        on_read = { empty = true }
    "#, |module| made(module, id(7));

    lies_about_an_attribute covers ["attribute.on_read.value"]: "00 cafe 5202000000000000", not "01 CKR_ATTRIBUTE_TYPE_INVALID 07",
    with r#"
        [[attribute]]
        name = "CKA_EXTRACTABLE"
        on_read = { value = false }
        [[attribute]]
        name = "CKA_SUBJECT"
        on_read = { value = "hex:cafe" }
        [[attribute]]
        name = "CKA_ID"
        on_read = { value = ["CKM_SHA256_HMAC_GENERAL"] }
    "#, |module| {
        let session = module.ready();
        let key = module.secret(session, &[flag(CKA_EXTRACTABLE, true), id(7)]).unwrap();
        [CKA_EXTRACTABLE, cryptoki_sys::CKA_SUBJECT, CKA_ID]
            .map(|name| shown(module.read(session, key, name)))
            .join(" ")
    };

    fails_to_tell_a_size covers ["attribute.on_read.size_query"]: "CKR_DEVICE_ERROR 07", not "00 07",
    with r#"
        [[attribute]]
        name = "CKA_ID"
        on_read = { size_query = "CKR_DEVICE_ERROR" }
    "#, |module| {
        let session = module.ready();
        let key = module.secret(session, &[id(7)]).unwrap();
        let size = shown(module.read_with(session, key, CKA_ID, None));
        format!("{size} {}", shown(module.read(session, key, CKA_ID)))
    };

    treats_kinds_of_objects_apart covers ["attribute.parts"]:
    "CKR_TEMPLATE_INCONSISTENT ok, CKR_ATTRIBUTE_TYPE_INVALID 01", not "ok ok, 01 01",
    with r#"
        [[attribute]]
        name = "CKA_LABEL"
        parts = ["public"]
        in_template = { refuse = "CKR_TEMPLATE_INCONSISTENT" }
        [[attribute]]
        name = "CKA_PRIVATE"
        parts = ["private"]
        on_read = { absent = true }
    "#, |module| {
        let session = module.ready();
        let label = [Value(CKA_LABEL, b"label".to_vec())];
        let public = outcome(module.pair(session, &label, &[]));
        let pair = module.pair(session, &[flag(CKA_PRIVATE, true)], &label);
        let (public_key, private_key) = pair.unwrap();
        let read = [private_key, public_key].map(|key| shown(module.read(session, key, CKA_PRIVATE)));
        format!("{public} {}, {}", outcome(pair), read.join(" "))
    };

    takes_only_known_attributes covers ["template.only"]: "CKR_TEMPLATE_INCONSISTENT ok", not "ok ok",
    with r#"
        [[template]]
        function = "C_GenerateKeyPair"
        parts = ["public"]
        only = ["CKA_MODULUS_BITS", "CKA_TOKEN"]
        refuse = "CKR_TEMPLATE_INCONSISTENT"
    "#, |module| {
        let session = module.ready();
        let label = [Value(CKA_LABEL, b"label".to_vec())];
        let refused = outcome(module.pair(session, &label, &[]));
        format!("{refused} {}", outcome(module.pair(session, &[], &label)))
    };

    refuses_a_second_object_with_the_same_id covers ["objects.refuse_duplicate_id"]:
    "ok CKR_ATTRIBUTE_VALUE_INVALID ok", not "ok ok ok",
    with r#"objects.refuse_duplicate_id = "CKR_ATTRIBUTE_VALUE_INVALID""#, |module| {
        let session = module.ready();
        [7, 7, 8].map(|byte| outcome(module.secret(session, &[id(byte)]))).join(" ")
    };

    changes_handles_at_a_login covers ["objects.new_handles_at_login"]: "CKR_KEY_HANDLE_INVALID", not "ok",
    with "objects.new_handles_at_login = true", |module| {
        module.initialize().unwrap();
        let session = module.open().unwrap();
        // A public object of the session, which SoftHSM keeps.
        let values = [flag(CKA_PRIVATE, false), flag(CKA_SENSITIVE, false)];
        let key = module.secret(session, &values).unwrap();
        module.login(session, module.pin()).unwrap();
        outcome(module.sign(session, key, b"data"))
    };

    demands_a_key_type_for_hmac covers ["hmac.key_type"]:
    "CKR_TEMPLATE_INCONSISTENT, ok 2b00000000000000 1", not "ok, CKR_TEMPLATE_INCONSISTENT",
    with r#"
        [hmac]
        key_type = "CKK_SHA256_HMAC"
        refuse = "CKR_TEMPLATE_INCONSISTENT"
    "#, |module| {
        let session = module.ready();
        let generic = outcome(module.secret_of_type(session, CKK_GENERIC_SECRET, &[]));
        match module.secret_of_type(session, CKK_SHA256_HMAC, &[]) {
            Ok(key) => {
                let signed = outcome(module.sign(session, key, b"data"));
                let key_type = shown(module.read(session, key, CKA_KEY_TYPE));
                let found = module.find(session, vec![number(CKA_KEY_TYPE, CKK_SHA256_HMAC)]).unwrap();
                format!("{generic}, {signed} {key_type} {}", found.len())
            }
            Err(code) => format!("{generic}, {code}"),
        }
    };

    demands_a_mechanism_of_the_vendor_for_hmac covers ["hmac.mechanism", "hmac.length"]:
    "CKR_MECHANISM_INVALID, ok", not "CKR_TEMPLATE_INCONSISTENT, CKR_MECHANISM_INVALID",
    with r#"
        [hmac]
        key_type = "CKK_SHA256_HMAC"
        mechanism = 0x80001234
        length = 32
        refuse = "CKR_MECHANISM_INVALID"
    "#, |module| {
        let session = module.ready();
        let generic = outcome(module.generate(session, CKM_GENERIC_SECRET_KEY_GEN, hmac_template()));
        let vendor = module
            .generate(session, VENDOR_MECHANISM, hmac_template())
            .and_then(|key| module.sign(session, key, b"data"));
        format!("{generic}, {}", outcome(vendor))
    };

    makes_a_key_that_it_refuses_to_use covers ["hmac.refuse_at_use"]:
    "made 1000000000000000 CKR_KEY_TYPE_INCONSISTENT CKR_KEY_TYPE_INCONSISTENT, made 2b00000000000000 ok ok",
    not "made 1000000000000000 ok ok, CKR_MECHANISM_INVALID",
    with r#"
        [hmac]
        key_type = "CKK_SHA256_HMAC"
        mechanism = 0x80001234
        length = 32
        refuse = "CKR_KEY_TYPE_INCONSISTENT"
        refuse_at_use = true
    "#, |module| {
        let session = module.ready();
        let mut generic = vec![number(CKA_KEY_TYPE, CKK_GENERIC_SECRET), number(CKA_VALUE_LEN, 32)];
        generic.extend(hmac_template().split_off(1));
        let made = [(CKM_GENERIC_SECRET_KEY_GEN, generic), (VENDOR_MECHANISM, hmac_template())].map(|(mechanism, template)| {
            match module.generate(session, mechanism, template) {
                Ok(key) => {
                    let key_type = shown(module.read(session, key, CKA_KEY_TYPE));
                    let signed = module.sign(session, key, b"data");
                    let verified = module.verify(session, key, b"data", &signed.clone().unwrap_or_default());
                    format!("made {key_type} {} {}", outcome(signed), outcome(verified))
                }
                Err(code) => code.to_string(),
            }
        });
        made.join(", ")
    };
}
