//! A certification authority of its own for each test, with a server and one client for each role.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer, DnType,
    ExtendedKeyUsagePurpose, IsCa, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams,
    SanType, SerialNumber, date_time_ymd,
};
use rustls_pki_types::{CertificateDer, pem::PemObject as _};
use tempfile::TempDir;
use time::{Duration, OffsetDateTime};
use x509_parser::prelude::{FromDer as _, X509Certificate};

use crate::softhsm::write_private;

/// The clients that the configuration of [`crate::site::Site`] knows, with their roles.
pub(crate) const PRINCIPALS: [(&str, &str); 6] = [
    ("releaser", "release"),
    ("other-releaser", "release"),
    ("enroller", "enrol"),
    ("lifecycle", "lifecycle"),
    ("admin", "admin"),
    ("auditor", "auditor"),
];

/// Certificates that are good but name nobody in the configuration.
pub(crate) const UNKNOWN: &str = "unknown";
/// Certificate whose common name is a principal's name and whose SAN is not.
pub(crate) const COMMON_NAME: &str = "common-name";
/// The certificate of `releaser` without an `extendedKeyUsage`.
pub(crate) const NO_USAGE: &str = "no-usage";
/// A releaser's certificate that has expired.
pub(crate) const EXPIRED: &str = "expired";
/// A releaser's certificate that is not valid yet.
pub(crate) const NOT_YET_VALID: &str = "not-yet-valid";
/// A releaser's certificate made by another CA.
pub(crate) const OTHER_CA: &str = "other-ca-client";

type Issuer = CertifiedIssuer<'static, KeyPair>;

/// The URI SAN of a client.
pub(crate) fn uri(client: &str) -> String {
    format!("spiffe://test.example/{client}")
}

/// Certificates and keys as PEM files.
pub(crate) struct Pki {
    folder: TempDir,
    authority: Issuer,
    /// Lists of revoked certificates so far.
    lists: AtomicU64,
}

impl Pki {
    /// A CA, a server for `localhost` and `127.0.0.1`, and every client named above.
    pub(crate) fn fresh() -> Self {
        let folder = tempfile::Builder::new()
            .prefix("keybroker-pki-")
            .tempdir()
            .unwrap();
        let pki = Self {
            folder,
            authority: authority("test CA"),
            lists: AtomicU64::new(0),
        };
        fs::write(pki.ca_file(), pki.authority.pem()).unwrap();
        pki.issue_server();
        for (client, _) in PRINCIPALS {
            pki.write(client, &client_parameters(client), &pki.authority);
        }
        pki.write(UNKNOWN, &client_parameters(UNKNOWN), &pki.authority);
        let mut common_name = client_parameters(UNKNOWN);
        common_name
            .distinguished_name
            .push(DnType::CommonName, uri("releaser"));
        pki.write(COMMON_NAME, &common_name, &pki.authority);
        let mut expired = client_parameters("releaser");
        expired.not_before = date_time_ymd(2020, 1, 1);
        expired.not_after = date_time_ymd(2020, 2, 1);
        pki.write(EXPIRED, &expired, &pki.authority);
        let mut early = client_parameters("releaser");
        early.not_before = date_time_ymd(2090, 1, 1);
        early.not_after = date_time_ymd(2090, 2, 1);
        pki.write(NOT_YET_VALID, &early, &pki.authority);
        let mut no_usage = client_parameters("releaser");
        no_usage.extended_key_usages.clear();
        pki.write(NO_USAGE, &no_usage, &pki.authority);
        let other = authority("another CA");
        fs::write(pki.certificate_file("other-ca"), other.pem()).unwrap();
        pki.write(OTHER_CA, &client_parameters("releaser"), &other);
        pki
    }

    /// Writes a new server certificate and key over the old ones.
    pub(crate) fn issue_server(&self) {
        self.write("server", &server_parameters(), &self.authority);
    }

