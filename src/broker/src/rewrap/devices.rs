//! Moves the rows of devices, which contain a MAC and no envelope, like the rows of API clients. Requests for access are not moved:
//! they expire within days, and only the integrity key that made the MAC of an access code can verify the code.

use std::collections::BTreeSet;

use keybroker_core::{
    call::CallId,
    key::{KeyUse, WrappingKeyId},
};
use keybroker_hsm as hsm;
use keybroker_store::{DamagedDevice, DeviceAddress, DeviceMove, DeviceRow};

use crate::Broker;

use super::{
    batch::{RowId, Swapped, background},
    progress::FailedRow,
    run::{Run, Stop},
};

/// Number of devices per page.
pub(super) const PAGE_DEVICES: u32 = 50;

impl Run<'_> {
    /// Moves every device under the given wrapping keys. Returns the number of rows that were moved or that another change altered
    /// meanwhile.
    pub(super) async fn move_devices(
        &mut self,
        from: &[WrappingKeyId],
        to: WrappingKeyId,
    ) -> Result<u64, Stop> {
        let mut after: Option<DeviceAddress> = None;
        let mut touched = 0;
        loop {
            let store = &self.broker.store;
            let rows = store.devices_after(after.as_ref(), PAGE_DEVICES).await?;
            let Some((last, _)) = rows.last() else {
                return Ok(touched);
            };
            after = Some(last.clone());
            let mut moves = Vec::new();
            for (address, row) in rows {
                match self.move_device(from, to, &address, row).await? {
                    Some(Ok(one)) => moves.push(one),
                    Some(Err(failed)) => self.progress.fail(failed),
                    None => {}
                }
            }
            let swapped = self.broker.swap_devices(to, moves).await?;
            self.progress.count_devices(swapped.moved);
            self.progress.note_changed(swapped.changed_meanwhile);
            touched += swapped.moved + swapped.changed_meanwhile;
            self.keep_up().await?;
        }
    }

    /// Prepares the swap of one device. Returns `None` if the device is under another wrapping key.
    async fn move_device(
        &self,
        from: &[WrappingKeyId],
        to: WrappingKeyId,
        address: &DeviceAddress,
        row: Result<DeviceRow, DamagedDevice>,
    ) -> Result<Option<Result<DeviceMove, FailedRow>>, Stop> {
        let Ok(row) = row else {
            return Ok(Some(Err(failed_device(address, "device-unreadable"))));
        };
        if !from.contains(&row.signer) {
            return Ok(None);
        }
        let message = row.mac_message();
        let job = self.broker.new_mac(&message, (row.signer, &row.mac), to);
        match self.pace.run(&*self.broker.token, job).await {
            Ok(new) => Ok(Some(Ok(DeviceMove {
                address: row.address,
                from: row.signer,
                old: row.mac,
                to,
                new,
            }))),
            Err(hsm::Error::MacRefused) => Ok(Some(Err(failed_device(address, "mac-refused")))),
            Err(other) => Err(Stop::Failed(other.into())),
        }
    }

    /// Verifies the MAC of every device under the target key.
    pub(super) async fn verify_devices(&mut self, target: WrappingKeyId) -> Result<(), Stop> {
        let mut after: Option<DeviceAddress> = None;
        loop {
            let store = &self.broker.store;
            let rows = store.devices_after(after.as_ref(), PAGE_DEVICES).await?;
            let Some((last, _)) = rows.last() else {
                return Ok(());
            };
            after = Some(last.clone());
            for (address, row) in rows {
                // A row that cannot be decoded was already listed as a failed row when the devices were moved.
                let Some(row) = row.ok().filter(|row| row.signer == target) else {
                    continue;
                };
                let (message, caller) = (row.mac_message(), background());
                let token = &*self.broker.token;
                let job = token.verify_mac(target, &message, &row.mac, &caller);
                match self.pace.give_way(token, job).await {
                    Ok(()) => self.progress.count_verified(),
                    Err(hsm::Error::MacRefused) => {
                        self.progress.fail(failed_device(&address, "mac-refused"));
                    }
                    Err(other) => return Err(Stop::Failed(other.into())),
                }
            }
            self.keep_up().await?;
        }
    }
}

impl Broker {
    async fn swap_devices(
        &self,
        to: WrappingKeyId,
        moves: Vec<DeviceMove>,
    ) -> Result<Swapped, Stop> {
        let from: BTreeSet<WrappingKeyId> = moves.iter().map(|one| one.from).collect();
        // A device has no number of its revisions.
        let ids: Vec<RowId> = moves
            .iter()
            .map(|one| (*one.address.device.as_bytes(), 0))
            .collect();
        let call = CallId::fresh();
        let swap = self.store.move_devices(moves, call);
        self.swap_rows((from, to), KeyUse::RewrapFrom, &ids, call, swap)
            .await
    }
}

fn failed_device(address: &DeviceAddress, problem: &str) -> FailedRow {
    tracing::warn!(
        device = %address.device,
        problem,
        "a device cannot be moved to another wrapping key; its row is unchanged"
    );
    FailedRow {
        id: address.device.to_string(),
        revision: 0,
        problem: problem.to_owned(),
    }
}
