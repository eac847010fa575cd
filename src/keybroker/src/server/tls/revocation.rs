//! Which client certificates their authorities have taken back (RFC 5280 section 5).
//!
//! A file of lists is taken over when each list is signed by its authority and counts today, when each configured authority has
//! one, and when no list is older than the one in use: going back would accept what was revoked since. A client of whose certificate
//! nothing is known is refused. A list counts until its `nextUpdate`. After that, new connections are refused until there is a newer
//! one; before, there is an alarm.
//!
//! Signatures are verified with the algorithms that the handshake verifies with, so that a list that is taken over works there.
//!
//! Mitigation: M1 of `THREAT_MODEL.md`.

use std::{
    cmp::Ordering,
    collections::{BTreeMap, BTreeSet},
};

use aws_lc_rs::digest;
use rustls::crypto::aws_lc_rs::default_provider;
use rustls_pki_types::{CertificateDer, CertificateRevocationListDer};
use x509_parser::{
    num_bigint::BigUint,
    prelude::{CertificateRevocationList, FromDer as _, X509Certificate},
};

use keybroker_core::{call::Timestamp, pem};

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
    pub(super) versions: Versions,
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

/// How new a list is: its `crlNumber`, if it has one, and its `thisUpdate`.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Version {
    /// Big-endian, without zeros in front.
    number: Option<Vec<u8>>,
    /// Seconds since 1970.
    from: i64,
}

/// The newest version of each authority's lists.
#[derive(Clone, Debug, Default)]
pub(super) struct Versions(BTreeMap<Authority, Version>);

/// Name of an authority, and SHA-256 of its key; without a key where its certificate is not known.
type Authority = (Vec<u8>, Option<[u8; 32]>);

impl Version {
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

    /// By number, and where that does not decide by date.
    fn compare(&self, other: &Self) -> Ordering {
        let numbers = self.numbers(other).unwrap_or(Ordering::Equal);
        numbers.then(self.from.cmp(&other.from))
    }

    /// Whether a list of this version must not take the place of one of that version.
    fn goes_back(&self, in_use: &Self) -> bool {
        self.numbers(in_use) == Some(Ordering::Less) || self.from < in_use.from
    }

    fn shown(&self) -> String {
        let date = Timestamp::from_micros(self.from.saturating_mul(1_000_000));
        match &self.number {
            Some(number) => format!("number 0x{} of {date}", hex::encode(number)),
            None => format!("without a number, of {date}"),
        }
    }
}

impl Versions {
    /// Refuses lists that are older than those of `in_use`.
    pub(super) fn check_follow(&self, in_use: &Self) -> Result<(), String> {
        for (authority, version) in &self.0 {
            if let Some(before) = in_use.0.get(authority)
                && version.goes_back(before)
            {
                return Err(format!(
                    "holds an older list of \"{}\" than the one in use ({}; in use: {}): it would accept what was revoked \
                     since. Fetch the newest list; to go back on purpose, restart the broker",
                    name_of(&authority.0),
                    version.shown(),
                    before.shown()
                ));
            }
        }
        Ok(())
    }
}

fn name_of(raw: &[u8]) -> String {
    match x509_parser::x509::X509Name::from_der(raw) {
        Ok((_, name)) => name.to_string(),
        Err(_) => hex::encode(raw),
    }
}

