//! `keybroker`: the broker, its token workers and the administration commands.

use std::process::ExitCode;

use tikv_jemallocator::Jemalloc;
use zeroizing_alloc::ZeroAlloc;

/// Overwrites every heap block before it is freed. The buffers of the TLS, HTTP and protobuf libraries contain user keys, and
/// these libraries do not overwrite them. If a block grows, the old block is overwritten after its content was copied. A
/// thread of jemalloc returns free pages to the operating system within ten seconds, so that a flood of calls does not
/// increase the memory of an idle broker permanently.
#[global_allocator]
static ALLOCATOR: ZeroAlloc<Jemalloc> = ZeroAlloc(Jemalloc);

fn main() -> ExitCode {
    keybroker::cli::main()
}
