//! `keybroker key`: manages the wrapping keys on the token and in the registry.

use std::path::PathBuf;

use aws_lc_rs::digest;
use clap::{Args, Subcommand};
use serde_json::json;

use crate::{config::Config, places::Registry};
use keybroker_audit::Entry;
use keybroker_client::proto::WrappingKeyChange;
use keybroker_core::{
    call::Timestamp,
    key::{
        Fingerprint, ID_BYTES, IntegrityPlace, ObjectId, ObjectIds, Purpose, WrappingKeyId,
        WrappingKeyState,
    },
};
use keybroker_hsm::admin::{Admin, CheckedKey};
use keybroker_store as store;
use keybroker_store::{PlaceRow, RegistryRow};
use keybroker_worker_protocol::{
    Assurance,
    integrity_file::{IntegrityFileError, IntegrityFiles},
    unpadded,
};

mod change;
mod import;
mod removal;

use super::{
    Context, block_on,
    change::audited,
    exit::{Exit, Failure},
    output::Field,
    pin::{UserPin, log_in, serials},
    token::{note_file_in_backup, note_tests_not_made},
};

mod place;

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Generate a wrapping key and its integrity key on the token, test both keys and register them
    ///
    /// The private key cannot be exported from the token. Back up the token before the first user
    /// key is enrolled, then run `keybroker token backup-confirmed`. Stop the broker before you run
    /// this command.
    Generate(Generate),
    /// Register a key that is already on the token
    ///
    /// Use this command in three cases: `key generate` was interrupted, the key was made with the
    /// vendor's tool, or the token was restored to a device with another serial number. A key that
    /// is already registered keeps its state. The key must pass the checks of `token check`. If the
    /// configuration has several tokens and the key is registered for one of them, `--token NAME`
    /// registers the key for another token. Stop the broker before you run this command.
    Register(Register),
    /// Import the private key of a Bitwarden organisation, for `keybroker bitwarden approvals`
    ///
    /// No other kind of key is imported: an imported key may have copies outside the token, so it never protects user keys of this
    /// broker. The token can only unwrap with the imported key, and only into objects that cannot be read.
    Import(import::Import),
    /// List the registered keys; needs no PIN
    List,
    /// Show one registered key; needs no PIN
    Show {
        /// Id of the key, 32 hexadecimal digits
        id: String,
    },
    /// Remove the objects of an unregistered key from the token
    ///
    /// An interrupted `key generate` or `key rotate` can leave an unregistered key on the token.
    /// The command does not remove a key that a row of the database needs. A removed key cannot be
    /// restored.
    Remove(removal::Remove),
    /// Generate and register a new wrapping key through a running broker
    ///
    /// The command uses the broker's admin API. The broker generates, tests and registers the key
    /// while it is running. The new key is pre-active until `key activate`, so that a backup of the
    /// token can be made first. When the new key becomes active, the previous active key is
    /// deactivated. A deactivated key can still unwrap user keys. If the configuration of the broker has several tokens,
    /// `--token NAME` selects the token on which the key is made.
    Rotate(change::Rotate),
    /// Make a key the active key, which wraps new user keys, and deactivate the previous active key
    ///
    /// If the broker has several tokens, every token that has the active key must also have the new key. The broker finds and registers
    /// the copies of the new key.
    Activate(change::Activate),
    /// Search the tokens of a running broker for copies of a key, and register the copies
    ///
    /// The broker searches each configured token that does not have the key yet. A copy must be under the same `CKA_ID`, with the
    /// registered public key and the same integrity key. For a copy under another `CKA_ID`, stop the broker and use `key register`.
    FindCopies(change::OneKey),
    /// Suspend a key until it is resumed; meanwhile, user keys under the suspended key are not
    /// released
    Suspend(change::OneKey),
    /// Resume a suspended key; the key becomes active if no other key is active, otherwise
    /// deactivated
    Resume(change::OneKey),
    /// Deactivate a key: the key can still unwrap user keys, but wraps no new user keys
    Deactivate(change::OneKey),
    /// Permanently stop the use of a compromised key, whose private key others may know
    ///
    /// The broker does not release user keys that are wrapped under a compromised key. No command
    /// makes the key usable again.
    Compromise(change::OneKey),
    /// Record that a missing key is permanently lost
    ///
    /// The state of the key becomes `destroyed`. Calls for user keys under the lost key then get
    /// `KEY_STATE` instead of `TOKEN_DOWN`, so that clients stop retrying. Use this command only if
    /// no row needs the key any more, or if no backup of the token contains the key.
    Lost(change::Lost),
    /// Schedule the destruction of a key that no row needs, or cancel it
    ///
    /// The broker removes the objects of the key from every token after a waiting time, at least `wrapping_keys.destroy_after_days`.
    /// Nothing brings a destroyed key back: user keys in old backups of the database that need the key are lost. The key must be
    /// pre-active, deactivated or compromised, and another key must be in use.
    Destroy(change::Destroy),
}

