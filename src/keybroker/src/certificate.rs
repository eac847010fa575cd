//! Reads the names, the permitted uses and the validity of a certificate, for messages.
//!
//! The TLS library decides whether a peer is accepted; this module has no part in the decision.

use std::net::IpAddr;

use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use x509_parser::{
    extensions::{ExtendedKeyUsage, GeneralName, KeyUsage},
    prelude::{FromDer as _, X509Certificate, X509Error},
};

use keybroker_core::call::Timestamp;

const MICROS_PER_SECOND: i64 = 1_000_000;
const SECONDS_PER_DAY: i64 = 86_400;
/// Maximum time between the first warning and the expiry of a certificate, in days.
const WARN_DAYS_MAX: i64 = 30;
/// The broker warns when a fifth of the validity period remains, but at most `WARN_DAYS_MAX` days
/// before expiry. Automatic renewal usually takes place when a third or a half of the validity
/// period remains.
const WARN_PART: i64 = 5;

/// An error while a certificate is read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The data is not an X.509 certificate.
    #[error("the certificate cannot be parsed")]
    Certificate(#[source] x509_parser::nom::Err<X509Error>),
    /// An extension is malformed or present twice.
    #[error("an extension of the certificate cannot be parsed")]
    Extension(#[source] X509Error),
}

/// The contents of a certificate that messages and checks need.
#[derive(Clone, Debug)]
pub(crate) struct Facts {
    /// Distinguished name of the subject.
    pub(crate) subject: String,
    /// Whether the subject and the issuer are equal.
    pub(crate) is_self_issued: bool,
    /// Whether the certificate is a CA; `None` for X.509 version 1, which has no such field.
    pub(crate) is_authority: Option<bool>,
    /// Subject alternative names that TLS clients compare: DNS names and IP addresses.
    pub(crate) hosts: Vec<String>,
    /// Uses that `keyUsage` and `extendedKeyUsage` permit.
    usages: Vec<Usage>,
    /// The validity period of the certificate.
    pub(crate) life: Life,
}

/// A purpose for which a certificate may be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Usage {
    /// Authentication of a TLS server.
    Server,
    /// Authentication of a TLS client.
    Client,
    /// Signatures in TLS handshakes.
    Handshake,
    /// Signatures of other certificates.
    Issuing,
}

/// The first and the last second of a certificate's validity period, in seconds since 1970.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Life {
    pub(crate) from: i64,
    pub(crate) until: i64,
}

/// Whether a certificate is not valid yet, valid, near its end or expired at a given time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Age {
    /// The certificate is not valid yet.
    Early,
    Good,
    /// The certificate is valid, but expires soon and must be renewed.
    Late,
    /// The certificate has expired.
    Over,
}

impl Life {
    pub(crate) fn of(certificate: &X509Certificate<'_>) -> Self {
        let validity = certificate.validity();
        Self {
            from: validity.not_before.timestamp(),
            until: validity.not_after.timestamp(),
        }
    }

    /// Returns whether the certificate is valid, near its end or expired at the time `at`, which is
    /// in seconds since 1970.
    pub(crate) fn age(self, at: i64) -> Age {
        let length = self.until.saturating_sub(self.from);
        let warned = (length / WARN_PART).min(WARN_DAYS_MAX * SECONDS_PER_DAY);
        if at < self.from {
            Age::Early
        } else if at > self.until {
            Age::Over
        } else if self.until - at < warned {
            Age::Late
        } else {
            Age::Good
        }
    }

    /// The start of the validity period, for messages.
    pub(crate) fn begins(self) -> Timestamp {
        date(self.from)
    }

    /// The end of the validity period, for messages.
    pub(crate) fn ends(self) -> Timestamp {
        date(self.until)
    }
}

/// The current time in seconds since 1970.
pub(crate) fn now() -> i64 {
    Timestamp::now().micros() / MICROS_PER_SECOND
}

fn date(seconds: i64) -> Timestamp {
    Timestamp::from_micros(seconds.saturating_mul(MICROS_PER_SECOND))
}

