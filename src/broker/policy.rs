//! May this principal do that? The one place that answers; deny by default.
//!
//! | action | roles |
//! |---|---|
//! | `user_key.unwrap` | release |
//! | `user_key.create`, `replace` | enrol |
//! | `user_key.delete`, `undelete`, `restore` | lifecycle |
//! | `user_key.get`, `list` | release, enrol, lifecycle, auditor |
//! | `wrapping_key.read`, `token.read` | admin, auditor |
//! | `audit.read` | auditor |
//!
//! Mitigation: M4 of `THREAT_MODEL.md`.

use crate::principal::{Action, Principal, Role, conflict};

/// Proof that policy allowed an action. Only [`decide`] makes one.
#[derive(Debug)]
pub struct Permit {
    policy: &'static str,
}

impl Permit {
    /// The policy that allowed it.
    pub fn policy(&self) -> &'static str {
        self.policy
    }
}

/// Policy says no.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Denied {
    /// The policy that refused it.
    pub policy: &'static str,
}

/// Decides. A principal whose roles conflict may do nothing at all: the configuration refuses one, and if another way to
/// make principals forgets to, the separation of duties still holds here.
pub fn decide(principal: &Principal, action: Action) -> Result<Permit, Denied> {
    if conflict(&principal.identity().roles).is_some() {
        return Err(Denied {
            policy: "separation-of-duties",
        });
    }
    let (policy, roles) = rule(action);
    if roles.iter().any(|role| principal.has(*role)) {
        Ok(Permit { policy })
    } else {
        Err(Denied {
            policy: "default-deny",
        })
    }
}

fn rule(action: Action) -> (&'static str, &'static [Role]) {
    use Role::{Admin, Auditor, Enrol, Lifecycle, Release};
    match action {
        Action::Unwrap => ("release-role", &[Release]),
        Action::Create | Action::Replace => ("enrol-role", &[Enrol]),
        Action::Delete | Action::Undelete | Action::Restore => ("lifecycle-role", &[Lifecycle]),
        Action::Get | Action::List => ("metadata-roles", &[Release, Enrol, Lifecycle, Auditor]),
        Action::ReadWrappingKeys | Action::ReadToken => ("control-roles", &[Admin, Auditor]),
        Action::ReadAudit => ("auditor-role", &[Auditor]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(roles: &[Role]) -> Principal {
        Principal::service("test", roles)
    }

    /// Every cell of roles times actions, spelled out: a change of policy must change this table.
    #[test]
    fn every_role_and_action_has_an_expected_answer() {
        use Role::{Admin, Auditor, Enrol, Lifecycle, Release};
        // Columns: create unwrap replace get list delete undelete restore keys token audit
        let matrix: [(&[Role], &str); 8] = [
            (&[], "-----------"),
            (&[Release], "-u-gl------"),
            (&[Enrol], "c-rgl------"),
            (&[Lifecycle], "---gldxs---"),
            (&[Admin], "--------kt-"),
            (&[Auditor], "---gl---kta"),
            (&[Release, Enrol, Lifecycle], "curgldxs---"),
            (&[Release, Admin], "-----------"),
        ];
        for (roles, expected) in matrix {
            let principal = with(roles);
            let actual: Vec<bool> = Action::ALL
                .into_iter()
                .map(|action| decide(&principal, action).is_ok())
                .collect();
            let expected: Vec<bool> = expected.chars().map(|cell| cell != '-').collect();
            assert_eq!(actual, expected, "{roles:?}");
        }
    }

    #[test]
    fn a_refusal_names_its_policy() {
        let admin = decide(&with(&[Role::Admin]), Action::Unwrap);
        assert_eq!(admin.unwrap_err().policy, "default-deny");
        let both = decide(&with(&[Role::Release, Role::Auditor]), Action::Unwrap);
        assert_eq!(both.unwrap_err().policy, "separation-of-duties");
    }
}
