//! How much each file of a listener gave.

use std::fmt;

use rustls_pki_types::CertificateDer;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use super::super::TlsSettings;

const OUT_OF_ORDER: &str = "the chain is not in order, and some clients will refuse it";

/// How much each file of a listener gave: a number that is too small is how an operator sees that something is missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Contents {
    /// Certificates of the chain.
    pub certificates: usize,
    /// Authorities of client certificates.
    pub authorities: usize,
    /// Revocation lists.
    pub revocation_lists: usize,
    /// Whether each certificate of the chain is followed by its issuer. Some clients refuse a chain that is not.
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
                "; {OUT_OF_ORDER}: write the server's certificate first and after each certificate its issuer"
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

/// Whether each certificate names the next one as its issuer. What does not parse is not in order.
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
