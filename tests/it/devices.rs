//! Trusted devices and requests for access at the real broker, with access tokens of an identity service.

mod answers;
mod approvers;
mod for_members;
mod guesses;
mod keys;
mod lists;
mod matrix;
pub(crate) mod member;
mod refused;
mod requests;
mod rotation;
mod story;
mod tampered;
