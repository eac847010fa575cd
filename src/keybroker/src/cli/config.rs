//! `keybroker config`: checks and shows the configuration.

use std::path::Path;

use clap::Subcommand;

use keybroker_core::error::chain;
use keybroker_hsm::admin::{self, Listed};
use keybroker_store as store;
use keybroker_worker_protocol::{check_environment, check_module, softhsm_problem, unpadded};

use crate::config::Config;

use super::{
    Context, OWN_PROGRAM, block_on, environment,
    exit::{Exit, Failure},
    pin, token,
};

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Check the configuration, the files that it names, and the token, and report every problem
    ///
    /// The command loads the PKCS#11 module in a separate process and lists its tokens, but does
    /// not log in to a token. If the database is on a server, the command connects to the server
    /// and checks its version, the schema and the session pooling.
    Check,
    /// Show the configuration with all defaults; the configuration contains no secrets
    Show,
}

pub(super) fn run(command: &Command, context: &Context) -> Result<(), Failure> {
    let mut config = context.config_as_written()?;
    match command {
        Command::Check => {
            let mut problems = config.problems();
            let files = config.examine_files();
            problems.extend(files.problems);
            let (token_problems, token_notes) = examine_tokens(&mut config);
            problems.extend(token_problems);
            let (store_problem, store_note) = examine_store(&config.store)?;
            problems.extend(store_problem);
            for note in files.notes.iter().chain(&token_notes).chain(&store_note) {
                context.output.note(note);
            }
            if problems.is_empty() {
                let valid = "the configuration is valid";
                return context.output.sentence("verdict", valid);
            }
            Err(context.bad_config(&problems))
        }
        Command::Show if context.output.is_json() => {
            let value = serde_json::to_value(&config)
                .map_err(|error| Failure::new(Exit::Internal, error.to_string()))?;
            context.output.json(&value)
        }
        Command::Show => {
            let text = toml::to_string(&config)
                .map_err(|error| Failure::new(Exit::Internal, error.to_string()))?;
            context.output.text(text.trim_end())
        }
    }
}

/// Checks a database server in the same way as `serve` does when it starts. Returns a problem, a
/// note, or neither. An unreachable server causes only a note, because operators often check a
/// configuration before the database exists.
fn examine_store(settings: &store::Settings) -> Result<(Option<String>, Option<String>), Failure> {
    let is_server = settings.file().is_none();
    // The check of the configuration and its files already reports problems of `[store]`.
    if !is_server || !settings.problems().is_empty() || !settings.file_problems().is_empty() {
        return Ok((None, None));
    }
    let found = match block_on(store::status(settings))? {
        Ok(status) if status.current == status.newest => {
            Ok("the database is reachable and has the schema of this release".to_owned())
        }
        Ok(status) => Ok(format!(
            "the database is reachable; its schema is {} and this release needs {}: run `keybroker store migrate`",
            status.current, status.newest
        )),
        Err(error @ (store::Error::Schema(_) | store::Error::Durability(_))) => Err(chain(&error)),
        // If a pooler shares a session between clients, another statement may fail before the check for poolers.
        Err(error) if error.is_shared_session() => Err(chain(&error)),
        Err(error) => Ok(format!("the database was not examined: {}", chain(&error))),
    };
    Ok(match found {
        Ok(note) => (None, Some(format!("[store]: {note}"))),
        Err(problem) => (Some(format!("[store]: {problem}")), None),
    })
}

/// Examines each token of the configuration, and returns problems and notes.
fn examine_tokens(config: &mut Config) -> (Vec<String>, Vec<String>) {
    let (mut problems, mut notes) = (Vec::new(), Vec::new());
    let names: Vec<String> = config
        .tokens
        .all()
        .iter()
        .map(|one| one.name.clone())
        .collect();
    for name in names {
        // The check of the settings already reports a name that several tokens share.
        if config.select_token(Some(&name)).is_err() {
            continue;
        }
        let prefix = config.tokens.prefix(config.token());
        let (found, note) = examine_token(config);
        problems.extend(found.into_iter().map(|what| format!("{prefix}{what}")));
        notes.extend(note.map(|what| format!("{prefix}{what}")));
    }
    (problems, notes)
}

