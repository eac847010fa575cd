//! Tests sealed releases with SoftHSM and with modules that lie or fail.

use aws_lc_rs::{
    encoding::{AsDer as _, Pkcs8V1Der},
    rsa::{KeySize, OAEP_SHA1_MGF1SHA1, OaepPrivateDecryptingKey, PrivateDecryptingKey},
};
use cryptoki::{mechanism::Mechanism, object::Attribute};
use keybroker_core::{envelope::Algorithm, key::Sealing as Protection};
use keybroker_pkcs11_ffi::Session;
use keybroker_worker_protocol::{
    oaep::{self, WrapKey},
    recipient::RecipientKey,
    report::Sealing,
};

use super::{
    USER_PIN, faulty,
    faulty::{Fault as ModuleFault, code},
    id, init, open, pin, record, with_softhsm,
};
use crate::{
    classify::{Class, Fault},
    keys::{self, Lifetime, unwrap_template},
    open::OpenToken,
    organization,
    recipients::{RECIPIENTS_MAX, Recipients},
    report::sealed::Tests,
    sealed::SealedKey,
};

const MATERIAL: &[u8] = b"material of the user";

/// Makes a sealed wrapping key as a session key, and wraps [`MATERIAL`] under it.
fn sealed_key(session: &Session, unwrapped: Option<&[Attribute]>) -> SealedKey {
    let of_session = |template| keys::adapted(template, Lifetime::Session, |_| false);
    let public = of_session(keys::public_template(id(1), 2_048));
    let private = of_session(keys::sealed_template(id(1)));
    let mechanism = Mechanism::RsaPkcsKeyPairGen;
    let made = match unwrapped {
        Some(unwrapped) => {
            session.generate_unwrapping_pair(&mechanism, &public, &private, unwrapped)
        }
        None => session.generate_key_pair(&mechanism, &public, &private),
    };
    let (_, private) = made.unwrap();
    let public = keys::public_side_of(session, private, "sealed").unwrap();
    let algorithm = Algorithm::RsaOaepSha1;
    let wrapped = WrapKey::new(&public.spki, algorithm)
        .unwrap()
        .wrap(MATERIAL)
        .unwrap();
    SealedKey {
        private,
        algorithm,
        wrapped,
    }
}

/// The key pair of a recipient.
fn recipient(size: KeySize) -> (RecipientKey, OaepPrivateDecryptingKey) {
    let private = PrivateDecryptingKey::generate(size).unwrap();
    let spki = private.public_key().as_der().unwrap();
    let public = RecipientKey::from_spki(spki.as_ref()).unwrap();
    (public, OaepPrivateDecryptingKey::new(private).unwrap())
}

fn release(
    session: &Session,
    key: &SealedKey,
    recipients: &mut Recipients,
    to: &RecipientKey,
) -> Result<Vec<u8>, Fault> {
    let recipient = recipients.object(session, to.spki())?;
    key.release(session, recipient, Algorithm::RsaOaepSha1)
}

fn objects(session: &Session) -> usize {
    session.find_objects(&[]).unwrap().len()
}

#[test]
fn only_the_recipient_gets_the_material() {
    with_softhsm("sealed::only_the_recipient_gets_the_material", |_| {
        init();
        let token = open();
        let session = &token.anchor;
        let mut recipients = Recipients::default();
        for template in [None, Some(&unwrap_template()[..])] {
            let key = sealed_key(session, template);
            for size in [KeySize::Rsa2048, KeySize::Rsa4096] {
                let (public, private) = recipient(size);
                recipients.object(session, public.spki()).unwrap();
                let before = objects(session);
                let sealed = release(session, &key, &mut recipients, &public).unwrap();
                assert_eq!(objects(session), before);
                let mut opened = vec![0; private.min_output_size()];
                let opened = private.decrypt(&OAEP_SHA1_MGF1SHA1, &sealed, &mut opened, None);
                assert_eq!(opened.unwrap(), MATERIAL);
            }
            let mut damaged = key.clone();
            damaged.wrapped[40] ^= 1;
            let (public, _) = recipient(KeySize::Rsa2048);
            release(session, &damaged, &mut recipients, &public).unwrap_err();
        }
    });
}

/// A token with one of these behaviours makes or shows an object that is not protected.
const LIARS: [(&str, &str); 4] = [
    (
        "name = \"CKA_VALUE\"\non_read.value = \"hex:00112233\"",
        "CKA_VALUE can be read",
    ),
    (
        "name = \"CKA_SENSITIVE\"\nin_template.replace = false",
        "CKA_SENSITIVE is not true; CKA_VALUE can be read",
    ),
    (
        "name = \"CKA_SENSITIVE\"\nin_template.replace = false\non_read.value = true",
        "not protected: CKA_VALUE can be read",
    ),
    (
        "name = \"CKA_EXTRACTABLE\"\non_read.absent = true",
        "CKA_EXTRACTABLE is absent",
    ),
];

