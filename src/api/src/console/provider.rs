//! The OpenID provider at which approvers sign in, as the page sees it.

use std::{fmt, sync::Arc, time::Duration};

use tonic::async_trait;

use keybroker_core::{error::Error, principal::Principal};

/// A sign-in that was begun. Everything but `url` is secret.
#[derive(Debug)]
pub struct Begun {
    /// Where the browser goes.
    pub url: String,
    /// The value that the browser must bring back.
    pub state: String,
    /// The value that the ID token must have.
    pub nonce: String,
    /// The PKCE verifier.
    pub verifier: String,
}

/// The answer of the provider, with the secrets of the sign-in.
#[derive(Debug)]
pub struct Answer {
    /// The code from the browser.
    pub code: String,
    /// The `iss` from the browser, if any (RFC 9207).
    pub issuer: Option<String>,
    /// The nonce of [`Begun`].
    pub nonce: String,
    /// The PKCE verifier of [`Begun`].
    pub verifier: String,
}

/// An OpenID provider.
#[async_trait]
pub trait Provider: fmt::Debug + Send + Sync {
    /// Begins a sign-in. With `max_age`, the provider must ask for the credentials again.
    async fn begin(&self, max_age: Option<Duration>) -> Result<Begun, Error>;

    /// Returns the principal that signed in.
    async fn finish(&self, answer: Answer) -> Result<Arc<Principal>, Error>;
}
