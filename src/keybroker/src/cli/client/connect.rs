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

/// Longest PEM file, in bytes; the authorities of a Linux distribution have 0.3 MiB.
const PEM_BYTES_MAX: u64 = 4 * 1024 * 1024;
const AUTHORITIES: Purpose = Purpose::trust("other users could decide which broker is believed");
const CERTIFICATE: Purpose = Purpose::trust("other users could replace the client certificate");
const KEY: Purpose = Purpose::secret("private key");

/// Options that name the broker and the client's certificate.
#[derive(Args, Clone, Debug)]
pub(in crate::cli) struct Connection {
    /// Broker to call, `https://host:port`
    #[arg(long, global = true, env = "KEYBROKER_ENDPOINT", value_name = "URL")]
    pub(in crate::cli) endpoint: Option<String>,
    /// PEM file with the authorities that may have issued the broker's certificate (required)
    #[arg(long, global = true, env = "KEYBROKER_CA", value_name = "FILE")]
    ca: Option<PathBuf>,
    /// PEM file with the client's certificate chain; requires --key
    #[arg(long, global = true, env = "KEYBROKER_CERT", value_name = "FILE")]
    cert: Option<PathBuf>,
    /// PEM file with the private key of that certificate
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
    /// The endpoint that was named.
    pub(in crate::cli) fn named_endpoint(&self) -> Result<String, Failure> {
        self.endpoint.clone().ok_or_else(|| {
            Failure::new(Exit::Usage, "no broker is named")
                .hint("pass --endpoint https://host:port or set KEYBROKER_ENDPOINT")
        })
    }

    /// The identity in the client's certificate.
    pub(in crate::cli) fn certificate(&self) -> Result<PeerCertificate, Failure> {
        let unusable = |what: String| Failure::new(Exit::Usage, format!("--cert: {what}"));
        let Some(cert) = &self.cert else {
            return Err(Failure::new(Exit::Usage, "no client certificate is named")
                .hint("pass --cert and --key"));
        };
        let certificates = pem::chain(&read("--cert", cert, CERTIFICATE)?)
            .map_err(|error| unusable(error.to_string()))?;
        let leaf = certificates
            .first()
            .ok_or_else(|| unusable("no certificate".to_owned()))?;
        PeerCertificate::read(leaf).map_err(|error| unusable(chain(&error)))
    }

    /// Whether a client certificate is sent.
    pub(in crate::cli) fn has_certificate(&self) -> bool {
        self.cert.is_some()
    }

    /// A client of the broker at that URL, with the TLS files read and checked.
    pub(in crate::cli) fn client(&self, url: &str) -> Result<ClientBuilder, Failure> {
        if !url.starts_with("https://") {
            let what = format!("--endpoint {url:?} does not begin with https://");
            return Err(Failure::new(Exit::Usage, what).hint("a broker offers gRPC only over TLS"));
        }
        let malformed = |option: &str, path: &Path, error: pem::Error| {
            Failure::new(Exit::Usage, format!("{option} {}: {error}", path.display()))
        };
        let Some(ca) = &self.ca else {
            return Err(Failure::new(Exit::Usage, "no certificate authority is named")
                .hint("pass --ca FILE or set KEYBROKER_CA: the authorities that may have issued the broker's certificate"));
        };
        let authorities = pem::certificates(&read("--ca", ca, AUTHORITIES)?)
            .map_err(|error| malformed("--ca", ca, error))?;
        let timeout = Duration::from_millis(self.timeout_ms);
        let mut builder = Client::builder(url)
            .ca_pem(pem::encode(&authorities))
            .deadline(timeout)
            // The deadline ends the wait.
            .connect_timeout(timeout * 2);
        let (missing, given) = match (&self.cert, &self.key) {
            (Some(_), None) => ("--key", "--cert"),
            (None, Some(_)) => ("--cert", "--key"),
            _ => ("", ""),
        };
        if !missing.is_empty() {
            let what = format!(
                "{given} needs {missing}: a certificate and its private key are used together"
            );
            return Err(Failure::new(Exit::Usage, what));
        }
        if let (Some(cert), Some(key)) = (&self.cert, &self.key) {
            let certificates = pem::chain(&read("--cert", cert, CERTIFICATE)?)
                .map_err(|error| malformed("--cert", cert, error))?;
            let text = read("--key", key, KEY)?;
            let private =
                pem::private_key(&text).map_err(|error| malformed("--key", key, error))?;
            if let Some(leaf) = certificates.first() {
                check_certificate(cert, leaf, key, &private)?;
            }
            let key = pem::encode_key(&private);
            builder = builder.identity_pem(pem::encode(&certificates), key.as_bytes());
        }
        Ok(builder)
    }
}

/// The client, ready to connect.
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
        .hint("each is a PEM file; --key must be the private key of the certificate in --cert"),
        BuildError::Credential(_) => {
            usage("--token-file has characters that no token has".to_owned())
        }
        other => usage(chain(&other)),
    })
}

