//! A broker with REST on three listeners, and clients for it.

use std::{
    fmt::Write as _,
    fs,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    sync::Arc,
    time::Duration,
};

use base64ct::{Base64, Encoding as _};
use reqwest::{Certificate, Client, Method, RequestBuilder, Response, StatusCode};
use serde_json::Value;

use crate::{
    client,
    identity::{Identity, Options as IdentityOptions},
    process::Broker,
    site::{Options, Site},
};

/// The user of most tests, as in a token.
pub(crate) const ADA: &str = "7d444840-9dc0-41d1-b245-5ffdce74fad2";
/// Another one.
pub(crate) const BOB: &str = "c1a0fd0c-3bd3-4a59-8a55-5f3b0c9a3d11";
/// The page that may ask.
pub(crate) const VAULT: &str = "https://vault.example.org";

/// A broker and the identity service whose tokens it believes.
pub(crate) struct RestSite {
    pub(crate) broker: Broker,
    pub(crate) identity: Identity,
    /// REST over TLS without client certificates.
    pub(crate) tls: SocketAddr,
    /// REST without TLS, as behind a proxy.
    pub(crate) plain: SocketAddr,
    client: Client,
}

impl RestSite {
    /// With the defaults.
    pub(crate) fn open() -> Self {
        Self::open_with(Options::default(), "", "")
    }

    /// With lines more in `[rest]` and in `[rates]`.
    pub(crate) fn open_with(options: Options, rest: &str, rates: &str) -> Self {
        let rest = format!("allowed_origins = [\"{VAULT}\"]\n{rest}");
        Self::configured(options, &rest, rates, "")
    }

    /// With other pages that may ask.
    pub(crate) fn open_for_pages(origins: &str) -> Self {
        let rest = format!("allowed_origins = [{origins}]");
        Self::configured(Options::default(), &rest, "", "")
    }

