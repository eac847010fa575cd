//! Connects the `auth` crate to the broker's API clients, so that the `auth` crate and the `broker`
//! crate do not depend on each other.

use std::sync::Arc;

use async_trait::async_trait;

use keybroker_auth::client_secret::Directory;
use keybroker_broker::Broker;
use keybroker_core::{client_credential::ClientCredential, error::Error, key::ClientId};

#[derive(Debug)]
pub(super) struct Clients(pub(super) Arc<Broker>);

#[async_trait]
impl Directory for Clients {
    async fn client(&self, id: ClientId) -> Result<Option<ClientCredential>, Error> {
        self.0.verified_client(id).await
    }

    fn generation(&self) -> u64 {
        self.0.clients_generation()
    }

    fn note_use(&self, id: ClientId, secret: u32) {
        self.0.note_client_use(id, secret);
    }

    fn improve(&self, credential: ClientCredential, secret: u32, phc: String) {
        let broker = Arc::clone(&self.0);
        tokio::spawn(async move { broker.improve_client(credential, secret, phc).await });
    }
}
