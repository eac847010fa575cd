//! Listeners: what every API does before and after the use case, over real TLS.

mod answers;
mod flood_costs;
pub(crate) mod floods;
mod life;
mod methods;
pub(crate) mod raw;
mod reasons;
mod tls;
pub(crate) mod unauthenticated;
