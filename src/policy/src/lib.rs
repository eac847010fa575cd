//! Policy decisions: this crate alone decides what a principal may do. An action is denied unless a policy permits it.
//!
//! The rules are Cedar policies: the policies that come with the broker (`default.cedar`) and the
//! policies of the operator. All policies are validated against the same schema before the broker
//! uses the policies. Two rules are in the code, so no file can change them. A principal with
//! conflicting roles is denied every action, and no principal has access to the keys of another
//! tenant.
//!
//! All policies are always loaded and replaced together. If a file is invalid at the start, the
//! broker does not start. If a file is invalid at a later reload, the current policies stay in
//! force.
//!
//! Mitigation: M4 of `THREAT_MODEL.md`.

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
};

use arc_swap::ArcSwap;
use serde::{Deserialize, Serialize};

use keybroker_core::{
    call::{Call, Timestamp},
    key::{Fingerprint, KeyAddress, KeyName, Tenant, UserId},
    metrics,
    principal::{Action, Identity, Principal, conflict},
    trusted_file,
};

pub mod device_approval;
mod engine;
mod error;
mod explain;
mod files;
mod kept;
mod networks;
mod problem;
mod set;
mod shape;
#[cfg(test)]
mod tests;
mod verdict;
mod vocabulary;

pub use explain::{Applies, Explanation, PolicyView};
pub use networks::{NamedNetwork, Networks};
pub use problem::{Problem, Problems};
pub use set::{NamedPrincipal, Summary};
pub use verdict::Verdict;

use set::Set;

/// The name of the decision if no policy permits the action.
pub const DEFAULT_DENY: &str = "default-deny";
/// The name of the rule against conflicting roles.
const SEPARATION_OF_DUTIES: &str = "separation-of-duties";
/// The name of the rule against keys of other tenants.
const OWN_TENANT: &str = "own-tenant";
/// The name of the decision if Cedar cannot evaluate the question.
const UNASKED: &str = "unasked";
/// Names that an operator's policy must not have, because they have another meaning in the audit log.
const RESERVED: [&str; 4] = [DEFAULT_DENY, SEPARATION_OF_DUTIES, OWN_TENANT, UNASKED];

/// The `[policy]` section.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Whether the broker's own permit policies are in force. The broker's own forbid policies are
    /// always in force.
    pub defaults: bool,
    /// The directory with the operator's policies, `*.cedar`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub directory: Option<PathBuf>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            defaults: true,
            directory: None,
        }
    }
}

impl Settings {
    /// Returns a problem of the `[policy]` section of the configuration, without reading the
    /// policies.
    pub fn problem(&self) -> Option<String> {
        let directory = self.directory.as_deref();
        match directory {
            Some(path) if !path.is_absolute() => Some(format!(
                "[policy] `directory` is {}",
                trusted_file::not_absolute(path)
            )),
            None if !self.defaults => Some(
                "[policy]: `defaults` is false and `directory` is not set, so the broker would deny every \
                 request".to_owned(),
            ),
            _ => None,
        }
    }

    /// Reads and validates the policies in the same way as `serve`.
    pub fn check(&self) -> Result<Summary, Problems> {
        Ok(Set::load(self)?.summary())
    }

    /// Returns a remark for each file of the directory that is not read because its name does not
    /// end in `.cedar`.
    pub fn ignored_files(&self) -> Vec<String> {
        let remark = |name| {
            format!(
                "[policy]: {name} is not read: only files whose names end in `.cedar` are policies"
            )
        };
        files::ignored(self).into_iter().map(remark).collect()
    }

    /// Returns the principals that the operator's policies refer to by name, each with its policy.
    /// The function does not check whether the returned principals exist.
    pub fn named_principals(&self) -> Result<Vec<NamedPrincipal>, Problems> {
        Set::load(self)?.named_principals()
    }
}

/// The resource of an action.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resource<'a> {
    /// One user key.
    UserKey {
        /// The tenant of the record.
        tenant: &'a Tenant,
        /// The user to whom the user key belongs.
        user: &'a UserId,
        /// The name that distinguishes the user keys of one user.
        name: &'a KeyName,
    },
    /// The records of one user, or of all users of a tenant.
    UserKeys {
        /// The tenant of the records.
        tenant: &'a Tenant,
        /// The user of the records; `None` for all users.
        user: Option<&'a UserId>,
    },
    /// The devices of one user, or of all users of a tenant.
    Devices {
        /// The tenant of the devices.
        tenant: &'a Tenant,
        /// The user of the devices; `None` for all users.
        user: Option<&'a UserId>,
    },
    /// A request of a new device for access.
    AccessRequest {
        /// The tenant of the request.
        tenant: &'a Tenant,
        /// The user whose device asks.
        user: &'a UserId,
        /// The principal that made the request.
        requested_by: &'a str,
        /// The type of the device, as its app states it.
        device_type: &'a str,
        /// The address from which the request came.
        peer: IpAddr,
        /// The name of the network of this address; empty if no network contains it.
        place: &'a str,
    },
    /// The control plane.
    Broker,
}

