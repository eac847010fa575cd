//! Connections to a broker, for `client` and `bench`.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use clap::Args;
use hyper::Uri;
use keybroker_client::{BuildError, Client, ClientBuilder, ErrorKind};
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use zeroize::Zeroizing;

use crate::{
    certificate::{self, Age, Facts, Usage},
    cli::exit::{Exit, Failure},
};
use keybroker_auth::PeerCertificate;
use keybroker_core::{
    error::{chain, root_cause},
    pem,
    trusted_file::{self, Purpose},
};

use super::refusal;

/// Maximum length of a PEM file, in bytes. The CA certificates of a Linux distribution take about
/// 0.3 MiB in total.
const PEM_BYTES_MAX: u64 = 4 * 1024 * 1024;
const AUTHORITIES: Purpose = Purpose::trust("other users could decide which broker is trusted");
const CERTIFICATE: Purpose = Purpose::trust("other users could replace the client certificate");
const KEY: Purpose = Purpose::secret("private key");

/// Options that select the broker and the client's certificate.
#[derive(Args, Clone, Debug)]
pub(in crate::cli) struct Connection {
    /// Broker to call, `https://host:port`
    #[arg(long, global = true, env = "KEYBROKER_ENDPOINT", value_name = "URL")]
    pub(in crate::cli) endpoint: Option<String>,
    /// PEM file with the CA certificates that verify the broker's certificate (required)
    #[arg(long, global = true, env = "KEYBROKER_CA", value_name = "FILE")]
    ca: Option<PathBuf>,
    /// PEM file with the client's certificate chain; requires --key
    #[arg(long, global = true, env = "KEYBROKER_CERT", value_name = "FILE")]
    cert: Option<PathBuf>,
    /// PEM file with the private key of the certificate in --cert
    #[arg(long, global = true, env = "KEYBROKER_KEY", value_name = "FILE")]
    key: Option<PathBuf>,
    /// Timeout for the connection and for each answer, in milliseconds
    #[arg(
        long, global = true, env = "KEYBROKER_TIMEOUT_MS", default_value_t = 10_000, value_name = "MILLISECONDS",
        value_parser = clap::value_parser!(u64).range(1..=600_000)
    )]
    timeout_ms: u64,
}

impl Connection {
    /// The URL of the broker, or a failure if the options specify no broker.
    pub(in crate::cli) fn named_endpoint(&self) -> Result<String, Failure> {
        self.endpoint.clone().ok_or_else(|| {
            Failure::new(Exit::Usage, "no broker specified")
                .hint("pass --endpoint https://host:port or set KEYBROKER_ENDPOINT")
        })
    }

    /// Reads the identity from the client's certificate.
    pub(in crate::cli) fn certificate(&self) -> Result<PeerCertificate, Failure> {
        let unusable = |what: String| Failure::new(Exit::Usage, format!("--cert: {what}"));
        let Some(cert) = &self.cert else {
            return Err(Failure::new(Exit::Usage, "no client certificate specified")
                .hint("pass --cert and --key"));
        };
        let certificates = pem::chain(&read("--cert", cert, CERTIFICATE)?)
            .map_err(|error| unusable(error.to_string()))?;
        let leaf = certificates
            .first()
            .ok_or_else(|| unusable("no certificate".to_owned()))?;
        PeerCertificate::read(leaf).map_err(|error| unusable(chain(&error)))
    }

    /// The timeout for the connection and for each answer.
    pub(in crate::cli) fn timeout(&self) -> Duration {
        Duration::from_millis(self.timeout_ms)
    }

    /// Raises the timeout to at least this value.
    pub(in crate::cli) fn raise_timeout(&mut self, timeout: Duration) {
        let least = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
        self.timeout_ms = self.timeout_ms.max(least);
    }

    /// Returns a copy of the options with the certificate and the key of another principal.
    pub(in crate::cli) fn with_identity(&self, cert: &Path, key: &Path) -> Self {
        Self {
            cert: Some(cert.to_owned()),
            key: Some(key.to_owned()),
            ..self.clone()
        }
    }

