//! Keybroker keeps an RSA private key non-extractable inside an HSM and gives every user their own key back when, and
//! only when, the right caller asks.
//!
//! This crate is the program: configuration ([`config`]), listeners ([`server`]), commands ([`cli`]) and the log ([`telemetry`]). Key
//! release itself is in the `broker` crate: authenticate, decide by policy, read the record, run one job on the token (MAC, then
//! RSA), write a durable audit entry, answer.

mod certificate;
pub mod cli;
pub mod config;
mod output_file;
pub mod server;
pub mod telemetry;
