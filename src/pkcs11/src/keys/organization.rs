//! The key of a Bitwarden organisation: the only private key that is imported. It unwraps into session objects, and does
//! nothing else. An integrity key that the token makes belongs to it, and authenticates the rows about the organisation.
//!
//! Not protected: copies of the key may exist outside the token, and no attribute of the key can exclude this.
//!
//! Mitigation: M28 of `THREAT_MODEL.md`.

use cryptoki::{
    mechanism::MechanismType,
    object::{Attribute, KeyType, ObjectClass, ObjectHandle},
};
use zeroize::Zeroize as _;

use keybroker_core::key::{ObjectId, WrappingKeyId};
use keybroker_pkcs11_ffi::Session;
use keybroker_worker_protocol::{Settings, private_key::PrivateParts};

use crate::{
    attribute_check::{self, Finding, ORGANIZATION_KEY},
    calling,
    classify::{Class, Fault},
};

use super::{
    PublicSide, find_one,
    making::{depends_on_the_template, destroy, make_integrity_key, refuse_taken},
    own_integrity_id, public_side_of,
    templates::{HmacKey, Lifetime, adapted, is_named, kept_on_token, unwrap_template},
};

/// The label of every imported key. Lists of wrapping keys leave out keys with this label.
pub(super) const LABEL: &str = "keybroker bitwarden organization key";

/// Number of attributes with the parts of the key.
const SECRET_AND_PUBLIC_PARTS: usize = 8;

/// The key of an organisation on the token, with the results of its attribute check.
#[derive(Clone, Debug)]
pub(crate) struct OrganizationKey {
    pub(crate) private: ObjectHandle,
    pub(crate) public: PublicSide,
    pub(crate) findings: Vec<Finding>,
}

/// The imported key, and the objects that this call made. Unless the objects are kept, the caller must remove them.
#[derive(Debug)]
pub(crate) struct Imported {
    private: ObjectHandle,
    integrity_key: ObjectHandle,
}

impl Imported {
    /// Removes both objects, and adds to the fault whether this succeeded.
    pub(crate) fn removed_after(&self, session: &Session, fault: Fault) -> Fault {
        let removed = [self.private, self.integrity_key].map(|object| destroy(session, object));
        fault.with(if removed.iter().all(Result::is_ok) {
            "No key was imported"
        } else {
            "The token did not remove the imported objects: remove them with the vendor's tool"
        })
    }
}

/// Makes an integrity key and imports the private key of an organisation under the same `CKA_ID`. The session must be
/// read-write. The caller must check the key before it is used.
pub(crate) fn import_organization_key(
    session: &Session,
    settings: &Settings,
    id: WrappingKeyId,
    parts: &PrivateParts,
) -> Result<Imported, Fault> {
    let Some(kind) = HmacKey::of(settings.integrity_key) else {
        return Err(Fault::new(
            Class::Configuration,
            "with `integrity_key = \"worker\"` in [token], no organisation key can be imported: its integrity key must be on the \
             token. Use another token",
        ));
    };
    refuse_second(session, id, parts)?;
    let own_id = own_integrity_id(id);
    refuse_taken(session, &ObjectId::from(id))?;
    refuse_taken(session, &own_id)?;
    let left_out = |attribute: &Attribute| is_named(attribute, &settings.attribute_exceptions);
    let mut refused = None;
    // Some tokens do not allow two objects with the same CKA_ID.
    for object in [ObjectId::from(id), own_id] {
        let lifetime = Lifetime::Token;
        let integrity_key = make_integrity_key(session, id, &object, kind, lifetime, left_out)?;
        match create(session, id, parts, left_out) {
            Ok(private) => {
                return Ok(Imported {
                    private,
                    integrity_key,
                });
            }
            Err(fault) => {
                let may_be_the_id = depends_on_the_template(&fault);
                destroy(session, integrity_key)
                    .map_err(|left| left.about("the integrity key was not removed"))?;
                if !may_be_the_id {
                    return Err(fault);
                }
                refused.get_or_insert(fault);
            }
        }
    }
    let fault = refused.expect("both attempts failed");
    Err(fault.about("the token refused to import the private key (C_CreateObject)"))
}

/// Refuses to import a key that the token has already: one organisation has one key, and a second copy under another
/// `CKA_ID` would escape the pins of the first.
fn refuse_second(session: &Session, id: WrappingKeyId, parts: &PrivateParts) -> Result<(), Fault> {
    if find_one(session, ObjectClass::PRIVATE_KEY, &id.into())?.is_some() {
        return Err(Fault::new(
            Class::Untrusted,
            format!(
                "the token has the key of this organisation already, under CKA_ID {id}. To replace it after the organisation \
                 changed its key pair, first remove it with `keybroker key remove {id}`"
            ),
        ));
    }
    calling::next("C_FindObjects");
    let same = session.find_objects(&[
        Attribute::Class(ObjectClass::PRIVATE_KEY),
        Attribute::Modulus(parts.modulus().to_vec()),
    ])?;
    if same.is_empty() {
        return Ok(());
    }
    Err(Fault::new(
        Class::Untrusted,
        "the token has this private key already, under another CKA_ID: two organisations cannot have the same key pair",
    ))
}

