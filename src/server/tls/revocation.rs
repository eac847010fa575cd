//! Which client certificates their authorities have taken back (RFC 5280 section 5).
//!
//! A file of lists is taken over when each list is signed by its authority and counts today, and when each configured
//! authority has one: a client of whose certificate nothing is known is refused. A list counts until its `nextUpdate`. After
//! that it says nothing of anybody, so new connections are refused until there is a newer one; before, there is an alarm.
//!
//! Mitigation: M1 of `THREAT_MODEL.md`.

use std::collections::BTreeSet;

use aws_lc_rs::{
    digest,
    signature::{self, UnparsedPublicKey, VerificationAlgorithm},
};
use rustls_pki_types::{CertificateDer, CertificateRevocationListDer};
use x509_parser::{
    oid_registry::{
        OID_EC_P256, OID_NIST_EC_P384, OID_PKCS1_SHA256WITHRSA, OID_PKCS1_SHA384WITHRSA,
        OID_PKCS1_SHA512WITHRSA, OID_SIG_ECDSA_WITH_SHA256, OID_SIG_ECDSA_WITH_SHA384,
        OID_SIG_ED25519,
    },
    prelude::{CertificateRevocationList, FromDer as _, X509Certificate},
    x509::SubjectPublicKeyInfo,
};

use crate::{call::Timestamp, pem};

/// Part of a list's life at whose beginning somebody should ask why there is no newer one.
const LAST_PART: i64 = 4;

/// The lists of one file.
#[derive(Debug)]
pub(super) struct Lists {
    /// The newest first: of two lists of one authority the verifier looks at the first.
    pub(super) ders: Vec<CertificateRevocationListDer<'static>>,
    /// SHA-256 of who is revoked; a list that is only made anew changes nothing.
    pub(super) revoked: [u8; 32],
    pub(super) life: Life,
}

/// When the first of several lists ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Life {
    /// Seconds since 1970.
    from: i64,
    pub(super) until: i64,
}

/// What is to be said of a list's age.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Age {
    Good,
    /// It should have been replaced by now.
    Late,
    /// It counts no more.
    Over,
}