impl Lists {
    /// From PEM or DER, for the certificates of those authorities.
    pub(super) fn read(bytes: &[u8], authorities: &[CertificateDer<'_>]) -> Result<Self, String> {
        let now = Timestamp::now().micros() / 1_000_000;
        let ders = ders(bytes)?;
        let authorities = authorities
            .iter()
            .map(|authority| X509Certificate::from_der(authority).map(|(_, read)| read))
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| format!("cannot be compared with the CA: {error}"))?;
        let mut parsed = Vec::with_capacity(ders.len());
        let mut versions = Versions::default();
        let mut is_served = vec![false; authorities.len()];
        for der in &ders {
            let (_, list) = CertificateRevocationList::from_der(der)
                .map_err(|error| format!("holds a list that does not parse: {error}"))?;
            let life = life(&list, now)?;
            let version = Version::of(&list);
            let signer = signer(&list, der, &authorities, &mut is_served)?;
            let newest = versions.0.entry(signer).or_insert_with(|| version.clone());
            if version.compare(newest).is_gt() {
                *newest = version.clone();
            }
            parsed.push((list, life, version, der));
        }
        for (authority, is_served) in authorities.iter().zip(is_served) {
            if !is_served {
                return Err(format!(
                    "holds no list of \"{}\" that this CA signed: every client of that authority would be refused",
                    authority.subject()
                ));
            }
        }
        let life = parsed
            .iter()
            .map(|(_, life, ..)| *life)
            .min_by_key(|life| life.until)
            .ok_or("holds no revocation list")?;
        let revoked = revoked(parsed.iter().map(|(list, ..)| list));
        parsed.sort_by(|(.., one, _), (.., other, _)| other.compare(one));
        Ok(Self {
            ders: parsed.into_iter().map(|(.., der)| der.clone()).collect(),
            revoked,
            life,
            versions,
        })
    }
}

/// First byte of a list in DER.
const SEQUENCE: u8 = 0x30;

/// The lists of a PEM file, or the one that the file is in DER.
fn ders(bytes: &[u8]) -> Result<Vec<CertificateRevocationListDer<'static>>, String> {
    if bytes.first() == Some(&SEQUENCE) {
        return match CertificateRevocationList::from_der(bytes) {
            Ok(([], _)) => Ok(vec![bytes.to_vec().into()]),
            Ok(_) => Err(
                "has more bytes after a list in DER; put several lists into one file as PEM"
                    .to_owned(),
            ),
            Err(error) => Err(format!("is neither PEM nor a list in DER: {error}")),
        };
    }
    pem::revocation_lists(bytes).map_err(|error| format!("is unusable: {error}"))
}

/// Who signed a list. A list of an authority that is not configured, such as one below those that are, is verified in the
/// handshake, with the certificate that the client sends.
fn signer(
    list: &CertificateRevocationList<'_>,
    der: &[u8],
    authorities: &[X509Certificate<'_>],
    is_served: &mut [bool],
) -> Result<Authority, String> {
    let issuer = list.issuer();
    let (mut signer, mut is_named, mut is_supported) = (None, false, false);
    // Two authorities may have one name, as while a key is changed over.
    for (authority, is_served) in authorities.iter().zip(is_served) {
        if authority.subject().as_raw() != issuer.as_raw() {
            continue;
        }
        is_named = true;
        match verifies(list, der, authority) {
            Signature::Good => {
                *is_served = true;
                let key = digest::digest(&digest::SHA256, authority.public_key().raw);
                signer = Some(super::to_array(key.as_ref()));
            }
            Signature::Bad => is_supported = true,
            Signature::Unsupported => {}
        }
    }
    let name = issuer.as_raw().to_vec();
    if signer.is_some() || !is_named {
        return Ok((name, signer));
    }
    let version = Version::of(list).shown();
    Err(if is_supported {
        format!(
            "holds a list of \"{issuer}\" ({version}) that is not signed by it: it was changed, or made by another authority of \
             that name"
        )
    } else {
        format!(
            "holds a list of \"{issuer}\" ({version}) whose signature algorithm {} is not supported for the key of that authority: \
             let it sign with RSA (PKCS #1 or PSS), ECDSA (P-256, P-384, P-521) or Ed25519",
            list.signature_algorithm.algorithm
        )
    })
}

/// What a signature of a list is worth.
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
    // AlgorithmIdentifier, too. The parser keeps neither as it stands in the list.
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

/// Content of the first DER element, and what follows it (X.690 section 8.1).
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
