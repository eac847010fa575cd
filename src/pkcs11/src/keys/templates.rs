//! The templates of the keys. Every usage flag is set explicitly, and every unnecessary use is forbidden.

use cryptoki::{
    mechanism::{Mechanism, MechanismType, vendor_defined::VendorDefinedMechanism},
    object::{Attribute, KeyType, ObjectClass},
};

use keybroker_core::key::{ObjectId, Purpose, WrappingKeyId};
use keybroker_worker_protocol::IntegrityKey;

use crate::{
    attribute_check,
    classify::{Class, Fault},
};

/// Length of an integrity key in bytes, equal to the output of the HMAC's hash (RFC 2104 section 3).
const INTEGRITY_KEY_BYTES: u64 = 32;
const PUBLIC_EXPONENT: [u8; 3] = [0x01, 0x00, 0x01];
/// The value of `CKM_NC_SHA256_HMAC_KEY_GEN` in nShield's header `pkcs11extra.h`.
const NSHIELD_HMAC_KEY_GEN: u64 = 0xde43_6997;

/// A kind of integrity key that is an object on the token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HmacKey {
    GenericSecret,
    Sha256Hmac,
    Nshield,
}

impl HmacKey {
    const ALL: [Self; 3] = [Self::GenericSecret, Self::Sha256Hmac, Self::Nshield];

    /// Returns the kind for a setting, or `None` if the integrity key is not on the token.
    pub(crate) fn of(setting: IntegrityKey) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.setting() == setting)
    }

    /// Returns the setting for keys of this kind.
    pub(crate) fn setting(self) -> IntegrityKey {
        match self {
            Self::GenericSecret => IntegrityKey::GenericSecret,
            Self::Sha256Hmac => IntegrityKey::Sha256Hmac,
            Self::Nshield => IntegrityKey::Nshield,
        }
    }

    /// Returns all kinds, beginning with the configured kind.
    pub(crate) fn all_with_first(setting: IntegrityKey) -> impl Iterator<Item = Self> {
        let first = Self::of(setting);
        let others = Self::ALL.into_iter();
        first
            .into_iter()
            .chain(others.filter(move |kind| Some(*kind) != first))
    }
}

/// The lifetime of a key object (`CKA_TOKEN`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lifetime {
    Token,
    Session,
}

/// Adapts a template: sets its lifetime and removes the attributes for which `left_out` is true.
pub(crate) fn adapted(
    mut template: Vec<Attribute>,
    lifetime: Lifetime,
    left_out: impl Fn(&Attribute) -> bool,
) -> Vec<Attribute> {
    template.retain(|attribute| !left_out(attribute));
    for attribute in &mut template {
        if let Attribute::Token(is_on_token) = attribute {
            *is_on_token = lifetime == Lifetime::Token;
        }
    }
    template
}

/// Whether an exception for the attribute is permitted and `names` contains its name.
pub(super) fn is_named(attribute: &Attribute, names: &[String]) -> bool {
    attribute_check::exceptable(attribute.attribute_type())
        .is_some_and(|exception| names.iter().any(|name| name == exception.attribute))
}

/// The attributes that keep a private or secret key on the token and prevent its change.
pub(super) fn kept_on_token() -> [Attribute; 6] {
    [
        Attribute::Token(true),
        Attribute::Private(true),
        Attribute::Sensitive(true),
        Attribute::Extractable(false),
        Attribute::Modifiable(false),
        Attribute::Copyable(false),
    ]
}

fn label(id: WrappingKeyId, what: &str) -> Attribute {
    Attribute::Label(format!("keybroker {what} {id}").into_bytes())
}

/// Returns the template of the public object. The template has only the attributes that the standard requires (PKCS #11
/// v2.40, section 2.1.2), because some tokens refuse other attributes. Misuse of a public object is no risk: the public
/// key is not secret, and the broker wraps in software.
pub(crate) fn public_template(id: WrappingKeyId, modulus_bits: u32) -> Vec<Attribute> {
    vec![
        Attribute::Token(true),
        Attribute::ModulusBits(u64::from(modulus_bits).into()),
        Attribute::PublicExponent(PUBLIC_EXPONENT.to_vec()),
        Attribute::Id(id.as_bytes().to_vec()),
        label(id, "wrapping key"),
    ]
}

/// Returns the template of the private key. The template sets every usage flag, because tokens set omitted flags to
/// true (SoftHSM: `SIGN`, `SIGN_RECOVER`, `UNWRAP`).
pub(crate) fn private_template(id: WrappingKeyId) -> Vec<Attribute> {
    let mut template = kept_on_token().to_vec();
    template.extend([
        Attribute::Decrypt(true),
        Attribute::Sign(false),
        Attribute::SignRecover(false),
        Attribute::Unwrap(false),
        Attribute::Derive(false),
        Attribute::AllowedMechanisms(vec![MechanismType::RSA_PKCS_OAEP]),
        Attribute::Id(id.as_bytes().to_vec()),
        label(id, "wrapping key"),
    ]);
    template
}