/// Creates the private object (`C_CreateObject`). The copies of the secret parts in the template are overwritten.
fn create(
    session: &Session,
    id: WrappingKeyId,
    parts: &PrivateParts,
    left_out: impl Fn(&Attribute) -> bool,
) -> Result<ObjectHandle, Fault> {
    let mut template = adapted(template(id), Lifetime::Token, left_out);
    // The capacity for all attributes, so that no copy of the secret parts is left behind when the list grows.
    template.reserve_exact(SECRET_AND_PUBLIC_PARTS + 1);
    template.extend(attributes_of(parts));
    let made = create_unwrapping(session, &mut template);
    for attribute in &mut template {
        if let Attribute::PrivateExponent(bytes)
        | Attribute::Prime1(bytes)
        | Attribute::Prime2(bytes)
        | Attribute::Exponent1(bytes)
        | Attribute::Exponent2(bytes)
        | Attribute::Coefficient(bytes) = attribute
        {
            bytes.zeroize();
        }
    }
    made
}

/// Creates the object with `CKA_UNWRAP_TEMPLATE`, so that the token itself refuses to unwrap into a readable object. Creates the object
/// without this attribute only if the token refuses the template.
fn create_unwrapping(
    session: &Session,
    template: &mut Vec<Attribute>,
) -> Result<ObjectHandle, Fault> {
    calling::next("C_CreateObject");
    let made = session.create_unwrapping_object(template, &unwrap_template());
    match made.map_err(Fault::from) {
        Err(fault) if depends_on_the_template(&fault) => {
            tracing::debug!(%fault, "the token does not import a key with CKA_UNWRAP_TEMPLATE");
        }
        made => return made,
    }
    calling::next("C_CreateObject");
    Ok(session.create_object(template)?)
}

fn template(id: WrappingKeyId) -> Vec<Attribute> {
    let mut template = vec![
        Attribute::Class(ObjectClass::PRIVATE_KEY),
        Attribute::KeyType(KeyType::RSA),
    ];
    template.extend(kept_on_token());
    template.extend([
        Attribute::Unwrap(true),
        Attribute::Decrypt(false),
        Attribute::Sign(false),
        Attribute::SignRecover(false),
        Attribute::Derive(false),
        Attribute::AllowedMechanisms(vec![MechanismType::RSA_PKCS_OAEP]),
        Attribute::Id(id.as_bytes().to_vec()),
        Attribute::Label(LABEL.as_bytes().to_vec()),
    ]);
    template
}

fn attributes_of(parts: &PrivateParts) -> [Attribute; SECRET_AND_PUBLIC_PARTS] {
    let [exponent, prime1, prime2, exponent1, exponent2, coefficient] =
        parts.secrets().map(<[u8]>::to_vec);
    [
        Attribute::Modulus(parts.modulus().to_vec()),
        Attribute::PublicExponent(parts.public_exponent().to_vec()),
        Attribute::PrivateExponent(exponent),
        Attribute::Prime1(prime1),
        Attribute::Prime2(prime2),
        Attribute::Exponent1(exponent1),
        Attribute::Exponent2(exponent2),
        Attribute::Coefficient(coefficient),
    ]
}

/// Finds the key of an organisation, and requires that it has the label and the attributes of such a key. The function
/// never returns a wrapping key.
pub(crate) fn organization_key(
    session: &Session,
    settings: &Settings,
    id: WrappingKeyId,
) -> Result<OrganizationKey, Fault> {
    let name = format!("organisation key {id}");
    calling::next("C_FindObjects");
    let found = session.find_objects(&[
        Attribute::Class(ObjectClass::PRIVATE_KEY),
        Attribute::KeyType(KeyType::RSA),
        Attribute::Id(id.as_bytes().to_vec()),
        Attribute::Label(LABEL.as_bytes().to_vec()),
    ])?;
    let [private] = found[..] else {
        return Err(Fault::new(
            Class::KeyMissing,
            format!(
                "the token has {} private keys with CKA_ID {id} for this organisation; one is required. Import the key of the \
                 organisation with `keybroker key import`",
                found.len()
            ),
        ));
    };
    let rules = attribute_check::adapted(ORGANIZATION_KEY, settings.access_control);
    let exceptions = &settings.attribute_exceptions;
    let findings = attribute_check::inspect_imported(session, private, &rules, exceptions)?;
    let wrong: Vec<String> = findings
        .iter()
        .filter(|finding| !finding.passes())
        .map(ToString::to_string)
        .collect();
    if !wrong.is_empty() {
        let what = format!("{name} must not be used: {}", wrong.join("; "));
        return Err(Fault::new(Class::Untrusted, what));
    }
    Ok(OrganizationKey {
        private,
        public: public_side_of(session, private, &name)?,
        findings,
    })
}
