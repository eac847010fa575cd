//! Counts the certificates and lists in the TLS files of a listener.

use std::fmt;

use rustls_pki_types::CertificateDer;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use super::super::TlsSettings;

const OUT_OF_ORDER: &str = "the chain is not in order, and some clients will refuse it";

/// The numbers of certificates and lists in the TLS files of a listener. If a number is lower than
/// expected, certificates or lists are missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Contents {
    /// Number of certificates in the server's chain.
    pub certificates: usize,
    /// Number of CA certificates that verify client certificates.
    pub authorities: usize,
    /// Number of revocation lists in use.
    pub revocation_lists: usize,
    /// Whether each certificate of the chain is followed by the certificate of its issuer. Some
    /// clients do not accept a chain in another order.
    pub is_chain_in_order: bool,
}

impl fmt::Display for Contents {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut separator = "";
        for (number, one, many) in [
            (
                self.certificates,
                "certificate in the chain",
                "certificates in the chain",
            ),
            (self.authorities, "client authority", "client authorities"),
            (self.revocation_lists, "revocation list", "revocation lists"),
        ] {
            if number > 0 {
                let what = if number == 1 { one } else { many };
                write!(f, "{separator}{number} {what}")?;
                separator = ", ";
            }
        }
        if !self.is_chain_in_order {
            write!(
                f,
                "; {OUT_OF_ORDER}: put the server's certificate first, then each issuer after the certificate that it \
                 issued"
            )?;
        }
        Ok(())
    }
}

pub(super) fn log_contents(event: &'static str, settings: &TlsSettings, contents: Contents) {
    tracing::info!(
        certificate = %settings.certificate_file.display(),
        certificates = contents.certificates,
        authorities = contents.authorities,
        revocation_lists = contents.revocation_lists,
        "{event}"
    );
    if !contents.is_chain_in_order {
        tracing::warn!(certificate = %settings.certificate_file.display(), "{OUT_OF_ORDER}");
    }
}

/// Whether each certificate is followed by the certificate of its issuer. Returns false for a chain
/// that cannot be parsed.
pub(super) fn is_in_order(chain: &[CertificateDer<'_>]) -> bool {
    let parsed: Result<Vec<_>, _> = chain
        .iter()
        .map(|certificate| X509Certificate::from_der(certificate))
        .collect();
    parsed.is_ok_and(|parsed| {
        parsed.windows(2).all(|pair| {
            let [(_, certificate), (_, next)] = pair else {
                return true;
            };
            certificate.issuer().as_raw() == next.subject().as_raw()
        })
    })
}