/// Returns the template of the private key of a sealed wrapping key, which unwraps user keys and does not decrypt.
pub(crate) fn sealed_template(id: WrappingKeyId) -> Vec<Attribute> {
    let mut template = private_template(id);
    for attribute in &mut template {
        match attribute {
            Attribute::Decrypt(is_allowed) => *is_allowed = false,
            Attribute::Unwrap(is_allowed) => *is_allowed = true,
            _ => {}
        }
    }
    template
}

/// Returns the template of the private key of a wrapping key with this purpose.
pub(crate) fn template_of(purpose: Purpose, id: WrappingKeyId) -> Vec<Attribute> {
    match purpose {
        Purpose::Plain => private_template(id),
        Purpose::Sealed => sealed_template(id),
    }
}

/// Returns the attributes of `CKA_UNWRAP_TEMPLATE`. With this template, the token itself refuses to make an object that
/// is readable or outlives its session.
pub(crate) fn unwrap_template() -> [Attribute; 2] {
    [Attribute::Token(false), Attribute::Sensitive(true)]
}

/// Returns the template of an unwrapped object. The template omits `CKA_VALUE_LEN`, which SoftHSM refuses. SoftHSM
/// requires that the template repeats the attributes of `CKA_UNWRAP_TEMPLATE`.
pub(crate) fn object_template() -> Vec<Attribute> {
    let mut template = vec![
        Attribute::Class(ObjectClass::SECRET_KEY),
        Attribute::KeyType(KeyType::GENERIC_SECRET),
        Attribute::Private(true),
        Attribute::Extractable(true),
    ];
    template.extend(unwrap_template());
    template
}

/// The label of every key that signs the transcript of a ceremony. Lists of wrapping keys leave out keys with this label.
pub(crate) const SIGNING_KEY_LABEL: &str = "keybroker ceremony signing key";

/// The templates of the public and the private object of a key that signs the transcript of a ceremony.
pub(crate) fn signing_templates(
    object: &ObjectId,
    modulus_bits: u32,
) -> (Vec<Attribute>, Vec<Attribute>) {
    let label = || Attribute::Label(SIGNING_KEY_LABEL.as_bytes().to_vec());
    let public = vec![
        Attribute::Token(true),
        Attribute::ModulusBits(u64::from(modulus_bits).into()),
        Attribute::PublicExponent(PUBLIC_EXPONENT.to_vec()),
        Attribute::Id(object.as_bytes().to_vec()),
        label(),
    ];
    let mut private = kept_on_token().to_vec();
    private.extend([
        Attribute::Sign(true),
        Attribute::SignRecover(false),
        Attribute::Decrypt(false),
        Attribute::Unwrap(false),
        Attribute::Derive(false),
        Attribute::Id(object.as_bytes().to_vec()),
        label(),
    ]);
    (public, private)
}

/// Returns the template of an integrity key that is a generic secret.
#[cfg(test)]
pub(crate) fn generic_secret_template(id: WrappingKeyId) -> Vec<Attribute> {
    integrity_template(HmacKey::GenericSecret, id, &ObjectId::from(id))
}

/// Returns the template of an integrity key of this kind, with this `CKA_ID`.
pub(crate) fn integrity_template(
    kind: HmacKey,
    id: WrappingKeyId,
    object: &ObjectId,
) -> Vec<Attribute> {
    let key_type = match kind {
        // SoftHSM refuses `CKK_SHA256_HMAC` for `CKM_GENERIC_SECRET_KEY_GEN`. Therefore the list of allowed mechanisms
        // restricts the key instead of the key type.
        HmacKey::GenericSecret => KeyType::GENERIC_SECRET,
        HmacKey::Sha256Hmac | HmacKey::Nshield => KeyType::SHA256_HMAC,
    };
    let mut template = vec![
        Attribute::Class(ObjectClass::SECRET_KEY),
        Attribute::KeyType(key_type),
    ];
    template.extend(kept_on_token());
    template.extend([
        Attribute::Sign(true),
        Attribute::Verify(true),
        Attribute::Encrypt(false),
        Attribute::Decrypt(false),
        Attribute::Wrap(false),
        Attribute::Unwrap(false),
        Attribute::Derive(false),
        Attribute::Id(object.as_bytes().to_vec()),
        // The label contains the former name of the integrity key, because the keys of all earlier releases have this
        // label.
        label(id, "binding key"),
    ]);
    // For this kind, the key type implies the length and the mechanism.
    if kind != HmacKey::Sha256Hmac {
        template.push(Attribute::ValueLen(INTEGRITY_KEY_BYTES.into()));
        template.push(Attribute::AllowedMechanisms(vec![
            MechanismType::SHA256_HMAC,
        ]));
    }
    template
}

/// Returns the mechanism that generates an integrity key of this kind.
pub(crate) fn integrity_mechanism(kind: HmacKey) -> Result<Mechanism<'static>, Fault> {
    match kind {
        HmacKey::GenericSecret | HmacKey::Sha256Hmac => Ok(Mechanism::GenericSecretKeyGen),
        HmacKey::Nshield => MechanismType::new_vendor_defined(NSHIELD_HMAC_KEY_GEN)
            .map(|kind| Mechanism::VendorDefined(VendorDefinedMechanism::new::<()>(kind, None)))
            .map_err(|error| Fault::new(Class::Configuration, error.to_string())),
    }
}
