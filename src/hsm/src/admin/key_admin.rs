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
    is_one_of_several: bool,
}

impl KeyAdmin {
    /// `program` is the running binary, which contains the admin worker. `state` is the state directory of this
    /// instance. `is_one_of_several` is true if the configuration has several tokens.
    pub fn new(
        program: PathBuf,
        settings: Settings,
        state: StateDirectory,
        is_one_of_several: bool,
    ) -> Self {
        Self {
            program,
            settings,
            state,
            is_one_of_several,
        }
    }

    /// Starts an admin worker, which logs in with the PIN in the configured file. If several tokens match the settings,
    /// the token whose serial number is in `serials` is used. The admin worker ends when the returned value is dropped.
    ///
    /// This function and the methods of the returned value block the thread.
    pub fn open(&self, serials: &[&str]) -> Result<Admin, AdminError> {
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
            true,
            serials,
        )
    }

    /// Returns the reason why a running broker cannot make a key on this token, or `None` if the broker can make keys.
    pub fn cannot_make_keys(&self) -> Option<&'static str> {
        if self.is_one_of_several {
            return Some(
                "the configuration has several tokens, and a key on only one token would prevent a failover: make the \
                 key with \
                 `keybroker --token NAME key generate`, copy it to the other tokens, and register the key for each of \
                 them with `keybroker key register`",
            );
        }
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
