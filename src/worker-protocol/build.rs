//! Generates the messages between the front and its workers.

use std::error::Error;

const ROOT: &str = "../../proto";
const WORKER: &[&str] = &[
    "keybroker/worker/v1/worker.proto",
    "keybroker/worker/v1/admin.proto",
];

/// Messages that contain key material or a PIN. A derived `Debug` would print the key material or the PIN, so
/// `src/wire.rs` implements `Debug`.
const SECRET: &[&str] = &[
    ".keybroker.worker.v1.Mac",
    ".keybroker.worker.v1.VerifyMac",
    ".keybroker.worker.v1.Reply",
    ".keybroker.worker.v1.Reply.outcome",
    ".keybroker.worker.v1.ImportOrganizationKey",
    ".keybroker.worker.v1.PinSource",
    ".keybroker.worker.v1.PinSource.source",
];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed={ROOT}/keybroker/worker");
    let worker = protox::compile(WORKER, [ROOT])?;
    tonic_prost_build::configure()
        .build_client(false)
        .build_server(false)
        .skip_debug(SECRET)
        // The setup is boxed, because it is much larger than the other jobs and the other jobs are
        // far more frequent.
        .boxed(".keybroker.worker.v1.Request.job.setup")
        .compile_fds(worker)?;
    Ok(())
}
