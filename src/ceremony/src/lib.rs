//! The plan, the transcript, the signatures and the shares of a key ceremony. This crate uses no token: the command
//! `keybroker ceremony` does the work on the token, and anyone can check a transcript without one.
//!
//! | Module | Purpose |
//! |---|---|
//! | [`plan`] | reads the plan: tokens, keys, custodians, quorum |
//! | [`script`] | the steps of a plan, in order, for auditors and for the run |
//! | [`transcript`] | what was done, as canonical JSON |
//! | [`page`] | the transcript as a page to print |
//! | [`canonical`] | canonical JSON (RFC 8785) |
//! | [`ssh`] | SSH keys, signatures of `ssh-keygen -Y sign`, and lists of allowed signers |
//! | [`signatures`] | the file with the signatures of a transcript |
//! | [`verify`] | decides whether a transcript and its signatures fit together |
//! | [`share`] | shares of the security officer's PIN |
//!
//! A valid transcript proves that the custodians signed these bytes, and that a key made in the ceremony signed them
//! too. It does not prove that the program that ran the ceremony was the published one.

pub mod canonical;
pub mod complete;
pub mod page;
pub mod plan;
pub mod script;
pub mod share;
pub mod signatures;
pub mod ssh;
pub mod transcript;
pub mod verify;

use aws_lc_rs::digest;

/// The lower-case hexadecimal SHA-256 digest of some bytes.
pub fn sha256_hex(bytes: &[u8]) -> String {
    hex::encode(digest::digest(&digest::SHA256, bytes))
}
