//! What the tests of several packages need: SoftHSM tokens, a PKCS#11 module that fails on command, real database servers
//! and an identity service. Each is made for one test; none is shared with another, and none uses a fixed port.

#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "a test that meets a surprise stops there and says where"
)]

pub mod faulty;
pub mod identity;
pub mod pooler;
pub mod servers;
pub mod softhsm;