#[test]
fn an_object_that_is_not_protected_is_not_released() {
    with_softhsm(
        "sealed::an_object_that_is_not_protected_is_not_released",
        |folder| {
            init();
            let (settings, faulty) = faulty(folder);
            let token = OpenToken::login(&settings, &record(), &pin(USER_PIN), true).unwrap();
            let session = &token.anchor;
            let key = sealed_key(session, None);
            let mut recipients = Recipients::default();
            let (public, _) = recipient(KeySize::Rsa2048);
            release(session, &key, &mut recipients, &public).unwrap();
            let before = objects(session);
            for (behaviour, words) in LIARS {
                faulty.behave(&format!(
                    "[[attribute]]\nparts = [\"secret\"]\n{behaviour}\n"
                ));
                let fault = release(session, &key, &mut recipients, &public).unwrap_err();
                assert_eq!(fault.class, Class::Untrusted, "{words}");
                assert!(fault.detail.contains(words), "{words}: {fault}");
                faulty.behave("");
                assert_eq!(objects(session), before, "{words}");
            }
            release(session, &key, &mut recipients, &public).unwrap();
        },
    );
}

/// The object is removed after every failure, at the latest with its session.
#[test]
fn no_object_remains_after_a_failure() {
    with_softhsm("sealed::no_object_remains_after_a_failure", |folder| {
        init();
        let (settings, faulty) = faulty(folder);
        let token = OpenToken::login(&settings, &record(), &pin(USER_PIN), true).unwrap();
        let key = sealed_key(&token.anchor, None);
        let (public, _) = recipient(KeySize::Rsa2048);
        let before = objects(&token.anchor);
        let failure = || {
            let opened = token.session(&[]).unwrap();
            let mut recipients = Recipients::default();
            release(&opened.session, &key, &mut recipients, &public).unwrap_err()
        };
        let halfway = ModuleFault::always(code::after(code::DEVICE_ERROR));
        for (function, words) in [
            ("C_UnwrapKey", "DeviceError from C_UnwrapKey"),
            (
                "C_GetAttributeValue",
                "DeviceError from C_GetAttributeValue",
            ),
            ("C_WrapKey", "DeviceError from C_WrapKey"),
        ] {
            faulty.set(function, &halfway);
            let fault = failure();
            assert!(fault.detail.contains(words), "{words}: {fault}");
            faulty.clear(function);
            assert_eq!(objects(&token.anchor), before, "{words}");
        }
        let device_error = ModuleFault::always(code::DEVICE_ERROR);
        faulty.set("C_DestroyObject", &device_error);
        let fault = failure();
        let words = "did not remove the object of a sealed release: DeviceError";
        assert!(fault.detail.contains(words), "{fault}");
        faulty.clear("C_DestroyObject");
        assert_eq!(objects(&token.anchor), before, "the session is closed");

        faulty.behave("[[rule]]\nfunction = \"C_WrapKey\"\ndo = { truncate = 1 }\n");
        let fault = failure();
        assert_eq!(fault.class, Class::Untrusted);
        assert!(fault.detail.contains("255 bytes"), "{fault}");
        assert_eq!(objects(&token.anchor), before);
    });
}

#[test]
fn a_session_keeps_the_keys_of_recent_recipients() {
    with_softhsm(
        "sealed::a_session_keeps_the_keys_of_recent_recipients",
        |folder| {
            init();
            let (settings, faulty) = faulty(folder);
            let token = OpenToken::login(&settings, &record(), &pin(USER_PIN), true).unwrap();
            let session = &token.anchor;
            // Keys without a small factor. No program knows their private keys.
            let keys: Vec<RecipientKey> = (1_u16..)
                .step_by(2)
                .filter_map(|end| {
                    let mut modulus = vec![0xa5; 256];
                    modulus[254..].copy_from_slice(&end.to_be_bytes());
                    let (spki, _) = oaep::spki(&modulus, &[1, 0, 1]).unwrap();
                    RecipientKey::from_spki(&spki).ok()
                })
                .take(RECIPIENTS_MAX + 1)
                .collect();
            let mut recipients = Recipients::default();
            let (first, others) = keys.split_first().unwrap();
            for other in others {
                recipients.object(session, other.spki()).unwrap();
                recipients.object(session, first.spki()).unwrap();
            }
            assert_eq!(faulty.count("C_CreateObject ends 0"), keys.len());
            assert_eq!(objects(session), RECIPIENTS_MAX);
            // The first key was used last, and the second key was used least recently.
            recipients.object(session, first.spki()).unwrap();
            assert_eq!(faulty.count("C_CreateObject ends 0"), keys.len());
            recipients.object(session, others[0].spki()).unwrap();
            assert_eq!(faulty.count("C_CreateObject ends 0"), keys.len() + 1);
            assert_eq!(objects(session), RECIPIENTS_MAX);
        },
    );
}

