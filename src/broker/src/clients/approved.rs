//! API clients that become administrators: a second person must approve each credential with the role `admin`, because its holder
//! could request and approve changes.
//!
//! Mitigation: M25 of `THREAT_MODEL.md`.

use keybroker_core::{
    call::{Call, Timestamp},
    client_credential::{ClientCredential, Document},
    error::Error,
    key::{ApprovalId, ClientId},
    principal::{Principal, Role},
};
use keybroker_store::ApprovalChange;

use crate::{
    Broker,
    approval::{self, Asked, Lifetime},
    journal::Draft,
};

impl Broker {
    /// Checks whether a second person has approved a new API client, if it needs an approval. Returns the id of the API client,
    /// the use of the approval, and the time of expiry of its secret. With an approval, the id is that of the request, so that the
    /// same approval can never create a second API client.
    pub(super) async fn approved_client(
        &self,
        principal: &Principal,
        call: &Call,
        id: ClientId,
        document: &Document,
        expires: Option<Timestamp>,
        draft: &mut Draft,
    ) -> Result<(ClientId, Option<ApprovalChange>, Option<Timestamp>), Error> {
        if !document.roles.contains(&Role::Admin) {
            return Ok((id, None, expires));
        }
        let lifetime = lifetime(expires);
        let asked = Asked::new_client(document, lifetime);
        let fresh = ApprovalId::from_bytes(*id.as_bytes());
        let approved = self.approved(principal, call, draft, &asked, fresh).await;
        let id = draft
            .known_approval()
            .map_or(id, |approval| ClientId::from_bytes(*approval.as_bytes()));
        draft.client(id);
        match approved? {
            None => Ok((id, None, expires)),
            Some(approval) => Ok((id, Some(approval), from_now(lifetime))),
        }
    }

    /// Checks whether a second person has approved a further secret of an API client, if it needs an approval. Returns the use of
    /// the approval, and the time of expiry of the secret.
    pub(super) async fn approved_secret(
        &self,
        principal: &Principal,
        call: &Call,
        credential: &ClientCredential,
        expires: Option<Timestamp>,
        draft: &mut Draft,
    ) -> Result<(Option<ApprovalChange>, Option<Timestamp>), Error> {
        self.check_owner(principal, credential.id, draft)?;
        if !credential.document.roles.contains(&Role::Admin) {
            return Ok((None, expires));
        }
        let lifetime = lifetime(expires);
        let asked = Asked::new_secret(credential.id, &credential.document, lifetime);
        let fresh = approval::fresh_id()?;
        let approved = self.approved(principal, call, draft, &asked, fresh).await?;
        let expires = if approved.is_some() {
            from_now(lifetime)
        } else {
            expires
        };
        Ok((approved, expires))
    }
}

fn lifetime(expires: Option<Timestamp>) -> Option<Lifetime> {
    expires.map(|expires| Lifetime::until(expires, Timestamp::now()))
}

fn from_now(lifetime: Option<Lifetime>) -> Option<Timestamp> {
    lifetime.map(|lifetime| lifetime.end(Timestamp::now()))
}