    /// Writes a server certificate with other properties over the good one.
    pub(crate) fn issue_server_with(&self, edit: impl FnOnce(&mut CertificateParams)) {
        let mut parameters = server_parameters();
        edit(&mut parameters);
        self.write("server", &parameters, &self.authority);
    }

    /// Writes a client certificate with other properties under a name.
    pub(crate) fn issue_client_with(&self, name: &str, edit: impl FnOnce(&mut CertificateParams)) {
        let mut parameters = client_parameters(name);
        edit(&mut parameters);
        self.write(name, &parameters, &self.authority);
    }

    /// Writes a server certificate that has expired over the good one.
    pub(crate) fn issue_expired_server(&self) {
        let mut parameters = server_parameters();
        parameters.not_before = date_time_ymd(2020, 1, 1);
        parameters.not_after = date_time_ymd(2020, 2, 1);
        self.write("server", &parameters, &self.authority);
    }

    /// Writes the CA's next list of revoked certificates: those clients', and no other. It ends so many seconds from now.
    pub(crate) fn revoke(&self, clients: &[&str], ends_in_s: i64) {
        let now = OffsetDateTime::now_utc();
        let revoked = clients.iter().map(|client| RevokedCertParams {
            serial_number: serial(&self.certificate_file(client)),
            revocation_time: now,
            reason_code: None,
            invalidity_date: None,
        });
        let list = CertificateRevocationListParams {
            this_update: now - Duration::days(1),
            next_update: now + Duration::seconds(ends_in_s),
            crl_number: SerialNumber::from(1 + self.lists.fetch_add(1, Ordering::Relaxed)),
            issuing_distribution_point: None,
            revoked_certs: revoked.collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        let pem = list.signed_by(&self.authority).unwrap().pem().unwrap();
        replace(&self.crl_file(), &pem);
    }

    /// The CA's list of revoked certificates.
    pub(crate) fn crl_file(&self) -> PathBuf {
        self.folder.path().join("revoked.pem")
    }

    /// The CA that servers and clients trust.
    pub(crate) fn ca_file(&self) -> PathBuf {
        self.folder.path().join("ca.pem")
    }

    /// Certificate of the server or of a client.
    pub(crate) fn certificate_file(&self, name: &str) -> PathBuf {
        self.folder.path().join(format!("{name}.pem"))
    }

    /// Private key of the server or of a client.
    pub(crate) fn key_file(&self, name: &str) -> PathBuf {
        self.folder.path().join(format!("{name}.key"))
    }

    fn write(&self, name: &str, parameters: &CertificateParams, issuer: &Issuer) {
        let key = KeyPair::generate().unwrap();
        let certificate = parameters.signed_by(&key, issuer).unwrap();
        replace(&self.key_file(name), &key.serialize_pem());
        replace(&self.certificate_file(name), &certificate.pem());
    }
}

/// By rename, so that a reader never sees half a file.
fn replace(path: &Path, text: &str) {
    let fresh = path.with_extension("new");
    write_private(&fresh, text);
    fs::rename(fresh, path).unwrap();
}

fn serial(path: &Path) -> SerialNumber {
    let der = CertificateDer::from_pem_file(path).unwrap();
    let (_, certificate) = X509Certificate::from_der(&der).unwrap();
    SerialNumber::from_slice(certificate.raw_serial())
}

fn authority(name: &str) -> Issuer {
    let mut parameters = CertificateParams::new(Vec::new()).unwrap();
    parameters.distinguished_name.push(DnType::CommonName, name);
    parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    parameters.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    CertifiedIssuer::self_signed(parameters, KeyPair::generate().unwrap()).unwrap()
}

fn server_parameters() -> CertificateParams {
    let names = vec!["localhost".to_owned(), "127.0.0.1".to_owned()];
    let mut parameters = CertificateParams::new(names).unwrap();
    parameters.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    parameters
}

fn client_parameters(client: &str) -> CertificateParams {
    let mut parameters = CertificateParams::new(Vec::new()).unwrap();
    parameters.subject_alt_names = vec![SanType::URI(uri(client).try_into().unwrap())];
    parameters.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    parameters
}