    /// Reads the CA certificates that verify the broker's certificate.
    pub(in crate::cli) fn authorities(&self) -> Result<Vec<CertificateDer<'static>>, Failure> {
        let Some(ca) = &self.ca else {
            return Err(Failure::new(Exit::Usage, "no CA certificate specified")
                .hint("pass --ca FILE or set KEYBROKER_CA; the file must contain the CA certificates that verify the broker's certificate"));
        };
        pem::certificates(&read("--ca", ca, AUTHORITIES)?)
            .map_err(|error| malformed("--ca", ca, &error))
    }

    /// Whether the client presents a certificate.
    pub(in crate::cli) fn has_certificate(&self) -> bool {
        self.cert.is_some()
    }

    /// Reads and checks the TLS files, and prepares a client for the broker at this URL.
    pub(in crate::cli) fn client(&self, url: &str) -> Result<ClientBuilder, Failure> {
        if !url.starts_with("https://") {
            let what = format!("--endpoint {url:?} does not begin with https://");
            return Err(
                Failure::new(Exit::Usage, what).hint("the broker offers gRPC only over TLS")
            );
        }
        let authorities = self.authorities()?;
        let timeout = self.timeout();
        let mut builder = Client::builder(url)
            .ca_pem(pem::encode(&authorities))
            .deadline(timeout)
            // The connection timeout is longer than the deadline, so that the deadline ends the wait.
            .connect_timeout(timeout * 2);
        let (missing, given) = match (&self.cert, &self.key) {
            (Some(_), None) => ("--key", "--cert"),
            (None, Some(_)) => ("--cert", "--key"),
            _ => ("", ""),
        };
        if !missing.is_empty() {
            let what = format!(
                "{given} requires {missing}: the broker accepts a client certificate only together with its private key"
            );
            return Err(Failure::new(Exit::Usage, what));
        }
        if let (Some(cert), Some(key)) = (&self.cert, &self.key) {
            let certificates = pem::chain(&read("--cert", cert, CERTIFICATE)?)
                .map_err(|error| malformed("--cert", cert, &error))?;
            let text = read("--key", key, KEY)?;
            let private =
                pem::private_key(&text).map_err(|error| malformed("--key", key, &error))?;
            if let Some(leaf) = certificates.first() {
                check_certificate(cert, leaf, key, &private)?;
            }
            let key = pem::encode_key(&private);
            builder = builder.identity_pem(pem::encode(&certificates), key.as_bytes());
        }
        Ok(builder)
    }
}

fn malformed(option: &str, path: &Path, error: &pem::Error) -> Failure {
    Failure::new(Exit::Usage, format!("{option} {}: {error}", path.display()))
}

/// Builds the client without connecting to the broker.
pub(in crate::cli) fn build(builder: ClientBuilder) -> Result<Client, Failure> {
    let usage = |what: String| Failure::new(Exit::Usage, what);
    builder.build().map_err(|error| match error {
        BuildError::Endpoint { endpoint, problem } => {
            usage(format!("--endpoint {endpoint:?}: {problem}"))
        }
        BuildError::Tls { source } => usage(format!(
            "--ca, --cert and --key cannot be used: {}",
            root_cause(&source)
        ))
        .hint("--ca, --cert and --key are PEM files; --key must be the private key of the certificate in --cert"),
        BuildError::Credential(_) => {
            usage("--token-file contains characters that are not allowed in access tokens".to_owned())
        }
        other => usage(chain(&other)),
    })
}

/// Connects before the first call, to distinguish an unreachable broker from a call that gets no
/// answer.
pub(in crate::cli) async fn connect(client: &Client, url: &str) -> Result<(), Failure> {
    let unreachable =
        |cause: &str| Failure::new(Exit::Unreachable, format!("cannot reach {url}: {cause}"));
    let Err(error) = client.connect().await else {
        return Ok(());
    };
    if error.kind() == ErrorKind::DeadlineExceeded {
        return Err(unreachable(refusal::TIMED_OUT).hint(NO_ANSWER));
    }
    let cause = root_cause(&error);
    let mut hint = hint(&cause, "--ca");
    if url.parse::<Uri>().is_ok_and(|url| url.port().is_none()) {
        hint = format!("--endpoint has no port, so port 443 was used; {hint}");
    }
    if is_unknown_issuer(&cause) {
        let what = format!("the broker's certificate is not signed by a CA in --ca ({cause})");
        return Err(unreachable(&what).hint(hint));
    }
    Err(unreachable(&cause).hint(hint))
}

fn is_unknown_issuer(cause: &str) -> bool {
    ["UnknownIssuer", "BadSignature"]
        .iter()
        .any(|word| cause.contains(word))
}

const NO_ANSWER: &str = "check the address and the firewall, and check that the broker runs";

