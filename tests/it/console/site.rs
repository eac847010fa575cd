//! A broker with the page for approvers, and an HTTP client that keeps cookies as a browser does.

use std::{collections::BTreeMap, fmt::Write as _, fs, sync::Mutex, time::Duration};

use reqwest::{Certificate, Client, Method, StatusCode, header::HeaderMap, redirect};
use serde_json::{Value, json};

use keybroker_proto::{self as proto, AccessApprover};

use crate::{
    devices::member::{App, Member},
    identity::{Client as Registered, Identity, Options as IdentityOptions, user},
    ports::Port,
    process::Broker,
    softhsm::write_private,
    tokens::{ADA, start_on, start_sealed_on},
};

/// The user ids of the approvers at the provider.
pub(crate) const CAROL: &str = "2c5ea4c0-4067-11e9-8bad-9b1deb4d3b7d";
pub(crate) const DAVE: &str = "1b9d6bcd-bbfd-4b2d-9b5d-ab8dfbbd4bed";

const CLIENT_ID: &str = "approvers page";
/// A secret whose form encoding differs from it.
const CLIENT_SECRET: &str = "s3cret: with + signs & more";

/// A broker with the page.
pub(crate) struct ConsoleSite {
    pub(crate) identity: Identity,
    pub(crate) broker: Broker,
    /// The origin of the page.
    pub(crate) origin: String,
    /// The port of the page. The provider must know the address of the page before the broker starts.
    _port: Port,
}

/// What a test wants otherwise than the default.
#[derive(Default)]
pub(crate) struct Wanted {
    /// Lines for the `[console]` section.
    pub(crate) console: &'static str,
    /// Lines for the `[devices]` section.
    pub(crate) devices: &'static str,
}

fn person(sub: &str, groups: &[&str]) -> Value {
    let mut claims = user(sub);
    claims["groups"] = json!(groups);
    // The provider says when the person signed in.
    claims.as_object_mut().unwrap().remove("auth_time");
    claims
}

/// Carol and Dave are approvers of all members, Erin only of another member, and Ada of none.
fn persons() -> BTreeMap<String, Value> {
    let erin = "8f14e45f-ceea-467f-a0e6-5b2b8d2f0a11";
    [
        ("carol", person(CAROL, &["approvers"])),
        ("dave", person(DAVE, &["staff", "approvers"])),
        ("erin", person(erin, &["approvers-of-bob"])),
        ("ada", person(ADA, &["staff"])),
    ]
    .map(|(name, claims)| (name.to_owned(), claims))
    .into()
}

impl ConsoleSite {
    pub(crate) fn open() -> Self {
        Self::open_with(&Wanted::default())
    }

    pub(crate) fn open_with(wanted: &Wanted) -> Self {
        let port = Port::reserve();
        let number = port.number();
        let origin = format!("https://localhost:{number}");
        let identity = Identity::start(IdentityOptions {
            clients: vec![Registered {
                id: CLIENT_ID.to_owned(),
                secret: Some(CLIENT_SECRET.to_owned()),
                redirect_uri: format!("{origin}/callback"),
            }],
            persons: persons(),
            ..IdentityOptions::default()
        });
        let broker = start_sealed_on(&identity, |site| {
            let secret = site.folder().join("client-secret");
            write_private(&secret, &format!("{CLIENT_SECRET}\n"));
            format!(
                r#"
[[issuer.mapping]]
name = "approvers"
when = [{{ claim = "groups", any_of = ["approvers"] }}]
roles = ["approver"]
users = ["*"]

[[issuer.mapping]]
name = "approvers-of-bob"
when = [{{ claim = "groups", any_of = ["approvers-of-bob"] }}]
roles = ["approver"]
users = ["bob"]

[[network]]
name = "loopback"
ranges = ["127.0.0.0/8"]

[devices]
{devices}

[console]
issuer = "vault"
client_id = "{CLIENT_ID}"
client_secret_file = "{secret}"
external_url = "{origin}"
{console}

[[listener]]
address = "127.0.0.1:{number}"
apis = ["console"]
client_certificates = "none"
tls = {{ certificate_file = "{certificate}", key_file = "{key}" }}
"#,
                secret = secret.display(),
                certificate = site.pki.certificate_file("server").display(),
                key = site.pki.key_file("server").display(),
                devices = wanted.devices,
                console = wanted.console,
            )
        });
        Self {
            identity,
            broker,
            origin,
            _port: port,
        }
    }

