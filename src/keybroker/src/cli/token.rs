//! `keybroker token`: lists, initialises, checks and describes tokens.

use std::path::Path;

use clap::{Args, Subcommand};
use serde_json::json;

use keybroker_audit::Entry;
use keybroker_core::{
    call::Timestamp,
    key::{IntegrityPlace, WrappingKeyId},
};
use keybroker_hsm::{
    Settings, TokenInfo,
    admin::{self, Admin, AdminError, CheckedKey, Finding},
};
use keybroker_pkcs11::PinRecord;
use keybroker_store as store;
use keybroker_store::{PlaceRow, RegistryRow, Store};
use keybroker_worker_protocol::integrity_file::IntegrityFiles;

use crate::{
    config::{Config, accepted},
    places::{KeyHere, Registry},
};

use super::{
    Context, OWN_PROGRAM, block_on, change, environment,
    exit::{Exit, Failure},
    pin::{self, SoPin, UserPin, log_in, serials},
};

mod report;

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// List the tokens of the module; needs no PIN
    List,
    /// Initialise a blank token and set its user PIN
    Init(Init),
    /// Check the token and every registered key: attributes, self-test, negative tests and registry
    Check(UserPin),
    /// Report the operations that the token supports, and the forbidden operations that the token
    /// permits
    ///
    /// You can publish the report. With `--expect`, the command compares the token with a published
    /// report. The operations use session keys, which the token discards at the end. Stop every
    /// broker that uses the token before you run this command, because the command puts load on the
    /// token and ends with `C_Logout`.
    Report(report::Arguments),
    /// Allow one more login with a PIN that the token rejected; the broker can keep running
    ///
    /// Keybroker records a hash of each rejected PIN in the state directory. Commands and workers
    /// do not send a rejected PIN to the same token again until you run this command. Run this
    /// command after you have unlocked the token, or after you have set the token's PIN to the PIN
    /// that the token rejected. If the configuration has several tokens, pass `--token`: the
    /// permission applies to one token.
    RetryPin(RetryPin),
    /// Record that you backed up the token and tested a restore, for every registered key on the
    /// token
    BackupConfirmed(UserPin),
}

#[derive(Args, Debug)]
pub(super) struct Init {
    /// Label of the new token, at most 32 bytes [default: `token.label`]
    #[arg(long)]
    label: Option<String>,
    /// Serial number of an initialised token to erase permanently, together with every key on the
    /// token
    #[arg(long, value_name = "SERIAL")]
    erase_serial: Option<String>,
    #[command(flatten)]
    so_pin: SoPin,
    #[command(flatten)]
    user_pin: UserPin,
}

#[derive(Args, Debug)]
pub(super) struct RetryPin {
    /// Allow the next login even if one more wrong PIN would lock the token
    #[arg(long)]
    force: bool,
}

impl From<AdminError> for Failure {
    fn from(error: AdminError) -> Self {
        let exit = match &error {
            AdminError::Token(_) | AdminError::NoToken(_) | AdminError::Start(_) => Exit::Token,
            AdminError::Pin(_) | AdminError::PinSource(_) => Exit::Pin,
            AdminError::Untrusted(_) | AdminError::PublicKey(_) => Exit::Untrusted,
            AdminError::Environment(_) => Exit::Configuration,
        };
        Self::new(exit, error.to_string())
    }
}

pub(super) fn run(command: Command, context: &Context) -> Result<(), Failure> {
    match command {
        Command::List => list(context),
        Command::Init(arguments) => init(&arguments, context),
        Command::Check(pin) => check(&pin, context),
        Command::Report(arguments) => report::run(&arguments, context),
        Command::RetryPin(arguments) => retry_pin(&arguments, context),
        Command::BackupConfirmed(pin) => confirm_backup(&pin, context),
    }
}

