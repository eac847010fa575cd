//! The key of a Bitwarden organisation, for commands.

use std::time::Duration;

use zeroize::Zeroizing;

use keybroker_core::key::{Fingerprint, WrappingKeyId};
use keybroker_worker_protocol::{
    oaep,
    wire::{
        CheckOrganizationKey, ImportOrganizationKey, ReleaseToDevice, admin_reply::Outcome,
        admin_request::Job,
    },
};

use super::{Admin, AdminError, Finding, SLOW_CALL_TIMEOUT_MIN, found, unexpected};

/// The imported key of a Bitwarden organisation.
#[derive(Clone, Debug)]
pub struct OrganizationKey {
    /// DER SubjectPublicKeyInfo.
    pub spki: Vec<u8>,
    /// Fingerprint of the public key.
    pub fingerprint: Fingerprint,
    /// The results of the attribute check.
    pub attributes: Vec<Finding>,
}

/// The answer to a request to release a member's user key to a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeviceRelease {
    /// The user key, wrapped under the public key of the device.
    Released(Vec<u8>),
    /// Why no user key was released: the wrapped key or the public key of the device is not accepted. Another request may succeed.
    Refused(String),
}

impl Admin {
    /// Imports the PKCS#8 key of an organisation, makes an integrity key with the same id on the token, checks the attributes
    /// and tests the key. If a check fails, the worker removes both keys. This side overwrites its copies of the key.
    pub fn import_organization_key(
        &self,
        id: WrappingKeyId,
        pkcs8: &Zeroizing<Vec<u8>>,
    ) -> Result<OrganizationKey, AdminError> {
        let job = Job::ImportOrganizationKey(ImportOrganizationKey {
            key_id: id.as_bytes().to_vec(),
            pkcs8: pkcs8.to_vec(),
        });
        self.organization_key(job)
    }

    /// Checks the attributes of an organisation's key, and tests what it does and what the token refuses.
    pub fn check_organization_key(&self, id: WrappingKeyId) -> Result<OrganizationKey, AdminError> {
        let job = Job::CheckOrganizationKey(CheckOrganizationKey {
            key_id: id.as_bytes().to_vec(),
        });
        self.organization_key(job)
    }

    fn organization_key(&self, job: Job) -> Result<OrganizationKey, AdminError> {
        match self.worker().ask(job, SLOW_CALL_TIMEOUT_MIN)? {
            Outcome::OrganizationKey(key) => Ok(OrganizationKey {
                fingerprint: oaep::fingerprint(&key.spki),
                spki: key.spki,
                attributes: found(key.attributes),
            }),
            _ => Err(unexpected()),
        }
    }

    /// Lets the token unwrap a member's user key with the organisation's key, and wrap it under the public key of a device.
    /// Fails with [`AdminError::Untrusted`] if the token or the key on it must not be used, for example because the key is not that of
    /// the fingerprint.
    pub fn release_to_device(
        &self,
        id: WrappingKeyId,
        fingerprint: Fingerprint,
        wrapped: &[u8],
        recipient: &[u8],
    ) -> Result<DeviceRelease, AdminError> {
        let job = Job::ReleaseToDevice(ReleaseToDevice {
            key_id: id.as_bytes().to_vec(),
            fingerprint: fingerprint.0.to_vec(),
            wrapped: wrapped.to_vec(),
            recipient: recipient.to_vec(),
        });
        match self.worker().ask(job, Duration::ZERO)? {
            Outcome::ForDevice(released) => Ok(DeviceRelease::Released(released)),
            Outcome::ReleaseRefused(why) => Ok(DeviceRelease::Refused(why)),
            _ => Err(unexpected()),
        }
    }
}
