//! The state of several tokens together. The pool serves while every registered key has an available token.

use std::{collections::BTreeSet, fmt::Write as _, sync::Arc};

use keybroker_core::key::WrappingKeyId;

use crate::{KeyProblem, Serving, Token as _, TokenKey, TokenState, UnusableKey};

use super::{Member, Members};

impl Member {
    /// Whether the token contains or should contain a key.
    fn is_for(&self, key: WrappingKeyId) -> bool {
        let expected = self.supervisor.expected();
        let is_expected = expected
            .iter()
            .any(|one| one.id == key && !one.may_be_elsewhere);
        is_expected || self.supervisor.algorithm(key).is_some() || self.may_hold(key)
    }

    /// Whether the token may contain a key, because no worker has searched the token yet.
    fn may_hold(&self, key: WrappingKeyId) -> bool {
        let state = self.supervisor.state();
        let expected = self.supervisor.expected();
        state.info.is_none() && expected.iter().any(|one| one.id == key)
    }

    pub(super) fn serves(&self, key: WrappingKeyId) -> bool {
        self.supervisor.is_serving() && self.supervisor.algorithm(key).is_some()
    }

    /// Returns the reason why the token does not serve calls, or `None` if the token serves calls.
    fn problem(&self) -> Option<String> {
        let state = self.supervisor.state();
        let name = &state.name;
        match state.serving {
            Serving::Up => None,
            Serving::Down(cause) => Some(format!("token {name} is unavailable: {cause}")),
            Serving::Untrusted(cause) => Some(format!("token {name} is not trusted: {cause}")),
        }
    }
}

/// Returns the keys that no token can use, although at least one token serves calls. If a key is
/// missing from one token and untrusted on another token, the key counts as missing, because a
/// missing key may reappear.
fn unusable(tokens: &[TokenState], keys: &[TokenKey]) -> Arc<[UnusableKey]> {
    let mut found: Vec<UnusableKey> = Vec::new();
    for one in tokens.iter().flat_map(|token| token.unusable.iter()) {
        if keys.iter().any(|key| key.id == one.id) {
            continue;
        }
        match found.iter_mut().find(|known| known.id == one.id) {
            Some(known) if matches!(one.problem, KeyProblem::Missing(_)) => *known = one.clone(),
            Some(_) => {}
            None => found.push(one.clone()),
        }
    }
    found.into()
}

impl Members {
    /// Returns the keys that at least one token must contain.
    fn keys_in_use(&self) -> BTreeSet<WrappingKeyId> {
        let expected = self
            .opened
            .iter()
            .map(|member| member.supervisor.expected());
        let ids = expected.map(|keys| keys.iter().map(|key| key.id).collect::<Vec<_>>());
        ids.flatten().collect()
    }

    /// Returns the reason why no token serves a key, or `None` if a token serves the key.
    pub(super) fn unserved_cause(&self, key: WrappingKeyId) -> Option<String> {
        if self.opened.iter().any(|member| member.serves(key)) {
            return None;
        }
        let mut cause = format!("no available token has wrapping key {key}");
        let mut separator = ": ";
        for member in self.opened.iter().filter(|member| member.is_for(key)) {
            if let Some(problem) = member.problem() {
                // A write to a string cannot fail.
                let _written = write!(cause, "{separator}{problem}");
                separator = "; ";
            }
        }
        if separator == ": " {
            cause.push_str(": no token of the configuration has this key");
        }
        Some(cause)
    }

    /// Returns the common state of all tokens: `Up` unless a key needs a token that is unavailable or untrusted. If all
    /// tokens of a key are up but the key is missing from them, the result is `Up`: only the user keys under this key
    /// are affected.
    pub(super) fn serving(&self) -> Serving {
        for key in self.keys_in_use() {
            let Some(cause) = self.unserved_cause(key) else {
                continue;
            };
            let holders = self.opened.iter().filter(|member| member.is_for(key));
            let states: Vec<Serving> = holders.map(|one| one.supervisor.state().serving).collect();
            if states.iter().all(|one| *one == Serving::Up) {
                continue;
            }
            let are_untrusted = states
                .iter()
                .all(|one| matches!(one, Serving::Untrusted(_)));
            // An unavailable token may become available again without an administrator.
            return if are_untrusted {
                Serving::Untrusted(cause)
            } else {
                Serving::Down(cause)
            };
        }
        Serving::Up
    }

    /// Returns the problems of tokens while every key still has an available token.
    fn note(&self, tokens: &[TokenState]) -> Option<String> {
        let opened = self.opened.iter();
        let mut notes: Vec<String> = opened.filter_map(|member| member.problem()).collect();
        for token in tokens {
            notes.extend(
                token
                    .note
                    .iter()
                    .map(|note| format!("token {}: {note}", token.name)),
            );
        }
        notes.extend(self.unused.iter().map(|token| {
            format!(
                "token {} is not used, because no wrapping key is registered for it",
                token.name
            )
        }));
        (!notes.is_empty()).then(|| notes.join("; "))
    }

    /// Returns the state of all tokens together, with the state of each token.
    pub(super) fn current_state(&self) -> TokenState {
        if let Some(only) = self.only() {
            return only.state();
        }
        let state_of = |member: &Arc<Member>| TokenState {
            priority: member.priority,
            ..member.supervisor.state()
        };
        let tokens: Vec<TokenState> = self.opened.iter().map(state_of).collect();
        let mut keys: Vec<TokenKey> = Vec::new();
        for key in tokens.iter().flat_map(|token| token.keys.iter()) {
            if !keys.iter().any(|known| known.id == key.id) {
                keys.push(key.clone());
            }
        }
        let unusable = unusable(&tokens, &keys);
        let serving_token = tokens.iter().find(|token| token.serving == Serving::Up);
        TokenState {
            name: String::new(),
            priority: tokens.first().map_or(0, |token| token.priority),
            serving: self.serving(),
            note: self.note(&tokens),
            info: serving_token
                .or(tokens.first())
                .and_then(|token| token.info.clone()),
            assurance: None,
            keys: Arc::from(keys),
            unusable,
            workers: tokens
                .iter()
                .flat_map(|token| token.workers.clone())
                .collect(),
            queue_length: tokens.iter().map(|token| token.queue_length).sum(),
            last_self_test: tokens
                .iter()
                .filter(|token| token.serving == Serving::Up)
                .filter_map(|token| token.last_self_test)
                .min(),
            is_checking_keys: tokens
                .iter()
                .any(|token| token.serving == Serving::Up && token.is_checking_keys),
            tokens,
        }
    }
}
