//! The methods of `keybroker.v1.ControlService` for API clients.

use std::{collections::BTreeSet, str::FromStr, sync::Arc};

use base64ct::{Base64UrlUnpadded, Encoding as _};
use prost_types::Timestamp as WireTimestamp;
use tonic::{Request, Response, Status};

use keybroker_broker::{
    Broker, ClientPage, ClientView, CreatedSecret, DamagedClient, NewClient, Position, SKIPPED_MAX,
};
use keybroker_core::{
    call::Timestamp,
    client_credential::{LABEL_BYTES_MAX, Secret},
    error::Error,
    key::ClientId,
    principal::{Action, Reach, Role},
};
use keybroker_proto as proto;

use super::{
    AuthenticatedCall, MESSAGE_BYTES_MAX, convert,
    page::{self, TOKEN_BYTES_MAX},
};

const PAGE_SIZE_DEFAULT: u32 = 100;
const PAGE_SIZE_MAX: u32 = 1_000;
const USERS_MAX: usize = 1_000;
const KEY_NAMES_MAX: usize = 100;
const ALL: &str = "*";

/// Prefix of page tokens for API clients. Page tokens for user keys have a different prefix.
const TOKEN_PREFIX: &str = "c1";
/// Prefix of page tokens that contain an id and a number of rows. The next page skips this number
/// of rows, whose ids are not readable.
const TOKEN_PREFIX_WITH_SKIP: &str = "c2";

pub(super) async fn create(
    broker: &Arc<Broker>,
    request: Request<proto::CreateClientCredentialRequest>,
) -> Result<Response<proto::CreateClientCredentialResponse>, Status> {
    let entered = AuthenticatedCall::of(&request)?;
    let parsed = new_client(&request.into_inner());
    let new = entered.parsed(broker, Action::CreateClient, parsed).await?;
    let created = broker
        .create_client(&entered.principal, &entered.call, new)
        .await
        .map_err(|error| entered.status(&error))?;
    let (client_credential, secret_number, secret) = with_secret(&created);
    Ok(Response::new(proto::CreateClientCredentialResponse {
        client_credential,
        secret_number,
        secret,
    }))
}

pub(super) async fn add_secret(
    broker: &Arc<Broker>,
    request: Request<proto::AddClientSecretRequest>,
) -> Result<Response<proto::AddClientSecretResponse>, Status> {
    let entered = AuthenticatedCall::of(&request)?;
    let request = request.into_inner();
    let parsed = client_id(&request.id)
        .and_then(|id| Ok((id, expiry(request.expire_time.as_ref(), Timestamp::now())?)));
    let (id, expires) = entered.parsed(broker, Action::CreateClient, parsed).await?;
    let created = broker
        .add_client_secret(&entered.principal, &entered.call, id, expires)
        .await
        .map_err(|error| entered.status(&error))?;
    let (client_credential, secret_number, secret) = with_secret(&created);
    Ok(Response::new(proto::AddClientSecretResponse {
        client_credential,
        secret_number,
        secret,
    }))
}

pub(super) async fn list(
    broker: &Arc<Broker>,
    request: Request<proto::ListClientCredentialsRequest>,
) -> Result<Response<proto::ListClientCredentialsResponse>, Status> {
    let entered = AuthenticatedCall::of(&request)?;
    let request = request.into_inner();
    let parsed =
        page_size(request.page_size).and_then(|limit| Ok((position(&request.page_token)?, limit)));
    let (from, limit) = entered.parsed(broker, Action::ListClients, parsed).await?;
    let listed = broker
        .clients(&entered.principal, &entered.call, from, limit)
        .await
        .map_err(|error| entered.status(&error))?;
    Ok(Response::new(message(listed, MESSAGE_BYTES_MAX)))
}

