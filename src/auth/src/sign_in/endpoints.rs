//! The authorization endpoint and the token endpoint of the provider, from the configuration or from the discovery document.
//!
//! One task at a time fetches the discovery document. Callers wait for the task only while no endpoints are known, and all of
//! them get its result. Endpoints that are known are used while they are refreshed, and also if the refresh fails.
//!
//! Mitigation: M30 of `THREAT_MODEL.md`.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use reqwest::Url;
use tokio::sync::watch;

use keybroker_core::{
    error::{Error, Reason, chain},
    loopback::is_loopback_host,
};

use crate::{http::Http, issuer::Settings as Issuer};

use super::{Settings, unavailable};

/// Time after which the discovery document is fetched again.
const KEPT: Duration = Duration::from_mins(15);
/// Time after a failed fetch within which the discovery document is not fetched again.
const FAILURE_KEPT: Duration = Duration::from_secs(30);
/// Longest URL of a discovery document that is written to the log, in characters.
const URL_CHARS_MAX: usize = 100;
/// Longest error of a refresh that is written to the log, in characters.
const ERROR_CHARS_MAX: usize = 300;

/// The endpoints of a provider.
#[derive(Debug)]
pub(super) struct Endpoints {
    pub(super) authorization: Url,
    pub(super) token: String,
    /// Whether the client id and the secret are in the form instead of the header.
    pub(super) is_secret_in_form: bool,
    /// Whether the provider adds its `iss` to the answer (RFC 9207).
    pub(super) has_issuer: bool,
}

type Found = Result<Arc<Endpoints>, Error>;

/// Finds the endpoints, and keeps them for some time.
#[derive(Debug)]
pub(super) struct Finder {
    http: Arc<Http>,
    /// Name of the issuer in the configuration.
    name: String,
    issuer: String,
    discovery_url: String,
    allow_http: bool,
    authorization_url: Option<String>,
    token_url: Option<String>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    last: Option<Last>,
    /// The result of the fetch that was started last. The channel closes when the fetch ends.
    fetch: Option<watch::Receiver<Option<Found>>>,
}

/// The endpoints that are used, or the error of the last fetch if no fetch has succeeded.
#[derive(Debug)]
struct Last {
    found: Found,
    /// The time from which the discovery document is fetched again.
    due: Instant,
}

impl Finder {
    pub(super) fn new(http: Arc<Http>, issuer: &Issuer, settings: &Settings) -> Self {
        Self {
            http,
            name: issuer.name.clone(),
            issuer: issuer.issuer.clone(),
            discovery_url: issuer.discovery_place(),
            allow_http: issuer.allow_http,
            authorization_url: settings.authorization_url.clone(),
            token_url: settings.token_url.clone(),
            state: Mutex::default(),
        }
    }

    /// Returns the endpoints. Waits only if no endpoints are known.
    pub(super) async fn find(self: &Arc<Self>) -> Found {
        let mut fetch = {
            let mut state = self.state();
            let now = Instant::now();
            if let Some(last) = &state.last
                && now < last.due
            {
                return last.at(now);
            }
            let fetch = self.fetch(&mut state);
            // The endpoints rarely change, so no sign-in has to wait for the refresh.
            if let Some(Last {
                found: Ok(known), ..
            }) = &state.last
            {
                return Ok(Arc::clone(known));
            }
            fetch
        };
        let found = fetch.wait_for(Option::is_some).await.ok();
        let found = found.and_then(|found| found.clone());
        found.unwrap_or_else(|| {
            let detail =
                "sign-in: the task that fetches the discovery document ended without a result";
            Err(Error::new(Reason::Bug, detail))
        })
    }

    /// Returns the fetch in progress, or starts one. The fetch runs in a separate task, so that it also ends with a result if the
    /// caller disconnects.
    fn fetch(self: &Arc<Self>, state: &mut State) -> watch::Receiver<Option<Found>> {
        if let Some(running) = &state.fetch
            && running.has_changed().is_ok()
        {
            return running.clone();
        }
        let (sender, receiver) = watch::channel(None);
        let finder = Arc::clone(self);
        tokio::spawn(async move {
            let found = finder.look_up().await.map(Arc::new);
            // The result is kept before the channel closes, so that no caller starts another fetch in between.
            finder.keep(found.clone());
            sender.send(Some(found)).ok();
        });
        state.fetch = Some(receiver.clone());
        receiver
    }