#[derive(Args, Debug)]
pub(super) struct Generate {
    /// Length of the RSA modulus in bits
    #[arg(long, default_value = "3072", value_parser = ["2048", "3072", "4096"])]
    bits: String,
    /// Form in which user keys under the wrapping key are released: `plain` or, only encrypted to a recipient, `sealed`
    #[arg(long, default_value = "plain", value_parser = purpose)]
    purpose: Purpose,
    #[command(flatten)]
    pin: UserPin,
}

#[derive(Args, Debug)]
pub(super) struct Register {
    /// `CKA_ID` of the RSA private key, 1 to 255 bytes in hexadecimal, or the id of a registered key
    id: String,
    /// `CKA_ID` of the integrity key, 1 to 255 bytes in hexadecimal [default: the `CKA_ID` of the RSA private key]
    #[arg(long, value_name = "HEX")]
    integrity_id: Option<String>,
    #[command(flatten)]
    pin: UserPin,
}

pub(super) fn run(command: Command, context: &Context) -> Result<(), Failure> {
    match command {
        Command::Generate(arguments) => generate(&arguments, context),
        Command::Register(arguments) => register(&arguments, context),
        Command::Import(arguments) => import::import(&arguments, context),
        Command::List => {
            let config = context.config()?;
            let registry = block_on(registry(&config))??;
            let shown = |row| fields_with_tokens(row, &registry, &config);
            let rows = registry.rows.iter().map(shown).collect();
            context.output.list(
                rows,
                "no wrapping key is registered; create a wrapping key with `keybroker key generate`",
            )
        }
        Command::Show { id } => {
            let id = parse_id(&id)?;
            let config = context.config()?;
            let registry = block_on(registry(&config))??;
            let row = registry
                .rows
                .iter()
                .find(|row| row.id == id)
                .ok_or_else(|| {
                    Failure::new(Exit::Untrusted, format!("key {id} is not registered"))
                })?;
            context
                .output
                .fields(fields_with_tokens(row, &registry, &config))
        }
        Command::Remove(arguments) => removal::remove(&arguments, context),
        Command::Rotate(arguments) => change::rotate(arguments, context),
        Command::Activate(arguments) => change::activate(arguments, context),
        Command::FindCopies(key) => change::find_copies(key, context),
        Command::Suspend(key) => change::change(key, WrappingKeyChange::Suspend, context),
        Command::Resume(key) => change::change(key, WrappingKeyChange::Resume, context),
        Command::Deactivate(key) => change::change(key, WrappingKeyChange::Deactivate, context),
        Command::Lost(arguments) => change::lost(arguments, context),
        Command::Destroy(arguments) => change::destroy(arguments, context),
        Command::Compromise(key) => change::change(key, WrappingKeyChange::Compromise, context),
    }
}

/// Parses the purpose of a wrapping key.
pub(super) fn purpose(text: &str) -> Result<Purpose, &'static str> {
    Purpose::parse(text).ok_or("`plain` or `sealed`")
}

fn parse_id(text: &str) -> Result<WrappingKeyId, Failure> {
    WrappingKeyId::from_hex(text).ok_or_else(|| {
        Failure::new(
            Exit::Usage,
            format!("{text:?} is not a key id of 32 hexadecimal digits"),
        )
    })
}

