//! Decides what a principal may do: the only place with such decisions; deny by default.
//!
//! The rules are policies in Cedar: those that come with the broker (`policy/default.cedar`) and those of the
//! operator, all validated against one schema before they are used. Two rules are in code, so that no file can change
//! them: a principal whose roles exclude each other may do nothing, and no principal reaches another tenant's keys.
//!
//! The set is loaded as a whole and replaced as a whole. A bad file at the start stops it; a bad one later leaves the policies
//! that are in force in place.
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
    key::{KeyAddress, KeyName, Tenant, UserId},
    metrics,
    principal::{Action, Identity, Principal, conflict},
    trusted_file,
};

mod engine;
mod error;
mod explain;
mod files;
mod problem;
mod set;
mod shape;
#[cfg(test)]
mod tests;
mod vocabulary;

pub use engine::Verdict;
pub use explain::{Applies, Explanation, PolicyView};
pub use problem::{Problem, Problems};
pub use set::{NamedPrincipal, Summary};

use set::Set;

/// No policy permits it.
const DEFAULT_DENY: &str = "default-deny";
/// Roles that exclude each other.
const SEPARATION_OF_DUTIES: &str = "separation-of-duties";
/// The key is another tenant's.
const OWN_TENANT: &str = "own-tenant";
/// The question could not be asked.
const UNASKED: &str = "unasked";
/// Names that no policy of an operator may have: they would say something else in the audit log.
const RESERVED: [&str; 4] = [DEFAULT_DENY, SEPARATION_OF_DUTIES, OWN_TENANT, UNASKED];

/// The `[policy]` section.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Whether the permits that come with the broker are in force. Its forbids always are.
    pub defaults: bool,
    /// Directory with the operator's policies, `*.cedar`.
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
    /// What is wrong with the section by itself.
    pub fn problem(&self) -> Option<String> {
        let directory = self.directory.as_deref();
        match directory {
            Some(path) if !path.is_absolute() => Some(format!(
                "[policy] `directory` is {}",
                trusted_file::not_absolute(path)
            )),
            None if !self.defaults => Some(
                "[policy]: `defaults` is false and there is no `directory`, so everything would be denied".to_owned(),
            ),
            _ => None,
        }
    }

    /// Reads and validates the policies as `serve` would.
    pub fn check(&self) -> Result<Summary, Problems> {
        Ok(Set::load(self)?.summary())
    }

    /// One remark for each file of the directory that is not read: a policy under another name than `*.cedar` has no effect.
    pub fn ignored_files(&self) -> Vec<String> {
        let remark = |name| {
            format!(
                "[policy]: {name} is not read: only files whose names end in `.cedar` are policies"
            )
        };
        files::ignored(self).into_iter().map(remark).collect()
    }

    /// The principals that the operator's policies name, each with the policy that does so. Whether they exist is not known here.
    pub fn named_principals(&self) -> Result<Vec<NamedPrincipal>, Problems> {
        Set::load(self)?.named_principals()
    }
}

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resource<'a> {
    /// One user key.
    UserKey {
        /// Owner of the record.
        tenant: &'a Tenant,
        /// Whose key it is.
        user: &'a UserId,
        /// Which of the user's keys.
        name: &'a KeyName,
    },
    /// The records of one user, or of the whole tenant.
    UserKeys {
        /// Owner of the records.
        tenant: &'a Tenant,
        /// Whose.
        user: Option<&'a UserId>,
    },
    /// The control plane.
    Broker,
}

impl Resource<'_> {
    fn tenant(&self) -> Option<&Tenant> {
        match self {
            Self::UserKey { tenant, .. } | Self::UserKeys { tenant, .. } => Some(tenant),
            Self::Broker => None,
        }
    }

    /// Whether it is what an action is about, as in the schema.
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
            _ => matches!(self, Self::Broker),
        }
    }
}

/// One question of the broker.
#[derive(Clone, Copy, Debug)]
pub struct Question<'a> {
    /// The caller.
    pub principal: &'a Principal,
    /// What the caller wants to do.
    pub action: Action,
    /// The resource of the action.
    pub resource: Resource<'a>,
    /// In which call.
    pub call: &'a Call,
}

/// All that a decision depends on. Without a principal, so that it can be made up for an explanation; a [`Permit`] takes a
/// [`Question`].
#[derive(Clone, Copy, Debug)]
pub struct Case<'a> {
    /// The caller.
    pub identity: &'a Identity,
    /// What the caller wants to do.
    pub action: Action,
    /// The resource of the action.
    pub resource: Resource<'a>,
    /// Where the connection comes from.
    pub peer: IpAddr,
    /// When.
    pub at: Timestamp,
}

/// Proof that policy allowed an action. Only [`Policy::decide`] makes one.
#[derive(Debug)]
pub struct Permit {
    policy: Arc<str>,
}

impl Permit {
    /// The policy that allowed it.
    pub fn policy(&self) -> &Arc<str> {
        &self.policy
    }
}

