//! Keybroker keeps an RSA private key non-extractable inside an HSM and gives every user their own key back when, and
//! only when, the right caller asks.
//!
//! There is one road to a key, [`broker`]: authenticate, policy, record from SQL, one job on the token (MAC, then RSA),
//! a durable audit entry, answer. Every door ends there.
//!
//! | Layer | Modules |
//! |---|---|
//! | doors | [`rpc`], [`rest`] |
//! | use cases | [`broker`] |
//! | decisions | [`policy`] |
//! | outside world | [`hsm`], [`store`], [`auth`], [`audit`] |
//! | vocabulary | [`key`], [`principal`], [`secret`], [`envelope`], [`call`], [`error`], [`bitwarden`] |
//! | files | [`trusted_file`], [`pem`], [`state`] |
//! | wiring | [`cli`], [`config`], [`server`], [`telemetry`] |

pub mod audit;
pub mod auth;
pub mod bitwarden;
pub mod broker;
pub mod call;
pub mod cli;
pub mod client_credential;
pub mod config;
pub mod envelope;
pub mod error;
pub mod hardening;
pub mod hsm;
pub mod key;
pub mod limits;
pub mod pem;
pub mod policy;
pub mod principal;
pub mod proto;
pub mod rest;
pub mod rpc;
pub mod secret;
pub mod server;
pub mod state;
pub mod store;
pub mod telemetry;
pub mod trusted_file;