impl Resource<'_> {
    fn tenant(&self) -> Option<&Tenant> {
        match self {
            Self::UserKey { tenant, .. }
            | Self::UserKeys { tenant, .. }
            | Self::Devices { tenant, .. }
            | Self::AccessRequest { tenant, .. } => Some(tenant),
            Self::Broker => None,
        }
    }

    /// Whether the schema allows this kind of resource for an action.
    fn suits(&self, action: Action) -> bool {
        match action {
            Action::Create
            | Action::Unwrap
            | Action::Replace
            | Action::Get
            | Action::Delete
            | Action::Undelete
            | Action::Restore => matches!(self, Self::UserKey { .. }),
            Action::List => matches!(self, Self::UserKeys { .. }),
            Action::ApproveAccess | Action::ApproveForMember | Action::DenyAccess => {
                matches!(self, Self::AccessRequest { .. })
            }
            Action::EstablishDevice
            | Action::FetchDevice
            | Action::ListDevices
            | Action::RenameDevice
            | Action::UntrustDevice
            | Action::ReportDevice
            | Action::RotateDevices
            | Action::RequestAccess
            | Action::FetchAccess
            | Action::ListAccess => matches!(self, Self::Devices { .. }),
            _ => matches!(self, Self::Broker),
        }
    }
}

/// The form in which a user key leaves the broker.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Release {
    /// The caller receives the user key in plain text, inside TLS.
    #[default]
    Plain,
    /// The token encrypts the user key to the public key with this fingerprint.
    Sealed(Fingerprint),
}

/// The broker's question whether a call is allowed.
#[derive(Clone, Copy, Debug)]
pub struct Question<'a> {
    /// The caller.
    pub principal: &'a Principal,
    /// The action that the caller requests.
    pub action: Action,
    /// The resource of the action.
    pub resource: Resource<'a>,
    /// The form of a release; other actions ignore it.
    pub release: Release,
    /// The call that requests the action.
    pub call: &'a Call,
}

/// The data on which a policy decision is based: caller, action, resource, address and time. A case
/// contains an [`Identity`] instead of a [`Principal`], so that an explanation can use the identity
/// of a caller who does not exist. Only a decision about a [`Question`] can create a [`Permit`].
#[derive(Clone, Copy, Debug)]
pub struct Case<'a> {
    /// The caller.
    pub identity: &'a Identity,
    /// The action that the caller requests.
    pub action: Action,
    /// The resource of the action.
    pub resource: Resource<'a>,
    /// The form of a release; other actions ignore it.
    pub release: Release,
    /// The address of the connection's peer.
    pub peer: IpAddr,
    /// The name of the network of this address; empty if no network contains it.
    pub place: &'a str,
    /// The time of the call.
    pub at: Timestamp,
}

/// Proof that a policy allowed an action. Only [`Policy::decide`] creates a `Permit`.
#[derive(Debug)]
pub struct Permit {
    policy: Arc<str>,
}

impl Permit {
    /// The policy that allowed the action.
    pub fn policy(&self) -> &Arc<str> {
        &self.policy
    }
}

/// Proof that a policy allowed an action on one user key. Only the functions of [`Policy`] create a
/// `KeyPermit`. Functions that read or change the record take the record's address only from this
/// permit. Therefore a permit for one record cannot be used for another record.
#[derive(Debug)]
pub struct KeyPermit {
    policy: Arc<str>,
    action: Action,
    address: KeyAddress,
    release: Release,
}

impl KeyPermit {
    /// The policy that allowed the action.
    pub fn policy(&self) -> &Arc<str> {
        &self.policy
    }

    /// The action that was allowed.
    pub fn action(&self) -> Action {
        self.action
    }

    /// The address for which the action was allowed.
    pub fn address(&self) -> &KeyAddress {
        &self.address
    }

    /// The only form of a release that was allowed.
    pub fn release(&self) -> Release {
        self.release
    }
}

