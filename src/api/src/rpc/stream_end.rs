//! Ends the streams of health watches and reflection clients when the broker stops, because these streams do not
//! end by themselves.

use axum::body::Body;
use futures_util::{StreamExt as _, stream};
use http_body_util::{BodyStream, StreamBody};
use hyper::body::Frame;
use tokio_util::sync::CancellationToken;
use tonic::Status;

/// Returns the body up to the signal `stop`, followed by the status `UNAVAILABLE`, so that the client tries
/// another broker.
pub(super) fn at_stop(body: Body, stop: CancellationToken) -> Body {
    let last = stream::iter(std::iter::once_with(|| {
        let mut trailers = http::HeaderMap::new();
        let status = Status::unavailable("the broker is stopping");
        // A string without control characters is always valid in a header.
        status.add_header(&mut trailers).ok();
        Ok(Frame::trailers(trailers))
    }));
    // If the body ends before the broker stops, the body's own trailers end the stream, and `last`
    // is not read.
    let frames = BodyStream::new(body).take_until(stop.cancelled_owned());
    Body::new(StreamBody::new(frames.chain(last)))
}