/// Returns a hint for a failed connection, according to its innermost cause. `authorities` is the
/// name of the option for the trusted CA certificates.
pub(in crate::cli) fn hint(cause: &str, authorities: &str) -> String {
    let has = |words: &[&str]| words.iter().any(|word| cause.contains(word));
    if is_unknown_issuer(cause) {
        format!(
            "{authorities} must contain the certificate of the CA that issued the broker's certificate; the operator \
             of the broker has this file"
        )
    } else if has(&["not valid for name", "NotValidForName"]) {
        "pass an --endpoint whose host name is in the broker's certificate, or issue a certificate that has the host \
         name of --endpoint as a subject alternative name"
            .to_owned()
    } else if has(&["CaUsedAsEndEntity"]) {
        "the broker's certificate is a CA certificate (CA:TRUE); the operator of the broker must issue a separate \
         certificate for the server"
            .to_owned()
    } else if has(&["NotValidYet", "not valid yet"]) {
        "the broker's certificate is not valid yet: check the clock of this machine".to_owned()
    } else if has(&["expired", "Expired"]) {
        "the broker's certificate has expired: the operator of the broker must renew it; if the certificate is new, \
         check the clock of this machine".to_owned()
    } else if has(&["InvalidContentType", "corrupt message"]) {
        "this address does not use TLS: it may be the status listener ([status] address); use the address of a \
         [[listener]] with TLS"
            .to_owned()
    } else if has(&[
        "peer doesn't support",
        "NoApplicationProtocol",
        "frame with invalid size",
    ]) {
        "another program answers at this address, or the `apis` of the listener at this address include neither `grpc` \
         nor `admin`".to_owned()
    } else if has(&["certificate"]) {
        "check the names and dates in the broker's certificate: `openssl s_client -connect HOST:PORT -showcerts`".to_owned()
    } else if has(&["lookup address", "resolve", "Name or service not known"]) {
        "the host name does not resolve: check its spelling, DNS and /etc/hosts".to_owned()
    } else if has(&["refused"]) {
        "nothing listens at this address: compare the port with the [[listener]] sections of the broker's \
         configuration, and check that the broker runs"
            .to_owned()
    } else {
        NO_ANSWER.to_owned()
    }
}

/// Rejects a client certificate if an error in the certificate can be found before connecting.
fn check_certificate(
    path: &Path,
    leaf: &CertificateDer<'_>,
    key_file: &Path,
    key: &PrivateKeyDer<'_>,
) -> Result<(), Failure> {
    let refuse =
        |what: &str| Failure::new(Exit::Usage, format!("--cert {}: {what}", path.display()));
    let facts = Facts::read(leaf).map_err(|error| refuse(&chain(&error)))?;
    match facts.life.age(certificate::now()) {
        Age::Over => {
            let what = format!("the certificate expired on {}", facts.life.ends());
            return Err(refuse(&what).hint(
                "renew the certificate; if the certificate is new, check the clock of this machine",
            ));
        }
        Age::Early => {
            let what = format!(
                "the certificate is not valid before {}",
                facts.life.begins()
            );
            return Err(refuse(&what).hint("check the clock of this machine"));
        }
        Age::Good | Age::Late => {}
    }
    if !facts.allows(Usage::Client) {
        let what = "the certificate's extendedKeyUsage does not allow clientAuth, so the broker would refuse the certificate";
        return Err(refuse(what).hint("issue a certificate for client authentication"));
    }
    if certificate::is_key_of(leaf, key) == Some(false) {
        let what = format!(
            "--key {} is not the private key of the certificate in --cert {}",
            key_file.display(),
            path.display()
        );
        return Err(Failure::new(Exit::Usage, what)
            .hint("pass the private key that belongs to this certificate; in a chain, the client's certificate must be \
             the first"));
    }
    Ok(())
}

fn read(option: &str, path: &Path, purpose: Purpose) -> Result<Zeroizing<Vec<u8>>, Failure> {
    trusted_file::read(path, PEM_BYTES_MAX, purpose)
        .map_err(|error| Failure::new(Exit::Usage, format!("{option}: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The test uses error texts that the libraries really produced.
    #[test]
    fn each_cause_of_a_failed_connection_has_its_remedy() {
        for (cause, remedy) in [
            (
                "invalid peer certificate: UnknownIssuer",
                "--ca must contain",
            ),
            (
                "invalid peer certificate: certificate not valid for name \"localhost\"; certificate is only valid for DnsName(\"x\")",
                "whose host name is in the broker's certificate",
            ),
            (
                "invalid peer certificate: certificate expired: verification time 2 (UNIX), but certificate is not valid after 1",
                "has expired",
            ),
            (
                "invalid peer certificate: certificate not valid yet: verification time 1 (UNIX)",
                "not valid yet",
            ),
            (
                "invalid peer certificate: Other(OtherError(CaUsedAsEndEntity))",
                "CA:TRUE",
            ),
            (
                "received corrupt message of type InvalidContentType",
                "does not use TLS",
            ),
            (
                "failed to lookup address information: Name or service not known",
                "does not resolve",
            ),
            ("Connection refused (os error 111)", "nothing listens"),
            (
                "Connection reset by peer (os error 104)",
                "check that the broker runs",
            ),
        ] {
            let hint = hint(cause, "--ca");
            assert!(hint.contains(remedy), "{cause}: {hint}");
        }
    }
}
