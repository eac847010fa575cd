//! What a client does when nothing fails, and the same key through the other APIs.

use std::{
    collections::{HashMap, HashSet},
    io::{Read as _, Write as _},
    net::TcpStream,
    time::Duration,
};

use keybroker_proto::{
    UnwrapUserKeyRequest, UserKey, user_key_service_client::UserKeyServiceClient,
};
use reqwest::Method;
use serde_json::Value;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use tonic::{Request, metadata::MetadataValue};

use super::site::{ADA, Answer, BOB, RestSite, body};
use crate::{
    client::{self, channel, refused},
    site::Options,
};

#[tokio::test(flavor = "multi_thread")]
async fn a_user_enrols_fetches_and_replaces_its_own_key() {
    let rest = RestSite::open();
    rest.get(ADA).await.expect_refused(404, "KEY_NOT_FOUND");
    rest.store(Method::POST, ADA, &[0xa1; 32])
        .await
        .expect_stored();
    rest.get(ADA).await.expect_key(&[0xa1; 32]);
    // Never over a key that is there, not even over the same one.
    for key in [[0xa2; 32], [0xa1; 32]] {
        let again = rest.store(Method::POST, ADA, &key).await;
        again.expect_refused(400, "KEY_EXISTS");
    }
    rest.get(ADA).await.expect_key(&[0xa1; 32]);
    // Another user's token reaches another key.
    rest.get(BOB).await.expect_refused(404, "KEY_NOT_FOUND");
    rest.store(Method::PUT, BOB, &[0xb1; 32])
        .await
        .expect_stored();
    rest.store(Method::PUT, ADA, &[0xa3; 32])
        .await
        .expect_stored();
    rest.get(ADA).await.expect_key(&[0xa3; 32]);
    rest.get(BOB).await.expect_key(&[0xb1; 32]);
    let audit = rest.broker.site.audit();
    for action in ["user_key.create", "user_key.unwrap", "user_key.replace"] {
        let entry = audit.lines().find(|line| {
            line.contains(&format!("\"action\":\"{action}\""))
                && line.contains("\"outcome\":\"ok\"")
                && line.contains(&format!("\"user\":\"{ADA}\""))
                && line.contains("\"key_name\":\"bitwarden\"")
        });
        assert!(entry.is_some(), "{action}: {audit}");
    }
    // Each call of a request has its own id, so that what is known of one is never taken for another.
    let mut actions = HashMap::<String, HashSet<String>>::new();
    for line in audit.lines() {
        // Its checksum stands around it.
        let (Some(start), Some(end)) = (line.find('{'), line.rfind('}')) else {
            continue;
        };
        let entry: Value = serde_json::from_str(&line[start..=end]).unwrap();
        if let (Some(call), Some(action)) = (entry["call_id"].as_str(), entry["action"].as_str())
            && action.starts_with("user_key.")
        {
            let of_call = actions.entry(call.to_owned()).or_default();
            of_call.insert(action.to_owned());
        }
    }
    assert!(actions.len() >= 11, "{audit}");
    assert!(
        actions.values().all(|of_call| of_call.len() == 1),
        "{audit}"
    );
}

/// As the SDK sends it: content type on GET, further headers, a token's `sub` in capitals is the same user.
#[tokio::test(flavor = "multi_thread")]
async fn the_clients_on_the_sdk_are_understood() {
    let rest = RestSite::open();
    let sdk = |method: Method| {
        rest.as_user(method, ADA)
            .header("content-type", "application/json")
            .header("device-type", "21")
            .header("device-identifier", "0f7a6a3c-7c0a-4d6b-8c5e-2f5f0b1e7a11")
            .header("bitwarden-package-type", "flatpak")
    };
    let capital = body(&client::sending(&[0xa4; 32])).replace("\"key\"", "\"Key\"");
    let stored = sdk(Method::POST).body(capital).send().await.unwrap();
    Answer::of(stored).await.expect_stored();
    let fetched = sdk(Method::GET).send().await.unwrap();
    Answer::of(fetched).await.expect_key(&[0xa4; 32]);
    rest.get(&ADA.to_uppercase()).await.expect_key(&[0xa4; 32]);
}