fn list(context: &Context) -> Result<(), Failure> {
    let config = context.config_for_token()?;
    let listed = admin::list_tokens(Path::new(OWN_PROGRAM), config.token())
        .map_err(|error| environment::explain(error, &config))?;
    let is_empty = listed.is_empty();
    let rows = listed
        .into_iter()
        .map(|token| {
            vec![
                ("slot", json!(token.slot)),
                ("label", json!(token.info.label)),
                ("serial", json!(token.info.serial)),
                ("model", json!(token.info.model)),
                ("initialised", json!(token.initialised)),
                ("user_pin", json!(token.pin_state)),
            ]
        })
        .collect();
    context.output.list(rows, "the module reports no token")?;
    if is_empty && let Some(hint) = environment::withheld(&config) {
        context.output.note(&format!("note: {hint}"));
    }
    Ok(())
}

/// Allows one more login to a token. The command needs neither the module nor a PIN, so it works while `serve`
/// runs. The next worker reads the record of PINs before its login.
fn retry_pin(arguments: &RetryPin, context: &Context) -> Result<(), Failure> {
    let mut config = context.config()?;
    config.select_token(context.token.as_deref())?;
    let record = PinRecord::new(pin::state(&config)).of_token(&config.token().name);
    let allowed = change::audited(
        context,
        &config,
        "token.retry_pin",
        |_: &mut Entry| {},
        || {
            record
                .allow_retry(arguments.force, !config.tokens.are_several())
                .map_err(|error| {
                    let cause = std::error::Error::source(&error);
                    let cause = cause.map_or_else(String::new, |cause| format!(": {cause}"));
                    Failure::new(Exit::Pin, format!("{error}{cause}"))
                })
        },
    )?;
    context.output.fields(vec![
        ("pins_allowed", json!(allowed)),
        ("final_try_allowed", json!(arguments.force)),
    ])
}

fn init(arguments: &Init, context: &Context) -> Result<(), Failure> {
    let config = context.config_for_token()?;
    let label = arguments
        .label
        .clone()
        .or_else(|| config.token().label.clone())
        .ok_or_else(|| Failure::new(Exit::Usage, "no label specified; pass --label"))?;
    let so_pin = arguments.so_pin.get()?;
    let user_pin = arguments.user_pin.get(config.token())?;
    let erase = arguments.erase_serial.as_deref();
    let info = change::audited(
        context,
        &config,
        "token.init",
        |_: &mut Entry| {},
        || {
            let (info, note) = admin::init_token(
                Path::new(OWN_PROGRAM),
                config.token(),
                &pin::state(&config),
                &label,
                &so_pin,
                &user_pin,
                erase,
            )
            .map_err(|error| environment::explain(error, &config))?;
            if let Some(note) = note {
                context.output.note(&format!("note: {note}"));
            }
            Ok(info)
        },
    )?;
    context.output.fields(vec![
        ("label", json!(info.label)),
        ("serial", json!(info.serial)),
        ("model", json!(info.model)),
    ])
}

