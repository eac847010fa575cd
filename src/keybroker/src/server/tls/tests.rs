//! Tests changes of a listener's files, and revocation lists that must be rejected.

use std::{fs, path::PathBuf};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer,
    CrlDistributionPoint, CrlIssuingDistributionPoint, DnType, IsCa, KeyPair, KeyUsagePurpose,
    RevokedCertParams, SerialNumber,
};
use rustls_pki_types::pem::PemObject as _;
use time::{Duration, OffsetDateTime};

use aws_lc_rs::digest;
use rustls_pki_types::CertificateDer;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use super::{
    measure::SECONDS_PER_HOUR,
    revocation::{LISTS_BYTES_MAX, ListsFile},
    *,
};

mod files;
mod lists;
mod memory;
mod reload;

type Authority = CertifiedIssuer<'static, KeyPair>;

fn authority(name: &str, algorithm: &'static rcgen::SignatureAlgorithm) -> Authority {
    let mut parameters = CertificateParams::new(Vec::new()).unwrap();
    parameters.distinguished_name.push(DnType::CommonName, name);
    parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    parameters.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let key = KeyPair::generate_for(algorithm).unwrap();
    CertifiedIssuer::self_signed(parameters, key).unwrap()
}

/// A list of an authority in PEM. `from` and `until` are the start and the end of its validity, in
/// hours from now.
fn list(authority: &Authority, revoked: &[u64], from: i64, until: i64) -> String {
    numbered(authority, 1, revoked, from, until)
}

/// A list like that of [`list`], with the given `crlNumber`.
fn numbered(authority: &Authority, number: u64, revoked: &[u64], from: i64, until: i64) -> String {
    signed(authority, None, number, revoked, from, until)
}

/// A list for the certificates with the given distribution point, or for all certificates.
fn signed(
    authority: &Authority,
    point: Option<&str>,
    number: u64,
    revoked: &[u64],
    from: i64,
    until: i64,
) -> String {
    let now = OffsetDateTime::now_utc();
    let revoked_certs = revoked.iter().map(|serial| RevokedCertParams {
        serial_number: SerialNumber::from(*serial),
        revocation_time: now - Duration::days(9),
        reason_code: None,
        invalidity_date: None,
    });
    let point = point.map(|point| CrlIssuingDistributionPoint {
        distribution_point: CrlDistributionPoint {
            uris: vec![point.to_owned()],
        },
        scope: None,
    });
    let parameters = CertificateRevocationListParams {
        this_update: now + Duration::hours(from),
        next_update: now + Duration::hours(until),
        crl_number: SerialNumber::from(number),
        issuing_distribution_point: point,
        revoked_certs: revoked_certs.collect(),
        key_identifier_method: rcgen::KeyIdMethod::Sha256,
    };
    parameters.signed_by(authority).unwrap().pem().unwrap()
}

fn read(pem: &str, authorities: &[&Authority]) -> Result<Lists, String> {
    let ders: Vec<CertificateDer<'static>> = authorities
        .iter()
        .map(|authority| authority.der().clone())
        .collect();
    follow(pem.as_bytes(), &ders, &Memory::default(), None, now())
}

/// The lists that a listener would use from a file at the given time.
fn follow(
    bytes: &[u8],
    authorities: &[CertificateDer<'_>],
    memory: &Memory,
    in_use: Option<&Lists>,
    now: i64,
) -> Result<Lists, String> {
    Lists::read(&ListsFile::Content(bytes.to_vec()), authorities, now)
        .and_then(|lists| lists.follow(memory, in_use, now))
        .map_err(|error| chain(&error))
}

/// The last report about lists that a reload did not use.
fn left_out(tls: &Tls) -> Option<String> {
    tls.left_out.lock().unwrap().clone()
}

/// The files of a listener in a separate directory.
struct Site {
    folder: tempfile::TempDir,
    ca: Authority,
}

impl Site {
    fn fresh() -> Self {
        rustls::crypto::aws_lc_rs::default_provider()
            .install_default()
            .ok();
        let site = Self {
            folder: tempfile::tempdir().unwrap(),
            ca: authority("CA", &rcgen::PKCS_ECDSA_P256_SHA256),
        };
        site.write("ca", &site.ca.pem());
        site.renew_server();
        site
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        use std::os::unix::fs::PermissionsExt as _;
        fs::write(self.path(name), text).unwrap();
        fs::set_permissions(self.path(name), fs::Permissions::from_mode(0o600)).unwrap();
    }

    fn renew_server(&self) {
        let key = KeyPair::generate().unwrap();
        let parameters = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        self.write("server", &parameters.self_signed(&key).unwrap().pem());
        self.write("key", &key.serialize_pem());
    }

    /// Whether the listener would accept a client certificate of the given CA with the given serial
    /// number.
    fn verifies(tls: &Tls, ca: &Authority, serial: u64) -> bool {
        match Self::verify(tls, ca, serial, &[]) {
            Ok(()) => true,
            Err(rustls::Error::InvalidCertificate(rustls::CertificateError::Revoked)) => false,
            Err(error) => panic!("{error}"),
        }
    }

    /// Verifies a client certificate. `intermediates` are the intermediate certificates that the
    /// client sends.
    fn verify(
        tls: &Tls,
        ca: &Authority,
        serial: u64,
        intermediates: &[CertificateDer<'_>],
    ) -> Result<(), rustls::Error> {
        let key = KeyPair::generate().unwrap();
        let mut parameters = CertificateParams::new(Vec::new()).unwrap();
        parameters.serial_number = Some(SerialNumber::from(serial));
        parameters.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ClientAuth];
        let leaf = parameters.signed_by(&key, ca).unwrap();
        let current = tls.current();
        let files = Files::read(&tls.settings, tls.clients).unwrap();
        let verifier = files.verifier(&tls.settings, tls.clients, current.lists.as_ref());
        let verifier = verifier.unwrap().unwrap();
        let now = rustls_pki_types::UnixTime::now();
        let verified = verifier.verify_client_cert(leaf.der(), intermediates, now);
        verified.map(drop)
    }

    fn load(&self) -> Tls {
        self.try_load().unwrap()
    }

    fn try_load(&self) -> Result<Tls, String> {
        self.try_load_with(None)
    }

    fn try_load_with(&self, state: Option<&StateDirectory>) -> Result<Tls, String> {
        self.try_load_of("ca", state)
    }

    /// Loads a listener with other authorities but otherwise the same files.
    fn try_load_of(&self, ca: &str, state: Option<&StateDirectory>) -> Result<Tls, String> {
        let issuers = self.path("issuers");
        let settings = TlsSettings {
            certificate_file: self.path("server"),
            key_file: self.path("key"),
            client_ca_file: Some(self.path(ca)),
            client_crl_file: Some(self.path("crl")),
            client_crl_issuers_file: issuers.exists().then_some(issuers),
            client_auth_usage_required: true,
            trust_domains: BTreeSet::new(),
        };
        Tls::load(
            settings,
            ClientCertificates::Required,
            vec![b"h2".to_vec()],
            state,
        )
        .map_err(|error| chain(&error))
    }
}

/// The files of accepted lists in the state directory.
fn stored(state: &StateDirectory) -> Vec<PathBuf> {
    let entries = fs::read_dir(state.path()).unwrap();
    entries.map(|entry| entry.unwrap().path()).collect()
}
