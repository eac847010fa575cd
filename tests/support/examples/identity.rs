//! The identity service of the tests as a program, for demonstrations:
//!
//! ```text
//! identity --address 127.0.0.1:0 --ready-file ready --pem-file key.pem
//! curl --data '{"sub": "…"}' "$(cat ready)/mint"
//! ```
//!
//! It gives every caller a token: it listens on loopback only, and belongs on no machine with another purpose.

#![allow(
    clippy::unwrap_used,
    reason = "a program of tests that meets a surprise stops there"
)]

use std::{fs, net::SocketAddr, path::PathBuf};

use clap::Parser;
use keybroker_test_support::identity as service;

/// Run an identity service that gives every caller a token, for demonstrations
#[derive(Debug, Parser)]
struct Arguments {
    /// Loopback address and port to listen on; port 0 lets the system choose
    #[arg(long, default_value = "127.0.0.1:0")]
    address: SocketAddr,
    /// The `iss` of its tokens [default: the URL of the address]
    #[arg(long)]
    issuer: Option<String>,
    /// File that the public key is written to
    #[arg(long)]
    pem_file: Option<PathBuf>,
    /// File that the URL is written to once the service answers
    #[arg(long)]
    ready_file: Option<PathBuf>,
}

fn main() {
    let arguments = Arguments::parse();
    assert!(
        arguments.address.ip().is_loopback(),
        "it gives every caller a token: pass a loopback address"
    );
    let identity = service::Identity::start(service::Options {
        address: Some(arguments.address),
        issuer: arguments.issuer,
        mints_over_http: true,
        ..service::Options::default()
    });
    if let Some(path) = arguments.pem_file {
        fs::write(path, identity.pem()).unwrap();
    }
    if let Some(path) = arguments.ready_file {
        let fresh = path.with_extension("new");
        fs::write(&fresh, identity.url()).unwrap();
        fs::rename(fresh, path).unwrap();
    }
    identity.wait();
}
