//! Real gRPC clients over mTLS, with the generated stubs.
//!
//! The library `keybroker-client` has tests of its own in `client_library`. Here tests see the wire as it is: they send what the
//! library does not let pass (fields out of range, no request id, a request id of another call), see every status with
//! its details, make exactly one attempt, and choose the address and the local address of a connection.

use std::{
    collections::HashMap,
    fs,
    net::{IpAddr, SocketAddr},
    sync::Mutex,
    time::{Duration, Instant},
};

use base64ct::{Base64, Encoding as _};

use keybroker_client::Refusal;
use keybroker_proto::{
    BatchUnwrapUserKeysRequest, BatchUnwrapUserKeysResponse, CreateUserKeyRequest,
    DeleteUserKeyRequest, GetUserKeyRequest, ListUserKeysRequest, ListUserKeysResponse, Recipient,
    ReplaceUserKeyRequest, RestoreUserKeyRevisionRequest, UndeleteUserKeyRequest,
    UnwrapUserKeyRequest, UnwrapUserKeyResponse, UserKey,
    control_service_client::ControlServiceClient, user_key_service_client::UserKeyServiceClient,
};
use tonic::{
    Request, Status,
    transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity},
};
use tonic_types::StatusExt as _;

use crate::{pki::Pki, process::Broker};

/// The key name that tests use when they need only one.
pub(crate) const NAME: &str = "vault";

/// All key material that callers of this process have sent: none of it may ever be seen in a log.
static SENT: Mutex<Vec<Vec<u8>>> = Mutex::new(Vec::new());

/// Shorter material than this is found everywhere by chance.
const SCANNED_BYTES_MIN: usize = 8;

/// Longest wait of a call of a test.
pub(crate) const CALL_TIMEOUT: Duration = Duration::from_secs(10);

/// One client with one certificate. The calls are as short as a test needs them.
#[derive(Clone)]
pub(crate) struct Caller {
    /// The user-key service.
    pub(crate) keys: UserKeyServiceClient<Channel>,
    /// The control plane.
    pub(crate) control: ControlServiceClient<Channel>,
}

impl Caller {
    /// A client of a running broker with the certificate of that name. The connection is made by the first call.
    pub(crate) fn of(broker: &Broker, name: &str) -> Self {
        let channel = channel(&broker.site.pki, Some(name), broker.grpc);
        Self {
            keys: UserKeyServiceClient::new(channel.clone()),
            control: ControlServiceClient::new(channel),
        }
    }

    /// Creates a user key without a request id.
    pub(crate) async fn create(&self, user: &str, material: &[u8]) -> Result<UserKey, Status> {
        self.create_with_id(user, material, "").await
    }

    /// Creates a user key.
    pub(crate) async fn create_with_id(
        &self,
        user: &str,
        material: &[u8],
        request_id: &str,
    ) -> Result<UserKey, Status> {
        let request = CreateUserKeyRequest {
            user: user.to_owned(),
            key_name: NAME.to_owned(),
            key_material: sending(material),
            request_id: request_id.to_owned(),
        };
        let answer = self.keys.clone().create_user_key(timed(request)).await?;
        Ok(answer.into_inner().user_key.unwrap())
    }

    /// Unwraps a user key.
    pub(crate) async fn unwrap(&self, user: &str) -> Result<UnwrapUserKeyResponse, Status> {
        let request = item(user);
        let answer = self.keys.clone().unwrap_user_key(timed(request)).await?;
        Ok(answer.into_inner())
    }

    /// Releases a user key to a recipient.
    pub(crate) async fn unwrap_for(
        &self,
        user: &str,
        public_key: &[u8],
    ) -> Result<UnwrapUserKeyResponse, Status> {
        let request = UnwrapUserKeyRequest {
            recipient: Some(Recipient {
                public_key: public_key.to_vec(),
                hash: 0,
            }),
            ..item(user)
        };
        let answer = self.keys.clone().unwrap_user_key(timed(request)).await?;
        Ok(answer.into_inner())
    }

    /// Unwraps several.
    pub(crate) async fn batch(
        &self,
        users: &[&str],
    ) -> Result<BatchUnwrapUserKeysResponse, Status> {
        let items = users.iter().map(|user| item(user)).collect();
        let request = timed(BatchUnwrapUserKeysRequest { items });
        let answer = self.keys.clone().batch_unwrap_user_keys(request).await?;
        Ok(answer.into_inner())
    }