/// Checks the registered keys and the keys on the token: attribute check, self-test and negative tests.
fn check(pin: &UserPin, context: &Context) -> Result<(), Failure> {
    let config = context.config_for_token()?;
    let registry = registry(&config)?;
    let source = pin.get(config.token())?;
    let admin = log_in(&config, &source, false, &serials(&registry.rows))?;
    let rows = keys_here(&config, &admin, &registry);
    admin.know(rows.iter().map(|key| (key.row.id, key.objects())))?;
    let mut problems = Vec::new();
    let mut shown = Vec::new();
    for id in to_check(&admin, &rows, context)? {
        let row = rows.iter().find(|key| key.row.id == id);
        if row.is_none() && lacks_integrity_key(context, &config, id) {
            continue;
        }
        let checked = match admin.check(id) {
            Ok(checked) => checked,
            Err(error) => {
                problems.push(format!("key {id}: {error}"));
                continue;
            }
        };
        problems.extend(checked.problem.clone());
        note_tests_not_made(context, &checked);
        match row {
            // Without the integrity key, the MAC of the row cannot be checked. The reported problem
            // contains the reason why the integrity key is missing.
            Some(_) if checked.problem.is_some() && is_in_worker(&checked) => {}
            Some(row) => problems.extend(compare(&admin, row, &checked)?),
            None if checked.problem.is_some() => {}
            None => context.output.note(&format!(
                "note: key {id} is on the token but not in the registry; `keybroker key register {id}` \
                 registers it"
            )),
        }
        if is_in_worker(&checked) {
            shown.push(integrity_key_in_worker(&config, &checked));
        }
        if row.is_some_and(|key| !key.is_backup_confirmed()) {
            warn_of_missing_backup(context, id);
        }
        shown.extend(findings("RSA private key", &checked, &checked.private));
        shown.extend(findings("integrity key", &checked, &checked.integrity));
    }
    if admin.info().serial.is_empty() {
        context.output.note(
            "warning: the token reports no serial number, so the registry cannot distinguish this token from another \
             token with the same keys",
        );
    }
    note_assurance(context, config.token(), admin.info());
    let has_keys = !shown.is_empty();
    let nothing_shown = if problems.is_empty() {
        "the token has no wrapping key"
    } else {
        "no key could be checked"
    };
    context.output.groups(shown, nothing_shown)?;
    show_weakened(context, &config);
    if !has_keys && problems.is_empty() {
        return Err(Failure::new(
            Exit::Untrusted,
            "there is no wrapping key to check; create a wrapping key with `keybroker key generate`",
        ));
    }
    if problems.is_empty() {
        context.output.note(&format!(
            "token {:?} (serial {}): every key passes the attribute check, the self-test and the negative tests",
            admin.info().label,
            admin.info().serial
        ));
        return Ok(());
    }
    Err(Failure::new(Exit::Untrusted, problems.join("\n  ")))
}

/// Prints what is known about the protection of the keys.
fn note_assurance(context: &Context, token: &Settings, info: &TokenInfo) {
    let word = token.assurance_of(info).as_str();
    let source = if token.assurance.is_some() {
        "as `token.assurance` says"
    } else {
        "as the report of the module implies"
    };
    context.output.note(&format!(
        "assurance: {word}, {source}; this is a claim and not a proof"
    ));
}

/// Whether an unregistered wrapping key still needs an integrity key in the workers. A wrapping key
/// without an integrity key cannot be checked.
fn lacks_integrity_key(context: &Context, config: &Config, id: WrappingKeyId) -> bool {
    let lacks = IntegrityFiles::of(config.token(), id)
        .is_ok_and(|files| !files.is_pinned(id) && !files.has(id));
    if lacks {
        context.output.note(&format!(
            "note: the RSA private key {id} is on the token but not in the registry, and there is no file with its integrity key; \
             `keybroker key register {id}` checks and registers it"
        ));
    }
    lacks
}

fn warn_of_missing_backup(context: &Context, id: WrappingKeyId) {
    context.output.note(&format!(
        "warning: no backup is confirmed for key {id}: if the token is lost, every user key wrapped under this key is \
         lost"
    ));
}

/// Whether the integrity key of a wrapping key is in the workers instead of on the token.
fn is_in_worker(key: &CheckedKey) -> bool {
    key.objects.integrity == IntegrityPlace::Worker
}

/// The output row for an integrity key that is in the workers instead of on the token.
fn integrity_key_in_worker(config: &Config, key: &CheckedKey) -> Vec<super::output::Field> {
    let files = IntegrityFiles::of(config.token(), key.id);
    let path = files.map_or_else(
        |error| error.to_string(),
        |files| files.path(key.id).display().to_string(),
    );
    vec![
        ("key", json!(key.id.to_string())),
        ("object", json!("integrity key")),
        ("attribute", json!("")),
        (
            "verdict",
            json!(format!(
                "the integrity key is not on the token: the workers unwrap the integrity key from {path}"
            )),
        ),
        ("passes", json!(key.problem.is_none())),
    ]
}

