//! Establishes the trust of a device, gives its keys back to it, and changes its name.

use std::sync::Arc;

use keybroker_core::{
    call::{Call, Timestamp},
    device::{AccessState, DeviceSignature, DeviceState, StatementKind, VerificationKey},
    envelope::Mac,
    error::{Error, Reason},
    key::{AccessRequestId, DeviceId, KeyAddress, KeyName, Revision, UserId},
    principal::{Action, Principal},
};
use keybroker_store::{
    AccessRow, DEVICES_MAX, DeviceAddress, DeviceChange, DeviceRow, RecordInfo, RecordState,
    SealedKeys, TrustedSet,
};

use crate::{Broker, caller, journal::Draft, observed, within};

use super::{
    DeviceView, UNSIGNED, limit,
    signed::{Signed, refused, trusted},
    unknown,
};

/// Shortest time in microseconds between two stored times of use.
const NOTED_AFTER_US: i64 = 60 * 1_000_000;

/// A device whose trust is established.
#[derive(Clone, Debug)]
pub struct NewDevice {
    /// The id, which the device chooses.
    pub id: DeviceId,
    /// The name.
    pub name: String,
    /// The type, as the app states it.
    pub kind: String,
    /// The public key of the signatures of the device.
    pub verification_key: VerificationKey,
    /// The name of the user key that the device opens.
    pub key_name: KeyName,
    /// The revision of the user key that the device opens.
    pub revision: Revision,
    /// The encrypted keys.
    pub keys: SealedKeys,
    /// The request for access whose answer gave the device the user key, if any.
    pub request: Option<AccessRequestId>,
    /// The signature of a trusted device, or of the new device itself.
    pub signature: DeviceSignature,
}

impl Broker {
    /// Establishes the trust of a device. The signature must come from a trusted device of the member. The new device itself may
    /// sign if the member has no trusted device, or if its request for access was approved.
    pub async fn establish_trust(
        self: &Arc<Self>,
        principal: &Principal,
        call: &Call,
        new: NewDevice,
    ) -> Result<DeviceView, Error> {
        let (broker, principal, call) = (Arc::clone(self), principal.clone(), call.clone());
        self.run_change(Action::EstablishDevice, call.clone(), async move {
            let begun =
                broker.begin_device_action(&principal, &call, Action::EstablishDevice, None);
            let (user, mut draft) = begun.await?;
            draft.device(new.id);
            let now = Timestamp::now();
            let plan = broker.plan_trust(&principal, &call, &user, &new, now);
            let change = broker.or_record(&draft, Box::pin(plan).await).await?;
            broker.commit_devices(&call, &draft, &change, now).await?;
            let row = change.devices.into_iter().next_back();
            let row = row.ok_or_else(|| Error::new(Reason::Bug, "a change without a device"))?;
            Ok(DeviceView::verified(row.row))
        })
        .await
    }

