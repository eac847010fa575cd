//! Calls of the user-key service, except the calls that release key material.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use keybroker_client::{
    Error, KeyMaterial, KeyName, ListUserKeys, Reason, RequestId, Revision, UserId, UserKey,
    UserKeyRef, new_request_id,
};

use crate::cli::exit::Failure;

use super::{
    Caller, arguments,
    arguments::Key,
    material::{self, Source},
    refusal, show,
};

/// Maximum number of records on one page.
const PAGE_SIZE_MAX: u32 = 1_000;

/// The request id of a mutation.
#[derive(Args, Clone, Debug)]
pub(super) struct Retry {
    /// UUID of the request; to retry safely, send the same content with the same id [default: a new
    /// UUID]
    #[arg(long, value_name = "UUID", value_parser = arguments::request_id)]
    request_id: Option<RequestId>,
}

impl Retry {
    fn id(&self) -> RequestId {
        self.request_id.unwrap_or_else(new_request_id)
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
        /// PEM file with the RSA key of the recipient of a sealed release
        ///
        /// The token encrypts the user key to this key. With a private key (PKCS #8), the command opens the answer. With a public key,
        /// the command returns the ciphertext.
        #[arg(long, value_name = "FILE")]
        recipient: Option<PathBuf>,
        /// New file for the key material, created with mode 0600 [default: standard output]
        #[arg(long, value_name = "FILE")]
        out: Option<PathBuf>,
        /// Write to standard output even if it is a terminal
        #[arg(long, conflicts_with = "out")]
        force: bool,
    },
    /// Release the keys of several users; the keys are shown in base64
    BatchUnwrap {
        /// Users whose keys the broker releases, at most 64
        #[arg(long, required = true, num_args = 1.., value_parser = arguments::user)]
        user: Vec<UserId>,
        /// Name of the key to release for each user
        #[arg(long, default_value = "default", value_parser = arguments::key_name)]
        key_name: KeyName,
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
        /// Expected current revision, which `client get` shows; the command fails if another
        /// revision is current
        #[arg(long, value_parser = arguments::revision)]
        expected_revision: Revision,
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
        /// Show only records of this user
        #[arg(long, value_parser = arguments::user)]
        user: Option<UserId>,
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
    /// Delete a record; `client undelete` reverses the deletion
    Delete {
        #[command(flatten)]
        key: Key,
        /// Expected current revision, which `client get` shows; the command fails if another
        /// revision is current
        #[arg(long, value_parser = arguments::revision)]
        expected_revision: Revision,
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
    /// Make the key material of an earlier revision current again, as a new revision
    Restore {
        #[command(flatten)]
        key: Key,
        /// Number of the earlier revision
        #[arg(long, value_parser = arguments::revision)]
        revision: Revision,
        /// Expected current revision, which `client get` shows; the command fails if another
        /// revision is current
        #[arg(long, value_parser = arguments::revision)]
        expected_revision: Revision,
        #[command(flatten)]
        retry: Retry,
    },
}

impl Command {
    /// Checks before the call whether the command can write its output, so that the broker does not
    /// release a key that the command cannot write.
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
        let client = &self.client;
        match command {
            Command::Unwrap {
                key,
                recipient: Some(recipient),
                out,
                ..
            } => self.unwrap_for(&key.into(), &recipient, out).await,
            Command::Unwrap { key, out, .. } => self.unwrap(&key.into(), out).await,
            Command::BatchUnwrap { user, key_name, .. } => self.batch_unwrap(user, &key_name).await,
            Command::Get { key } => self.answered(client.get_user_key(&key.into()).await),
            Command::List {
                user,
                deleted,
                all,
                page_size,
            } => self.list(user, deleted, page_size, all).await,
            Command::Create { key, source, retry } => {
                let (key, id) = (key.into(), retry.id());
                self.store(&key, &source, async |material| {
                    client.create_user_key(&key, material).request_id(id).await
                })
                .await
            }
            Command::Replace {
                key,
                source,
                expected_revision,
                retry,
            } => {
                let (key, id) = (key.into(), retry.id());
                self.store(&key, &source, async |material| {
                    let replaced = client.replace_user_key(&key, material, expected_revision);
                    replaced.request_id(id).await
                })
                .await
            }
            Command::Delete {
                key,
                expected_revision,
                retry,
            } => {
                let deleted = client
                    .delete_user_key(&key.into(), expected_revision)
                    .request_id(retry.id())
                    .await;
                self.answered(deleted)
            }
            Command::Undelete { key, retry } => {
                let undeleted = client
                    .undelete_user_key(&key.into())
                    .request_id(retry.id())
                    .await;
                self.answered(undeleted).map_err(explain_active)
            }
            Command::Restore {
                key,
                revision,
                expected_revision,
                retry,
            } => {
                let restored = client
                    .restore_user_key_revision(&key.into(), revision, expected_revision)
                    .request_id(retry.id())
                    .await;
                self.answered(restored)
            }
        }
    }

    /// Sends the key material. The command removes a file with generated key material only if the
    /// broker certainly did not store this material.
    async fn store(
        &self,
        key: &UserKeyRef,
        source: &Source,
        call: impl AsyncFnOnce(&KeyMaterial) -> Result<UserKey, Error>,
    ) -> Result<(), Failure> {
        let material = source.read_for(&key.key_name)?;
        let stored = call(&material).await;
        if stored.as_ref().is_err_and(|error| !error.outcome_unknown()) {
            source.discard();
        }
        self.answered(stored)
    }

    async fn list(
        &self,
        user: Option<UserId>,
        show_deleted: bool,
        page_size: u32,
        all: bool,
    ) -> Result<(), Failure> {
        let mut rows = Vec::new();
        let mut damaged: usize = 0;
        let mut next = ListUserKeys {
            user,
            show_deleted,
            page_size,
            page_token: String::new(),
        };
        let has_more = loop {
            let page = self.client.list_user_keys(&next).await;
            let page = page.map_err(|error| refusal::failure(&error))?;
            rows.extend(page.user_keys.iter().map(show::record));
            rows.extend(page.damaged.iter().map(show::damaged_record));
            damaged += page.damaged.len();
            match page.next_page_token {
                Some(token) if all => next.page_token = token,
                token => break token.is_some(),
            }
        };
        self.output.list(rows, "no records")?;
        show::note_damaged(self.output, damaged);
        show::note_more(self.output, has_more);
        Ok(())
    }

    /// Shows the record. If a change failed, the hint explains how to retry.
    fn answered(&self, answer: Result<UserKey, Error>) -> Result<(), Failure> {
        let record = answer.map_err(|error| failure(&error))?;
        self.output.fields(show::record(&record))
    }
}

/// The general hint for `KEY_EXISTS` suggests `undelete`, which does not help a user of `undelete`.
/// Therefore this command shows its own hint.
fn explain_active(failure: Failure) -> Failure {
    if failure.reason.as_deref() == Some(Reason::KeyExists.as_str()) {
        return failure.hint("the record is not deleted, so there is nothing to undelete");
    }
    failure
}

fn failure(error: &Error) -> Failure {
    let failure = refusal::failure(error);
    match error.request_id() {
        Some(id) if error.outcome_unknown() => {
            let hint = failure.hint.clone().unwrap_or_default();
            failure.hint(format!(
                "{hint}; a retry with the same content and --request-id {id} is safe for 24 hours"
            ))
        }
        _ => failure,
    }
}