/// With a token, over a connection whose certificate belongs to somebody else.
async fn over_grpc(rest: &RestSite, user: &str, named: &str) -> Result<Vec<u8>, tonic::Status> {
    let channel = channel(&rest.broker.site.pki, Some("releaser"), rest.broker.grpc);
    let mut request = Request::new(UnwrapUserKeyRequest {
        user: named.to_owned(),
        key_name: "bitwarden".to_owned(),
        recipient: None,
    });
    let bearer = format!("Bearer {}", rest.token(user));
    let value: MetadataValue<_> = bearer.parse().unwrap();
    request.metadata_mut().insert("authorization", value);
    let mut service = UserKeyServiceClient::new(channel);
    let answer = service.unwrap_user_key(request).await?;
    Ok(answer.into_inner().key_material)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_reaches_the_same_key_over_rest_and_over_grpc() {
    let rest = RestSite::open();
    rest.store(Method::POST, ADA, &[0xa5; 32])
        .await
        .expect_stored();
    assert_eq!(over_grpc(&rest, ADA, ADA).await.unwrap(), [0xa5; 32]);
    refused(over_grpc(&rest, BOB, ADA).await, "POLICY");
    refused(over_grpc(&rest, BOB, BOB).await, "KEY_NOT_FOUND");
    // The gRPC listener serves the REST API as well and tells the two apart.
    let site = &rest.broker.site;
    let identity = [
        site.pki.certificate_file("releaser"),
        site.pki.key_file("releaser"),
    ]
    .map(|path| std::fs::read_to_string(path).unwrap())
    .concat();
    let pem = std::fs::read(site.pki.ca_file()).unwrap();
    let client = reqwest::Client::builder()
        .tls_certs_only([reqwest::Certificate::from_pem(&pem).unwrap()])
        .identity(reqwest::Identity::from_pem(identity.as_bytes()).unwrap())
        .no_proxy()
        .build()
        .unwrap();
    let url = format!("https://localhost:{}/user-keys", rest.broker.grpc.port());
    let with_token = client.get(&url).bearer_auth(rest.token(ADA)).send();
    Answer::of(with_token.await.unwrap())
        .await
        .expect_key(&[0xa5; 32]);
    // A service may release it by name over gRPC; here it has no key of its own.
    let as_service = client.get(&url).send().await.unwrap();
    Answer::of(as_service).await.expect_refused(403, "POLICY");
}

/// The record as an operator with a certificate acts on it.
async fn operate(rest: &RestSite, delete: bool) -> UserKey {
    let name = "lifecycle";
    let channel = channel(&rest.broker.site.pki, Some(name), rest.broker.grpc);
    let mut service = UserKeyServiceClient::new(channel);
    let (user, key_name) = (ADA.to_owned(), "bitwarden".to_owned());
    let changed = if delete {
        let request = keybroker_proto::DeleteUserKeyRequest {
            user,
            key_name,
            expected_revision: 1,
            request_id: String::new(),
        };
        service
            .delete_user_key(request)
            .await
            .unwrap()
            .into_inner()
            .user_key
    } else {
        let request = keybroker_proto::UndeleteUserKeyRequest {
            user,
            key_name,
            request_id: String::new(),
        };
        service
            .undelete_user_key(request)
            .await
            .unwrap()
            .into_inner()
            .user_key
    };
    changed.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_record_is_never_overwritten() {
    let rest = RestSite::open();
    rest.store(Method::POST, ADA, &[0xa6; 32])
        .await
        .expect_stored();
    operate(&rest, true).await;
    rest.get(ADA).await.expect_refused(404, "KEY_NOT_FOUND");
    for method in [Method::POST, Method::PUT] {
        let refused = rest.store(method, ADA, &[0xa7; 32]).await;
        refused.expect_refused(400, "KEY_EXISTS");
    }
    operate(&rest, false).await;
    rest.get(ADA).await.expect_key(&[0xa6; 32]);
}

#[tokio::test(flavor = "multi_thread")]
async fn writers_at_once_leave_one_whole_key() {
    let rest = RestSite::open();
    let keys: Vec<[u8; 32]> = (0xc0..0xc6).map(|byte| [byte; 32]).collect();
    let writes = keys.iter().map(|key| rest.store(Method::PUT, ADA, key));
    let answers = futures_util::future::join_all(writes).await;
    let mut stored = Vec::new();
    for (key, answer) in keys.iter().zip(&answers) {
        match answer.status.as_u16() {
            200 => stored.push(key),
            _ => answer.expect_refused(503, "REVISION"),
        }
    }
    assert!(!stored.is_empty());
    let kept = rest.get(ADA).await;
    assert!(stored.iter().any(|key| kept.body == body(*key)), "{kept:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn anybody_may_ask_whether_it_is_alive() {
    let rest = RestSite::open();
    for path in ["/alive", "/now", "//alive"] {
        let request = rest
            .request(Method::GET, path)
            .header("content-type", "application/json; charset=utf-8");
        let answer = Answer::of(request.send().await.unwrap()).await;
        assert_eq!(answer.status, 200, "{answer:?}");
        let text: String = serde_json::from_str(&answer.body).unwrap();
        let then = OffsetDateTime::parse(&text, &Rfc3339).unwrap();
        assert!(then.offset().is_utc());
        let age = OffsetDateTime::now_utc() - then;
        assert!(age.abs() < Duration::from_mins(1), "{text}");
    }
    let healthy = rest.request(Method::GET, "/health").send().await.unwrap();
    let healthy = Answer::of(healthy).await;
    assert_eq!(
        (healthy.status.as_u16(), healthy.body.as_str()),
        (200, "Healthy")
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn paths_and_methods_that_there_are_not() {
    let rest = RestSite::open();
    for path in [
        "/",
        "/user-key",
        "/user-keys/",
        "/user-keys/x",
        "/api/user-keys",
        "///user-keys",
    ] {
        let answer = rest.request(Method::GET, path).bearer_auth(rest.token(ADA));
        let answer = Answer::of(answer.send().await.unwrap()).await;
        // Not what a client without a key is told.
        answer.expect_refused(404, "REQUEST");
    }
    for (method, path, allow) in [
        (Method::DELETE, "/user-keys", "GET, POST, PUT"),
        (Method::PATCH, "//user-keys", "GET, POST, PUT"),
        (Method::POST, "/alive", "GET, HEAD"),
        (Method::PUT, "/health", "GET, HEAD"),
    ] {
        let answer = rest.request(method, path).send().await.unwrap();
        let answer = Answer::of(answer).await;
        answer.expect_refused(405, "REQUEST");
        assert_eq!(answer.headers["allow"], allow);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prefix_stands_before_every_path_and_may_end_in_a_slash() {
    let rest = RestSite::open_with(Options::default(), "path_prefix = \"/keys/v1\"", "");
    rest.get(ADA).await.expect_refused(404, "REQUEST");
    for path in ["/keys/v1/user-keys", "/keys/v1//user-keys"] {
        let request = rest.request(Method::GET, path).bearer_auth(rest.token(ADA));
        let answer = Answer::of(request.send().await.unwrap()).await;
        answer.expect_refused(404, "KEY_NOT_FOUND");
    }
    let alive = rest.request(Method::GET, "/keys/v1/alive").send().await;
    assert_eq!(alive.unwrap().status(), 200);
}

/// As a proxy speaks to it: one connection, one request after the other, with and without a length.
#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_keeps_its_connection() {
    let rest = RestSite::open();
    let key = body(&client::sending(&[0xa8; 32]));
    let head = |method: &str, user: &str| {
        format!(
            "{method} /user-keys HTTP/1.1\r\nHost: keys.example.org\r\nAuthorization: Bearer {}\r\n",
            rest.token(user)
        )
    };
    let requests = [
        format!(
            "{}Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n{:x}\r\n{key}\r\n0\r\n\r\n",
            head("POST", ADA),
            key.len()
        ),
        format!("{}\r\n", head("GET", ADA)),
        format!("{}\r\n", head("GET", BOB)),
        format!("{}Connection: close\r\n\r\n", head("GET", ADA)),
    ];
    let mut stream = TcpStream::connect(rest.plain).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    let mut answers = String::new();
    for (request, expected) in requests.iter().zip(["200", "200", "404", "200"]) {
        stream.write_all(request.as_bytes()).unwrap();
        let mut buffer = [0; 4_096];
        let length = stream.read(&mut buffer).unwrap();
        let answer = String::from_utf8_lossy(&buffer[..length]).into_owned();
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {expected} ")),
            "{answer}"
        );
        answers += &answer;
    }
    assert_eq!(answers.matches(&key).count(), 2, "{answers}");
    assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0, "closed as asked");
}
