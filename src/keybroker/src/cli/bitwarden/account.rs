//! Options that select a master key: the e-mail address, password and KDF of an account, or the
//! master key itself.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use crate::cli::{
    exit::{Exit, Failure},
    output::{Field, Output},
};
use keybroker_bitwarden::{Email, Kdf, MASTER_KEY_BYTES, MasterKey, Password, Salt};

use super::{
    field,
    secrets::{self, unusable},
};

/// The key derivation functions of accounts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Function {
    /// PBKDF2-SHA256 (Bitwarden's `kdf` value 0)
    Pbkdf2,
    /// Argon2id (Bitwarden's `kdf` value 1)
    Argon2id,
}

/// The KDF parameters that the account's settings show.
#[derive(Args, Clone, Debug)]
pub(super) struct Parameters {
    /// Salt that the Bitwarden server sends for the account before the login [default: the e-mail
    /// address]
    #[arg(long, value_name = "TEXT", requires = "email")]
    salt: Option<String>,
    /// Key derivation function of the account
    #[arg(long, value_enum, default_value = "pbkdf2")]
    kdf: Function,
    /// Number of iterations [default: 600000 for PBKDF2, 3 for Argon2id]
    #[arg(long, value_name = "COUNT")]
    iterations: Option<u32>,
    /// Memory that Argon2id uses, in MiB [default: 64]
    #[arg(long, value_name = "MIB")]
    memory_mib: Option<u32>,
    /// Parallelism of Argon2id [default: 4]
    #[arg(long, value_name = "COUNT")]
    parallelism: Option<u32>,
}

impl Parameters {
    fn kdf(&self) -> Result<Kdf, Failure> {
        kdf(
            self.kdf,
            [self.iterations, self.memory_mib, self.parallelism],
        )
    }

    fn salt(&self, email: &Email) -> Result<Salt, Failure> {
        let salt = self.salt.as_deref().map(Salt::parse);
        salt.map_or_else(|| Ok(email.into()), |salt| salt.map_err(unusable))
    }
}

/// The KDF with the parameters iterations, memory and parallelism. A missing parameter gets its
/// recommended value.
pub(super) fn kdf(
    function: Function,
    [iterations, memory_mib, parallelism]: [Option<u32>; 3],
) -> Result<Kdf, Failure> {
    let kdf = match function {
        Function::Pbkdf2 if memory_mib.is_some() || parallelism.is_some() => {
            let what = "memory and parallelism are parameters of Argon2id, not of PBKDF2";
            return Err(Failure::new(Exit::Usage, what).hint(
                "the account's settings show the KDF of the account: pass this KDF with --kdf",
            ));
        }
        Function::Pbkdf2 => Kdf::Pbkdf2 {
            iterations: iterations.unwrap_or(600_000),
        },
        Function::Argon2id => Kdf::Argon2id {
            iterations: iterations.unwrap_or(3),
            memory_mib: memory_mib.unwrap_or(64),
            parallelism: parallelism.unwrap_or(4),
        },
    };
    kdf.check().map_err(unusable)?;
    Ok(kdf)
}

/// The KDF parameters as output fields, which have the names of the options.
pub(super) fn kdf_fields(kdf: Kdf) -> Vec<Field> {
    let (name, iterations, memory, parallelism) = match kdf {
        Kdf::Pbkdf2 { iterations } => ("pbkdf2", iterations, None, None),
        Kdf::Argon2id {
            iterations,
            memory_mib,
            parallelism,
        } => ("argon2id", iterations, Some(memory_mib), Some(parallelism)),
    };
    vec![
        field("kdf", name),
        field("iterations", iterations),
        field("memory_mib", memory),
        field("parallelism", parallelism),
        field("warning", kdf.warning()),
    ]
}

/// Prints a warning if a KDF is weaker than recommended or stronger than Bitwarden clients offer.
/// The output field `warning` contains the same text for programs.
pub(super) fn warn(output: Output, kdf: Kdf) {
    if let Some(warning) = kdf.warning() {
        output.note(&format!(
            "warning: {warning}; change the KDF with `keybroker bitwarden change-kdf`"
        ));
    }
}

