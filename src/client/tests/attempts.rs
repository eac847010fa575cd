//! Tests what a call sends in each attempt, against a loopback server that follows a script.

#![allow(
    clippy::unwrap_used,
    reason = "a test that meets a surprise stops there"
)]

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use keybroker_client::{
    BearerToken, Client, ClientBuilder, ErrorKind, KeyMaterial, ListUserKeys, Reason, RetryBudget,
    RetryPolicy, Revision, UserKeyRef, new_request_id, proto,
};
use proto::user_key_service_server::{UserKeyService, UserKeyServiceServer};
use tokio::net::TcpListener;
use tonic::{
    Code, Request, Response, Status,
    transport::{Endpoint, Server, server::TcpIncoming},
};
use tonic_types::{ErrorDetails, StatusExt as _};

const MATERIAL: &[u8] = b"material of this user";

/// The server's answer to an attempt.
enum Answer {
    Good,
    Refused(Reason, Option<Duration>),
    Plain(Status),
    /// The server gives no answer before the client gives up.
    Never,
}

/// The parts of an attempt that the tests check.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Seen {
    request_id: String,
    key_material: Vec<u8>,
    authorization: Option<String>,
    timeout_us: u64,
}

#[derive(Clone, Default)]
struct Script {
    answers: Arc<Mutex<VecDeque<Answer>>>,
    seen: Arc<Mutex<Vec<Seen>>>,
}

fn record() -> proto::UserKey {
    let at = Some(prost_types::Timestamp::default());
    proto::UserKey {
        user: "ada".to_owned(),
        key_name: "vault".to_owned(),
        record_id: vec![1; 16],
        state: proto::UserKeyState::Active.into(),
        revision: 1,
        wrapping_key_id: vec![2; 16],
        create_time: at,
        update_time: at,
        ..Default::default()
    }
}

impl Script {
    async fn answer<T, A>(
        &self,
        request: Request<T>,
        fields: impl FnOnce(T) -> (String, Vec<u8>),
        good: A,
    ) -> Result<Response<A>, Status> {
        let header = |name: &str| {
            let value = request.metadata().get(name)?;
            Some(value.to_str().unwrap().to_owned())
        };
        let (authorization, timeout) = (header("authorization"), header("grpc-timeout"));
        let timeout = timeout.expect("every call has a deadline");
        let (request_id, key_material) = fields(request.into_inner());
        self.seen.lock().unwrap().push(Seen {
            request_id,
            key_material,
            authorization,
            timeout_us: micros(&timeout),
        });
        let next = self.answers.lock().unwrap().pop_front();
        match next.expect("no more attempts than the script has") {
            Answer::Good => Ok(Response::new(good)),
            Answer::Plain(status) => Err(status),
            Answer::Refused(reason, delay) => {
                let mut details =
                    ErrorDetails::with_error_info(reason.as_str(), "keybroker.v1", HashMap::new());
                details.set_retry_info(delay);
                Err(Status::with_error_details(Code::Internal, "text", details))
            }
            Answer::Never => std::future::pending().await,
        }
    }
}

/// The value of `grpc-timeout`.
fn micros(text: &str) -> u64 {
    let (digits, unit) = text.split_at(text.len() - 1);
    let number: u64 = digits.parse().unwrap();
    match unit {
        "n" => number / 1_000,
        "u" => number,
        "m" => number * 1_000,
        "S" => number * 1_000_000,
        other => panic!("unit {other}"),
    }
}

fn unused() -> Status {
    Status::unimplemented("not called by these tests")
}

#[tonic::async_trait]
impl UserKeyService for Script {
    async fn create_user_key(
        &self,
        request: Request<proto::CreateUserKeyRequest>,
    ) -> Result<Response<proto::CreateUserKeyResponse>, Status> {
        let good = proto::CreateUserKeyResponse {
            user_key: Some(record()),
        };
        self.answer(request, |m| (m.request_id, m.key_material), good)
            .await
    }

    async fn replace_user_key(
        &self,
        request: Request<proto::ReplaceUserKeyRequest>,
    ) -> Result<Response<proto::ReplaceUserKeyResponse>, Status> {
        let good = proto::ReplaceUserKeyResponse {
            user_key: Some(record()),
        };
        self.answer(request, |m| (m.request_id, m.key_material), good)
            .await
    }

    async fn unwrap_user_key(
        &self,
        request: Request<proto::UnwrapUserKeyRequest>,
    ) -> Result<Response<proto::UnwrapUserKeyResponse>, Status> {
        let good = proto::UnwrapUserKeyResponse {
            key_material: MATERIAL.to_vec(),
            revision: 1,
            sealed: None,
        };
        self.answer(request, |_| Default::default(), good).await
    }

