//! API clients as SQL has them, verified on the token, and the rows that follow.
//!
//! Mitigation: M20 of `THREAT_MODEL.md`.

use std::{sync::atomic::Ordering, time::Duration};

use crate::{Broker, within};
use keybroker_core::{
    call::{Call, Deadline, Timestamp},
    client_credential::{ClientCredential, Document},
    error::{Error, Reason},
    key::ClientId,
    principal::Principal,
};
use keybroker_hsm as hsm;
use keybroker_store::ClientRow;

/// For a MAC on the token that no call waits for.
const MAC_TIMEOUT: Duration = Duration::from_secs(5);

/// What an API client is looked up for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wanted {
    /// To be let in or changed: its MAC must be of a key that may be used.
    InForce,
    /// To be revoked permanently. Also when the key of its MAC may no longer be used: a revoked row admits no caller,
    /// so a row that is not to be trusted gains nothing by it.
    ToEnd,
}

/// The longest that one page of a list waits for the token to verify MACs. Rows left after that are shown unverified.
const PAGE_TIMEOUT: Duration = Duration::from_secs(2);

/// Verifies the rows of one page on the token, until the token fails or its time is up.
#[derive(Debug)]
pub(super) struct PageVerifier {
    caller: hsm::Caller,
    has_failed: bool,
}

impl PageVerifier {
    pub(super) fn new(principal: &Principal, call: &Call) -> Self {
        let last = call
            .deadline
            .instant()
            .min(Deadline::after(PAGE_TIMEOUT).instant());
        Self {
            caller: hsm::Caller::principal(principal.name(), Deadline::at(last)),
            has_failed: false,
        }
    }
}

/// For jobs about one API client. They wait in the queue of that client, as its calls do.
fn caller_about(id: ClientId) -> hsm::Caller {
    hsm::Caller::principal(id.principal_name(), Deadline::after(MAC_TIMEOUT))
}

/// What became of the verification of a listed row.
#[derive(Debug)]
pub(super) enum Verified {
    Yes,
    /// The MAC does not verify, or its key is not registered.
    No(String),
    /// The token or the registry is unavailable, or the state of the key forbids its use.
    NotAsked,
}

impl Broker {
    /// Verifies the MAC of a listed row. The list does not depend on the token: an administrator needs it during an outage as
    /// well.
    pub(super) async fn verify_listed(
        &self,
        verifier: &mut PageVerifier,
        row: &ClientRow,
    ) -> Verified {
        if verifier.has_failed {
            return Verified::NotAsked;
        }
        let Ok(mut registry) = self.registry() else {
            verifier.has_failed = true;
            return Verified::NotAsked;
        };
        if !registry.knows(row.key) {
            // Another broker may have registered the key a moment ago.
            match self.refresh_registry().await.and_then(|()| self.registry()) {
                Ok(fresh) => registry = fresh,
                Err(_) => return Verified::NotAsked,
            }
        }
        if !registry.knows(row.key) {
            return Verified::No(format!("its wrapping key {} is not registered", row.key));
        }
        if registry.check_readable(row.key).is_err() {
            return Verified::NotAsked;
        }
        let message = row.mac_message();
        let verified = self
            .token
            .verify_mac(row.key, &message, &row.mac, &verifier.caller);
        match verified.await {
            Ok(()) => Verified::Yes,
            Err(hsm::Error::MacRefused) => Verified::No("its MAC does not verify".to_owned()),
            Err(error) => {
                tracing::info!(%error, "the rows of a page are shown without a verified MAC");
                verifier.has_failed = true;
                Verified::NotAsked
            }
        }
    }

    /// An API client, once the token has verified its row: the basis of authentication. `None` if it does not exist.
    pub async fn verified_client(&self, id: ClientId) -> Result<Option<ClientCredential>, Error> {
        self.client_for(Wanted::InForce, id).await
    }

