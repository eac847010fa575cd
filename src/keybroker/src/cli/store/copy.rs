//! `keybroker store copy`: copies all rows to another database, which may use another database
//! engine.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use clap::Args;
use serde_json::json;

use crate::{
    cli::{
        Context,
        admins::{Admins, Logins},
        block_on, change,
        exit::{Exit, Failure},
        output::Field,
        pin::UserPin,
        progress::Progress,
    },
    config::Config,
    places::Registry,
};
use keybroker_audit::Entry;
use keybroker_store as store;
use keybroker_store::{
    Settings, Tls,
    copy::{Copy, CopyError, Lacking},
    tables::Table,
    tally::Tally,
};

use super::check::{self, Report};

#[derive(Args, Debug)]
pub(in crate::cli) struct Arguments {
    #[command(flatten)]
    from: From,
    #[command(flatten)]
    to: To,
    #[command(flatten)]
    pin: UserPin,
}

/// The options of the source. If the URL of the source is `store.url`, all settings of `[store]` apply to the source. For a
/// source with another URL, only `accept_weaker_durability` and `socket_users` of `[store]` apply.
#[derive(Args, Debug)]
#[expect(clippy::struct_field_names, reason = "the fields name the options")]
struct From {
    /// URL of the source database, in the same format as `store.url` [default: `store.url`]
    #[arg(long = "from", value_name = "URL")]
    from_url: Option<String>,
    /// File with the password for the source database
    #[arg(long, value_name = "FILE", requires = "from_url")]
    from_password_file: Option<PathBuf>,
    /// TLS mode of the connection to the source database
    #[arg(long, value_name = "TLS", value_parser = ["verify", "plaintext"], requires = "from_url")]
    from_tls: Option<String>,
    /// PEM file with the CA certificate of the source database server
    #[arg(long, value_name = "FILE", requires = "from_url")]
    from_ca_file: Option<PathBuf>,
    /// Name or number of a user that may listen on the local socket of the source database, in
    /// addition to root and the user that runs this command; may be repeated [default:
    /// `store.socket_users`]
    #[arg(long = "from-socket-user", value_name = "USER", requires = "from_url")]
    from_socket_users: Vec<String>,
}

#[derive(Args, Debug)]
#[expect(clippy::struct_field_names, reason = "the fields name the options")]
struct To {
    /// URL of the destination database, in the same format as `store.url`. The destination must
    /// have the schema of this release, and must be empty except for rows of an interrupted copy
    #[arg(long = "to", value_name = "URL")]
    to_url: String,
    /// File with the password for the destination database
    #[arg(long, value_name = "FILE")]
    to_password_file: Option<PathBuf>,
    /// TLS mode of the connection to the destination database
    #[arg(long, value_name = "TLS", value_parser = ["verify", "plaintext"])]
    to_tls: Option<String>,
    /// PEM file with the CA certificate of the destination database server
    #[arg(long, value_name = "FILE")]
    to_ca_file: Option<PathBuf>,
    /// Name or number of a user that may listen on the local socket of the destination database, in
    /// addition to root and the user that runs this command; may be repeated [default:
    /// `store.socket_users`]
    #[arg(long = "to-socket-user", value_name = "USER")]
    to_socket_users: Vec<String>,
}

/// The options for the source or the destination.
struct Side<'a> {
    option: &'static str,
    url: &'a str,
    password_file: Option<&'a Path>,
    tls: Option<&'a str>,
    ca_file: Option<&'a Path>,
    /// Users that may listen on the local socket. If the list is empty, `store.socket_users`
    /// applies.
    socket_users: &'a [String],
}

impl Side<'_> {
    fn settings(&self, configured: &Settings) -> Result<Settings, Failure> {
        let mut settings = if self.url == configured.url.as_str() {
            configured.clone()
        } else {
            Settings {
                accept_weaker_durability: configured.accept_weaker_durability.clone(),
                socket_users: configured.socket_users.clone(),
                ..Settings::new(self.url)
            }
        };
        if let Some(path) = self.password_file {
            settings.password_file = Some(absolute(path)?);
            settings.password_variable = None;
        }
        if let Some(path) = self.ca_file {
            settings.ca_file = Some(absolute(path)?);
        }
        if let Some(tls) = self.tls {
            settings.tls = if tls == "plaintext" {
                Tls::Plaintext
            } else {
                Tls::Verify
            };
        }
        if !self.socket_users.is_empty() {
            settings.socket_users = Some(self.socket_users.to_vec());
        }
        let mut problems = settings.problems();
        if problems.is_empty() {
            problems = settings.file_problems();
        }
        if problems.is_empty() {
            return Ok(settings);
        }
        let what = format!("--{}: {}", self.option, problems.join("\n  "));
        Err(Failure::new(Exit::Usage, what))
    }
}

fn absolute(path: &Path) -> Result<PathBuf, Failure> {
    std::path::absolute(path)
        .map_err(|error| Failure::new(Exit::Usage, format!("{}: {error}", path.display())))
}

/// The number of source rows for each table, and the result of checking the copy with the token.
struct Outcome {
    rows: Vec<(Table, u64)>,
    checked: Report,
}

