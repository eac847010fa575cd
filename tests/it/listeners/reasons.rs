//! Every method in every plight: which reason a caller reads when something is wrong that is not the message.
//!
//! What is wrong with messages is in `methods`, callers without a principal are in `answers`, rows that were tampered with in
//! `rows`.

use std::{fs, sync::Arc, time::Duration};

use keybroker_proto::{
    AddClientSecretRequest, BatchUnwrapUserKeysRequest, BatchUnwrapUserKeysResponse,
    CreateClientCredentialRequest, CreateUserKeyRequest, DeleteUserKeyRequest, GetUserKeyRequest,
    GetWrappingKeyRequest, ReplaceUserKeyRequest, RestoreUserKeyRevisionRequest,
    RevokeClientCredentialRequest, UndeleteUserKeyRequest, UnwrapUserKeyRequest,
    batch_unwrap_result::Result as Item,
};
use prost::Message as _;
use rustix::process::Signal;

use super::{
    methods,
    raw::{Answer, Raw, frame},
};
use crate::{
    bad_inputs::limit_files,
    client::{Caller, NAME, reason},
    process::{Broker, freeze, send, until},
    site::{Options, Site, WriteLock},
    wire::get,
};

const MATERIAL: &[u8] = b"material of this user";

/// An administrator may grant the role that the calls below ask for.
fn options() -> Options {
    Options {
        limits: "\n[client_credentials]\ngrantable_roles = [\"enrol\"]".to_owned(),
        ..Options::default()
    }
}

/// The methods on user keys, and those that read the state, change API clients or move rows. What changes wrapping keys is in
/// `keys`.
const METHODS: [(&str, &str); 21] = *methods::METHODS
    .first_chunk()
    .expect("there are more methods");