/// Connects, so that a broker that cannot be reached is told from one that does not answer a call.
pub(in crate::cli) async fn connect(client: &Client, url: &str) -> Result<(), Failure> {
    let unreachable =
        |cause: &str| Failure::new(Exit::Unreachable, format!("cannot reach {url}: {cause}"));
    let Err(error) = client.connect().await else {
        return Ok(());
    };
    if error.kind() == ErrorKind::DeadlineExceeded {
        return Err(unreachable("no answer within --timeout-ms").hint(NO_ANSWER));
    }
    let cause = root_cause(&error);
    let mut hint = hint(&cause, "--ca");
    if url.parse::<Uri>().is_ok_and(|url| url.port().is_none()) {
        hint = format!("no port is named in --endpoint, so 443 was tried; {hint}");
    }
    if is_unknown_issuer(&cause) {
        let what =
            format!("the broker's certificate is not signed by an authority in --ca ({cause})");
        return Err(unreachable(&what).hint(hint));
    }
    Err(unreachable(&cause).hint(hint))
}

fn is_unknown_issuer(cause: &str) -> bool {
    ["UnknownIssuer", "BadSignature"]
        .iter()
        .any(|word| cause.contains(word))
}

const NO_ANSWER: &str = "check the address, the firewall, and whether the broker runs there";

/// What to do about a connection that failed, by its innermost cause. `authorities` is the option with the trusted authorities.
pub(in crate::cli) fn hint(cause: &str, authorities: &str) -> String {
    let has = |words: &[&str]| words.iter().any(|word| cause.contains(word));
    if is_unknown_issuer(cause) {
        format!(
            "name the authority that issued the broker's certificate in {authorities}; its operator can give you the file"
        )
    } else if has(&["not valid for name", "NotValidForName"]) {
        "call the broker by a name of its certificate, or issue a certificate with this name among its subject alternative names"
            .to_owned()
    } else if has(&["CaUsedAsEndEntity"]) {
        "the broker's certificate is a certificate authority (CA:TRUE); its operator must issue a separate certificate for the \
         server"
            .to_owned()
    } else if has(&["NotValidYet", "not valid yet"]) {
        "the broker's certificate is not valid yet: is the clock of this machine right?".to_owned()
    } else if has(&["expired", "Expired"]) {
        "the broker's certificate has expired: its operator must renew it; is the clock of this machine right?".to_owned()
    } else if has(&["InvalidContentType", "corrupt message"]) {
        "no TLS is spoken at this address: it is perhaps the status listener ([status] address); name a [[listener]] with TLS"
            .to_owned()
    } else if has(&[
        "peer doesn't support",
        "NoApplicationProtocol",
        "frame with invalid size",
    ]) {
        "another program answers at this address, or a listener that does not have the API `grpc` or `admin`".to_owned()
    } else if has(&["certificate"]) {
        "check the names and the dates of the broker's certificate: `openssl s_client -connect HOST:PORT -showcerts`".to_owned()
    } else if has(&["lookup address", "resolve", "Name or service not known"]) {
        "the host name does not resolve: check its spelling, DNS and /etc/hosts".to_owned()
    } else if has(&["refused"]) {
        "nothing listens at this address: check the port against the [[listener]] sections of the broker's configuration, and \
         whether the broker runs"
            .to_owned()
    } else {
        NO_ANSWER.to_owned()
    }
}

/// Why the client's certificate cannot be used, if that is known before a connection.
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
            return Err(
                refuse(&what).hint("renew it; if it is new, check the clock of this machine")
            );
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
        let what =
            "the certificate's extendedKeyUsage does not allow clientAuth, so brokers refuse it";
        return Err(refuse(what).hint("issue a certificate for clients"));
    }
    if certificate::is_key_of(leaf, key) == Some(false) {
        let what = format!(
            "--key {} is not the private key of the certificate in --cert {}",
            key_file.display(),
            path.display()
        );
        return Err(Failure::new(Exit::Usage, what)
            .hint("name the key that was made for this certificate; in a chain, the client's certificate is the first"));
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

    /// The texts of the libraries, as they were seen.
    #[test]
    fn each_cause_of_a_failed_connection_has_its_remedy() {
        for (cause, remedy) in [
            (
                "invalid peer certificate: UnknownIssuer",
                "certificate in --ca",
            ),
            (
                "invalid peer certificate: certificate not valid for name \"localhost\"; certificate is only valid for DnsName(\"x\")",
                "by a name of its certificate",
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
                "no TLS is spoken",
            ),
            (
                "failed to lookup address information: Name or service not known",
                "does not resolve",
            ),
            ("Connection refused (os error 111)", "nothing listens"),
            (
                "Connection reset by peer (os error 104)",
                "whether the broker runs",
            ),
        ] {
            let hint = hint(cause, "--ca");
            assert!(hint.contains(remedy), "{cause}: {hint}");
        }
    }
}
