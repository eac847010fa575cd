//! Checks the values of a configuration whose syntax is valid.

use std::{collections::HashSet, path::Path};

use crate::server::{
    Api, ClientCertificates, ListenerSettings, Plaintext, RemoteStatusSettings, TlsSettings,
};
use keybroker_auth::{issuer, spiffe};
use keybroker_broker::limits::{
    ACCESS_REQUESTS_MAX, RATE_MAX, RELEASED_USERS_MAX, REPLACEMENTS_MAX,
};
use keybroker_core::{key::KeyName, principal::Kind, state, trusted_file};
use keybroker_policy::NamedNetwork;

use super::{
    Config, INSTANCE_VARIABLE, bitwarden,
    check_token::{selection_problems, token_problems},
    notices,
    range::{range, wide},
    wrapping_keys,
};

impl Config {
    /// All problems of the configuration with their solutions. The list is empty if the broker can
    /// serve with this configuration.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = self.problems_for_commands();
        problems.extend(self.tokens.problems_of_each(selection_problems));
        self.check_apis(&mut problems);
        self.check_principals(&mut problems);
        problems
    }

    /// The problems that are relevant to every command. The PIN file, the certificates and the
    /// principals may still be missing, because operators initialise a token and generate keys
    /// first.
    pub fn problems_for_commands(&self) -> Vec<String> {
        let mut problems = Vec::new();
        problems.extend(self.tokens.problems_of_list());
        problems.extend(self.tokens.problems_of_each(token_problems));
        self.check_paths(&mut problems);
        self.check_limits(&mut problems);
        self.check_rates(&mut problems);
        problems.extend(self.store.problems());
        problems.extend(self.rest.problems());
        range(
            &mut problems,
            "[wrapping_keys] rotate_after_days",
            self.wrapping_keys.rotate_after_days.into(),
            0..=wrapping_keys::DAYS_MAX.into(),
        );
        range(
            &mut problems,
            "[wrapping_keys] destroy_after_days",
            self.wrapping_keys.destroy_after_days.into(),
            1..=wrapping_keys::WAIT_DAYS_MAX.into(),
        );
        problems.extend(self.client_credentials.problem());
        problems.extend(self.policy.problem());
        problems.extend(NamedNetwork::problems(&self.networks));
        problems.extend(self.notices.iter().flat_map(notices::Settings::problems));
        problems.extend(bitwarden::problems(&self.bitwarden_organizations));
        problems
    }

    fn check_paths(&self, problems: &mut Vec<String>) {
        let mut absolute = |name: &str, path: &Path| {
            if !path.is_absolute() {
                problems.push(format!("{name} is {}", trusted_file::not_absolute(path)));
            }
        };
        for token in self.tokens.all() {
            let prefix = self.tokens.prefix(token);
            absolute(&format!("{prefix}[token] `module`"), &token.module);
            if let Some(path) = &token.pin_file
                && !trusted_file::is_absolute(path)
            {
                absolute(&format!("{prefix}[token] `pin_file`"), path);
            }
        }
        absolute("[audit] `directory`", &self.audit.directory);
        // The audit log of the instance is a directory with this name next to the state directory,
        // so the names must differ.
        let instance = self.audit.instance.as_str();
        let is_taken = [".", "..", state::DIRECTORY].contains(&instance);
        if is_taken || KeyName::parse(instance).is_err() {
            problems.push(format!(
                "[audit]: `instance` is {instance:?}; it must be 1 to 64 bytes of [a-z0-9._-], and not `.`, `..` or `{}`. \
                 `{INSTANCE_VARIABLE}` in the environment takes precedence over the file",
                state::DIRECTORY
            ));
        }
    }

    fn check_limits(&self, problems: &mut Vec<String>) {
        let limits = &self.limits;
        for (name, value, allowed) in [
            (
                "connections_max",
                wide(limits.connections_max),
                1..=1_000_000,
            ),
            (
                "connections_per_principal_max",
                wide(limits.connections_per_principal_max),
                1..=1_000_000,
            ),
            (
                "handshake_timeout_ms",
                limits.handshake_timeout_ms,
                100..=60_000,
            ),
            (
                "streams_per_connection_max",
                limits.streams_per_connection_max.into(),
                1..=10_000,
            ),
            (
                "streams_without_certificate_max",
                limits.streams_without_certificate_max.into(),
                1..=10_000,
            ),
            (
                "message_bytes_max",
                wide(limits.message_bytes_max),
                1_048_576..=2_147_483_648,
            ),
            (
                "call_timeout_max_ms",
                limits.call_timeout_max_ms,
                100..=600_000,
            ),
            (
                "connection_age_max_ms",
                limits.connection_age_max_ms,
                1_000..=86_400_000,
            ),
            (
                "access_token_bytes_max",
                wide(limits.access_token_bytes_max),
                1_024..=32_768,
            ),
            ("drain_timeout_ms", limits.drain_timeout_ms, 100..=600_000),
        ] {
            range(problems, &format!("[limits] {name}"), value, allowed);
        }
    }

    fn check_rates(&self, problems: &mut Vec<String>) {
        let rates = &self.rates;
        for (name, value, max) in [
            (
                "user_calls_per_minute",
                rates.user_calls_per_minute,
                RATE_MAX,
            ),
            (
                "service_calls_per_minute",
                rates.service_calls_per_minute,
                RATE_MAX,
            ),
            ("failures_per_minute", rates.failures_per_minute, RATE_MAX),
            (
                "released_users_per_hour",
                rates.released_users_per_hour,
                RELEASED_USERS_MAX,
            ),
            (
                "replacements_per_hour",
                rates.replacements_per_hour,
                REPLACEMENTS_MAX,
            ),
            (
                "access_requests_per_hour",
                rates.access_requests_per_hour,
                ACCESS_REQUESTS_MAX,
            ),
            (
                "approvals_per_hour",
                rates.approvals_per_hour,
                ACCESS_REQUESTS_MAX,
            ),
        ] {
            range(
                problems,
                &format!("[rates] {name}"),
                value.into(),
                1..=max.into(),
            );
        }
        let segment = self.audit.segment_bytes_max;
        range(
            problems,
            "[audit] segment_bytes_max",
            segment,
            1_048_576..=268_435_456,
        );
    }

    fn check_apis(&self, problems: &mut Vec<String>) {
        if !self.status.address.ip().is_loopback() {
            problems.push(format!(
                "[status]: `address` is {}, which other machines can reach; it must be a loopback address, because the \
                 status listener does not authenticate callers",
                self.status.address
            ));
        }
        if let Some(remote) = &self.status.remote {
            check_remote_status(remote, problems);
        }
        let connections_max = self.limits.connections_max;
        if connections_max <= self.listeners.len() {
            problems.push(format!(
                "[limits]: `connections_max` is {connections_max}; it must be greater than the number of listeners, \
                 because each listener keeps one connection free for its next client"
            ));
        }
        if self.listeners.is_empty() {
            problems.push(
                "the configuration has no [[listener]], so callers cannot reach the broker"
                    .to_owned(),
            );
        }
        let mut issuers = self.issuers.iter();
        let has_users = issuers.any(|issuer| issuer.can_identify(Kind::User));
        let mut taken = HashSet::from([self.status.address]);
        if let Some(remote) = &self.status.remote
            && remote.address.port() != 0
            && !taken.insert(remote.address)
        {
            problems.push(format!(
                "[status.remote] {}: [status] uses the same address",
                remote.address
            ));
        }
        let has_page = |listener: &ListenerSettings| listener.apis.contains(&Api::Console);
        match (&self.console, self.listeners.iter().find(|one| has_page(one))) {
            (None, Some(listener)) => problems.push(format!(
                "[[listener]] {}: `apis` has \"console\", but there is no section [console], so no person could sign in",
                listener.address
            )),
            (Some(_), None) => problems.push(
                "[console] has no effect, because no [[listener]] has `apis = [\"console\"]`".to_owned(),
            ),
            _ => {}
        }
        for listener in &self.listeners {
            check_listener(listener, problems);
            if listener.apis.contains(&Api::Rest) && !has_users {
                problems.push(format!(
                    "[[listener]] {}: the REST API is for users, but no [[issuer]] has `kind = \"user\"`",
                    listener.address
                ));
            }
            if listener.address.port() != 0 && !taken.insert(listener.address) {
                problems.push(format!(
                    "[[listener]] {}: another listener or [status] uses the same address",
                    listener.address
                ));
            }
        }
    }

    fn check_principals(&self, problems: &mut Vec<String>) {
        if self.principals.is_empty() && self.issuers.is_empty() {
            problems.push(
                "the configuration has no [[principal]] and no [[issuer]], so the broker would refuse every call"
                    .to_owned(),
            );
        }
        problems.extend(issuer::problems(&self.issuers));
        let sans = self
            .principals
            .iter()
            .map(|principal| principal.san.as_str());
        problems.extend(self.approvals.problems(&sans.collect()));
        problems.extend(self.devices.problems());
        if let Some(console) = &self.console {
            problems.extend(console.problems(&self.issuers));
        }
        let mut seen = HashSet::new();
        for principal in &self.principals {
            problems.extend(principal.problem());
            if !seen.insert(&principal.san) {
                problems.push(format!(
                    "[[principal]]: `san` {:?} appears twice",
                    principal.san
                ));
            }
        }
    }
}

