//! `keybroker key remove`: removes the objects of an unregistered key from the token.

use clap::Args;
use serde_json::json;

use crate::{
    cli::{
        Context, block_on,
        change::audited,
        confirm,
        exit::{Exit, Failure},
        pin::{UserPin, log_in, serials},
    },
    config::Config,
    places::Registry,
};
use keybroker_audit::Entry;
use keybroker_core::{
    call::Timestamp,
    key::{IntegrityPlace, ObjectId, ObjectIds, WrappingKeyId, WrappingKeyState},
};
use keybroker_store as store;
use keybroker_store::{
    RegistryRow,
    scan::{ClientScan, FoundOther, OtherScan, Scan},
};

use super::{parse_id, registry};

#[derive(Args, Debug)]
pub(in crate::cli) struct Remove {
    /// Id of the key, 32 hexadecimal digits
    id: String,
    /// Remove the key without a prompt for its id
    #[arg(long)]
    yes: bool,
    #[command(flatten)]
    pin: UserPin,
}

pub(super) fn remove(arguments: &Remove, context: &Context) -> Result<(), Failure> {
    let config = context.config_for_token()?;
    let id = parse_id(&arguments.id)?;
    let _lock = store::lock(&config.store)?;
    let registry = block_on(registry(&config))??;
    refuse_registered(&registry, id)?;
    let needed = block_on(rows_under(&config, id))??;
    refuse_needed(id, &needed)?;
    confirm(
        context,
        arguments.yes,
        id,
        "A removed key cannot be restored",
    )?;
    let pin = arguments.pin.get(config.token())?;
    let admin = log_in(&config, &pin, true, &serials(&registry.rows))?;
    admin.know([(id, &place(&config))])?;
    let describe = |entry: &mut Entry| entry.wrapping_key = Some(id);
    let removed = audited(context, &config, "wrapping_key.remove", describe, || {
        // On a database server, another process may have registered the key while the command waited for the
        // administrator's confirmation. The registry is read last, because the scan of all rows takes a long time.
        refuse_needed(id, &block_on(rows_under(&config, id))??)?;
        refuse_registered(&block_on(super::registry(&config))??, id)?;
        match admin.remove_key(id)? {
            0 => {
                let what = format!("the token has no object of key {id}");
                Err(Failure::new(Exit::Untrusted, what))
            }
            removed => Ok(removed),
        }
    })?;
    context.output.fields(vec![
        ("id", json!(id.to_string())),
        ("removed_objects", json!(removed)),
    ])
}

/// The place of an unregistered key's integrity key, which the settings determine: on the token or
/// in the workers.
fn place(config: &Config) -> ObjectIds {
    ObjectIds {
        private: None,
        integrity: if config.token().permits_integrity_key_in_worker() {
            IntegrityPlace::Worker
        } else {
            IntegrityPlace::Token
        },
    }
}

fn refuse_registered(registry: &Registry, id: WrappingKeyId) -> Result<(), Failure> {
    let object = ObjectId::from(id);
    let are_its = |row: &RegistryRow, objects: &ObjectIds| {
        row.id == id
            || objects.private_object(row.id) == object
            || objects.integrity_object(row.id).as_ref() == Some(&object)
    };
    let uses_object = |row: &&RegistryRow| {
        let mut places = registry.places.iter().filter(|place| place.key == row.id);
        row.state != WrappingKeyState::Destroyed
            && (are_its(row, &row.objects) || places.any(|place| are_its(row, &place.objects)))
    };
    let Some(row) = registry.rows.iter().find(uses_object) else {
        return Ok(());
    };
    let what = format!(
        "key {} is registered and {}; only an unregistered key can be removed",
        row.id, row.state
    );
    Err(Failure::new(Exit::Untrusted, what)
        .hint("`keybroker token check` lists the keys on the token that are not registered"))
}

/// The numbers of rows that need a key.
#[derive(Debug, Default)]
struct Needed {
    revisions: u64,
    clients: u64,
    requests: u64,
    approvals: u64,
    /// The number of rows that cannot be read, so that their wrapping key is unknown.
    unreadable: u64,
}

/// Counts the rows under a key, because the registry row of a key may be lost while rows still need
/// the key.
async fn rows_under(config: &Config, id: WrappingKeyId) -> Result<Needed, Failure> {
    let store = store::open_tables(&config.store).await?;
    let mut needed = Needed::default();
    let mut scan = Scan::new(store.clone());
    while let Some(found) = scan.next().await? {
        match &found.revision {
            Some(Ok(row)) => needed.revisions += u64::from(row.wrapping_key == id),
            Some(Err(_)) => needed.unreadable += 1,
            None => {}
        }
    }
    let mut scan = ClientScan::new(store.clone());
    while let Some(found) = scan.next().await? {
        match &found.row {
            Ok(row) => needed.clients += u64::from(row.key == id),
            Err(_) => needed.unreadable += 1,
        }
    }
    let mut scan = OtherScan::new(store.clone());
    while let Some(found) = scan.next().await? {
        match &found {
            FoundOther::Request(row) => match &**row {
                Ok((_, record)) => needed.requests += u64::from(record.key == id),
                Err(_) => needed.unreadable += 1,
            },
            FoundOther::Approval(row) => match &**row {
                Ok(row) => {
                    let is_needed = row.signer == id && row.state_at(Timestamp::now()).is_open();
                    needed.approvals += u64::from(is_needed);
                }
                Err(_) => needed.unreadable += 1,
            },
            FoundOther::MemberKey(row) => needed.unreadable += u64::from(row.is_err()),
            _ => {}
        }
    }
    store.close().await;
    Ok(needed)
}

fn refuse_needed(id: WrappingKeyId, needed: &Needed) -> Result<(), Failure> {
    let Needed {
        revisions,
        clients,
        requests,
        approvals,
        unreadable,
    } = needed;
    if revisions + clients + requests + approvals > 0 {
        let what = format!(
            "{revisions} revisions, {clients} API clients, {requests} answers to request ids and {approvals} requests for \
             approval need key {id}; nothing was removed"
        );
        let hint = format!("register the key with `keybroker key register {id}`");
        return Err(Failure::new(Exit::Untrusted, what).hint(hint));
    }
    if *unreadable > 0 {
        let what = format!(
            "{unreadable} rows of the database cannot be read and may need key {id}; nothing was removed"
        );
        return Err(
            Failure::new(Exit::Verification, what).hint("run `keybroker store check` first")
        );
    }
    Ok(())
}

/// Prompts for the id of the key, because the command cannot be undone. `warning` is the text of
/// the prompt, a sentence without a full stop.
pub(super) fn confirm(
    context: &Context,
    is_confirmed: bool,
    id: WrappingKeyId,
    warning: &str,
) -> Result<(), Failure> {
    confirm::typed_id(
        context.output,
        is_confirmed,
        &id.to_string(),
        "key",
        warning,
    )
}