    async fn plan_trust(
        &self,
        principal: &Principal,
        call: &Call,
        user: &UserId,
        new: &NewDevice,
        now: Timestamp,
    ) -> Result<DeviceChange, Error> {
        let record = self.record_of(principal, call, user, &new.key_name).await?;
        if record.revision != new.revision {
            let what = format!(
                "the encrypted keys are for revision {}, but the current revision of the user key is {}; fetch the current user key, and try again",
                new.revision, record.revision
            );
            return Err(Error::new(Reason::Revision, what));
        }
        let devices = self.verified_devices(principal, call, user).await?;
        let before = devices.iter().find(|row| row.address.device == new.id);
        let (signer, unchanged) = self
            .signer_of_trust(principal, call, user, new, &devices, now)
            .await?;
        self.check_device_limits(&devices, before)?;
        let (no_signer, no_mac) = UNSIGNED;
        let is_own = signer.is_none() || new.signature.device == new.id;
        let row = DeviceRow {
            address: DeviceAddress {
                tenant: principal.tenant().clone(),
                user: user.clone(),
                device: new.id,
            },
            signer: no_signer,
            state: DeviceState::Trusted,
            name: new.name.clone(),
            kind: new.kind.clone(),
            verification_key: new.verification_key.as_bytes().to_vec(),
            key_name: new.key_name.clone(),
            revision: new.revision,
            keys: new.keys.clone(),
            trusted: now,
            changed: now,
            signed: if is_own {
                new.signature.at
            } else {
                before.map_or(Timestamp::from_micros(0), |row| row.signed)
            },
            // A device cannot remove its own mark: the finder of a lost device could otherwise hide the loss.
            lost: before
                .filter(|row| row.state == DeviceState::Trusted)
                .and_then(|row| row.lost),
            used: None,
            mac: no_mac,
        };
        let token = caller(principal, call);
        let mut change = DeviceChange {
            requires: Some((record.id, record.revision)),
            unchanged,
            trusted: Some(trusted_set(principal, user, &devices)),
            ..DeviceChange::default()
        };
        if let Some(signer) = signer.filter(|signer| signer.address.device != new.id) {
            let known = trusted(&devices, signer.address.device);
            change
                .devices
                .push(self.changed_device(&token, signer, known, now).await?);
        }
        change
            .devices
            .push(self.changed_device(&token, row, before, now).await?);
        Ok(change)
    }

    /// Verifies the signature of a new trust. Returns the trusted device that signed, or `None` if the new device itself signed, and the
    /// request that permits this.
    async fn signer_of_trust(
        &self,
        principal: &Principal,
        call: &Call,
        user: &UserId,
        new: &NewDevice,
        devices: &[DeviceRow],
        now: Timestamp,
    ) -> Result<(Option<DeviceRow>, Option<(AccessRequestId, Mac)>), Error> {
        let revision = new.revision.get().to_be_bytes();
        let fields: [&[u8]; 9] = [
            new.id.as_bytes(),
            new.name.as_bytes(),
            new.kind.as_bytes(),
            new.verification_key.as_bytes(),
            new.key_name.as_str().as_bytes(),
            &revision,
            &new.keys.user_key,
            &new.keys.public_key,
            &new.keys.private_key,
        ];
        let signed = Signed {
            kind: StatementKind::Establish,
            tenant: principal.tenant(),
            user,
            signature: &new.signature,
            fields: &fields,
        };
        let has_trusted = devices.iter().any(|row| row.state == DeviceState::Trusted);
        if trusted(devices, new.signature.device).is_some() {
            return Ok((Some(signed.by_trusted(devices, now)?), None));
        }
        if new.signature.device != new.id {
            return Err(refused(
                "the signing device is not a trusted device of the member",
            ));
        }
        let before = devices.iter().find(|row| row.address.device == new.id);
        let mut permits = None;
        if has_trusted {
            let id = new.request.ok_or_else(|| {
                refused("the member has trusted devices, so one of them must sign, or approve a request for access")
            })?;
            let request = within(call, self.store.access_request(id)).await?;
            let request = request
                .filter(|row| row.device.address == address_of_new(principal, user, new))
                .ok_or_else(|| unknown("access_request_id"))?;
            self.verify_access(&caller(principal, call), &request)
                .await?;
            check_approved(&request, new, devices, now)?;
            permits = Some((id, request.mac));
        }
        let key = new.verification_key.as_bytes();
        signed.verify(key, before.map(|row| row.signed), now)?;
        Ok((None, permits))
    }

    fn check_device_limits(
        &self,
        devices: &[DeviceRow],
        before: Option<&DeviceRow>,
    ) -> Result<(), Error> {
        let most = self.device_rules.trusted_max;
        let others = devices
            .iter()
            .filter(|row| row.state == DeviceState::Trusted)
            .filter(|row| before.is_none_or(|before| before.address != row.address))
            .count();
        if others >= usize::try_from(most).unwrap_or(usize::MAX) {
            let what = format!(
                "the member has {most} trusted devices; end the trust of one of them first"
            );
            return Err(limit("device_id", &what));
        }
        let rows_max = usize::try_from(DEVICES_MAX).unwrap_or(usize::MAX);
        if before.is_none() && devices.len() >= rows_max {
            let what = format!(
                "{DEVICES_MAX} devices of the member are stored, including those whose trust was ended; use the id of one of them again, \
                 or ask the operator to run `keybroker store purge`"
            );
            return Err(limit("device_id", &what));
        }
        Ok(())
    }

