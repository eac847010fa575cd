//! An identity service for tests: an RSA key of its own, a discovery document, a key set, and tokens as a test words them.
//!
//! It speaks plain HTTP on loopback, from a separate thread, so that blocking and asynchronous tests can use it. It assembles
//! access tokens itself, and not with the library that the broker verifies them with, because it must make bad ones.

use std::{
    collections::BTreeMap,
    net::{SocketAddr, TcpListener},
    sync::{Arc, Mutex, MutexGuard},
    thread,
    time::{SystemTime, UNIX_EPOCH},
};

use aws_lc_rs::{
    encoding::{AsDer as _, PublicKeyX509Der},
    hmac,
    rand::SystemRandom,
    rsa::{KeyPair, KeySize},
    signature::{
        KeyPair as _, RSA_PKCS1_SHA256, RSA_PKCS1_SHA384, RSA_PKCS1_SHA512, RSA_PSS_SHA256,
        RSA_PSS_SHA384, RSA_PSS_SHA512, RsaEncoding,
    },
};
use axum::{
    Router,
    body::Body,
    http::{Request, Response, StatusCode, Uri, header},
};
use base64ct::{Base64, Base64UrlUnpadded, Encoding as _};
use serde_json::{Map, Value, json};
use tokio::sync::oneshot;

use crate::ports::Port;

mod sign_in;

pub use sign_in::{AUTHORIZE, Client, TOKEN};

use sign_in::SignIns;

/// Path of the discovery document.
pub const DISCOVERY: &str = "/.well-known/openid-configuration";
/// Path of the key set.
pub const JWKS: &str = "/.well-known/jwks";
/// Path at which a program has a token made, from claims as JSON.
pub const MINT: &str = "/mint";
/// Path at which a program withdraws the key and takes a new one.
pub const ROTATE: &str = "/rotate";

/// How long a token is good for when its claims do not say.
const LIFETIME_SECONDS: u64 = 3_600;

/// What is otherwise than usual.
#[derive(Debug, Default)]
pub struct Options {
    /// Address to listen on; a free port of loopback when absent.
    pub address: Option<SocketAddr>,
    /// The `iss` of tokens and the `issuer` of discovery; the address as a URL when absent.
    pub issuer: Option<String>,
    /// Whether [`MINT`] and [`ROTATE`] are there: for programs that cannot call [`Identity::mint`].
    pub mints_over_http: bool,
    /// The clients for which persons can sign in.
    pub clients: Vec<Client>,
    /// The persons who can sign in, by their user names, and their claims.
    pub persons: BTreeMap<String, Value>,
}

/// An answer that takes the place of the usual one.
#[derive(Clone, Debug, Default)]
pub struct Answer {
    /// HTTP status; 0 is taken as 200.
    pub status: u16,
    /// `location` header.
    pub location: Option<String>,
    /// Body.
    pub body: String,
}

/// A running identity service.
#[derive(Debug)]
pub struct Identity {
    address: SocketAddr,
    /// Its port, unless the options have the address.
    _port: Option<Port>,
    service: Arc<Service>,
    running: Option<Running>,
}

#[derive(Debug)]
struct Running {
    stop: oneshot::Sender<()>,
    thread: thread::JoinHandle<()>,
}

#[derive(Debug)]
struct Service {
    issuer: String,
    url: String,
    mints_over_http: bool,
    state: Mutex<State>,
    sign_ins: SignIns,
}

#[derive(Debug, Default)]
struct State {
    /// Published keys; the last one signs.
    keys: Vec<Key>,
    keys_made: usize,
    fetches: BTreeMap<String, usize>,
    answers: BTreeMap<String, Answer>,
}

#[derive(Clone, Debug)]
struct Key {
    kid: String,
    pair: Arc<KeyPair>,
}

impl Identity {
    /// Starts the service with one key.
    pub fn start(options: Options) -> Self {
        let port = options.address.is_none().then(Port::reserve);
        let number = port.as_ref().map_or(0, Port::number);
        let own = SocketAddr::from(([127, 0, 0, 1], number));
        let listener = TcpListener::bind(options.address.unwrap_or(own)).unwrap();
        let address = listener.local_addr().unwrap();
        let url = format!("http://{address}");
        let service = Arc::new(Service {
            issuer: options.issuer.unwrap_or_else(|| url.clone()),
            url,
            mints_over_http: options.mints_over_http,
            state: Mutex::default(),
            sign_ins: SignIns::new(options.clients, options.persons),
        });
        service.state().add_key();
        Self {
            address,
            _port: port,
            running: Some(Running::on(listener, &service)),
            service,
        }
    }

    /// Where it listens, also while it is stopped.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Its URL, without a slash at the end.
    pub fn url(&self) -> &str {
        &self.service.url
    }

    /// The `iss` of its tokens.
    pub fn issuer(&self) -> &str {
        &self.service.issuer
    }

    /// Stops listening; [`Identity::resume`] listens on the same port again.
    pub fn stop(&mut self) {
        if let Some(running) = self.running.take() {
            running.stop.send(()).ok();
            running.thread.join().unwrap();
        }
    }