/// What each method answers, in the order of [`METHODS`]; `OK` where the plight does not touch it.
type Expected = [&'static str; 21];

/// How every method is asked once.
#[derive(Clone, Copy)]
struct Asked {
    /// Whose keys: each method has its own user, so that none finds what another did.
    users: &'static str,
    /// Who asks; absent for whoever may.
    caller: Option<&'static str>,
    expected_revision: u64,
    request_id: &'static str,
    timeout: &'static str,
}

impl Asked {
    fn about(users: &'static str) -> Self {
        Self {
            users,
            caller: None,
            expected_revision: 1,
            request_id: "",
            timeout: "20S",
        }
    }

    /// A user for each method, enrolled; but for the one who is to be created.
    async fn enrolled(broker: &Broker, users: &'static str) -> Self {
        let enroller = Caller::of(broker, "enroller");
        for (number, (path, _)) in METHODS.into_iter().enumerate().skip(1) {
            let user = format!("{users} {number}");
            enroller.create(&user, MATERIAL).await.unwrap();
            if path.ends_with("RestoreUserKeyRevision") {
                enroller.replace(&user, b"later", 1, "").await.unwrap();
            }
        }
        Self::about(users)
    }

    async fn expect(self, broker: &Broker, expected: &Expected) {
        let mut reasons = Vec::new();
        for (number, (path, usual)) in METHODS.into_iter().enumerate() {
            let name = self.caller.unwrap_or(usual);
            let raw = Raw::connect(&broker.site.pki, Some(name), broker.grpc).await;
            let message = frame(&self.message(path, format!("{} {number}", self.users)));
            let timeout = [("grpc-timeout", self.timeout)];
            let answer = raw.post(path, message, &timeout).await.unwrap();
            reasons.push(reason_of(path, &answer));
        }
        let names = METHODS.map(|(path, _)| path.rsplit('/').next().unwrap());
        let found: Vec<_> = names.into_iter().zip(reasons).collect();
        let wanted = names.into_iter().zip(expected.map(str::to_owned));
        assert_eq!(found, wanted.collect::<Vec<_>>(), "{}", self.users);
    }

    #[expect(clippy::too_many_lines, reason = "a table")]
    fn message(&self, path: &str, user: String) -> Vec<u8> {
        let key_name = NAME.to_owned();
        let key_material = MATERIAL.to_vec();
        let request_id = self.request_id.to_owned();
        let expected_revision = self.expected_revision;
        match path.rsplit('/').next().unwrap() {
            "CreateUserKey" => CreateUserKeyRequest {
                user,
                key_name,
                key_material,
                request_id,
            }
            .encode_to_vec(),
            "UnwrapUserKey" => UnwrapUserKeyRequest {
                user,
                key_name,
                recipient: None,
            }
            .encode_to_vec(),
            "BatchUnwrapUserKeys" => {
                let items = vec![UnwrapUserKeyRequest {
                    user,
                    key_name,
                    recipient: None,
                }];
                BatchUnwrapUserKeysRequest { items }.encode_to_vec()
            }
            "ReplaceUserKey" => ReplaceUserKeyRequest {
                user,
                key_name,
                key_material,
                expected_revision,
                request_id,
            }
            .encode_to_vec(),
            "GetUserKey" => GetUserKeyRequest { user, key_name }.encode_to_vec(),
            "DeleteUserKey" => DeleteUserKeyRequest {
                user,
                key_name,
                expected_revision,
                request_id,
            }
            .encode_to_vec(),
            "UndeleteUserKey" => UndeleteUserKeyRequest {
                user,
                key_name,
                request_id,
            }
            .encode_to_vec(),
            "RestoreUserKeyRevision" => RestoreUserKeyRevisionRequest {
                user,
                key_name,
                revision: 1,
                // Its record has been replaced once.
                expected_revision: expected_revision + 1,
                request_id,
            }
            .encode_to_vec(),
            "GetWrappingKey" => GetWrappingKeyRequest { id: vec![0; 16] }.encode_to_vec(),
            "CreateClientCredential" => CreateClientCredentialRequest {
                label: "a service".to_owned(),
                roles: vec!["enrol".to_owned()],
                ..Default::default()
            }
            .encode_to_vec(),
            "AddClientSecret" => AddClientSecretRequest {
                id: "00".repeat(16),
                expire_time: None,
            }
            .encode_to_vec(),
            "RevokeClientCredential" => RevokeClientCredentialRequest {
                id: "00".repeat(16),
                secret_number: None,
            }
            .encode_to_vec(),
            // The others take an empty message.
            _ => Vec::new(),
        }
    }
}

/// The reason, also where a batch has it in its one item.
fn reason_of(path: &str, answer: &Answer) -> String {
    let status = answer.status();
    if status.code() != tonic::Code::Ok {
        return reason(&status);
    }
    if !path.ends_with("BatchUnwrapUserKeys") {
        return "OK".to_owned();
    }
    let mut response = BatchUnwrapUserKeysResponse::decode(&answer.body[5..]).unwrap();
    match response.results.remove(0).result.unwrap() {
        Item::Released(_) => "OK".to_owned(),
        Item::Error(error) => error.reason,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn while_all_is_well() {
    const ABSENT: &str = "KEY_NOT_FOUND";
    let broker = Broker::start(options());
    Asked::enrolled(&broker, "present")
        .await
        .expect(
            &broker,
            &[
                "OK",
                "OK",
                "OK",
                "OK",
                "OK",
                "OK",
                "OK",
                "KEY_EXISTS",
                "OK",
                "OK",
                ABSENT,
                "OK",
                "OK",
                "OK",
                ABSENT,
                "OK",
                ABSENT,
                "OK",
                "OK",
                "OK",
                "OK",
            ],
        )
        .await;
    Asked::about("absent")
        .expect(
            &broker,
            &[
                "OK", ABSENT, ABSENT, ABSENT, ABSENT, "OK", ABSENT, ABSENT, ABSENT, "OK", ABSENT,
                "OK", "OK", "OK", ABSENT, "OK", ABSENT, "OK", "OK", "OK", "OK",
            ],
        )
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_requests_that_come_too_late() {
    const ABSENT: &str = "KEY_NOT_FOUND";
    const REUSED: &str = "REQUEST_ID_REUSED";
    let broker = Broker::start(options());
    let asked = Asked::enrolled(&broker, "stale").await;
    Asked {
        expected_revision: 7,
        ..asked
    }
    .expect(
        &broker,
        &[
            "OK",
            "OK",
            "OK",
            "REVISION",
            "OK",
            "OK",
            "REVISION",
            "KEY_EXISTS",
            "REVISION",
            "OK",
            ABSENT,
            "OK",
            "OK",
            "OK",
            ABSENT,
            "OK",
            ABSENT,
            "OK",
            "OK",
            "OK",
            "OK",
        ],
    )
    .await;
    // An id is a principal's own: the first of lifecycle's three methods finds it unused.
    let asked = Asked::enrolled(&broker, "reused").await;
    Asked {
        request_id: "01890a5d-ac96-774b-bcce-b302099a8057",
        ..asked
    }
    .expect(
        &broker,
        &[
            "OK", "OK", "OK", REUSED, "OK", "OK", "OK", REUSED, REUSED, "OK", ABSENT, "OK", "OK",
            "OK", ABSENT, "OK", ABSENT, "OK", "OK", "OK", "OK",
        ],
    )
    .await;
    let late = Asked::enrolled(&broker, "late").await;
    Asked {
        timeout: "1n",
        ..late
    }
    .expect(&broker, &["DEADLINE"; 21])
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_callers_without_the_role() {
    let broker = Broker::start(options());
    for (caller, methods) in [("admin", 0..9), ("releaser", 9..21)] {
        let denied = Asked {
            caller: Some(caller),
            ..Asked::about("denied")
        };
        let raw = Raw::connect(&broker.site.pki, Some(caller), broker.grpc).await;
        for (path, _) in &METHODS[methods] {
            let message = frame(&denied.message(path, "anybody".to_owned()));
            let answer = raw.post(path, message, &[]).await.unwrap();
            assert_eq!(reason_of(path, &answer), "POLICY", "{path}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn while_the_audit_log_is_full() {
    let broker = Broker::start_limited(Arc::new(Site::fresh(options())));
    let asked = Asked::enrolled(&broker, "user").await;
    limit_files(&broker, 0);
    asked.expect(&broker, &["AUDIT_DOWN"; 21]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn while_the_token_is_down() {
    const DOWN: &str = "TOKEN_DOWN";
    let broker = Broker::start(options());
    let asked = Asked::enrolled(&broker, "user").await;
    let directory = broker.site.token.directory();
    let elsewhere = directory.with_extension("moved");
    fs::rename(&directory, &elsewhere).unwrap();
    fs::create_dir(&directory).unwrap();
    for pid in broker.workers() {
        send(pid, Signal::KILL);
    }
    let releaser = Caller::of(&broker, "releaser");
    for _ in 0..100 {
        let unwrapped = releaser.unwrap("user 1").await;
        if unwrapped.is_err_and(|status| reason(&status) == DOWN) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    // What is known without the token is still said, and what needs none of it still done.
    asked
        .expect(
            &broker,
            &[
                DOWN,
                DOWN,
                DOWN,
                DOWN,
                "OK",
                "OK",
                "OK",
                "KEY_EXISTS",
                DOWN,
                "OK",
                "KEY_NOT_FOUND",
                "OK",
                "OK",
                DOWN,
                "KEY_NOT_FOUND",
                "OK",
                "KEY_NOT_FOUND",
                "OK",
                "OK",
                "OK",
                "OK",
            ],
        )
        .await;
    fs::remove_dir_all(&directory).unwrap();
    fs::rename(&elsewhere, &directory).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn while_the_queue_is_full() {
    const FULL: &str = "QUEUE_FULL";
    let site = Site::fresh(Options {
        sessions_per_worker: 1,
        ..options()
    });
    site.write_configuration(|text| {
        *text = text.replace("[token]\n", "[token]\nqueue_length_max = 1\n");
    });
    let broker = Broker::start_on(Arc::new(site));
    let asked = Asked::enrolled(&broker, "user").await;
    let workers = broker.workers();
    for pid in &workers {
        freeze(*pid);
    }
    // One on the token, one in the queue.
    let releaser = Caller::of(&broker, "releaser");
    let waiting: Vec<_> = (0..2)
        .map(|_| {
            let releaser = releaser.clone();
            tokio::spawn(async move { releaser.unwrap("user 1").await })
        })
        .collect();
    until("the queue to fill", || {
        get(broker.status, "/metrics")
            .contains("keybroker_calls_in_progress 2")
            .then_some(())
    });
    asked
        .expect(
            &broker,
            &[
                FULL,
                FULL,
                FULL,
                FULL,
                "OK",
                "OK",
                "OK",
                "KEY_EXISTS",
                FULL,
                "OK",
                "KEY_NOT_FOUND",
                "OK",
                "OK",
                FULL,
                "KEY_NOT_FOUND",
                "OK",
                "KEY_NOT_FOUND",
                "OK",
                "OK",
                "OK",
                "OK",
            ],
        )
        .await;
    for pid in workers {
        send(pid, Signal::CONT);
    }
    for call in waiting {
        assert_eq!(call.await.unwrap().unwrap().key_material, MATERIAL);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn while_somebody_else_holds_the_database() {
    const DOWN: &str = "STORE_DOWN";
    let broker = Broker::start(options());
    let asked = Asked::enrolled(&broker, "user").await;
    let lock = WriteLock::take(&broker.site.database());
    asked
        .expect(
            &broker,
            &[
                DOWN,
                "OK",
                "OK",
                DOWN,
                "OK",
                "OK",
                DOWN,
                "KEY_EXISTS",
                DOWN,
                "OK",
                "KEY_NOT_FOUND",
                "OK",
                "OK",
                DOWN,
                "KEY_NOT_FOUND",
                "OK",
                "KEY_NOT_FOUND",
                DOWN,
                "OK",
                "OK",
                "OK",
            ],
        )
        .await;
    lock.release();
}

#[tokio::test(flavor = "multi_thread")]
async fn of_damaged_records() {
    const DAMAGED: &str = "RECORD_DAMAGED";
    let broker = Broker::start(options());
    let asked = Asked::enrolled(&broker, "user").await;
    let (site, _) = broker.stop();
    site.sql("UPDATE revisions SET envelope = zeroblob(length(envelope))");
    let broker = Broker::start_on(site);
    asked
        .expect(
            &broker,
            &[
                "OK",
                DAMAGED,
                DAMAGED,
                "OK",
                "OK",
                "OK",
                "OK",
                "KEY_EXISTS",
                DAMAGED,
                "OK",
                "KEY_NOT_FOUND",
                "OK",
                "OK",
                "OK",
                "KEY_NOT_FOUND",
                "OK",
                "KEY_NOT_FOUND",
                "OK",
                "OK",
                "OK",
                "OK",
            ],
        )
        .await;
}
