//! Follows changes of the tokens in the configuration file while the broker serves: tokens are added and removed, and get other
//! priorities. A change of any other setting needs a restart. If a change is refused, the tokens in use stay as they are.

use std::{collections::BTreeSet, path::PathBuf, sync::Arc};

use arc_swap::ArcSwap;
use serde_json::{Map, Value};
use tokio::task::JoinError;

use keybroker_audit as audit;
use keybroker_audit::{AuditLog, Entry, EntryKind, Outcome};
use keybroker_broker::{Broker, ConfiguredTokens, Expect};
use keybroker_core::{error::chain, key::WrappingKeyId, state::StateDirectory};
use keybroker_hsm as hsm;
use keybroker_hsm::{Pool, Token as _, admin::KeyAdmin};
use keybroker_store as store;
use keybroker_store::Store;

use crate::{
    cli::exit::Failure,
    config::{Config, LoadError, Tokens},
    places::Registry,
};

use super::opening;

/// The only setting of a token that changes without a restart.
const PRIORITY: &str = "priority";

/// The tokens in use, as the broker needs them.
#[derive(Debug)]
pub(super) struct TokensInUse {
    /// The tokens on which the broker makes, finds and removes wrapping keys.
    pub(super) configured: ConfiguredTokens,
    tokens: Arc<ArcSwap<Tokens>>,
    /// The configuration file.
    file: PathBuf,
    program: PathBuf,
    state: StateDirectory,
}

impl TokensInUse {
    pub(super) fn new(config: &Config, file: PathBuf, program: PathBuf) -> Self {
        let in_use = Self {
            file,
            configured: ConfiguredTokens::default(),
            tokens: Arc::new(ArcSwap::from_pointee(config.tokens.clone())),
            program,
            state: StateDirectory::below(&config.audit.directory),
        };
        in_use.replace(config.tokens.clone());
        in_use
    }

    /// The rule that determines which keys must be on each token.
    pub(super) fn expect(&self) -> Expect {
        let tokens = Arc::clone(&self.tokens);
        Expect::new(move |rows, places| {
            let tokens = tokens.load();
            let registry = Registry {
                rows,
                places,
                ..Registry::default()
            };
            expected_on(tokens.all(), &registry, &tokens)
        })
    }

    fn replace(&self, tokens: Tokens) {
        let admin = |token: &hsm::Settings| {
            KeyAdmin::new(self.program.clone(), token.clone(), self.state.clone())
        };
        self.configured
            .replace(tokens.all().iter().map(admin).collect());
        self.tokens.store(Arc::new(tokens));
    }
}

