//! Authenticates calls. This middleware runs before an API handles the call, and is the only code that turns
//! credentials into principals.
//!
//! The certificate of a connection is evaluated once. If a call contains a credential, this
//! credential replaces the certificate. The APIs receive the principal but never the credential.
//!
//! Mitigations: M2, M18 of `THREAT_MODEL.md`.

use std::{net::IpAddr, sync::Arc};

use axum::{
    Router,
    body::Body,
    extract::Request,
    http::{HeaderMap, HeaderValue, Response, header::AUTHORIZATION},
    middleware::{self, Next},
};
use zeroize::Zeroizing;

use keybroker_auth as auth;
use keybroker_auth::Authenticator;
use keybroker_broker::limits::{Limits, shortened};
use keybroker_core::{
    call::caller::Caller,
    error::{Error, Reason},
    principal::Principal,
};

use super::unauthenticated::Authentication;

/// Authenticates credentials and applies the limits of principals and addresses.
#[derive(Clone, Debug)]
pub(super) struct Identifier {
    pub(super) authenticator: Arc<Authenticator>,
    pub(super) limits: Arc<Limits>,
}

impl Identifier {
    pub(super) fn new(authenticator: Authenticator, limits: Arc<Limits>) -> Self {
        Self {
            authenticator: Arc::new(authenticator),
            limits,
        }
    }

    /// Adds the authentication middleware to `routes`.
    pub(super) fn wrap(self, routes: Router) -> Router {
        routes.layer(middleware::from_fn(move |request, next| {
            let identifier = self.clone();
            async move { identifier.run(request, next).await }
        }))
    }

    async fn run(self, mut request: Request, next: Next) -> Response<Body> {
        // Remove the credential, so that no later handler can leak the credential.
        let credentials = take_credentials(request.headers_mut());
        let extensions = request.extensions();
        if let Some(caller) = extensions.get::<Caller>().cloned()
            && let Some(authentication) = extensions.get::<Arc<Authentication>>()
        {
            let credentials = credentials.filter(|_| authentication.accepts_credentials());
            let identified = self.identify(&caller, credentials.as_deref()).await;
            if let Some(caller) = identified {
                if let Ok(principal) = caller.principal() {
                    authentication.complete(principal);
                }
                request.extensions_mut().insert(caller);
            }
        }
        next.run(request).await
    }

    /// Returns the caller of a call if the call and the connection have different callers.
    async fn identify(
        &self,
        caller: &Caller,
        credentials: Option<&[HeaderValue]>,
    ) -> Option<Caller> {
        let found = match credentials {
            None => caller
                .principal()
                .cloned()
                .map_err(|error| Error::clone(error)),
            Some(values) => {
                let values: Vec<&[u8]> = values.iter().map(HeaderValue::as_bytes).collect();
                self.authenticate(&values, caller.peer().ip()).await
            }
        };
        let admitted = found.and_then(|principal| {
            self.limits.take_calls(&principal, 1)?;
            Ok(principal)
        });
        let is_unchanged = credentials.is_none() && admitted.is_ok() == caller.is_known();
        (!is_unchanged).then(|| caller.with_principal(admitted))
    }

    async fn authenticate(&self, values: &[&[u8]], peer: IpAddr) -> Result<Arc<Principal>, Error> {
        if !auth::is_costly(values) {
            return self.try_credential(values, peer).await;
        }
        // A separate task counts a failed attempt even if the caller closes the connection.
        let values: Vec<Zeroizing<Vec<u8>>> = values
            .iter()
            .map(|value| Zeroizing::new(value.to_vec()))
            .collect();
        let identifier = self.clone();
        let trying = tokio::spawn(async move {
            let values: Vec<&[u8]> = values.iter().map(|value| value.as_slice()).collect();
            identifier.try_credential(&values, peer).await
        });
        let panicked = |panic| Error::new(Reason::Bug, format!("authentication: {panic}"));
        trying.await.map_err(panicked)?
    }

    async fn try_credential(
        &self,
        values: &[&[u8]],
        peer: IpAddr,
    ) -> Result<Arc<Principal>, Error> {
        let budget = || {
            self.limits.check_address(peer)?;
            self.limits.take_turn(peer)
        };
        let found = self.authenticator.authenticate(values, budget).await;
        match found {
            // An expired credential does not count as a failed attempt, because its holder only has
            // to renew the credential.
            Err(error) if error.is_failed_attempt() => {
                match self.limits.fail_address(peer) {
                    // The code that refuses the call logs this error.
                    Ok(()) => Err(error),
                    Err(exhausted) => {
                        if self.limits.may_log(peer) {
                            let error = shortened(&error.to_string());
                            tracing::info!(peer = %peer, error, "credential refused");
                        }
                        Err(exhausted)
                    }
                }
            }
            found => found,
        }
    }
}

/// Removes the `authorization` headers of a call and returns their values; `None` if the call has
/// no such header.
fn take_credentials(headers: &mut HeaderMap) -> Option<Vec<HeaderValue>> {
    if !headers.contains_key(AUTHORIZATION) {
        return None;
    }
    let values = headers.get_all(AUTHORIZATION).iter().cloned().collect();
    headers.remove(AUTHORIZATION);
    Some(values)
}