/// The source of the master password. The password is never a command-line argument.
#[derive(Args, Clone, Debug)]
#[group(skip)]
pub(super) struct PasswordSource {
    /// File with the master password, readable only by its owner [default: prompt at the terminal]
    #[arg(
        long,
        value_name = "FILE",
        conflicts_with = "password_fd",
        requires = "email"
    )]
    password_file: Option<PathBuf>,
    /// Number of an open file descriptor to read the master password from
    #[arg(long, value_name = "N", requires = "email")]
    password_fd: Option<u32>,
}

/// Options that select an account and the source of its password.
#[derive(Args, Clone, Debug)]
#[group(skip)]
pub(super) struct Account {
    /// E-mail address of the account
    #[arg(long, value_name = "ADDRESS")]
    email: String,
    #[command(flatten)]
    password: PasswordSource,
    #[command(flatten)]
    parameters: Parameters,
}

impl Account {
    /// Parses the options and reads the password.
    pub(super) fn open(&self) -> Result<Opened, Failure> {
        open(&self.email, &self.password, &self.parameters)
    }
}

/// The inputs for deriving a master key of an account.
pub(super) struct Opened {
    pub(super) email: Email,
    pub(super) password: Password,
    pub(super) kdf: Kdf,
    salt: Salt,
}

impl Opened {
    pub(super) fn master_key(&self) -> Result<MasterKey, Failure> {
        self.master_key_of(self.kdf)
    }

    /// The master key that another KDF derives from the account's password.
    pub(super) fn master_key_of(&self, kdf: Kdf) -> Result<MasterKey, Failure> {
        kdf.master_key(&self.password, &self.salt).map_err(unusable)
    }
}

fn open(
    email: &str,
    password: &PasswordSource,
    parameters: &Parameters,
) -> Result<Opened, Failure> {
    // Report invalid options before the password prompt.
    let (email, kdf) = (Email::parse(email).map_err(unusable)?, parameters.kdf()?);
    let salt = parameters.salt(&email)?;
    let source = secrets::Source {
        what: "the master password",
        file: password.password_file.as_deref(),
        descriptor: password.password_fd,
    };
    let text = source.line_or_prompt("Master password: ")?;
    let password = Password::new(text).map_err(unusable)?;
    Ok(Opened {
        email,
        password,
        kdf,
        salt,
    })
}

/// A master key, or an account from which a master key is derived.
#[derive(Args, Clone, Debug)]
#[group(skip)]
pub(super) struct KeySource {
    /// File with the master key (32 bytes, or the base64 of 32 bytes), readable only by its owner
    #[arg(long, value_name = "FILE", conflicts_with_all = ["master_key_fd", "email"])]
    master_key_file: Option<PathBuf>,
    /// Number of an open file descriptor to read the master key from
    #[arg(long, value_name = "N", conflicts_with = "email")]
    master_key_fd: Option<u32>,
    /// E-mail address of the account, to derive the master key from the account's password
    #[arg(long, value_name = "ADDRESS")]
    email: Option<String>,
    #[command(flatten)]
    password: PasswordSource,
    #[command(flatten)]
    parameters: Parameters,
}

impl KeySource {
    /// The kind of the selected source; `None` if no option selects a source.
    pub(super) fn name(&self) -> Option<&'static str> {
        if self.email.is_some() {
            return Some("password");
        }
        let is_named = self.master_key_file.is_some() || self.master_key_fd.is_some();
        is_named.then_some("master-key")
    }

    /// The e-mail address of the account, if the master key is derived from the password.
    pub(super) fn email(&self) -> Option<&str> {
        self.email.as_deref()
    }

    /// Reads or derives the master key; `None` if no option selects a source.
    pub(super) fn master_key(&self, output: Output) -> Result<Option<MasterKey>, Failure> {
        if let Some(email) = &self.email {
            let opened = open(email, &self.password, &self.parameters)?;
            warn(output, opened.kdf);
            return opened.master_key().map(Some);
        }
        let source = secrets::Source {
            what: "the master key",
            file: self.master_key_file.as_deref(),
            descriptor: self.master_key_fd,
        };
        if source.is_none() {
            return Ok(None);
        }
        let bytes = source.key(MASTER_KEY_BYTES)?;
        MasterKey::from_bytes(bytes).map(Some).map_err(unusable)
    }
}
