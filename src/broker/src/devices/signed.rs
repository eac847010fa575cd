//! The signatures of devices: who may sign a change, and the check that each signature counts once.
//!
//! Mitigation: M27 of `THREAT_MODEL.md`.

use keybroker_core::{
    call::Timestamp,
    device::{DeviceSignature, DeviceState, Statement, StatementKind, VerificationKey},
    error::{Error, Reason},
    key::{DeviceId, Tenant, UserId},
};
use keybroker_store::DeviceRow;

/// The change that a device signed.
pub(super) struct Signed<'a> {
    pub(super) kind: StatementKind,
    pub(super) tenant: &'a Tenant,
    pub(super) user: &'a UserId,
    pub(super) signature: &'a DeviceSignature,
    pub(super) fields: &'a [&'a [u8]],
}

impl Signed<'_> {
    /// Verifies the signature with a key. `last` is the time of the last accepted signature of this key.
    pub(super) fn verify(
        &self,
        key: &[u8],
        last: Option<Timestamp>,
        now: Timestamp,
    ) -> Result<(), Error> {
        let signature = self.signature;
        let key = VerificationKey::from_slice(key).ok_or_else(|| {
            Error::new(
                Reason::RecordDamaged,
                "a stored verification key is not valid",
            )
        })?;
        let statement = Statement::new(
            self.kind,
            self.tenant,
            self.user,
            signature.device,
            signature.at,
            self.fields,
        );
        let verified = statement.verify(&key, signature, last, now);
        verified.map_err(|error| refused(&error.to_string()))
    }

    /// Verifies the signature of a trusted device, and returns this device with the time of the signature.
    pub(super) fn by_trusted(
        &self,
        devices: &[DeviceRow],
        now: Timestamp,
    ) -> Result<DeviceRow, Error> {
        let signer = trusted(devices, self.signature.device)
            .ok_or_else(|| refused("the signing device is not a trusted device of the member"))?;
        self.verify(&signer.verification_key, Some(signer.signed), now)?;
        Ok(DeviceRow {
            signed: self.signature.at,
            ..signer.clone()
        })
    }
}

/// The trusted device with this id.
pub(super) fn trusted(devices: &[DeviceRow], id: DeviceId) -> Option<&DeviceRow> {
    devices
        .iter()
        .find(|row| row.address.device == id && row.state == DeviceState::Trusted)
}

pub(super) fn refused(what: &str) -> Error {
    Error::new(Reason::DeviceSignature, what).explained("signature", what)
}