pub(super) async fn revoke(
    broker: &Arc<Broker>,
    request: Request<proto::RevokeClientCredentialRequest>,
) -> Result<Response<proto::RevokeClientCredentialResponse>, Status> {
    let entered = AuthenticatedCall::of(&request)?;
    let request = request.into_inner();
    let parsed = client_id(&request.id).and_then(|id| match request.secret_number {
        Some(0) => Err(Error::violation("secret_number", "from 1, or absent")),
        number => Ok((id, number)),
    });
    let (id, number) = entered.parsed(broker, Action::RevokeClient, parsed).await?;
    let revoked = broker
        .revoke_client(&entered.principal, &entered.call, id, number)
        .await
        .map_err(|error| entered.status(&error))?;
    Ok(Response::new(proto::RevokeClientCredentialResponse {
        client_credential: Some(client(&revoked)),
    }))
}

fn new_client(request: &proto::CreateClientCredentialRequest) -> Result<NewClient, Error> {
    Ok(NewClient {
        label: label(&request.label)?,
        roles: roles(&request.roles)?,
        users: reach(&request.users, USERS_MAX, || {
            Error::violation(
                "users",
                "at most 1,000 users, each of 1 to 255 bytes without control characters, or a single \"*\"",
            )
        })?,
        key_names: reach(&request.key_names, KEY_NAMES_MAX, || {
            Error::violation(
                "key_names",
                "at most 100 key names, each of 1 to 64 bytes of [a-z0-9._-], or a single \"*\"",
            )
        })?,
        expires: expiry(request.expire_time.as_ref(), Timestamp::now())?,
    })
}

fn label(text: &str) -> Result<String, Error> {
    let is_good =
        (1..=LABEL_BYTES_MAX).contains(&text.len()) && !text.chars().any(char::is_control);
    is_good
        .then(|| text.to_owned())
        .ok_or_else(|| Error::violation("label", "1 to 128 bytes without control characters"))
}

fn roles(texts: &[String]) -> Result<BTreeSet<Role>, Error> {
    let named = |text: &String| Role::ALL.into_iter().find(|role| role.as_str() == text);
    let roles: Option<BTreeSet<Role>> = texts.iter().map(named).collect();
    roles
        .filter(|roles| !roles.is_empty() && texts.len() <= Role::ALL.len())
        .ok_or_else(|| {
            Error::violation(
                "roles",
                "1 to 5 of the roles release, enrol, lifecycle, admin and auditor",
            )
        })
}

/// Parses a list of names: all names for `*`, `None` for an empty list.
fn reach<T: Ord + FromStr>(
    texts: &[String],
    max: usize,
    violation: impl Fn() -> Error,
) -> Result<Option<Reach<T>>, Error> {
    match texts {
        [] => Ok(None),
        [all] if all == ALL => Ok(Some(Reach::All)),
        _ if texts.len() > max || texts.iter().any(|text| text == ALL) => Err(violation()),
        _ => texts
            .iter()
            .map(|text| text.parse().map_err(|_| violation()))
            .collect::<Result<_, _>>()
            .map(|named| Some(Reach::Only(named))),
    }
}

fn expiry(at: Option<&WireTimestamp>, now: Timestamp) -> Result<Option<Timestamp>, Error> {
    let Some(at) = at else { return Ok(None) };
    convert::moment(at)
        .filter(|at| *at > now)
        .map(Some)
        .ok_or_else(|| Error::violation("expire_time", "in the future and before the year 10000"))
}

fn client_id(text: &str) -> Result<ClientId, Error> {
    ClientId::from_hex(text).ok_or_else(|| Error::violation("id", "32 hexadecimal digits"))
}

fn page_size(size: u32) -> Result<u32, Error> {
    match size {
        0 => Ok(PAGE_SIZE_DEFAULT),
        size if size <= PAGE_SIZE_MAX => Ok(size),
        _ => Err(Error::violation("page_size", "at most 1,000")),
    }
}

