//! Tests the attribute check with keys that have one wrong attribute, and the known attacks on PKCS#11.

use cryptoki::{
    mechanism::{
        Mechanism, MechanismType,
        rsa::{PkcsMgfType, PkcsOaepParams, PkcsOaepSource},
    },
    object::{Attribute, AttributeType, KeyType, ObjectClass, ObjectHandle},
};
use keybroker_pkcs11_ffi::Session;

use super::{generated, id, init, open, with_softhsm};
use crate::{
    attribute_check::{self, Found},
    classify::Class,
    keys,
};

/// The same attribute with another value, if a template can contain the other value.
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
        Attribute::ValueLen(_) => Attribute::ValueLen(31.into()),
        Attribute::AllowedMechanisms(_) => {
            Attribute::AllowedMechanisms(vec![MechanismType::RSA_PKCS, MechanismType::SHA512_HMAC])
        }
        _ => return None,
    })
}

/// Templates with exactly one attribute changed.
fn mutants(template: &[Attribute]) -> Vec<(AttributeType, Vec<Attribute>)> {
    (0..template.len())
        .filter_map(|index| {
            let mut mutant = template.to_vec();
            mutant[index] = flipped(&mutant[index])?;
            Some((mutant[index].attribute_type(), mutant))
        })
        .collect()
}

/// Inspects an object and returns the names of the attributes that do not pass.
fn refused(
    session: &Session,
    object: ObjectHandle,
    rules: &[attribute_check::Rule],
) -> Vec<&'static str> {
    let findings = attribute_check::inspect(session, object, rules, &[]).unwrap();
    let names = findings
        .iter()
        .filter(|finding| !finding.passes())
        .map(|finding| finding.attribute)
        .collect();
    let verdict = attribute_check::require("key", &findings);
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
    with_softhsm(
        "attribute_check::every_attribute_flipped_alone_is_refused_by_name",
        |_| {
            init();
            let token = open();
            let session = &token.anchor;
            let mut seen = 0;
            for (kind, template) in mutants(&keys::private_template(id(1))) {
                let public = keys::public_template(id(1), 2_048);
                let pair =
                    session.generate_key_pair(&Mechanism::RsaPkcsKeyPairGen, &public, &template);
                let names = refused(session, pair.unwrap().1, attribute_check::RSA_PRIVATE);
                assert_names(kind, attribute_check::RSA_PRIVATE, &names);
                seen += 1;
            }
            for (kind, template) in mutants(&keys::generic_secret_template(id(2))) {
                let key = session.generate_key(&Mechanism::GenericSecretKeyGen, &template);
                let names = refused(session, key.unwrap(), attribute_check::INTEGRITY_KEY);
                assert_names(kind, attribute_check::INTEGRITY_KEY, &names);
                seen += 1;
            }
            assert!(seen >= 25, "only {seen} attributes were flipped");
        },
    );
}

/// Reports the changed attribute and its consequences only: a key that is not sensitive was not always sensitive.
fn assert_names(kind: AttributeType, rules: &[attribute_check::Rule], names: &[&str]) {
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

/// An imported key is recognised whatever its other attributes are, because it was once outside the token.
#[test]
fn an_imported_key_is_refused() {
    with_softhsm("attribute_check::an_imported_key_is_refused", |_| {
        init();
        let token = open();
        let mut template = keys::generic_secret_template(id(1));
        template.retain(|attribute| !matches!(attribute, Attribute::ValueLen(_)));
        template.push(Attribute::Value(vec![7; 32]));
        let object = token.anchor.create_object(&template).unwrap();
        let names = refused(&token.anchor, object, attribute_check::INTEGRITY_KEY);
        assert_eq!(
            names,
            ["CKA_ALWAYS_SENSITIVE", "CKA_NEVER_EXTRACTABLE", "CKA_LOCAL"]
        );
    });
}

/// A secret key has no `CKA_SIGN_RECOVER`.
#[test]
fn an_exception_lets_an_attribute_be_absent_never_wrong_and_never_a_core_attribute() {
    with_softhsm(
        "attribute_check::an_exception_lets_an_attribute_be_absent_never_wrong_and_never_a_core_attribute",
        |_| {
            init();
            let token = open();
            let session = &token.anchor;
            let name = "CKA_SIGN_RECOVER";
            let rules: Vec<attribute_check::Rule> = attribute_check::RSA_PRIVATE
                .iter()
                .copied()
                .filter(|rule| rule.0 == name)
                .collect();
            let verdict = |object, exceptions: &[String]| {
                let findings =
                    attribute_check::inspect(session, object, &rules, exceptions).unwrap();
                let is_good = attribute_check::require("key", &findings).is_ok();
                (findings[0].found, is_good)
            };
            let exception = [name.to_owned()];
            let without = generated(session).integrity_key.object().unwrap();
            assert_eq!(verdict(without, &[]), (Found::Missing, false));
            assert_eq!(verdict(without, &exception), (Found::Excepted, true));
            // The attribute may be absent, but not wrong.
            let (_, template) = mutants(&keys::private_template(id(1)))
                .into_iter()
                .find(|(kind, _)| *kind == AttributeType::SignRecover)
                .unwrap();
            let public = keys::public_template(id(1), 2_048);
            let wrong = session
                .generate_key_pair(&Mechanism::RsaPkcsKeyPairGen, &public, &template)
                .unwrap()
                .1;
            assert_eq!(verdict(wrong, &exception), (Found::Wrong, false));
            // An attribute that every key must have is checked although the settings except it.
            let core = ["CKA_EXTRACTABLE".to_owned()];
            let extractable = keys::generic_secret_template(id(3))
                .into_iter()
                .map(|attribute| match attribute {
                    Attribute::Extractable(_) => Attribute::Extractable(true),
                    other => other,
                })
                .collect::<Vec<_>>();
            let key = session
                .generate_key(&Mechanism::GenericSecretKeyGen, &extractable)
                .unwrap();
            let findings =
                attribute_check::inspect(session, key, attribute_check::INTEGRITY_KEY, &core)
                    .unwrap();
            let fault = attribute_check::require("key", &findings).unwrap_err();
            assert!(
                fault.detail.contains("CKA_EXTRACTABLE is not false"),
                "{fault}"
            );
            assert!(fault.detail.contains("No setting accepts"), "{fault}");
        },
    );
}

/// Clulow 2003: a key that decrypts must not unwrap, a protected key must not be wrapped, and no attribute may be
/// changed back.
#[test]
fn the_attacks_on_pkcs11_are_blocked() {
    with_softhsm("attribute_check::the_attacks_on_pkcs11_are_blocked", |_| {
        init();
        let token = open();
        let session = &token.anchor;
        let pair = generated(session);
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
        let integrity_key = pair.integrity_key.object().unwrap();
        assert!(session.wrap_key(&oaep, public, integrity_key).is_err());
        assert!(
            session
                .wrap_key(&Mechanism::AesKeyWrap, integrity_key, pair.private)
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
        for object in [pair.private, integrity_key] {
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
                assert!(
                    attribute_check::read(session, object, secret)
                        .unwrap()
                        .is_none()
                );
            }
        }
    });
}