fn parse_object_id(text: &str) -> Result<ObjectId, Failure> {
    let id = ObjectId::from_hex(text);
    // The registry uses this value for an integrity key that is not an object on the token.
    let id = id.filter(|id| id.as_bytes() != IntegrityPlace::Worker.as_bytes());
    id.ok_or_else(|| {
        Failure::new(
            Exit::Usage,
            format!("{text:?} is not a CKA_ID of 1 to 255 bytes, written as two hexadecimal digits for each byte"),
        )
    })
}

pub(super) async fn registry(config: &Config) -> Result<Registry, Failure> {
    let store = store::open(&config.store).await?;
    let registry = Registry::read(&*store).await;
    store.close().await;
    Ok(registry?)
}

fn generate(arguments: &Generate, context: &Context) -> Result<(), Failure> {
    let config = context.config_for_token()?;
    let bits = arguments
        .bits
        .parse()
        .map_err(|_| Failure::new(Exit::Usage, "--bits is not a number"))?;
    // Make every check that could prevent the registration before the keys are generated on the
    // token.
    let _lock = store::lock(&config.store)?;
    let mut registry = block_on(registry(&config))??;
    let rows = &registry.rows;
    integrity_files(&config)?;
    let pin = arguments.pin.get(config.token())?;
    let admin = log_in(&config, &pin, true, &serials(rows))?;
    let generated = generate_and_register(context, &config, &admin, rows, || {
        Ok(admin.generate_key(arguments.purpose, bits)?)
    })?;
    let Generated { row, place, .. } = generated;
    warn_of_backup(context, &config, &row);
    registry.places.extend(place);
    let shown = fields_with_tokens(&row, &registry, &config);
    show(context, shown, generated.file.as_ref())
}

/// A key that was generated and registered.
struct Generated {
    row: RegistryRow,
    place: Option<PlaceRow>,
    file: Option<StoredKey>,
}

/// Registers a key that was generated and checked by the same admin worker. `rows` are the registered keys.
pub(super) fn register_generated(
    context: &Context,
    config: &Config,
    admin: &Admin,
    rows: &[RegistryRow],
    key: &CheckedKey,
) -> Result<(), Failure> {
    let describe = |entry: &mut Entry| entry.wrapping_key = Some(key.id);
    audited(context, config, "wrapping_key.register", describe, || {
        let register = || -> Result<(), Failure> {
            let row = new_row(admin, key, rows)?;
            insert(config, &row)?;
            place::add(config, admin, key, &row)?;
            Ok(())
        };
        register().map_err(|failure| not_registered(key.id, None, &failure))
    })
}

/// Generates a key with `make`, writes the file of its integrity key if it needs one, and registers the key. `rows` are the
/// registered keys.
fn generate_and_register(
    context: &Context,
    config: &Config,
    admin: &Admin,
    rows: &[RegistryRow],
    make: impl FnOnce() -> Result<CheckedKey, Failure>,
) -> Result<Generated, Failure> {
    let files = integrity_files(config)?;
    generate_and(context, config, make, |key| {
        let mut file = None;
        let mut register = || -> Result<_, Failure> {
            file = store_integrity_key(files, &key)?;
            let row = new_row(admin, &key, rows)?;
            insert(config, &row)?;
            let place = place::add(config, admin, &key, &row)?;
            Ok((row, place))
        };
        let (row, place) =
            register().map_err(|failure| not_registered(key.id, file.as_ref(), &failure))?;
        Ok(Generated { row, place, file })
    })
}

/// Generates a key with `make` and completes it with `complete`, with one entry in the audit log.
fn generate_and<T>(
    context: &Context,
    config: &Config,
    make: impl FnOnce() -> Result<CheckedKey, Failure>,
    complete: impl FnOnce(CheckedKey) -> Result<T, Failure>,
) -> Result<T, Failure> {
    let nothing_more = |_: &mut Entry| {};
    audited(
        context,
        config,
        "wrapping_key.generate",
        nothing_more,
        || {
            let key = make()?;
            note_tests_not_made(context, &key);
            complete(key)
        },
    )
}

