//! `keybroker client`: a gRPC client like any other.

use std::{
    fs::OpenOptions,
    io::{self, IsTerminal as _, Read as _, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use base64ct::{Base64, Encoding as _};
use clap::{Args, Subcommand};
use serde_json::json;
use tonic::{Request, transport::Channel};
use zeroize::Zeroizing;

use crate::{
    proto::{
        self, batch_unwrap_result::Result as BatchResult,
        user_key_service_client::UserKeyServiceClient,
    },
    secret::KEY_MATERIAL_BYTES_MAX,
};

use super::{
    Context, block_on,
    connect::{self, Connection},
    exit::{Exit, Failure},
};

mod control;
mod show;

#[derive(Args, Debug)]
pub(super) struct Arguments {
    #[command(flatten)]
    connection: Connection,
    #[command(subcommand)]
    command: Command,
}

/// Which of whose keys.
#[derive(Args, Clone, Debug)]
struct Key {
    /// Whose key: 1 to 255 bytes
    #[arg(long)]
    user: String,
    /// Which of the user's keys: 1 to 64 bytes of [a-z0-9._-]
    #[arg(long, default_value = "default")]
    key_name: String,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Store a new user key
    Create {
        #[command(flatten)]
        key: Key,
        /// File with the key material, `-` for standard input
        #[arg(long, value_name = "FILE")]
        material_file: PathBuf,
        /// UUID that makes a retry safe
        #[arg(long, default_value = "")]
        request_id: String,
    },
    /// Release a user key
    Unwrap {
        #[command(flatten)]
        key: Key,
        /// New file for the key material, mode 0600; without it, standard output
        #[arg(long, value_name = "FILE")]
        out: Option<PathBuf>,
    },
    /// Release the keys of several users
    BatchUnwrap {
        /// Whose keys, at most 64
        #[arg(long, required = true, num_args = 1..)]
        user: Vec<String>,
        /// Which of the users' keys
        #[arg(long, default_value = "default")]
        key_name: String,
    },
    /// Store new key material as the next revision
    Replace {
        #[command(flatten)]
        key: Key,
        /// File with the key material, `-` for standard input
        #[arg(long, value_name = "FILE")]
        material_file: PathBuf,
        /// The revision believed current
        #[arg(long)]
        expected_revision: u64,
        /// UUID that makes a retry safe
        #[arg(long, default_value = "")]
        request_id: String,
    },
    /// Show what is known of a record
    Get {
        #[command(flatten)]
        key: Key,
    },
    /// List records
    List {
        /// Only this user's
        #[arg(long, default_value = "")]
        user: String,
        /// Deleted ones too
        #[arg(long)]
        deleted: bool,
        /// All pages, not only the first
        #[arg(long)]
        all: bool,
    },
    /// Delete a record; it can be undeleted
    Delete {
        #[command(flatten)]
        key: Key,
        /// The revision believed current
        #[arg(long)]
        expected_revision: u64,
    },
    /// Make a deleted record active again
    Undelete {
        #[command(flatten)]
        key: Key,
    },
    /// Make the material of an earlier revision current again
    Restore {
        #[command(flatten)]
        key: Key,
        /// The earlier revision
        #[arg(long)]
        revision: u64,
        /// The revision believed current
        #[arg(long)]
        expected_revision: u64,
    },
    /// List the wrapping keys
    WrappingKeys,
    /// Show one wrapping key with its public key
    WrappingKey {
        /// `CKA_ID`, 32 hexadecimal digits
        id: String,
    },
    /// Show the token and its workers
    TokenState,
    /// Show the last entries of the broker's audit log
    AuditTail {
        /// How many
        #[arg(long, default_value_t = 20)]
        limit: u32,
    },
    /// Show the health of the services
    Health,
}

pub(super) fn run(arguments: Arguments, context: &Context) -> Result<(), Failure> {
    block_on(async {
        let endpoint = arguments.connection.named_endpoint()?;
        let channel = arguments.connection.connect(&endpoint).await?;
        let call = Call {
            timeout: Duration::from_millis(arguments.connection.timeout_ms),
            context,
        };
        call.run(arguments.command, channel).await
    })?
}

/// How a call is made and its answer shown.
struct Call<'a> {
    timeout: Duration,
    context: &'a Context,
}

impl Call<'_> {
    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.set_timeout(self.timeout);
        request
    }

    async fn run(&self, command: Command, channel: Channel) -> Result<(), Failure> {
        let keys = UserKeyServiceClient::new(channel.clone());
        let record = match command {
            Command::Unwrap { key, out } => return self.unwrap(keys, key, out.as_deref()).await,
            Command::BatchUnwrap { user, key_name } => {
                return self.batch_unwrap(keys, user, &key_name).await;
            }
            Command::List { user, deleted, all } => {
                return self.list(keys, user, deleted, all).await;
            }
            Command::Create { .. } | Command::Replace { .. } => {
                self.store_material(command, keys).await
            }
            Command::Get { .. }
            | Command::Delete { .. }
            | Command::Undelete { .. }
            | Command::Restore { .. } => self.change_record(command, keys).await,
            control => return self.run_control(control, channel).await,
        };
        let record = record.map_err(Failed::into_failure)?;
        self.context
            .output
            .fields(show::record(&record.unwrap_or_default()))
    }

    async fn store_material(
        &self,
        command: Command,
        mut keys: UserKeyServiceClient<Channel>,
    ) -> Result<Option<proto::UserKey>, Failed> {
        let answer = match command {
            Command::Create {
                key,
                material_file,
                request_id,
            } => {
                let message = proto::CreateUserKeyRequest {
                    user: key.user,
                    key_name: key.key_name,
                    key_material: read_material(&material_file)?,
                    request_id,
                };
                let answer = keys.create_user_key(self.request(message)).await?;
                answer.into_inner().user_key
            }
            Command::Replace {
                key,
                material_file,
                expected_revision,
                request_id,
            } => {
                let message = proto::ReplaceUserKeyRequest {
                    user: key.user,
                    key_name: key.key_name,
                    key_material: read_material(&material_file)?,
                    expected_revision,
                    request_id,
                };
                let answer = keys.replace_user_key(self.request(message)).await?;
                answer.into_inner().user_key
            }
            _ => None,
        };
        Ok(answer)
    }

    async fn change_record(
        &self,
        command: Command,
        mut keys: UserKeyServiceClient<Channel>,
    ) -> Result<Option<proto::UserKey>, Failed> {
        let request_id = String::new();
        let answer = match command {
            Command::Get {
                key: Key { user, key_name },
            } => {
                let message = proto::GetUserKeyRequest { user, key_name };
                let answer = keys.get_user_key(self.request(message)).await?;
                answer.into_inner().user_key
            }
            Command::Delete {
                key: Key { user, key_name },
                expected_revision,
            } => {
                let message = proto::DeleteUserKeyRequest {
                    user,
                    key_name,
                    expected_revision,
                    request_id,
                };
                let answer = keys.delete_user_key(self.request(message)).await?;
                answer.into_inner().user_key
            }
            Command::Undelete {
                key: Key { user, key_name },
            } => {
                let message = proto::UndeleteUserKeyRequest {
                    user,
                    key_name,
                    request_id,
                };
                let answer = keys.undelete_user_key(self.request(message)).await?;
                answer.into_inner().user_key
            }
            Command::Restore {
                key: Key { user, key_name },
                revision,
                expected_revision,
            } => {
                let message = proto::RestoreUserKeyRevisionRequest {
                    user,
                    key_name,
                    revision,
                    expected_revision,
                    request_id,
                };
                let answer = keys
                    .restore_user_key_revision(self.request(message))
                    .await?;
                answer.into_inner().user_key
            }
            _ => None,
        };
        Ok(answer)
    }

    async fn unwrap(
        &self,
        mut keys: UserKeyServiceClient<Channel>,
        key: Key,
        out: Option<&Path>,
    ) -> Result<(), Failure> {
        if out.is_none() && !self.context.output.is_json() && io::stdout().is_terminal() {
            let what = "key material does not belong on a terminal: use --out FILE, or a pipe";
            return Err(Failure::new(Exit::Usage, what));
        }
        let message = proto::UnwrapUserKeyRequest {
            user: key.user,
            key_name: key.key_name,
        };
        let answer = keys.unwrap_user_key(self.request(message)).await;
        let released = answer
            .map_err(|status| connect::failure(&status))?
            .into_inner();
        let material = Zeroizing::new(released.key_material);
        if let Some(path) = out {
            write_secret(path, &material)?;
            return self
                .context
                .output
                .fields(vec![("revision", json!(released.revision))]);
        }
        if self.context.output.is_json() {
            return self.context.output.fields(vec![
                ("revision", json!(released.revision)),
                ("key_material", json!(Base64::encode_string(&material))),
            ]);
        }
        self.context.output.bytes(&material)
    }

    async fn batch_unwrap(
        &self,
        mut keys: UserKeyServiceClient<Channel>,
        users: Vec<String>,
        key_name: &str,
    ) -> Result<(), Failure> {
        let items = users
            .iter()
            .map(|user| proto::UnwrapUserKeyRequest {
                user: user.clone(),
                key_name: key_name.to_owned(),
            })
            .collect();
        let message = proto::BatchUnwrapUserKeysRequest { items };
        let answer = keys.batch_unwrap_user_keys(self.request(message)).await;
        let results = answer
            .map_err(|status| connect::failure(&status))?
            .into_inner()
            .results;
        let row = |(user, result): (&String, proto::BatchUnwrapResult)| match result.result {
            Some(BatchResult::Released(released)) => vec![
                ("user", json!(user)),
                ("revision", json!(released.revision)),
                (
                    "key_material",
                    json!(Base64::encode_string(&released.key_material)),
                ),
                ("reason", json!(null)),
            ],
            Some(BatchResult::Error(error)) => vec![
                ("user", json!(user)),
                ("revision", json!(null)),
                ("key_material", json!(null)),
                ("reason", json!(error.reason)),
            ],
            None => vec![("user", json!(user)), ("reason", json!("no result"))],
        };
        let rows = users.iter().zip(results).map(row).collect();
        self.context.output.list(rows, "nothing asked")
    }

    async fn list(
        &self,
        mut keys: UserKeyServiceClient<Channel>,
        user: String,
        deleted: bool,
        all: bool,
    ) -> Result<(), Failure> {
        let mut rows = Vec::new();
        let mut page_token = String::new();
        loop {
            let message = proto::ListUserKeysRequest {
                page_size: 0,
                page_token,
                user: user.clone(),
                show_deleted: deleted,
            };
            let answer = keys.list_user_keys(self.request(message)).await;
            let page = answer
                .map_err(|status| connect::failure(&status))?
                .into_inner();
            rows.extend(page.user_keys.iter().map(show::record));
            page_token = page.next_page_token;
            if page_token.is_empty() || !all {
                break;
            }
        }
        self.context.output.list(rows, "no records")?;
        if !page_token.is_empty() {
            self.context
                .output
                .note("there are more: --all shows every page");
        }
        Ok(())
    }
}

