//! `keybroker`: the broker, its token workers, and the commands of those who run it.

use std::process::ExitCode;

use tikv_jemallocator::Jemalloc;
use zeroizing_alloc::ZeroAlloc;

/// Overwrites every heap block before it is freed: the buffers of TLS, HTTP and protobuf hold user keys, and their libraries
/// do not overwrite them. A block that grows is copied and the old one overwritten. Free pages go back to the operating system
/// over ten seconds, by a thread of jemalloc, so that an idle broker does not keep what a flood took.
#[global_allocator]
static ALLOCATOR: ZeroAlloc<Jemalloc> = ZeroAlloc(Jemalloc);

fn main() -> ExitCode {
    keybroker::cli::main()
}