    /// Reads the stored data of an active user key of a member.
    pub(super) async fn record_of(
        &self,
        principal: &Principal,
        call: &Call,
        user: &UserId,
        name: &KeyName,
    ) -> Result<RecordInfo, Error> {
        self.check_acknowledged()?;
        let address = KeyAddress {
            tenant: principal.tenant().clone(),
            user: user.clone(),
            name: name.clone(),
        };
        let record = within(call, self.store.record(&address)).await?;
        record
            .map(|record| record.info)
            .filter(|info| info.state == RecordState::Active)
            .ok_or_else(|| Error::new(Reason::KeyNotFound, "the member has no such user key"))
    }

    /// Returns the encrypted keys of a trusted device of the principal.
    pub async fn device_keys(
        &self,
        principal: &Principal,
        call: &Call,
        id: DeviceId,
    ) -> Result<DeviceRow, Error> {
        let action = Action::FetchDevice;
        Box::pin(observed(action, call, async {
            let fetch = async {
                let begun = self.begin_device_action(principal, call, action, None);
                let (user, mut draft) = begun.await?;
                draft.device(id);
                let found = self.trusted_device(principal, call, &user, id).await;
                let row = self.conclude(draft, found).await?.into_inner();
                self.note_device_use(&row).await;
                Ok(row)
            };
            let entered = self.enter(principal, call, action).await?;
            entered.run(Box::pin(fetch)).await
        }))
        .await
    }

    /// Reads a device of a member, and verifies its row.
    pub(super) async fn device_of(
        &self,
        principal: &Principal,
        call: &Call,
        user: &UserId,
        id: DeviceId,
    ) -> Result<DeviceRow, Error> {
        self.check_acknowledged()?;
        let address = DeviceAddress {
            tenant: principal.tenant().clone(),
            user: user.clone(),
            device: id,
        };
        let row = within(call, self.store.device(&address)).await?;
        let row = row.ok_or_else(|| unknown("device_id"))?;
        self.verify_device(&caller(principal, call), &row).await?;
        Ok(row)
    }

    pub(super) async fn trusted_device(
        &self,
        principal: &Principal,
        call: &Call,
        user: &UserId,
        id: DeviceId,
    ) -> Result<DeviceRow, Error> {
        let row = self.device_of(principal, call, user, id).await?;
        match row.state {
            DeviceState::Trusted => Ok(row),
            state => {
                let what =
                    format!("the device is {state}; it needs the approval of a request for access");
                Err(super::wrong_state("device_id", &what))
            }
        }
    }

    /// Stores the time of use. The answer does not depend on it.
    async fn note_device_use(&self, row: &DeviceRow) {
        let now = Timestamp::now();
        let last = row.used.map_or(0, Timestamp::micros);
        if now.micros().saturating_sub(last) < NOTED_AFTER_US {
            return;
        }
        if let Err(error) = self.store.note_device_use(&row.address, now).await {
            tracing::warn!(%error, "cannot store the time of use of a device");
        }
    }

    /// Gives a device of the principal another name.
    pub async fn rename_device(
        self: &Arc<Self>,
        principal: &Principal,
        call: &Call,
        id: DeviceId,
        name: String,
    ) -> Result<DeviceView, Error> {
        let edit = move |row: DeviceRow, _| Ok(DeviceRow { name, ..row });
        self.edit_device(principal, call, Action::RenameDevice, id, edit)
            .await
    }

