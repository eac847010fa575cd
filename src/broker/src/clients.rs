//! API clients. Administrators create, list and revoke API clients, and give them new secrets. An API client is
//! authenticated only after the token has verified the client's stored row.
//!
//! An administrator can grant only the roles that the configuration permits, and only to API clients of the
//! administrator's own tenant. Administrators can create API clients that release keys only if the configuration
//! permits such clients.
//!
//! Mitigation: M20 of `THREAT_MODEL.md`.

use std::{collections::BTreeSet, fmt, sync::Arc};

use aws_lc_rs::rand;

use keybroker_core::{
    call::{Call, Timestamp},
    client_credential::{ClientCredential, Document, LIVE_SECRETS_MAX, PlainSecret},
    error::{Error, Reason},
    key::{ClientId, ID_BYTES, KeyName, UserId},
    principal::{Action, Principal, Reach, Role},
};
use keybroker_store::{ApprovalChange, ApprovedClient, ClientRow, Damage, DamagedClient, Position};

use super::{Broker, PageRow, TaskFailed, damage, journal::Draft, within};

mod approved;
mod change;
mod known;
mod uses;

pub(super) use uses::ClientUses;

use known::{PageVerifier, Verified, Wanted, document_of};

/// The settings of API clients.
pub struct ClientRules {
    /// Roles that an administrator may grant.
    pub grantable_roles: BTreeSet<Role>,
    /// Hashes a secret. The hash function deliberately takes much time and memory.
    pub hash: Hash,
}

/// Computes the PHC string of a secret.
pub type Hash = Arc<dyn Fn(&[u8]) -> Result<String, Error> + Send + Sync>;

impl fmt::Debug for ClientRules {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientRules")
            .field("grantable_roles", &self.grantable_roles)
            .finish_non_exhaustive()
    }
}

/// The request for a new API client.
#[derive(Clone, Debug)]
pub struct NewClient {
    /// A description for people.
    pub label: String,
    /// The roles that the client gets.
    pub roles: BTreeSet<Role>,
    /// The users whose keys the API client may release, if it gets the role `release`.
    pub users: Option<Reach<UserId>>,
    /// The names of the keys that the API client may release, if it gets the role `release`.
    pub key_names: Option<Reach<KeyName>>,
    /// Time at which the first secret of the API client expires.
    pub expires: Option<Timestamp>,
}

/// An API client as administrators and auditors see it.
#[derive(Clone, Debug)]
pub struct ClientView {
    /// The id that the API client sends with its secret.
    pub id: ClientId,
    /// The stored settings and secrets of the client.
    pub document: Document,
    /// Number of each secret, and the time at which the secret was last accepted.
    pub uses: Vec<(u32, Timestamp)>,
    /// Whether the token verified the row's MAC for this answer; `false` if the token was unavailable.
    pub is_verified: bool,
}

/// A new secret of an API client. The broker returns a secret only once, when the secret is created.
#[derive(Debug)]
pub struct CreatedSecret {
    /// The API client to which the secret belongs.
    pub client: ClientView,
    /// The number of the secret.
    pub number: u32,
    /// The secret itself.
    pub secret: PlainSecret,
}

/// One page of API clients.
#[derive(Clone, Debug)]
pub struct ClientPage {
    /// The clients, ordered by id. A damaged row is listed for every tenant, with the fields that can be read.
    pub rows: Vec<PageRow<ClientView, DamagedClient, ClientId>>,
    /// The position of the next page; `None` on the last page.
    pub next: Option<Position<ClientId>>,
}

/// A permitted change of an API client. The value owns all its data, because a change can run longer than the call that
/// started it.
struct ClientChange {
    broker: Arc<Broker>,
    principal: Principal,
    call: Call,
    draft: Draft,
}

/// A change of an API client before its commit: the row, its new secret, and the use of the approval that permits the change.
struct Prepared {
    row: ClientRow,
    secret: PlainSecret,
    approval: Option<ApprovalChange>,
}

impl Broker {
    /// Creates an API client with its first secret.
    pub async fn create_client(
        self: &Arc<Self>,
        principal: &Principal,
        call: &Call,
        new: NewClient,
    ) -> Result<CreatedSecret, Error> {
        self.change_client(
            Action::CreateClient,
            principal,
            call,
            move |change| async move {
                let ClientChange {
                    broker,
                    principal,
                    call,
                    mut draft,
                } = change;
                let prepared = broker
                    .prepare_client(&principal, &call, new, &mut draft)
                    .await;
                let prepared = broker.or_record(&draft, prepared).await?;
                let (id, document) = (prepared.row.id, document_of(&prepared.row)?);
                let kind = ApprovedClient::New;
                broker
                    .commit_prepared(&call, draft, kind, &prepared)
                    .await?;
                Ok(created(id, document, prepared.secret))
            },
        )
        .await
    }

