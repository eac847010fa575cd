//! Commands that call a broker in the same way as a Bitwarden client.

use std::path::PathBuf;

use base64ct::{Base64, Encoding as _};
use clap::Args;
use uuid::Uuid;

use crate::cli::{
    client::material::{self, Destination},
    exit::{Exit, Failure},
    output::{Field, Output},
};
use keybroker_bitwarden::{EncString, MasterKey, SymmetricKey};

use super::{
    account::KeySource,
    connector::{Connector, Method},
    field,
    refusal::not_read_back,
    secrets,
    secrets::unusable,
};

#[derive(Args, Debug)]
pub(in crate::cli) struct Enrol {
    #[command(flatten)]
    connector: Connector,
    #[command(flatten)]
    key: KeySource,
    /// File with the account's protected user key; the command sends the master key to the broker
    /// only if the master key decrypts this user key
    #[arg(long, value_name = "FILE")]
    protected_key_file: Option<PathBuf>,
    /// Replace the master key in the broker (PUT). The account's vault is lost unless the new
    /// master key decrypts the account's protected user key
    #[arg(long, requires_all = ["protected_key_file", "user"])]
    replace: bool,
    /// User id of the account; must be equal to the `sub` claim of the access token
    #[arg(long, value_name = "GUID")]
    user: Option<Uuid>,
}

impl Enrol {
    pub(super) async fn run(self, output: Output) -> Result<(), Failure> {
        let broker = self.connector.open()?;
        let holder = broker.holder();
        holder.check(self.user, self.key.email())?;
        let protected = match &self.protected_key_file {
            Some(path) => Some(secrets::enc_string("--protected-key-file", path)?),
            None => None,
        };
        let Some(key) = self.key.master_key(output)? else {
            let what = "no master key to enrol was specified";
            return Err(Failure::new(Exit::Usage, what)
                .hint("pass the master key with --master-key-file, or the account with --email"));
        };
        match &protected {
            Some(protected) => drop(key.unprotect(protected).map_err(unusable)?),
            None => output.note(
                "warning: the master key was not checked against the account; pass --protected-key-file to check the master key",
            ),
        }
        let method = if self.replace {
            Method::Put
        } else {
            Method::Post
        };
        output.note(&format!(
            "the access token is for user {} ({}); only the broker verifies the access token",
            holder.user().as_deref().unwrap_or("unknown"),
            holder.email().as_deref().unwrap_or("no e-mail address"),
        ));
        broker.store(method, &key).await?;
        let kept = broker.fetch().await.map_err(not_read_back)?;
        if !kept.is(&key) {
            let what = "the broker returned a key that differs from the key that was just stored";
            return Err(Failure::new(Exit::Verification, what).hint(
                "do not convert the account; report the error to the operator of the broker",
            ));
        }
        output.fields(vec![
            field("url", broker.url()),
            field("user", holder.user()),
            field("email", holder.email()),
            field("method", method.as_str()),
            field("opens_protected_key", protected.map(|_| true)),
            field("read_back", true),
        ])
    }
}

#[derive(Args, Debug)]
pub(in crate::cli) struct Fetch {
    #[command(flatten)]
    connector: Connector,
    /// New file for the master key, created with mode 0600
    #[arg(long, value_name = "FILE", conflicts_with = "out_fd")]
    out: Option<PathBuf>,
    /// Number of an open file descriptor to write the master key to
    #[arg(long, value_name = "N")]
    out_fd: Option<u32>,
    /// Show the master key even if standard output is a terminal
    #[arg(long)]
    force: bool,
}

impl Fetch {
    pub(super) async fn run(self, output: Output) -> Result<(), Failure> {
        let destination = Destination::of(self.out.as_deref(), self.out_fd)?;
        if destination.is_none() {
            material::keep_off_terminal(self.force)?;
        }
        let broker = self.connector.open()?;
        let key = broker.fetch().await?;
        let url = field("url", broker.url());
        if let Some(destination) = destination {
            destination.write(key.expose())?;
            return output.fields(vec![url]);
        }
        if output.is_json() {
            let encoded = field("key", Base64::encode_string(key.expose()));
            return output.fields(vec![url, encoded]);
        }
        output.bytes(key.expose())
    }
}

#[derive(Args, Debug)]
pub(in crate::cli) struct Unlock {
    #[command(flatten)]
    connector: Connector,
    #[command(flatten)]
    key: KeySource,
    /// File with the account's protected user key: `2.…|…|…`
    #[arg(long, value_name = "FILE")]
    protected_key_file: PathBuf,
    /// File with a value that is encrypted with the user key, such as the name of an item
    #[arg(long, value_name = "FILE")]
    item_file: Option<PathBuf>,
    /// New file for the item's plaintext, created with mode 0600
    #[arg(long, value_name = "FILE", requires = "item_file")]
    out: Option<PathBuf>,
    /// Show the item even if standard output is a terminal
    #[arg(long, requires = "item_file")]
    force: bool,
}

impl Unlock {
    pub(super) async fn run(self, output: Output) -> Result<(), Failure> {
        let protected = secrets::enc_string("--protected-key-file", &self.protected_key_file)?;
        let item = match &self.item_file {
            Some(path) => Some(secrets::enc_string("--item-file", path)?),
            None => None,
        };
        match &self.out {
            Some(path) => material::check_new(path)?,
            None if item.is_some() => material::keep_off_terminal(self.force)?,
            None => {}
        }
        let source = self.key.name();
        if source.is_some() && self.connector.has_token() {
            let what = "both an access token and a local key were given; pass only one of them";
            return Err(Failure::new(Exit::Usage, what).hint(
                "pass an access token (--token-file, --token-fd) or a local key (--email, --master-key-file, --master-key-fd)",
            ));
        }
        let key = match self.key.master_key(output)? {
            Some(key) => key,
            None => self.connector.open()?.fetch().await?,
        };
        let from = field("key_from", source.unwrap_or("broker"));
        let user_key = open(&key, &protected)?;
        self.show(output, from, &user_key, &protected, item.as_ref())
    }

    fn show(
        &self,
        output: Output,
        key_from: Field,
        user_key: &SymmetricKey,
        protected: &EncString,
        item: Option<&EncString>,
    ) -> Result<(), Failure> {
        let mut fields = vec![
            key_from,
            field("protected_key_type", protected.number()),
            field("user_key_bytes", user_key.expose().len()),
        ];
        let Some(item) = item else {
            return output.fields(fields);
        };
        let plain = user_key.decrypt(item).map_err(unusable)?;
        fields.push(field("item_type", item.number()));
        if let Some(path) = &self.out {
            material::write_secret(path, &plain)?;
            return output.fields(fields);
        }
        if output.is_json() {
            fields.push(field("item", Base64::encode_string(&plain)));
            return output.fields(fields);
        }
        output.bytes(&plain)
    }
}

fn open(key: &MasterKey, protected: &EncString) -> Result<SymmetricKey, Failure> {
    let bytes = key.unprotect(protected).map_err(unusable)?;
    SymmetricKey::from_bytes(bytes).map_err(unusable)
}
