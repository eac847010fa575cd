//! Tokens of other makers, tokens that lie, and tokens that are gone.

use super::desk::{Desk, Device};
use crate::{
    faulty::{Fault, code},
    faulty_token::put_before,
    modules::Maker,
};

/// Kryoptic wraps with OAEP and SHA-1, although it prefers SHA-256 for the keys of the broker.
#[test]
fn kryoptic_approves_a_device() {
    let desk = Desk::on_token_of(Maker::Kryoptic);
    let (ada, user_key) = desk.member("ada@example.org");
    let device = Device::new();
    let request = desk.request(&ada, &device);
    desk.ok(&["list"]);
    assert_eq!(desk.ok(&["list"])[0]["key_state"], "known");
    desk.ok(&["approve", &request, "--yes"]);
    assert_eq!(device.open(&desk.server.decisions()[0]), user_key);
}

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
