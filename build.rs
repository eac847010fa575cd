//! Generates the wire types with pure-Rust tools (no system `protoc`) and keeps the public descriptor set, which
//! server reflection serves and the wire-compatibility test reads.

use std::{env, error::Error, fs, path::PathBuf};

use prost::Message as _;

const PUBLIC: &[&str] = &["keybroker/v1/user_key.proto", "keybroker/v1/control.proto"];
const WORKER: &[&str] = &["keybroker/worker/v1/worker.proto"];

/// Messages that carry key material or another secret: a derived `Debug` would print it, so it is written by hand.
const SECRET: &[&str] = &[
    ".keybroker.v1.CreateUserKeyRequest",
    ".keybroker.v1.ReplaceUserKeyRequest",
    ".keybroker.v1.UnwrapUserKeyResponse",
    ".keybroker.v1.CreateClientCredentialResponse",
    ".keybroker.v1.AddClientSecretResponse",
    ".keybroker.worker.v1.Mac",
    ".keybroker.worker.v1.VerifyMac",
    ".keybroker.worker.v1.Reply",
    ".keybroker.worker.v1.Reply.outcome",
];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    // sqlx embeds the migrations at compile time but does not watch the folder.
    println!("cargo:rerun-if-changed=migrations");

    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);

    let public = protox::compile(PUBLIC, ["proto"])?;
    fs::write(out.join("keybroker_v1.binpb"), public.encode_to_vec())?;
    tonic_prost_build::configure()
        .skip_debug(SECRET)
        .compile_fds(public)?;

    let worker = protox::compile(WORKER, ["proto"])?;
    tonic_prost_build::configure()
        .build_client(false)
        .build_server(false)
        .skip_debug(SECRET)
        .compile_fds(worker)?;
    Ok(())
}
