//! Moves the rows of API clients, which contain a MAC and no envelope. The old integrity key verifies the MAC, and the
//! new integrity key computes a new MAC.

use std::collections::BTreeSet;

use keybroker_core::{
    call::CallId,
    key::{ClientId, KeyUse, WrappingKeyId},
};
use keybroker_hsm as hsm;
use keybroker_store::{ClientMove, ClientRow, DamagedClient, Position};

use crate::Broker;

use super::{
    batch::{RowId, Swapped},
    progress::FailedRow,
    run::{Run, Stop},
};

/// Number of API clients per page.
const PAGE_CLIENTS: u32 = 50;

impl Run<'_> {
    /// Moves every API client under the given wrapping keys. Returns the number of rows that were moved or that another change
    /// altered meanwhile.
    pub(super) async fn move_clients(
        &mut self,
        from: &[WrappingKeyId],
        to: WrappingKeyId,
    ) -> Result<u64, Stop> {
        let mut position = Position::default();
        let mut touched = 0;
        loop {
            let rows = self.broker.store.clients(&position, PAGE_CLIENTS).await?;
            if rows.is_empty() {
                return Ok(touched);
            }
            let mut moves = Vec::new();
            for row in rows {
                position.advance(id_of(&row));
                match self.move_client(from, to, row).await? {
                    Some(Ok(one)) => moves.push(one),
                    Some(Err(failed)) => self.progress.fail(failed),
                    None => {}
                }
            }
            let swapped = self.broker.swap_clients(to, moves).await?;
            self.progress.count_clients(swapped.moved);
            self.progress.note_changed(swapped.changed_meanwhile);
            touched += swapped.moved + swapped.changed_meanwhile;
            self.keep_up().await?;
        }
    }

    /// Prepares the swap of one API client. Returns `None` if the client is under another wrapping key.
    async fn move_client(
        &self,
        from: &[WrappingKeyId],
        to: WrappingKeyId,
        row: Result<ClientRow, DamagedClient>,
    ) -> Result<Option<Result<ClientMove, FailedRow>>, Stop> {
        let row = match row {
            Ok(row) => row,
            Err(damaged) => {
                let id = damaged.id.map(|id| id.to_string()).unwrap_or_default();
                return Ok(Some(Err(failed_client(id, 0, "client-unreadable"))));
            }
        };
        if !from.contains(&row.key) {
            return Ok(None);
        }
        let message = row.mac_message();
        let job = self.broker.new_mac(&message, (row.key, &row.mac), to);
        match self.pace.run(&*self.broker.token, job).await {
            Ok(new) => Ok(Some(Ok(ClientMove {
                id: row.id,
                revision: row.revision,
                from: row.key,
                old: row.mac,
                to,
                new,
            }))),
            Err(hsm::Error::MacRefused) => Ok(Some(Err(failed_client(
                row.id.to_string(),
                row.revision,
                "mac-refused",
            )))),
            Err(other) => Err(Stop::Failed(other.into())),
        }
    }
}

impl Broker {
    async fn swap_clients(
        &self,
        to: WrappingKeyId,
        moves: Vec<ClientMove>,
    ) -> Result<Swapped, Stop> {
        let from: BTreeSet<WrappingKeyId> = moves.iter().map(|one| one.from).collect();
        let ids: Vec<RowId> = moves
            .iter()
            .map(|one| (*one.id.as_bytes(), one.revision))
            .collect();
        let call = CallId::fresh();
        let swap = self.store.move_clients(moves, call);
        self.swap_rows((from, to), KeyUse::RewrapFrom, &ids, call, swap)
            .await
    }
}

fn id_of(row: &Result<ClientRow, DamagedClient>) -> Option<ClientId> {
    match row {
        Ok(row) => Some(row.id),
        Err(damaged) => damaged.id,
    }
}

pub(super) fn failed_client(id: String, revision: u64, problem: &str) -> FailedRow {
    tracing::warn!(
        client = id,
        revision,
        problem,
        "an API client cannot be moved to another wrapping key; its row is unchanged"
    );
    FailedRow {
        id,
        revision,
        problem: problem.to_owned(),
    }
}
