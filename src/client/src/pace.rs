//! A connector that limits the rate of new TCP connections.
//!
//! In TLS 1.3, a server rejects a client certificate only after the handshake. The library tonic treats the rejected
//! connection as a successful connection that was closed later, so tonic opens the next connection without a pause.
//! Without a limit, one call would cost the broker hundreds of handshakes.

use std::{
    collections::VecDeque,
    future::Future,
    io,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::{Duration, Instant},
};

use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tonic::{codegen::Service, transport::Uri};

/// The number of connections allowed within [`WINDOW`].
const CONNECTIONS_MAX: usize = 3;
const WINDOW: Duration = Duration::from_secs(1);
const HTTPS: u16 = 443;
const HTTP: u16 = 80;

/// A connector for [`tonic::transport::Endpoint::connect_with_connector`] that makes at most three TCP connections per
/// second. A connection beyond the limit fails immediately. Clones share the limit. [`crate::Client`] uses this
/// connector. If your program creates its own channel, use this connector for the channel.
#[derive(Clone, Debug, Default)]
pub struct PacedConnector {
    made: Arc<Mutex<VecDeque<Instant>>>,
}

impl PacedConnector {
    /// Counts one connection towards the limit, or fails if the limit is reached.
    fn take(&self, now: Instant) -> io::Result<()> {
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        while made
            .front()
            .is_some_and(|at| now.saturating_duration_since(*at) >= WINDOW)
        {
            made.pop_front();
        }
        if made.len() >= CONNECTIONS_MAX {
            return Err(io::Error::other(
                "the server closed the most recent connections immediately after the TLS handshake",
            ));
        }
        made.push_back(now);
        Ok(())
    }
}

impl Service<Uri> for PacedConnector {
    type Response = TokioIo<TcpStream>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let taken = self.take(Instant::now());
        Box::pin(async move {
            taken?;
            let host = uri.host().unwrap_or_default();
            // In a URI, an IPv6 address is enclosed in brackets.
            let host = host
                .trim_start_matches('[')
                .trim_end_matches(']')
                .to_owned();
            let default = if uri.scheme_str() == Some("http") {
                HTTP
            } else {
                HTTPS
            };
            let stream = TcpStream::connect((host, uri.port_u16().unwrap_or(default))).await?;
            stream.set_nodelay(true)?;
            Ok(TokioIo::new(stream))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_connections_than_three_a_second_fail_and_later_ones_do_not() {
        let connector = PacedConnector::default();
        let now = Instant::now();
        for number in 0..CONNECTIONS_MAX {
            connector.take(now).unwrap_or_else(|_| panic!("{number}"));
        }
        // A clone shares the limit.
        connector.clone().take(now).unwrap_err();
        connector.take(now + WINDOW / 2).unwrap_err();
        connector.take(now + WINDOW).unwrap();
    }
}
