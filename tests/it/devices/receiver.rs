//! A receiver of notices: a real HTTPS server that keeps what it gets, and answers as a test says.

use std::{
    collections::{BTreeMap, VecDeque},
    fmt::Write as _,
    net::SocketAddr,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use aws_lc_rs::hmac;
use axum::{
    Router,
    body::Body,
    http::{HeaderMap, Method, Request, StatusCode},
};
use base64ct::{Base64, Encoding as _};
use serde_json::Value;

use crate::{https::Server, pki::Pki, ports::Port, process::until, softhsm::write_private};

const BODY_BYTES_MAX: usize = 64 * 1024;
/// The old and the new secret.
const SECRETS: [[u8; 32]; 2] = [[3; 32], [4; 32]];

/// What the receiver answers.
#[derive(Clone, Copy, Debug)]
pub(super) enum Answer {
    Status(u16),
    /// Nothing, for this time.
    Hang(Duration),
}

/// A request as it was received.
#[derive(Clone, Debug)]
pub(super) struct Received {
    pub(super) id: String,
    pub(super) time: u64,
    pub(super) text: String,
    pub(super) body: Value,
}

#[derive(Debug, Default)]
struct State {
    received: Vec<Received>,
    /// The next answers. After them, each answer is that of the member, [`State::usual`], or 204.
    answers: VecDeque<Answer>,
    of_members: BTreeMap<String, Answer>,
    usual: Option<Answer>,
}

pub(super) struct Receiver {
    pki: Pki,
    state: Arc<Mutex<State>>,
    server: Option<Server>,
    port: Port,
}

impl Receiver {
    pub(super) fn start() -> Self {
        let mut receiver = Self {
            pki: Pki::fresh(),
            state: Arc::default(),
            server: None,
            port: Port::reserve(),
        };
        receiver.resume();
        let secrets = SECRETS.map(|secret| format!("whsec_{}", Base64::encode_string(&secret)));
        write_private(&receiver.secret_file(), &(secrets.join("\n") + "\n"));
        receiver
    }

    /// Listens again, on the same port.
    pub(super) fn resume(&mut self) {
        let state = Arc::clone(&self.state);
        let router = Router::new().fallback(move |request| receive(Arc::clone(&state), request));
        let [certificate, key] = [
            self.pki.certificate_file("server"),
            self.pki.key_file("server"),
        ];
        let address = SocketAddr::from(([127, 0, 0, 1], self.port.number()));
        let server = Server::start(address, &certificate, &key, router);
        self.server = Some(server);
    }

    /// Stops listening.
    pub(super) fn stop(&mut self) {
        self.server = None;
    }

    pub(super) fn secret_file(&self) -> PathBuf {
        self.pki.ca_file().with_file_name("secret")
    }

    /// The section of the configuration, with more lines.
    pub(super) fn section(&self, lines: &str) -> String {
        self.section_trusting("ca", lines)
    }

    /// The section of the configuration with another CA.
    pub(super) fn section_trusting(&self, authority: &str, lines: &str) -> String {
        let mut text = String::new();
        let authority = self.pki.certificate_file(authority);
        write!(
            text,
            "\n[notices]\nurl = \"https://localhost:{}/hook?for=keybroker\"\nsecret_file = \"{}\"\nca_file = \"{}\"\n{lines}\n",
            self.port.number(),
            self.secret_file().display(),
            authority.display()
        )
        .unwrap();
        text
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    pub(super) fn answers(&self, answers: &[Answer]) {
        self.state().answers.extend(answers);
    }

    pub(super) fn always_answers(&self, answer: Answer) {
        self.state().usual = Some(answer);
    }

    /// Answers all notices about a member in this way.
    pub(super) fn answers_about(&self, user: &str, answer: Answer) {
        self.state().of_members.insert(user.to_owned(), answer);
    }

    pub(super) fn received(&self) -> Vec<Received> {
        self.state().received.clone()
    }

    /// Waits for this number of requests.
    pub(super) fn receives(&self, count: usize) -> Vec<Received> {
        until("the notices", || {
            let received = self.received();
            (received.len() >= count).then_some(received)
        })
    }
}

async fn receive(state: Arc<Mutex<State>>, request: Request<Body>) -> StatusCode {
    assert_eq!(request.method(), Method::POST);
    assert_eq!(request.uri().to_string(), "/hook?for=keybroker");
    let headers = request.headers().clone();
    let body = axum::body::to_bytes(request.into_body(), BODY_BYTES_MAX).await;
    let text = String::from_utf8(body.unwrap().to_vec()).unwrap();
    let received = verified(&headers, text);
    let answer = {
        let mut state = state.lock().unwrap();
        let user = received.body["data"]["user"].as_str().unwrap();
        let usual = state.of_members.get(user).copied().or(state.usual);
        state.received.push(received);
        state.answers.pop_front().or(usual)
    };
    match answer.unwrap_or(Answer::Status(204)) {
        Answer::Status(status) => StatusCode::from_u16(status).unwrap(),
        Answer::Hang(time) => {
            tokio::time::sleep(time).await;
            StatusCode::NO_CONTENT
        }
    }
}

/// Verifies the signatures as the specification says: over id, time and body, by each secret.
fn verified(headers: &HeaderMap, text: String) -> Received {
    let header = |name: &str| headers[name].to_str().unwrap().to_owned();
    assert_eq!(header("content-type"), "application/json");
    assert!(header("user-agent").starts_with("keybroker/"));
    let (id, time) = (header("webhook-id"), header("webhook-timestamp"));
    let signed = format!("{id}.{time}.{text}");
    let expected = SECRETS.map(|secret| {
        let key = hmac::Key::new(hmac::HMAC_SHA256, &secret);
        let tag = hmac::sign(&key, signed.as_bytes());
        format!("v1,{}", Base64::encode_string(tag.as_ref()))
    });
    assert_eq!(header("webhook-signature"), expected.join(" "));
    let time: u64 = time.parse().unwrap();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    assert!(now.as_secs().abs_diff(time) < 60, "{time}");
    Received {
        id,
        time,
        body: serde_json::from_str(&text).unwrap(),
        text,
    }
}