    /// Records that a device of the principal was lost, without ending its trust. An administrator with the role `approver`, or
    /// another trusted device, can end the trust.
    pub async fn report_device_lost(
        self: &Arc<Self>,
        principal: &Principal,
        call: &Call,
        id: DeviceId,
    ) -> Result<DeviceView, Error> {
        let edit = |row: DeviceRow, now| match row.lost {
            None => Ok(DeviceRow {
                lost: Some(now),
                ..row
            }),
            Some(_) => Err(super::wrong_state(
                "device_id",
                "the device was reported as lost before",
            )),
        };
        self.edit_device(principal, call, Action::ReportDevice, id, edit)
            .await
    }

    async fn edit_device(
        self: &Arc<Self>,
        principal: &Principal,
        call: &Call,
        action: Action,
        id: DeviceId,
        edit: impl FnOnce(DeviceRow, Timestamp) -> Result<DeviceRow, Error> + Send + 'static,
    ) -> Result<DeviceView, Error> {
        let (broker, principal, call) = (Arc::clone(self), principal.clone(), call.clone());
        self.run_change(action, call.clone(), async move {
            let begun = broker.begin_device_action(&principal, &call, action, None);
            let (user, mut draft) = begun.await?;
            draft.device(id);
            let now = Timestamp::now();
            let planned = async {
                let before = broker.device_of(&principal, &call, &user, id).await?;
                let row = edit(before.clone(), now)?;
                let token = caller(&principal, &call);
                broker.changed_device(&token, row, Some(&before), now).await
            };
            let changed = broker.or_record(&draft, planned.await).await?;
            let row = changed.row.clone();
            let change = DeviceChange {
                devices: vec![changed],
                ..DeviceChange::default()
            };
            broker.commit_devices(&call, &draft, &change, now).await?;
            Ok(DeviceView::verified(row))
        })
        .await
    }
}

fn address_of_new(principal: &Principal, user: &UserId, new: &NewDevice) -> DeviceAddress {
    DeviceAddress {
        tenant: principal.tenant().clone(),
        user: user.clone(),
        device: new.id,
    }
}

/// Checks that the request for access of the new device was approved for this revision of the user key, that the device that approved it
/// is still trusted, and that no trust of the member was ended afterwards. Otherwise a lost device could approve another one in advance.
fn check_approved(
    row: &AccessRow,
    new: &NewDevice,
    devices: &[DeviceRow],
    now: Timestamp,
) -> Result<(), Error> {
    let is_approved = matches!(
        row.state_at(now),
        AccessState::Approved | AccessState::Consumed
    );
    let is_valid = is_approved
        && is_current(row, devices)
        && row.answer_revision == Some(new.revision)
        && now < row.expires
        && row.key_name == new.key_name
        && row.device.verification_key == new.verification_key.as_bytes();
    if is_valid {
        return Ok(());
    }
    Err(refused(
        "the request for access does not permit this trust: it is not approved, has expired, is for another verification key or user key, \
         or the user key was replaced or the trust of a device was ended after the approval",
    ))
}

/// Whether the device that approved a request is still trusted, and no trust of the member was ended after the approval.
pub(super) fn is_current(row: &AccessRow, devices: &[DeviceRow]) -> bool {
    row.decision.as_ref().is_some_and(|decision| {
        let ended = devices
            .iter()
            .filter(|row| row.state != DeviceState::Trusted);
        decision
            .device
            .is_none_or(|id| trusted(devices, id).is_some())
            && ended
                .map(|row| row.changed)
                .all(|ended| ended < decision.at)
    })
}

/// The complete set of trusted devices that a change requires until its transaction ends.
pub(super) fn trusted_set(
    principal: &Principal,
    user: &UserId,
    devices: &[DeviceRow],
) -> TrustedSet {
    let trusted = devices
        .iter()
        .filter(|row| row.state == DeviceState::Trusted)
        .map(|row| (row.address.device, row.mac));
    (principal.tenant().clone(), user.clone(), trusted.collect())
}

/// Adds the number of devices to an audit entry.
pub(super) fn count(draft: &mut Draft, devices: usize) {
    draft.objects(u64::try_from(devices).unwrap_or(u64::MAX));
}