    /// Replaces a user key.
    pub(crate) async fn replace(
        &self,
        user: &str,
        material: &[u8],
        expected_revision: u64,
        request_id: &str,
    ) -> Result<UserKey, Status> {
        let request = ReplaceUserKeyRequest {
            user: user.to_owned(),
            key_name: NAME.to_owned(),
            key_material: sending(material),
            expected_revision,
            request_id: request_id.to_owned(),
        };
        let answer = self.keys.clone().replace_user_key(timed(request)).await?;
        Ok(answer.into_inner().user_key.unwrap())
    }

    /// Reads a record's metadata.
    pub(crate) async fn get(&self, user: &str) -> Result<UserKey, Status> {
        let request = GetUserKeyRequest {
            user: user.to_owned(),
            key_name: NAME.to_owned(),
        };
        let answer = self.keys.clone().get_user_key(timed(request)).await?;
        Ok(answer.into_inner().user_key.unwrap())
    }

    /// One page of the list.
    pub(crate) async fn list(
        &self,
        size: u32,
        token: &str,
    ) -> Result<ListUserKeysResponse, Status> {
        let request = ListUserKeysRequest {
            page_size: size,
            page_token: token.to_owned(),
            ..Default::default()
        };
        let answer = self.keys.clone().list_user_keys(timed(request)).await?;
        Ok(answer.into_inner())
    }

    /// Deletes a user key.
    pub(crate) async fn delete(
        &self,
        user: &str,
        expected_revision: u64,
    ) -> Result<UserKey, Status> {
        let request = DeleteUserKeyRequest {
            user: user.to_owned(),
            key_name: NAME.to_owned(),
            expected_revision,
            request_id: String::new(),
        };
        let answer = self.keys.clone().delete_user_key(timed(request)).await?;
        Ok(answer.into_inner().user_key.unwrap())
    }

    /// Undeletes a user key.
    pub(crate) async fn undelete(&self, user: &str) -> Result<UserKey, Status> {
        let request = UndeleteUserKeyRequest {
            user: user.to_owned(),
            key_name: NAME.to_owned(),
            request_id: String::new(),
        };
        let answer = self.keys.clone().undelete_user_key(timed(request)).await?;
        Ok(answer.into_inner().user_key.unwrap())
    }

    /// Makes an earlier revision current.
    pub(crate) async fn restore(
        &self,
        user: &str,
        revision: u64,
        expected_revision: u64,
    ) -> Result<UserKey, Status> {
        let request = RestoreUserKeyRevisionRequest {
            user: user.to_owned(),
            key_name: NAME.to_owned(),
            revision,
            expected_revision,
            request_id: String::new(),
        };
        let answer = self
            .keys
            .clone()
            .restore_user_key_revision(timed(request))
            .await?;
        Ok(answer.into_inner().user_key.unwrap())
    }
}

/// Stores a key for `ada`, and gets it back.
pub(crate) async fn stores_and_releases(broker: &Broker) {
    let enroller = Caller::of(broker, "enroller");
    enroller.create("ada", b"material of ada").await.unwrap();
    let releaser = Caller::of(broker, "releaser");
    let released = releaser.unwrap("ada").await.unwrap();
    assert_eq!(released.key_material, b"material of ada");
}

/// A channel to an address of `localhost`, with a certificate of that name or none.
pub(crate) fn channel(pki: &Pki, client: Option<&str>, address: SocketAddr) -> Channel {
    channel_from(pki, client, address, None)
}

/// The same, from that address of this machine.
pub(crate) fn channel_from(
    pki: &Pki,
    client: Option<&str>,
    address: SocketAddr,
    from: Option<IpAddr>,
) -> Channel {
    // Fails only when another test of this process has done it.
    rustls::crypto::aws_lc_rs::default_provider()
        .install_default()
        .ok();
    let mut tls = ClientTlsConfig::new()
        .domain_name("localhost")
        .ca_certificate(Certificate::from_pem(fs::read(pki.ca_file()).unwrap()));
    if let Some(client) = client {
        tls = tls.identity(Identity::from_pem(
            fs::read(pki.certificate_file(client)).unwrap(),
            fs::read(pki.key_file(client)).unwrap(),
        ));
    }
    Endpoint::from_shared(format!("https://{address}"))
        .unwrap()
        .tls_config(tls)
        .unwrap()
        .connect_timeout(CALL_TIMEOUT)
        .local_address(from)
        .connect_lazy()
}

/// The reason in the error details; the code and text when there is none.
pub(crate) fn reason(status: &Status) -> String {
    match status.get_details_error_info() {
        Some(info) => {
            assert_eq!(info.domain, "keybroker.v1", "{status:?}");
            info.reason
        }
        None => format!("{:?} without details: {}", status.code(), status.message()),
    }
}

