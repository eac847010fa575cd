//! The identity service of the tests as a program, for demonstrations:
//!
//! ```text
//! identity --address 127.0.0.1:0 --ready-file ready --pem-file key.pem
//! curl --data '{"sub": "…"}' "$(cat ready)/mint"
//! ```
//!
//! It vouches for whoever asks: it listens on loopback alone, and belongs on no machine that is used for anything else.

#![allow(
    clippy::unwrap_used,
    reason = "a program of tests that meets a surprise stops there"
)]

use std::{fs, net::SocketAddr, path::PathBuf};

use clap::Parser;

mod service;

/// An identity service that vouches for whoever asks: for demonstrations.
#[derive(Debug, Parser)]
struct Arguments {
    /// A loopback address; port 0 lets the system choose.
    #[arg(long, default_value = "127.0.0.1:0")]
    address: SocketAddr,
    /// The `iss` of its tokens, if it is not the URL of the address.
    #[arg(long)]
    issuer: Option<String>,
    /// The public half of its key is written here.
    #[arg(long)]
    pem_file: Option<PathBuf>,
    /// Its URL is written here once it answers.
    #[arg(long)]
    ready_file: Option<PathBuf>,
}

fn main() {
    let arguments = Arguments::parse();
    assert!(
        arguments.address.ip().is_loopback(),
        "it vouches for whoever asks: give it a loopback address"
    );
    let identity = service::Identity::start(service::Options {
        address: Some(arguments.address),
        issuer: arguments.issuer,
        mints_over_http: true,
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
