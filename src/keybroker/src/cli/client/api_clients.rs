//! `keybroker client-credential`: creates, rotates, lists and revokes API clients through the admin API.

use std::{path::PathBuf, time::Duration};

use clap::{Args, Subcommand, builder::PossibleValuesParser};
use prost_types::Timestamp as WireTimestamp;
use serde_json::{Value, json};
use zeroize::Zeroizing;

use crate::cli::{
    exit::{Exit, Failure},
    output::Field,
};
use keybroker_client::{ClientId, Error, IssuedSecret, Reason, Timestamp, proto};
use keybroker_core::principal::Role;

use super::{Caller, arguments, material, refusal, show};

const SECONDS_PER_DAY: u64 = 86_400;
/// Maximum lifetime of a secret, in days: about a hundred years.
const DAYS_MAX: i64 = 36_500;

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Create an API client with its first secret; this secret is shown only once
    Create {
        #[command(flatten)]
        grant: Grant,
        #[command(flatten)]
        fresh: Fresh,
    },
    /// Add another secret to an API client; the new secret is shown only once
    AddSecret {
        /// Id of the API client, 32 hexadecimal digits
        #[arg(value_parser = arguments::client_id)]
        id: ClientId,
        #[command(flatten)]
        fresh: Fresh,
    },
    /// List the API clients, including revoked ones
    List {
        /// Show all pages, not only the first
        #[arg(long)]
        all: bool,
        /// API clients per page, 1 to 1000
        #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=1_000))]
        page_size: u32,
    },
    /// Permanently revoke an API client, or one of its secrets
    Revoke {
        /// Id of the API client, 32 hexadecimal digits
        #[arg(value_parser = arguments::client_id)]
        id: ClientId,
        /// Revoke only the secret with this number
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
        secret: Option<u32>,
    },
}

/// The role, the users and the key names of an API client.
#[derive(Args, Clone, Debug)]
pub(super) struct Grant {
    /// Description of the API client, 1 to 128 bytes
    #[arg(long)]
    label: String,
    /// Role of the API client; the broker's setting `client_credentials.grantable_roles` must
    /// contain this role
    #[arg(
        long, required = true, num_args = 1..,
        value_parser = PossibleValuesParser::new(Role::ALL.map(Role::as_str))
    )]
    role: Vec<String>,
    /// Users whose keys the API client may release with the role `release`, or `*` for all users
    #[arg(long, num_args = 1..)]
    user: Vec<String>,
    /// Names of the keys that the API client may release with the role `release`, or `*` for all
    /// names
    #[arg(long, num_args = 1..)]
    key_name: Vec<String>,
}

/// Lifetime and destination of a new secret.
#[derive(Args, Clone, Debug)]
pub(super) struct Fresh {
    /// Days until the secret expires [default: the secret does not expire]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=DAYS_MAX))]
    expires_days: Option<u16>,
    /// New file for the secret, created with mode 0600 [default: standard output]
    #[arg(long, value_name = "FILE")]
    secret_file: Option<PathBuf>,
}

impl Fresh {
    fn expire_time(&self, now: Timestamp) -> Option<WireTimestamp> {
        let days = u64::from(self.expires_days?);
        let after = Duration::from_secs(days * SECONDS_PER_DAY).as_secs();
        Some(WireTimestamp {
            seconds: now
                .micros()
                .div_euclid(1_000_000)
                .saturating_add_unsigned(after),
            nanos: 0,
        })
    }
}

impl Command {
    /// Checks the options and the output file before the call. Therefore, the broker does not
    /// create a secret that the command cannot write.
    pub(super) fn check(&self) -> Result<(), Failure> {
        if let Self::Create { grant, .. } = self
            && grant.role.iter().any(|role| role == Role::Release.as_str())
            && grant.user.is_empty()
            && grant.key_name.is_empty()
        {
            let what = "an API client with the role `release` needs --user, --key-name, or both";
            let hint = "--user and --key-name select the keys that the API client may release; --key-name '*' permits all keys";
            return Err(Failure::new(Exit::Usage, what).hint(hint));
        }
        match self {
            Self::Create { fresh, .. } | Self::AddSecret { fresh, .. } => fresh
                .secret_file
                .as_deref()
                .map_or(Ok(()), material::check_new),
            Self::List { .. } | Self::Revoke { .. } => Ok(()),
        }
    }
}

