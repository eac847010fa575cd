//! Authenticated callers, their roles, and the actions that they can request.

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

/// A named set of actions that a principal may be given. Roles that release keys and roles that administer exclude each
/// other: see [`Role::conflicts_with`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Permits releasing user keys and reading their metadata, but not enrolment, deletion or
    /// administration.
    Release,
    /// Permits creating and replacing user keys and reading their metadata, but not releasing them.
    Enrol,
    /// Permits deleting, undeleting and restoring user keys and reading their metadata, but not
    /// releasing them.
    Lifecycle,
    /// Permits reading and changing wrapping keys, reading the token state and managing API clients, but no access to user
    /// keys or their metadata.
    Admin,
    /// Permits reading the audit log, wrapping keys, token state and metadata of user keys, but no changes.
    Auditor,
    /// Permits deciding about requests of new devices for access, and ending the trust of lost devices, for the covered users. Permits
    /// the release of a user key only to the requesting device.
    Approver,
}

impl Role {
    /// All roles.
    pub const ALL: [Self; 6] = [
        Self::Release,
        Self::Enrol,
        Self::Lifecycle,
        Self::Admin,
        Self::Auditor,
        Self::Approver,
    ];

    /// As in the configuration.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Release => "release",
            Self::Enrol => "enrol",
            Self::Lifecycle => "lifecycle",
            Self::Admin => "admin",
            Self::Auditor => "auditor",
            Self::Approver => "approver",
        }
    }

    /// Whether the roles exclude each other. Administrators and auditors of the broker, and approvers of new devices, must not be
    /// able to obtain user keys (separation of duties). An approver must not read the audit log: it has the digest of the public key
    /// of a request, from which the words that the approver must hear from the member could be computed.
    pub fn conflicts_with(self, other: Self) -> bool {
        matches!(
            (self, other),
            (Self::Release, Self::Admin | Self::Auditor | Self::Approver)
                | (Self::Admin | Self::Auditor | Self::Approver, Self::Release)
                | (Self::Approver, Self::Auditor)
                | (Self::Auditor, Self::Approver)
        )
    }
}

/// The kind of a principal: a user or a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A person. A user has no role, and can use only its own keys.
    User,
    /// A program or an operator. The roles of a service limit what the service may do.
    Service,
}

/// The kind of credential with which a principal proved its identity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Credential {
    /// The client certificate of the connection.
    Certificate,
    /// An access token of an OpenID provider.
    Token,
    /// The secret of an API client.
    ClientSecret,
}

impl Credential {
    /// Name in policies and in metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Certificate => "certificate",
            Self::Token => "token",
            Self::ClientSecret => "client-secret",
        }
    }
}

/// The users or key names that a service may release: all of them, or only the listed ones.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reach<T: Ord> {
    /// All users or all key names; in the configuration `["*"]`.
    All,
    /// Only the listed users or key names.
    Only(BTreeSet<T>),
}

impl<T: Ord> Reach<T> {
    /// Whether the service may release keys of this user or with this key name.
    pub fn contains(&self, one: &T) -> bool {
        match self {
            Self::All => true,
            Self::Only(named) => named.contains(one),
        }
    }
}

/// The text that means all users or all key names.
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
                return Err(de::Error::custom(
                    "\"*\" means all, so it must be the only entry",
                ));
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
    /// The tenant whose records the service can access.
    pub tenant: Tenant,
    /// The roles, which limit what the service may do.
    pub roles: BTreeSet<Role>,
    /// The users whose keys the service may release; absent if not configured.
    pub users: Option<Reach<UserId>>,
    /// The key names that the service may release; absent if not configured.
    pub key_names: Option<Reach<KeyName>>,
}

impl Grant {
    /// Describes what is wrong with the grant.
    pub fn problem(&self) -> Option<String> {
        if self.roles.is_empty() {
            return Some("the principal has no role, so it could do nothing".to_owned());
        }
        if self.roles.contains(&Role::Auditor) && self.tenant != Tenant::default() {
            return Some(
                "the principal has the role `auditor` and a tenant, but the audit log covers all tenants: use the tenant \
                 `default`"
                    .to_owned(),
            );
        }
        if let Some((one, other)) = conflict(&self.roles) {
            let cause = if [one, other].contains(&Role::Release) {
                "administrators and auditors of the broker and approvers must not be able to obtain keys"
            } else {
                "the audit log contains the digest of the public key of each request for access, from which the words that an approver \
                 must hear from the member can be computed"
            };
            return Some(format!(
                "the principal has the roles `{}` and `{}`, but {cause}",
                one.as_str(),
                other.as_str()
            ));
        }
        if self.roles.contains(&Role::Approver) && self.users.is_none() {
            return Some(
                "the principal has the role `approver` without a limit: set `users` to the users whose requests the principal may \
                 decide, or to [\"*\"] for all"
                    .to_owned(),
            );
        }
        let is_limited = self.users.is_some() || self.key_names.is_some();
        if self.roles.contains(&Role::Release) && !is_limited {
            return Some(
                "the principal has the role `release` without a limit: set `users` or `key_names` to the users or key names \
                 that the principal may release, or to [\"*\"] for all"
                    .to_owned(),
            );
        }
        None
    }