    async fn client_for(
        &self,
        wanted: Wanted,
        id: ClientId,
    ) -> Result<Option<ClientCredential>, Error> {
        // An earlier state may let in what was revoked since.
        self.check_acknowledged()?;
        let Some(row) = self.store.client(id).await? else {
            return Ok(None);
        };
        let refused = |what: String| {
            keybroker_core::alert!(
                ClientDamaged, client = %id, what,
                "an API client's row does not verify; it is not let in"
            );
            Error::new(Reason::Credential, what)
        };
        if !self.registry()?.knows(row.key) {
            // Another broker may have made it under a key that was registered a moment ago.
            self.refresh_registry().await?;
        }
        let registry = self.registry()?;
        if !registry.knows(row.key) {
            return Err(refused(format!(
                "its wrapping key {} is not registered",
                row.key
            )));
        }
        match registry.check_readable(row.key) {
            Err(error) if wanted == Wanted::ToEnd && error.reason() == Reason::KeyState => {}
            checked => checked?,
        }
        let message = row.mac_message();
        match self
            .token
            .verify_mac(row.key, &message, &row.mac, &caller_about(id))
            .await
        {
            Ok(()) => {}
            Err(hsm::Error::MacRefused) => {
                return Err(refused("its MAC does not verify".to_owned()));
            }
            Err(error) => return Err(error.into()),
        }
        let document = document_of(&row).map_err(|error| refused(error.detail().to_owned()))?;
        if wanted == Wanted::InForce
            && let Some(problem) = document.grant().problem()
        {
            return Err(refused(format!("it {problem}")));
        }
        Ok(Some(ClientCredential {
            id,
            revision: row.revision,
            document,
        }))
    }

    /// Another number after each change of an API client through this broker.
    pub fn clients_generation(&self) -> u64 {
        self.clients_generation.load(Ordering::Acquire)
    }

    /// Notes that a secret was accepted.
    pub fn note_client_use(&self, id: ClientId, secret: u32) {
        self.client_uses.note(id, secret);
    }

    /// Replaces the stored hash of a secret with a stronger one. The row stays as it is if it has changed meanwhile.
    pub async fn improve_client(&self, mut credential: ClientCredential, secret: u32, phc: String) {
        let id = credential.id;
        let known = credential.document.secrets.iter_mut();
        let Some(known) = known.into_iter().find(|known| known.number == secret) else {
            return;
        };
        known.phc = phc;
        let improved = async {
            let row = self.next_row(credential).await?;
            Ok::<(), Error>(self.store.update_client(&row, None).await?)
        };
        match improved.await {
            Ok(()) => {
                tracing::info!(client = %id, secret, "its secret is hashed with today's parameters");
            }
            Err(error) => {
                tracing::info!(client = %id, secret, %error, "its secret keeps its older hash for now");
            }
        }
    }

    /// A client of the administrator's own tenant. One of another tenant is not found.
    pub(super) async fn own_client(
        &self,
        principal: &Principal,
        call: &Call,
        id: ClientId,
        wanted: Wanted,
    ) -> Result<ClientCredential, Error> {
        let unknown = || Error::new(Reason::KeyNotFound, format!("API client {id}"));
        // A caller with a damaged client is refused; its administrator learns the cause.
        let damaged = |error: Error| match error.reason() {
            Reason::Credential => Error::new(Reason::RecordDamaged, error.detail()),
            _ => error,
        };
        let found = within(call, self.client_for(wanted, id)).await;
        let found = found.map_err(damaged)?;
        let credential = found.ok_or_else(unknown)?;
        if credential.document.tenant != *principal.tenant() {
            return Err(unknown());
        }
        Ok(credential)
    }

    /// The row that follows this state of a client, with the token's MAC.
    pub(super) async fn next_row(&self, credential: ClientCredential) -> Result<ClientRow, Error> {
        let too_long = || {
            Error::new(
                Reason::Bug,
                "the document of an API client outgrew its column",
            )
        };
        let bytes = credential.document.to_bytes().ok_or_else(too_long)?;
        let mut row = ClientRow {
            id: credential.id,
            revision: credential.revision + 1,
            document: bytes,
            mac: [0; 32],
            key: self.registry()?.integrity_key()?,
            created: credential.document.created,
            updated: Timestamp::now(),
        };
        let message = row.mac_message();
        let caller = caller_about(row.id);
        row.mac = self.token.mac(row.key, &message, &caller).await?;
        Ok(row)
    }
}

pub(super) fn document_of(row: &ClientRow) -> Result<Document, Error> {
    Document::from_bytes(&row.document).ok_or_else(|| {
        let detail = format!("the document of API client {} does not parse", row.id);
        Error::new(Reason::RecordDamaged, detail)
    })
}
