//! The doors: what every caller meets before and after the use case, over real TLS.

mod answers;
mod life;
mod methods;
mod raw;
mod reasons;
mod strangers;
mod tls;
