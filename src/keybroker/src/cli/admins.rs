//! The tokens that are used by a command that reads a complete database. Rows can belong to keys on
//! several tokens, so the command logs in to each token.

use std::{
    cell::RefCell,
    collections::{HashMap, HashSet},
};

use keybroker_core::{
    envelope::{Mac, mac::MacMessage},
    key::{WrappingKeyId, WrappingKeyState},
};
use keybroker_hsm::{Settings, admin::Admin};
use keybroker_worker_protocol::PinSource;

use crate::{config::Config, places::Registry};

use super::{
    Context,
    exit::{Exit, Failure},
    pin::{UserPin, log_in, serials},
    token,
};

/// The configuration and the source of the PIN for each token of a command.
#[derive(Debug)]
pub(super) struct Logins(Vec<(Config, PinSource)>);

impl Logins {
    /// The tokens of the command: the token that `--token` selects, or all tokens without this
    /// option. A PIN option on the command line applies to one token only.
    pub(super) fn of(context: &Context, pin: &UserPin) -> Result<Self, Failure> {
        let config = context.config_for_tokens()?;
        if !config.tokens.are_several() || context.token.is_some() {
            let source = pin.get(config.token())?;
            return Ok(Self(vec![(config, source)]));
        }
        if pin.is_given() {
            return Err(Failure::new(
                Exit::Usage,
                "the configuration has several tokens, and the PIN on the command line is the PIN of one token: pass \
                 `--token` with the name of the token, or set `pin_file` for each token",
            ));
        }
        let mut logins = Vec::new();
        for entry in config.tokens.all() {
            let mut selected = config.clone();
            selected.select_token(Some(&entry.name))?;
            logins.push((selected, pin.get(entry)?));
        }
        Ok(Self(logins))
    }

    /// The configuration of the command.
    pub(super) fn config(&self) -> Result<&Config, Failure> {
        let first = self.0.first().map(|(config, _)| config);
        first.ok_or_else(|| Failure::new(Exit::Configuration, "the configuration has no token"))
    }

    /// Logs in to the tokens. If one of several tokens cannot be used, the command prints a warning
    /// and continues without this token, because another token may have the same keys.
    pub(super) fn log_in(&self, context: &Context, registry: &Registry) -> Result<Admins, Failure> {
        let mut admins = Admins {
            opened: Vec::new(),
            at: RefCell::default(),
        };
        for (config, pin) in &self.0 {
            match log_in(config, pin, false, &serials(&registry.rows)) {
                Ok(admin) => admins.opened.push(Opened {
                    settings: config.token().clone(),
                    is_one_of_several: config.tokens.are_several(),
                    admin,
                }),
                Err(failure) if self.0.len() > 1 => {
                    let name = &config.token().name;
                    context
                        .output
                        .note(&format!("warning: token {name} is not used: {failure}"));
                }
                Err(failure) => return Err(failure),
            }
        }
        Ok(admins)
    }
}

/// Tokens to which admin workers have logged in.
#[derive(Debug)]
pub(super) struct Admins {
    opened: Vec<Opened>,
    /// The index in `opened` of the token that verifies the rows of each key.
    at: RefCell<HashMap<WrappingKeyId, usize>>,
}

#[derive(Debug)]
struct Opened {
    settings: Settings,
    is_one_of_several: bool,
    admin: Admin,
}

impl Opened {
    /// Checks the registered keys of this token. Returns the problems that were found, and the keys
    /// without problems.
    fn check(&self, registry: &Registry) -> Result<(Vec<String>, Vec<WrappingKeyId>), Failure> {
        let serial = &self.admin.info().serial;
        let keys = registry.needed_on(&self.settings, serial, self.is_one_of_several);
        self.admin
            .know(keys.iter().map(|key| (key.row.id, key.objects())))?;
        let (mut problems, mut good) = (Vec::new(), Vec::new());
        for key in keys {
            let id = key.row.id;
            let found = match self.admin.check(id) {
                Ok(checked) => {
                    let mut found = token::compare(&self.admin, &key, &checked)?;
                    found.extend(checked.problem);
                    found
                }
                Err(error) => vec![format!("key {id}: {error}")],
            };
            if found.is_empty() {
                good.push(id);
            }
            problems.extend(found);
        }
        if self.is_one_of_several {
            let name = &self.settings.name;
            problems = problems
                .into_iter()
                .map(|what| format!("token {name}: {what}"))
                .collect();
        }
        Ok((problems, good))
    }
}

impl Admins {
    /// Checks every registered key that has not been destroyed. Prints each problem as a warning
    /// and returns the keys that no token can use. The command cannot check rows under keys that no
    /// token can use. Fails if no key can be used.
    pub(super) fn check_registry(
        &self,
        context: &Context,
        registry: &Registry,
    ) -> Result<HashSet<WrappingKeyId>, Failure> {
        let mut problems = Vec::new();
        let mut at = HashMap::new();
        for (number, opened) in self.opened.iter().enumerate() {
            let (found, good) = opened.check(registry)?;
            problems.extend(found);
            for id in good {
                at.entry(id).or_insert(number);
            }
        }
        let kept = registry
            .rows
            .iter()
            .filter(|row| row.state != WrappingKeyState::Destroyed);
        let mut unusable = HashSet::new();
        for row in kept.filter(|row| !at.contains_key(&row.id)) {
            unusable.insert(row.id);
            if !problems
                .iter()
                .any(|problem| problem.contains(&row.id.to_string()))
            {
                problems.push(format!(
                    "key {}: no token that the command uses has this key",
                    row.id
                ));
            }
        }
        let is_any_usable = !at.is_empty();
        self.at.replace(at);
        if is_any_usable || problems.is_empty() {
            for problem in &problems {
                context.output.note(&format!("warning: {problem}"));
            }
            return Ok(unusable);
        }
        let what = format!(
            "no row was checked, because the registry and the token differ:\n  {}",
            problems.join("\n  ")
        );
        Err(Failure::new(Exit::Untrusted, what).hint("`keybroker token check` shows the details"))
    }

    /// Verifies a MAC by the integrity key of an organisation's key, which the registry does not contain. Returns `None` if no
    /// token has this integrity key.
    pub(super) fn verify_imported(
        &self,
        key: WrappingKeyId,
        message: &MacMessage,
        mac: &Mac,
    ) -> Option<bool> {
        let mut opened = self.opened.iter();
        opened.find_map(|opened| opened.admin.verify(key, message, mac).ok())
    }

    /// Verifies a MAC on a token that has the key.
    pub(super) fn verify(
        &self,
        key: WrappingKeyId,
        message: &MacMessage,
        mac: &Mac,
    ) -> Result<bool, Failure> {
        let at = self.at.borrow().get(&key).copied();
        let opened = at.and_then(|at| self.opened.get(at));
        let opened = opened.ok_or_else(|| {
            let what = format!("key {key}: no token that the command uses has this key");
            Failure::new(Exit::Untrusted, what)
        })?;
        Ok(opened.admin.verify(key, message, mac)?)
    }
}
