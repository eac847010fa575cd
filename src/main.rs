//! `keybroker`: the broker, its token workers, and the commands of those who run it.

use std::process::ExitCode;

fn main() -> ExitCode {
    keybroker::cli::main()
}
