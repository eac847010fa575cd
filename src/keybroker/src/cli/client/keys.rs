//! Calls of the user-key service that take key material in, or touch none.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use tonic::transport::Channel;
use uuid::Uuid;

use crate::cli::exit::{Exit, Failure};
use keybroker_core::error::Reason;
use keybroker_proto as proto;
use keybroker_proto::user_key_service_client::UserKeyServiceClient;

use super::{
    Caller,
    material::{self, Source},
    refusal, show,
};

/// Largest number of records on one page.
const PAGE_SIZE_MAX: u32 = 1_000;

/// Options that name a user key.
#[derive(Args, Clone, Debug)]
pub(super) struct Key {
    /// User of the key, 1 to 255 bytes
    #[arg(long)]
    user: String,
    /// Key name, 1 to 64 bytes of [a-z0-9._-]
    #[arg(long, default_value = "default")]
    key_name: String,
}

/// Makes the retry of a mutation safe.
#[derive(Args, Clone, Debug)]
pub(super) struct Retry {
    /// UUID that makes a retry safe: send it again with the same content [default: a new one]
    #[arg(long, value_name = "UUID")]
    request_id: Option<Uuid>,
}

impl Retry {
    fn id(&self) -> Uuid {
        self.request_id.unwrap_or_else(Uuid::new_v4)
    }
}

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Store a new user key
    Create {
        #[command(flatten)]
        key: Key,
        #[command(flatten)]
        source: Source,
        #[command(flatten)]
        retry: Retry,
    },
    /// Release a user key: raw bytes to a file or a pipe, base64 with `-o json`
    Unwrap {
        #[command(flatten)]
        key: Key,
        /// New file for the key material, mode 0600; without it, standard output
        #[arg(long, value_name = "FILE")]
        out: Option<PathBuf>,
        /// Write to standard output even if it is a terminal
        #[arg(long, conflicts_with = "out")]
        force: bool,
    },
    /// Release the keys of several users, in base64
    BatchUnwrap {
        /// Users whose keys to release, at most 64
        #[arg(long, required = true, num_args = 1..)]
        user: Vec<String>,
        /// Name of the keys
        #[arg(long, default_value = "default")]
        key_name: String,
        /// Write to standard output even if it is a terminal
        #[arg(long)]
        force: bool,
    },
    /// Store new key material as the next revision
    Replace {
        #[command(flatten)]
        key: Key,
        #[command(flatten)]
        source: Source,
        /// Revision that you expect to be current, as `client get` shows it; the command fails if it is not
        #[arg(long)]
        expected_revision: u64,
        #[command(flatten)]
        retry: Retry,
    },
    /// Show the metadata of a record
    Get {
        #[command(flatten)]
        key: Key,
    },
    /// List records
    List {
        /// Only records of this user
        #[arg(long, default_value = "")]
        user: String,
        /// Include deleted records
        #[arg(long)]
        deleted: bool,
        /// Show all pages, not only the first
        #[arg(long)]
        all: bool,
        /// Records per page, 1 to 1000
        #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=i64::from(PAGE_SIZE_MAX)))]
        page_size: u32,
    },
    /// Delete a record; it can be undeleted
    Delete {
        #[command(flatten)]
        key: Key,
        /// Revision that you expect to be current, as `client get` shows it; the command fails if it is not
        #[arg(long)]
        expected_revision: u64,
        #[command(flatten)]
        retry: Retry,
    },
    /// Make a deleted record active again
    Undelete {
        #[command(flatten)]
        key: Key,
        #[command(flatten)]
        retry: Retry,
    },
    /// Make the material of an earlier revision current again
    Restore {
        #[command(flatten)]
        key: Key,
        /// Number of the earlier revision
        #[arg(long)]
        revision: u64,
        /// Revision that you expect to be current, as `client get` shows it; the command fails if it is not
        #[arg(long)]
        expected_revision: u64,
        #[command(flatten)]
        retry: Retry,
    },
}

impl Command {
    /// Checks the output file before the call, so that no key is released that cannot be written.
    pub(super) fn check(&self) -> Result<(), Failure> {
        match self {
            Self::Unwrap {
                out: Some(path), ..
            } => material::check_new(path),
            Self::Unwrap { force, .. } | Self::BatchUnwrap { force, .. } => {
                material::keep_off_terminal(*force)
            }
            _ => Ok(()),
        }
    }
}

impl Caller {
    pub(super) async fn keys(&self, command: Command) -> Result<(), Failure> {
        let mut service = UserKeyServiceClient::new(self.channel.clone());
        match command {
            Command::Unwrap { key, out, .. } => {
                let message = proto::UnwrapUserKeyRequest {
                    user: key.user,
                    key_name: key.key_name,
                };
                self.unwrap(service, message, out).await
            }
            Command::BatchUnwrap { user, key_name, .. } => {
                self.batch_unwrap(service, user, key_name).await
            }
            Command::Get {
                key: Key { user, key_name },
            } => {
                let message = proto::GetUserKeyRequest { user, key_name };
                let got = self
                    .retried(message, async |request| service.get_user_key(request).await)
                    .await?;
                self.show(got.user_key)
            }
            Command::List {
                user,
                deleted,
                all,
                page_size,
            } => {
                let first = proto::ListUserKeysRequest {
                    page_size,
                    page_token: String::new(),
                    user,
                    show_deleted: deleted,
                };
                self.list(service, first, all).await
            }
            Command::Create { key, source, retry } => {
                self.create(service, key, &source, retry.id()).await
            }
            Command::Replace {
                key,
                source,
                expected_revision,
                retry,
            } => {
                let expected = expected_revision;
                self.replace(service, key, &source, expected, retry.id())
                    .await
            }
            Command::Delete { .. } | Command::Undelete { .. } | Command::Restore { .. } => {
                self.change(service, command).await
            }
        }
    }

