//! Records when secrets of API clients were last accepted. The times are kept in memory, and a background task writes
//! them to the database. If a noted time is lost, only the displayed last use is out of date.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
};

use crate::Broker;
use keybroker_core::{call::Timestamp, key::ClientId};

/// Largest number of secrets whose last use is noted in memory.
const NOTED_MAX: usize = 10_000;

#[derive(Debug, Default)]
pub(crate) struct ClientUses(Mutex<HashMap<(ClientId, u32), Timestamp>>);

impl ClientUses {
    pub(super) fn note(&self, id: ClientId, secret: u32) {
        let mut noted = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if noted.len() < NOTED_MAX || noted.contains_key(&(id, secret)) {
            noted.insert((id, secret), Timestamp::now());
        }
    }

    /// Removes all noted times from memory, and returns them in the order in which every broker writes them.
    fn take(&self) -> Vec<(ClientId, u32, Timestamp)> {
        let noted = std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
        let uses = noted.into_iter().map(|((id, secret), at)| (id, secret, at));
        let mut uses: Vec<_> = uses.collect();
        uses.sort_unstable();
        uses
    }
}

impl Broker {
    /// Writes the noted times to the database. Times that cannot be written are dropped; the next use of the secret
    /// notes a new time.
    pub(crate) async fn flush_client_uses(&self) {
        let uses = self.client_uses.take();
        if uses.is_empty() {
            return;
        }
        if let Err(error) = self.store.note_client_uses(&uses).await {
            tracing::info!(%error, "cannot write the times of last use of client secrets");
        }
    }
}