    /// The users whose keys the service may release: all users if only key names are limited.
    pub fn users(&self) -> Reach<UserId> {
        self.users.clone().unwrap_or(Reach::All)
    }

    /// The key names that the service may release: all key names if only users are limited.
    pub fn key_names(&self) -> Reach<KeyName> {
        self.key_names.clone().unwrap_or(Reach::All)
    }
}

/// Returns two roles that exclude each other, if there are any.
pub fn conflict(roles: &BTreeSet<Role>) -> Option<(Role, Role)> {
    roles.iter().find_map(|one| {
        let other = roles.iter().find(|other| one.conflicts_with(**other))?;
        Some((*one, *other))
    })
}

/// The attributes of a credential's holder other than the name. The policies of operators can use the attributes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Claims {
    /// How the user authenticated (RFC 8176, or the provider's own values).
    pub amr: BTreeSet<String>,
    /// The class of the user's authentication (claim `acr`).
    pub acr: Option<String>,
    /// When the user authenticated.
    pub authenticated: Option<Timestamp>,
    /// The device for which the credential was issued.
    pub device: Option<String>,
    /// Organisations of the user.
    pub organisations: BTreeSet<String>,
    /// Other claims, under the names that the configuration gives them.
    pub attributes: BTreeMap<String, BTreeSet<String>>,
    /// When the credential expires.
    pub expires: Option<Timestamp>,
}

/// Everything that a verified credential states about its holder. Only the crate `auth` creates an identity.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// A stable name that is unique among the holders of all credentials: `URI:spiffe://…`, `DNS:…`,
    /// `token:<issuer>:<subject>`, `client:<id>`. At most [`NAME_BYTES_MAX`] bytes.
    pub name: String,
    /// The kind of credential that authenticated the principal.
    pub credential: Credential,
    /// User or service.
    pub kind: Kind,
    /// The tenant whose records the principal can access.
    pub tenant: Tenant,
    /// The roles, which limit what the principal may do.
    pub roles: BTreeSet<Role>,
    /// The users whose keys a service with [`Role::Release`] may release, and whose requests one with [`Role::Approver`] may decide.
    pub users: Reach<UserId>,
    /// The key names that a service with [`Role::Release`] may release.
    pub key_names: Reach<KeyName>,
    /// The user id under which the keys of a user are stored; absent for a service.
    pub subject: Option<UserId>,
    /// The `[[issuer.mapping]]` that gave the principal its kind and its roles, if one applied to its access token.
    pub mapping: Option<String>,
    /// Attributes that the policies of operators can use.
    pub claims: Claims,
}

/// Longest name of a principal, in bytes.
pub const NAME_BYTES_MAX: usize = 2_048;

/// An authenticated caller. Only the crate `auth` creates a principal, from a verified credential.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Principal(Identity);

impl Principal {
    /// Creates a principal after its credential was verified. Only the crate `auth` may call this function; the test in
    /// `tests/layers.rs` fails for a call in another crate.
    pub fn authenticated(identity: Identity) -> Self {
        debug_assert!(identity.name.len() <= NAME_BYTES_MAX);
        Self(identity)
    }

    /// All known attributes of the principal.
    pub fn identity(&self) -> &Identity {
        &self.0
    }

    /// The stable name of the principal, such as a SPIFFE id.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Whether the principal is a user or a service.
    pub fn kind(&self) -> Kind {
        self.0.kind
    }

    /// The tenant whose records the principal can access.
    pub fn tenant(&self) -> &Tenant {
        &self.0.tenant
    }

    /// Whether the principal has the role.
    pub fn has(&self, role: Role) -> bool {
        self.0.roles.contains(&role)
    }

    /// The `[[issuer.mapping]]` that gave the principal its roles, if any.
    pub fn mapping(&self) -> Option<&str> {
        self.0.mapping.as_deref()
    }

    /// The user id under which the keys of a user are stored; absent for a service.
    pub fn subject(&self) -> Option<&UserId> {
        self.0.subject.as_ref()
    }
}