    /// Adds a secret to an API client. The API client has two valid secrets until the old secret is revoked.
    pub async fn add_client_secret(
        self: &Arc<Self>,
        principal: &Principal,
        call: &Call,
        id: ClientId,
        expires: Option<Timestamp>,
    ) -> Result<CreatedSecret, Error> {
        self.change_client(Action::CreateClient, principal, call, move |change| async move {
            let ClientChange {
                broker,
                principal,
                call,
                mut draft,
            } = change;
            draft.client(id);
            let prepared = async {
                let mut credential = broker
                    .own_client(&principal, &call, id, Wanted::InForce)
                    .await?;
                if credential.document.revoked.is_some() {
                    let what = "the id of an API client that is not revoked; create another API client";
                    return Err(Error::violation("id", what));
                }
                broker.check_grantable(&credential.document)?;
                if credential
                    .document
                    .live_secrets(Timestamp::now())
                    .count()
                    >= LIVE_SECRETS_MAX
                {
                    let what = "the id of an API client with fewer than two valid secrets; revoke one of its secrets first";
                    return Err(Error::violation("id", what));
                }
                let (approval, expires) = broker
                    .approved_secret(&principal, &call, &credential, expires, &mut draft)
                    .await?;
                let now = Timestamp::now();
                let (secret, phc) = broker.fresh_secret().await?;
                credential.document.add_secret(phc, now, expires);
                if !credential.document.may_grow() {
                    let what =
                        "the id of an API client that has room for another secret: the users, key names and secrets of \
                         this API client are too long; create another API client";
                    return Err(Error::violation("id", what));
                }
                Ok(Prepared {
                    row: broker.next_row(credential).await?,
                    secret,
                    approval,
                })
            };
            let prepared = prepared.await;
            let prepared = broker.or_record(&draft, prepared).await?;
            let document = document_of(&prepared.row)?;
            draft.grant(&document);
            let kind = ApprovedClient::Changed;
            broker
                .commit_prepared(&call, draft, kind, &prepared)
                .await?;
            Ok(created(id, document, prepared.secret))
        })
        .await
    }

    /// Permanently revokes an API client or one of its secrets.
    pub async fn revoke_client(
        self: &Arc<Self>,
        principal: &Principal,
        call: &Call,
        id: ClientId,
        secret: Option<u32>,
    ) -> Result<ClientView, Error> {
        self.change_client(
            Action::RevokeClient,
            principal,
            call,
            move |change| async move {
                let ClientChange {
                    broker,
                    principal,
                    call,
                    mut draft,
                } = change;
                draft.client(id);
                let prepared = async {
                    // If only a secret is revoked, the API client can still authenticate, so its row must be valid.
                    let wanted = secret.map_or(Wanted::ToEnd, |_| Wanted::InForce);
                    let mut credential = broker.own_client(&principal, &call, id, wanted).await?;
                    revoke(&mut credential.document, secret)?;
                    broker.next_row(credential).await
                };
                let row = broker.or_record(&draft, prepared.await).await?;
                let document = document_of(&row)?;
                draft.grant(&document);
                broker.update_client(&call, draft, row).await?;
                let uses = broker.store.client_uses(id).await.unwrap_or_default();
                Ok(ClientView {
                    id,
                    document,
                    uses,
                    is_verified: true,
                })
            },
        )
        .await
    }

    /// Asks the policy for a permit, then runs a change of an API client in a separate task.
    async fn change_client<T, F>(
        self: &Arc<Self>,
        action: Action,
        principal: &Principal,
        call: &Call,
        change: impl FnOnce(ClientChange) -> F + Send + 'static,
    ) -> Result<T, Error>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, Error>> + Send,
    {
        let (broker, principal, call) = (Arc::clone(self), principal.clone(), call.clone());
        self.run_change(action, call.clone(), async move {
            let draft = broker
                .begin_control_change(&principal, &call, action)
                .await?;
            change(ClientChange {
                broker,
                principal,
                call,
                draft,
            })
            .await
        })
        .await
    }

    /// Returns one page of API clients. An administrator gets the API clients of the administrator's own tenant, and an
    /// auditor gets the API clients of all tenants. While the token is available, it verifies the MAC of each row.
    pub async fn clients(
        &self,
        principal: &Principal,
        call: &Call,
        from: Position<ClientId>,
        limit: u32,
    ) -> Result<ClientPage, Error> {
        Box::pin(
            self.read_async(principal, call, Action::ListClients, async {
                let found = within(call, self.store.clients(&from, limit)).await?;
                let is_full = u32::try_from(found.len()).is_ok_and(|count| count >= limit);
                let mut verifier = PageVerifier::new(principal, call);
                let mut end = from;
                let mut rows = Vec::new();
                for row in found {
                    end.advance(match &row {
                        Ok(row) => Some(row.id),
                        Err(damaged) => damaged.id,
                    });
                    let content = match row {
                        Ok(row) => self.verified_view(call, &mut verifier, row).await?,
                        Err(damaged) => Err(damaged),
                    };
                    let is_shown = match &content {
                        Ok(view) => {
                            view.document.tenant == *principal.tenant()
                                || principal.has(Role::Auditor)
                        }
                        // The tenant of a damaged row may be forged.
                        Err(_) => true,
                    };
                    if is_shown {
                        let end = end.clone();
                        rows.push(PageRow { content, end });
                    }
                }
                damage::report_clients(
                    call,
                    Action::ListClients,
                    rows.iter().filter_map(|row| row.content.as_ref().err()),
                );
                Ok(ClientPage {
                    rows,
                    next: is_full.then_some(end),
                })
            }),
        )
        .await
    }

