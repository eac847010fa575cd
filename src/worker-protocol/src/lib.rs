//! The code that the front and its workers share: the messages on their socket pair, the settings
//! of a token, the PIN, RSA-OAEP with the public key, and the public keys of recipients. This crate
//! contains no code for PKCS#11 and no code that starts workers.

mod assurance;
pub mod frame;
pub mod integrity_file;
pub mod oaep;
mod paths;
mod pin;
pub mod private_key;
pub mod recipient;
pub mod report;
mod settings;
pub mod wire;
mod work;

pub use assurance::Assurance;
pub use paths::{PathError, check_environment, check_module, softhsm_problem};
pub use pin::{Pin, PinError, PinSource, resolve as resolve_pin_file};
pub use settings::{
    AccessControl, ExpectedKey, IntegrityKey, Proof, Settings, TokenInfo, unpadded,
};
pub use work::Work;
