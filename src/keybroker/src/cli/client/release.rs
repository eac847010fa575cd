//! Calls of the user-key service that bring key material back.

use std::path::PathBuf;

use base64ct::{Base64, Encoding as _};
use serde_json::{Value, json};
use tonic::transport::Channel;
use zeroize::Zeroizing;

use crate::cli::{
    exit::{Exit, Failure},
    output::Field,
};
use keybroker_proto as proto;
use keybroker_proto::{
    batch_unwrap_result::Result as BatchResult, user_key_service_client::UserKeyServiceClient,
};

use super::{Caller, material};

impl Caller {
    pub(super) async fn unwrap(
        &self,
        mut service: UserKeyServiceClient<Channel>,
        message: proto::UnwrapUserKeyRequest,
        out: Option<PathBuf>,
    ) -> Result<(), Failure> {
        let released = self
            .retried(message, async |request| {
                service.unwrap_user_key(request).await
            })
            .await?;
        let material = Zeroizing::new(released.key_material);
        let revision = ("revision", json!(released.revision));
        if let Some(path) = out {
            material::write_secret(&path, &material)?;
            return self.output.fields(vec![revision]);
        }
        if self.output.is_json() {
            let encoded = ("key_material", base64(&material));
            return self.output.fields(vec![revision, encoded]);
        }
        self.output.bytes(&material)
    }

    pub(super) async fn batch_unwrap(
        &self,
        mut service: UserKeyServiceClient<Channel>,
        users: Vec<String>,
        key_name: String,
    ) -> Result<(), Failure> {
        let item = |user: &String| proto::UnwrapUserKeyRequest {
            user: user.clone(),
            key_name: key_name.clone(),
        };
        let items = users.iter().map(item).collect();
        let message = proto::BatchUnwrapUserKeysRequest { items };
        let results = self
            .retried(message, async |request| {
                service.batch_unwrap_user_keys(request).await
            })
            .await?
            .results;
        let rows: Vec<_> = users.iter().zip(results).map(batch_row).collect();
        let refused = rows.iter().filter(|row| row.iter().any(is_reason)).count();
        let asked = rows.len();
        self.output.list(rows, "nothing asked")?;
        if refused > 0 {
            let what = format!("{refused} of {asked} keys were not released");
            return Err(Failure::new(Exit::Refused, what).hint("each has its reason in its row"));
        }
        Ok(())
    }
}

fn batch_row((user, result): (&String, proto::BatchUnwrapResult)) -> Vec<Field> {
    let (revision, key_material, reason) = match result.result {
        Some(BatchResult::Released(released)) => {
            let material = Zeroizing::new(released.key_material);
            (json!(released.revision), base64(&material), Value::Null)
        }
        Some(BatchResult::Error(error)) => (Value::Null, Value::Null, json!(error.reason)),
        None => (Value::Null, Value::Null, json!("no result")),
    };
    vec![
        ("user", json!(user)),
        ("revision", revision),
        ("key_material", key_material),
        ("reason", reason),
    ]
}

fn is_reason((name, value): &Field) -> bool {
    *name == "reason" && !value.is_null()
}

fn base64(material: &[u8]) -> Value {
    json!(Base64::encode_string(material))
}