impl Life {
    pub(super) fn age(self, now: i64) -> Age {
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

impl Lists {
    /// From PEM, for the certificates of those authorities.
    pub(super) fn read(pem: &[u8], authorities: &[CertificateDer<'_>]) -> Result<Self, String> {
        let now = Timestamp::now().micros() / 1_000_000;
        let ders = pem::revocation_lists(pem).map_err(|error| format!("is unusable: {error}"))?;
        let mut parsed = Vec::with_capacity(ders.len());
        for der in &ders {
            let (_, list) = CertificateRevocationList::from_der(der)
                .map_err(|error| format!("holds a list that does not parse: {error}"))?;
            let life = life(&list, now)?;
            parsed.push((list, life, der));
        }
        for authority in authorities {
            check_authority(authority, parsed.iter().map(|(list, ..)| list))?;
        }
        let life = parsed
            .iter()
            .map(|(_, life, _)| *life)
            .min_by_key(|life| life.until)
            .ok_or("holds no revocation list")?;
        let revoked = revoked(parsed.iter().map(|(list, ..)| list));
        parsed.sort_by_key(|(_, life, _)| std::cmp::Reverse(life.from));
        Ok(Self {
            ders: parsed.into_iter().map(|(.., der)| der.clone()).collect(),
            revoked,
            life,
        })
    }
}

fn life(list: &CertificateRevocationList<'_>, now: i64) -> Result<Life, String> {
    let issuer = list.issuer();
    let date = |seconds: i64| Timestamp::from_micros(seconds.saturating_mul(1_000_000));
    let Some(next) = list.next_update() else {
        return Err(format!(
            "holds a list of \"{issuer}\" without `nextUpdate`: it would count for ever"
        ));
    };
    let (from, until) = (list.last_update().timestamp(), next.timestamp());
    if now > until {
        return Err(format!(
            "holds a list of \"{issuer}\" that ended on {}: fetch the newest one from that authority",
            date(until)
        ));
    }
    if now < from {
        return Err(format!(
            "holds a list of \"{issuer}\" that is not valid before {}; look at the clock of this machine",
            date(from)
        ));
    }
    Ok(Life { from, until })
}

/// There is a list of the authority, and what is called so is signed by it.
fn check_authority<'a>(
    authority: &CertificateDer<'_>,
    lists: impl Iterator<Item = &'a CertificateRevocationList<'a>>,
) -> Result<(), String> {
    let (_, authority) = X509Certificate::from_der(authority)
        .map_err(|error| format!("cannot be compared with the CA: {error}"))?;
    let subject = authority.subject();
    let mut named = lists
        .filter(|list| list.issuer().as_raw() == subject.as_raw())
        .peekable();
    if named.peek().is_none() {
        return Err(format!(
            "holds no list of \"{subject}\": every client of that authority would be refused"
        ));
    }
    // Two authorities may have one name, as while a key is changed over: a list of either is good.
    let is_signed = named.any(|list| verifies(list, authority.public_key()));
    if !is_signed {
        return Err(format!(
            "holds a list of \"{subject}\" that is not signed by it: it was changed, or made by another authority of that name"
        ));
    }
    Ok(())
}

fn verifies(list: &CertificateRevocationList<'_>, key: &SubjectPublicKeyInfo<'_>) -> bool {
    let curve = key.algorithm.parameters.as_ref();
    let curve = curve.and_then(|any| any.as_oid().ok());
    let is_p256 = curve.as_ref().is_some_and(|oid| *oid == OID_EC_P256);
    let is_p384 = curve.as_ref().is_some_and(|oid| *oid == OID_NIST_EC_P384);
    let algorithm = &list.signature_algorithm.algorithm;
    let verifier: &'static dyn VerificationAlgorithm = if *algorithm == OID_PKCS1_SHA256WITHRSA {
        &signature::RSA_PKCS1_2048_8192_SHA256
    } else if *algorithm == OID_PKCS1_SHA384WITHRSA {
        &signature::RSA_PKCS1_2048_8192_SHA384
    } else if *algorithm == OID_PKCS1_SHA512WITHRSA {
        &signature::RSA_PKCS1_2048_8192_SHA512
    } else if *algorithm == OID_SIG_ECDSA_WITH_SHA256 && is_p256 {
        &signature::ECDSA_P256_SHA256_ASN1
    } else if *algorithm == OID_SIG_ECDSA_WITH_SHA256 && is_p384 {
        &signature::ECDSA_P384_SHA256_ASN1
    } else if *algorithm == OID_SIG_ECDSA_WITH_SHA384 && is_p256 {
        &signature::ECDSA_P256_SHA384_ASN1
    } else if *algorithm == OID_SIG_ECDSA_WITH_SHA384 && is_p384 {
        &signature::ECDSA_P384_SHA384_ASN1
    } else if *algorithm == OID_SIG_ED25519 {
        &signature::ED25519
    } else {
        return false;
    };
    UnparsedPublicKey::new(verifier, &key.subject_public_key.data)
        .verify(list.tbs_cert_list.as_ref(), &list.signature_value.data)
        .is_ok()
}

fn revoked<'a>(lists: impl Iterator<Item = &'a CertificateRevocationList<'a>>) -> [u8; 32] {
    let mut entries = BTreeSet::new();
    for list in lists {
        for entry in list.iter_revoked_certificates() {
            entries.insert((list.issuer().as_raw(), entry.raw_serial()));
        }
    }
    let mut context = digest::Context::new(&digest::SHA256);
    for (issuer, serial) in entries {
        for part in [issuer, serial] {
            context.update(&u64::try_from(part.len()).unwrap_or(0).to_be_bytes());
            context.update(part);
        }
    }
    super::to_array(context.finish().as_ref())
}
