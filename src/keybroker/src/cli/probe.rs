//! `keybroker probe`: checks the health of the local broker. Containers can use this command as
//! their health check. HTTP probes of an orchestrator cannot reach the status listener, because its
//! address is a loopback address.

use std::{
    io::{self, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use clap::{Args, ValueEnum};

use super::{
    Context,
    exit::{Exit, Failure},
};

/// Maximum length of an answer in bytes. An answer of the status listener has one or two lines.
const ANSWER_BYTES_MAX: u64 = 16_384;

#[derive(Args, Debug)]
pub(super) struct Arguments {
    /// Health check to run
    #[arg(default_value = "ready")]
    question: Question,
    /// Address of the broker's status listener [default: `status.address` of the configuration]
    #[arg(long, value_name = "ADDRESS")]
    status: Option<SocketAddr>,
    /// Timeout for the answer, in milliseconds
    #[arg(long, default_value_t = 3_000, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=600_000))]
    timeout_ms: u64,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Question {
    /// Check that the process responds; a failure means that the process needs a restart
    Live,
    /// Check that the broker can release keys; after a failure, send callers to another broker
    Ready,
}

pub(super) fn run(arguments: &Arguments, context: &Context) -> Result<(), Failure> {
    let address = match arguments.status {
        Some(address) => address,
        None => context.config()?.status.address,
    };
    let path = match arguments.question {
        Question::Live => "/livez",
        Question::Ready => "/readyz",
    };
    let answer = ask(address, path, Duration::from_millis(arguments.timeout_ms));
    let answer = answer.map_err(|error| {
        let what = format!("no answer from http://{address}{path}: {error}");
        Failure::new(Exit::Unreachable, what)
            .hint("check that `keybroker serve` runs with this address in [status]")
    })?;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    if head.starts_with("HTTP/1.1 200 ") {
        return context.output.sentence("answer", body.trim_end());
    }
    let body = body.trim();
    let what = if body.is_empty() {
        head.lines().next().unwrap_or("an empty answer")
    } else {
        body
    };
    Err(Failure::new(Exit::Refused, what))
}

fn ask(address: SocketAddr, path: &str, timeout: Duration) -> io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&address, timeout)?;
    stream.set_read_timeout(Some(timeout))?;
    stream.set_write_timeout(Some(timeout))?;
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    )?;
    let mut answer = String::new();
    stream.take(ANSWER_BYTES_MAX).read_to_string(&mut answer)?;
    Ok(answer)
}
