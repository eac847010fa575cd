//! One module for each target: the function, inputs that it accepts, and parts of its inputs.

pub(crate) mod access_token;
pub(crate) mod audit_log;
pub(crate) mod authorization;
pub(crate) mod claims;
pub(crate) mod configuration;
pub(crate) mod envelope;
mod issuer;
pub(crate) mod key_set;
pub(crate) mod mac_context;
pub(crate) mod page_token;
pub(crate) mod pem;
pub(crate) mod pkcs11_uri;
pub(crate) mod recipient_key;
pub(crate) mod rest_body;
pub(crate) mod worker_frames;