/// The reason why changed tokens are refused.
#[derive(Debug, thiserror::Error)]
enum Refused {
    /// The task that reads the file ended early.
    #[error("the file cannot be read: {0}")]
    Unread(#[source] JoinError),
    /// The file is no configuration.
    #[error("{}", chain(.0))]
    Load(#[source] LoadError),
    /// The configuration contradicts itself.
    #[error("{}", .0.join("; "))]
    Problems(Vec<String>),
    /// A setting changed that needs a restart.
    #[error(
        "{0} changed, which needs a restart of the broker. Without a restart, tokens can be added, removed and get another \
         `{PRIORITY}`; nothing was changed"
    )]
    Restart(String),
    /// No other token serves these keys of a removed token.
    #[error(
        "a removed token has wrapping keys that no other token serves: {}. First copy these keys to another token and run `keybroker \
         key find-copies`, or move their rows with `keybroker rewrap` and destroy the keys; or restart the broker to remove the \
         token nevertheless",
        listed(.0)
    )]
    LastToken(BTreeSet<WrappingKeyId>),
    /// The registry cannot be read.
    #[error(
        "the wrapping keys of an added token cannot be read from the database ({}); the broker tries again every second",
        chain(.0)
    )]
    Registry(#[source] store::Error),
    /// The audit log does not take the entries about the change.
    #[error("{0}")]
    Audit(#[source] Failure),
}

fn listed(keys: &BTreeSet<WrappingKeyId>) -> String {
    let keys: Vec<String> = keys.iter().map(ToString::to_string).collect();
    keys.join(", ")
}

/// The parts of a running broker that a change of the tokens concerns.
pub(super) struct ReloadParts {
    pub(super) pool: Arc<Pool>,
    pub(super) broker: Arc<Broker>,
    pub(super) audit: AuditLog,
    pub(super) store: Arc<dyn Store>,
}

/// Follows the tokens in the configuration file.
pub(super) struct TokenReload {
    /// The configuration with which the broker started, and with the tokens that are in use now.
    config: Config,
    in_use: TokensInUse,
    parts: ReloadParts,
    watch: Watch,
}

/// What the last reads of the file found.
#[derive(Default)]
struct Watch {
    /// The changed configuration, or the error, that was read last. It is evaluated only when it is read again without a change,
    /// because a person may still be writing the file.
    seen: Option<Value>,
    /// The changed configuration that was evaluated last.
    evaluated: Option<Value>,
    /// Whether the changed configuration that was evaluated last was refused. It is evaluated again with each read, because the
    /// cause may be outside the file.
    is_refused: bool,
    /// Why the changed configuration is refused; empty if it is not.
    problem: String,
}

/// The result of a comparison of the file with the tokens in use.
enum Look {
    /// The file has the tokens in use, or was evaluated before.
    Nothing,
    /// Other tokens than those in use.
    Changed(Box<Config>),
}

impl TokenReload {
    pub(super) fn new(config: &Config, in_use: TokensInUse, parts: ReloadParts) -> Self {
        Self {
            config: config.clone(),
            in_use,
            parts,
            watch: Watch::default(),
        }
    }

    /// Why the present content of the file is refused, for the broker's health; empty if it is not refused.
    pub(super) fn problem(&self) -> String {
        self.watch.problem.clone()
    }

    /// Reads the file and applies changed tokens. If `announced` is true, an administrator asked for it with SIGHUP, so a refused
    /// file is reported again.
    pub(super) async fn follow(&mut self, announced: bool) {
        if announced {
            self.watch.evaluated = None;
        }
        let changed = match self.look(announced).await {
            Ok(Look::Nothing) => return,
            Ok(Look::Changed(config)) => self.apply(*config).await,
            Err(problem) => Err(problem),
        };
        let problem = match changed {
            Ok(()) => String::new(),
            Err(problem) => format!("{}: {problem}", self.in_use.file.display()),
        };
        let is_new = announced || self.watch.problem != problem;
        if is_new && !problem.is_empty() {
            keybroker_core::alert!(
                ConfigReload, error = %problem,
                "the changed tokens of the configuration are refused; the tokens in use stay as they are"
            );
        }
        self.watch.is_refused = !problem.is_empty();
        self.watch.problem = problem;
    }

    async fn look(&mut self, announced: bool) -> Result<Look, Refused> {
        let file = self.in_use.file.clone();
        let loaded = tokio::task::spawn_blocking(move || Config::load(&file)).await;
        let loaded = loaded.map_err(Refused::Unread)?;
        let content = match &loaded {
            Ok(config) => content_of(config),
            Err(error) => Value::String(chain(error)),
        };
        if content == content_of(&self.config) {
            self.watch = Watch::default();
            return Ok(Look::Nothing);
        }
        let is_again = self.watch.evaluated.as_ref() == Some(&content);
        if is_again && !self.watch.is_refused {
            return Ok(Look::Nothing);
        }
        if !announced && self.watch.seen.replace(content.clone()).as_ref() != Some(&content) {
            return Ok(Look::Nothing);
        }
        self.watch.evaluated = Some(content);
        let config = loaded.map_err(Refused::Load)?;
        let problems = config.problems();
        if !problems.is_empty() {
            return Err(Refused::Problems(problems));
        }
        let others = changed_settings(&config, &self.config);
        if !others.is_empty() && !is_again {
            tracing::warn!(
                settings = others.join(", "),
                "settings of the configuration changed that take effect only at the next start of the broker"
            );
        }
        if tokens_of(&config) == tokens_of(&self.config) {
            self.watch.problem = String::new();
            self.watch.is_refused = false;
            return Ok(Look::Nothing);
        }
        Ok(Look::Changed(Box::new(config)))
    }

    /// Applies changed tokens, or returns the reason why nothing was changed.
    async fn apply(&mut self, config: Config) -> Result<(), Refused> {
        check_settings(&config.tokens, &self.config.tokens)?;
        let pool = Arc::clone(&self.parts.pool);
        let lost = pool.keys_without(config.tokens.all());
        if !lost.is_empty() {
            return Err(Refused::LastToken(lost));
        }
        let added = self.keys_of_added(&config.tokens).await?;
        let risks = opening::record_accepted_risks(&config, &self.parts.audit).await;
        self.parts
            .broker
            .accept_risks(risks.map_err(Refused::Audit)?);
        let recorded = self.record_changes(&config.tokens).await;
        recorded.map_err(|error| Refused::Audit(error.into()))?;
        self.in_use.replace(config.tokens.clone());
        pool.reconfigure(config.tokens.all().to_vec());
        pool.expect_keys(added);
        let names: Vec<&str> = config
            .tokens
            .all()
            .iter()
            .map(|one| one.name.as_str())
            .collect();
        tracing::info!(
            tokens = names.join(", "),
            "the tokens of the configuration changed"
        );
        self.config.tokens = config.tokens;
        Ok(())
    }

    /// Records each change of the list of tokens in the audit log, before the change is applied.
    async fn record_changes(&self, new: &Tokens) -> Result<(), audit::Error> {
        for (action, tokens) in list_changes(new, &self.config.tokens) {
            let mut entry = Entry::new(EntryKind::System, action, Outcome::Ok);
            entry.token = Some(tokens.join(", "));
            self.parts.audit.append(entry).await?;
        }
        Ok(())
    }

    /// Determines the keys of the added tokens, as a start of the broker does. The broker examines the registry only while a token
    /// serves, so an added token must be opened without this examination.
    async fn keys_of_added(&self, tokens: &Tokens) -> Result<KeysOfTokens, Refused> {
        let is_new = |token: &&hsm::Settings| named(&self.config.tokens, &token.name).is_none();
        let mut added = tokens.all().iter().filter(is_new).peekable();
        if added.peek().is_none() {
            return Ok(Vec::new());
        }
        let registry = Registry::read_for_service(&*self.parts.store).await;
        let registry = registry.map_err(Refused::Registry)?;
        Ok(expected_on(added, &registry, tokens))
    }
}

/// The keys that must be on each token, by the name of the token.
type KeysOfTokens = Vec<(String, Vec<hsm::ExpectedKey>)>;

/// The keys that the workers of these tokens search for. `all` are all configured tokens.
fn expected_on<'t>(
    tokens: impl IntoIterator<Item = &'t hsm::Settings>,
    registry: &Registry,
    all: &Tokens,
) -> KeysOfTokens {
    let keys = |token: &hsm::Settings| registry.expected_among(token, all.all());
    let tokens = tokens.into_iter();
    tokens
        .map(|token| (token.name.clone(), keys(token)))
        .collect()
}

