//! Registers keys that are on several tokens.

use keybroker_audit::Entry;
use keybroker_core::call::Timestamp;
use keybroker_hsm::admin::{Admin, CheckedKey};
use keybroker_store as store;
use keybroker_store::{PlaceRow, RegistryRow, Store};
use keybroker_worker_protocol::unpadded;

use crate::{
    cli::{
        Context, block_on, change,
        exit::{Exit, Failure},
    },
    config::Config,
    places::Registry,
};

/// Adds the row that records that a new key is on the token of this command. A configuration with
/// only one token needs no additional row, because the registry row describes the token.
pub(super) fn add(
    config: &Config,
    admin: &Admin,
    key: &CheckedKey,
    row: &RegistryRow,
) -> Result<Option<PlaceRow>, Failure> {
    if !config.tokens.are_several() {
        return Ok(None);
    }
    // A key that was just made on this token: its two rows have the same time.
    let place = new_place(config, admin, key, row, row.registered)?;
    change_store(config, async |store| store.add_place(&place).await)?;
    Ok(Some(place))
}

/// Registers a key for the token of this command; the key is already registered for another token.
/// First proves that the token has the same key: the public keys must be equal, and the integrity
/// key must verify the MAC of the registry row.
pub(super) fn register(
    context: &Context,
    config: &Config,
    admin: &Admin,
    key: &CheckedKey,
    row: &RegistryRow,
    registry: &Registry,
) -> Result<PlaceRow, Failure> {
    let (id, token) = (row.id, &config.token().name);
    if row.fingerprint != key.fingerprint {
        let what = format!(
            "token {token}: the key with id {id} on this token is not the registered key: its public key is {}, but the \
             registered public key is {}; nothing was changed",
            key.fingerprint, row.fingerprint
        );
        return Err(Failure::new(Exit::Untrusted, what));
    }
    if !admin.verify(id, &row.mac_message(), &row.mac)? {
        let what = format!(
            "token {token}: the integrity key of key {id} on this token does not verify the MAC of the registry row: the \
             token has another integrity key, or the registry row was altered; nothing was changed"
        );
        return Err(Failure::new(Exit::Untrusted, what));
    }
    let known = registry.place(id, token);
    let serial = &admin.info().serial;
    if known.is_some_and(|known| unpadded(&known.token_serial) == serial) {
        let what = format!("key {id} is already registered for token {token}; nothing was changed");
        return Err(Failure::new(Exit::Untrusted, what));
    }
    let place = new_place(config, admin, key, row, Timestamp::now())?;
    let describe = |entry: &mut Entry| entry.wrapping_key = Some(id);
    match known {
        None => change::audited(context, config, "wrapping_key.register", describe, || {
            change_store(config, async |store| store.add_place(&place).await)
        })?,
        Some(known) => change::audited(context, config, "wrapping_key.move", describe, || {
            change_store(config, async |store| {
                store.update_place(&place, &known.mac).await
            })
        })?,
    }
    Ok(place)
}

/// Creates the row that records that a key is on the token of this command. The new row keeps a
/// backup confirmation only for the token that the registry row names.
fn new_place(
    config: &Config,
    admin: &Admin,
    key: &CheckedKey,
    row: &RegistryRow,
    registered: Timestamp,
) -> Result<PlaceRow, Failure> {
    let token = config.token();
    let serial = &admin.info().serial;
    let is_home = unpadded(&row.token_serial) == serial && token.copy_of.is_none();
    let mut place = PlaceRow {
        key: row.id,
        token: token.name.clone(),
        token_serial: serial.clone(),
        objects: key.objects.clone(),
        registered,
        backup_confirmed: row.backup_confirmed.filter(|_| is_home),
        mac: [0; 32],
    };
    place.mac = admin.mac(row.id, &place.mac_message())?;
    Ok(place)
}

fn change_store(
    config: &Config,
    change: impl AsyncFnOnce(&dyn Store) -> Result<(), store::Error>,
) -> Result<(), Failure> {
    block_on(async {
        let store = store::open(&config.store).await?;
        let changed = change(&*store).await;
        store.close().await;
        Ok(changed?)
    })?
}
