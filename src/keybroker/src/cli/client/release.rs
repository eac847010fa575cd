//! Calls of the user-key service that release key material.

use std::path::PathBuf;

use base64ct::{Base64, Encoding as _};
use keybroker_client::{KeyMaterial, KeyName, Refusal, ReleasedKey, UserId, UserKeyRef};
use serde_json::{Value, json};

use crate::cli::{
    exit::{Exit, Failure},
    output::Field,
};

use super::{Caller, material, refusal};

impl Caller {
    pub(super) async fn unwrap(
        &self,
        key: &UserKeyRef,
        out: Option<PathBuf>,
    ) -> Result<(), Failure> {
        let released = self.client.unwrap_user_key(key).await;
        let released = released.map_err(|error| refusal::failure(&error))?;
        let material = &released.key_material;
        let revision = ("revision", json!(released.revision.get()));
        if let Some(path) = out {
            material::write_secret(&path, material.expose())?;
            return self.output.fields(vec![revision]);
        }
        if self.output.is_json() {
            return self
                .output
                .fields(vec![revision, ("key_material", base64(material))]);
        }
        self.output.bytes(material.expose())
    }

    pub(super) async fn batch_unwrap(
        &self,
        users: Vec<UserId>,
        key_name: &KeyName,
    ) -> Result<(), Failure> {
        let keys: Vec<_> = users
            .into_iter()
            .map(|user| UserKeyRef {
                user,
                key_name: key_name.clone(),
            })
            .collect();
        let results = self.client.batch_unwrap_user_keys(&keys).await;
        let results = results.map_err(|error| refusal::failure(&error))?;
        let refused = results.iter().filter(|result| result.is_err()).count();
        let asked = results.len();
        let rows = keys.iter().zip(&results).map(batch_row).collect();
        self.output.list(rows, "nothing asked")?;
        if refused > 0 {
            let what = format!("{refused} of {asked} keys were not released");
            return Err(Failure::new(Exit::Refused, what)
                .hint("the column `reason` shows why a key was not released"));
        }
        Ok(())
    }
}

fn batch_row((key, result): (&UserKeyRef, &Result<ReleasedKey, Refusal>)) -> Vec<Field> {
    let (revision, key_material, reason) = match result {
        Ok(released) => (
            json!(released.revision.get()),
            base64(&released.key_material),
            Value::Null,
        ),
        Err(refusal) => (Value::Null, Value::Null, json!(refusal.reason_name())),
    };
    vec![
        ("user", json!(key.user.as_str())),
        ("revision", revision),
        ("key_material", key_material),
        ("reason", reason),
    ]
}

fn base64(material: &KeyMaterial) -> Value {
    json!(Base64::encode_string(material.expose()))
}