impl Caller {
    pub(super) async fn api_clients(&self, command: Command) -> Result<(), Failure> {
        match command {
            Command::Create { grant, fresh } => {
                let message = proto::CreateClientCredentialRequest {
                    label: grant.label,
                    roles: grant.role,
                    users: grant.user,
                    key_names: grant.key_name,
                    expire_time: fresh.expire_time(Timestamp::now()),
                };
                let made = self.client.create_client_credential(message).await;
                self.made(&made.map_err(|error| failure(&error))?, &fresh)
            }
            Command::AddSecret { id, fresh } => {
                let expires = fresh.expire_time(Timestamp::now());
                let made = self.client.add_client_secret(id, expires).await;
                self.made(&made.map_err(|error| failure(&error))?, &fresh)
            }
            Command::List { all, page_size } => self.list_api_clients(all, page_size).await,
            Command::Revoke { id, secret } => {
                let revoked = self.client.revoke_client_credential(id, secret).await;
                let revoked = revoked.map_err(|error| failure(&error))?;
                self.output.fields(fields(&revoked, self.output.is_json()))
            }
        }
    }

    async fn list_api_clients(&self, all: bool, page_size: u32) -> Result<(), Failure> {
        let mut next = proto::ListClientCredentialsRequest {
            page_size,
            page_token: String::new(),
        };
        let mut rows = Vec::new();
        let mut damaged = 0;
        loop {
            let page = self.client.list_client_credentials(next.clone()).await;
            let page = page.map_err(|error| refusal::failure(&error))?;
            let clients = page.client_credentials.iter();
            rows.extend(clients.map(|client| fields(client, self.output.is_json())));
            rows.extend(page.damaged.iter().map(damaged_fields));
            damaged += page.damaged.len();
            next.page_token = page.next_page_token;
            if next.page_token.is_empty() || !all {
                break;
            }
        }
        self.output.list(rows, "no API clients")?;
        show::note_damaged(self.output, damaged);
        show::note_more(self.output, !next.page_token.is_empty());
        Ok(())
    }

    /// Shows the new API client and its secret. The secret cannot be shown again.
    fn made(&self, made: &IssuedSecret, fresh: &Fresh) -> Result<(), Failure> {
        let (client, number) = (&made.client_credential, made.secret_number);
        let secret = made.secret.expose();
        let mut shown = fields(client, self.output.is_json());
        shown.push(("secret_number", json!(number)));
        if let Some(path) = &fresh.secret_file {
            material::write_secret(path, secret.as_bytes()).map_err(|failure| {
                let id = &client.id;
                failure.hint(format!(
                    "the secret is lost: run `keybroker client-credential revoke {id} --secret {number}`, then add \
                     another secret"
                ))
            })?;
            shown.push(("secret_file", json!(path)));
            return self.output.fields(shown);
        }
        if self.output.is_json() {
            shown.push(("secret", json!(secret)));
            return self.output.fields(shown);
        }
        self.output.fields(shown)?;
        let line = Zeroizing::new(format!("\nSECRET, shown only once: {secret}"));
        self.output.text(&line)
    }
}

/// The failure of a change to an API client. The hint for `KEY_NOT_FOUND` is about API clients
/// instead of user keys. If the outcome is unknown, the hint also explains how to find the change
/// and to revoke a lost secret.
fn failure(error: &Error) -> Failure {
    let failure = refusal::failure(error);
    if error.reason() == Some(Reason::KeyNotFound) {
        return failure.hint("`keybroker client-credential list` shows the API clients");
    }
    if !error.outcome_unknown() {
        return failure;
    }
    let hint = failure.hint.clone().unwrap_or_default();
    failure.hint(format!(
        "{hint}; `keybroker client-credential list` shows whether the change was made; revoke a secret that you did \
         not receive"
    ))
}

fn fields(client: &proto::ClientCredential, json: bool) -> Vec<Field> {
    vec![
        ("id", json!(client.id)),
        ("label", json!(client.label)),
        ("roles", texts(&client.roles, json)),
        ("users", texts(&client.users, json)),
        ("key_names", texts(&client.key_names, json)),
        ("created", show::time(client.create_time.as_ref())),
        ("revoked", show::time(client.revoke_time.as_ref())),
        ("secrets", secrets(&client.secrets, json)),
        ("verified", json!(client.verified)),
        ("problem", Value::Null),
    ]
}

/// Returns the same columns as [`fields`] for a row that the broker could not read or verify.
fn damaged_fields(row: &proto::DamagedClientCredential) -> Vec<Field> {
    let id = (!row.id.is_empty()).then_some(&row.id);
    vec![
        ("id", json!(id)),
        ("label", Value::Null),
        ("roles", Value::Null),
        ("users", Value::Null),
        ("key_names", Value::Null),
        ("created", Value::Null),
        ("revoked", Value::Null),
        ("secrets", Value::Null),
        ("verified", json!(false)),
        ("problem", json!(row.problem)),
    ]
}

fn texts(texts: &[String], json: bool) -> Value {
    const SHOWN: usize = 3;
    if json {
        return json!(texts);
    }
    if texts.is_empty() {
        return Value::Null;
    }
    let shown = texts
        .iter()
        .take(SHOWN)
        .map(String::as_str)
        .collect::<Vec<_>>()
        .join(", ");
    match texts.len().saturating_sub(SHOWN) {
        0 => json!(shown),
        more => json!(format!("{shown} and {more} more")),
    }
}

