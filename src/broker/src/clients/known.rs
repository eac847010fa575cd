//! Reads API clients from the store and verifies their rows with the token. The token also computes the MAC of a
//! changed row.
//!
//! Mitigation: M20 of `THREAT_MODEL.md`.

use std::{sync::atomic::Ordering, time::Duration};

use crate::{Broker, registry::Registry, within};
use keybroker_core::{
    call::{Call, Deadline, Timestamp},
    client_credential::{ClientCredential, Document},
    error::{Error, Reason},
    key::{ClientId, KeyUse},
    principal::Principal,
};
use keybroker_hsm as hsm;
use keybroker_store::ClientRow;

/// Time limit for a MAC job of the token, if the job is not part of a call.
const MAC_TIMEOUT: Duration = Duration::from_secs(5);

/// The purpose for which an API client is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wanted {
    /// The API client is to be authenticated or changed. The state of the row's wrapping key must permit the use of the
    /// key.
    InForce,
    /// The API client is to be revoked permanently. A revocation does not require a usable wrapping key. Revoking an
    /// unverified row is no risk, because a revoked API client cannot authenticate.
    ToEnd,
}

/// Longest time for which a page of a list waits for the token. Rows that the token has not verified within this time
/// are listed as unverified.
const PAGE_TIMEOUT: Duration = Duration::from_secs(2);

/// Verifies the rows of one page with the token, until the token fails or the time limit is reached.
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

/// Returns the caller of token jobs that concern one API client. The jobs wait in the same queue as the jobs of the API
/// client's calls.
fn caller_about(id: ClientId) -> hsm::Caller {
    hsm::Caller::principal(id.principal_name(), Deadline::after(MAC_TIMEOUT))
}

/// The result of verifying a listed row.
#[derive(Debug)]
pub(super) enum Verified {
    Yes,
    /// The MAC is wrong, or the wrapping key in the row is not registered.
    No(String),
    /// The MAC was not verified: the token or the registry is unavailable, or the state of the wrapping key forbids its
    /// use.
    NotAsked,
}

impl Broker {
    /// Verifies the MAC of a listed row. The list also works if the token is unavailable, because an administrator
    /// needs the list during an outage.
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
            // Another broker may have registered the key after this broker last read the registry.
            match self.refresh_registry().await.and_then(|()| self.registry()) {
                Ok(fresh) => registry = fresh,
                Err(_) => return Verified::NotAsked,
            }
        }
        if !registry.knows(row.key) {
            return Verified::No(format!(
                "the wrapping key {} of the row is not registered",
                row.key
            ));
        }
        if registry.check(row.key, KeyUse::VerifyMac).is_err() {
            return Verified::NotAsked;
        }
        let message = row.mac_message();
        let verified = self
            .token
            .verify_mac(row.key, &message, &row.mac, &verifier.caller);
        match verified.await {
            Ok(()) => Verified::Yes,
            Err(hsm::Error::MacRefused) => {
                Verified::No("the MAC of the row does not verify".to_owned())
            }
            Err(error) => {
                tracing::info!(
                    %error,
                    "the token did not verify the MACs of some rows of a page, so the page shows these rows as unverified"
                );
                verifier.has_failed = true;
                Verified::NotAsked
            }
        }
    }

    /// Returns an API client for authentication, after the token has verified its row. Returns `None` if the client
    /// does not exist.
    pub async fn verified_client(&self, id: ClientId) -> Result<Option<ClientCredential>, Error> {
        self.client_for(Wanted::InForce, id).await
    }

    async fn client_for(
        &self,
        wanted: Wanted,
        id: ClientId,
    ) -> Result<Option<ClientCredential>, Error> {
        // After the restoration of an older database, the row of a revoked API client may be valid again.
        self.check_acknowledged()?;
        let Some(row) = self.store.client(id).await? else {
            return Ok(None);
        };
        let refused = |what: String| {
            keybroker_core::alert!(
                ClientDamaged, client = %id, what,
                "the stored row of an API client is not valid; the broker refuses this API client"
            );
            Error::new(Reason::Credential, what)
        };
        if !self.registry()?.knows(row.key) {
            // Another broker may have created the client under a key that was registered after this broker last read
            // the registry.
            self.refresh_registry().await?;
        }
        if !self.registry()?.knows(row.key) {
            return Err(refused(format!(
                "the wrapping key {} of the row is not registered",
                row.key
            )));
        }
        let checked = self.check_key(Deadline::after(MAC_TIMEOUT), row.key, KeyUse::VerifyMac);
        match checked.await {
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
                return Err(refused("the MAC of the row does not verify".to_owned()));
            }
            Err(error) => return Err(error.into()),
        }
        let document = document_of(&row).map_err(|error| refused(error.detail().to_owned()))?;
        if wanted == Wanted::InForce
            && let Some(problem) = document.grant().problem()
        {
            return Err(refused(format!(
                "the grant of the API client is not valid: {problem}"
            )));
        }
        Ok(Some(ClientCredential {
            id,
            revision: row.revision,
            document,
        }))
    }

    /// Returns a number that changes with each change of an API client through this broker.
    pub fn clients_generation(&self) -> u64 {
        self.clients_generation.load(Ordering::Acquire)
    }

    /// Records the current time as the last use of a secret of an API client.
    pub fn note_client_use(&self, id: ClientId, secret: u32) {
        self.client_uses.note(id, secret);
    }

    /// Replaces the stored hash of a secret with a stronger hash. Does nothing if the row was
    /// changed in the meantime.
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
                tracing::info!(client = %id, secret, "the hash of a client secret was renewed with the current parameters");
            }
            Err(error) => {
                tracing::info!(client = %id, secret, %error, "cannot renew the hash of a client secret; the older hash stays valid");
            }
        }
    }

    /// Returns a client of the administrator's own tenant. A client of another tenant is reported as not found.
    pub(super) async fn own_client(
        &self,
        principal: &Principal,
        call: &Call,
        id: ClientId,
        wanted: Wanted,
    ) -> Result<ClientCredential, Error> {
        let unknown = || Error::new(Reason::KeyNotFound, format!("API client {id}"));
        // An API client with a damaged row only gets the answer that its credential is refused. The administrator of
        // the API client gets the cause.
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

    /// Returns the next revision of a client's row, with a MAC that the token computes.
    pub(super) async fn next_row(&self, credential: ClientCredential) -> Result<ClientRow, Error> {
        let too_long = || {
            Error::new(
                Reason::Bug,
                "the document of an API client is too long for its column",
            )
        };
        let bytes = credential.document.to_bytes().ok_or_else(too_long)?;
        let mut row = ClientRow {
            id: credential.id,
            revision: credential.revision + 1,
            document: bytes,
            mac: [0; 32],
            key: self
                .ask_registry(Deadline::after(MAC_TIMEOUT), Registry::integrity_key)
                .await?,
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
        let detail = format!("the document of API client {} cannot be parsed", row.id);
        Error::new(Reason::RecordDamaged, detail)
    })
}
