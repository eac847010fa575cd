//! Discards the body of a refused request before the answer is sent.

use std::time::Duration;

use axum::body::Body;
use http_body_util::BodyExt as _;

/// Longest time for discarding a body.
const TIMEOUT: Duration = Duration::from_secs(1);

/// Reads and discards the rest of a body, up to `bytes_max` bytes and for at most one second.
pub(crate) async fn discard(body: &mut Body, bytes_max: usize) {
    let discarding = async {
        let mut left = bytes_max;
        while let Some(Ok(frame)) = body.frame().await {
            let length = frame.data_ref().map_or(0, axum::body::Bytes::len);
            left = left.saturating_sub(length);
            if left == 0 {
                return;
            }
        }
    };
    if tokio::time::timeout(TIMEOUT, discarding).await.is_err() {
        tracing::debug!("the rest of the refused request body did not arrive in time");
    }
}
