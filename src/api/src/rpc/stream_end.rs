//! Ends the streams that would not end by themselves, of health watchers and reflection clients, when the broker stops.

use axum::body::Body;
use futures_util::{StreamExt as _, stream};
use http_body_util::{BodyStream, StreamBody};
use hyper::body::Frame;
use tokio_util::sync::CancellationToken;
use tonic::Status;

/// The body until `stop`, then `UNAVAILABLE`, which tells the client to look for another broker.
pub(super) fn at_stop(body: Body, stop: CancellationToken) -> Body {
    let last = stream::iter(std::iter::once_with(|| {
        let mut trailers = http::HeaderMap::new();
        let status = Status::unavailable("the broker is stopping");
        // Text without control characters always fits a header.
        status.add_header(&mut trailers).ok();
        Ok(Frame::trailers(trailers))
    }));
    // A body that ends by itself brings its own trailers, after which nothing more of it is asked for.
    let frames = BodyStream::new(body).take_until(stop.cancelled_owned());
    Body::new(StreamBody::new(frames.chain(last)))
}
