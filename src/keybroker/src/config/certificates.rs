//! Checks the configured certificates: whether clients will accept the server's certificate, and
//! whether CA certificates may issue other certificates. The TLS setup itself reports files that
//! cannot be parsed, and private keys that do not belong to their certificates.

use std::path::Path;

use keybroker_core::{
    error::chain,
    pem,
    trusted_file::{self, Purpose},
};

use crate::{
    certificate::{self, Age, Facts, Usage},
    server::{ClientCertificates, ListenerSettings},
};

use super::FileReport;

/// Maximum length of a certificate chain or of a file with CA certificates, in bytes.
const PEM_BYTES_MAX: u64 = 4 * 1024 * 1024;
const CHAIN: Purpose =
    Purpose::trust("other users could replace the certificate that clients receive");
const AUTHORITIES: Purpose = Purpose::trust("other users could add a CA and impersonate any peer");

/// Examines the certificates of a listener.
pub(super) fn examine(listener: &ListenerSettings, report: &mut FileReport) {
    let Some(tls) = &listener.tls else { return };
    let address = listener.address;
    let setting = format!("[[listener]] {address}: `certificate_file`");
    let path = &tls.certificate_file;
    match read(path, CHAIN).as_deref().and_then(server_behind_issuer) {
        Some(number) => report.problems.push(format!(
            "{setting} {}: the chain begins with a CA certificate, and the server's certificate is number {number}; \
             put the server's certificate first, then each issuer after the certificate that it issued",
            path.display()
        )),
        None => examine_file(&setting, path, CHAIN, check_chain, report),
    }
    if listener.client_certificates != ClientCertificates::None
        && let Some(path) = &tls.client_ca_file
    {
        let setting = format!("[[listener]] {address}: `client_ca_file`");
        examine_authorities(&setting, path, report);
    }
}

/// Examines the certificates in a file of CA certificates.
pub(super) fn examine_authorities(setting: &str, path: &Path, report: &mut FileReport) {
    examine_file(setting, path, AUTHORITIES, check_authority, report);
}

/// Runs a check on each certificate in a file. Ignores unreadable files, because the TLS setup
/// reports them.
fn examine_file(
    setting: &str,
    path: &Path,
    purpose: Purpose,
    check: Check,
    report: &mut FileReport,
) {
    let Some(certificates) = read(path, purpose) else {
        return;
    };
    let count = certificates.len();
    for (number, facts) in (1..).zip(certificates) {
        let shown = path.display();
        let which = if count == 1 {
            String::new()
        } else {
            format!(", certificate {number} of {count}")
        };
        let place = |what: String| format!("{setting} {shown}{which}: {what}");
        match facts {
            Ok(facts) => {
                let mut found = Found::default();
                check(&facts, number, &mut found);
                report
                    .problems
                    .extend(found.problems.into_iter().map(place));
                report.notes.extend(found.notes.into_iter().map(place));
            }
            Err(error) => report.problems.push(place(chain(&error))),
        }
    }
}

/// The position of the server's certificate in a chain that wrongly begins with the issuer's
/// certificate. Some programs write the issuer's certificate before the server's certificate.
fn server_behind_issuer(certificates: &[Result<Facts, certificate::Error>]) -> Option<usize> {
    let is_authority = |facts: &Result<Facts, _>| {
        facts
            .as_ref()
            .is_ok_and(|facts| facts.is_authority == Some(true))
    };
    let is_server = |facts: &Result<Facts, _>| {
        facts
            .as_ref()
            .is_ok_and(|facts| facts.is_authority != Some(true) && !facts.hosts.is_empty())
    };
    let first = certificates.first().filter(|first| is_authority(first));
    let behind = certificates.iter().position(is_server)?;
    first.map(|_| behind + 1)
}

#[derive(Default)]
struct Found {
    problems: Vec<String>,
    notes: Vec<String>,
}

/// A check of one certificate. The second argument is the position of the certificate in the file,
/// starting at 1.
type Check = fn(&Facts, usize, &mut Found);

fn read(path: &Path, purpose: Purpose) -> Option<Vec<Result<Facts, certificate::Error>>> {
    let bytes = trusted_file::read(path, PEM_BYTES_MAX, purpose).ok()?;
    let chain = pem::chain(&bytes).ok()?;
    Some(chain.iter().map(Facts::read).collect())
}

fn check_chain(facts: &Facts, number: usize, found: &mut Found) {
    if number > 1 {
        check_issuer(facts, found);
        if facts.life.age(certificate::now()) == Age::Over {
            let what = format!(
                "this issuer certificate expired on {}, so clients refuse the chain; renew the issuer certificate",
                facts.life.ends()
            );
            found.problems.push(what);
        }
        return;
    }
    if facts.hosts.is_empty() {
        found.problems.push(format!(
            "{:?} has no DNS name and no IP address among its subject alternative names, and clients ignore the common \
             name; issue a certificate with the names that clients use, such as `subjectAltName = DNS:keys.example.org`",
            facts.subject
        ));
    }
    if !facts.allows(Usage::Server) {
        found.problems.push(
            "the extendedKeyUsage does not allow serverAuth, so clients refuse the certificate; issue a certificate \
             for server authentication".to_owned(),
        );
    }
    if !facts.allows(Usage::Handshake) {
        found.problems.push(
            "the keyUsage does not allow digitalSignature, which TLS 1.3 requires; issue a certificate with \
             digitalSignature".to_owned(),
        );
    }
    if facts.is_authority == Some(true) {
        found.problems.push(
            "the certificate is a CA certificate (CA:TRUE), which many clients refuse as a server certificate; issue \
             a separate certificate for the server"
                .to_owned(),
        );
    }
    // The TLS setup refuses certificates that have expired or are not valid yet.
    if facts.life.age(certificate::now()) == Age::Late {
        found.notes.push(format!(
            "the certificate expires soon, on {}; renew the certificate",
            facts.life.ends()
        ));
    }
}

fn check_authority(facts: &Facts, _: usize, found: &mut Found) {
    if facts.is_self_issued && facts.is_authority == Some(false) {
        // An end-entity certificate is permitted in the file, but the broker then accepts only the
        // peer with this certificate.
        found.notes.push(format!(
            "{:?} is not a CA certificate (CA:FALSE): only a peer that presents exactly this certificate is accepted",
            facts.subject
        ));
    } else {
        check_issuer(facts, found);
    }
    if facts.life.age(certificate::now()) == Age::Over {
        found.notes.push(format!(
            "{:?} expired on {}; the broker ignores the dates of CA certificates, but other programs check them",
            facts.subject,
            facts.life.ends()
        ));
    }
}

fn check_issuer(facts: &Facts, found: &mut Found) {
    if facts.is_authority == Some(false) {
        found.problems.push(format!(
            "{:?} is not a CA certificate (CA:FALSE); use the certificate of the CA that issued it",
            facts.subject
        ));
    } else if !facts.allows(Usage::Issuing) {
        found.problems.push(format!(
            "the keyUsage of {:?} does not allow keyCertSign, so this CA cannot issue other certificates",
            facts.subject
        ));
    }
}