/// The failure of a registration, after the key was made on the token.
fn not_registered(id: WrappingKeyId, file: Option<&StoredKey>, failure: &Failure) -> Failure {
    let pin = file.map_or_else(String::new, |file| format!(", {}", file.instruction()));
    let what = format!(
        "key {id} is on the token, but not registered: {failure}. Repair the cause{pin}, then run `keybroker key \
         register {id}`"
    );
    Failure::new(failure.exit, what)
}

/// Generates a key with `make` and writes the file of its integrity key if it needs one, without registering the key.
pub(super) fn generate_without_registration(
    context: &Context,
    config: &Config,
    make: impl FnOnce() -> Result<CheckedKey, Failure>,
) -> Result<CheckedKey, Failure> {
    let files = integrity_files(config)?;
    generate_and(context, config, make, |key| {
        if let Some(file) = store_integrity_key(files, &key)? {
            context.output.note(&format!(
                "The integrity key of {} is wrapped in {}: {}",
                key.id,
                file.path.display(),
                file.instruction()
            ));
        }
        Ok(key)
    })
}

/// Returns access to the integrity key files, if the settings permit integrity keys in files. Fails
/// if the directory of the integrity key files is not writable.
pub(super) fn integrity_files(config: &Config) -> Result<Option<IntegrityFiles<'_>>, Failure> {
    let Some(files) = IntegrityFiles::permitted(config.token())? else {
        return Ok(None);
    };
    files.check_writable()?;
    Ok(Some(files))
}

impl From<IntegrityFileError> for Failure {
    fn from(error: IntegrityFileError) -> Self {
        let exit = if error.is_about_content() {
            Exit::Untrusted
        } else {
            Exit::Configuration
        };
        Self::new(exit, error.to_string())
    }
}

/// The file of an integrity key that the command generated.
struct StoredKey {
    id: WrappingKeyId,
    path: PathBuf,
    sha256: String,
}

impl StoredKey {
    /// The instruction for the administrator, as a clause that ends a sentence.
    fn instruction(&self) -> String {
        format!(
            "add `{} = \"{}\"` to [token.integrity_key_digests] in the configuration",
            self.id, self.sha256
        )
    }
}

/// Writes a new integrity key to a file, unless the integrity key is on the token.
fn store_integrity_key(
    files: Option<IntegrityFiles<'_>>,
    key: &CheckedKey,
) -> Result<Option<StoredKey>, Failure> {
    let (Some(files), Some(text)) = (files, &key.integrity_key_file) else {
        return Ok(None);
    };
    let (path, sha256) = files.create(key.id, text)?;
    Ok(Some(StoredKey {
        id: key.id,
        path,
        sha256,
    }))
}

/// Shows the fields of a registry row, and the integrity key file if the command wrote one.
fn show(context: &Context, mut shown: Vec<Field>, file: Option<&StoredKey>) -> Result<(), Failure> {
    if let Some(file) = file {
        shown.push(("integrity_key_file", json!(file.path.display().to_string())));
        shown.push(("integrity_key_sha256", json!(file.sha256)));
        context.output.note(&format!(
            "The integrity key is not on the token: it is wrapped in {}. Before the broker starts, {}. The broker \
             refuses any other file.",
            file.path.display(),
            file.instruction()
        ));
    }
    context.output.fields(shown)
}

fn warn_of_backup(context: &Context, config: &Config, row: &RegistryRow) {
    context.output.note(
        "This wrapping key can never be exported. Back up the token before the first user key is enrolled: if the token \
         is lost, every user key that is wrapped under this wrapping key is lost. After the backup, run `keybroker token \
         backup-confirmed`.",
    );
    note_file_in_backup(context, config, row);
}

