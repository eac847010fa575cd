//! Connections to a broker, for `client` and `bench`.

use std::{fs, path::PathBuf, time::Duration};

use clap::Args;
use tonic::{
    Code, Status,
    transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity},
};
use tonic_types::StatusExt as _;
use zeroize::Zeroizing;

use super::exit::{Exit, Failure};

/// Which broker, and who we are to it.
#[derive(Args, Clone, Debug)]
pub(super) struct Connection {
    /// The broker, `https://host:port`
    #[arg(long, env = "KEYBROKER_ENDPOINT", value_name = "URL")]
    pub(super) endpoint: Option<String>,
    /// PEM file with the CA of the broker's certificate
    #[arg(long, env = "KEYBROKER_CA", value_name = "FILE")]
    ca: PathBuf,
    /// PEM file with our certificate chain
    #[arg(long, env = "KEYBROKER_CERT", value_name = "FILE")]
    cert: PathBuf,
    /// PEM file with our private key
    #[arg(long, env = "KEYBROKER_KEY", value_name = "FILE")]
    key: PathBuf,
    /// Longest wait for an answer
    #[arg(long, default_value_t = 10_000, value_name = "MILLISECONDS")]
    pub(super) timeout_ms: u64,
}

impl Connection {
    /// The endpoint that was named.
    pub(super) fn named_endpoint(&self) -> Result<String, Failure> {
        self.endpoint.clone().ok_or_else(|| {
            let what = "name the broker with --endpoint https://host:port or KEYBROKER_ENDPOINT";
            Failure::new(Exit::Usage, what)
        })
    }

    /// One connection.
    pub(super) async fn connect(&self, endpoint: &str) -> Result<Channel, Failure> {
        let usage = |what: String| Failure::new(Exit::Usage, what);
        let read = |path: &PathBuf| {
            fs::read(path).map_err(|e| usage(format!("cannot read {}: {e}", path.display())))
        };
        let key = Zeroizing::new(read(&self.key)?);
        let tls = ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(read(&self.ca)?))
            .identity(Identity::from_pem(read(&self.cert)?, key.as_slice()));
        let timeout = Duration::from_millis(self.timeout_ms);
        Endpoint::from_shared(endpoint.to_owned())
            .map_err(|error| usage(format!("--endpoint {endpoint:?}: {error}")))?
            .tls_config(tls)
            .map_err(|error| usage(format!("TLS files: {error}")))?
            .tcp_nodelay(true)
            .connect_timeout(timeout)
            .connect()
            .await
            .map_err(|error| {
                let cause = root_cause(&error);
                let what = format!(
                    "cannot reach {endpoint}: {cause}; is the broker running, and is --ca the CA of its \
                     certificate?"
                );
                Failure::new(Exit::Unreachable, what)
            })
    }
}

fn root_cause(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(deeper) = cause.source() {
        cause = deeper;
    }
    cause.to_string()
}

/// The broker's reason in a status, if it gave one.
pub(super) fn reason(status: &Status) -> Option<String> {
    let details = status.get_error_details();
    details.error_info().map(|info| info.reason.clone())
}

/// What a failed call means for the person who made it.
pub(super) fn failure(status: &Status) -> Failure {
    let Some(reason) = reason(status) else {
        return without_reason(status);
    };
    let violations: Vec<String> = status
        .get_error_details()
        .bad_request()
        .map(|bad| &bad.field_violations)
        .into_iter()
        .flatten()
        .map(|violation| format!("{}: {}", violation.field, violation.description))
        .collect();
    let mut message = format!("{reason}: {}", status.message());
    if !violations.is_empty() {
        message = format!("{message}; {}", violations.join("; "));
    }
    if let Some(hint) = hint(&reason) {
        message = format!("{message}. {hint}");
    }
    Failure {
        reason: Some(reason),
        ..Failure::new(Exit::Refused, message)
    }
}

fn without_reason(status: &Status) -> Failure {
    let message = status.message();
    let what = match status.code() {
        Code::Cancelled if message.contains("Timeout expired") => {
            "no answer within --timeout-ms: the call may or may not have been carried out"
                .to_owned()
        }
        // In TLS 1.3 a client without an accepted certificate learns so only at its first call.
        Code::Cancelled | Code::Unknown | Code::Unavailable => format!(
            "the connection ended during the call ({message}); if this is the first call, the broker does \
             not accept the certificate in --cert: look at its CA, its dates and the broker's log"
        ),
        Code::Unimplemented => format!(
            "this listener does not have the service ({message}); user keys and the control plane may have \
             listeners of their own"
        ),
        code => format!("{code:?}: {message}"),
    };
    Failure::new(Exit::Unreachable, what)
}

fn hint(reason: &str) -> Option<&'static str> {
    Some(match reason {
        "CREDENTIAL" => {
            "No [[principal]] of the broker's configuration names a SAN of this certificate"
        }
        "POLICY" => "The roles of this principal do not allow it",
        "KEY_EXISTS" => "Use `replace` for new material under the same name",
        "REVISION" => "Look at the current revision with `get`, and decide again",
        "RECORD_DAMAGED" => {
            "Do not replace the key: tell the operator, who compares the row with a backup"
        }
        "TOKEN_UNTRUSTED" | "TOKEN_DOWN" => "The operator sees the cause in `client token-state`",
        _ => return None,
    })
}
