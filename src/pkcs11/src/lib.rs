//! All code that uses PKCS#11. No other crate uses the mechanisms, attributes, handles or return
//! codes of PKCS#11.
//!
//! The module [`worker`] is the token worker. `serve` starts this process, which loads the vendor's
//! module and serves a fixed set of jobs. The module [`admin_worker`] is the process that a command
//! starts to administer tokens and keys (`admin`). Both processes open a token in the same way
//! (`open`). Both processes load the module, select the token, and log in once if the record of
//! PINs allows the login. Then both processes find the keys, check the attributes and run the
//! self-test.

mod admin;
pub mod admin_worker;
pub mod attribute_check;
mod busy;
mod calling;
mod classify;
#[doc(hidden)]
pub mod fuzzing;
mod keys;
mod login_policy;
mod mac_key;
mod module;
mod negative;
mod oaep;
mod open;
mod operation;
mod organization;
mod pin_record;
mod recipients;
mod report;
mod sealed;
mod select;
mod session;
#[cfg(test)]
mod tests;
mod unwrap;
pub mod worker;

pub use negative::{NegativeTest, TESTS as NEGATIVE_TESTS};
pub use pin_record::{PinRecord, RecordError};
