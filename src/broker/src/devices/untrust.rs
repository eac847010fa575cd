//! Ends the trust of devices.

use std::sync::Arc;

use keybroker_core::{
    call::{Call, Timestamp},
    device::{DeviceSignature, DeviceState, StatementKind},
    error::{Error, Reason},
    key::{DeviceId, UserId},
    principal::{Action, Kind, Principal},
};
use keybroker_store::{DeviceAddress, DeviceChange, DeviceRow, SealedKeys};

use crate::{Broker, caller, within};

use super::{
    DeviceView,
    establish::{count, trusted_set},
    signed::{Signed, refused, trusted},
    unknown, wrong_state,
};

/// The devices whose trust is ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Which {
    /// All trusted devices of the member.
    All,
    /// These devices.
    These(Vec<DeviceId>),
}

/// The end of the trust of devices.
#[derive(Clone, Debug)]
pub struct Untrusted {
    /// The member; `None` for the principal itself.
    pub user: Option<UserId>,
    /// The devices.
    pub which: Which,
    /// Whether the devices were lost.
    pub are_lost: bool,
    /// The signature of a trusted device. An administrator with the role `approver` needs none.
    pub signature: Option<DeviceSignature>,
}

impl Broker {
    /// Ends the trust of devices, and removes their encrypted keys. If an administrator ends all trust of a member, the broker removes
    /// the rows that cannot be read or verified.
    pub async fn untrust_devices(
        self: &Arc<Self>,
        principal: &Principal,
        call: &Call,
        ended: Untrusted,
    ) -> Result<Vec<DeviceView>, Error> {
        let (broker, principal, call) = (Arc::clone(self), principal.clone(), call.clone());
        self.run_change(Action::UntrustDevice, call.clone(), async move {
            let user = ended.user.as_ref();
            let begun = broker.begin_device_action(&principal, &call, Action::UntrustDevice, user);
            let (user, mut draft) = begun.await?;
            if let Which::These(ids) = &ended.which
                && let [only] = ids[..]
            {
                draft.device(only);
            }
            let now = Timestamp::now();
            let plan = broker.plan_end_of_trust(&principal, &call, &user, &ended, now);
            let change = broker.or_record(&draft, Box::pin(plan).await).await?;
            count(&mut draft, change.devices.len() + change.removes.len());
            if !change.removes.is_empty() {
                draft.cause("damaged-removed");
            }
            broker.commit_devices(&call, &draft, &change, now).await?;
            let rows = change.devices.into_iter().map(|changed| changed.row);
            let rows = rows.filter(|row| row.state != DeviceState::Trusted);
            Ok(rows.map(DeviceView::verified).collect())
        })
        .await
    }

    pub(super) async fn plan_end_of_trust(
        &self,
        principal: &Principal,
        call: &Call,
        user: &UserId,
        ended: &Untrusted,
        now: Timestamp,
    ) -> Result<DeviceChange, Error> {
        let is_for_all = ended.which == Which::All && principal.kind() == Kind::Service;
        let (devices, removes) = if is_for_all {
            self.devices_that_verify(principal, call, user).await?
        } else {
            let devices = self.verified_devices(principal, call, user).await?;
            (devices, Vec::new())
        };
        let signer = match (&ended.signature, principal.kind()) {
            (Some(signature), _) => Some(signed(principal, user, ended, signature, &devices, now)?),
            (None, Kind::Service) => None,
            (None, Kind::User) => {
                return Err(refused("a trusted device must sign the end of the trust"));
            }
        };
        let chosen = match chosen(&devices, &ended.which) {
            // The member may have only rows that are removed.
            Err(error) if error.reason() == Reason::DeviceState && !removes.is_empty() => {
                Vec::new()
            }
            chosen => chosen?,
        };
        let token = caller(principal, call);
        let mut change = DeviceChange {
            trusted: Some(trusted_set(principal, user, &devices)),
            removes,
            ..DeviceChange::default()
        };
        let signer_id = signer.as_ref().map(|row| row.address.device);
        let is_chosen = |id| chosen.iter().any(|row| row.address.device == id);
        if let Some(signer) = signer.clone().filter(|row| !is_chosen(row.address.device)) {
            let before = trusted(&devices, signer.address.device);
            change
                .devices
                .push(self.changed_device(&token, signer, before, now).await?);
        }
        for before in chosen {
            let signed = signer
                .as_ref()
                .filter(|_| Some(before.address.device) == signer_id);
            let row = without_trust(signed.unwrap_or(before), ended.are_lost, now);
            change
                .devices
                .push(self.changed_device(&token, row, Some(before), now).await?);
        }
        Ok(change)
    }