/// The keys to check: the keys on the token and the keys in the registry. An unregistered key is
/// checked only if its `CKA_ID` has the length of an id, as with keys from `key generate`. Other
/// keys may belong to other programs.
fn to_check(
    admin: &Admin,
    rows: &[KeyHere<'_>],
    context: &Context,
) -> Result<Vec<WrappingKeyId>, Failure> {
    let mut ids = Vec::new();
    for object in admin.key_ids()? {
        let registered = rows.iter().find(|key| key.private_object() == object);
        match registered
            .map(|key| key.row.id)
            .or_else(|| WrappingKeyId::from_slice(object.as_bytes()))
        {
            Some(id) => ids.push(id),
            None => context.output.note(&format!(
                "note: the RSA private key with CKA_ID {object} is on the token but not in the registry, and was not \
                 checked; `keybroker key register {object} --integrity-id HEX` checks and registers it"
            )),
        }
    }
    for key in rows {
        if !ids.contains(&key.row.id) {
            ids.push(key.row.id);
        }
    }
    Ok(ids)
}

/// Prints a warning for each check that the settings disable.
fn show_weakened(context: &Context, config: &Config) {
    for risk in accepted::risks(config.token()) {
        context.output.note(&format!("warning: {risk}"));
    }
}

/// The output rows for the attributes of one object of a key.
fn findings(
    object: &str,
    key: &CheckedKey,
    findings: &[Finding],
) -> Vec<Vec<super::output::Field>> {
    findings
        .iter()
        .map(|finding| {
            // The verdict starts with the name of the attribute, but this table shows the name in a
            // separate column.
            let name = format!("{} ", finding.attribute);
            let found = finding.verdict.strip_prefix(&name);
            let found = found.unwrap_or(&finding.verdict);
            vec![
                ("key", json!(key.id.to_string())),
                ("object", json!(object)),
                ("attribute", json!(finding.attribute)),
                ("verdict", json!(found)),
                ("passes", json!(finding.passes)),
            ]
        })
        .collect()
}

/// The registered keys that this token must have.
fn keys_here<'a>(config: &Config, admin: &Admin, registry: &'a Registry) -> Vec<KeyHere<'a>> {
    let serial = &admin.info().serial;
    registry.needed_on(config.token(), serial, config.tokens.are_several())
}

/// Compares the registry rows of a key with the key on the token, and returns the differences.
pub(super) fn compare(
    admin: &Admin,
    registered: &KeyHere<'_>,
    key: &CheckedKey,
) -> Result<Vec<String>, Failure> {
    let row = registered.row;
    let mut problems = Vec::new();
    if row.fingerprint != key.fingerprint {
        problems.push(format!(
            "key {}: the public key is {} on the token, but {} in the registry",
            row.id, key.fingerprint, row.fingerprint
        ));
    }
    if row.purpose != key.purpose {
        problems.push(format!(
            "key {}: the attributes on the token are those of a {} wrapping key, but the registry has a {} wrapping key",
            row.id,
            key.purpose.as_str(),
            row.purpose.as_str()
        ));
    }
    if registered.serial() != admin.info().serial {
        problems.push(format!(
            "key {}: registered for the token with serial {:?}, but this token has serial {:?}; if this token is the \
             restored backup of the registered token, run `keybroker key register {}`",
            row.id,
            registered.serial(),
            admin.info().serial,
            row.id
        ));
    }
    if !admin.verify(row.id, &row.mac_message(), &row.mac)? {
        problems.push(format!(
            "key {}: the MAC of the registry row does not verify, so the row was altered",
            row.id
        ));
    }
    if let Some(place) = registered.place
        && !admin.verify(row.id, &place.mac_message(), &place.mac)?
    {
        problems.push(format!(
            "key {}: the MAC of the registry row for token {} does not verify, so the row was altered",
            row.id, place.token
        ));
    }
    Ok(problems)
}

/// Reads the registry. The result is empty if the database does not exist yet.
pub(super) fn registry(config: &Config) -> Result<Registry, Failure> {
    block_on(async {
        if store::status(&config.store).await?.current == 0 {
            return Ok(Registry::default());
        }
        let store = store::open(&config.store).await?;
        let registry = Registry::read(&*store).await;
        store.close().await;
        Ok(registry?)
    })?
}

