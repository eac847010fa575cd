//! What a verified client certificate says: its names. The chain was checked in the handshake; here it is only read.

use std::{collections::BTreeSet, time::Duration};

use rustls_pki_types::CertificateDer;
use x509_parser::{extensions::GeneralName, prelude::*};

use crate::call::Timestamp;

const MICROS_PER_SECOND: i64 = 1_000_000;

/// The names of a peer, as `URI:…` and `DNS:…`. The common name is never used: it has no type and no rules.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerCertificate {
    sans: BTreeSet<String>,
    /// Last moment of its validity.
    until: Timestamp,
}

impl PeerCertificate {
    /// Reads the subject alternative names of a leaf.
    pub fn read(leaf: &CertificateDer<'_>) -> Result<Self, String> {
        let (_, certificate) = X509Certificate::from_der(leaf)
            .map_err(|error| format!("the client certificate does not parse: {error}"))?;
        let names = certificate
            .subject_alternative_name()
            .map_err(|error| format!("the client certificate's SAN does not parse: {error}"))?;
        let sans = names.map_or_else(BTreeSet::new, |names| {
            names
                .value
                .general_names
                .iter()
                .filter_map(|name| match name {
                    GeneralName::URI(uri) => Some(format!("URI:{uri}")),
                    GeneralName::DNSName(name) => Some(format!("DNS:{name}")),
                    _ => None,
                })
                .collect()
        });
        let until = certificate.validity().not_after.timestamp();
        Ok(Self {
            sans,
            until: Timestamp::from_micros(until.saturating_mul(MICROS_PER_SECOND)),
        })
    }

    /// The names, each once.
    pub fn sans(&self) -> &BTreeSet<String> {
        &self.sans
    }

    /// Last moment of its validity.
    pub fn until(&self) -> Timestamp {
        self.until
    }

    /// How long it is valid from now.
    pub fn remaining(&self) -> Duration {
        let micros = self
            .until
            .micros()
            .saturating_sub(Timestamp::now().micros());
        Duration::from_micros(u64::try_from(micros).unwrap_or(0))
    }
}