fn check_listener(listener: &ListenerSettings, problems: &mut Vec<String>) {
    let address = listener.address;
    if listener.apis.is_empty() {
        problems.push(format!(
            "[[listener]] {address}: `apis` is empty, so the listener serves no API"
        ));
    }
    if listener.apis.contains(&Api::Console) && listener.apis != [Api::Console] {
        problems.push(format!(
            "[[listener]] {address}: the page for approvers needs a separate listener: `apis = [\"console\"]`"
        ));
    }
    match (&listener.tls, listener.plaintext) {
        (Some(_), Some(_)) => problems.push(format!(
            "[[listener]] {address}: `plaintext` and [listener.tls] are mutually exclusive"
        )),
        (None, None) => problems.push(format!(
            "[[listener]] {address}: there is no [listener.tls]; set [listener.tls], or set `plaintext = \"loopback\"` \
             for a REST-only listener behind a proxy that terminates TLS"
        )),
        (Some(tls), None) => {
            let name = format!("[[listener]] {address}");
            check_listener_tls(&name, listener.client_certificates, tls, problems);
        }
        (None, Some(reach)) => check_plaintext(listener, reach, problems),
    }
}

/// Checks the settings of a listener without TLS. Anyone with access to the listener or to the
/// network path can act as any caller.
fn check_plaintext(listener: &ListenerSettings, reach: Plaintext, problems: &mut Vec<String>) {
    let address = listener.address;
    if listener.apis != [Api::Rest] {
        problems.push(format!(
            "[[listener]] {address}: `plaintext` is allowed only with `apis = [\"rest\"]`; the other APIs need [listener.tls]"
        ));
    }
    if listener.client_certificates != ClientCertificates::None {
        problems.push(format!(
            "[[listener]] {address}: without TLS there are no client certificates; set `client_certificates = \
             \"none\"` to confirm that callers authenticate only with access tokens and client secrets"
        ));
    }
    if reach == Plaintext::Loopback && !address.ip().is_loopback() {
        problems.push(format!(
            "[[listener]] {address}: `plaintext = \"loopback\"` requires a loopback address; with \"any\", everyone on \
             the network path can read keys and access tokens"
        ));
    }
}