/// Asserts that a call was refused with that reason.
#[track_caller]
pub(crate) fn refused<T>(result: Result<T, Status>, expected: &str) -> Status {
    match result {
        Ok(_) => panic!("not refused; expected {expected}"),
        Err(status) => {
            assert_eq!(reason(&status), expected, "{status:?}");
            status
        }
    }
}

/// The retry policy that `docs/errors.md` asks of clients.
pub(crate) async fn retrying<T, F: Future<Output = Result<T, Status>>>(
    mut call: impl FnMut() -> F,
) -> Result<T, Status> {
    let until = Instant::now() + Duration::from_secs(10);
    let mut pause = Duration::from_millis(50);
    loop {
        let status = match call().await {
            Ok(answer) => return Ok(answer),
            Err(status) => status,
        };
        let error = keybroker_client::Error::from(status.clone());
        let asked = error.refusal().and_then(Refusal::retry_delay);
        let own = keybroker_core::call::spread(pause / 2, pause);
        let next = own.max(asked.unwrap_or_default());
        if !error.is_transient() || Instant::now() + next > until {
            return Err(status);
        }
        tokio::time::sleep(next).await;
        pause = (pause * 2).min(Duration::from_secs(1));
    }
}

/// Repeats a call that may fail for a while, at most for thirty seconds.
pub(crate) async fn eventually<T, F: Future<Output = Result<T, Status>>>(
    mut call: impl FnMut() -> F,
) -> T {
    let mut last = None;
    for _ in 0..300 {
        match call().await {
            Ok(answer) => return answer,
            Err(status) => last = Some(status),
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("still refused after thirty seconds: {last:?}");
}

/// The forms in which key material could slip out.
fn forms(material: &[u8]) -> [Vec<u8>; 5] {
    let list = format!("{material:?}");
    [
        material.to_vec(),
        Base64::encode_string(material)
            .trim_end_matches('=')
            .as_bytes()
            .to_vec(),
        hex::encode(material).into_bytes(),
        hex::encode_upper(material).into_bytes(),
        list.trim_matches(['[', ']']).as_bytes().to_vec(),
    ]
}

/// Number of bytes by which forms are found. Every form is longer, because shorter material is not remembered.
const HEAD_BYTES: usize = 4;

/// Asserts that a text shows no key material that was sent, in none of its forms. One pass over the text finds all forms, because some
/// tests send thousands of keys.
pub(crate) fn assert_no_material(what: &str, text: &[u8]) {
    let sent = SENT.lock().unwrap().clone();
    let all: Vec<Vec<u8>> = sent.iter().flat_map(|material| forms(material)).collect();
    let mut by_head: HashMap<&[u8], Vec<&[u8]>> = HashMap::new();
    for form in &all {
        by_head.entry(&form[..HEAD_BYTES]).or_default().push(form);
    }
    for (at, head) in text.windows(HEAD_BYTES).enumerate() {
        for form in by_head.get(head).into_iter().flatten() {
            assert!(
                !text[at..].starts_with(form),
                "{what} shows key material: {:?}",
                String::from_utf8_lossy(form)
            );
        }
    }
}

#[test]
fn material_is_found_in_every_form() {
    let material = sending(b"only-of-this-test");
    for form in forms(&material) {
        for text in [form.clone(), [b"before ", &*form, b" after"].concat()] {
            let shown = std::panic::catch_unwind(|| assert_no_material("a text", &text));
            assert!(shown.is_err(), "{}", String::from_utf8_lossy(&text));
        }
        assert_no_material("a part", &form[1..]);
    }
    assert_no_material("nothing", b"");
}

/// Remembers another secret for [`assert_no_material`].
pub(crate) fn never_in_a_log(secret: &[u8]) {
    sending(secret);
}

/// Remembers material for [`assert_no_material`].
pub(crate) fn sending(material: &[u8]) -> Vec<u8> {
    let mut sent = SENT.lock().unwrap();
    // A few hundred of a load test say as much as all of them.
    let is_scanned = (SCANNED_BYTES_MIN..256).contains(&material.len());
    if is_scanned && sent.len() < 200 && !sent.iter().any(|known| known == material) {
        sent.push(material.to_vec());
    }
    material.to_vec()
}

/// Names the key that the tests ask for.
pub(crate) fn item(user: &str) -> UnwrapUserKeyRequest {
    UnwrapUserKeyRequest {
        user: user.to_owned(),
        key_name: NAME.to_owned(),
        recipient: None,
    }
}

fn timed<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(CALL_TIMEOUT);
    request
}