fn named<'t>(tokens: &'t Tokens, name: &str) -> Option<&'t hsm::Settings> {
    tokens.all().iter().find(|token| token.name == name)
}

/// The changes of the list of tokens: the action of an audit entry, with the names of the tokens.
fn list_changes<'t>(new: &'t Tokens, old: &'t Tokens) -> Vec<(&'static str, Vec<&'t str>)> {
    let names = |tokens: &'t Tokens, is_wanted: &dyn Fn(&hsm::Settings) -> bool| {
        let wanted = tokens.all().iter().filter(|token| is_wanted(token));
        wanted.map(|token| token.name.as_str()).collect()
    };
    let is_raised_or_lowered = |token: &hsm::Settings| {
        named(old, &token.name).is_some_and(|before| before.priority != token.priority)
    };
    let changes: [(_, Vec<&str>); 3] = [
        (
            "token.added",
            names(new, &|token| named(old, &token.name).is_none()),
        ),
        (
            "token.removed",
            names(old, &|token| named(new, &token.name).is_none()),
        ),
        ("token.priority_changed", names(new, &is_raised_or_lowered)),
    ];
    let changes = changes.into_iter();
    changes.filter(|(_, names)| !names.is_empty()).collect()
}

/// Refuses a change of a token that needs a restart.
fn check_settings(new: &Tokens, old: &Tokens) -> Result<(), Refused> {
    if new.weights() != old.weights() {
        return Err(Refused::Restart("[token] `weights`".to_owned()));
    }
    for token in new.all() {
        let Some(before) = named(old, &token.name) else {
            continue;
        };
        let changed: Vec<String> = differing(&settings_of(token), &settings_of(before))
            .into_iter()
            .filter(|setting| setting != PRIORITY)
            .map(|setting| format!("`{setting}`"))
            .collect();
        if !changed.is_empty() {
            let what = format!("token {:?}: {}", token.name, changed.join(", "));
            return Err(Refused::Restart(what));
        }
    }
    Ok(())
}

