//! Reads the names of a verified client certificate. The TLS handshake has already verified the
//! certificate chain.

use std::{collections::BTreeSet, time::Duration};

use rustls_pki_types::CertificateDer;
use x509_parser::{error::X509Error, extensions::GeneralName, nom, prelude::*};

use keybroker_core::call::Timestamp;

use super::spiffe;

const MICROS_PER_SECOND: i64 = 1_000_000;

/// The reason why a client certificate does not identify a caller.
#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    /// The certificate does not parse.
    #[error("the client certificate cannot be parsed")]
    Malformed(#[source] nom::Err<X509Error>),
    /// The subject alternative names do not parse, or the extension occurs twice.
    #[error("the client certificate's SAN cannot be parsed")]
    Names(#[source] X509Error),
    /// The certificate has other URIs in addition to its SPIFFE id, which must be the only URI.
    #[error(
        "a client certificate with a SPIFFE id must have no other URI, but this certificate has {0:?}"
    )]
    SeveralUris(Vec<String>),
    /// The SPIFFE id is not valid. The message of the source error completes the sentence.
    #[error("the client certificate's SPIFFE id {id:?} is not valid: {problem}")]
    Id {
        /// The SPIFFE id as it is written in the certificate.
        id: String,
        /// The reason why the SPIFFE id is not valid.
        #[source]
        problem: spiffe::IdError,
    },
    /// The listener does not accept the trust domain of the SPIFFE id.
    #[error(
        "the SPIFFE id of the client certificate is in the trust domain {found:?}, but this listener accepts only {accepted:?}"
    )]
    TrustDomain {
        /// The trust domain of the SPIFFE id.
        found: String,
        /// The trust domains that the listener accepts.
        accepted: BTreeSet<String>,
    },
}

/// The names of a peer, as `URI:…` and `DNS:…`. The common name is never used, because no standard
/// defines its type or format.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerCertificate {
    sans: BTreeSet<String>,
    /// The trust domain of the SPIFFE id, if the certificate has a SPIFFE id.
    trust_domain: Option<String>,
    /// The end of the certificate's validity.
    until: Timestamp,
}

impl PeerCertificate {
    /// Reads the subject alternative names of a leaf certificate.
    pub fn read(leaf: &CertificateDer<'_>) -> Result<Self, CertificateError> {
        let (_, certificate) =
            X509Certificate::from_der(leaf).map_err(CertificateError::Malformed)?;
        let names = certificate
            .subject_alternative_name()
            .map_err(CertificateError::Names)?;
        let names = names.map_or_else(Vec::new, |names| names.value.general_names.clone());
        let trust_domain = trust_domain(&names)?;
        let sans = names
            .iter()
            .filter_map(|name| match name {
                GeneralName::URI(uri) => Some(format!("URI:{uri}")),
                GeneralName::DNSName(name) => Some(format!("DNS:{name}")),
                _ => None,
            })
            .collect();
        let until = certificate.validity().not_after.timestamp();
        Ok(Self {
            sans,
            trust_domain,
            until: Timestamp::from_micros(until.saturating_mul(MICROS_PER_SECOND)),
        })
    }

    /// The names without duplicates.
    pub fn sans(&self) -> &BTreeSet<String> {
        &self.sans
    }

    /// Checks that a listener accepts the trust domain. The check passes if the certificate has no SPIFFE id or if the
    /// listener does not restrict trust domains.
    pub fn check_trust_domain(&self, accepted: &BTreeSet<String>) -> Result<(), CertificateError> {
        match &self.trust_domain {
            Some(domain) if !accepted.is_empty() && !accepted.contains(domain) => {
                Err(CertificateError::TrustDomain {
                    found: domain.clone(),
                    accepted: accepted.clone(),
                })
            }
            _ => Ok(()),
        }
    }

    /// The end of the certificate's validity.
    pub fn until(&self) -> Timestamp {
        self.until
    }

    /// The time until the certificate expires.
    pub fn remaining(&self) -> Duration {
        let micros = self
            .until
            .micros()
            .saturating_sub(Timestamp::now().micros());
        Duration::from_micros(u64::try_from(micros).unwrap_or(0))
    }
}

/// Returns the trust domain of the SPIFFE id, if the certificate has a SPIFFE id. A certificate
/// with a SPIFFE id must have no other URI (X509-SVID section 2). If a certificate had two URIs,
/// two programs could identify the caller by different URIs.
fn trust_domain(names: &[GeneralName<'_>]) -> Result<Option<String>, CertificateError> {
    let uris: Vec<&str> = names
        .iter()
        .filter_map(|name| match name {
            GeneralName::URI(uri) => Some(*uri),
            _ => None,
        })
        .collect();
    if !uris.iter().any(|uri| spiffe::is_claimed(uri)) {
        return Ok(None);
    }
    let [id] = uris[..] else {
        let uris = uris.into_iter().map(str::to_owned).collect();
        return Err(CertificateError::SeveralUris(uris));
    };
    let domain = spiffe::trust_domain(id).map_err(|problem| CertificateError::Id {
        id: id.to_owned(),
        problem,
    })?;
    Ok(Some(domain.to_owned()))
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, KeyPair, SanType};

    use super::*;

    fn with(uris: &[&str]) -> Result<PeerCertificate, CertificateError> {
        let mut params = CertificateParams::default();
        let uris = uris.iter();
        params.subject_alt_names = uris
            .map(|uri| SanType::URI((*uri).try_into().unwrap()))
            .chain([SanType::DnsName("app.example.org".try_into().unwrap())])
            .collect();
        let made = params.self_signed(&KeyPair::generate().unwrap()).unwrap();
        PeerCertificate::read(made.der())
    }

    #[test]
    fn a_spiffe_id_stands_alone() {
        let good = with(&["spiffe://example.org/app"]).unwrap();
        assert_eq!(good.sans().len(), 2);
        assert!(with(&["https://example.org/", "https://example.org/2"]).is_ok());
        for bad in [
            &["spiffe://example.org/app", "https://example.org/"][..],
            &["spiffe://example.org/app", "spiffe://example.org/app"],
            &["spiffe://example.org/app/"],
            &["SPIFFE://example.org/app"],
        ] {
            assert!(with(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_listener_accepts_its_trust_domains() {
        let accepted = |domains: &[&str]| domains.iter().map(ToString::to_string).collect();
        let good = with(&["spiffe://example.org/app"]).unwrap();
        assert!(good.check_trust_domain(&accepted(&[])).is_ok());
        assert!(
            good.check_trust_domain(&accepted(&["example.org", "b"]))
                .is_ok()
        );
        for other in ["example.com", "org", "sub.example.org"] {
            assert!(good.check_trust_domain(&accepted(&[other])).is_err());
        }
        let without = with(&["https://example.org/"]).unwrap();
        assert!(without.check_trust_domain(&accepted(&["b"])).is_ok());
    }
}