fn register(arguments: &Register, context: &Context) -> Result<(), Failure> {
    let config = context.config_for_token()?;
    let object = parse_object_id(&arguments.id)?;
    let integrity = arguments
        .integrity_id
        .as_deref()
        .map(parse_object_id)
        .transpose()?;
    let _lock = store::lock(&config.store)?;
    let mut registry = block_on(registry(&config))??;
    let rows = &registry.rows;
    let files = IntegrityFiles::permitted(config.token())?;
    let pin = arguments.pin.get(config.token())?;
    let admin = log_in(&config, &pin, false, &serials(rows))?;
    let key = find(&admin, rows, &object, integrity, files)?;
    let id = key.id;
    if let Some(problem) = &key.problem {
        return Err(Failure::new(Exit::Untrusted, problem.clone()));
    }
    let describe = |entry: &mut Entry| entry.wrapping_key = Some(id);
    refuse_shared_integrity_key(&key, rows)?;
    let mut file = None;
    let (row, place) = match rows.iter().find(|row| row.id == id) {
        None => audited(context, &config, "wrapping_key.register", describe, || {
            file = store_integrity_key(files, &key)?;
            let row = new_row(&admin, &key, rows)?;
            insert(&config, &row)?;
            let place = place::add(&config, &admin, &key, &row)?;
            Ok((row, place))
        })?,
        // A row names the only token if other tokens were removed from the configuration.
        Some(old)
            if config.tokens.are_several()
                || registry.place(id, &config.token().name).is_some() =>
        {
            let place = place::register(context, &config, &admin, &key, old, &registry)?;
            (old.clone(), Some(place))
        }
        Some(old) => {
            let moved = moved_row(&admin, &key, old)?;
            audited(context, &config, "wrapping_key.move", describe, || {
                block_on(async {
                    let store = store::open(&config.store).await?;
                    let updated = store.update_registry(&moved, &old.mac).await;
                    store.close().await;
                    Ok::<_, Failure>(updated?)
                })?
            })?;
            (moved, None)
        }
    };
    note_file_in_backup(context, &config, &row);
    registry.places.extend(place);
    let shown = fields_with_tokens(&row, &registry, &config);
    show(context, shown, file.as_ref())
}

/// Finds and checks the key with this `CKA_ID`. A registered key keeps its id, even if its `CKA_ID`
/// on this token differs. The id of an unregistered key is its `CKA_ID`, if the `CKA_ID` has the
/// length of an id. For a `CKA_ID` of another length, the id is derived from the public key.
/// Therefore, a key whose registry row was lost gets the same id again.
fn find(
    admin: &Admin,
    rows: &[RegistryRow],
    object: &ObjectId,
    integrity: Option<ObjectId>,
    files: Option<IntegrityFiles<'_>>,
) -> Result<CheckedKey, Failure> {
    let known = rows
        .iter()
        .find(|row| row.private_object() == *object || ObjectId::from(row.id) == *object);
    let (id, private) = match known {
        Some(row) => (row.id, row.objects.private.clone()),
        None => match WrappingKeyId::from_slice(object.as_bytes()) {
            Some(id) => (id, None),
            // A temporary id for the check, because the public key is unknown before the check.
            None => (fresh_id()?, Some(object.clone())),
        },
    };
    let integrity = match (integrity, known) {
        (Some(object), _) => IntegrityPlace::Object(object),
        (None, Some(row)) => row.objects.integrity.clone(),
        (None, None) if files.is_some() => IntegrityPlace::Worker,
        (None, None) => IntegrityPlace::Token,
    };
    let objects = ObjectIds { private, integrity };
    let checked = check_place(admin, files, id, &objects, known.is_some())?;
    let registered = rows
        .iter()
        .find(|row| row.fingerprint == checked.fingerprint);
    let named = match known {
        Some(row) => row.id,
        None => WrappingKeyId::from_slice(object.as_bytes())
            .unwrap_or_else(|| id_of(&checked.fingerprint)),
    };
    let wanted = registered.map_or(named, |row| row.id);
    if wanted == id {
        return Ok(checked);
    }
    let objects = ObjectIds {
        private: Some(objects.private.unwrap_or_else(|| id.into())),
        integrity: match (objects.integrity, registered) {
            (IntegrityPlace::Worker, Some(row)) => row.objects.integrity.clone(),
            (given, _) => given,
        },
    };
    check_place(admin, files, wanted, &objects, registered.is_some())
}

