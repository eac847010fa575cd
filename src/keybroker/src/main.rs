//! `keybroker`: the broker, its token workers and the administration commands.

use std::process::ExitCode;

use tikv_jemallocator::Jemalloc;
use zeroizing_alloc::ZeroAlloc;

/// Overwrites every heap block before the block is freed. The buffers of the TLS, HTTP and protobuf
/// libraries contain user keys, and these libraries do not overwrite their buffers. If a block
/// grows, its content is copied to a new block, and then the old block is overwritten. A thread of
/// jemalloc returns free pages to the operating system within ten seconds. Therefore, a flood of
/// calls does not permanently increase the memory use of the broker.
#[global_allocator]
static ALLOCATOR: ZeroAlloc<Jemalloc> = ZeroAlloc(Jemalloc);

fn main() -> ExitCode {
    keybroker::cli::main()
}