fn confirm_backup(pin: &UserPin, context: &Context) -> Result<(), Failure> {
    let config = context.config_for_token()?;
    let _lock = store::lock(&config.store)?;
    let registry = registry(&config)?;
    let source = pin.get(config.token())?;
    let admin = log_in(&config, &source, false, &serials(&registry.rows))?;
    let now = Timestamp::now();
    let (mut confirmed, mut problems, mut exit) = (Vec::new(), Vec::new(), None);
    let mut keys = keys_here(&config, &admin, &registry);
    keys.retain(|key| key.serial() == admin.info().serial);
    admin.know(keys.iter().map(|key| (key.row.id, key.objects())))?;
    if keys.is_empty() {
        let what = "no wrapping key of this token is registered, so there is no backup to confirm";
        return Err(Failure::new(Exit::Untrusted, what).hint(
            "run `keybroker key generate`; `keybroker token check` lists keys on the token that are not registered",
        ));
    }
    for key in keys {
        let row = key.row;
        if key.is_backup_confirmed() {
            continue;
        }
        let is_valid = match admin.verify(row.id, &row.mac_message(), &row.mac) {
            Ok(is_valid) => is_valid,
            // A failure for one key does not prevent the confirmation for the other keys.
            Err(error) => {
                problems.push(format!("key {}: not confirmed: {error}", row.id));
                exit.get_or_insert(Failure::from(error).exit);
                continue;
            }
        };
        if !is_valid {
            let what = format!(
                "key {}: the registry row was altered; nothing was confirmed",
                row.id
            );
            return Err(Failure::new(Exit::Untrusted, what));
        }
        note_file_in_backup(context, &config, row);
        let describe = |entry: &mut Entry| entry.wrapping_key = Some(row.id);
        change::audited(context, &config, "token.backup_confirm", describe, || {
            record_backup(&config, &admin, &key, now)
        })?;
        confirmed.push(vec![
            ("key", json!(row.id.to_string())),
            ("backup_confirmed", json!(now.to_string())),
        ]);
    }
    context.output.list(
        confirmed,
        "nothing to confirm: every key on this token has a confirmed backup",
    )?;
    match exit {
        None => Ok(()),
        Some(exit) => Err(Failure::new(exit, problems.join("\n  "))),
    }
}

/// Records that the operator confirmed a backup of this token with the key. The record is in the
/// registry row, or in the row of the key's place on this token.
fn record_backup(
    config: &Config,
    admin: &Admin,
    key: &KeyHere<'_>,
    now: Timestamp,
) -> Result<(), Failure> {
    let backup_confirmed = Some(now);
    let id = key.row.id;
    let update = async |store: &dyn Store| -> Result<(), Failure> {
        if let Some(place) = key.place {
            let mut new = PlaceRow {
                backup_confirmed,
                ..place.clone()
            };
            new.mac = admin.mac(id, &new.mac_message())?;
            return Ok(store.update_place(&new, &place.mac).await?);
        }
        let mut new = RegistryRow {
            backup_confirmed,
            ..key.row.clone()
        };
        new.mac = admin.mac(id, &new.mac_message())?;
        Ok(store.update_registry(&new, &key.row.mac).await?)
    };
    block_on(async {
        let store = store::open(&config.store).await?;
        let updated = update(&*store).await;
        store.close().await;
        updated
    })?
}

/// Prints a note about the file that a backup must contain in addition to the token and the
/// database.
pub(super) fn note_file_in_backup(context: &Context, config: &Config, row: &RegistryRow) {
    if row.objects.integrity != IntegrityPlace::Worker {
        return;
    }
    if let Ok(files) = IntegrityFiles::of(config.token(), row.id) {
        context.output.note(&format!(
            "The backup must also contain {} and the configuration, which has the digest of this file. Rows can be \
             verified only with this file.",
            files.path(row.id).display()
        ));
    }
}

/// Prints a note about the negative tests that were not made. The results of omitted tests are
/// unknown.
pub(super) fn note_tests_not_made(context: &Context, checked: &CheckedKey) {
    if checked.not_tried.is_empty() {
        return;
    }
    context.output.note(&format!(
        "note: key {}: the token does not support these negative tests, so they were not run: {}",
        checked.id,
        checked.not_tried.join(", ")
    ));
}
