//! The committed code in `src/generated` is what the generator makes of `proto/keybroker/v1`.
//!
//! After a change of a `.proto` file, write it again:
//! `KEYBROKER_WRITE_GENERATED=1 cargo test -p keybroker-proto --test generated`

#![allow(
    clippy::unwrap_used,
    reason = "a test that meets a surprise stops there"
)]

use std::{
    env, fs,
    path::{Path, PathBuf},
};

use prost::Message as _;

const FILES: [&str; 3] = [
    "keybroker/v1/user_key.proto",
    "keybroker/v1/control.proto",
    "keybroker/v1/device.proto",
];

/// Messages that carry key material or another secret. A derived `Debug` would print it, so `src/lib.rs` implements it.
const SECRET: [&str; 9] = [
    ".keybroker.v1.CreateUserKeyRequest",
    ".keybroker.v1.ReplaceUserKeyRequest",
    ".keybroker.v1.UnwrapUserKeyResponse",
    ".keybroker.v1.CreateClientCredentialResponse",
    ".keybroker.v1.AddClientSecretResponse",
    ".keybroker.v1.RotateDevicesRequest",
    ".keybroker.v1.CreateAccessRequestRequest",
    ".keybroker.v1.FetchAccessAnswerRequest",
    ".keybroker.v1.ConfirmAccessAnswerRequest",
];

/// The Rust code, then the descriptor set.
const GENERATED: [&str; 2] = ["keybroker.v1.rs", "keybroker_v1.binpb"];

fn package() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn generate(out: &Path) {
    let descriptors = protox::compile(FILES, [package().join("../../proto")]).unwrap();
    fs::write(out.join(GENERATED[1]), descriptors.encode_to_vec()).unwrap();
    tonic_prost_build::configure()
        .skip_debug(SECRET)
        .out_dir(out)
        .compile_fds(descriptors)
        .unwrap();
}

#[test]
fn the_committed_code_is_generated_from_the_proto_files() {
    let committed = package().join("src/generated");
    if env::var_os("KEYBROKER_WRITE_GENERATED").is_some() {
        generate(&committed);
    }
    let fresh = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("generated");
    fs::create_dir_all(&fresh).unwrap();
    generate(&fresh);
    for name in GENERATED {
        let [expected, found] = [&fresh, &committed].map(|folder| {
            fs::read(folder.join(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
        });
        assert!(
            expected == found,
            "src/proto/src/generated/{name} does not match proto/keybroker/v1; run \
             `KEYBROKER_WRITE_GENERATED=1 cargo test -p keybroker-proto --test generated`"
        );
    }
}