/// Checks an RSA key and its integrity key. If the integrity key must be in the workers but has no
/// file, the token generates a new integrity key. A registered key never gets a new integrity key,
/// because its rows have MACs under the existing integrity key.
fn check_place(
    admin: &Admin,
    files: Option<IntegrityFiles<'_>>,
    id: WrappingKeyId,
    objects: &ObjectIds,
    is_registered: bool,
) -> Result<CheckedKey, Failure> {
    admin.know([(id, objects)])?;
    let files = files.filter(|_| !is_registered && objects.integrity == IntegrityPlace::Worker);
    let Some(files) = files else {
        return Ok(admin.check(id)?);
    };
    // The command never replaces an integrity key file whose digest is in the configuration,
    // because rows may depend on this key. If an integrity key file is lost, an operator must
    // restore the file.
    let is_pinned = files.is_pinned(id);
    if !is_pinned && !files.has(id) {
        files.check_writable()?;
        return Ok(admin.check_with_new_integrity_key(id)?);
    }
    files.load(id).map_err(|error| {
        let failure = Failure::from(error);
        if is_pinned {
            return failure;
        }
        failure.hint(format!(
            "no registered key uses {}: if an interrupted command left this file, move the file to another directory and \
             run the command again",
            files.path(id).display()
        ))
    })?;
    Ok(admin.check(id)?)
}

/// Derives the id of a key whose `CKA_ID` does not have the length of an id.
fn id_of(fingerprint: &Fingerprint) -> WrappingKeyId {
    let mut context = digest::Context::new(&digest::SHA256);
    context.update(b"keybroker/wrapping-key-id/v1");
    context.update(&fingerprint.0);
    let mut bytes = [0; ID_BYTES];
    bytes.copy_from_slice(&context.finish().as_ref()[..ID_BYTES]);
    WrappingKeyId::from_bytes(bytes)
}

fn fresh_id() -> Result<WrappingKeyId, Failure> {
    let mut bytes = [0; ID_BYTES];
    aws_lc_rs::rand::fill(&mut bytes)
        .map_err(|_| Failure::new(Exit::Internal, "the random generator failed"))?;
    Ok(WrappingKeyId::from_bytes(bytes))
}

/// Creates the registry row of a key that is not registered yet.
fn new_row(admin: &Admin, key: &CheckedKey, rows: &[RegistryRow]) -> Result<RegistryRow, Failure> {
    let sequences = rows.iter().map(|row| row.sequence);
    let highest = sequences.filter(|sequence| *sequence < store::SEQUENCE_LIMIT);
    let sequence = highest.max().unwrap_or(0) + 1;
    let mut row = RegistryRow {
        id: key.id,
        objects: key.objects.clone(),
        fingerprint: key.fingerprint,
        purpose: key.purpose,
        state: WrappingKeyState::Active,
        token_serial: admin.info().serial.clone(),
        sequence,
        registered: Timestamp::now(),
        backup_confirmed: None,
        mac: [0; 32],
    };
    row.mac = admin.mac(row.id, &row.mac_message())?;
    Ok(row)
}

/// Rejects an integrity key that another wrapping key uses. If two wrapping keys shared an
/// integrity key, MACs of a compromised wrapping key would also be valid for the other wrapping
/// key. Destroying one of the two wrapping keys would affect both.
fn refuse_shared_integrity_key(key: &CheckedKey, rows: &[RegistryRow]) -> Result<(), Failure> {
    // The file of an integrity key in the workers contains the id of its only wrapping key.
    let Some(own) = key.objects.integrity_object(key.id) else {
        return Ok(());
    };
    let other = rows.iter().find(|row| {
        row.id != key.id
            && row.state != WrappingKeyState::Destroyed
            && row.integrity_object().as_ref() == Some(&own)
    });
    match other {
        None => Ok(()),
        Some(other) => Err(Failure::new(
            Exit::Usage,
            format!(
                "the integrity key with the CKA_ID {own} already belongs to the wrapping key {}, and each wrapping key \
                 needs a separate integrity key; make another secret key and pass its CKA_ID with `--integrity-id`",
                other.id
            ),
        )),
    }
}