    async fn list_user_keys(
        &self,
        request: Request<proto::ListUserKeysRequest>,
    ) -> Result<Response<proto::ListUserKeysResponse>, Status> {
        let good = proto::ListUserKeysResponse {
            damaged: Vec::new(),
            user_keys: vec![record()],
            next_page_token: String::new(),
        };
        self.answer(request, |_| Default::default(), good).await
    }

    async fn batch_unwrap_user_keys(
        &self,
        _: Request<proto::BatchUnwrapUserKeysRequest>,
    ) -> Result<Response<proto::BatchUnwrapUserKeysResponse>, Status> {
        Err(unused())
    }

    async fn get_user_key(
        &self,
        _: Request<proto::GetUserKeyRequest>,
    ) -> Result<Response<proto::GetUserKeyResponse>, Status> {
        Err(unused())
    }

    async fn delete_user_key(
        &self,
        _: Request<proto::DeleteUserKeyRequest>,
    ) -> Result<Response<proto::DeleteUserKeyResponse>, Status> {
        Err(unused())
    }

    async fn undelete_user_key(
        &self,
        _: Request<proto::UndeleteUserKeyRequest>,
    ) -> Result<Response<proto::UndeleteUserKeyResponse>, Status> {
        Err(unused())
    }

    async fn restore_user_key_revision(
        &self,
        _: Request<proto::RestoreUserKeyRevisionRequest>,
    ) -> Result<Response<proto::RestoreUserKeyRevisionResponse>, Status> {
        Err(unused())
    }
}

/// Returns a client of a server with this script, and the script.
async fn client(
    answers: impl IntoIterator<Item = Answer>,
    set: impl FnOnce(ClientBuilder) -> ClientBuilder,
) -> (Client, Script) {
    let script = Script::default();
    script.answers.lock().unwrap().extend(answers);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let service = UserKeyServiceServer::new(script.clone());
    tokio::spawn(
        Server::builder()
            .add_service(service)
            .serve_with_incoming(TcpIncoming::from(listener)),
    );
    let channel = Endpoint::from_shared(format!("http://{address}"))
        .unwrap()
        .connect_lazy();
    let built = set(Client::builder_with_channel(channel)).build().unwrap();
    (built, script)
}

fn key() -> UserKeyRef {
    UserKeyRef::parse("ada", "vault").unwrap()
}

fn material() -> KeyMaterial {
    KeyMaterial::new(MATERIAL.to_vec()).unwrap()
}

const DOWN: Answer = Answer::Refused(Reason::TokenDown, None);

#[tokio::test]
async fn all_attempts_of_a_change_carry_one_request_id_and_the_material() {
    let script = [
        DOWN,
        Answer::Plain(Status::unavailable("proxy")),
        Answer::Refused(Reason::StoreDown, Some(Duration::from_millis(50))),
        Answer::Good,
    ];
    let (client, script) = client(script, |builder| builder).await;
    let began = Instant::now();
    let stored = client.create_user_key(&key(), &material()).await.unwrap();
    assert_eq!(stored.key, key());
    // 20, 40 and 80 ms, minus a fifth for jitter.
    assert!(began.elapsed() >= Duration::from_millis(112));
    let seen = script.seen.lock().unwrap();
    assert_eq!(seen.len(), 4);
    assert!(!seen[0].request_id.is_empty());
    for pair in seen.windows(2) {
        assert_eq!(pair[0].request_id, pair[1].request_id);
        assert!(pair[0].timeout_us > pair[1].timeout_us, "{pair:?}");
    }
    assert!(seen.iter().all(|seen| seen.key_material == MATERIAL));
}

#[tokio::test]
async fn two_changes_have_two_request_ids_unless_the_caller_sets_one() {
    let (client, script) = client([Answer::Good, Answer::Good, Answer::Good], |b| b).await;
    let id = new_request_id();
    let (key, material) = (key(), material());
    client.create_user_key(&key, &material).await.unwrap();
    let replace = || client.replace_user_key(&key, &material, Revision::FIRST);
    replace().await.unwrap();
    replace().request_id(id).await.unwrap();
    let seen = script.seen.lock().unwrap();
    assert_ne!(seen[0].request_id, seen[1].request_id);
    assert_eq!(seen[2].request_id, id.to_string());
}

#[tokio::test]
async fn a_final_refusal_ends_the_call_at_once() {
    let (client, script) = client([Answer::Refused(Reason::KeyExists, None)], |b| b).await;
    let (key, material) = (key(), material());
    let error = client.create_user_key(&key, &material).await.unwrap_err();
    assert_eq!(error.reason(), Some(Reason::KeyExists));
    assert_eq!((error.attempts(), error.outcome_unknown()), (1, false));
    assert_eq!(
        error.request_id().unwrap().to_string(),
        script.seen.lock().unwrap()[0].request_id
    );
}

