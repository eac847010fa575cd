//! Replaces the user key of a member together with the encrypted keys of all trusted devices, in one transaction.

use std::{collections::BTreeSet, sync::Arc};

use keybroker_core::{
    call::{Call, Timestamp},
    device::{DeviceSignature, DeviceState, StatementKind},
    error::{Error, Reason},
    key::{DeviceId, Revision, UserId},
    principal::{Action, Principal},
    secret::KeyMaterial,
};
use keybroker_policy::KeyPermit;
use keybroker_store::{DeviceChange, DeviceRow, RecordInfo, Replacement, SealedKeys, Stamp};

use crate::{
    Broker, UserKeyRef, caller,
    change::{Change, Mutation},
    journal::Draft,
    plan::Commit,
};

use super::{
    establish::{count, trusted_set},
    signed::Signed,
    untrust::without_trust,
    wrong_state,
};

/// The new encrypted keys of one device. The private key does not change.
#[derive(Clone, Debug)]
pub struct RotatedDevice {
    /// The device.
    pub id: DeviceId,
    /// The new user key, encrypted to the public key of the device.
    pub user_key: Vec<u8>,
    /// The public key of the device, encrypted with the new user key.
    pub public_key: Vec<u8>,
}

/// A new user key with the encrypted keys of all devices.
#[derive(Debug)]
pub struct Rotation {
    /// The user key of the principal.
    pub key: UserKeyRef,
    /// The current revision of the user key.
    pub expected: Revision,
    /// The new user key.
    pub material: KeyMaterial,
    /// The devices that stay trusted.
    pub devices: Vec<RotatedDevice>,
    /// The trusted devices whose public key did not open: their trust is ended.
    pub untrusted: Vec<DeviceId>,
    /// The signature of a trusted device.
    pub signature: DeviceSignature,
}

impl Broker {
    /// Replaces the user key and the encrypted keys of all trusted devices. Nothing is changed unless all of it is changed.
    pub async fn rotate_devices(
        self: &Arc<Self>,
        principal: &Principal,
        call: &Call,
        rotation: Rotation,
    ) -> Result<RecordInfo, Error> {
        let (broker, principal, call) = (Arc::clone(self), principal.clone(), call.clone());
        self.run_change(Action::RotateDevices, call.clone(), async move {
            Box::pin(broker.run_device_rotation(&principal, &call, rotation)).await
        })
        .await
    }

    async fn run_device_rotation(
        &self,
        principal: &Principal,
        call: &Call,
        rotation: Rotation,
    ) -> Result<RecordInfo, Error> {
        let user = Some(&rotation.key.user);
        let begun = self.begin_device_action(principal, call, Action::RotateDevices, user);
        let (user, mut draft) = begun.await?;
        draft.key_name(&rotation.key.name);
        let address = rotation.key.address(principal);
        let permit = match self.policy.decide_rotation(principal, call, address) {
            Ok(permit) => permit,
            Err(denied) => return Err(self.refuse(draft, &denied).await),
        };
        let now = Timestamp::now();
        let plan = self.plan_rotation(principal, call, &user, &permit, rotation, &mut draft, now);
        let plan = Box::pin(plan).await;
        let change = self.or_record(&draft, plan).await?;
        let done = self.commit_devices(call, &draft, &change, now).await?;
        done.ok_or_else(|| Error::new(Reason::Bug, "a rotation without a record"))
    }

