//! A Bitwarden server for tests: the identity service and the endpoints with which an organisation approves devices. It is strict
//! about what it receives, and sends the fields that the real server sends. On command it is hostile.
//!
//! It speaks HTTPS on loopback with a certificate of the test, from a separate thread.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    path::Path,
    sync::{Arc, Mutex, MutexGuard},
    time::{Duration, Instant},
};

use axum::{
    Router,
    body::Body,
    http::{Method, Request, Response, StatusCode, Uri, header},
};
use base64ct::{Base64, Encoding as _};
use serde_json::{Value, json};

use crate::https::Server;

/// The personal API key of the administrator.
pub const CLIENT_ID: &str = "user.b63cd5cc-6b2e-4d0c-8b8a-1d2a1a1f5ed2";
/// Its secret.
pub const CLIENT_SECRET: &str = "jT5tB1kPq9SxWc3ZyV7uRn2M";
const ACCESS_TOKEN: &str = "eyJhbGciOiJSUzI1NiJ9.e30.c2lnbmF0dXJl";
/// The form with which a client logs in.
const LOGIN: [&str; 7] = [
    "client_id",
    "client_secret",
    "deviceIdentifier",
    "deviceName",
    "deviceType",
    "grant_type",
    "scope",
];
const BODY_BYTES_MAX: usize = 1024 * 1024;
/// Longest time for which an answer is held.
const HELD_MAX: Duration = Duration::from_mins(1);
const HELD_PAUSE: Duration = Duration::from_millis(10);

/// A member of the organisation.
#[derive(Clone, Debug)]
pub struct Member {
    /// The user.
    pub user: String,
    /// The membership.
    pub organization_user: String,
    /// The address.
    pub email: String,
    /// `ResetPasswordKey`; absent for a member who has not enrolled in account recovery.
    pub key: Option<String>,
}

/// A request of a new device.
#[derive(Clone, Debug)]
pub struct DeviceRequest {
    /// Its id.
    pub id: String,
    /// The member who requests.
    pub member: Member,
    /// SPKI in DER.
    pub public_key: Vec<u8>,
    /// The identifier of the device.
    pub device: String,
    /// The address from which it came.
    pub address: String,
    /// When it was made, as the server writes it.
    pub created: String,
}

/// What an administrator decided.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// The request.
    pub request: String,
    /// The user key for the device; absent for a denial.
    pub key: Option<String>,
    /// Whether the decision came in a call for several requests.
    pub is_bulk: bool,
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
    /// Whether the answer is held until [`Bitwarden::release`], or for a minute.
    pub is_held: bool,
}

/// A running server.
#[derive(Debug)]
pub struct Bitwarden {
    server: Server,
    organization: String,
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    organization: String,
    members: Vec<Member>,
    requests: Vec<DeviceRequest>,
    decisions: Vec<Decision>,
    answers: BTreeMap<String, Answer>,
    calls: Vec<String>,
    made: u32,
}