fn secrets(secrets: &[proto::ClientSecret], json: bool) -> Value {
    if json {
        let object = |secret: &proto::ClientSecret| {
            json!({
                "number": secret.number,
                "created": show::time(secret.create_time.as_ref()),
                "expires": show::time(secret.expire_time.as_ref()),
                "revoked": show::time(secret.revoke_time.as_ref()),
                "last_used": show::time(secret.last_use_time.as_ref()),
            })
        };
        return secrets.iter().map(object).collect();
    }
    let text = |secret: &proto::ClientSecret| {
        let time = |at| show::time(at).as_str().unwrap_or_default().to_owned();
        match (&secret.revoke_time, &secret.expire_time) {
            (Some(at), _) => format!("{} (revoked {})", secret.number, time(Some(at))),
            (None, Some(at)) => format!("{} (until {})", secret.number, time(Some(at))),
            (None, None) => secret.number.to_string(),
        }
    };
    let texts: Vec<String> = secrets.iter().map(text).collect();
    json!(texts.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client() -> proto::ClientCredential {
        let at = |seconds| Some(WireTimestamp { seconds, nanos: 0 });
        let secret = |number, expire_time, revoke_time| proto::ClientSecret {
            number,
            create_time: at(0),
            expire_time,
            revoke_time,
            last_use_time: None,
        };
        proto::ClientCredential {
            id: "07".repeat(16),
            label: "backup".to_owned(),
            roles: vec!["enrol".to_owned()],
            users: ["a", "b", "c", "d", "e"].map(str::to_owned).to_vec(),
            secrets: vec![
                secret(1, at(60), at(1)),
                secret(2, at(60), None),
                secret(3, None, None),
            ],
            ..proto::ClientCredential::default()
        }
    }

    fn value(fields: &[Field], name: &str) -> Value {
        let found = fields.iter().find(|(field, _)| *field == name);
        found.unwrap().1.clone()
    }

    #[test]
    fn a_table_is_short_and_json_is_whole() {
        let table = fields(&client(), false);
        assert_eq!(value(&table, "users"), json!("a, b, c and 2 more"));
        assert_eq!(value(&table, "key_names"), Value::Null);
        assert_eq!(
            value(&table, "secrets"),
            json!("1 (revoked 1970-01-01T00:00:01Z), 2 (until 1970-01-01T00:01:00Z), 3")
        );
        let whole = fields(&client(), true);
        assert_eq!(value(&whole, "users"), json!(["a", "b", "c", "d", "e"]));
        assert_eq!(value(&whole, "key_names"), json!([]));
        let secrets = value(&whole, "secrets");
        assert_eq!(secrets[0]["revoked"], "1970-01-01T00:00:01Z");
        assert_eq!(
            (&secrets[2]["number"], &secrets[2]["expires"]),
            (&json!(3), &Value::Null)
        );
        let names = |fields: &[Field]| fields.iter().map(|(name, _)| *name).collect::<Vec<_>>();
        assert_eq!(names(&table), names(&whole));
    }

    #[test]
    fn days_become_a_moment() {
        let fresh = |expires_days| Fresh {
            expires_days,
            secret_file: None,
        };
        let now = Timestamp::from_micros(5_000_001);
        assert_eq!(fresh(None).expire_time(now), None);
        let at = fresh(Some(2)).expire_time(now).unwrap();
        assert_eq!((at.seconds, at.nanos), (172_805, 0));
    }

    #[test]
    fn a_secret_without_a_place_and_a_release_without_a_limit_are_refused_early() {
        let folder = tempfile::tempdir().unwrap();
        let taken = folder.path().join("taken");
        std::fs::write(&taken, b"something").unwrap();
        let create =
            |role: &str, key_name: &[&str], secret_file: Option<PathBuf>| Command::Create {
                grant: Grant {
                    label: "backup".to_owned(),
                    role: vec![role.to_owned()],
                    user: Vec::new(),
                    key_name: key_name.iter().map(|&name| name.to_owned()).collect(),
                },
                fresh: Fresh {
                    expires_days: None,
                    secret_file,
                },
            };
        create("enrol", &[], None).check().unwrap();
        create("release", &["vault"], None).check().unwrap();
        let refused = |command: Command, word: &str| {
            let failure = command.check().unwrap_err();
            assert_eq!(failure.exit, Exit::Usage);
            assert!(failure.message.contains(word), "{failure:?}");
        };
        refused(create("release", &[], None), "--key-name");
        refused(create("enrol", &[], Some(taken)), "never overwrites");
    }
}