impl fmt::Display for Principal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// An action that a caller requests from the broker. Each action has one name in policies, in the audit log and in
/// metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Action {
    /// Store a new user key, without the right to read a user key.
    Create,
    /// Release a user key, without the right to change it.
    Unwrap,
    /// Store the next revision of a user key, without the right to create a user key.
    Replace,
    /// Read the metadata of one record, without the right to release its user key.
    Get,
    /// Read the metadata of many records, without the right to release their user keys.
    List,
    /// Delete a record, without the right to undelete a record.
    Delete,
    /// Undelete a record, without the right to delete a record.
    Undelete,
    /// Make an earlier revision current, without the right to replace or release the user key.
    Restore,
    /// Read wrapping keys and their states.
    ReadWrappingKeys,
    /// Read the token's state.
    ReadToken,
    /// Read the audit log.
    ReadAudit,
    /// Create an API client or a secret of an API client, without the right to act as this client.
    CreateClient,
    /// Revoke an API client or one of its secrets.
    RevokeClient,
    /// Read the stored data of API clients, without the right to change them.
    ListClients,
    /// Make a new wrapping key, or return to the previous wrapping key.
    RotateKey,
    /// Activate a wrapping key, so that it wraps new user keys.
    ActivateKey,
    /// Stop the use of a wrapping key temporarily.
    SuspendKey,
    /// End the suspension of a wrapping key.
    ResumeKey,
    /// Deactivate a wrapping key, so that it unwraps but no longer wraps.
    DeactivateKey,
    /// Stop the use of a wrapping key permanently.
    CompromiseKey,
    /// Record that a missing wrapping key is lost.
    LoseKey,
    /// Schedule the destruction of a wrapping key.
    DestroyKey,
    /// Destroy a wrapping key without the waiting time.
    DestroyKeyNow,
    /// Cancel the scheduled destruction of a wrapping key.
    KeepKey,
    /// Search the tokens for copies of a wrapping key, and register the copies.
    FindKeyCopies,
    /// Start, pause and resume the move of rows to the active wrapping key, without the right to release a user key.
    Rewrap,
    /// Read the requests for approval, without the right to decide about them.
    ListApprovals,
    /// Approve the change that another person requested, without the right to make this change.
    Approve,
    /// Reject a request for approval.
    RejectApproval,
    /// Establish the trust of a device.
    EstablishDevice,
    /// Read the encrypted keys of one device.
    FetchDevice,
    /// Read the stored data of devices, without their encrypted keys.
    ListDevices,
    /// Give a device another name.
    RenameDevice,
    /// End the trust of devices.
    UntrustDevice,
    /// Report a device as lost, without the right to end its trust.
    ReportDevice,
    /// Replace the user key together with the encrypted keys of all devices. Also needs [`Action::Replace`].
    RotateDevices,
    /// Request access for a new device.
    RequestAccess,
    /// Fetch and confirm the answer to a request for access.
    FetchAccess,
    /// Read the requests for access.
    ListAccess,
    /// Approve a request for access with another device of the same member.
    ApproveAccess,
    /// Approve a request for access of another person: the token releases this person's user key, sealed to the public key of the request.
    ApproveForMember,
    /// Deny a request for access, or withdraw its approval.
    DenyAccess,
}

impl Action {
    /// All actions.
    pub const ALL: [Self; 42] = [
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
        Self::RotateKey,
        Self::ActivateKey,
        Self::SuspendKey,
        Self::ResumeKey,
        Self::DeactivateKey,
        Self::CompromiseKey,
        Self::LoseKey,
        Self::DestroyKey,
        Self::DestroyKeyNow,
        Self::KeepKey,
        Self::FindKeyCopies,
        Self::Rewrap,
        Self::ListApprovals,
        Self::Approve,
        Self::RejectApproval,
        Self::EstablishDevice,
        Self::FetchDevice,
        Self::ListDevices,
        Self::RenameDevice,
        Self::UntrustDevice,
        Self::ReportDevice,
        Self::RotateDevices,
        Self::RequestAccess,
        Self::FetchAccess,
        Self::ListAccess,
        Self::ApproveAccess,
        Self::ApproveForMember,
        Self::DenyAccess,
    ];

    /// Name in policies, in the audit log and in metrics.
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
            Self::RotateKey => "wrapping_key.rotate",
            Self::ActivateKey => "wrapping_key.activate",
            Self::SuspendKey => "wrapping_key.suspend",
            Self::ResumeKey => "wrapping_key.resume",
            Self::DeactivateKey => "wrapping_key.deactivate",
            Self::CompromiseKey => "wrapping_key.compromise",
            Self::LoseKey => "wrapping_key.lost",
            Self::DestroyKey => "wrapping_key.destroy",
            Self::DestroyKeyNow => "wrapping_key.destroy_now",
            Self::KeepKey => "wrapping_key.keep",
            Self::FindKeyCopies => "wrapping_key.find_copies",
            Self::Rewrap => "wrapping_key.rewrap",
            Self::ListApprovals => "approval.list",
            Self::Approve => "approval.approve",
            Self::RejectApproval => "approval.reject",
            Self::EstablishDevice => "device.establish",
            Self::FetchDevice => "device.fetch",
            Self::ListDevices => "device.list",
            Self::RenameDevice => "device.rename",
            Self::UntrustDevice => "device.untrust",
            Self::ReportDevice => "device.report_lost",
            Self::RotateDevices => "device.rotate",
            Self::RequestAccess => "access_request.create",
            Self::FetchAccess => "access_request.fetch",
            Self::ListAccess => "access_request.list",
            Self::ApproveAccess => "access_request.approve",
            Self::ApproveForMember => "access_request.approve_for_member",
            Self::DenyAccess => "access_request.deny",
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
        assert!(Role::Approver.conflicts_with(Role::Release));
        assert!(!Role::Approver.conflicts_with(Role::Admin));
        assert!(Role::Approver.conflicts_with(Role::Auditor));
        assert!(Role::Auditor.conflicts_with(Role::Approver));
    }
}