    fn keep(&self, found: Found) {
        let now = Instant::now();
        let mut state = self.state();
        let (found, kept) = match (found, state.last.take()) {
            (Ok(found), _) => (Ok(found), KEPT),
            // An outage of the discovery document must not prevent sign-ins.
            (
                Err(error),
                Some(Last {
                    found: Ok(known), ..
                }),
            ) => {
                let error: String = error.to_string().chars().take(ERROR_CHARS_MAX).collect();
                tracing::warn!(
                    issuer = %self.name, ?error,
                    "the endpoints of the OpenID provider were not refreshed; the known endpoints stay in use"
                );
                (Ok(known), FAILURE_KEPT)
            }
            (Err(error), _) => (Err(error), FAILURE_KEPT),
        };
        state.last = Some(Last {
            found,
            due: now + kept,
        });
    }

    async fn look_up(&self) -> Result<Endpoints, Error> {
        if let (Some(authorization), Some(token)) = (&self.authorization_url, &self.token_url) {
            return self.checked(authorization, token);
        }
        let url = &self.discovery_url;
        let found = self.http.discovery(url, &self.issuer).await;
        let found = found.map_err(|error| unavailable(&chain(&error)))?;
        let missing =
            |name: &str| unavailable(&format!("{url}: the discovery document has no `{name}`"));
        let authorization = self.authorization_url.clone();
        let authorization = authorization.or(found.authorization_endpoint);
        let authorization = authorization.ok_or_else(|| missing("authorization_endpoint"))?;
        let token = self.token_url.clone().or(found.token_endpoint);
        let token = token.ok_or_else(|| missing("token_endpoint"))?;
        let methods = found.token_endpoint_auth_methods_supported.as_deref();
        let has = |name: &str| methods.is_some_and(|methods| methods.iter().any(|one| one == name));
        Ok(Endpoints {
            is_secret_in_form: has("client_secret_post") && !has("client_secret_basic"),
            has_issuer: found.authorization_response_iss_parameter_supported,
            ..self.checked(&authorization, &token)?
        })
    }

    fn checked(&self, authorization: &str, token: &str) -> Result<Endpoints, Error> {
        for (name, url) in [
            ("authorization endpoint", authorization),
            ("token endpoint", token),
        ] {
            if let Some(problem) = endpoint_problem(url, self.allow_http) {
                let shown: String = url.chars().take(URL_CHARS_MAX).collect();
                return Err(unavailable(&format!("{name} {shown:?}: {problem}")));
            }
        }
        let authorization = Url::parse(authorization)
            .map_err(|error| unavailable(&format!("authorization endpoint: {error}")))?;
        Ok(Endpoints {
            authorization,
            token: token.to_owned(),
            is_secret_in_form: false,
            has_issuer: false,
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Last {
    /// The result. The delay of an error ends when the discovery document is fetched again.
    fn at(&self, now: Instant) -> Found {
        let wait = self.due.saturating_duration_since(now);
        let found = self.found.clone();
        found.map_err(|error| error.retry_after(wait))
    }
}

/// Returns the reason why sign-ins must not use an endpoint, or `None` if the endpoint is accepted.
///
/// `allow_http` is the setting of the issuer. It is meant for fetching public keys. Sign-ins send the client secret, codes and ID
/// tokens, so the setting permits plain http only to a loopback address.
pub fn endpoint_problem(text: &str, allow_http: bool) -> Option<&'static str> {
    let Ok(url) = Url::parse(text) else {
        return Some("the value is not a URL");
    };
    if !url.username().is_empty() || url.password().is_some() {
        return Some(
            "this URL contains a user name or a password; use `client_id` and `client_secret_file` instead",
        );
    }
    match url.scheme() {
        "https" => None,
        "http" if !url.host_str().is_some_and(is_loopback_host) => Some(
            "this URL is plain http, so everyone on the network path could sign in as an approver; use https: \
             `allow_http` of the issuer permits plain http only to a loopback address, such as http://127.0.0.1:8080",
        ),
        "http" if !allow_http => Some(
            "this URL is plain http; use https, or set `allow_http = true` for the issuer, which permits http to a \
             loopback address",
        ),
        "http" => None,
        _ => Some("this URL is neither https nor http"),
    }
}

#[cfg(test)]
mod tests;
