//! Access to the token for a running broker that makes or removes wrapping keys. The workers of the broker have
//! read-only sessions. Therefore a separate, short-lived admin worker makes each change of the token's objects.

use std::path::PathBuf;

use keybroker_core::state::StateDirectory;
use keybroker_worker_protocol::{AccessControl, IntegrityKey, PinSource, Settings};

use super::{Admin, AdminError};

/// Starts short-lived read-write admin workers.
#[derive(Clone, Debug)]
pub struct KeyAdmin {
    program: PathBuf,
    settings: Settings,
    state: StateDirectory,
}

impl KeyAdmin {
    /// `program` is the running binary, which contains the admin worker. `state` is the state directory of this
    /// instance.
    pub fn new(program: PathBuf, settings: Settings, state: StateDirectory) -> Self {
        Self {
            program,
            settings,
            state,
        }
    }

    /// The configured name of the token.
    pub fn name(&self) -> &str {
        &self.settings.name
    }

    /// Whether the token is a declared copy, which has the serial number of its original.
    pub fn is_copy(&self) -> bool {
        self.settings.copy_of.is_some()
    }

    /// Starts an admin worker, which logs in with the PIN in the configured file. If several tokens match the settings,
    /// the token whose serial number is in `serials` is used. The admin worker ends when the returned value is dropped.
    ///
    /// This function and the methods of the returned value block the thread.
    pub fn open(&self, serials: &[&str]) -> Result<Admin, AdminError> {
        self.log_in(serials, true)
    }

    /// Does the same as [`open`](Self::open), with a read-only session. No object of the token can be changed.
    pub fn open_read_only(&self, serials: &[&str]) -> Result<Admin, AdminError> {
        self.log_in(serials, false)
    }

    fn log_in(&self, serials: &[&str], write: bool) -> Result<Admin, AdminError> {
        let pin = match &self.settings.pin_file {
            Some(path) => PinSource::File(path.clone()),
            None if self.settings.is_without_login() => PinSource::NotNeeded,
            None => {
                return Err(AdminError::Pin(
                    "no PIN: set `token.pin_file` to a file that only this user can read"
                        .to_owned(),
                ));
            }
        };
        Admin::open(
            &self.program,
            &self.settings,
            &self.state,
            &pin,
            write,
            serials,
        )
    }

    /// Returns the reason why a running broker cannot make a key on this token, or `None` if the broker can make keys.
    pub fn cannot_make_keys(&self) -> Option<&'static str> {
        if self.settings.access_control == AccessControl::OutsidePkcs11 {
            return Some(
                "with `access_control = \"outside-pkcs11\"`, keys must be made with the vendor's tool and registered with \
                 `keybroker key register`",
            );
        }
        (self.settings.integrity_key == IntegrityKey::Worker).then_some(
            "with `integrity_key = \"worker\"`, the digest of a new key's file must be added to the configuration: stop the \
             broker and run `keybroker key generate`",
        )
    }
}
