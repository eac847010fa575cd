//! Tests that need no token. The tests of the crate `pkcs11` make these calls on a token, with a module that simulates
//! faults.

use std::path::Path;

use cryptoki::error::{Error, RvError};
use cryptoki_sys::{CK_TOKEN_INFO, CKF_CLOCK_ON_TOKEN};
use keybroker_test_support::softhsm;

use super::{Module, TokenInfo};

#[test]
fn a_clock_may_be_anything() {
    for time in [
        *b"21:38:18\0\0\0\0\0\0\0\0",
        [b' '; 16],
        [0; 16],
        [0xff; 16],
        *b"2026112912000000",
    ] {
        let mut raw = CK_TOKEN_INFO {
            flags: CKF_CLOCK_ON_TOKEN,
            utcTime: time,
            ..CK_TOKEN_INFO::default()
        };
        raw.label[..6].copy_from_slice(b"demo  ");
        let info = TokenInfo::from(raw);
        assert!(info.clock_on_token());
        assert!(info.label().starts_with("demo"), "{info:?}");
    }
}

/// SoftHSM expects NULL in `pReserved`, as the standard requires, so the error shows that the module received the
/// string.
#[test]
fn the_string_of_c_initialize_reaches_the_module() {
    let mut module = Module::load(&softhsm::module()).unwrap();
    let refused = module.initialize(Some(c"configdir='/nowhere'".to_owned()));
    assert!(
        matches!(refused, Err(Error::Pkcs11(RvError::ArgumentsBad, _))),
        "{refused:?}"
    );
    // Without a string, the module accepts the arguments and reads its configuration.
    let plain = module.initialize(None);
    assert!(
        !matches!(plain, Err(Error::Pkcs11(RvError::ArgumentsBad, _))),
        "{plain:?}"
    );
}

#[test]
fn what_is_no_module_is_refused() {
    for path in ["/nonexistent.so", "/usr/lib/x86_64-linux-gnu/libz.so.1"] {
        let refused = Module::load(Path::new(path));
        assert!(
            matches!(
                refused,
                Err(Error::LibraryLoading(_) | Error::MissingSymbol(_))
            ),
            "{path}: {refused:?}"
        );
    }
}