/// The denial of an action.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Denied {
    policy: Arc<str>,
}

impl Denied {
    /// The policy that denied the action.
    pub fn policy(&self) -> &Arc<str> {
        &self.policy
    }
}

/// The policies in force.
#[derive(Debug)]
pub struct Policy {
    settings: Settings,
    networks: Networks,
    current: ArcSwap<Set>,
    watch: Mutex<Watch>,
}

/// The results of the last check of the files.
#[derive(Debug, Default)]
struct Watch {
    /// The problem that was reported last, so that the same problem is not reported every second.
    refused: Option<String>,
    /// Digest of new content that the last check found for the first time.
    seen: Option<[u8; 32]>,
    /// Digest of the content that was validated last, so that the same content is not parsed again every second.
    checked: Option<[u8; 32]>,
}

impl Policy {
    /// Loads the policies; fails if any policy or file has a problem. `networks` give the places of addresses.
    pub fn load(settings: &Settings, networks: Networks) -> Result<Arc<Self>, Problems> {
        let set = Set::load(settings)?;
        set.report();
        Ok(Arc::new(Self {
            settings: settings.clone(),
            networks,
            current: ArcSwap::from_pointee(set),
            watch: Mutex::default(),
        }))
    }

    /// The place of the peer of a connection: the name of the network of its address. Returns an empty string if no network
    /// contains the address, or if the peer has no address.
    pub fn place_of(&self, peer: &str) -> &str {
        let address = peer.parse::<SocketAddr>().map(|peer| peer.ip());
        address.map_or("", |address| self.networks.place_of(address))
    }

    /// Decides whether an action is allowed.
    pub fn decide(&self, question: &Question<'_>) -> Result<Permit, Denied> {
        // The APIs set the address of every caller. If the address is missing, the action is
        // denied, because a decision for a default address could be wrong.
        let Ok(peer) = question.call.peer.parse::<SocketAddr>() else {
            keybroker_core::alert!(Bug, call_id = %question.call.id, "a call has no peer address");
            return Err(Denied {
                policy: UNASKED.into(),
            });
        };
        let case = Case {
            identity: question.principal.identity(),
            action: question.action,
            resource: question.resource,
            release: question.release,
            peer: peer.ip(),
            place: self.networks.place_of(peer.ip()),
            at: Timestamp::now(),
        };
        let verdict = floor(&case).unwrap_or_else(|| engine::decide(&self.current.load(), &case));
        for (policy, error) in &verdict.errors {
            metrics::POLICY_ERRORS
                .with([policy.to_string()])
                .increment(1);
            tracing::warn!(call_id = %question.call.id, %policy, %error, "cannot evaluate a policy");
        }
        let policy = verdict.policy;
        if verdict.allowed {
            Ok(Permit { policy })
        } else {
            Err(Denied { policy })
        }
    }

    /// Decides whether an action on one user key is allowed. A release is plain.
    pub fn decide_key(
        &self,
        principal: &Principal,
        call: &Call,
        action: Action,
        address: KeyAddress,
    ) -> Result<KeyPermit, Denied> {
        self.decide_release(principal, call, action, address, Release::Plain)
    }

    /// Decides whether an action on one user key is allowed, with a release in this form.
    pub fn decide_release(
        &self,
        principal: &Principal,
        call: &Call,
        action: Action,
        address: KeyAddress,
        release: Release,
    ) -> Result<KeyPermit, Denied> {
        let permit = self.decide(&Question {
            principal,
            action,
            resource: Resource::UserKey {
                tenant: &address.tenant,
                user: &address.user,
                name: &address.name,
            },
            release,
            call,
        })?;
        Ok(KeyPermit {
            policy: permit.policy,
            action,
            address,
            release,
        })
    }

    /// Decides whether an approver may let the token release the user key of another person, sealed to the public key of this person's
    /// request for access. The policies see the request as the resource. `address` must be the requested user key.
    pub fn decide_for_member(
        &self,
        question: &Question<'_>,
        address: KeyAddress,
    ) -> Result<KeyPermit, Denied> {
        let is_of_request = match question.resource {
            Resource::AccessRequest { tenant, user, .. } => {
                *tenant == address.tenant && *user == address.user
            }
            _ => false,
        };
        if !is_of_request || question.release == Release::Plain {
            return Err(Denied {
                policy: UNASKED.into(),
            });
        }
        let permit = self.decide(question)?;
        Ok(KeyPermit {
            policy: permit.policy,
            action: question.action,
            address,
            release: question.release,
        })
    }

