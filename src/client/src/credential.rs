//! Credentials that a call carries in its `authorization` header. A call without an `authorization` header
//! authenticates with the client certificate.

use std::{fmt, pin::Pin, sync::Arc};

use base64ct::{Base64, Encoding as _};
use keybroker_core::key::ClientId;
use tonic::metadata::{Ascii, MetadataValue};
use zeroize::Zeroizing;

use crate::error::{BoxError, BuildError};

macro_rules! secret_text {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        pub struct $name(Zeroizing<String>);

        impl $name {
            /// Takes ownership of the text, whose memory is overwritten when the value is dropped.
            pub fn new(text: impl Into<String>) -> Self {
                Self(Zeroizing::new(text.into()))
            }

            /// The text of the secret. Do not log the text.
            pub fn expose(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(concat!(stringify!($name), "(redacted)"))
            }
        }
    };
}

secret_text!(
    /// An access token of an OpenID provider that the broker trusts, sent as `authorization: Bearer`.
    BearerToken
);
secret_text!(
    /// The secret of an API client: `kbs_` followed by 43 characters.
    ClientSecret
);

type Provided = Pin<Box<dyn Future<Output = Result<BearerToken, BoxError>> + Send>>;

/// The source of the `authorization` header of an attempt.
#[derive(Clone)]
pub(crate) enum Credential {
    Certificate,
    Fixed(MetadataValue<Ascii>),
    Provider(Arc<dyn Fn() -> Provided + Send + Sync>),
}

impl Credential {
    pub(crate) fn bearer(token: &BearerToken) -> Result<Self, BuildError> {
        header("Bearer", token.expose())
            .map(Self::Fixed)
            .ok_or(BuildError::Credential("bearer token"))
    }

    /// Builds the header of HTTP Basic authentication (RFC 7617).
    pub(crate) fn api_client(id: ClientId, secret: &ClientSecret) -> Result<Self, BuildError> {
        let pair = Zeroizing::new(format!("{id}:{}", secret.expose()));
        let encoded = Zeroizing::new(Base64::encode_string(pair.as_bytes()));
        header("Basic", &encoded)
            .map(Self::Fixed)
            .ok_or(BuildError::Credential("client secret"))
    }

    pub(crate) fn provider<P, F>(provider: P) -> Self
    where
        P: Fn() -> F + Send + Sync + 'static,
        F: Future<Output = Result<BearerToken, BoxError>> + Send + 'static,
    {
        Self::Provider(Arc::new(move || Box::pin(provider())))
    }

    /// Returns the header of the next attempt.
    pub(crate) async fn header(&self) -> Result<Option<MetadataValue<Ascii>>, BoxError> {
        match self {
            Self::Certificate => Ok(None),
            Self::Fixed(value) => Ok(Some(value.clone())),
            Self::Provider(provider) => {
                let token = provider().await?;
                header("Bearer", token.expose())
                    .map(Some)
                    .ok_or_else(|| BuildError::Credential("bearer token").into())
            }
        }
    }
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Certificate => "Certificate",
            Self::Fixed(_) => "Fixed(redacted)",
            Self::Provider(_) => "Provider",
        })
    }
}

fn header(scheme: &str, text: &str) -> Option<MetadataValue<Ascii>> {
    let text = Zeroizing::new(format!("{scheme} {text}"));
    let mut value = MetadataValue::try_from(text.as_str()).ok()?;
    // A sensitive value does not appear in Debug output or in the connection's header compression table.
    value.set_sensitive(true);
    Some(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: ClientId = ClientId::from_bytes([7; 16]);

    async fn shown(credential: Credential) -> String {
        let value = credential.header().await.unwrap().unwrap();
        assert!(value.is_sensitive());
        value.to_str().unwrap().to_owned()
    }

    #[tokio::test]
    async fn an_api_client_is_basic_and_a_token_is_bearer() {
        let secret = ClientSecret::new("kbs_secret");
        let basic = shown(Credential::api_client(ID, &secret).unwrap()).await;
        let pair = Base64::decode_vec(basic.strip_prefix("Basic ").unwrap()).unwrap();
        assert_eq!(pair, format!("{ID}:kbs_secret").into_bytes());
        let fixed = Credential::bearer(&BearerToken::new("a.b.c")).unwrap();
        assert_eq!(shown(fixed).await, "Bearer a.b.c");
        let provider = Credential::provider(|| async { Ok(BearerToken::new("d.e.f")) });
        assert_eq!(shown(provider).await, "Bearer d.e.f");
        assert!(Credential::Certificate.header().await.unwrap().is_none());
    }

    #[tokio::test]
    async fn what_no_header_can_carry_is_refused_and_not_shown() {
        let error = Credential::bearer(&BearerToken::new("secret\n")).unwrap_err();
        assert!(!format!("{error:?} {error}").contains("secret\n"));
        let provider = Credential::provider(|| async { Ok(BearerToken::new("secret\n")) });
        let error = provider.header().await.unwrap_err();
        assert!(!format!("{error:?} {error}").contains("secret\n"));
    }

    #[test]
    fn debug_shows_no_secret() {
        let secret = ClientSecret::new("kbs_secret");
        let credential = Credential::api_client(ID, &secret).unwrap();
        for text in [format!("{secret:?}"), format!("{credential:?}")] {
            assert!(
                text.contains("redacted") && !text.contains("kbs_"),
                "{text}"
            );
        }
    }
}
