//! What a ceremony checks before it changes anything: the plan fits the configuration, and nothing exists that it makes.

use std::path::Path;

use keybroker_ceremony::plan::{self, Plan};
use keybroker_core::key::{ObjectId, WrappingKeyState};
use keybroker_hsm::admin::{self, Admin, Listed};
use keybroker_store::RegistryRow;
use keybroker_worker_protocol::{Pin, PinSource, Settings};

use crate::{
    cli::{
        OWN_PROGRAM, environment,
        exit::{Exit, Failure},
        key,
    },
    config::Config,
};

use super::Files;

/// A new file for the transcript needs an unused name.
pub(super) fn files(files: &Files) -> Result<(), Failure> {
    for path in files.all() {
        if path.symlink_metadata().is_ok() {
            let what = format!(
                "{} exists already, so this ceremony was run before, or another one used this name. Nothing was changed",
                path.display()
            );
            return Err(Failure::new(Exit::Usage, what).hint(
                "keep the files of the earlier ceremony in a safe place, and pass another name with --transcript",
            ));
        }
    }
    Ok(())
}

/// Module and selector of a token in the configuration must be those of the plan, because auditors read the plan alone.
pub(super) fn settings(planned: &plan::Token, settings: &Settings) -> Result<(), Failure> {
    let text = |value: &Option<String>| value.clone().unwrap_or_else(|| "not set".to_owned());
    let pairs = [
        (
            "module",
            planned.module.display().to_string(),
            settings.module.display().to_string(),
        ),
        ("label", text(&planned.label), text(&settings.label)),
        ("serial", text(&planned.serial), text(&settings.serial)),
        ("uri", text(&planned.uri), text(&settings.uri)),
    ];
    for (field, planned_value, configured) in pairs {
        if planned_value != configured {
            let what = format!(
                "token {:?}: `{field}` is {planned_value:?} in the plan, but {configured:?} in the configuration. Nothing was \
                 changed",
                planned.name
            );
            return Err(Failure::new(Exit::Configuration, what)
                .hint("correct the configuration, or change the plan and have it approved again"));
        }
    }
    Ok(())
}

/// The database must have no wrapping key, because the key of the ceremony becomes the active one.
pub(super) fn registry(rows: &[RegistryRow]) -> Result<(), Failure> {
    let Some(row) = rows
        .iter()
        .find(|row| row.state != WrappingKeyState::Destroyed)
    else {
        return Ok(());
    };
    let what = format!(
        "the database already has the wrapping key {}, which is {}. Nothing was changed",
        row.id, row.state
    );
    Err(Failure::new(Exit::Untrusted, what).hint(
        "a ceremony registers the first wrapping key. Use `keybroker key rotate` for the next key, or set `register = false` in \
         the plan",
    ))
}

/// A token that the ceremony initialises must be blank, and must accept the lengths of both PINs. After the custodians have seen their
/// shares, it is too late for another length.
pub(super) fn is_blank(
    planned: &plan::Token,
    config: &Config,
    user_pin: &PinSource,
) -> Result<(), Failure> {
    let listed = admin::list_tokens(Path::new(OWN_PROGRAM), config.token())
        .map_err(|error| environment::explain(error, config))?;
    let label = planned.label.as_deref().unwrap_or_default();
    if let Some(token) = listed
        .iter()
        .find(|token| token.initialised && token.info.label == label)
    {
        let what = format!(
            "token {:?}: a token with the label {label:?} is initialised already (serial {:?}). Nothing was changed",
            planned.name, token.info.serial
        );
        return Err(Failure::new(Exit::Token, what).hint(
            "remove `initialise` from the plan to use this token as it is, or choose another label",
        ));
    }
    let blank: Vec<&Listed> = listed.iter().filter(|token| !token.initialised).collect();
    if blank.is_empty() {
        let what = format!(
            "token {:?}: the module shows no blank token to initialise. Nothing was changed",
            planned.name
        );
        return Err(Failure::new(Exit::Token, what).hint(
            "a ceremony never erases a token: reset the device with the vendor's tool first",
        ));
    }
    let so_pin = planned.so_pin_characters();
    pin_length(planned, "`so_pin_characters`", so_pin, &blank)?;
    let user_pin = match user_pin {
        PinSource::Text(pin) => Some(pin.expose().len()),
        // The security officer's PIN will be in the memory of this process, too.
        PinSource::File(path) => {
            let pin = Pin::from_file(path);
            let unusable = |error| Failure::new(Exit::Pin, format!("{error}. Nothing was changed"));
            Some(pin.map_err(unusable)?.expose().len())
        }
        PinSource::NotNeeded => None,
    };
    match user_pin {
        Some(length) => pin_length(planned, "the length of the user PIN", length, &blank),
        None => Ok(()),
    }
}

/// Checks that a blank token accepts PINs of this length.
fn pin_length(
    planned: &plan::Token,
    what: &str,
    length: usize,
    blank: &[&Listed],
) -> Result<(), Failure> {
    if blank.iter().any(|token| token.pin_bytes.accept(length)) {
        return Ok(());
    }
    let limits = blank.first().map(|token| token.pin_bytes.to_string());
    let text = format!(
        "token {:?}: {what} is {length}, but the blank token accepts PINs of {}. Nothing was changed",
        planned.name,
        limits.unwrap_or_default()
    );
    Err(Failure::new(Exit::Pin, text)
        .hint("choose a length that the token accepts; a changed plan must be approved again"))
}

/// A token that keeps its PINs must not have a key that the ceremony makes.
pub(super) fn has_no_key_of_plan(planned: &plan::Token, admin: &Admin) -> Result<(), Failure> {
    let present = admin.key_ids()?;
    for key in &planned.keys {
        let id = key.id.as_deref().and_then(ObjectId::from_hex);
        if let Some(id) = id
            && present.contains(&id)
        {
            let what = format!(
                "token {:?}: the token already has a key with the CKA_ID {id}, which the plan has for key {:?}. Nothing was \
                 changed",
                planned.name, key.name
            );
            return Err(Failure::new(Exit::Untrusted, what)
                .hint("choose another `id`, or leave it out for a random one"));
        }
    }
    if admin.has_signing_key()? {
        let what = format!(
            "token {:?}: the token has the signing key of an earlier ceremony. Nothing was changed",
            planned.name
        );
        return Err(Failure::new(Exit::Untrusted, what).hint(
            "if the transcript of the earlier ceremony is kept, remove the key \"keybroker ceremony signing key\" with the \
             vendor's tool",
        ));
    }
    Ok(())
}

/// Files that the ceremony needs later must be usable now.
pub(super) fn later_files(config: &Config, pin: &PinSource, plan: &Plan) -> Result<(), Failure> {
    if let PinSource::File(path) = pin {
        Pin::check_file(path)
            .map_err(|error| Failure::new(Exit::Pin, format!("{error}. Nothing was changed")))?;
    }
    if plan.tokens.iter().any(|token| !token.keys.is_empty()) {
        key::integrity_files(config)?;
    }
    Ok(())
}
