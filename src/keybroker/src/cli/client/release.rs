//! Calls of the user-key service that release key material.

use std::path::{Path, PathBuf};

use base64ct::{Base64, Encoding as _};
use keybroker_client::{KeyMaterial, KeyName, Refusal, ReleasedKey, SealedKey, UserId, UserKeyRef};
use serde_json::{Value, json};

use crate::cli::{
    exit::{Exit, Failure},
    output::Field,
};

use super::{Caller, material, recipient::Recipient, refusal};

impl Caller {
    pub(super) async fn unwrap(
        &self,
        key: &UserKeyRef,
        out: Option<PathBuf>,
    ) -> Result<(), Failure> {
        let released = self.client.unwrap_user_key(key).await;
        let released = released.map_err(|error| refusal::failure(&error))?;
        let revision = ("revision", json!(released.revision.get()));
        let material = released.key_material.expose();
        self.secret(vec![revision], ("key_material", material), out)
    }

    /// Releases a user key to a recipient. Opens the answer if the private key of the recipient is known.
    pub(super) async fn unwrap_for(
        &self,
        key: &UserKeyRef,
        recipient: &Path,
        out: Option<PathBuf>,
    ) -> Result<(), Failure> {
        let recipient = Recipient::read(recipient)?;
        let sealed = self
            .client
            .unwrap_user_key_for(key, recipient.public_key())
            .await;
        let sealed = sealed.map_err(|error| refusal::failure(&error))?;
        let fields = sealed_fields(&sealed);
        match recipient {
            Recipient::Public(_) => self.secret(fields, ("ciphertext", &sealed.ciphertext), out),
            Recipient::Private(pair) => {
                let material = pair.open(&sealed).map_err(|error| {
                    let what = format!("cannot open the answer of the broker: {error}");
                    Failure::new(Exit::Untrusted, what).hint(
                        "repeat the call; if the error persists, report it to the operator of the broker, who can test the token \
                         with `keybroker token check`",
                    )
                })?;
                self.secret(fields, ("key_material", material.expose()), out)
            }
        }
    }

    /// Writes bytes to a new file, to standard output or, as base64, to a field.
    fn secret(
        &self,
        mut fields: Vec<Field>,
        (name, bytes): (&'static str, &[u8]),
        out: Option<PathBuf>,
    ) -> Result<(), Failure> {
        if let Some(path) = out {
            material::write_secret(&path, bytes)?;
            return self.output.fields(fields);
        }
        if self.output.is_json() {
            fields.push((name, json!(Base64::encode_string(bytes))));
            return self.output.fields(fields);
        }
        self.output.bytes(bytes)
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

fn sealed_fields(sealed: &SealedKey) -> Vec<Field> {
    vec![
        ("revision", json!(sealed.revision.get())),
        ("algorithm", json!(sealed.algorithm.as_str())),
        ("recipient", json!(sealed.recipient.to_string())),
        (
            "sealing",
            json!(sealed.sealing.map(keybroker_client::Sealing::as_str)),
        ),
    ]
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