impl Facts {
    /// Reads a certificate.
    pub(crate) fn read(der: &CertificateDer<'_>) -> Result<Self, Error> {
        let (_, certificate) = X509Certificate::from_der(der).map_err(Error::Certificate)?;
        let constraints = certificate.basic_constraints().map_err(Error::Extension)?;
        let usage = certificate.key_usage().map_err(Error::Extension)?;
        let purposes = certificate.extended_key_usage().map_err(Error::Extension)?;
        let names = certificate
            .subject_alternative_name()
            .map_err(Error::Extension)?;
        let names = names.map_or(&[][..], |names| &names.value.general_names);
        let is_authority = match constraints {
            Some(constraints) => Some(constraints.value.ca),
            // Only X.509 version 3 certificates have extensions.
            None => (certificate.version.0 >= 2).then_some(false),
        };
        let purpose = |is: fn(&ExtendedKeyUsage<'_>) -> bool| {
            purposes
                .as_ref()
                .is_none_or(|purposes| purposes.value.any || is(purposes.value))
        };
        let key = |is: fn(&KeyUsage) -> bool| usage.as_ref().is_none_or(|usage| is(usage.value));
        let usages = [
            (Usage::Server, purpose(|purposes| purposes.server_auth)),
            (Usage::Client, purpose(|purposes| purposes.client_auth)),
            (Usage::Handshake, key(KeyUsage::digital_signature)),
            (Usage::Issuing, key(KeyUsage::key_cert_sign)),
        ];
        Ok(Self {
            subject: certificate.subject().to_string(),
            is_self_issued: certificate.subject().as_raw() == certificate.issuer().as_raw(),
            is_authority,
            hosts: names.iter().filter_map(host).collect(),
            usages: usages
                .into_iter()
                .filter(|(_, is)| *is)
                .map(|(usage, _)| usage)
                .collect(),
            life: Life::of(&certificate),
        })
    }
}

impl Facts {
    /// Whether the certificate permits a use. A certificate without `keyUsage` and
    /// `extendedKeyUsage` permits every use.
    pub(crate) fn allows(&self, usage: Usage) -> bool {
        self.usages.contains(&usage)
    }
}

fn host(name: &GeneralName<'_>) -> Option<String> {
    match name {
        GeneralName::DNSName(name) => Some((*name).to_owned()),
        GeneralName::IPAddress(bytes) => match bytes.len() {
            4 => <[u8; 4]>::try_from(*bytes)
                .ok()
                .map(|bytes| IpAddr::from(bytes).to_string()),
            _ => <[u8; 16]>::try_from(*bytes)
                .ok()
                .map(|bytes| IpAddr::from(bytes).to_string()),
        },
        _ => None,
    }
}

/// Whether a private key belongs to a certificate; `None` if the type of the key is not supported.
pub(crate) fn is_key_of(certificate: &CertificateDer<'_>, key: &PrivateKeyDer<'_>) -> Option<bool> {
    let key = rustls::crypto::aws_lc_rs::sign::any_supported_type(key).ok()?;
    let public = key.public_key()?;
    let (_, certificate) = X509Certificate::from_der(certificate).ok()?;
    Some(certificate.public_key().raw == public.as_ref())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A warning time of thirty days for every certificate would be longer than the validity of a
    /// short-lived certificate.
    #[test]
    fn a_certificate_is_late_by_its_own_lifetime() {
        for (days, late_hours) in [
            (1, 4),
            (7, 33),
            (90, 18 * 24),
            (365, 30 * 24),
            (3_650, 30 * 24),
        ] {
            let life = Life {
                from: 1_000,
                until: 1_000 + days * SECONDS_PER_DAY,
            };
            let before = |hours: i64| life.until - hours * 3_600;
            assert_eq!(life.age(999), Age::Early);
            assert_eq!(life.age(1_000), Age::Good);
            assert_eq!(life.age(before(late_hours + 1)), Age::Good, "{days}");
            assert_eq!(life.age(before(late_hours) + 1), Age::Late, "{days}");
            assert_eq!(life.age(life.until), Age::Late);
            assert_eq!(life.age(life.until + 1), Age::Over);
        }
    }
}