    #[expect(
        clippy::too_many_arguments,
        reason = "the parts of one call, used in one place"
    )]
    async fn plan_rotation(
        &self,
        principal: &Principal,
        call: &Call,
        user: &UserId,
        permit: &KeyPermit,
        rotation: Rotation,
        draft: &mut Draft,
        now: Timestamp,
    ) -> Result<DeviceChange, Error> {
        let devices = self.verified_devices(principal, call, user).await?;
        let signer = signed(principal, user, &rotation).by(&devices, now)?;
        let mut change = DeviceChange {
            trusted: Some(trusted_set(principal, user, &devices)),
            ..DeviceChange::default()
        };
        let token = caller(principal, call);
        let next = rotation.expected.next();
        for (before, row) in rotated(&devices, &rotation, &signer, next, now)? {
            change
                .devices
                .push(self.changed_device(&token, row, Some(before), now).await?);
        }
        count(draft, change.devices.len());
        let mutation = Mutation {
            principal: principal.clone(),
            call: call.clone(),
            key: rotation.key,
            change: Change::Replace {
                material: rotation.material,
                expected: rotation.expected,
            },
            request: None,
        };
        let commit = self.plan(permit, &mutation, draft).await?;
        commit.describe(draft);
        let Commit::Supersede(new, _) = commit else {
            return Err(Error::new(Reason::Bug, "a rotation is not a replacement"));
        };
        let stamp = Stamp {
            call: call.id,
            at: now,
            request: None,
        };
        change.replaces = Some(Replacement { new, stamp });
        Ok(change)
    }
}

/// The rows after the rotation, each with the row before. Every trusted device must be named exactly once.
fn rotated<'d>(
    devices: &'d [DeviceRow],
    rotation: &Rotation,
    signer: &DeviceRow,
    next: Revision,
    now: Timestamp,
) -> Result<Vec<(&'d DeviceRow, DeviceRow)>, Error> {
    let named: Vec<DeviceId> = rotation
        .devices
        .iter()
        .map(|one| one.id)
        .chain(rotation.untrusted.iter().copied())
        .collect();
    let trusted = devices
        .iter()
        .filter(|row| row.state == DeviceState::Trusted);
    let known: BTreeSet<DeviceId> = trusted.clone().map(|row| row.address.device).collect();
    let is_complete = named.len() == known.len() && named.iter().all(|id| known.contains(id));
    if !is_complete || named.iter().collect::<BTreeSet<_>>().len() != named.len() {
        return Err(wrong_state(
            "devices",
            "`devices` and `untrusted_device_ids` together must name every trusted device exactly once; list the devices and rotate again",
        ));
    }
    let row_of = |before: &'d DeviceRow| {
        let id = before.address.device;
        let base = if id == signer.address.device {
            signer
        } else {
            before
        };
        let row = match rotation.devices.iter().find(|one| one.id == id) {
            Some(new) if before.key_name == rotation.key.name => DeviceRow {
                revision: next,
                keys: SealedKeys {
                    user_key: new.user_key.clone(),
                    public_key: new.public_key.clone(),
                    private_key: before.keys.private_key.clone(),
                },
                ..base.clone()
            },
            Some(_) => {
                return Err(wrong_state(
                    "devices",
                    "a device opens a user key with another name",
                ));
            }
            None => without_trust(base, false, now),
        };
        Ok((before, row))
    };
    trusted.map(row_of).collect()
}

/// The signed fields of a rotation. They own the numbers.
struct SignedRotation<'a> {
    principal: &'a Principal,
    user: &'a UserId,
    rotation: &'a Rotation,
    expected: [u8; 8],
    count: [u8; 4],
}

fn signed<'a>(
    principal: &'a Principal,
    user: &'a UserId,
    rotation: &'a Rotation,
) -> SignedRotation<'a> {
    let count = u32::try_from(rotation.devices.len()).unwrap_or(u32::MAX);
    SignedRotation {
        principal,
        user,
        rotation,
        expected: rotation.expected.get().to_be_bytes(),
        count: count.to_be_bytes(),
    }
}

impl SignedRotation<'_> {
    fn by(&self, devices: &[DeviceRow], now: Timestamp) -> Result<DeviceRow, Error> {
        let rotation = self.rotation;
        let mut fields: Vec<&[u8]> = vec![
            rotation.key.name.as_str().as_bytes(),
            &self.expected,
            rotation.material.expose(),
            &self.count,
        ];
        for device in &rotation.devices {
            fields.push(device.id.as_bytes());
            fields.push(&device.user_key);
            fields.push(&device.public_key);
        }
        fields.extend(rotation.untrusted.iter().map(|id| id.as_bytes().as_slice()));
        let signed = Signed {
            kind: StatementKind::Rotate,
            tenant: self.principal.tenant(),
            user: self.user,
            signature: &rotation.signature,
            fields: &fields,
        };
        signed.by_trusted(devices, now)
    }
}
