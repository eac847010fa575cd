//! What a verified client certificate says: its names. The chain was checked in the handshake; here it is only read.

use rustls_pki_types::CertificateDer;
use x509_parser::{extensions::GeneralName, prelude::*};

/// The names of a peer, as `URI:…` and `DNS:…`. The common name is never used: it has no type and no rules.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerCertificate {
    sans: Vec<String>,
}

impl PeerCertificate {
    /// Reads the subject alternative names of a leaf.
    pub fn read(leaf: &CertificateDer<'_>) -> Result<Self, String> {
        let (_, certificate) = X509Certificate::from_der(leaf)
            .map_err(|error| format!("the client certificate does not parse: {error}"))?;
        let names = certificate
            .subject_alternative_name()
            .map_err(|error| format!("the client certificate's SAN does not parse: {error}"))?;
        let sans = names.map_or_else(Vec::new, |names| {
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
        Ok(Self { sans })
    }

    /// The names.
    pub fn sans(&self) -> &[String] {
        &self.sans
    }
}
