//! What a sign-in at an OpenID provider begins and ends with.

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