pub(super) fn run(arguments: &Arguments, context: &Context) -> Result<(), Failure> {
    let logins = Logins::of(context, &arguments.pin)?;
    let config = logins.config()?;
    let (from, to) = sides(arguments, config)?;
    // Log in before writing to the destination, because an unverified copy must not be made.
    let registry = block_on(async {
        let source = store::open_tables(&from).await?;
        let registry = Registry::read(&*source).await;
        source.close().await;
        registry
    })?
    .map_err(CopyError::Source)?;
    let admins = logins.log_in(context, &registry)?;
    let hint = "stop the broker, because its changes during the copy would be lost";
    let _locks = (super::lock(&from, hint)?, super::lock(&to, hint)?);
    let added = Arc::new(Tally::default());
    let describe = |entry: &mut Entry| entry.count = added.rows_if_begun();
    let outcome = change::audited(context, config, "store.copy", describe, || {
        block_on(copy(context, &from, &to, &admins, &added))?
    })?;
    let mut fields: Vec<Field> = outcome
        .rows
        .iter()
        .map(|(table, rows)| (table.name(), json!(rows)))
        .collect();
    fields.push(("added", json!(added.rows())));
    fields.push(("bad", json!(outcome.checked.bad)));
    context.output.fields(fields)?;
    outcome.checked.verdict().map_err(|failure| {
        failure.hint(
            "the copy equals the original byte for byte; `keybroker store check` reports the same bad rows in the original",
        )
    })?;
    context.output.note(
        "both databases are equal, and the token verified every revision, every API client and the registry of the \
         copy. Set `store.url` to the new URL. Do not let a broker use the old database again: the copy lacks every \
         change made since the comparison.",
    );
    Ok(())
}

fn sides(arguments: &Arguments, config: &Config) -> Result<(Settings, Settings), Failure> {
    let (from, to) = (&arguments.from, &arguments.to);
    let from = Side {
        option: "from",
        url: from
            .from_url
            .as_deref()
            .unwrap_or(config.store.url.as_str()),
        password_file: from.from_password_file.as_deref(),
        tls: from.from_tls.as_deref(),
        ca_file: from.from_ca_file.as_deref(),
        socket_users: &from.from_socket_users,
    };
    let to = Side {
        option: "to",
        url: &to.to_url,
        password_file: to.to_password_file.as_deref(),
        tls: to.to_tls.as_deref(),
        ca_file: to.to_ca_file.as_deref(),
        socket_users: &to.to_socket_users,
    };
    let (from, to) = (from.settings(&config.store)?, to.settings(&config.store)?);
    let file = |settings: &Settings| settings.file().and_then(|path| fs::canonicalize(path).ok());
    if from.url == to.url || (file(&from).is_some() && file(&from) == file(&to)) {
        let what = "--from and --to are the same database; nothing was copied";
        return Err(Failure::new(Exit::Usage, what));
    }
    Ok((from, to))
}

async fn copy(
    context: &Context,
    from: &Settings,
    to: &Settings,
    admins: &Admins,
    added: &Arc<Tally>,
) -> Result<Outcome, Failure> {
    let source = store::open_tables(from).await.map_err(CopyError::Source)?;
    let target = store::open_tables(to).await.map_err(|error| {
        let is_schema = matches!(error, store::Error::Schema(_));
        let failure = Failure::from(CopyError::Target(error));
        if is_schema {
            failure.hint(
                "create the schema with a configuration whose `store.url` is the destination: `keybroker --config FILE \
                 store migrate`",
            )
        } else {
            failure
        }
    })?;
    let copy = Copy {
        from: source,
        to: target,
        added: Arc::clone(added),
    };
    let result = carry_out(context, &copy, admins).await;
    copy.from.close().await;
    copy.to.close().await;
    result
}

async fn carry_out(context: &Context, copy: &Copy, admins: &Admins) -> Result<Outcome, Failure> {
    if !copy.is_target_empty().await? {
        walk_all(context, copy, "comparing what is there", Lacking::Ignore).await?;
    }
    walk_all(context, copy, "copying rows", Lacking::Add).await?;
    // The comparison comes after the slow check with the token, so that the comparison detects
    // changes during the check.
    let checked = check::scan(context, &copy.to, admins).await?;
    let rows = compare(context, copy).await.map_err(|failure| {
        failure.hint(
            "the source database was changed during the copy: stop every broker that uses it, empty the destination, \
             and copy again",
        )
    })?;
    copy.carry_identity().await?;
    Ok(Outcome { rows, checked })
}

/// Counts the rows of each table of the source. Fails unless the destination has exactly the same
/// rows.
async fn compare(context: &Context, copy: &Copy) -> Result<Vec<(Table, u64)>, Failure> {
    let rows = walk_all(context, copy, "comparing rows", Lacking::Refuse).await?;
    copy.look_again().await?;
    Ok(rows)
}

/// Processes all tables and returns the number of rows in each table.
async fn walk_all(
    context: &Context,
    copy: &Copy,
    what: &'static str,
    lacking: Lacking,
) -> Result<Vec<(Table, u64)>, Failure> {
    let mut total = 0;
    for table in Table::ALL {
        total += copy.from.count(table).await.map_err(CopyError::Source)?;
    }
    let progress = Progress::new(context.output, what, total);
    let mut rows = Vec::new();
    for table in Table::ALL {
        let walked = copy.walk(table, lacking, || progress.step()).await?;
        rows.push((table, walked.rows));
    }
    Ok(rows)
}

impl std::convert::From<CopyError> for Failure {
    fn from(error: CopyError) -> Self {
        let what = error.to_string();
        match error {
            CopyError::Source(error) | CopyError::Target(error) => {
                let began = !matches!(error, store::Error::Schema(_) | store::Error::Durability(_));
                let failure = Self {
                    message: what,
                    ..Self::from(error)
                };
                if !began {
                    return failure;
                }
                failure.hint(
                    "run the same command again to continue; if a row is refused, `keybroker store check` on the source \
                     database shows the refused row",
                )
            }
            CopyError::Extra(_) | CopyError::Differs(_) | CopyError::Missing(_) => {
                Self::new(Exit::Verification, what).hint(
                    "the destination has rows that are not part of this copy, so the destination was not changed: choose \
                     an empty database, or find out which of the two databases is correct",
                )
            }
        }
    }
}