#[test]
fn the_report_names_what_a_token_lacks() {
    with_softhsm("sealed::the_report_names_what_a_token_lacks", |folder| {
        init();
        let (settings, faulty) = faulty(folder);
        let sealed_after = |behaviour: &str| {
            faulty.behave(behaviour);
            let token = OpenToken::login(&settings, &record(), &pin(USER_PIN), true).unwrap();
            let algorithm = Algorithm::RsaOaepSha1;
            let tests = Tests::without_template(&token, &token.anchor, Vec::new(), algorithm);
            tests.unwrap().with_template().unwrap()
        };
        let honest = sealed_after("");
        assert_eq!(honest.result, Sealing::Enforced, "{honest:#?}");
        assert_eq!(honest.reason, None);

        let without_template = "[[attribute]]\nname = 0x40000212\n\
                                in_template.refuse = \"CKR_ATTRIBUTE_TYPE_INVALID\"\n";
        let weaker = sealed_after(without_template);
        assert_eq!(weaker.result, Sealing::Worker, "{weaker:#?}");
        let ignored = "[[attribute]]\nname = 0x40000212\nin_template.leave_out = true\n";
        let weaker = sealed_after(ignored);
        assert_eq!(weaker.result, Sealing::Worker, "{weaker:#?}");

        for (behaviour, words) in [
            (
                "[[rule]]\nfunction = \"C_UnwrapKey\"\ndo = { return = \"CKR_FUNCTION_NOT_SUPPORTED\" }\n"
                    .to_owned(),
                "FunctionNotSupported from C_UnwrapKey",
            ),
            (
                "[[rule]]\nfunction = \"C_WrapKey\"\ndo = { corrupt = true }\n".to_owned(),
                "the recipient cannot decrypt the answer",
            ),
            (
                format!("[[attribute]]\nparts = [\"secret\"]\n{}\n", LIARS[2].0),
                "CKA_VALUE can be read",
            ),
            (
                "[[attribute]]\nname = \"CKA_DECRYPT\"\nparts = [\"private\"]\nin_template.replace = true\n"
                    .to_owned(),
                "decrypting with the sealed wrapping key: SUCCEEDED",
            ),
        ] {
            let unavailable = sealed_after(&behaviour);
            assert_eq!(unavailable.result, Sealing::Unavailable, "{words}: {unavailable:#?}");
            let reason = unavailable.reason.unwrap();
            assert!(reason.contains(words), "{words}: {reason}");
        }
    });
}

/// The token itself refuses to unwrap a member's key into a readable object. A token that cannot express this still imports the key.
#[test]
fn an_imported_key_unwraps_only_into_protected_objects() {
    with_softhsm(
        "sealed::an_imported_key_unwraps_only_into_protected_objects",
        |folder| {
            init();
            let (settings, faulty) = faulty(folder);
            let without_template = "[[attribute]]\nname = 0x40000212\n\
                                    in_template.refuse = \"CKR_ATTRIBUTE_TYPE_INVALID\"\n";
            for (number, behaviour, expected) in [
                (1, "", Protection::Enforced),
                (2, without_template, Protection::Worker),
            ] {
                faulty.behave(behaviour);
                let token = OpenToken::login(&settings, &record(), &pin(USER_PIN), true).unwrap();
                let pair = PrivateDecryptingKey::generate(KeySize::Rsa2048).unwrap();
                let pkcs8: Pkcs8V1Der<'_> = pair.as_der().unwrap();
                let key = organization::import(&token, &settings, id(number), pkcs8.as_ref());
                let key = key.unwrap();
                let algorithm = Algorithm::RsaOaepSha1;
                let public = WrapKey::new(&key.public.spki, algorithm).unwrap();
                let sealed = SealedKey {
                    private: key.private,
                    algorithm,
                    wrapped: public.wrap(MATERIAL).unwrap(),
                };
                let sealing = sealed.sealing(|| token.session(&[])).unwrap();
                assert_eq!(sealing, expected);
            }
        },
    );
}
