//! Authentication: converts a verified credential to a [`Principal`].
//!
//! The TLS handshake verifies a client certificate. This crate then looks up the certificate's SAN
//! URIs and DNS names in the configured principals. Exactly one configured principal must match the
//! certificate. The caller gets the same answer whether no principal matches or several principals
//! match. If a call has an `authorization` header, the broker uses the header and ignores the
//! certificate.
//!
//! Mitigations: M2, M4 of `THREAT_MODEL.md`.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use serde::{Deserialize, Serialize};

use keybroker_core::{
    error::{Error, Reason},
    key::{KeyName, Tenant, UserId},
    principal::{
        Claims, Credential, Grant, Identity, Kind, NAME_BYTES_MAX, Principal, Reach, Role,
    },
};

mod certificate;
pub mod client_secret;
#[doc(hidden)]
pub mod fuzzing;
mod header;
mod http;
pub mod issuer;
mod jwks;
pub mod sign_in;
pub mod spiffe;
pub mod token;

pub use certificate::{CertificateError, PeerCertificate};
pub use jwks::{SetError, SourceError};

use client_secret::Secrets;
use header::Presented;
use token::Tokens;

/// One `[[principal]]` section of the configuration.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// The SAN that identifies this caller, compared bytewise: `URI:spiffe://example.org/app` or `DNS:app.example.org`.
    pub san: String,
    /// The tenant whose records the caller can access.
    #[serde(default)]
    pub tenant: Tenant,
    /// The roles of the caller.
    pub roles: BTreeSet<Role>,
    /// The users whose keys a caller with the role `release` may release.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub users: Option<Reach<UserId>>,
    /// The names of the keys that a caller with the role `release` may release.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key_names: Option<Reach<KeyName>>,
}

impl Settings {
    /// Checks one principal, without a comparison with other principals, and returns the first
    /// problem.
    pub fn problem(&self) -> Option<String> {
        let san = &self.san;
        if !(san.starts_with("URI:") || san.starts_with("DNS:")) || san.len() <= "URI:".len() {
            return Some(format!(
                "principal {san:?}: `san` must be `URI:…` or `DNS:…`, as in the certificate"
            ));
        }
        if san.len() > NAME_BYTES_MAX {
            return Some(format!(
                "a principal's `san` has more than {NAME_BYTES_MAX} bytes"
            ));
        }
        if let Some(uri) = san.strip_prefix("URI:")
            && spiffe::is_claimed(uri)
            && let Err(problem) = spiffe::trust_domain(uri)
        {
            return Some(format!(
                "the `san` of principal {san:?} is not a valid SPIFFE id: {problem}"
            ));
        }
        let problem = self.grant().problem()?;
        Some(format!("principal {san:?}: {problem}"))
    }

    fn grant(&self) -> Grant {
        Grant {
            tenant: self.tenant.clone(),
            roles: self.roles.clone(),
            users: self.users.clone(),
            key_names: self.key_names.clone(),
        }
    }

    fn identity(&self, peer: &PeerCertificate) -> Identity {
        let grant = self.grant();
        Identity {
            name: self.san.clone(),
            credential: Credential::Certificate,
            kind: Kind::Service,
            users: grant.users(),
            key_names: grant.key_names(),
            tenant: grant.tenant,
            roles: grant.roles,
            subject: None,
            mapping: None,
            claims: Claims {
                attributes: BTreeMap::from([("san".to_owned(), peer.sans().clone())]),
                expires: Some(peer.until()),
                ..Claims::default()
            },
        }
    }
}

/// Whether the headers contain the secret of an API client, which is costly to check.
pub fn is_costly(headers: &[&[u8]]) -> bool {
    headers.iter().any(|value| {
        let scheme = value.trim_ascii().get(..header::BASIC.len());
        scheme.is_some_and(|scheme| scheme.eq_ignore_ascii_case(header::BASIC))
    })
}

/// The reason why the configured principals are refused.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// One principal has a problem, which [`Settings::problem`] describes.
    #[error("{0}")]
    Principal(String),
    /// Two principals have the same name.
    #[error("principal {0:?} is configured twice")]
    Twice(String),
}

/// Authenticates callers by their certificates, access tokens and client secrets.
#[derive(Debug)]
pub struct Authenticator {
    /// The principals by SAN.
    certificates: HashMap<String, Settings>,
    tokens: Option<Arc<Tokens>>,
    secrets: Option<Secrets>,
}

impl Authenticator {
    /// Creates an authenticator for certificates. Refuses principals with equal names or conflicting roles.
    pub fn new(principals: &[Settings]) -> Result<Self, SettingsError> {
        let mut certificates = HashMap::new();
        for principal in principals {
            if let Some(problem) = principal.problem() {
                return Err(SettingsError::Principal(problem));
            }
            if certificates
                .insert(principal.san.clone(), principal.clone())
                .is_some()
            {
                return Err(SettingsError::Twice(principal.san.clone()));
            }
        }
        Ok(Self {
            certificates,
            tokens: None,
            secrets: None,
        })
    }

    /// Returns an authenticator that also accepts access tokens.
    #[must_use]
    pub fn with_tokens(self, tokens: Arc<Tokens>) -> Self {
        Self {
            tokens: Some(tokens),
            ..self
        }
    }

    /// Returns an authenticator that also accepts API clients.
    #[must_use]
    pub fn with_secrets(self, secrets: Secrets) -> Self {
        Self {
            secrets: Some(secrets),
            ..self
        }
    }

