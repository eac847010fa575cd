//! Changes of the list of tokens while the broker serves: tokens are added, removed and get other priorities.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use keybroker_core::{call::Deadline, key::WrappingKeyId};
use keybroker_worker_protocol::{ExpectedKey, Settings};

use crate::Supervisor;

use super::{Member, Members, Pool};

/// Longest time for the jobs of a removed token to finish.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(30);

impl Pool {
    /// Returns the wrapping keys that only the tokens outside `kept` serve at present. If these tokens were removed, no token could
    /// serve these keys.
    pub fn keys_without(&self, kept: &[Settings]) -> BTreeSet<WrappingKeyId> {
        let members = self.members();
        let (stay, leave): (Vec<_>, Vec<_>) = members.opened.iter().partition(|member| {
            let name = member.supervisor.name();
            kept.iter().any(|token| token.name == name)
        });
        let of_leaving = leave.iter().filter(|member| member.supervisor.is_serving());
        let keys = of_leaving.flat_map(|member| member.supervisor.keys());
        let is_only_there = |key: &WrappingKeyId| !stay.iter().any(|member| member.serves(*key));
        keys.filter(is_only_there).collect()
    }

    /// Replaces the list of tokens. A token that is not in the list gets no more jobs, and its workers end after their jobs. A new token
    /// is opened as soon as a key is expected on it. The other tokens keep their settings, except for the priority.
    pub fn reconfigure(&self, tokens: Vec<Settings>) {
        let lock = self.lock_changes();
        let before = self.members();
        let (mut opened, mut unused) = (Vec::new(), Vec::new());
        for token in tokens {
            match before.named(&token.name) {
                Some(member) => opened.push(member.with_priority(token.priority)),
                None => unused.push(token),
            }
        }
        let removed: Vec<Arc<Member>> = before
            .opened
            .iter()
            .filter(|member| {
                let name = member.supervisor.name();
                !opened.iter().any(|kept| kept.supervisor.name() == name)
            })
            .cloned()
            .collect();
        self.replace(opened, unused);
        drop(lock);
        for member in removed {
            let supervisor = Arc::clone(&member.supervisor);
            tracing::info!(token = %supervisor.name(), "the token was removed from the configuration; its workers end after their jobs");
            self.leaving.spawn(async move {
                supervisor.remove(Deadline::after(LEAVE_TIMEOUT)).await;
            });
        }
    }

    /// Sets the keys of one token. Opens a token that was not used until now.
    pub(super) fn expect_on(&self, token: &str, keys: Vec<ExpectedKey>) {
        let members = self.members();
        if let Some(member) = members.named(token) {
            // Without keys, an open token keeps its previous keys.
            if members.only().is_some() || !keys.is_empty() {
                member.supervisor.expect(keys);
            }
            return;
        }
        if !members.should_open(&keys) {
            return;
        }
        let _lock = self.lock_changes();
        let members = self.members();
        let Some(at) = members.unused.iter().position(|one| one.name == token) else {
            return;
        };
        let mut unused = members.unused.clone();
        let settings = unused.remove(at);
        tracing::info!(%token, "a wrapping key is expected on this token; the broker opens the token");
        let priority = settings.priority;
        let supervisor =
            Supervisor::start(settings, keys, self.program.clone(), self.state.clone());
        let mut opened = members.opened.clone();
        opened.push(Arc::new(Member::new(supervisor, priority)));
        self.replace(opened, unused);
    }

    fn replace(&self, opened: Vec<Arc<Member>>, unused: Vec<Settings>) {
        let epoch = self.members().epoch;
        let members = Members {
            epoch,
            ..Members::new(opened, unused)
        };
        self.members.store(Arc::new(members));
    }
}

impl Members {
    fn named(&self, name: &str) -> Option<&Arc<Member>> {
        let mut opened = self.opened.iter();
        opened.find(|member| member.supervisor.name() == name)
    }

    /// Whether a token on which these keys are expected must be opened. A key that may be on another token is no reason if the token
    /// on which the key was registered has shown it. A copy on a further token says nothing about the token with the original.
    fn should_open(&self, keys: &[ExpectedKey]) -> bool {
        if self.opened.is_empty() {
            return true;
        }
        let is_elsewhere = |key: &ExpectedKey| {
            key.may_be_elsewhere
                && self
                    .opened
                    .iter()
                    .any(|member| member.supervisor.is_home_of(key))
        };
        keys.iter().any(|key| !is_elsewhere(key))
    }
}

impl Member {
    fn with_priority(self: &Arc<Self>, priority: u8) -> Arc<Self> {
        if self.priority == priority {
            return Arc::clone(self);
        }
        Arc::new(Self::new(Arc::clone(&self.supervisor), priority))
    }
}

pub(super) fn warn_of_unused(token: &str) {
    tracing::warn!(
        token,
        "no wrapping key is registered for this token, so the token is not used; register a key of this token with `keybroker key \
         find-copies` or `keybroker key register`"
    );
}
