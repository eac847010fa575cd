//! What the front and its token workers share: the messages of the socket pair between them, the settings of a token, the
//! PIN, and RSA-OAEP with the public key. Nothing here knows PKCS#11, and nothing here knows how workers are started.

pub mod frame;
pub mod integrity_file;
pub mod oaep;
mod paths;
mod pin;
pub mod report;
mod settings;
pub mod wire;
mod work;

pub use paths::{PathError, check_environment, check_module, softhsm_problem};
pub use pin::{Pin, PinError, PinSource, resolve as resolve_pin_file};
pub use settings::{AccessControl, ExpectedKey, IntegrityKey, Settings, TokenInfo, unpadded};
pub use work::Work;
