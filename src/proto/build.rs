//! Generates the public wire types with pure-Rust tools (no system `protoc`) and keeps the public descriptor set, which
//! server reflection serves and the wire-compatibility test reads.

use std::{env, error::Error, fs, path::PathBuf};

use prost::Message as _;

const ROOT: &str = "../../proto";
const PUBLIC: &[&str] = &["keybroker/v1/user_key.proto", "keybroker/v1/control.proto"];

/// Messages that carry key material or another secret: a derived `Debug` would print it, so it is written by hand.
const SECRET: &[&str] = &[
    ".keybroker.v1.CreateUserKeyRequest",
    ".keybroker.v1.ReplaceUserKeyRequest",
    ".keybroker.v1.UnwrapUserKeyResponse",
    ".keybroker.v1.CreateClientCredentialResponse",
    ".keybroker.v1.AddClientSecretResponse",
];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed={ROOT}");
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    let public = protox::compile(PUBLIC, [ROOT])?;
    fs::write(out.join("keybroker_v1.binpb"), public.encode_to_vec())?;
    tonic_prost_build::configure()
        .skip_debug(SECRET)
        .compile_fds(public)?;
    Ok(())
}
