//! Everything that knows PKCS#11. Nothing outside this crate names a mechanism, an attribute, a handle or a return code.
//!
//! [`worker`] is the token worker: the process that `serve` starts, which holds the vendor's module and serves a closed set
//! of jobs. [`admin_worker`] is the process that a one-shot command starts, to administer tokens and keys (`admin`). Both open
//! a token in the same way (`open`): module, selection of the token, one login if the record of PINs allows it, keys found,
//! attributes checked, self-test.

mod admin;
pub mod admin_worker;
pub mod attribute_check;
mod calling;
mod classify;
#[doc(hidden)]
pub mod fuzzing;
mod keys;
mod login_policy;
mod mac_key;
mod module;
mod negative;
mod open;
mod operation;
mod pin_record;
mod report;
mod select;
mod session;
#[cfg(test)]
mod tests;
mod unwrap;
pub mod worker;

pub use negative::{NegativeTest, TESTS as NEGATIVE_TESTS};
pub use pin_record::{PinRecord, RecordError};
