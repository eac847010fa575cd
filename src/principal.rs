//! Who calls, and what they may ask for.

use std::{collections::BTreeSet, fmt};

use serde::{Deserialize, Serialize};

use crate::key::Tenant;

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

    /// Separation of duties: whoever administers the broker, or audits it, must not also be able to obtain keys.
    pub fn conflicts_with(self, other: Self) -> bool {
        let pair = [self, other];
        pair.contains(&Self::Release)
            && (pair.contains(&Self::Admin) || pair.contains(&Self::Auditor))
    }
}

/// An authenticated caller. Only `auth/` makes one from a credential; the command line makes the local operator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Principal {
    name: String,
    tenant: Tenant,
    roles: BTreeSet<Role>,
}

impl Principal {
    /// For `auth/` alone, after a credential was verified. `scripts/check.sh` refuses any other caller.
    pub(crate) fn authenticated(name: String, tenant: Tenant, roles: BTreeSet<Role>) -> Self {
        Self {
            name,
            tenant,
            roles,
        }
    }

    /// Stable name: the identity in the credential, such as a SPIFFE id.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whose records it can reach.
    pub fn tenant(&self) -> &Tenant {
        &self.tenant
    }

    /// Whether it has the role.
    pub fn has(&self, role: Role) -> bool {
        self.roles.contains(&role)
    }
}

impl fmt::Display for Principal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
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
}

impl Action {
    /// All actions.
    pub const ALL: [Self; 11] = [
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