    /// Listens again.
    pub fn resume(&mut self) {
        assert!(self.running.is_none(), "it is not stopped");
        let listener = TcpListener::bind(self.address).unwrap();
        self.running = Some(Running::on(listener, &self.service));
    }

    /// Waits until the service is stopped from elsewhere: for programs.
    pub fn wait(mut self) {
        if let Some(running) = self.running.take() {
            let _stays_open_while_waiting = &running.stop;
            running.thread.join().unwrap();
        }
    }

    /// Withdraws all keys and signs with a new one.
    pub fn rotate_key(&self) {
        self.service.state().rotate();
    }

    /// Signs with a new key, and goes on publishing the others.
    pub fn add_key(&self) {
        self.service.state().add_key();
    }

    /// Name of the key that signs.
    pub fn kid(&self) -> String {
        self.service.state().signing().kid
    }

    /// The key that signs, as the PEM of its public half.
    pub fn pem(&self) -> String {
        self.service.state().signing().pem()
    }

    /// The key set as it is published.
    pub fn jwks(&self) -> Value {
        self.service.state().jwks()
    }

    /// How often a path was asked for.
    pub fn fetches(&self, path: &str) -> usize {
        let state = self.service.state();
        state.fetches.get(path).copied().unwrap_or(0)
    }

    /// Answers a path otherwise than usual; `None` as usual again.
    pub fn answer(&self, path: &str, answer: Option<Answer>) {
        let mut state = self.service.state();
        match answer {
            Some(answer) => state.answers.insert(path.to_owned(), answer),
            None => state.answers.remove(path),
        };
    }

    /// A signed token. What neither claims nor header say is as usual; a member that is `null` is left out.
    ///
    /// `alg` of the header decides how it is signed: `none` leaves the signature empty, and `HS256` takes the public key
    /// for the secret, as the attack does.
    pub fn mint(&self, claims: Value, header: Value) -> String {
        self.service.mint(claims, header)
    }

    /// A token as Bitwarden's identity service makes it after a single sign-on.
    pub fn user_token(&self, sub: &str) -> String {
        self.mint(user(sub), json!({}))
    }
}

impl Drop for Identity {
    fn drop(&mut self) {
        self.stop();
    }
}

/// The claims of Bitwarden's identity service for a user after a single sign-on.
pub fn user(sub: &str) -> Value {
    json!({
        "sub": sub,
        "scope": ["api", "offline_access"],
        "amr": ["external"],
        "client_id": "web",
        "email": "user@example.org",
        "email_verified": true,
        "auth_time": now(),
        "device": "0f7a6a3c-7c0a-4d6b-8c5e-2f5f0b1e7a11",
        "orguser": ["b8a3c0de-5a55-4c52-9d3e-6b2f3c4d5e6f"],
    })
}

/// Seconds since 1970.
pub fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    since.as_secs()
}

impl Running {
    fn on(listener: TcpListener, service: &Arc<Service>) -> Self {
        let (stop, stopped) = oneshot::channel::<()>();
        let service = Arc::clone(service);
        let thread = thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async {
                listener.set_nonblocking(true).unwrap();
                let listener = tokio::net::TcpListener::from_std(listener).unwrap();
                let router = Router::new().fallback(move |request| {
                    let service = Arc::clone(&service);
                    async move { service.respond(request).await }
                });
                // Dropping the runtime cuts what is open: a service that is down answers nobody.
                tokio::select! {
                    served = axum::serve(listener, router) => served.unwrap(),
                    _ = stopped => {}
                }
            });
        });
        Self { stop, thread }
    }
}

impl Service {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    async fn respond(&self, request: Request<Body>) -> Response<Body> {
        let path = Uri::path(request.uri()).to_owned();
        let answer = {
            let mut state = self.state();
            *state.fetches.entry(path.clone()).or_default() += 1;
            state.answers.get(&path).cloned()
        };
        if let Some(answer) = answer {
            let status = if answer.status == 0 {
                200
            } else {
                answer.status
            };
            let mut response = Response::builder().status(status);
            if let Some(location) = answer.location {
                response = response.header(header::LOCATION, location);
            }
            return response.body(Body::from(answer.body)).unwrap();
        }
        match path.as_str() {
            DISCOVERY => as_json(&self.discovery()),
            JWKS => as_json(&self.state().jwks()),
            AUTHORIZE => self.sign_ins.authorize(request).await,
            TOKEN => {
                let issue = |claims, header| self.mint(claims, header);
                self.sign_ins.exchange(request, issue).await
            }
            MINT if self.mints_over_http => self.mint_for(request).await,
            ROTATE if self.mints_over_http => {
                self.state().rotate();
                Response::new(Body::empty())
            }
            _ => text(StatusCode::NOT_FOUND, "nothing here\n".to_owned()),
        }
    }

