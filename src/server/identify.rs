//! Who asks: the one place where credentials of calls become principals, before any door looks at a call.
//!
//! The certificate of a connection is asked about once. A call may bring a credential of its own, which then stands in its
//! place; the doors see the principal and never the credential.
//!
//! Mitigations: M2, M18 of `THREAT_MODEL.md`.

use std::{
    net::IpAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use axum::{
    Router,
    body::Body,
    extract::Request,
    http::{HeaderMap, HeaderValue, Response, header::AUTHORIZATION},
    middleware::{self, Next},
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::{
    auth::Authenticator,
    call::caller::Caller,
    error::{Error, Reason},
    limits::Limits,
    principal::Principal,
};

/// Whether anybody on a connection was recognised. Until then it holds one of the places for strangers.
#[derive(Debug)]
pub(super) struct Acquaintance {
    place: Mutex<Option<OwnedSemaphorePermit>>,
    known: AtomicBool,
}

impl Acquaintance {
    /// Of a connection whose certificate names a principal.
    pub(super) fn known() -> Self {
        Self {
            place: Mutex::default(),
            known: AtomicBool::new(true),
        }
    }

    /// Of any other, with a place if there is one.
    pub(super) fn stranger(places: &Arc<Semaphore>) -> Self {
        Self {
            place: Mutex::new(Arc::clone(places).try_acquire_owned().ok()),
            known: AtomicBool::new(false),
        }
    }

    pub(super) fn is_known(&self) -> bool {
        self.known.load(Ordering::Relaxed)
    }

    /// Whether the connection may go on.
    pub(super) fn has_place(&self) -> bool {
        self.is_known() || self.lock().is_some()
    }

    /// Somebody was recognised: the place is for the next stranger.
    pub(super) fn introduce(&self) {
        if !self.known.swap(true, Ordering::Relaxed) {
            drop(self.lock().take());
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<OwnedSemaphorePermit>> {
        self.place.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Knows credentials, and what their holders have left of their limits.
#[derive(Clone, Debug)]
pub(super) struct Identifier {
    pub(super) authenticator: Arc<Authenticator>,
    pub(super) limits: Arc<Limits>,
}

impl Identifier {
    /// Asks before every call of these routes.
    pub(super) fn wrap(self, routes: Router) -> Router {
        routes.layer(middleware::from_fn(move |request, next| {
            let identifier = self.clone();
            async move { identifier.run(request, next).await }
        }))
    }

    async fn run(self, mut request: Request, next: Next) -> Response<Body> {
        if let Some(caller) = request.extensions().get::<Caller>().cloned() {
            let identified = self.identify(&caller, request.headers()).await;
            if let Some(caller) = identified {
                if caller.is_known()
                    && let Some(acquaintance) = request.extensions().get::<Arc<Acquaintance>>()
                {
                    acquaintance.introduce();
                }
                request.extensions_mut().insert(caller);
            }
        }
        // Nothing behind here needs it, so nothing behind here can show it.
        request.headers_mut().remove(AUTHORIZATION);
        next.run(request).await
    }

    /// The caller of a call, if it is another one than that of the connection.
    async fn identify(&self, caller: &Caller, headers: &HeaderMap) -> Option<Caller> {
        let values = headers.get_all(AUTHORIZATION).iter();
        let values: Vec<&[u8]> = values.map(HeaderValue::as_bytes).collect();
        let found = if values.is_empty() {
            caller
                .principal()
                .cloned()
                .map_err(|error| Error::clone(error))
        } else {
            self.authenticate(&values, caller.peer().ip()).await
        };
        let admitted = found.and_then(|principal| {
            self.limits.take_calls(&principal, 1)?;
            Ok(principal)
        });
        let is_unchanged = values.is_empty() && admitted.is_ok() == caller.is_known();
        (!is_unchanged).then(|| caller.with_principal(admitted))
    }

    async fn authenticate(&self, values: &[&[u8]], peer: IpAddr) -> Result<Arc<Principal>, Error> {
        let budget = self.limits.check_address(peer);
        let found = self.authenticator.authenticate(values, budget).await;
        match found {
            Err(error) if error.reason() == Reason::Credential => {
                tracing::info!(peer = %peer, %error, "credential refused");
                self.limits.fail_address(peer)?;
                Err(error)
            }
            found => found,
        }
    }
}
