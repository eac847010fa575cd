//! An end for streams that have none: watchers of health and reflection clients stay for as long as they like, and a stop
//! must not wait for them.

use axum::body::Body;
use futures_util::{StreamExt as _, stream};
use http_body_util::{BodyStream, StreamBody};
use hyper::body::Frame;
use tokio_util::sync::CancellationToken;
use tonic::Status;

/// The body until `stop`, then `UNAVAILABLE`, which tells the client to look for another broker.
pub(super) fn until(body: Body, stop: CancellationToken) -> Body {
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