/// Checks the settings of the remote status listener. Without TLS, anyone who can reach the address
/// can read metrics and health.
fn check_remote_status(remote: &RemoteStatusSettings, problems: &mut Vec<String>) {
    let name = format!("[status.remote] {}", remote.address);
    match (&remote.tls, remote.plaintext) {
        (Some(_), Some(_)) => problems.push(format!(
            "{name}: `plaintext` and [status.remote.tls] are mutually exclusive"
        )),
        (None, None | Some(Plaintext::Loopback)) => problems.push(format!(
            "{name}: there is no [status.remote.tls]; set [status.remote.tls], or set `plaintext = \"any\"` to let \
             everyone who can reach the address read metrics and health"
        )),
        (None, Some(Plaintext::Any)) => {}
        (Some(tls), None) => {
            check_listener_tls(&name, remote.client_certificates(), tls, problems);
            if !tls.trust_domains.is_empty() {
                problems.push(format!(
                    "{name}: `trust_domains` has no effect on a status listener; use a separate CA for the collector's certificate"
                ));
            }
        }
    }
}

fn check_listener_tls(
    name: &str,
    clients: ClientCertificates,
    tls: &TlsSettings,
    problems: &mut Vec<String>,
) {
    if clients != ClientCertificates::None && tls.client_ca_file.is_none() {
        problems.push(format!(
            "{name}: `client_certificates` requests client certificates, but `client_ca_file` is not set; the broker \
             needs `client_ca_file` to verify client certificates"
        ));
    }
    let narrows = tls.client_crl_file.is_some() || !tls.trust_domains.is_empty();
    if clients == ClientCertificates::None && narrows {
        problems.push(format!(
            "{name}: `client_crl_file` and `trust_domains` apply to client certificates, but no client certificate is \
             requested; remove these settings, or set `client_certificates`"
        ));
    }
    if tls.client_crl_issuers_file.is_some() && tls.client_crl_file.is_none() {
        problems.push(format!(
            "{name}: `client_crl_issuers_file` has the certificates that verify the lists in `client_crl_file`, which \
             is not set; set `client_crl_file`, or remove this setting"
        ));
    }
    for domain in &tls.trust_domains {
        if let Err(problem) = spiffe::check_trust_domain(domain) {
            problems.push(format!(
                "{name}: `trust_domains` has {domain:?}, which is not valid: {problem}"
            ));
        }
    }
    let files = [
        Some(&tls.certificate_file),
        Some(&tls.key_file),
        tls.client_ca_file.as_ref(),
        tls.client_crl_file.as_ref(),
        tls.client_crl_issuers_file.as_ref(),
    ];
    for path in files.into_iter().flatten() {
        if !trusted_file::is_absolute(path) {
            problems.push(format!("{name}: {}", trusted_file::not_absolute(path)));
        }
    }
}
