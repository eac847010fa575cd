//! Trusted devices and requests for access at the real broker, with access tokens of an identity service.

mod alerts;
mod answers;
mod approvers;
mod bulk;
mod for_members;
mod guesses;
mod keys;
mod lists;
mod matrix;
pub(crate) mod member;
mod notices;
mod places;
mod receiver;
mod refused;
mod requests;
mod rotation;
mod story;
mod tampered;
