//! Reads one revocation list. Verifies the signature, and checks whether the TLS handshake can use
//! the list.

use std::{cmp::Ordering, collections::BTreeSet, sync::Arc};

use aws_lc_rs::digest;
use rustls::{
    RootCertStore,
    crypto::aws_lc_rs::default_provider,
    server::{VerifierBuilderError, WebPkiClientVerifier},
};
use rustls_pki_types::CertificateRevocationListDer;
use x509_parser::{
    num_bigint::BigUint,
    oid_registry::OID_X509_EXT_ISSUER_DISTRIBUTION_POINT,
    prelude::{CertificateRevocationList, FromDer as _, RevokedCertificate, X509Certificate},
};

use keybroker_core::call::Timestamp;

use super::{super::to_array, Problem, error::ListsError};

/// Divisor of a list's validity period: the alert about a missing newer list begins when a quarter
/// of the validity period remains.
const LAST_PART: i64 = 4;

/// A usable list.
#[derive(Clone, Debug)]
pub(super) struct List {
    pub(super) der: CertificateRevocationListDer<'static>,
    pub(super) version: Version,
    pub(super) life: Life,
    /// SHA-256 of the CA and the serial numbers in the list.
    pub(super) revoked: [u8; 32],
}

/// The validity period of a list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) struct Life {
    /// Seconds since 1970.
    from: i64,
    pub(in super::super) until: i64,
}

/// The age of a list, for alerts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) enum Age {
    Good,
    /// The list is near its expiry, and must be replaced soon.
    Late,
    /// The list has expired.
    Over,
}

impl Life {
    fn of(list: &CertificateRevocationList<'_>) -> Result<Self, ListsError> {
        let Some(next) = list.next_update() else {
            return Err(ListsError::NoEnd(list.issuer().to_string()));
        };
        Ok(Self {
            from: list.last_update().timestamp(),
            until: next.timestamp(),
        })
    }

    /// Reads the validity period of a list without verifying the signature.
    pub(super) fn read(der: &[u8]) -> Option<Self> {
        let (_, list) = CertificateRevocationList::from_der(der).ok()?;
        Self::of(&list).ok()
    }

    pub(super) fn includes(self, now: i64) -> bool {
        (self.from..=self.until).contains(&now)
    }

    fn check(self, list: &CertificateRevocationList<'_>, now: i64) -> Result<(), ListsError> {
        let issuer = list.issuer().to_string();
        if now > self.until {
            let until = date(self.until);
            return Err(ListsError::Ended { issuer, until });
        }
        if now < self.from {
            let from = date(self.from);
            return Err(ListsError::NotYetValid { issuer, from });
        }
        Ok(())
    }

    /// The expiry time of the list, for messages.
    pub(super) fn ends(self) -> Timestamp {
        date(self.until)
    }

    pub(in super::super) fn age(self, now: i64) -> Age {
        let last_part = (self.until - self.from) / LAST_PART;
        if now > self.until {
            Age::Over
        } else if now > self.until - last_part {
            Age::Late
        } else {
            Age::Good
        }
    }
}

/// The version of a list: its `crlNumber`, if there is one, and its `thisUpdate`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Version {
    /// The `crlNumber` in big-endian order, without leading zeros; `None` if the list has no
    /// number.
    pub(super) number: Option<Vec<u8>>,
    /// Seconds since 1970.
    pub(super) from: i64,
}

/// The name of a CA, and the SHA-256 of its key. The digest is `None` if the CA's certificate is not configured.
pub(super) type Authority = (Vec<u8>, Option<[u8; 32]>);

/// The CA and the scope of a list. A newer list replaces an older list only if both lists have the same slot.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Slot {
    pub(super) authority: Authority,
    /// SHA-256 of the `issuingDistributionPoint`. A list with this extension covers only some
    /// certificates of its CA (RFC 5280 section 5.2.5). The value is `None` for a list that covers
    /// all certificates, and for an unverified list.
    pub(super) scope: Option<[u8; 32]>,
}

impl Version {
    /// Reads the version of a list without verifying the signature.
    pub(super) fn read(der: &[u8]) -> Option<Self> {
        let (_, list) = CertificateRevocationList::from_der(der).ok()?;
        Some(Self::of(&list))
    }

    fn of(list: &CertificateRevocationList<'_>) -> Self {
        let number = list.crl_number().map(BigUint::to_bytes_be);
        Self {
            number,
            from: list.last_update().timestamp(),
        }
    }