pub(crate) fn token(next: Option<&Position<ClientId>>) -> String {
    let Some(next) = next else {
        return String::new();
    };
    let id = next.after.map_or_else(String::new, |id| id.to_string());
    let text = match next.skip {
        0 => format!("{TOKEN_PREFIX}{id}"),
        skip => format!("{TOKEN_PREFIX_WITH_SKIP}{skip}.{id}"),
    };
    Base64UrlUnpadded::encode_string(text.as_bytes())
}

pub(crate) fn position(token: &str) -> Result<Position<ClientId>, Error> {
    if token.is_empty() {
        return Ok(Position::default());
    }
    let parse = || {
        let token = (token.len() <= TOKEN_BYTES_MAX).then_some(token)?;
        let text = String::from_utf8(Base64UrlUnpadded::decode_vec(token).ok()?).ok()?;
        if let Some(id) = text.strip_prefix(TOKEN_PREFIX) {
            return Some(Some(ClientId::from_hex(id)?).into());
        }
        let (skip, id) = text.strip_prefix(TOKEN_PREFIX_WITH_SKIP)?.split_once('.')?;
        let after = if id.is_empty() {
            None
        } else {
            Some(ClientId::from_hex(id)?)
        };
        let skip = skip.parse().ok();
        let skip = skip.filter(|skip| (1..=SKIPPED_MAX).contains(skip))?;
        Some(Position { after, skip })
    };
    parse().ok_or_else(|| {
        Error::violation(
            "page_token",
            "empty or the `next_page_token` of the previous response",
        )
    })
}

/// The message for a page of API clients. The document of an API client takes at most half of a message,
/// so every page has at least one row.
fn message(page: ClientPage, bytes_max: usize) -> proto::ListClientCredentialsResponse {
    let filled = page::fill(page.rows, page.next, bytes_max, client, damaged);
    proto::ListClientCredentialsResponse {
        client_credentials: filled.rows,
        damaged: filled.damaged,
        next_page_token: token(filled.next.as_ref()),
    }
}

fn damaged(row: &DamagedClient) -> proto::DamagedClientCredential {
    proto::DamagedClientCredential {
        id: row.id.map(|id| id.to_string()).unwrap_or_default(),
        problem: row.damage.as_str().to_owned(),
    }
}

/// Copies the secret for the answer. The transport copies the secret to buffers that this code cannot
/// overwrite.
fn with_secret(created: &CreatedSecret) -> (Option<proto::ClientCredential>, u32, String) {
    let secret = created.secret.expose().to_owned();
    (Some(client(&created.client)), created.number, secret)
}

fn client(view: &ClientView) -> proto::ClientCredential {
    let document = &view.document;
    let used = |number: u32| {
        let mut uses = view.uses.iter();
        uses.find(|(of, _)| *of == number).map(|(_, at)| *at)
    };
    let roles = document.roles.iter();
    proto::ClientCredential {
        id: view.id.to_string(),
        label: document.label.clone(),
        roles: roles.map(|role| role.as_str().to_owned()).collect(),
        users: texts(document.users.as_ref()),
        key_names: texts(document.key_names.as_ref()),
        create_time: Some(convert::timestamp(document.created)),
        revoke_time: document.revoked.map(convert::timestamp),
        secrets: document
            .secrets
            .iter()
            .map(|secret| self::secret(secret, used(secret.number)))
            .collect(),
        verified: view.is_verified,
    }
}

fn secret(secret: &Secret, used: Option<Timestamp>) -> proto::ClientSecret {
    proto::ClientSecret {
        number: secret.number,
        create_time: Some(convert::timestamp(secret.created)),
        expire_time: secret.expires.map(convert::timestamp),
        revoke_time: secret.revoked.map(convert::timestamp),
        last_use_time: used.map(convert::timestamp),
    }
}

fn texts<T: Ord + AsRef<str>>(reach: Option<&Reach<T>>) -> Vec<String> {
    match reach {
        None => Vec::new(),
        Some(Reach::All) => vec![ALL.to_owned()],
        Some(Reach::Only(named)) => named.iter().map(|one| one.as_ref().to_owned()).collect(),
    }
}

#[cfg(test)]
mod tests;
