//! Commands that derive master keys from passwords, without a broker.

use std::path::PathBuf;

use clap::Args;
use subtle::ConstantTimeEq as _;

use crate::cli::{
    client::material::{self, Destination},
    exit::{Exit, Failure},
    output::Output,
};

use super::{
    account::{self, Account, Function},
    field, secrets,
    secrets::unusable,
};

#[derive(Args, Debug)]
pub(in crate::cli) struct Derive {
    #[command(flatten)]
    account: Account,
    /// New file for the master key, created with mode 0600 [default: the command does not output
    /// the master key]
    #[arg(long, value_name = "FILE", conflicts_with = "out_fd")]
    out: Option<PathBuf>,
    /// Number of an open file descriptor to write the master key to
    #[arg(long, value_name = "N")]
    out_fd: Option<u32>,
}

impl Derive {
    pub(super) fn run(&self, output: Output) -> Result<(), Failure> {
        let destination = Destination::of(self.out.as_deref(), self.out_fd)?;
        let account = self.account.open()?;
        account::warn(output, account.kdf);
        let key = account.master_key()?;
        if let Some(destination) = destination {
            destination.write(key.expose())?;
        }
        let hash = key.authentication_hash(&account.password);
        let mut fields = vec![field("email", account.email.as_str())];
        fields.extend(account::kdf_fields(account.kdf));
        fields.push(field("authentication_hash", hash.as_str()));
        output.fields(fields)
    }
}

#[derive(Args, Debug)]
pub(in crate::cli) struct ChangeKdf {
    #[command(flatten)]
    account: Account,
    /// File with the account's current protected user key: `2.…|…|…`
    #[arg(long, value_name = "FILE")]
    protected_key_file: PathBuf,
    /// New key derivation function of the account
    #[arg(long, value_enum)]
    new_kdf: Function,
    /// Number of iterations of the new key derivation function [default: 600000 for PBKDF2, 3 for
    /// Argon2id]
    #[arg(long, value_name = "COUNT")]
    new_iterations: Option<u32>,
    /// Memory that the new Argon2id function uses, in MiB [default: 64]
    #[arg(long, value_name = "MIB")]
    new_memory_mib: Option<u32>,
    /// Parallelism of the new Argon2id function [default: 4]
    #[arg(long, value_name = "COUNT")]
    new_parallelism: Option<u32>,
    /// New file for the protected user key; the command also shows the protected user key
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

impl ChangeKdf {
    pub(super) fn run(&self, output: Output) -> Result<(), Failure> {
        let parameters = [
            self.new_iterations,
            self.new_memory_mib,
            self.new_parallelism,
        ];
        let new_kdf = account::kdf(self.new_kdf, parameters)?;
        new_kdf.check_new().map_err(unusable)?;
        if let Some(path) = &self.out {
            material::check_new(path)?;
        }
        let protected = secrets::enc_string("--protected-key-file", &self.protected_key_file)?;
        let account = self.account.open()?;
        account::warn(output, new_kdf);
        let old = account.master_key()?;
        let user_key = old.unprotect(&protected).map_err(unusable)?;
        let new = account.master_key_of(new_kdf)?;
        let protected = new.protect(&user_key).map_err(unusable)?;
        // Before writing the protected key, check that the new master key decrypts the protected
        // key to the same user key.
        let again = new.unprotect(&protected).map_err(unusable)?;
        if !bool::from(again.ct_eq(&user_key)) {
            let what = "the new protected user key does not decrypt to the original user key";
            return Err(Failure::new(Exit::Internal, what));
        }
        if let Some(path) = &self.out {
            material::write_secret(path, format!("{protected}\n").as_bytes())?;
        }
        let hash = old.authentication_hash(&account.password);
        let new_hash = new.authentication_hash(&account.password);
        let mut fields = vec![field("email", account.email.as_str())];
        fields.extend(account::kdf_fields(new_kdf));
        fields.push(field("authentication_hash", hash.as_str()));
        fields.push(field("new_authentication_hash", new_hash.as_str()));
        fields.push(field("protected_key", protected.to_string()));
        output.note(
            "nothing has changed yet: the account gets the new KDF when the Bitwarden server accepts the new hash, KDF \
             and protected user key together. Then fetch the account's new `Key`, and run `keybroker bitwarden \
             enrol` with this `Key` and the new master key",
        );
        output.fields(fields)
    }
}