    /// Returns the one principal that a verified client certificate identifies.
    pub fn certificate(&self, peer: Option<&PeerCertificate>) -> Result<Arc<Principal>, Error> {
        let Some(peer) = peer else {
            return refuse("the call has no client certificate and no `authorization` header");
        };
        // The expiry is checked for each call. A certificate may expire during a long connection,
        // or before a TLS session is resumed without a new verification.
        if peer.remaining().is_zero() {
            return refuse("the client certificate has expired");
        }
        let sans = peer.sans().iter();
        let mut matching = sans.filter_map(|san| self.certificates.get(san));
        if peer.sans().is_empty() {
            return refuse(
                "the client certificate has no subject alternative name of the kind URI or DNS; principals are \
                 identified by these names only",
            );
        }
        let Some(principal) = matching.next() else {
            return refuse(format!(
                "no [[principal]] has a `san` that matches a name in the client certificate: {:?}",
                peer.sans()
            ));
        };
        if matching.next().is_some() {
            return refuse(format!(
                "several [[principal]] entries match the names of the client certificate: {:?}",
                peer.sans()
            ));
        }
        let identity = principal.identity(peer);
        Ok(Arc::new(Principal::authenticated(identity)))
    }

    /// Returns the principal that the `authorization` headers of a call identify. The call must have an `authorization`
    /// header. `budget` is called before a costly check; if `budget` returns an error, this function returns the error.
    pub async fn authenticate<T: Send>(
        &self,
        headers: &[&[u8]],
        budget: impl FnOnce() -> Result<T, Error> + Send,
    ) -> Result<Arc<Principal>, Error> {
        match header::read(headers) {
            Ok(Presented::Bearer(token)) => match &self.tokens {
                Some(tokens) => tokens.verify(token).await,
                None => refuse("the call has an access token, but no [[issuer]] is configured"),
            },
            Ok(Presented::Basic { id, secret }) => match &self.secrets {
                Some(secrets) => secrets.verify(&id, secret, budget).await,
                None => refuse("the call has a client secret, but API clients are not configured"),
            },
            Err(malformed) => refuse(malformed),
        }
    }
}

fn refuse<T>(detail: impl Into<String>) -> Result<T, Error> {
    Err(Error::new(Reason::Credential, detail))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn principal(san: &str, roles: &[Role]) -> Settings {
        Settings {
            san: san.to_owned(),
            tenant: Tenant::default(),
            roles: roles.iter().copied().collect(),
            users: roles.contains(&Role::Release).then_some(Reach::All),
            key_names: None,
        }
    }

    fn certificate(sans: &[&str]) -> PeerCertificate {
        certificate_until(sans, rcgen::date_time_ymd(4096, 1, 1))
    }

    fn certificate_until(sans: &[&str], until: time::OffsetDateTime) -> PeerCertificate {
        use rcgen::{CertificateParams, KeyPair, SanType};
        let mut params = CertificateParams::default();
        // The common name must not identify a principal, even if no SAN contains the common name.
        params
            .distinguished_name
            .push(rcgen::DnType::CommonName, "app.example.org");
        params.subject_alt_names = sans
            .iter()
            .map(|san| match san.split_once(':').unwrap() {
                ("URI", uri) => SanType::URI(uri.try_into().unwrap()),
                (_, name) => SanType::DnsName(name.try_into().unwrap()),
            })
            .collect();
        params.not_after = until;
        let made = params.self_signed(&KeyPair::generate().unwrap()).unwrap();
        PeerCertificate::read(made.der()).unwrap()
    }

    #[test]
    fn an_expired_certificate_has_no_principal() {
        let expired = rcgen::date_time_ymd(2020, 1, 1);
        let certificate = certificate_until(&["URI:spiffe://example.org/app"], expired);
        let refused = known().certificate(Some(&certificate)).unwrap_err();
        assert_eq!(refused.reason(), Reason::Credential);
        assert!(refused.to_string().contains("expired"), "{refused}");
    }

    fn known() -> Authenticator {
        Authenticator::new(&[
            principal("URI:spiffe://example.org/app", &[Role::Release]),
            principal("DNS:app.example.org", &[Role::Enrol]),
        ])
        .unwrap()
    }

    #[test]
    fn a_san_names_its_principal() {
        let peer = certificate(&["URI:spiffe://example.org/app", "DNS:other.example.org"]);
        let principal = known().certificate(Some(&peer)).unwrap();
        assert_eq!(principal.name(), "URI:spiffe://example.org/app");
        assert!(principal.has(Role::Release) && !principal.has(Role::Enrol));
    }

    #[test]
    fn no_several_and_unknown_principals_are_refused_alike() {
        let cases = [
            Some(certificate(&["URI:spiffe://example.org/other"])),
            Some(certificate(&["URI:spiffe://example.org/app2"])),
            Some(certificate(&[])),
            Some(certificate(&[
                "URI:spiffe://example.org/app",
                "DNS:app.example.org",
            ])),
            None,
        ];
        for peer in cases {
            let error = known().certificate(peer.as_ref()).unwrap_err();
            assert_eq!(error.reason(), Reason::Credential, "{peer:?}");
        }
    }

    #[test]
    fn principals_that_conflict_are_refused() {
        for bad in [
            principal("spiffe://x", &[Role::Release]),
            principal("URI:x", &[]),
            principal("URI:x", &[Role::Release, Role::Admin]),
            principal("URI:x", &[Role::Auditor, Role::Release]),
            Settings {
                tenant: Tenant::parse("other").unwrap(),
                ..principal("URI:x", &[Role::Auditor])
            },
            Settings {
                users: None,
                ..principal("URI:x", &[Role::Release])
            },
        ] {
            assert!(Authenticator::new(&[bad]).is_err());
        }
        let twice = [
            principal("URI:x", &[Role::Enrol]),
            principal("URI:x", &[Role::Release]),
        ];
        assert!(
            Authenticator::new(&twice)
                .unwrap_err()
                .to_string()
                .contains("twice")
        );
    }
}