/// Loads the module in an admin worker and examines the token that the settings select. Returns problems and a note.
fn examine_token(config: &Config) -> (Vec<String>, Option<String>) {
    let settings = config.token();
    // The check of the configured files already reports problems of the module and of its environment.
    if check_module(&settings.module).is_err() || check_environment(&settings.environment).is_err()
    {
        let note = "[token]: the module was not loaded, so the token was not examined".to_owned();
        return (Vec::new(), Some(note));
    }
    if let Some(problem) = softhsm_problem(&settings.module, &settings.environment) {
        return (vec![problem], None);
    }
    match admin::list_tokens(Path::new(OWN_PROGRAM), settings) {
        Ok(listed) => examine_listed(&listed, config),
        Err(error) => {
            let hint = environment::hint(&error, config);
            let hint = hint.map_or_else(String::new, |hint| format!("; {hint}"));
            (vec![format!("[token]: {error}{hint}")], None)
        }
    }
}

/// If several tokens match the settings, returns the only token whose serial number is in the
/// registry, as `serve` does.
fn of_the_registry<'a>(several: &[&'a Listed], config: &Config) -> Option<&'a Listed> {
    // If the registry cannot be read from the database, only the settings select the token.
    let rows = token::registry(config).unwrap_or_default();
    let serials = pin::serials(&rows.rows);
    let mut registered = several.iter().filter(|token| {
        let serial = token.info.serial.as_str();
        !serial.is_empty() && serials.iter().any(|known| unpadded(known) == serial)
    });
    match (registered.next(), registered.next()) {
        (Some(token), None) => Some(token),
        _ => None,
    }
}

fn shown(token: &Listed) -> String {
    format!(
        "{:?} (serial {:?})",
        unpadded(&token.info.label),
        token.info.serial
    )
}

/// Returns the token that the settings select, or problems and a note if the settings do not select exactly one token.
fn choose<'a>(
    listed: &'a [Listed],
    chosen: &[&'a Listed],
    config: &Config,
) -> Result<&'a Listed, (Vec<String>, Option<String>)> {
    let several = match chosen {
        [token] => return Ok(token),
        [] => {
            let others: Vec<_> = listed
                .iter()
                .filter(|token| token.initialised)
                .map(shown)
                .collect();
            if others.is_empty() {
                let note = "[token]: the module can be loaded, but shows no initialised token; initialise a token with \
                     `keybroker token init`";
                return Err((Vec::new(), Some(note.to_owned())));
            }
            let problem = format!(
                "[token]: no token matches `label`, `serial` or `uri`; the module shows {}",
                others.join(", ")
            );
            return Err((vec![problem], None));
        }
        several => several,
    };
    of_the_registry(several, config).ok_or_else(|| {
        let all: Vec<_> = several.iter().copied().map(shown).collect();
        let problem = format!(
            "[token]: more than one token matches the settings: {}; select one of these tokens with `serial`",
            all.join(" and ")
        );
        (vec![problem], None)
    })
}

fn examine_listed(listed: &[Listed], config: &Config) -> (Vec<String>, Option<String>) {
    let chosen: Vec<&Listed> = listed.iter().filter(|token| token.is_chosen).collect();
    let token = match choose(listed, &chosen, config) {
        Ok(token) => token,
        Err(instead) => return instead,
    };
    let name = shown(token);
    let mut problems = Vec::new();
    let mut wrong = |what: &str| problems.push(format!("[token]: token {name}: {what}"));
    if token.oaep_bits.is_none() {
        wrong("the token does not list the mechanism CKM_RSA_PKCS_OAEP, which the broker requires");
    }
    if !token.sha256_hmac && !config.token().permits_integrity_key_in_worker() {
        wrong("the token does not list the mechanism CKM_SHA256_HMAC, which the broker requires");
    }
    match token.pin_state.as_str() {
        "locked" => {
            wrong(
                "the token has a locked user PIN: unlock the user PIN with the security officer's PIN",
            );
        }
        "not set" => {
            wrong(
                "the token has no user PIN: set the user PIN with the vendor's tool, or initialise the token again",
            );
        }
        "final try" => wrong(
            "the token locks after one more wrong PIN, so the broker does not log in: log in once with the vendor's tool to \
             reset the counter, or run `keybroker token retry-pin --force`",
        ),
        _ => {}
    }
    let of_several = if chosen.len() > 1 {
        ", which the registry selects from several tokens,"
    } else {
        ""
    };
    let note = token.oaep_bits.as_ref().map(|bits| {
        format!(
            "[token]: token {name}{of_several} is present and lists RSA-OAEP for {} to {} bits; `keybroker token check` logs in \
             and shows which hash the token supports",
            bits.start(),
            bits.end()
        )
    });
    (problems, note)
}