/// Before the call or by the call.
enum Failed {
    Locally(Failure),
    Refused(Box<tonic::Status>),
}

impl Failed {
    fn into_failure(self) -> Failure {
        match self {
            Self::Locally(failure) => failure,
            Self::Refused(status) => connect::failure(&status),
        }
    }
}

impl From<Failure> for Failed {
    fn from(failure: Failure) -> Self {
        Self::Locally(failure)
    }
}

impl From<tonic::Status> for Failed {
    fn from(status: tonic::Status) -> Self {
        Self::Refused(Box::new(status))
    }
}

/// Key material from a file or standard input, at most one byte more than is permitted, so that the broker says what is
/// wrong with a longer one.
fn read_material(path: &Path) -> Result<Vec<u8>, Failure> {
    let limit = u64::try_from(KEY_MATERIAL_BYTES_MAX + 1).unwrap_or(u64::MAX);
    let mut material = Vec::with_capacity(KEY_MATERIAL_BYTES_MAX + 1);
    let read = if path == Path::new("-") {
        io::stdin().lock().take(limit).read_to_end(&mut material)
    } else {
        std::fs::File::open(path).and_then(|file| file.take(limit).read_to_end(&mut material))
    };
    read.map_err(|error| {
        let what = format!(
            "cannot read the key material from {}: {error}",
            path.display()
        );
        Failure::new(Exit::Usage, what)
    })?;
    Ok(material)
}

/// A new file that only its owner can read. An existing one is never overwritten.
fn write_secret(path: &Path, material: &[u8]) -> Result<(), Failure> {
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .and_then(|mut file| file.write_all(material))
        .map_err(|error| {
            let what = format!("cannot write {}: {error}", path.display());
            Failure::new(Exit::Usage, what)
        })
}