    /// The same site with another limit of failed attempts. The broker starts again.
    pub(crate) fn with_failures_per_minute(self, count: u32) -> Self {
        let (site, _) = self.broker.stop();
        site.edit_configuration(|text| {
            let before = "failures_per_minute = 100000";
            assert!(text.contains(before), "{text}");
            *text = text.replacen(before, &format!("failures_per_minute = {count}"), 1);
        });
        let broker = start_on(site);
        Self { broker, ..self }
    }

    /// Ada, with a user key and a trusted device.
    pub(crate) async fn ada(&self) -> (Member, App) {
        Member::with_first_device(&self.broker, &self.identity, ADA).await
    }

    /// A request of a new device of Ada to the approvers, as the new device sees it.
    pub(crate) async fn request(&self, ada: &Member, number: u8) -> proto::AccessRequest {
        let app = App::new(number);
        let made = ada.asks(&app, AccessApprover::Administrator).await;
        made.unwrap()
    }

    /// The audit entries of the broker with an action and a kind.
    pub(crate) fn entries(&self, action: &str) -> Vec<Value> {
        self.broker.site.entries(action)
    }
}

/// The address of a request on the page.
pub(crate) fn path_of(request: &proto::AccessRequest) -> String {
    format!("/requests/{}", hex::encode(&request.id))
}

/// The hidden words, with their numbers, as the member reads them to the approver who sees the page.
pub(crate) fn heard(html: &str, asked: &proto::AccessRequest) -> Vec<String> {
    let numbers = html.split(">Word ").skip(1);
    let numbers = numbers.map(|rest| rest.split(' ').next().unwrap().parse::<usize>().unwrap());
    numbers
        .map(|number| asked.phrase[number - 1].clone())
        .collect()
}

/// A text as a part of an address or of a form.
pub(crate) fn percent(text: &str) -> String {
    text.bytes().fold(String::new(), |mut encoded, byte| {
        write!(encoded, "%{byte:02x}").unwrap();
        encoded
    })
}

/// The fields of the form that approves.
pub(crate) fn approval<'a>(words: &'a [String], token: &'a str) -> [(&'static str, &'a str); 4] {
    [
        ("word-1", words[0].as_str()),
        ("word-2", words[1].as_str()),
        ("spoken", "yes"),
        ("token", token),
    ]
}

/// The token of the form that is sent to an address.
pub(crate) fn token_of(html: &str, action: &str) -> String {
    let (_, form) = html
        .split_once(&format!("action=\"{action}\""))
        .unwrap_or_else(|| panic!("no form for {action}: {html}"));
    let (_, value) = form.split_once("name=\"token\" value=\"").unwrap();
    value.split('"').next().unwrap().to_owned()
}

/// An answer, read to its end.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) html: String,
}

impl Answer {
    pub(crate) fn location(&self) -> &str {
        self.headers["location"].to_str().unwrap()
    }

    /// The `set-cookie` headers.
    pub(crate) fn cookies(&self) -> Vec<&str> {
        let cookies = self.headers.get_all("set-cookie").iter();
        cookies.map(|one| one.to_str().unwrap()).collect()
    }
}

/// A person with an HTTP client.
pub(crate) struct Visitor {
    client: Client,
    origin: String,
    /// Cookies of the page and of the provider.
    pub(crate) page: Mutex<BTreeMap<String, String>>,
    provider: Mutex<BTreeMap<String, String>>,
}

impl Visitor {
    pub(crate) fn new(site: &ConsoleSite) -> Self {
        rustls::crypto::aws_lc_rs::default_provider()
            .install_default()
            .ok();
        let pem = fs::read(site.broker.site.pki.ca_file()).unwrap();
        let client = Client::builder()
            .tls_certs_only([Certificate::from_pem(&pem).unwrap()])
            .no_proxy()
            .redirect(redirect::Policy::none())
            .timeout(Duration::from_secs(30))
            .build()
            .unwrap();
        Self {
            client,
            origin: site.origin.clone(),
            page: Mutex::default(),
            provider: Mutex::default(),
        }
    }

    /// A person who has signed in.
    pub(crate) async fn signed_in(site: &ConsoleSite, person: &str) -> Self {
        let visitor = Self::new(site);
        let answer = visitor.sign_in("/sign-in", person).await;
        assert_eq!(answer.status, StatusCode::OK, "{}", answer.html);
        assert!(answer.html.contains("You are signed in"), "{}", answer.html);
        visitor
    }

