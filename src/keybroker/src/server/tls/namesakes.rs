//! Client certificates of authorities that have one name and different keys, as while a key is replaced. The library that verifies
//! chains uses only the first revocation list of a name, and refuses a client when another key signed it.

use std::sync::Arc;

use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, SignatureScheme,
    client::danger::HandshakeSignatureValid,
    server::danger::{ClientCertVerified, ClientCertVerifier},
};
use rustls_pki_types::{CertificateDer, UnixTime};

/// Verifiers with the same authorities and each with the lists of other namesakes. A certificate that one accepts is accepted: each
/// verifier requires a list that the issuer's key signed, so none can accept what that issuer has revoked.
#[derive(Debug)]
pub(super) struct Namesakes {
    first: Arc<dyn ClientCertVerifier>,
    others: Vec<Arc<dyn ClientCertVerifier>>,
}

impl Namesakes {
    /// One verifier for all of them.
    pub(super) fn over(
        first: Arc<dyn ClientCertVerifier>,
        others: Vec<Arc<dyn ClientCertVerifier>>,
    ) -> Arc<dyn ClientCertVerifier> {
        if others.is_empty() {
            return first;
        }
        Arc::new(Self { first, others })
    }
}

/// Whether an error only says that a signature was made with another key, such as that of a namesake.
fn is_of_another_key(error: &Error) -> bool {
    matches!(
        error,
        Error::InvalidCertRevocationList(_)
            | Error::InvalidCertificate(CertificateError::BadSignature)
    )
}

impl ClientCertVerifier for Namesakes {
    fn offer_client_auth(&self) -> bool {
        self.first.offer_client_auth()
    }

    fn client_auth_mandatory(&self) -> bool {
        self.first.client_auth_mandatory()
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.first.root_hint_subjects()
    }

    fn verify_client_cert(
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
                // The error of the verifier that has the issuer's list says why.
                Err(error) if is_of_another_key(&refused) => refused = error,
                Err(_) => {}
                verified => return verified,
            }
        }
        Err(refused)
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