impl Bitwarden {
    /// Starts a server for one organisation, with the certificate and key of PEM files.
    pub fn start(organization: &str, certificate: &Path, key: &Path) -> Self {
        let state = Arc::new(Mutex::new(State {
            organization: organization.to_owned(),
            ..State::default()
        }));
        let shared = Arc::clone(&state);
        let router = Router::new().fallback(move |request| {
            let state = Arc::clone(&shared);
            async move { respond(&state, request).await }
        });
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        Self {
            server: Server::start(any, certificate, key, router),
            organization: organization.to_owned(),
            state,
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// URL of the API.
    pub fn api_url(&self) -> String {
        format!("https://localhost:{}/api", self.server.address().port())
    }

    /// URL of the identity service.
    pub fn identity_url(&self) -> String {
        format!(
            "https://localhost:{}/identity",
            self.server.address().port()
        )
    }

    /// Path of the organisation's requests.
    pub fn requests_path(&self) -> String {
        format!("/api/organizations/{}/auth-requests", self.organization)
    }

    /// Path of the details of a member.
    pub fn details_path(&self, member: &Member) -> String {
        format!(
            "/api/organizations/{}/users/{}/reset-password-details",
            self.organization, member.organization_user
        )
    }

    /// Adds a member with a wrapped user key.
    pub fn add_member(&self, email: &str, key: Option<&str>) -> Member {
        let mut state = self.state();
        let member = Member {
            user: state.fresh(),
            organization_user: state.fresh(),
            email: email.to_owned(),
            key: key.map(str::to_owned),
        };
        state.members.push(member.clone());
        member
    }

    /// Replaces the wrapped user key of a member.
    pub fn set_key(&self, member: &Member, key: Option<&str>) {
        let mut state = self.state();
        let found = state.members.iter_mut().find(|one| one.user == member.user);
        found.unwrap().key = key.map(str::to_owned);
    }

    /// Removes a member.
    pub fn remove_member(&self, member: &Member) {
        self.state().members.retain(|one| one.user != member.user);
    }

    /// Adds the request of a new device, made now, and returns its id.
    pub fn add_request(&self, member: &Member, device: &str, public_key: &[u8]) -> String {
        let mut state = self.state();
        let request = DeviceRequest {
            id: state.fresh(),
            member: member.clone(),
            public_key: public_key.to_vec(),
            device: device.to_owned(),
            address: "192.0.2.7".to_owned(),
            created: now(),
        };
        state.requests.push(request.clone());
        request.id
    }

    /// Changes a request.
    pub fn edit(&self, request: &str, edit: impl FnOnce(&mut DeviceRequest)) {
        let mut state = self.state();
        let found = state.requests.iter_mut().find(|one| one.id == request);
        edit(found.unwrap());
    }

    /// The decisions so far.
    pub fn decisions(&self) -> Vec<Decision> {
        self.state().decisions.clone()
    }

    /// The calls so far, each as method and path.
    pub fn calls(&self) -> Vec<String> {
        self.state().calls.clone()
    }

    /// Answers a path otherwise than usual; `None` as usual again.
    pub fn answer(&self, path: &str, answer: Option<Answer>) {
        let mut state = self.state();
        match answer {
            Some(answer) => state.answers.insert(path.to_owned(), answer),
            None => state.answers.remove(path),
        };
    }

    /// Sends the answer that is held for a path. Later calls of the path get the same answer at once.
    pub fn release(&self, path: &str) {
        self.state().answers.get_mut(path).unwrap().is_held = false;
    }
}

/// The current time as the server writes it.
fn now() -> String {
    at(0)
}

/// A time relative to now, in seconds, as the server writes it: with seven digits of a second.
pub fn at(seconds: i64) -> String {
    let at = time::OffsetDateTime::now_utc() + time::Duration::seconds(seconds);
    let text = at
        .replace_nanosecond(0)
        .unwrap()
        .format(&time::format_description::well_known::Rfc3339)
        .unwrap();
    text.replace('Z', ".1234567Z")
}

async fn respond(state: &Mutex<State>, request: Request<Body>) -> Response<Body> {
    let path = Uri::path(request.uri()).to_owned();
    let method = request.method().clone();
    let is_authorized = request
        .headers()
        .get(header::AUTHORIZATION)
        .is_some_and(|value| value.as_bytes() == format!("Bearer {ACCESS_TOKEN}").as_bytes());
    let kind = request.headers().get(header::CONTENT_TYPE).cloned();
    let kind = kind.map_or_else(String::new, |kind| kind.to_str().unwrap().to_owned());
    let body = axum::body::to_bytes(request.into_body(), BODY_BYTES_MAX)
        .await
        .unwrap();
    let answer = {
        let mut state = state.lock().unwrap();
        state.calls.push(format!("{method} {path}"));
        state.answers.get(&path).cloned()
    };
    if let Some(answer) = answer {
        held(state, &path).await;
        return instead(answer);
    }
    let mut state = state.lock().unwrap();
    if path == "/identity/connect/token" && method == Method::POST {
        return log_in(&kind, &body);
    }
    if !is_authorized {
        return refuse(StatusCode::UNAUTHORIZED, "Unauthorized.");
    }
    let Some(rest) = path.strip_prefix(&format!("/api/organizations/{}/", state.organization))
    else {
        return refuse(StatusCode::NOT_FOUND, "Resource not found.");
    };
    let parts: Vec<&str> = rest.split('/').collect();
    if method == Method::POST && kind != "application/json" {
        return refuse(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "Unsupported media type.",
        );
    }
    match (method.as_str(), &parts[..]) {
        ("GET", ["auth-requests"]) => json_answer(&state.list()),
        ("GET", ["users", id, "reset-password-details"]) => state.details(id),
        ("POST", ["auth-requests"]) => state.decide_many(&body),
        ("POST", ["auth-requests", "deny"]) => state.deny(&body),
        ("POST", ["auth-requests", id]) => state.decide_one(id, &body),
        _ => refuse(StatusCode::NOT_FOUND, "Resource not found."),
    }
}

/// Waits until the answer of a path is released.
async fn held(state: &Mutex<State>, path: &str) {
    let until = Instant::now() + HELD_MAX;
    while is_held(state, path) && Instant::now() < until {
        tokio::time::sleep(HELD_PAUSE).await;
    }
}

fn is_held(state: &Mutex<State>, path: &str) -> bool {
    let state = state.lock().unwrap();
    state.answers.get(path).is_some_and(|answer| answer.is_held)
}

fn instead(answer: Answer) -> Response<Body> {
    let status = if answer.status == 0 {
        200
    } else {
        answer.status
    };
    let mut response = Response::builder().status(status);
    if let Some(location) = answer.location {
        response = response.header(header::LOCATION, location);
    }
    response.body(Body::from(answer.body)).unwrap()
}

/// OAuth client credentials with the description of a device.
fn log_in(kind: &str, body: &[u8]) -> Response<Body> {
    let text = std::str::from_utf8(body).unwrap_or_default();
    // No value of this form needs an escape.
    let pairs: BTreeMap<&str, &str> = text
        .split('&')
        .filter_map(|pair| pair.split_once('='))
        .collect();
    let names: Vec<&str> = pairs.keys().copied().collect();
    let is_complete = names == LOGIN
        && kind.starts_with("application/x-www-form-urlencoded")
        && pairs["grant_type"] == "client_credentials"
        && pairs["scope"] == "api"
        && pairs["deviceType"].parse::<u8>().is_ok()
        && pairs["deviceIdentifier"].len() == 36;
    let is_known =
        is_complete && pairs["client_id"] == CLIENT_ID && pairs["client_secret"] == CLIENT_SECRET;
    if !is_known {
        let said = json!({"error": "invalid_client", "error_description": "invalid_client"});
        return with_status(StatusCode::BAD_REQUEST, &said);
    }
    json_answer(&json!({
        "access_token": ACCESS_TOKEN,
        "expires_in": 3_600,
        "token_type": "Bearer",
        "scope": "api",
        "Kdf": 0,
        "KdfIterations": 600_000,
        "KdfMemory": null,
        "KdfParallelism": null,
        "Key": null,
        "PrivateKey": null,
    }))
}

impl State {
    /// An identifier that no other thing has.
    fn fresh(&mut self) -> String {
        self.made += 1;
        uuid::Uuid::new_v4().to_string()
    }

    fn list(&self) -> Value {
        let data: Vec<Value> = self.requests.iter().map(pending).collect();
        json!({"object": "list", "data": data, "continuationToken": null})
    }

    fn details(&self, organization_user: &str) -> Response<Body> {
        let mut members = self.members.iter();
        match members.find(|one| one.organization_user == organization_user) {
            Some(member) => json_answer(&details(member)),
            None => refuse(StatusCode::NOT_FOUND, "Resource not found."),
        }
    }

    fn decide_one(&mut self, id: &str, body: &[u8]) -> Response<Body> {
        let Some([key, approved]) = fields(body, ["encryptedUserKey", "requestApproved"]) else {
            return refuse(StatusCode::BAD_REQUEST, "The model state is invalid.");
        };
        self.decide(vec![(id.to_owned(), key, approved)], false)
    }

    fn decide_many(&mut self, body: &[u8]) -> Response<Body> {
        let Ok(Value::Array(all)) = serde_json::from_slice(body) else {
            return refuse(StatusCode::BAD_REQUEST, "The model state is invalid.");
        };
        let mut decided = Vec::new();
        for one in all {
            let one = one.to_string();
            let Some([id, key, approved]) = fields(one.as_bytes(), ["id", "key", "approved"])
            else {
                return refuse(StatusCode::BAD_REQUEST, "The model state is invalid.");
            };
            decided.push((id.as_str().unwrap_or_default().to_owned(), key, approved));
        }
        self.decide(decided, true)
    }

    fn deny(&mut self, body: &[u8]) -> Response<Body> {
        let ids =
            fields(body, ["ids"]).and_then(|[ids]| serde_json::from_value::<Vec<String>>(ids).ok());
        let Some(ids) = ids else {
            return refuse(StatusCode::BAD_REQUEST, "The model state is invalid.");
        };
        let denied = ids.into_iter().map(|id| (id, Value::Null, json!(false)));
        self.decide(denied.collect(), true)
    }

    /// Decides all requests or none of them.
    fn decide(&mut self, decided: Vec<(String, Value, Value)>, is_bulk: bool) -> Response<Body> {
        let mut made = Vec::new();
        for (id, key, approved) in decided {
            if !self.requests.iter().any(|one| one.id == id) {
                let what = "This request is not pending: it was decided or has expired.";
                return refuse(StatusCode::BAD_REQUEST, what);
            }
            let key = match (approved, key) {
                (Value::Bool(true), Value::String(key)) if is_type_4(&key) => Some(key),
                (Value::Bool(false), _) => None,
                _ => return refuse(StatusCode::BAD_REQUEST, "The model state is invalid."),
            };
            made.push(Decision {
                request: id,
                key,
                is_bulk,
            });
        }
        self.requests
            .retain(|one| made.iter().all(|decision| decision.request != one.id));
        self.decisions.extend(made);
        Response::new(Body::empty())
    }
}

/// The fields of a request in the list.
fn pending(request: &DeviceRequest) -> Value {
    json!({
        "object": "pending-org-auth-request",
        "id": request.id,
        "userId": request.member.user,
        "organizationUserId": request.member.organization_user,
        "email": request.member.email,
        "publicKey": Base64::encode_string(&request.public_key),
        "requestDeviceIdentifier": request.device,
        "requestDeviceType": "Chrome",
        "requestIpAddress": request.address,
        "requestCountryName": null,
        "creationDate": request.created,
    })
}

/// The fields of the details of a member.
fn details(member: &Member) -> Value {
    json!({
        "object": "organizationUserResetPasswordDetails",
        "organizationUserId": member.organization_user,
        "kdf": 0,
        "kdfIterations": 600_000,
        "kdfMemory": null,
        "kdfParallelism": null,
        "masterPasswordSalt": member.email,
        "resetPasswordKey": member.key,
        "encryptedPrivateKey": "2.AAAAAAAAAAAAAAAAAAAAAA==|AAAAAAAAAAAAAAAAAAAAAA==|AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=",
    })
}

/// The values of a JSON object that has exactly these fields.
fn fields<const N: usize>(body: &[u8], names: [&str; N]) -> Option<[Value; N]> {
    let Ok(Value::Object(mut object)) = serde_json::from_slice(body) else {
        return None;
    };
    let values = names.map(|name| object.remove(name));
    let is_complete = object.is_empty() && values.iter().all(Option::is_some);
    is_complete.then(|| values.map(Option::unwrap))
}

/// Whether a text is an encrypted string of type 4 with 256 bytes.
fn is_type_4(text: &str) -> bool {
    let ciphertext = text.strip_prefix("4.").map(Base64::decode_vec);
    matches!(ciphertext, Some(Ok(bytes)) if bytes.len() == 256)
}

fn refuse(status: StatusCode, message: &str) -> Response<Body> {
    let said = json!({
        "message": message,
        "validationErrors": null,
        "exceptionMessage": null,
        "exceptionStackTrace": null,
        "innerExceptionMessage": null,
        "object": "error",
    });
    with_status(status, &said)
}

fn json_answer(value: &Value) -> Response<Body> {
    with_status(StatusCode::OK, value)
}

fn with_status(status: StatusCode, value: &Value) -> Response<Body> {
    Response::builder()
        .status(status)
        .header(header::CONTENT_TYPE, "application/json; charset=utf-8")
        .body(Body::from(value.to_string()))
        .unwrap()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(value: &Value) -> Vec<&str> {
        let mut names: Vec<&str> = value
            .as_object()
            .unwrap()
            .keys()
            .map(String::as_str)
            .collect();
        names.sort_unstable();
        names
    }

    /// The schemas of the server's API.
    #[test]
    fn answers_have_the_fields_of_the_real_server() {
        let member = Member {
            user: String::new(),
            organization_user: String::new(),
            email: String::new(),
            key: None,
        };
        let request = DeviceRequest {
            id: String::new(),
            member: member.clone(),
            public_key: Vec::new(),
            device: String::new(),
            address: String::new(),
            created: now(),
        };
        assert_eq!(
            names(&pending(&request)),
            [
                "creationDate",
                "email",
                "id",
                "object",
                "organizationUserId",
                "publicKey",
                "requestCountryName",
                "requestDeviceIdentifier",
                "requestDeviceType",
                "requestIpAddress",
                "userId",
            ]
        );
        assert_eq!(
            names(&details(&member)),
            [
                "encryptedPrivateKey",
                "kdf",
                "kdfIterations",
                "kdfMemory",
                "kdfParallelism",
                "masterPasswordSalt",
                "object",
                "organizationUserId",
                "resetPasswordKey",
            ]
        );
    }

    #[test]
    fn bodies_with_other_fields_are_refused() {
        let mut state = State::default();
        for body in [
            "",
            "{}",
            "[]",
            r#"{"requestApproved": true}"#,
            r#"{"encryptedUserKey": "4.AA==", "requestApproved": true}"#,
            r#"{"encryptedUserKey": null, "requestApproved": false, "more": 1}"#,
        ] {
            let answer = state.decide_one("x", body.as_bytes());
            assert_eq!(answer.status(), StatusCode::BAD_REQUEST, "{body}");
        }
        assert_eq!(
            state.deny(b"{\"ids\": 1}").status(),
            StatusCode::BAD_REQUEST
        );
        assert_eq!(
            log_in("application/x-www-form-urlencoded", b"scope=api").status(),
            StatusCode::BAD_REQUEST
        );
    }
}