    /// Decides whether a member may rotate the user key with a trusted device. The permit is for the replacement of this user key. The
    /// policies see only the rotation: the signature of a trusted device protects it, so a policy can forbid `user_key.replace` for
    /// access tokens and still allow rotations.
    pub fn decide_rotation(
        &self,
        principal: &Principal,
        call: &Call,
        address: KeyAddress,
    ) -> Result<KeyPermit, Denied> {
        let permit = self.decide(&Question {
            principal,
            action: Action::RotateDevices,
            resource: Resource::Devices {
                tenant: &address.tenant,
                user: Some(&address.user),
            },
            release: Release::Plain,
            call,
        })?;
        Ok(KeyPermit {
            policy: permit.policy,
            action: Action::Replace,
            address,
            release: Release::Plain,
        })
    }

    /// Returns the decision for a case. This decision is only for display: it is not a [`Permit`],
    /// so it cannot authorise an action.
    pub fn evaluate(&self, case: &Case<'_>) -> Verdict {
        floor(case).unwrap_or_else(|| engine::evaluate(&self.current.load(), case))
    }

    /// Returns the decision for a case, and the reason from each policy.
    pub fn explain(&self, case: &Case<'_>) -> Explanation {
        let policies = match floor(case) {
            Some(_) => Vec::new(),
            None => explain::explain(&self.current.load(), case),
        };
        Explanation {
            verdict: self.evaluate(case),
            policies,
        }
    }

    /// Loads changed files. If a file is invalid or missing, the current policies stay in force.
    /// Without a SIGHUP, a change is loaded only after two checks found the same content. While an
    /// editor writes a file in place, the file is empty or incomplete for a moment. An incomplete
    /// file may be valid but lack the forbid policies.
    pub fn reload(&self, announced: bool) {
        let mut watch = self.watch.lock().unwrap_or_else(PoisonError::into_inner);
        if announced {
            *watch = Watch::default();
        }
        match self.look(announced, &mut watch) {
            Ok(Look::Waiting) => {}
            Ok(Look::Same) => *watch = Watch::default(),
            Ok(Look::New(set)) => {
                *watch = Watch::default();
                set.report();
                let digest = hex::encode(set.digest());
                let Summary {
                    permits,
                    forbids,
                    files,
                } = set.summary();
                self.current.store(Arc::from(set));
                tracing::info!(permits, forbids, files, %digest, "policies reloaded");
            }
            Err(problems) => {
                let error = problems.to_string();
                if watch.refused.as_ref() != Some(&error) {
                    keybroker_core::alert!(PolicyReload, %error, "policies rejected; the previous policies stay in force");
                    watch.refused = Some(error);
                }
            }
        }
    }

    fn look(&self, announced: bool, watch: &mut Watch) -> Result<Look, Problems> {
        let current = self.current.load();
        let sources = files::read(&self.settings)?;
        let digest = files::digest(&sources);
        if digest == *current.digest() {
            return Ok(Look::Same);
        }
        if watch.checked == Some(digest) {
            return Ok(Look::Waiting);
        }
        if !announced && watch.seen.replace(digest) != Some(digest) {
            return Ok(Look::Waiting);
        }
        watch.checked = Some(digest);
        current.check_none_is_gone(&sources)?;
        Set::build(&self.settings, &sources).map(|set| Look::New(Box::new(set)))
    }
}

/// The result of a check of the files.
enum Look {
    /// The files are equal to the files in force.
    Same,
    /// The files have changed. The changed files will be checked again later, or were already
    /// rejected.
    Waiting,
    New(Box<Set>),
}

/// The rules in the code, which apply regardless of the policies.
fn floor(case: &Case<'_>) -> Option<Verdict> {
    // The configuration already refuses a principal with conflicting roles. Principals that do not
    // come from the configuration are checked here.
    if conflict(&case.identity.roles).is_some() {
        return Some(Verdict::denied(SEPARATION_OF_DUTIES));
    }
    // A policy is validated for the kind of resource that the schema allows for the action. For another kind of
    // resource, the result of the policy would be undefined.
    if !case.resource.suits(case.action) {
        return Some(Verdict::denied(UNASKED));
    }
    // The broker takes the tenant of most resources from the principal. This check is for a resource
    // whose tenant comes from a stored row.
    match case.resource.tenant() {
        Some(tenant) if *tenant != case.identity.tenant => Some(Verdict::denied(OWN_TENANT)),
        _ => None,
    }
}
