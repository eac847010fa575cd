//! `keybroker`: the broker, its token workers, and the commands of those who run it.

use std::process::ExitCode;

use mimalloc::MiMalloc;
use zeroizing_alloc::ZeroAlloc;

/// Overwrites every heap block before it is freed: the buffers of TLS, HTTP and protobuf hold user keys, and their libraries
/// do not overwrite them. A block that grows is copied and the old one overwritten. `allocator.rs` has its setting.
#[global_allocator]
static ALLOCATOR: ZeroAlloc<MiMalloc> = ZeroAlloc(MiMalloc);

fn main() -> ExitCode {
    keybroker::cli::main()
}