#[tokio::test]
async fn a_deadline_ends_the_call_and_says_that_a_change_may_have_been_made() {
    let (client, _) = client([Answer::Never, Answer::Never], |builder| {
        builder.deadline(Duration::from_millis(200))
    })
    .await;
    let (key, material) = (key(), material());
    let began = Instant::now();
    let error = client.create_user_key(&key, &material).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::DeadlineExceeded, "{error:?}");
    assert!(error.outcome_unknown());
    assert!(began.elapsed() < Duration::from_secs(5));
    let read = client.unwrap_user_key(&key).await.unwrap_err();
    assert_eq!(read.kind(), ErrorKind::DeadlineExceeded);
    assert!(!read.outcome_unknown(), "a read changes nothing");
}

#[tokio::test]
async fn a_lost_answer_is_not_forgotten_when_a_later_attempt_is_refused() {
    let script = [
        Answer::Refused(Reason::Deadline, None),
        Answer::Refused(Reason::Credential, None),
    ];
    let (client, _) = client(script, |builder| builder).await;
    let (key, material) = (key(), material());
    let error = client.create_user_key(&key, &material).await.unwrap_err();
    assert_eq!(error.reason(), Some(Reason::Credential));
    assert_eq!((error.attempts(), error.outcome_unknown()), (2, true));
    assert!(error.to_string().contains("may or may not"), "{error}");
}

#[tokio::test]
async fn a_delay_beyond_the_deadline_is_not_waited_for() {
    let far = Answer::Refused(Reason::QueueFull, Some(Duration::from_mins(1)));
    let (client, _) = client([far], |builder| builder).await;
    let began = Instant::now();
    let error = client.unwrap_user_key(&key()).await.unwrap_err();
    assert_eq!(error.reason(), Some(Reason::QueueFull));
    assert_eq!(
        error.refusal().unwrap().retry_delay(),
        Some(Duration::from_mins(1))
    );
    assert!(began.elapsed() < Duration::from_secs(5));
}

#[tokio::test]
async fn the_budget_limits_the_retries_of_all_calls_together() {
    let script = [DOWN, DOWN, DOWN, DOWN];
    let (client, script) = client(script, |builder| {
        builder.retry(RetryPolicy {
            budget: RetryBudget {
                capacity: 2,
                per_second: 0,
            },
            ..RetryPolicy::default()
        })
    })
    .await;
    let first = client.unwrap_user_key(&key()).await.unwrap_err();
    assert_eq!(first.attempts(), 3);
    let second = client.clone().unwrap_user_key(&key()).await.unwrap_err();
    assert_eq!(second.attempts(), 1);
    assert_eq!(script.seen.lock().unwrap().len(), 4);
}

#[tokio::test]
async fn a_provider_is_asked_before_each_attempt_and_its_failure_sends_nothing() {
    let count = Arc::new(AtomicU32::new(0));
    let counted = Arc::clone(&count);
    let (client, script) = client([DOWN, Answer::Good], |builder| {
        builder.bearer_token_provider(move || {
            let number = counted.fetch_add(1, Ordering::Relaxed);
            async move {
                match number {
                    0 | 1 => Ok(BearerToken::new(format!("token-{number}"))),
                    _ => Err("the provider has no token".into()),
                }
            }
        })
    })
    .await;
    let list = ListUserKeys::default();
    let page = client.list_user_keys(&list).await.unwrap();
    assert_eq!((page.user_keys.len(), page.next_page_token), (1, None));
    let error = client.list_user_keys(&list).await.unwrap_err();
    assert_eq!((error.kind(), error.attempts()), (ErrorKind::Credential, 0));
    let source = std::error::Error::source(&error).unwrap();
    assert_eq!(source.to_string(), "the provider has no token");
    let seen = script.seen.lock().unwrap();
    let sent: Vec<_> = seen
        .iter()
        .map(|seen| seen.authorization.as_deref())
        .collect();
    assert_eq!(sent, [Some("Bearer token-0"), Some("Bearer token-1")]);
}

#[tokio::test]
async fn an_address_where_nothing_listens_is_a_connection_error_and_changes_nothing() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let channel = Endpoint::from_shared(format!("http://{address}"))
        .unwrap()
        .connect_lazy();
    let client = Client::builder_with_channel(channel)
        .retry(RetryPolicy {
            max_connection_attempts: 3,
            ..RetryPolicy::default()
        })
        .build()
        .unwrap();
    let (key, material) = (key(), material());
    let error = client.create_user_key(&key, &material).await.unwrap_err();
    assert_eq!((error.kind(), error.attempts()), (ErrorKind::Connection, 3));
    assert!(!error.outcome_unknown(), "{error:?}");
}
