//! Passes the requests of one connection to the routes of its listener.
//!
//! All connections of a listener share the routes. If each connection added the caller to the
//! routes with a layer, the library axum would copy every route for each connection, and each
//! request would pass through two more layers.

use std::{convert::Infallible, sync::Arc};

use axum::{
    Router, body::Body, extract::Request, response::Response, routing::future::RouteFuture,
};
use hyper::body::Incoming;
use tower::Service as _;

use keybroker_core::call::caller::Caller;

use super::unauthenticated::Authentication;

/// Adds the data of one connection to each request, and passes the request to the routes.
#[derive(Clone, Debug)]
pub(super) struct ConnectionService {
    pub(super) routes: Router,
    pub(super) caller: Caller,
    pub(super) authentication: Arc<Authentication>,
}

impl hyper::service::Service<Request<Incoming>> for ConnectionService {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = RouteFuture<Infallible>;

    fn call(&self, mut request: Request<Incoming>) -> Self::Future {
        let extensions = request.extensions_mut();
        extensions.insert(self.caller.clone());
        extensions.insert(Arc::clone(&self.authentication));
        // The clone shares the routes. A router is always ready for a request.
        self.routes.clone().call(request)
    }
}