    async fn verified_view(
        &self,
        call: &Call,
        verifier: &mut PageVerifier,
        row: ClientRow,
    ) -> Result<Result<ClientView, DamagedClient>, Error> {
        let id = row.id;
        let damaged = |damage: Damage, detail: String| {
            Ok(Err(DamagedClient {
                id: Some(id),
                damage,
                detail,
            }))
        };
        let document = match document_of(&row) {
            Ok(document) => document,
            Err(error) => return damaged(Damage::Unreadable, error.detail().to_owned()),
        };
        let is_verified = match self.verify_listed(verifier, &row).await {
            Verified::Yes => true,
            Verified::NotAsked => false,
            Verified::No(detail) => return damaged(Damage::MacRefused, detail),
        };
        Ok(Ok(ClientView {
            id,
            document,
            uses: within(call, self.store.client_uses(id)).await?,
            is_verified,
        }))
    }

    fn check_grantable(&self, document: &Document) -> Result<(), Error> {
        let grantable = &self.client_rules.grantable_roles;
        let refused = document.roles.iter().find(|role| !grantable.contains(role));
        let Some(refused) = refused else {
            return Ok(());
        };
        let names: Vec<&str> = grantable.iter().map(|role| role.as_str()).collect();
        let allowed = if names.is_empty() {
            "which is empty".to_owned()
        } else {
            format!("which lists {}", names.join(", "))
        };
        let what = format!(
            "only roles of the broker's list `client_credentials.grantable_roles`, {allowed}; `{refused}` may not be \
             granted",
            refused = refused.as_str()
        );
        Err(Error::violation("roles", what))
    }

    async fn prepare_client(
        &self,
        principal: &Principal,
        call: &Call,
        new: NewClient,
        draft: &mut Draft,
    ) -> Result<Prepared, Error> {
        let now = Timestamp::now();
        let mut document = Document {
            label: new.label,
            tenant: principal.tenant().clone(),
            roles: new.roles,
            users: new.users,
            key_names: new.key_names,
            created: now,
            revoked: None,
            secrets: Vec::new(),
        };
        let id = fresh_id()?;
        draft.client(id);
        draft.grant(&document);
        if document.grant().problem().is_some() {
            let what = "at least one role; `release` only with `users` or `key_names`, and never with `admin` or `auditor`";
            return Err(Error::violation("roles", what));
        }
        self.check_grantable(&document)?;
        call.deadline.check()?;
        let (id, approval, expires) = self
            .approved_client(principal, call, id, &document, new.expires, draft)
            .await?;
        let (secret, phc) = self.fresh_secret().await?;
        document.add_secret(phc, now, expires);
        if !document.may_grow() {
            let what = "short enough that the users and key names together have at most 24 KiB";
            return Err(Error::violation("users", what));
        }
        let credential = ClientCredential {
            id,
            revision: 0,
            document,
        };
        Ok(Prepared {
            row: self.next_row(credential).await?,
            secret,
            approval,
        })
    }

    async fn fresh_secret(&self) -> Result<(PlainSecret, String), Error> {
        let no_random = || Error::new(Reason::Bug, "no random bytes");
        let secret = PlainSecret::fresh().ok_or_else(no_random)?;
        let hash = Arc::clone(&self.client_rules.hash);
        let hashing = tokio::task::spawn_blocking(move || {
            let phc = hash(secret.expose().as_bytes())?;
            Ok((secret, phc))
        });
        let failed = |source| TaskFailed::of("Argon2id", source);
        hashing.await.map_err(failed)?
    }
}

fn created(id: ClientId, document: Document, secret: PlainSecret) -> CreatedSecret {
    CreatedSecret {
        number: document.secrets.last().map_or(0, |secret| secret.number),
        client: ClientView {
            id,
            document,
            uses: Vec::new(),
            is_verified: true,
        },
        secret,
    }
}

/// Revokes an API client or one of its secrets permanently. A second revocation changes nothing and is not an error.
fn revoke(document: &mut Document, secret: Option<u32>) -> Result<(), Error> {
    let now = Some(Timestamp::now());
    let Some(number) = secret else {
        document.revoked = document.revoked.or(now);
        return Ok(());
    };
    let known = document
        .secrets
        .iter_mut()
        .find(|known| known.number == number);
    let known = known.ok_or_else(|| Error::new(Reason::KeyNotFound, format!("secret {number}")))?;
    known.revoked = known.revoked.or(now);
    Ok(())
}

fn fresh_id() -> Result<ClientId, Error> {
    let mut bytes = [0; ID_BYTES];
    rand::fill(&mut bytes).map_err(|_| Error::new(Reason::Bug, "no random bytes"))?;
    Ok(ClientId::from_bytes(bytes))
}
