//! The schedules that this instance may carry out.
//!
//! A restored copy of the database contains the schedules, too, with valid MACs, and the token of a broker on the copy may be the token
//! of the original. Therefore only an instance that accepted the request of an administrator destroys the key. The state directory of
//! the instance has the MAC of each accepted schedule and the identity of the database.
//!
//! Mitigation: M11 of `THREAT_MODEL.md`.

use serde::{Deserialize, Serialize};

use keybroker_core::{
    error::{Error, Reason, chain},
    key::WrappingKeyId,
    state::{self, StateDirectory},
};
use keybroker_store::{DestructionRow, StoreId};

use crate::{Broker, digests::hex_of};

/// The accepted schedules in the form in which the state directory stores them.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Kept {
    /// The identity of the database with the schedules.
    store: String,
    schedules: Vec<KeptSchedule>,
}

#[derive(Debug, Serialize, Deserialize)]
struct KeptSchedule {
    key: String,
    mac: String,
}

impl KeptSchedule {
    fn is_of(&self, key: WrappingKeyId) -> bool {
        self.key == key.to_string()
    }
}

/// The accepted schedules of an instance. They are read from the file each time, because `store accept-restored` removes them while a
/// broker runs.
#[derive(Debug)]
pub(super) struct Accepted {
    state: StateDirectory,
    fact: String,
}

/// The name of the state file. The name contains the instance, because several instances may share the state directory.
fn fact_of(instance: &str) -> String {
    format!("destructions-{instance}")
}

impl Accepted {
    pub(super) fn new(state: StateDirectory, instance: &str) -> Self {
        Self {
            state,
            fact: fact_of(instance),
        }
    }

    /// Accepts a schedule in place of an earlier schedule of the same key. Forgets the schedules of another database.
    fn note(&self, store: StoreId, row: &DestructionRow) -> Result<(), state::Error> {
        let mut kept = match self.state.read_json::<Kept>(&self.fact) {
            Ok(kept) => kept.unwrap_or_default(),
            Err(error) if error.is_damaged() => Kept::default(),
            Err(error) => return Err(error),
        };
        let store = store.to_string();
        if kept.store != store {
            kept = Kept {
                store,
                ..Kept::default()
            };
        }
        kept.schedules.retain(|one| !one.is_of(row.key));
        kept.schedules.push(KeptSchedule {
            key: row.key.to_string(),
            mac: hex_of(row.mac),
        });
        self.state.write_json(&self.fact, &kept)
    }

    fn has(&self, store: StoreId, row: &DestructionRow) -> Result<bool, state::Error> {
        let Some(kept) = self.state.read_json::<Kept>(&self.fact)? else {
            return Ok(false);
        };
        let mac = hex_of(row.mac);
        let mut schedules = kept.schedules.iter();
        Ok(kept.store == store.to_string()
            && schedules.any(|one| one.is_of(row.key) && one.mac == mac))
    }
}

/// Forgets the schedules that an instance accepted, because its database was replaced.
pub(crate) fn forget(state: &StateDirectory, instance: &str) -> Result<(), state::Error> {
    let fact = fact_of(instance);
    match state.read_json::<Kept>(&fact) {
        Ok(None) => Ok(()),
        Err(error) if !error.is_damaged() => Err(error),
        _ => state.write_json(&fact, &Kept::default()),
    }
}

impl Broker {
    /// Remembers that this instance may carry out a schedule. After a failure, the schedule has to be confirmed when its time comes.
    pub(crate) async fn accept_schedule(&self, row: &DestructionRow) {
        if let Err(error) = self.try_to_accept(row).await {
            tracing::warn!(
                wrapping_key = %row.key, %error,
                "the state directory could not record that this instance scheduled the destruction of a wrapping key; confirm the \
                 schedule with `keybroker key destroy ID --confirm-schedule`"
            );
        }
    }

    async fn try_to_accept(&self, row: &DestructionRow) -> Result<(), Error> {
        let Some(store) = self.store.evidence(&[]).await?.store else {
            return Err(Error::new(
                Reason::StoreDown,
                "the database has no identity",
            ));
        };
        let noted = self.scheduled.accepted.note(store, row);
        noted.map_err(|error| Error::caused(Reason::StoreDown, error))
    }

    /// Whether this instance may carry out a schedule.
    pub(super) async fn is_accepted(&self, row: &DestructionRow) -> Result<bool, Error> {
        let Some(store) = self.store.evidence(&[]).await?.store else {
            return Ok(false);
        };
        let accepted = self.scheduled.accepted.has(store, row);
        Ok(accepted.unwrap_or_else(|error| {
            tracing::warn!(
                error = chain(&error),
                "cannot read the schedules that this instance accepted, so no schedule counts as accepted"
            );
            false
        }))
    }
}

#[cfg(test)]
mod tests {
    use keybroker_core::call::Timestamp;

    use super::*;

    fn schedule(key: u8, mac: u8) -> DestructionRow {
        DestructionRow {
            key: WrappingKeyId::from_bytes([key; 16]),
            signer: WrappingKeyId::from_bytes([9; 16]),
            sequence: 1,
            requested: Timestamp::from_micros(1),
            due: Timestamp::from_micros(2),
            requested_by: String::new(),
            mac: [mac; 32],
        }
    }

    #[test]
    fn a_schedule_is_accepted_for_one_database_until_it_is_replaced_or_forgotten() {
        let folder = tempfile::tempdir().unwrap();
        let state = StateDirectory::below(folder.path());
        let accepted = Accepted::new(state.clone(), "one");
        let [original, copy] = [1, 2].map(|id| StoreId::from_hex(&format!("{id:032}")).unwrap());
        assert!(!accepted.has(original, &schedule(1, 1)).unwrap());
        accepted.note(original, &schedule(1, 1)).unwrap();
        accepted.note(original, &schedule(2, 2)).unwrap();
        assert!(accepted.has(original, &schedule(1, 1)).unwrap());
        assert!(!accepted.has(copy, &schedule(1, 1)).unwrap());
        assert!(
            !Accepted::new(state.clone(), "two")
                .has(original, &schedule(1, 1))
                .unwrap()
        );
        // The MAC of an earlier schedule of the key.
        accepted.note(original, &schedule(1, 3)).unwrap();
        assert!(!accepted.has(original, &schedule(1, 1)).unwrap());
        assert!(accepted.has(original, &schedule(2, 2)).unwrap());
        accepted.note(copy, &schedule(1, 4)).unwrap();
        assert!(!accepted.has(original, &schedule(2, 2)).unwrap());
        forget(&state, "one").unwrap();
        assert!(!accepted.has(copy, &schedule(1, 4)).unwrap());
    }
}