    fn numbers(&self, other: &Self) -> Option<Ordering> {
        let (one, other) = (self.number.as_ref()?, other.number.as_ref()?);
        Some((one.len(), one).cmp(&(other.len(), other)))
    }

    /// Compares two versions by number, then by date.
    pub(super) fn compare(&self, other: &Self) -> Ordering {
        let numbers = self.numbers(other).unwrap_or(Ordering::Equal);
        numbers.then(self.from.cmp(&other.from))
    }

    /// Whether this version is older than the accepted version, by number or by date.
    pub(super) fn goes_back(&self, accepted: &Self) -> bool {
        self.numbers(accepted) == Some(Ordering::Less) || self.from < accepted.from
    }

    pub(super) fn shown(&self) -> String {
        let date = date(self.from);
        match &self.number {
            Some(number) => format!("number 0x{} of {date}", hex::encode(number)),
            None => format!("list of {date}, without a number"),
        }
    }
}

fn date(seconds: i64) -> Timestamp {
    Timestamp::from_micros(seconds.saturating_mul(1_000_000))
}

/// SHA-256 of a CA's name and key.
pub(super) type AuthorityId = [u8; 32];

pub(super) fn id_of((name, key): &Authority) -> AuthorityId {
    let mut context = digest::Context::new(&digest::SHA256);
    context.update(&u64::try_from(name.len()).unwrap_or(0).to_be_bytes());
    context.update(name);
    context.update(key.as_ref().map_or(&[][..], |key| key));
    to_array(context.finish().as_ref())
}

pub(super) fn name_of(raw: &[u8]) -> String {
    match x509_parser::x509::X509Name::from_der(raw) {
        Ok((_, name)) => name.to_string(),
        Err(_) => hex::encode(raw),
    }
}

