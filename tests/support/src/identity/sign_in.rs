//! The part of the identity service with which persons sign in: the authorization code flow of OpenID Connect, as a provider
//! behaves. It asks for a user name and nothing else, and remembers in a cookie who signed in, and when.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Mutex, MutexGuard},
};

use aws_lc_rs::digest;
use axum::{
    body::Body,
    http::{HeaderMap, Method, Request, Response, StatusCode, header},
};
use base64ct::{Base64, Base64UrlUnpadded, Encoding as _};
use serde_json::{Value, json};
use uuid::Uuid;

use super::{Identity, as_json, now, overlay, text};

/// Path at which a person signs in.
pub const AUTHORIZE: &str = "/authorize";
/// Path at which a client exchanges a code.
pub const TOKEN: &str = "/token";

/// How long a code can be exchanged.
const CODE_SECONDS: u64 = 60;
/// How long an ID token is good for.
const ID_TOKEN_SECONDS: u64 = 300;
const SESSION: &str = "provider-session";

/// A client of the service.
#[derive(Clone, Debug)]
pub struct Client {
    /// Its id.
    pub id: String,
    /// Its secret; without one, it is a public client.
    pub secret: Option<String>,
    /// The only URL to which the browser is sent back.
    pub redirect_uri: String,
}

#[derive(Debug)]
pub(super) struct SignIns {
    clients: Vec<Client>,
    persons: BTreeMap<String, Value>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    sessions: HashMap<String, Session>,
    codes: HashMap<String, Code>,
    /// Members of ID tokens that are otherwise than usual.
    claims: Option<Value>,
    header: Option<Value>,
    /// Whether the service signs persons in again without asking, although it is asked to ask.
    is_lax: bool,
}

#[derive(Clone, Debug)]
struct Session {
    person: String,
    at: u64,
}

/// What a code stands for. It is good once.
#[derive(Debug)]
struct Code {
    client: String,
    redirect_uri: String,
    challenge: String,
    nonce: Option<String>,
    session: Session,
    made: u64,
}

impl Identity {
    /// Makes the following ID tokens with other claims and another header; `null` takes a member away.
    pub fn change_id_tokens(&self, claims: Value, header: Value) {
        let mut state = self.service.sign_ins.state();
        state.claims = Some(claims);
        state.header = Some(header);
    }

    /// Makes ID tokens as usual again.
    pub fn restore_id_tokens(&self) {
        let mut state = self.service.sign_ins.state();
        (state.claims, state.header) = (None, None);
    }

    /// Makes all sign-ins so far this many seconds older.
    pub fn age_sign_ins(&self, seconds: u64) {
        for session in self.service.sign_ins.state().sessions.values_mut() {
            session.at -= seconds;
        }
    }

    /// Whether the service disregards `prompt` and `max_age`, which a provider must not.
    pub fn disregard_prompts(&self, is_lax: bool) {
        self.service.sign_ins.state().is_lax = is_lax;
    }
}

/// The members of a query or of a form.
type Fields = BTreeMap<String, String>;

fn fields(text: &[u8]) -> Fields {
    form_urlencoded::parse(text).into_owned().collect()
}

async fn body(request: Request<Body>) -> Fields {
    let bytes = axum::body::to_bytes(request.into_body(), 65_536).await;
    fields(&bytes.unwrap_or_default())
}

