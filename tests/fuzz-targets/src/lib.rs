//! What is fuzzed: every reader of bytes that Keybroker did not write.
//!
//! A target takes any bytes and panics if a promise of the reader is broken. It returns whether the reader accepted them. The same
//! targets run in two ways: `tests/random_inputs.rs` generates inputs with a stable compiler, as a part of `scripts/test.sh`; the
//! programs of `tests/fuzz` are for cargo-fuzz, which is guided by coverage. `scripts/fuzz.sh` runs them longer.

#![allow(
    clippy::unwrap_used,
    reason = "a target that meets a surprise stops there"
)]

mod targets;

pub use targets::{
    access_token::access_token, audit_log::audit_log, authorization::authorization, claims::claims,
    configuration::configuration, envelope::envelope, key_set::key_set, mac_context::mac_context,
    page_token::page_token, pem::pem, pkcs11_uri::pkcs11_uri, recipient_key::recipient_key,
    rest_body::rest_body, worker_frames::worker_frames,
};

/// One target.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Its name, that of the function.
    pub name: &'static str,
    /// Runs it with one input.
    pub run: fn(&[u8]) -> bool,
    /// Inputs that it accepts, from which others are made.
    pub seeds: fn() -> Vec<Vec<u8>>,
    /// Parts that its inputs consist of.
    pub words: &'static [&'static str],
}

/// Passes the names of all targets to a macro: for the list of targets, and for one test of each.
#[macro_export]
macro_rules! for_each_target {
    ($macro:ident) => {
        $macro!(
            access_token,
            audit_log,
            authorization,
            claims,
            configuration,
            envelope,
            key_set,
            mac_context,
            page_token,
            pem,
            pkcs11_uri,
            recipient_key,
            rest_body,
            worker_frames,
        );
    };
}

macro_rules! targets {
    ($($name:ident),* $(,)?) => {
        /// All targets.
        pub const TARGETS: &[Target] = &[$(Target {
            name: stringify!($name),
            run: $name,
            seeds: targets::$name::seeds,
            words: targets::$name::WORDS,
        }),*];
    };
}

for_each_target!(targets);