    /// The whole sign-in, and the answer of the page to the provider's redirect.
    pub(crate) async fn sign_in(&self, path: &str, person: &str) -> Answer {
        let callback = self.authorize(path, person).await;
        self.call_back(&callback).await
    }

    /// The sign-in up to the address to which the provider sends the browser back.
    pub(crate) async fn authorize(&self, path: &str, person: &str) -> String {
        let begun = self.get(path).await;
        assert_eq!(begun.status, StatusCode::SEE_OTHER, "{}", begun.html);
        let url = begun.location().to_owned();
        let mut answer = self.at_provider(&url, None).await;
        if answer.status == StatusCode::OK {
            answer = self.at_provider(&url, Some(person)).await;
        }
        assert_eq!(answer.status, StatusCode::FOUND, "{}", answer.html);
        answer.location().to_owned()
    }

    async fn at_provider(&self, url: &str, person: Option<&str>) -> Answer {
        let request = match person {
            None => self.client.get(url),
            Some(person) => self
                .client
                .post(url)
                .header("content-type", "application/x-www-form-urlencoded")
                .body(format!("username={person}")),
        };
        send(request, &self.provider).await
    }

    /// Follows the redirect of the provider. It comes from another site, so a browser does not send the session cookie.
    pub(crate) async fn call_back(&self, url: &str) -> Answer {
        let session = self.page.lock().unwrap().remove(SESSION);
        let answer = send(self.client.get(url), &self.page).await;
        if let Some(session) = session {
            let mut cookies = self.page.lock().unwrap();
            cookies.entry(SESSION.to_owned()).or_insert(session);
        }
        answer
    }

    pub(crate) async fn get(&self, path: &str) -> Answer {
        let url = format!("{}{path}", self.origin);
        send(self.client.get(url), &self.page).await
    }

    /// Any request with the cookies.
    pub(crate) async fn request(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: String,
    ) -> Answer {
        let url = format!("{}{path}", self.origin);
        let mut request = self.client.request(method, url).body(body);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        send(request, &self.page).await
    }

    /// Sends a form as a browser does.
    pub(crate) async fn post(&self, path: &str, fields: &[(&str, &str)]) -> Answer {
        let origin = self.origin.clone();
        self.post_from(&origin, path, fields).await
    }

    pub(crate) async fn post_from(
        &self,
        origin: &str,
        path: &str,
        fields: &[(&str, &str)],
    ) -> Answer {
        let pairs: Vec<String> = fields
            .iter()
            .map(|(name, value)| format!("{name}={}", percent(value)))
            .collect();
        let headers = [
            ("origin", origin),
            ("content-type", "application/x-www-form-urlencoded"),
        ];
        self.request(Method::POST, path, &headers, pairs.join("&"))
            .await
    }

    /// The page of a request, and the token of its form for approving.
    pub(crate) async fn form(&self, asked: &proto::AccessRequest) -> (String, String) {
        let html = self.get(&path_of(asked)).await.html;
        let token = token_of(&html, &format!("{}/approve", path_of(asked)));
        (html, token)
    }
}

pub(crate) const SESSION: &str = "__Host-keybroker-session";
pub(crate) const LOGIN: &str = "__Host-keybroker-login";

async fn send(
    request: reqwest::RequestBuilder,
    cookies: &Mutex<BTreeMap<String, String>>,
) -> Answer {
    let line: Vec<String> = {
        let cookies = cookies.lock().unwrap();
        cookies
            .iter()
            .map(|(name, value)| format!("{name}={value}"))
            .collect()
    };
    let request = if line.is_empty() {
        request
    } else {
        request.header("cookie", line.join("; "))
    };
    let response = request.send().await.unwrap();
    let answer = Answer {
        status: response.status(),
        headers: response.headers().clone(),
        html: response.text().await.unwrap(),
    };
    let mut cookies = cookies.lock().unwrap();
    for line in answer.cookies() {
        let (name, value) = line.split(';').next().unwrap().split_once('=').unwrap();
        if line.contains("Max-Age=0") {
            cookies.remove(name);
        } else {
            cookies.insert(name.to_owned(), value.to_owned());
        }
    }
    drop(cookies);
    answer
}
