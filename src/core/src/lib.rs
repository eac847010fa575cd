//! The types that all crates of Keybroker share: keys, principals, secrets, envelopes, calls and errors. This crate depends on
//! no other crate of the project.

pub mod alert;
pub mod approval;
pub mod call;
pub mod client_credential;
pub mod counts;
pub mod device;
pub mod envelope;
pub mod error;
pub mod fingerprint_phrase;
pub mod hardening;
pub mod key;
pub mod loopback;
pub mod metrics;
pub mod organization;
pub mod pem;
pub mod principal;
pub mod remedy;
pub mod secret;
pub mod sign_in;
pub mod state;
pub mod trusted_file;
