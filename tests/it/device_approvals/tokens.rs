//! Tokens that lie, and tokens that are gone.

use std::sync::Arc;

use super::desk::{Desk, Device};
use crate::{
    faulty::{Fault, code},
    faulty_token::put_before,
    modules::{Maker, Stand},
};

/// Nothing is decided if the token is gone in the middle, and nothing is lost: the same command succeeds later.
#[test]
fn a_token_that_is_gone_in_the_middle_decides_nothing() {
    let desk = Desk::new();
    let faulty = put_before(&desk.site);
    desk.append("");
    let (ada, user_key) = desk.member("ada@example.org");
    let device = Device::new();
    let request = desk.request(&ada, &device);
    for function in ["C_UnwrapKey", "C_WrapKey", "C_Login"] {
        faulty.set(function, &Fault::always(code::DEVICE_REMOVED));
        let finished = desk.run(&["approve", &request, "--yes"]);
        assert!(
            matches!(finished.code, Some(4 | 6)),
            "{function}: {finished:#?}"
        );
        assert_eq!(desk.server.decisions(), []);
        faulty.clear(function);
    }
    assert_eq!(desk.entries("bitwarden.approve_device").len(), 0);
    desk.ok(&["approve", &request, "--yes"]);
    assert_eq!(device.open(&desk.server.decisions()[0]), user_key);
}

/// A token that makes readable objects must not get a member's key.
#[test]
fn a_token_that_makes_readable_objects_is_refused() {
    let desk = Desk::new();
    let faulty = put_before(&desk.site);
    desk.append("");
    let (ada, _) = desk.member("ada@example.org");
    let request = desk.request(&ada, &Device::new());
    faulty.behave(
        "[[attribute]]\nparts = [\"secret\"]\nname = \"CKA_VALUE\"\non_read.value = \"hex:00112233\"\n",
    );
    let finished = desk.run(&["approve", &request, "--yes"]);
    assert_eq!(finished.code, Some(6), "{finished:#?}");
    assert!(
        finished.stderr.contains("CKA_VALUE can be read"),
        "{finished:#?}"
    );
    assert_eq!(desk.server.decisions(), []);
}

/// The import and the approval on a module of another maker, whose attributes and return codes differ.
#[test]
fn kryoptic_imports_the_key_and_approves() {
    let stand = Stand::new(Maker::Kryoptic);
    let desk = Desk::on(Arc::clone(&stand.site));
    let (ada, user_key) = desk.member("ada@example.org");
    let device = Device::new();
    let request = desk.request(&ada, &device);
    assert_eq!(desk.ok(&["list"])[0]["key_state"], "first-seen");
    desk.ok(&["approve", &request, "--yes"]);
    assert_eq!(device.open(&desk.server.decisions()[0]), user_key);
    // A key that was wrapped for another organisation is refused, and nothing is decided.
    let (bob, _) = desk.member("bob@example.org");
    let other = Device::new().0.wrap(&user_key);
    desk.server.set_key(&bob, Some(&other));
    let request = desk.request(&bob, &Device::new());
    let refused = desk.run(&["approve", &request, "--yes"]);
    assert_eq!(refused.code, Some(10), "{refused:#?}");
    assert_eq!(desk.server.decisions().len(), 1);
}