    /// With all of `[rest]`, and lines more in `[rates]` and in `[[issuer]]`.
    pub(crate) fn configured(options: Options, rest: &str, rates: &str, issuer: &str) -> Self {
        let lines = issuer;
        let identity = Identity::start(IdentityOptions::default());
        let site = Site::fresh(options);
        let (certificate, key) = (
            site.pki.certificate_file("server"),
            site.pki.key_file("server"),
        );
        site.write_configuration(|text| {
            *text = text.replace(r#"["grpc", "admin"]"#, r#"["grpc", "admin", "rest"]"#);
            write!(
                text,
                r#"
[rest]
{rest}

[rates]
{rates}

[[listener]]
address = "127.0.0.1:0"
apis = ["rest"]
client_certificates = "none"
tls = {{ certificate_file = "{certificate}", key_file = "{key}" }}

[[listener]]
address = "127.0.0.1:0"
apis = ["rest"]
client_certificates = "none"
plaintext = "loopback"

[[issuer]]
name = "bitwarden"
profile = "bitwarden"
issuer = "{issuer}"
allow_http = true
{lines}
"#,
                certificate = certificate.display(),
                key = key.display(),
                issuer = identity.issuer(),
            )
            .unwrap();
        });
        let broker = Broker::start_on(Arc::new(site));
        let [_, tls, plain] = broker.listeners[..] else {
            panic!("listeners {:?}", broker.listeners)
        };
        let client = http_client(&broker);
        Self {
            broker,
            identity,
            tls,
            plain,
            client,
        }
    }

    /// A token as a client gets one after a single sign-on.
    pub(crate) fn token(&self, user: &str) -> String {
        self.identity.user_token(user)
    }

    /// The same, with the connections of its client ended.
    pub(crate) fn without_connections(self) -> Self {
        let client = http_client(&self.broker);
        Self { client, ..self }
    }

    /// A request to the listener with TLS.
    pub(crate) fn request(&self, method: Method, path: &str) -> RequestBuilder {
        let url = format!("https://localhost:{}{path}", self.tls.port());
        self.client.request(method, url)
    }

    /// A request as the clients in TypeScript make it.
    pub(crate) fn as_user(&self, method: Method, user: &str) -> RequestBuilder {
        self.request(method, "/user-keys")
            .header("accept", "application/json")
            .bearer_auth(self.token(user))
            .header("bitwarden-client-name", "web")
            .header("bitwarden-client-version", "2026.11.0")
    }

    /// GET, as they make it.
    pub(crate) async fn get(&self, user: &str) -> Answer {
        let request = self
            .as_user(Method::GET, user)
            .header("cache-control", "no-store")
            .header("pragma", "no-cache");
        Answer::of(request.send().await.unwrap()).await
    }

    /// POST or PUT of a key.
    pub(crate) async fn store(&self, method: Method, user: &str, key: &[u8]) -> Answer {
        let body = body(&client::sending(key));
        self.send(method, user, "application/json; charset=utf-8", body)
            .await
    }

    /// POST or PUT of whatever it is.
    pub(crate) async fn send(
        &self,
        method: Method,
        user: &str,
        content_type: &str,
        body: impl Into<reqwest::Body>,
    ) -> Answer {
        let request = self
            .as_user(method, user)
            .header("content-type", content_type);
        Answer::of(request.body(body).send().await.unwrap()).await
    }

    /// Sends text to the listener without TLS and reads until it closes.
    pub(crate) fn raw(&self, text: &str) -> String {
        let mut stream = TcpStream::connect(self.plain).unwrap();
        let timeout = Some(Duration::from_secs(20));
        stream.set_read_timeout(timeout).unwrap();
        stream.write_all(text.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }
}

fn http_client(broker: &Broker) -> Client {
    // Fails only when another test of this process has done it.
    rustls::crypto::aws_lc_rs::default_provider()
        .install_default()
        .ok();
    let pem = fs::read(broker.site.pki.ca_file()).unwrap();
    Client::builder()
        .tls_certs_only([Certificate::from_pem(&pem).unwrap()])
        .no_proxy()
        .timeout(Duration::from_secs(30))
        .build()
        .unwrap()
}

/// The body of a POST.
pub(crate) fn body(key: &[u8]) -> String {
    format!(r#"{{"key":"{}"}}"#, Base64::encode_string(key))
}

/// An answer, read to its end.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: reqwest::header::HeaderMap,
    pub(crate) body: String,
}

impl Answer {
    pub(crate) async fn of(response: Response) -> Self {
        Self {
            status: response.status(),
            headers: response.headers().clone(),
            body: response.text().await.unwrap(),
        }
    }

    /// 200 without a body.
    #[track_caller]
    pub(crate) fn expect_stored(&self) {
        assert_eq!(
            (self.status.as_u16(), self.body.as_str()),
            (200, ""),
            "{self:?}"
        );
        assert_eq!(self.headers["cache-control"], "no-store");
    }

    /// 200 with the key and nothing else.
    #[track_caller]
    pub(crate) fn expect_key(&self, key: &[u8]) {
        assert_eq!(
            (self.status.as_u16(), &self.body),
            (200, &body(key)),
            "{self:?}"
        );
        assert_eq!(self.headers["cache-control"], "no-store");
        assert_eq!(self.headers["content-type"], "application/json");
    }

    /// An error with a body that says no more than it should.
    #[track_caller]
    pub(crate) fn expect_refused(&self, status: u16, reason: &str) {
        assert_eq!(self.status.as_u16(), status, "{self:?}");
        assert_eq!(self.headers["cache-control"], "no-store");
        assert_eq!(self.headers["content-type"], "application/json");
        let body: Value = serde_json::from_str(&self.body).unwrap();
        let names: Vec<&String> = body.as_object().unwrap().keys().collect();
        assert_eq!(names, ["object", "message", "reason", "call_id"]);
        assert_eq!(body["reason"], reason, "{self:?}");
        assert_eq!(body["object"], "error");
        let challenge = self.headers.get("www-authenticate");
        assert_eq!(
            challenge.is_some_and(|value| value == "Bearer"),
            status == 401
        );
        let retry = self.headers.get("retry-after");
        assert_eq!(retry.is_some(), [429, 503].contains(&status));
    }
}
