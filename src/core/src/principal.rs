//! Who calls, and what they may ask for.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    str::FromStr,
};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::{
    call::Timestamp,
    error::Error,
    key::{KeyName, Tenant, UserId},
};

/// What a principal may do at most. Roles that release and roles that administer exclude each other: see
/// [`Role::conflicts_with`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Unwraps user keys, reads their metadata. Does not enrol, delete or administer.
    Release,
    /// Creates and replaces user keys, reads their metadata. Does not unwrap.
    Enrol,
    /// Deletes, undeletes and restores user keys, reads their metadata. Does not unwrap.
    Lifecycle,
    /// Reads wrapping keys and token state. Touches no user key, not even its metadata.
    Admin,
    /// Reads the audit log, wrapping keys, token state and metadata of user keys. Changes nothing.
    Auditor,
}

impl Role {
    /// All roles.
    pub const ALL: [Self; 5] = [
        Self::Release,
        Self::Enrol,
        Self::Lifecycle,
        Self::Admin,
        Self::Auditor,
    ];

    /// As in the configuration.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Release => "release",
            Self::Enrol => "enrol",
            Self::Lifecycle => "lifecycle",
            Self::Admin => "admin",
            Self::Auditor => "auditor",
        }
    }

    /// Separation of duties: administrators and auditors of the broker must not also be able to obtain keys.
    pub fn conflicts_with(self, other: Self) -> bool {
        let pair = [self, other];
        pair.contains(&Self::Release)
            && (pair.contains(&Self::Admin) || pair.contains(&Self::Auditor))
    }
}

/// What kind of caller a principal is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A person: has no role, and reaches its own keys alone.
    User,
    /// A program or an operator: reaches what its roles allow.
    Service,
}

/// How a principal showed who it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Credential {
    /// The client certificate of the connection.
    Certificate,
    /// A bearer token of an OpenID provider.
    Token,
    /// The secret of an API client.
    ClientSecret,
}

impl Credential {
    /// Name in policy and metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Certificate => "certificate",
            Self::Token => "token",
            Self::ClientSecret => "client-secret",
        }
    }
}

/// The users or key names that a service may release: all, or those listed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reach<T: Ord> {
    /// Any; in the configuration `["*"]`.
    All,
    /// Those, and no other.
    Only(BTreeSet<T>),
}

impl<T: Ord> Reach<T> {
    /// Whether one is within reach.
    pub fn contains(&self, one: &T) -> bool {
        match self {
            Self::All => true,
            Self::Only(named) => named.contains(one),
        }
    }
}

/// All of them, as text.
const ALL: &str = "*";

impl<T: Ord + AsRef<str>> Serialize for Reach<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::All => serializer.collect_seq([ALL]),
            Self::Only(named) => serializer.collect_seq(named.iter().map(AsRef::as_ref)),
        }
    }
}

impl<'de, T: Ord + FromStr<Err = Error>> Deserialize<'de> for Reach<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let texts = BTreeSet::<String>::deserialize(deserializer)?;
        if texts.contains(ALL) {
            if texts.len() > 1 {
                return Err(de::Error::custom("\"*\" is all: it stands alone"));
            }
            return Ok(Self::All);
        }
        let parsed = texts.iter().map(|text| text.parse());
        parsed
            .collect::<Result<_, Error>>()
            .map(Self::Only)
            .map_err(|error| de::Error::custom(error.detail()))
    }
}

/// The rights of a service, from the configuration or from its API client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    /// Whose records it can reach.
    pub tenant: Tenant,
    /// What it may do at most.
    pub roles: BTreeSet<Role>,
    /// Whose keys it may release; absent when not set.
    pub users: Option<Reach<UserId>>,
    /// Which of their keys; absent when not set.
    pub key_names: Option<Reach<KeyName>>,
}

impl Grant {
    /// What is wrong with it: the sentence follows the name of the service.
    pub fn problem(&self) -> Option<String> {
        if self.roles.is_empty() {
            return Some("has no role, so it could do nothing".to_owned());
        }
        if self.roles.contains(&Role::Auditor) && self.tenant != Tenant::default() {
            return Some(
                "has the role `auditor` and a tenant: the audit log is that of all tenants, so an auditor has none"
                    .to_owned(),
            );
        }
        if let Some((one, other)) = conflict(&self.roles) {
            return Some(format!(
                "has the roles `{}` and `{}`: administrators and auditors of the broker must not be able to obtain keys",
                one.as_str(),
                other.as_str()
            ));
        }
        let is_limited = self.users.is_some() || self.key_names.is_some();
        if self.roles.contains(&Role::Release) && !is_limited {
            return Some(
                "has the role `release`: name the `users` or the `key_names` that it may release, or say [\"*\"] for all"
                    .to_owned(),
            );
        }
        None
    }

    /// Whose keys it may release: all where only key names were named.
    pub fn users(&self) -> Reach<UserId> {
        self.users.clone().unwrap_or(Reach::All)
    }

    /// Which of their keys: all where only users were named.
    pub fn key_names(&self) -> Reach<KeyName> {
        self.key_names.clone().unwrap_or(Reach::All)
    }
}

/// Two roles that exclude each other.
pub fn conflict(roles: &BTreeSet<Role>) -> Option<(Role, Role)> {
    roles.iter().find_map(|one| {
        let other = roles.iter().find(|other| one.conflicts_with(**other))?;
        Some((*one, *other))
    })
}