/// Proof that policy allowed an action on one user key. Only [`Policy::decide_key`] makes one. The read or the change that follows
/// takes the address from here alone, so a permit for one record cannot be used for another.
#[derive(Debug)]
pub struct KeyPermit {
    policy: Arc<str>,
    action: Action,
    address: KeyAddress,
}

impl KeyPermit {
    /// The policy that allowed it.
    pub fn policy(&self) -> &Arc<str> {
        &self.policy
    }

    /// What was allowed.
    pub fn action(&self) -> Action {
        self.action
    }

    /// The record that it was allowed for.
    pub fn address(&self) -> &KeyAddress {
        &self.address
    }
}

/// Policy says no.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Denied {
    policy: Arc<str>,
}

impl Denied {
    /// The policy that refused it.
    pub fn policy(&self) -> &Arc<str> {
        &self.policy
    }
}

/// The policies in force.
#[derive(Debug)]
pub struct Policy {
    settings: Settings,
    current: ArcSwap<Set>,
    watch: Mutex<Watch>,
}

/// What the last look at the files found.
#[derive(Debug, Default)]
struct Watch {
    /// What was refused, so that it is reported once and not each second.
    refused: Option<String>,
    /// Digest of new content that was seen.
    seen: Option<[u8; 32]>,
    /// Digest of content that was checked, so that it is not parsed again each second.
    checked: Option<[u8; 32]>,
}

impl Policy {
    /// Loads the policies; any problem stops the start.
    pub fn load(settings: &Settings) -> Result<Arc<Self>, Problems> {
        let set = Set::load(settings)?;
        set.report();
        Ok(Arc::new(Self {
            settings: settings.clone(),
            current: ArcSwap::from_pointee(set),
            watch: Mutex::default(),
        }))
    }

    /// Decides.
    pub fn decide(&self, question: &Question<'_>) -> Result<Permit, Denied> {
        // The APIs know the address of a caller. Without one there is no decision, rather than one for a made-up
        // address.
        let Ok(peer) = question.call.peer.parse::<SocketAddr>() else {
            keybroker_core::alert!(Bug, call_id = %question.call.id, "a call without the address of its peer");
            return Err(Denied {
                policy: UNASKED.into(),
            });
        };
        let case = Case {
            identity: question.principal.identity(),
            action: question.action,
            resource: question.resource,
            peer: peer.ip(),
            at: Timestamp::now(),
        };
        let verdict = self.evaluate(&case);
        for (policy, error) in &verdict.errors {
            metrics::POLICY_ERRORS
                .with([policy.to_string()])
                .increment(1);
            tracing::warn!(call_id = %question.call.id, %policy, %error, "a policy could not be evaluated");
        }
        let policy = verdict.policy;
        if verdict.allowed {
            Ok(Permit { policy })
        } else {
            Err(Denied { policy })
        }
    }

    /// Decides about one user key.
    pub fn decide_key(
        &self,
        principal: &Principal,
        call: &Call,
        action: Action,
        address: KeyAddress,
    ) -> Result<KeyPermit, Denied> {
        let permit = self.decide(&Question {
            principal,
            action,
            resource: Resource::UserKey {
                tenant: &address.tenant,
                user: &address.user,
                name: &address.name,
            },
            call,
        })?;
        Ok(KeyPermit {
            policy: permit.policy,
            action,
            address,
        })
    }

    /// What would be decided. Nothing can be done with the answer but to show it.
    pub fn evaluate(&self, case: &Case<'_>) -> Verdict {
        floor(case).unwrap_or_else(|| engine::evaluate(&self.current.load(), case))
    }

    /// What would be decided, and why: policy by policy.
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

    /// Takes over changed files, and keeps the policies in force when a file is invalid or missing. A change that was
    /// not announced is taken over when two looks have found the same: an editor that writes in place leaves half a
    /// file, or an empty one, for a moment, and that may be a good set without its forbids.
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
                    keybroker_core::alert!(PolicyReload, %error, "policies rejected; the previous ones stay in force");
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

/// What a look at the files found.
enum Look {
    /// What is in force.
    Same,
    /// Something that is looked at again, or was refused already.
    Waiting,
    New(Box<Set>),
}

/// What holds whatever the policies say.
fn floor(case: &Case<'_>) -> Option<Verdict> {
    // The configuration refuses such a principal; if another way to make principals forgets to, it holds here.
    if conflict(&case.identity.roles).is_some() {
        return Some(Verdict::denied(SEPARATION_OF_DUTIES));
    }
    // Policies were validated for the kind of resource that the schema gives the action, and mean nothing for another.
    if !case.resource.suits(case.action) {
        return Some(Verdict::denied(UNASKED));
    }
    // The broker takes the tenant from the principal; if it ever takes it from elsewhere, it holds here.
    match case.resource.tenant() {
        Some(tenant) if *tenant != case.identity.tenant => Some(Verdict::denied(OWN_TENANT)),
        _ => None,
    }
}