impl List {
    /// Reads and checks the list in a block of the file. Blocks are numbered from 1.
    pub(super) fn read(
        der: &CertificateRevocationListDer<'static>,
        block: usize,
        authorities: &[X509Certificate<'_>],
        roots: &Arc<RootCertStore>,
        now: i64,
    ) -> Result<(Slot, Self), Problem> {
        let (_, list) = CertificateRevocationList::from_der(der).map_err(|source| Problem {
            name: None,
            error: ListsError::Malformed { block, source },
        })?;
        let of_issuer = |error| Problem {
            name: Some(list.issuer().as_raw().to_vec()),
            error,
        };
        let life = Life::of(&list).map_err(of_issuer)?;
        life.check(&list, now).map_err(of_issuer)?;
        let authority = signer(&list, der, authorities).map_err(of_issuer)?;
        check_for_handshake(&list.issuer().to_string(), der, roots).map_err(of_issuer)?;
        Ok(Self::new(&list, der, life, authority))
    }

    /// Reads a previously accepted list, even if the list has expired; `None` if this CA did not
    /// sign the list.
    pub(super) fn accepted(
        der: &CertificateRevocationListDer<'static>,
        authority: &X509Certificate<'_>,
    ) -> Option<(Slot, Self)> {
        let (_, list) = CertificateRevocationList::from_der(der).ok()?;
        let life = Life::of(&list).ok()?;
        let signer = signer(&list, der, std::slice::from_ref(authority)).ok()?;
        (signer == authority_of(authority)).then(|| Self::new(&list, der, life, signer))
    }

    fn new(
        list: &CertificateRevocationList<'_>,
        der: &CertificateRevocationListDer<'static>,
        life: Life,
        authority: Authority,
    ) -> (Slot, Self) {
        let revoked = revoked(&authority, list);
        let scope = authority.1.and_then(|_| scope(list));
        let slot = Slot { authority, scope };
        let list = Self {
            version: Version::of(list),
            life,
            revoked,
            der: der.clone(),
        };
        (slot, list)
    }
}

fn scope(list: &CertificateRevocationList<'_>) -> Option<[u8; 32]> {
    let mut extensions = list.extensions().iter();
    let point = extensions.find(|one| one.oid == OID_X509_EXT_ISSUER_DISTRIBUTION_POINT)?;
    let digest = digest::digest(&digest::SHA256, point.value);
    Some(to_array(digest.as_ref()))
}

/// Rejects a list that the TLS library does not accept, such as a list with an unknown critical
/// extension. Even one unacceptable list would prevent the creation of the verifier.
pub(super) fn check_for_handshake(
    issuer: &str,
    der: &CertificateRevocationListDer<'static>,
    roots: &Arc<RootCertStore>,
) -> Result<(), ListsError> {
    let provider = Arc::new(default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::clone(roots), provider)
        .with_crls([der.clone()]);
    match verifier.build() {
        Err(source @ VerifierBuilderError::InvalidCrl(_)) => Err(ListsError::Unusable {
            issuer: issuer.to_owned(),
            source,
        }),
        _ => Ok(()),
    }
}

pub(super) fn authority_of(certificate: &X509Certificate<'_>) -> Authority {
    let key = digest::digest(&digest::SHA256, certificate.public_key().raw);
    let name = certificate.subject().as_raw().to_vec();
    (name, Some(to_array(key.as_ref())))
}

/// The CA that signed a list. If the CA is not configured (for example, an intermediate CA), the
/// handshake verifies the list with the CA certificate that the client sends.
fn signer(
    list: &CertificateRevocationList<'_>,
    der: &[u8],
    authorities: &[X509Certificate<'_>],
) -> Result<Authority, ListsError> {
    let issuer = list.issuer();
    let (mut is_named, mut is_supported) = (false, false);
    // Two CAs may have the same name, for example while a CA replaces its key.
    for authority in authorities {
        if authority.subject().as_raw() != issuer.as_raw() {
            continue;
        }
        is_named = true;
        match verifies(list, der, authority) {
            Signature::Good => return Ok(authority_of(authority)),
            Signature::Bad => is_supported = true,
            Signature::Unsupported => {}
        }
    }
    if !is_named {
        return Ok((issuer.as_raw().to_vec(), None));
    }
    let version = Version::of(list).shown();
    let issuer = issuer.to_string();
    Err(if is_supported {
        ListsError::Signature { issuer, version }
    } else {
        ListsError::Algorithm {
            issuer,
            version,
            algorithm: list.signature_algorithm.algorithm.to_string(),
        }
    })
}

/// The result of verifying the signature of a list.
enum Signature {
    Good,
    Bad,
    Unsupported,
}

fn verifies(
    list: &CertificateRevocationList<'_>,
    der: &[u8],
    authority: &X509Certificate<'_>,
) -> Signature {
    let key = authority.public_key();
    let tbs = list.tbs_cert_list.as_ref();
    // CertificateList ::= SEQUENCE { tbsCertList, signatureAlgorithm, signatureValue }; SubjectPublicKeyInfo begins with an
    // AlgorithmIdentifier, too. The parser does not keep the encoded form of the two algorithm identifiers.
    let signed = element(der).and_then(|(list, _)| element(list.get(tbs.len()..)?));
    let keyed = element(key.raw).and_then(|(info, _)| element(info));
    let (Some((signed, _)), Some((keyed, _))) = (signed, keyed) else {
        return Signature::Unsupported;
    };
    let supported = default_provider().signature_verification_algorithms.all;
    let fitting = supported.iter().filter(|algorithm| {
        *algorithm.signature_alg_id() == *signed && *algorithm.public_key_alg_id() == *keyed
    });
    let mut outcome = Signature::Unsupported;
    for algorithm in fitting {
        let (public, signature) = (&key.subject_public_key.data, &list.signature_value.data);
        outcome = Signature::Bad;
        if algorithm.verify_signature(public, tbs, signature).is_ok() {
            return Signature::Good;
        }
    }
    outcome
}

/// The content of the first DER element, and the bytes after it (X.690 section 8.1).
fn element(der: &[u8]) -> Option<(&[u8], &[u8])> {
    const LONG: u8 = 0x80;
    let (length, rest) = (*der.get(1)?, der.get(2..)?);
    if length < LONG {
        return rest.split_at_checked(length.into());
    }
    let (length, rest) = rest.split_at_checked((length - LONG).into())?;
    let length = length.iter().try_fold(0_usize, |length, byte| {
        Some(length.checked_mul(256)? + usize::from(*byte))
    })?;
    rest.split_at_checked(length)
}

fn revoked(authority: &Authority, list: &CertificateRevocationList<'_>) -> [u8; 32] {
    let entries = list.iter_revoked_certificates();
    let serials: BTreeSet<&[u8]> = entries.map(RevokedCertificate::raw_serial).collect();
    let mut context = digest::Context::new(&digest::SHA256);
    context.update(&id_of(authority));
    for serial in serials {
        context.update(&u64::try_from(serial.len()).unwrap_or(0).to_be_bytes());
        context.update(serial);
    }
    to_array(context.finish().as_ref())
}