    async fn create(
        &self,
        mut service: UserKeyServiceClient<Channel>,
        key: Key,
        source: &Source,
        id: Uuid,
    ) -> Result<(), Failure> {
        let material = source.read_for(&key.key_name)?;
        let message = proto::CreateUserKeyRequest {
            user: key.user,
            key_name: key.key_name,
            key_material: material.to_vec(),
            request_id: id.to_string(),
        };
        let call = self.retried(message, async |request| {
            service.create_user_key(request).await
        });
        let created = call.await.inspect_err(|failure| discard(source, failure));
        self.show(created.map_err(|failure| retry_hint(failure, id))?.user_key)
    }

    async fn replace(
        &self,
        mut service: UserKeyServiceClient<Channel>,
        key: Key,
        source: &Source,
        expected_revision: u64,
        id: Uuid,
    ) -> Result<(), Failure> {
        let material = source.read_for(&key.key_name)?;
        let message = proto::ReplaceUserKeyRequest {
            user: key.user,
            key_name: key.key_name,
            key_material: material.to_vec(),
            expected_revision,
            request_id: id.to_string(),
        };
        let call = self.retried(message, async |request| {
            service.replace_user_key(request).await
        });
        let replaced = call.await.inspect_err(|failure| discard(source, failure));
        self.show(
            replaced
                .map_err(|failure| retry_hint(failure, id))?
                .user_key,
        )
    }

    /// Changes that carry no key material.
    async fn change(
        &self,
        mut service: UserKeyServiceClient<Channel>,
        command: Command,
    ) -> Result<(), Failure> {
        let (id, changed) = match command {
            Command::Delete {
                key: Key { user, key_name },
                expected_revision,
                retry,
            } => {
                let id = retry.id();
                let message = proto::DeleteUserKeyRequest {
                    user,
                    key_name,
                    expected_revision,
                    request_id: id.to_string(),
                };
                let call = self.retried(message, async |request| {
                    service.delete_user_key(request).await
                });
                (id, call.await.map(|deleted| deleted.user_key))
            }
            Command::Undelete {
                key: Key { user, key_name },
                retry,
            } => {
                let id = retry.id();
                let message = proto::UndeleteUserKeyRequest {
                    user,
                    key_name,
                    request_id: id.to_string(),
                };
                let call = self.retried(message, async |request| {
                    service.undelete_user_key(request).await
                });
                let undeleted = call.await.map_err(explain_active);
                (id, undeleted.map(|undeleted| undeleted.user_key))
            }
            Command::Restore {
                key: Key { user, key_name },
                revision,
                expected_revision,
                retry,
            } => {
                let id = retry.id();
                let message = proto::RestoreUserKeyRevisionRequest {
                    user,
                    key_name,
                    revision,
                    expected_revision,
                    request_id: id.to_string(),
                };
                let call = self.retried(message, async |request| {
                    service.restore_user_key_revision(request).await
                });
                (id, call.await.map(|restored| restored.user_key))
            }
            _ => {
                return Err(Failure::new(
                    Exit::Internal,
                    "not a change without material",
                ));
            }
        };
        self.show(changed.map_err(|failure| retry_hint(failure, id))?)
    }

    async fn list(
        &self,
        mut service: UserKeyServiceClient<Channel>,
        first: proto::ListUserKeysRequest,
        all: bool,
    ) -> Result<(), Failure> {
        let mut rows = Vec::new();
        let mut damaged: usize = 0;
        let mut next = first;
        loop {
            let page = self
                .retried(next.clone(), async |request| {
                    service.list_user_keys(request).await
                })
                .await?;
            rows.extend(page.user_keys.iter().map(show::record));
            rows.extend(page.damaged.iter().map(show::damaged_record));
            damaged += page.damaged.len();
            next.page_token = page.next_page_token;
            if next.page_token.is_empty() || !all {
                break;
            }
        }
        self.output.list(rows, "no records")?;
        show::note_damaged(self.output, damaged);
        if !next.page_token.is_empty() {
            self.output.note("there are more: --all shows every page");
        }
        Ok(())
    }

    fn show(&self, record: Option<proto::UserKey>) -> Result<(), Failure> {
        let record = record.ok_or_else(|| {
            Failure::new(Exit::Refused, "the broker's answer is empty")
                .hint("is it a broker of a later release?")
        })?;
        self.output.fields(show::record(&record))
    }
}

/// Keeps generated material as long as it is unknown whether it was stored.
fn discard(source: &Source, failure: &Failure) {
    if !refusal::is_uncertain(failure) {
        source.discard();
    }
}

/// The hint of this reason for other commands is to undelete the record.
fn explain_active(failure: Failure) -> Failure {
    if failure.reason.as_deref() == Some(Reason::KeyExists.as_str()) {
        return failure.hint("the record is active already, so there is nothing to undelete");
    }
    failure
}

fn retry_hint(failure: Failure, id: Uuid) -> Failure {
    if !refusal::is_uncertain(&failure) {
        return failure;
    }
    let hint = failure.hint.clone().unwrap_or_default();
    failure.hint(format!(
        "{hint}; a retry with the same content and --request-id {id} is safe for 24 hours"
    ))
}
