//! Verifies client certificates with the verifiers of the TLS library, and adds two rules.
//!
//! Several CAs may have the same name and different keys, for example while a CA replaces its key.
//! A verifier of the library uses only the first revocation list for a CA name, and rejects a
//! client if another key signed this list. Therefore, each key of a CA has a separate verifier.
//!
//! The `extendedKeyUsage` of a client certificate must include `clientAuth`. The library itself
//! also accepts certificates without this extension (RFC 5280 section 4.2.1.12).

use std::sync::Arc;

use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, SignatureScheme,
    client::danger::HandshakeSignatureValid,
    server::danger::{ClientCertVerified, ClientCertVerifier},
};
use rustls_pki_types::{CertificateDer, UnixTime};
use x509_parser::prelude::{FromDer as _, X509Certificate};

/// Several verifiers with the same CAs. If CAs have the same name, each verifier has the revocation
/// lists of a different key. A certificate is accepted if at least one verifier accepts the
/// certificate. No verifier accepts a revoked certificate, because each verifier requires a list
/// that the issuer's key signed.
#[derive(Debug)]
pub(super) struct ClientVerifier {
    pub(super) first: Arc<dyn ClientCertVerifier>,
    pub(super) others: Vec<Arc<dyn ClientCertVerifier>>,
    /// Whether a certificate must have the `extendedKeyUsage` `clientAuth`.
    pub(super) usage_required: bool,
}

impl ClientVerifier {
    fn verify(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let mut refused = match self.first.verify_client_cert(leaf, intermediates, now) {
            Err(error) => error,
            verified => return verified,
        };
        for verifier in &self.others {
            match verifier.verify_client_cert(leaf, intermediates, now) {
                // The verifier with the issuer's list returns the most useful error.
                Err(error) if is_of_another_key(&refused) => refused = error,
                Err(_) => {}
                verified => return verified,
            }
        }
        Err(refused)
    }
}

/// Whether the error only shows that another key of a CA with the same name made the signature.
fn is_of_another_key(error: &Error) -> bool {
    matches!(
        error,
        Error::InvalidCertRevocationList(_)
            | Error::InvalidCertificate(CertificateError::BadSignature)
    )
}

fn is_for_clients(leaf: &CertificateDer<'_>) -> bool {
    let Ok((_, certificate)) = X509Certificate::from_der(leaf) else {
        return false;
    };
    let usage = certificate.extended_key_usage();
    usage.is_ok_and(|usage| usage.is_some_and(|usage| usage.value.client_auth))
}

impl ClientCertVerifier for ClientVerifier {
    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self.verify(leaf, intermediates, now)?;
        if self.usage_required && !is_for_clients(leaf) {
            return Err(CertificateError::InvalidPurpose.into());
        }
        Ok(verified)
    }

    fn offer_client_auth(&self) -> bool {
        self.first.offer_client_auth()
    }

    fn client_auth_mandatory(&self) -> bool {
        self.first.client_auth_mandatory()
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.first.root_hint_subjects()
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.first.verify_tls12_signature(message, leaf, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.first.verify_tls13_signature(message, leaf, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.first.supported_verify_schemes()
    }
}
