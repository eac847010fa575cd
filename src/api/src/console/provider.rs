//! The OpenID provider at which approvers sign in, as the page sees it.

use std::{fmt, sync::Arc, time::Duration};

use tonic::async_trait;

use keybroker_core::{
    error::Error,
    principal::Principal,
    sign_in::{Answer, Begun},
};

/// An OpenID provider.
#[async_trait]
pub trait Provider: fmt::Debug + Send + Sync {
    /// Begins a sign-in. With `max_age`, the provider must ask for the credentials again.
    async fn begin(&self, max_age: Option<Duration>) -> Result<Begun, Error>;

    /// Returns the principal that signed in.
    async fn finish(&self, answer: Answer) -> Result<Arc<Principal>, Error>;
}