fn content_of(config: &Config) -> Value {
    serde_json::to_value(config).unwrap_or_default()
}

fn settings_of(token: &hsm::Settings) -> Map<String, Value> {
    object(serde_json::to_value(token).unwrap_or_default())
}

/// The tokens by name, without the form in which the file lists them.
fn tokens_of(config: &Config) -> Vec<Map<String, Value>> {
    config.tokens.all().iter().map(settings_of).collect()
}

/// The names of the sections other than `[token]` that differ.
fn changed_settings(new: &Config, old: &Config) -> Vec<String> {
    let (new, old) = (object(content_of(new)), object(content_of(old)));
    let mut changed = differing(&new, &old);
    changed.retain(|section| section != "token");
    changed
}

fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(fields) => fields,
        _ => Map::new(),
    }
}

/// The names of the fields that differ or that only one of the objects has.
fn differing(new: &Map<String, Value>, old: &Map<String, Value>) -> Vec<String> {
    let names = new
        .keys()
        .chain(old.keys().filter(|name| !new.contains_key(*name)));
    names
        .filter(|name| new.get(*name) != old.get(*name))
        .cloned()
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(text: &str) -> Tokens {
        #[derive(serde::Deserialize)]
        struct Document {
            token: Tokens,
        }
        toml::from_str::<Document>(text).unwrap().token
    }

    const A: &str = "[[token]]\nname = \"a\"\nmodule = \"/a.so\"\nlabel = \"one\"\n";
    const B: &str = "[[token]]\nname = \"b\"\nmodule = \"/a.so\"\nlabel = \"two\"\n";

    #[test]
    fn each_change_of_the_list_is_recorded() {
        const C: &str = "[[token]]\nname = \"c\"\nmodule = \"/a.so\"\nlabel = \"three\"\n";
        let one = tokens(A);
        let all = tokens(&format!("{C}{A}{B}"));
        let lower = tokens(&format!("{A}priority = 7\n"));
        assert!(list_changes(&all, &all).is_empty());
        assert_eq!(list_changes(&all, &one), [("token.added", vec!["c", "b"])]);
        assert_eq!(
            list_changes(&lower, &all),
            [
                ("token.removed", vec!["c", "b"]),
                ("token.priority_changed", vec!["a"])
            ]
        );
    }

    #[test]
    fn tokens_come_and_go_and_only_their_priority_changes() {
        let one = tokens(A);
        let two = tokens(&format!("{A}{B}"));
        for (new, old) in [(&two, &one), (&one, &two), (&two, &two)] {
            check_settings(new, old).unwrap();
        }
        let raised = tokens(&format!("{A}priority = 7\n{B}"));
        check_settings(&raised, &two).unwrap();
        for (line, setting) in [
            ("workers = 3", "`workers`"),
            ("sessions_per_worker = 3", "`sessions_per_worker`"),
            ("pin_file = \"/pin\"", "`pin_file`"),
            ("allow_oaep_sha1 = true", "`allow_oaep_sha1`"),
            ("serial = \"1\"", "`serial`"),
            ("copy_of = \"b\"", "`copy_of`"),
            ("weights = { \"URI:x\" = 2 }", "`weights`"),
        ] {
            let changed = tokens(&format!("{A}{line}\n{B}"));
            let refused = check_settings(&changed, &two).unwrap_err().to_string();
            assert!(refused.contains(setting), "{line}: {refused}");
            assert!(refused.contains("restart"), "{refused}");
        }
        // A new token with weights would change the weights of all tokens.
        let weighted = tokens(&format!("{A}{B}weights = {{ \"URI:x\" = 2 }}\n"));
        check_settings(&weighted, &one).unwrap_err();
    }
}
