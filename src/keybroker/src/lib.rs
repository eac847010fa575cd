//! Keybroker stores user keys that are wrapped under a non-extractable RSA key in an HSM, and
//! releases a user key only to an authorised caller.
//!
//! This crate is the program: configuration ([`config`]), listeners ([`server`]), commands ([`cli`]), logs and metrics
//! ([`telemetry`]). The `broker` crate releases keys. A release has these steps: authenticate the caller, evaluate the policies,
//! read the record, verify the row MAC, decrypt the user key on the token, write a durable audit entry, and send the answer.

mod certificate;
pub mod cli;
pub mod config;
mod https;
mod output_file;
mod places;
pub mod server;
pub mod telemetry;