    /// Returns the devices of a member whose rows the token verified, and the places of the rows that cannot be read or verified. Rows
    /// that only cannot be verified now are an error.
    async fn devices_that_verify(
        &self,
        principal: &Principal,
        call: &Call,
        user: &UserId,
    ) -> Result<(Vec<DeviceRow>, Vec<DeviceAddress>), Error> {
        self.check_acknowledged()?;
        let token = caller(principal, call);
        let found = within(call, self.store.devices(principal.tenant(), user)).await?;
        let (mut verified, mut others) = (Vec::new(), Vec::new());
        for row in found {
            let row = match row {
                Ok(row) => row,
                Err(damaged) => {
                    let unreadable = || Error::new(Reason::RecordDamaged, damaged.detail);
                    others.push(damaged.address.ok_or_else(unreadable)?);
                    continue;
                }
            };
            match self.verify_device(&token, &row).await {
                Ok(()) => verified.push(row),
                Err(error) if is_lasting(&error) => others.push(row.address),
                Err(error) => return Err(error),
            }
        }
        Ok((verified, others))
    }
}

/// Whether a row that cannot be verified because of this error can never be verified again, unless the row or the state of its wrapping
/// key is changed.
fn is_lasting(error: &Error) -> bool {
    matches!(error.reason(), Reason::RecordDamaged | Reason::KeyState)
}

/// A device without its encrypted keys.
pub(super) fn without_trust(row: &DeviceRow, is_lost: bool, now: Timestamp) -> DeviceRow {
    DeviceRow {
        state: if is_lost {
            DeviceState::Lost
        } else {
            DeviceState::Untrusted
        },
        keys: SealedKeys::default(),
        lost: row.lost.or(is_lost.then_some(now)),
        ..row.clone()
    }
}

/// The trusted devices that are meant.
fn chosen<'d>(devices: &'d [DeviceRow], which: &Which) -> Result<Vec<&'d DeviceRow>, Error> {
    let ids = match which {
        Which::All => {
            let all = devices.iter();
            let all: Vec<_> = all
                .filter(|row| row.state == DeviceState::Trusted)
                .collect();
            if all.is_empty() {
                return Err(wrong_state("devices", "the member has no trusted device"));
            }
            return Ok(all);
        }
        Which::These(ids) => ids,
    };
    let mut chosen: Vec<&DeviceRow> = Vec::with_capacity(ids.len());
    for id in ids {
        let row = devices.iter().find(|row| row.address.device == *id);
        let row = row.ok_or_else(|| unknown("device_ids"))?;
        if row.state != DeviceState::Trusted {
            let what = format!("device {id} is {} already", row.state);
            return Err(wrong_state("device_ids", &what));
        }
        if chosen.iter().any(|known| known.address == row.address) {
            return Err(Error::violation("device_ids", "each device once"));
        }
        chosen.push(row);
    }
    if chosen.is_empty() {
        return Err(Error::new(Reason::Bug, "an empty list of devices"));
    }
    Ok(chosen)
}

fn signed(
    principal: &Principal,
    user: &UserId,
    ended: &Untrusted,
    signature: &DeviceSignature,
    devices: &[DeviceRow],
    now: Timestamp,
) -> Result<DeviceRow, Error> {
    let cause: &[u8] = if ended.are_lost {
        b"lost"
    } else {
        b"untrusted"
    };
    let mut fields: Vec<&[u8]> = vec![cause];
    match &ended.which {
        Which::All => fields.push(b"all"),
        Which::These(ids) => {
            fields.push(b"these");
            fields.extend(ids.iter().map(|id| id.as_bytes().as_slice()));
        }
    }
    let signed = Signed {
        kind: StatementKind::Untrust,
        tenant: principal.tenant(),
        user,
        signature,
        fields: &fields,
    };
    signed.by_trusted(devices, now)
}
