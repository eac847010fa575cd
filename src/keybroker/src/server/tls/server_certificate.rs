//! Checks the dates of the server's certificate, and finds the certificate that belongs to the
//! private key.

use std::path::Path;

use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use x509_parser::prelude::{FromDer as _, X509Certificate};

use keybroker_core::call::Timestamp;

use crate::certificate::{Age, Life};

use super::{
    error::{Error, shown},
    measure::note_expiry,
    now,
};

/// Whether the dates of the server's certificate are checked.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Validity {
    Checked,
    /// The dates are not checked, because the certificate is already in use.
    Unchecked,
}

/// The position of the certificate that belongs to the key. Positions in the chain start at 1.
pub(super) fn key_place(chain: &[CertificateDer<'_>], key: &PrivateKeyDer<'_>) -> Option<usize> {
    let key = rustls::crypto::aws_lc_rs::sign::any_supported_type(key).ok()?;
    let public = key.public_key()?;
    let position = chain.iter().position(|certificate| {
        X509Certificate::from_der(certificate)
            .is_ok_and(|(_, certificate)| certificate.public_key().raw == public.as_ref())
    });
    position.map(|position| position + 1)
}

pub(super) fn life_of(leaf: &CertificateDer<'_>, path: &Path) -> Result<Life, Error> {
    let (_, certificate) =
        X509Certificate::from_der(leaf).map_err(|source| Error::certificate(path, source))?;
    Ok(Life {
        from: certificate.validity().not_before.timestamp(),
        until: certificate.validity().not_after.timestamp(),
    })
}

/// Rejects a certificate that has expired or is not valid yet, and logs a warning about a
/// certificate that expires soon.
pub(super) fn check_validity(leaf: &CertificateDer<'_>, path: &Path) -> Result<i64, Error> {
    let life = life_of(leaf, path)?;
    let Life { from, until } = life;
    let now = now();
    let date = |seconds: i64| Timestamp::from_micros(seconds.saturating_mul(1_000_000));
    if now > until {
        return Err(Error::Expired {
            path: shown(path),
            until: date(until),
        });
    }
    if now < from {
        return Err(Error::NotYetValid {
            path: shown(path),
            from: date(from),
        });
    }
    note_expiry(until, path);
    if life.age(now) == Age::Late {
        tracing::warn!(
            certificate = %path.display(), until = %life.ends(),
            "the certificate expires soon; renew the certificate"
        );
    }
    Ok(until)
}
