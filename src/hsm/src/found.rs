//! The token and keys that workers find when they start.

use std::{collections::HashMap, sync::Arc};

use keybroker_core::key::WrappingKeyId;
use keybroker_worker_protocol::{TokenInfo, oaep::WrapKey};

use crate::{TokenKey, UnusableKey};

/// The token and keys that a worker found.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) info: TokenInfo,
    pub(super) keys: Arc<[TokenKey]>,
    /// The expected keys that the worker could not use.
    pub(super) unusable: Arc<[UnusableKey]>,
    /// The public keys of `keys`, ready to wrap.
    pub(super) wrap: HashMap<WrappingKeyId, Arc<WrapKey>>,
}

impl Default for Found {
    fn default() -> Self {
        Self {
            info: TokenInfo {
                label: String::new(),
                serial: String::new(),
                model: String::new(),
                is_hardware: false,
            },
            keys: Arc::new([]),
            unusable: Arc::new([]),
            wrap: HashMap::new(),
        }
    }
}

impl Found {
    /// Whether this value comes from a worker that found the token and its keys; `false` for the
    /// initial value.
    pub(super) fn known(&self) -> bool {
        !self.info.serial.is_empty() || !self.info.label.is_empty()
    }
}
