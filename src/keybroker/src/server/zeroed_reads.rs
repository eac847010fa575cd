//! A socket that overwrites a read buffer with zeros before each read.
//!
//! rustls decrypts a record in the read buffer and leaves the plaintext there until the next record. After processing a record,
//! rustls reads more data, and this socket then overwrites the plaintext.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Overwrites the unused part of each read buffer with zeros before a read.
#[derive(Debug)]
pub(super) struct ZeroedReads<I>(pub(super) I);

impl<I: AsyncRead + Unpin> AsyncRead for ZeroedReads<I> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        buffer.initialize_unfilled().fill(0);
        Pin::new(&mut self.0).poll_read(context, buffer)
    }
}

impl<I: AsyncWrite + Unpin> AsyncWrite for ZeroedReads<I> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write_vectored(context, parts)
    }

    fn is_write_vectored(&self) -> bool {
        self.0.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_read_that_has_to_wait_leaves_an_empty_buffer() {
        let (_client, server) = tokio::io::duplex(16);
        let mut bytes = *b"an old record that was decrypted";
        let mut buffer = ReadBuf::new(&mut bytes);
        let mut io = ZeroedReads(server);
        let pending = std::future::poll_fn(|context| {
            Poll::Ready(
                Pin::new(&mut io)
                    .poll_read(context, &mut buffer)
                    .is_pending(),
            )
        });
        assert!(pending.await);
        assert_eq!(bytes, [0; 32]);
    }
}