impl SignIns {
    pub(super) fn new(clients: Vec<Client>, persons: BTreeMap<String, Value>) -> Self {
        Self {
            clients,
            persons,
            state: Mutex::default(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// The authorization endpoint: shows the form, or sends the browser back with a code.
    pub(super) async fn authorize(&self, request: Request<Body>) -> Response<Body> {
        let query = fields(request.uri().query().unwrap_or_default().as_bytes());
        let field = |name: &str| query.get(name).map_or("", String::as_str);
        let client = self.clients.iter().find(|one| one.id == field("client_id"));
        // An unknown client or address gets no redirect.
        let Some(client) = client.filter(|one| one.redirect_uri == field("redirect_uri")) else {
            return text(
                StatusCode::BAD_REQUEST,
                "unknown client or redirect_uri\n".to_owned(),
            );
        };
        let is_openid = field("scope").split(' ').any(|scope| scope == "openid");
        let is_good = field("response_type") == "code"
            && is_openid
            && field("code_challenge_method") == "S256"
            && field("code_challenge").len() == 43;
        if !is_good {
            return back(client, &query, &[("error", "invalid_request")]);
        }
        let session = if *request.method() == Method::POST {
            let form = body(request).await;
            let name = form.get("username").cloned().unwrap_or_default();
            if form.contains_key("cancel") {
                return back(client, &query, &[("error", "access_denied")]);
            }
            if !self.persons.contains_key(&name) {
                return form_page("There is no such person.");
            }
            Session {
                person: name,
                at: now(),
            }
        } else {
            match self.known(request.headers(), &query) {
                Some(session) => session,
                None => return form_page("Sign in"),
            }
        };
        self.grant(client, &query, session)
    }

    /// The person who signed in before, unless the client wants a fresh sign-in.
    fn known(&self, headers: &HeaderMap, query: &Fields) -> Option<Session> {
        let state = self.state();
        let cookies = headers.get(header::COOKIE)?.to_str().ok()?;
        let mut cookies = cookies.split("; ").filter_map(|pair| pair.split_once('='));
        let (_, id) = cookies.find(|(name, _)| *name == SESSION)?;
        let session = state.sessions.get(id)?.clone();
        let max_age: Option<u64> = query.get("max_age").and_then(|age| age.parse().ok());
        let is_old = max_age.is_some_and(|age| now() - session.at > age);
        let must_ask = is_old || query.get("prompt").is_some_and(|prompt| prompt == "login");
        (state.is_lax || !must_ask).then_some(session)
    }

    fn grant(&self, client: &Client, query: &Fields, session: Session) -> Response<Body> {
        let (id, code) = (Uuid::new_v4().to_string(), Uuid::new_v4().to_string());
        let mut response = back(client, query, &[("code", &code)]);
        let cookie = format!("{SESSION}={id}; Path=/; HttpOnly; SameSite=Lax");
        let headers = response.headers_mut();
        headers.insert(header::SET_COOKIE, cookie.parse().unwrap());
        let mut state = self.state();
        state.sessions.insert(id, session.clone());
        let granted = Code {
            client: client.id.clone(),
            redirect_uri: client.redirect_uri.clone(),
            challenge: query["code_challenge"].clone(),
            nonce: query.get("nonce").cloned(),
            session,
            made: now(),
        };
        state.codes.insert(code, granted);
        response
    }

    /// The token endpoint: exchanges a code for an ID token.
    pub(super) async fn exchange(
        &self,
        request: Request<Body>,
        issue: impl Fn(Value, Value) -> String,
    ) -> Response<Body> {
        let basic = basic(request.headers());
        let form = body(request).await;
        let field = |name: &str| form.get(name).map_or("", String::as_str);
        let (id, secret) = match basic {
            Some((id, secret)) => (id, Some(secret)),
            None => (
                field("client_id").to_owned(),
                form.get("client_secret").cloned(),
            ),
        };
        let client = self.clients.iter().find(|one| one.id == id);
        let Some(client) = client.filter(|one| one.secret == secret) else {
            return problem(StatusCode::UNAUTHORIZED, "invalid_client");
        };
        if field("grant_type") != "authorization_code" {
            return problem(StatusCode::BAD_REQUEST, "unsupported_grant_type");
        }
        // A code is withdrawn by the first attempt, whether it succeeds or not.
        let Some(code) = self.state().codes.remove(field("code")) else {
            return problem(StatusCode::BAD_REQUEST, "invalid_grant");
        };
        let challenge = digest::digest(&digest::SHA256, field("code_verifier").as_bytes());
        let is_good = code.client == client.id
            && code.redirect_uri == field("redirect_uri")
            && code.challenge == Base64UrlUnpadded::encode_string(challenge.as_ref())
            && now() - code.made <= CODE_SECONDS;
        if !is_good {
            return problem(StatusCode::BAD_REQUEST, "invalid_grant");
        }
        let id_token = self.id_token(&code, issue);
        as_json(&json!({
            "access_token": Uuid::new_v4().to_string(),
            "token_type": "Bearer",
            "expires_in": ID_TOKEN_SECONDS,
            "id_token": id_token,
        }))
    }

    fn id_token(&self, code: &Code, issue: impl Fn(Value, Value) -> String) -> String {
        let mut claims = json!({
            "aud": code.client,
            "exp": now() + ID_TOKEN_SECONDS,
            "nbf": null,
            "nonce": code.nonce,
            "auth_time": code.session.at,
        });
        let members = claims.as_object_mut().unwrap();
        overlay(members, self.persons[&code.session.person].clone());
        let mut header = json!({"typ": "JWT"});
        let state = self.state();
        // `null` must reach `issue`, so that what the service adds is taken away.
        let add = |onto: &mut Value, changes: &Option<Value>| {
            for (name, value) in changes.iter().filter_map(Value::as_object).flatten() {
                onto[name] = value.clone();
            }
        };
        add(&mut claims, &state.claims);
        add(&mut header, &state.header);
        issue(claims, header)
    }
}

/// The id and the secret of a client in the header.
fn basic(headers: &HeaderMap) -> Option<(String, String)> {
    let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    let decoded = Base64::decode_vec(value.strip_prefix("Basic ")?).ok()?;
    let text = String::from_utf8(decoded).ok()?;
    let (id, secret) = text.split_once(':')?;
    let plain = |text: &str| {
        let pair = format!("x={text}");
        let mut pairs = form_urlencoded::parse(pair.as_bytes());
        pairs.next().map(|(_, value)| value.into_owned())
    };
    Some((plain(id)?, plain(secret)?))
}

/// Sends the browser back to the client.
fn back(client: &Client, query: &Fields, answer: &[(&str, &str)]) -> Response<Body> {
    let mut pairs = form_urlencoded::Serializer::new(String::new());
    pairs.extend_pairs(answer);
    if let Some(state) = query.get("state") {
        pairs.append_pair("state", state);
    }
    let location = format!("{}?{}", client.redirect_uri, pairs.finish());
    Response::builder()
        .status(StatusCode::FOUND)
        .header(header::LOCATION, location)
        .body(Body::empty())
        .unwrap()
}

/// The form is sent to the address of the page, which has the query.
fn form_page(what: &str) -> Response<Body> {
    let html = format!(
        "<!doctype html><html lang=\"en\"><title>{what}</title><form method=\"post\"><p>{what}</p><label>User name \
         <input id=\"username\" name=\"username\" autofocus></label><button id=\"enter\">Sign in</button>\
         <button name=\"cancel\" value=\"yes\" formnovalidate>Cancel</button></form></html>"
    );
    let mut response = text(StatusCode::OK, html);
    let kind = header::HeaderValue::from_static("text/html; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    response
}

fn problem(status: StatusCode, error: &str) -> Response<Body> {
    let mut response = as_json(&json!({ "error": error }));
    *response.status_mut() = status;
    response
}