    fn discovery(&self) -> Value {
        json!({
            "issuer": self.issuer,
            "jwks_uri": format!("{}{JWKS}", self.url),
            "authorization_endpoint": format!("{}{AUTHORIZE}", self.url),
            "token_endpoint": format!("{}{TOKEN}", self.url),
            "id_token_signing_alg_values_supported": ["RS256"],
            "code_challenge_methods_supported": ["S256"],
        })
    }

    /// Body: the claims; whatever else a user's token has is added.
    async fn mint_for(&self, request: Request<Body>) -> Response<Body> {
        let body = axum::body::to_bytes(request.into_body(), 65_536).await;
        let claims = body
            .ok()
            .and_then(|body| serde_json::from_slice::<Value>(&body).ok());
        let Some(Value::Object(wanted)) = claims else {
            let problem = "the body must be claims: a JSON object\n".to_owned();
            return text(StatusCode::BAD_REQUEST, problem);
        };
        let mut claims = user("");
        overlay(claims.as_object_mut().unwrap(), Value::Object(wanted));
        text(StatusCode::OK, self.mint(claims, json!({})))
    }

    fn mint(&self, claims: Value, header: Value) -> String {
        let key = self.state().signing();
        let mut full_header = json!({"alg": "RS256", "typ": "at+jwt", "kid": key.kid});
        overlay(full_header.as_object_mut().unwrap(), header);
        let now = now();
        let mut full_claims = json!({
            "iss": self.issuer,
            "nbf": now,
            "iat": now,
            "exp": now + LIFETIME_SECONDS,
        });
        overlay(full_claims.as_object_mut().unwrap(), claims);
        let encode = |part: &Value| Base64UrlUnpadded::encode_string(part.to_string().as_bytes());
        let message = format!("{}.{}", encode(&full_header), encode(&full_claims));
        let alg = full_header["alg"].as_str().unwrap_or("none");
        let signature = key.sign(alg, message.as_bytes());
        format!("{message}.{}", Base64UrlUnpadded::encode_string(&signature))
    }
}

impl State {
    fn signing(&self) -> Key {
        self.keys.last().unwrap().clone()
    }

    fn add_key(&mut self) {
        self.keys_made += 1;
        self.keys.push(Key {
            kid: format!("key-{}", self.keys_made),
            pair: Arc::new(KeyPair::generate(KeySize::Rsa2048).unwrap()),
        });
    }

    fn rotate(&mut self) {
        self.keys.clear();
        self.add_key();
    }

    fn jwks(&self) -> Value {
        json!({"keys": self.keys.iter().map(Key::jwk).collect::<Vec<_>>()})
    }
}

impl Key {
    fn jwk(&self) -> Value {
        let public = self.pair.public_key();
        let encode = |bytes: &[u8]| Base64UrlUnpadded::encode_string(bytes);
        json!({
            "kty": "RSA",
            "use": "sig",
            "alg": "RS256",
            "kid": self.kid,
            "n": encode(public.modulus().big_endian_without_leading_zero()),
            "e": encode(public.exponent().big_endian_without_leading_zero()),
        })
    }

    fn pem(&self) -> String {
        let der: PublicKeyX509Der<'_> = self.pair.public_key().as_der().unwrap();
        let text = Base64::encode_string(der.as_ref());
        let lines: Vec<&str> = text
            .as_bytes()
            .chunks(64)
            .map(|line| str::from_utf8(line).unwrap())
            .collect();
        format!(
            "-----BEGIN PUBLIC KEY-----\n{}\n-----END PUBLIC KEY-----\n",
            lines.join("\n")
        )
    }

    fn sign(&self, alg: &str, message: &[u8]) -> Vec<u8> {
        let padding: &'static dyn RsaEncoding = match alg {
            "HS256" => {
                let secret = hmac::Key::new(hmac::HMAC_SHA256, self.pem().as_bytes());
                return hmac::sign(&secret, message).as_ref().to_vec();
            }
            "RS256" => &RSA_PKCS1_SHA256,
            "RS384" => &RSA_PKCS1_SHA384,
            "RS512" => &RSA_PKCS1_SHA512,
            "PS256" => &RSA_PSS_SHA256,
            "PS384" => &RSA_PSS_SHA384,
            "PS512" => &RSA_PSS_SHA512,
            _ => return Vec::new(),
        };
        let mut signature = vec![0; self.pair.public_modulus_len()];
        self.pair
            .sign(padding, &SystemRandom::new(), message, &mut signature)
            .unwrap();
        signature
    }
}

/// Lays members over others; `null` takes one away.
fn overlay(onto: &mut Map<String, Value>, members: Value) {
    let Value::Object(members) = members else {
        panic!("not an object: {members}")
    };
    for (name, value) in members {
        if value.is_null() {
            onto.remove(&name);
        } else {
            onto.insert(name, value);
        }
    }
}

fn as_json(value: &Value) -> Response<Body> {
    let mut response = text(StatusCode::OK, value.to_string());
    let kind = header::HeaderValue::from_static("application/json");
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    response
}

fn text(status: StatusCode, body: String) -> Response<Body> {
    Response::builder()
        .status(status)
        .body(Body::from(body))
        .unwrap()
}