/// Creates the registry row of a registered key that is now on another token. The new row keeps the
/// state of the key, because a copy of a compromised key is compromised, too.
fn moved_row(admin: &Admin, key: &CheckedKey, old: &RegistryRow) -> Result<RegistryRow, Failure> {
    let id = old.id;
    if old.fingerprint != key.fingerprint {
        let what = format!(
            "the key with id {id} on this token is not the registered key: its public key is {}, but the registered public key \
             is {}; nothing was changed. Restore the token from its backup, or select the right token in the configuration",
            key.fingerprint, old.fingerprint
        );
        return Err(Failure::new(Exit::Untrusted, what));
    }
    if old.purpose != key.purpose {
        let what = format!(
            "key {id} is registered as a {} wrapping key, but its attributes on this token are those of a {} wrapping key; \
             nothing was changed. Restore the token from its backup, or select the right token in the configuration",
            old.purpose.as_str(),
            key.purpose.as_str()
        );
        return Err(Failure::new(Exit::Untrusted, what));
    }
    if old.state == WrappingKeyState::Destroyed {
        let what = format!("key {id} is recorded as destroyed, so it cannot be registered again");
        return Err(Failure::new(Exit::Untrusted, what));
    }
    if !admin.verify(id, &old.mac_message(), &old.mac)? {
        let what = format!(
            "the registry row of key {id} was altered: its MAC does not verify; nothing was changed. Restore the row from a backup of the \
             database"
        );
        return Err(Failure::new(Exit::Untrusted, what));
    }
    if unpadded(&old.token_serial) == admin.info().serial {
        let what = format!("key {id} is already registered for this token; nothing was changed");
        return Err(Failure::new(Exit::Untrusted, what));
    }
    let mut row = RegistryRow {
        objects: key.objects.clone(),
        token_serial: admin.info().serial.clone(),
        backup_confirmed: None,
        ..old.clone()
    };
    row.mac = admin.mac(id, &row.mac_message())?;
    Ok(row)
}

fn insert(config: &Config, row: &RegistryRow) -> Result<(), Failure> {
    block_on(async {
        let store = store::open(&config.store).await?;
        let registered = store.register(row).await;
        store.close().await;
        Ok(registered?)
    })?
}

/// The fields of a registry row, together with the tokens that have the key.
fn fields_with_tokens(row: &RegistryRow, registry: &Registry, config: &Config) -> Vec<Field> {
    let mut fields = fields(row);
    fields.push((
        "tokens",
        json!(registry.tokens_of(row, config.tokens.all()).join(", ")),
    ));
    fields.push(("assurance", json!(assurance_of(row, registry, config))));
    let destroyed = registry.destroyed_at(row).map(|at| at.to_string());
    fields.push(("destroy_at", json!(destroyed)));
    fields
}

/// The words of `token.assurance` for the tokens that have the key, such as `hsm-a=hardware`. Without this setting, the word is
/// `unknown`: only the module of a token knows it, and these commands do not open tokens.
fn assurance_of(row: &RegistryRow, registry: &Registry, config: &Config) -> String {
    let tokens = registry.tokens_of(row, config.tokens.all());
    let word = |name: &String| {
        let mut configured = config.tokens.all().iter();
        let token = configured.find(|token| token.name == *name);
        let assurance = token.and_then(|token| token.assurance);
        format!("{name}={}", assurance.map_or("unknown", Assurance::as_str))
    };
    tokens.iter().map(word).collect::<Vec<_>>().join(", ")
}

fn fields(row: &RegistryRow) -> Vec<Field> {
    vec![
        ("id", json!(row.id.to_string())),
        ("purpose", json!(row.purpose.as_str())),
        ("state", json!(row.state.as_str())),
        ("sequence", json!(row.sequence)),
        ("token_serial", json!(row.token_serial)),
        ("cka_id", json!(row.private_object().to_string())),
        (
            "integrity_key",
            json!(match row.objects.integrity {
                IntegrityPlace::Worker => "worker",
                IntegrityPlace::Token | IntegrityPlace::Object(_) => "token",
            }),
        ),
        (
            "integrity_cka_id",
            json!(row.integrity_object().map(|object| object.to_string())),
        ),
        ("fingerprint", json!(row.fingerprint.to_string())),
        ("registered", json!(row.registered.to_string())),
        (
            "backup_confirmed",
            json!(row.backup_confirmed.map(|at| at.to_string())),
        ),
    ]
}