/// The attributes of a credential's holder beyond the name: for policies of operators.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Claims {
    /// How the user authenticated (RFC 8176, or the provider's own words).
    pub amr: BTreeSet<String>,
    /// Class of that authentication.
    pub acr: Option<String>,
    /// When the user authenticated.
    pub authenticated: Option<Timestamp>,
    /// The device that the credential is for.
    pub device: Option<String>,
    /// Organisations of the user.
    pub organisations: BTreeSet<String>,
    /// Other claims by the names that the configuration gives them.
    pub attributes: BTreeMap<String, BTreeSet<String>>,
    /// When the credential ends.
    pub expires: Option<Timestamp>,
}

/// Everything that a verified credential states about its holder. Only `auth/` fills one in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Stable, and different for each holder of any credential: `URI:spiffe://…`, `DNS:…`, `token:<issuer>:<subject>`,
    /// `client:<id>`. At most [`NAME_BYTES_MAX`] bytes.
    pub name: String,
    /// The kind of credential that authenticated the principal.
    pub credential: Credential,
    /// User or service.
    pub kind: Kind,
    /// Whose records it can reach.
    pub tenant: Tenant,
    /// What it may do at most.
    pub roles: BTreeSet<Role>,
    /// Whose keys a service with [`Role::Release`] may release.
    pub users: Reach<UserId>,
    /// Which of their keys.
    pub key_names: Reach<KeyName>,
    /// Of a user: the user id under which its own keys are stored.
    pub subject: Option<UserId>,
    /// For policies of operators.
    pub claims: Claims,
}

/// Longest name of a principal, in bytes.
pub const NAME_BYTES_MAX: usize = 2_048;

/// An authenticated caller. Only `auth/` makes one, from a credential.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Principal(Identity);

impl Principal {
    /// For `auth/` alone, after a credential was verified. `tests/layers.rs` refuses any other caller.
    pub fn authenticated(identity: Identity) -> Self {
        debug_assert!(identity.name.len() <= NAME_BYTES_MAX);
        Self(identity)
    }

    /// All that is known of it.
    pub fn identity(&self) -> &Identity {
        &self.0
    }

    /// Stable name: the identity in the credential, such as a SPIFFE id.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// What kind of caller it is.
    pub fn kind(&self) -> Kind {
        self.0.kind
    }

    /// Whose records it can reach.
    pub fn tenant(&self) -> &Tenant {
        &self.0.tenant
    }

    /// Whether it has the role.
    pub fn has(&self, role: Role) -> bool {
        self.0.roles.contains(&role)
    }

    /// Of a user: the user id under which its own keys are stored.
    pub fn subject(&self) -> Option<&UserId> {
        self.0.subject.as_ref()
    }
}

impl fmt::Display for Principal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What is asked of the broker. Each action has one name in policy, audit and metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Action {
    /// Store a new user key. Does not imply reading one.
    Create,
    /// Release a user key. Does not imply any change.
    Unwrap,
    /// Store the next revision. Does not imply create.
    Replace,
    /// Read one record's metadata. Does not imply unwrap.
    Get,
    /// Read many records' metadata. Does not imply unwrap.
    List,
    /// Delete a record. Does not imply undelete.
    Delete,
    /// Undelete a record. Does not imply delete.
    Undelete,
    /// Make an earlier revision current. Does not imply replace or unwrap.
    Restore,
    /// Read wrapping keys and their states.
    ReadWrappingKeys,
    /// Read the token's state.
    ReadToken,
    /// Read the audit log.
    ReadAudit,
    /// Make an API client, or a secret for one. Does not imply the use of it.
    CreateClient,
    /// Revoke an API client or one of its secrets.
    RevokeClient,
    /// Read what is known of API clients. Does not imply a change.
    ListClients,
}

impl Action {
    /// All actions.
    pub const ALL: [Self; 14] = [
        Self::Create,
        Self::Unwrap,
        Self::Replace,
        Self::Get,
        Self::List,
        Self::Delete,
        Self::Undelete,
        Self::Restore,
        Self::ReadWrappingKeys,
        Self::ReadToken,
        Self::ReadAudit,
        Self::CreateClient,
        Self::RevokeClient,
        Self::ListClients,
    ];

    /// Name in policy, audit and metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Create => "user_key.create",
            Self::Unwrap => "user_key.unwrap",
            Self::Replace => "user_key.replace",
            Self::Get => "user_key.get",
            Self::List => "user_key.list",
            Self::Delete => "user_key.delete",
            Self::Undelete => "user_key.undelete",
            Self::Restore => "user_key.restore",
            Self::ReadWrappingKeys => "wrapping_key.read",
            Self::ReadToken => "token.read",
            Self::ReadAudit => "audit.read",
            Self::CreateClient => "client_credential.create",
            Self::RevokeClient => "client_credential.revoke",
            Self::ListClients => "client_credential.list",
        }
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn release_excludes_administration_and_audit() {
        assert!(Role::Release.conflicts_with(Role::Admin));
        assert!(Role::Auditor.conflicts_with(Role::Release));
        assert!(!Role::Release.conflicts_with(Role::Enrol));
        assert!(!Role::Admin.conflicts_with(Role::Auditor));
    }
}
