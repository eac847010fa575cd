//! Parses, names, validates and counts the policies of a set.

use std::{
    collections::{HashMap, HashSet},
    str::FromStr as _,
    sync::Arc,
};

use cedar_policy::{
    Effect, PolicyId, PolicySet, PolicySetError, ValidationMode, Validator, ffi::DetailedError,
};

use keybroker_core::{
    error::chain,
    metrics,
    principal::{Action, Kind},
};

use super::{
    RESERVED, Settings,
    error::Error,
    files,
    kept::Kept,
    problem::{Problem, Problems, Source, place},
    shape,
    vocabulary::VOCABULARY,
};

const SHIPPED: &str = include_str!("default.cedar");
const SHIPPED_NAME: &str = "(shipped)";
/// Largest number of the operator's policies. The number is limited because each policy may be
/// evaluated for each call.
pub(super) const POLICIES_MAX: usize = 256;
const ID_BYTES_MAX: usize = 64;
/// The annotation that specifies the name of a policy in the audit log.
const ID_ANNOTATION: &str = "id";

/// The numbers of policies and files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Summary {
    /// Number of permits.
    pub permits: usize,
    /// Number of forbids.
    pub forbids: usize,
    /// Number of the operator's files.
    pub files: usize,
}

/// A principal that a policy refers to by name instead of by role or attribute.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct NamedPrincipal {
    /// The kind of the principal.
    pub kind: Kind,
    /// The name of the principal, as in the audit log.
    pub name: String,
    /// The policy.
    pub policy: Arc<str>,
    /// The file of the policy.
    pub file: Arc<str>,
}

/// The properties of a policy apart from its text.
#[derive(Clone, Debug)]
pub(super) struct Known {
    /// The position among all policies. If several policies lead to a decision, the first policy is
    /// shown.
    pub(super) place: usize,
    pub(super) effect: Effect,
    pub(super) id: Arc<str>,
    /// The name of the policy's file.
    pub(super) origin: Arc<str>,
}

/// The policies that can apply to one action and kind of principal. The evaluation of a policy
/// takes about one microsecond, and passing an attribute to Cedar takes about half a microsecond.
/// Therefore, a decision evaluates only the policies that can apply, and only with the attributes
/// that these policies use.
#[derive(Debug, Default)]
pub(super) struct Slice {
    pub(super) policies: PolicySet,
    /// All words in `policies`, including all attributes and operators that the policies use.
    pub(super) words: HashSet<String>,
    /// The cached decisions of `policies`.
    pub(super) kept: Kept,
}

/// The policies that are in force together.
#[derive(Debug)]
pub(super) struct Set {
    policies: PolicySet,
    known: HashMap<PolicyId, Known>,
    /// The ids of all policies, each with its file. The ids of shipped policies that are not in
    /// force are included, so that an id in the audit log has only one meaning.
    taken: HashMap<PolicyId, Arc<str>>,
    /// The policies for each action and kind of principal.
    slices: HashMap<(Action, Kind), Slice>,
    /// The operator's files, each with its number of policies.
    files: Vec<(String, usize)>,
    digest: [u8; 32],
}

impl Set {
    pub(super) fn load(settings: &Settings) -> Result<Self, Problems> {
        Self::build(settings, &files::read(settings)?)
    }

    /// Builds a set from the shipped policies and the policies of the sources.
    pub(super) fn build(settings: &Settings, sources: &[Source]) -> Result<Self, Problems> {
        let mut set = Self {
            policies: PolicySet::new(),
            known: HashMap::new(),
            taken: HashMap::new(),
            slices: HashMap::new(),
            files: Vec::new(),
            digest: files::digest(sources),
        };
        let shipped = Source {
            name: SHIPPED_NAME.to_owned(),
            text: SHIPPED.to_owned(),
        };
        set.add(&shipped, |effect| {
            settings.defaults || effect == Effect::Forbid
        })?;
        let mut problems = Vec::new();
        for source in sources {
            match set.add(source, |_| true) {
                Ok(count) => set.files.push((source.name.clone(), count)),
                Err(Problems(more)) => problems.extend(more),
            }
        }
        let count: usize = set.files.iter().map(|(_, count)| count).sum();
        if count > POLICIES_MAX {
            problems.push(Problem::of(format!(
                "the files contain {count} policies; at most {POLICIES_MAX} policies are allowed, because each policy \
                 can be evaluated for each call"
            )));
        }
        problems.extend(set.validate(sources));
        if !problems.is_empty() {
            return Err(Problems(problems));
        }
        set.slice().map_err(|error| Problem::of(chain(&error)))?;
        Ok(set)
    }

    /// Parses a source and adds the policies for which `wanted` is true. Returns the number of policies in the source.
    fn add(&mut self, source: &Source, wanted: impl Fn(Effect) -> bool) -> Result<usize, Problems> {
        if let Some((offset, what)) = shape::problem(&source.text) {
            let place = Some(place(&source.text, offset));
            let problem = Problem::in_file(&source.name, what);
            return Err(Problem { place, ..problem }.into());
        }
        let parsed = PolicySet::from_str(&source.text).map_err(|errors| {
            let each = errors
                .iter()
                .map(|error| Problem::from_cedar(source, &error.into()));
            Problems(each.collect())
        })?;
        if parsed.num_of_templates() > 0 {
            let what = "the file has a template (`?principal`, `?resource`), which the broker does not support";
            return Err(Problem::in_file(&source.name, what).into());
        }
        let mut policies: Vec<_> = parsed.policies().collect();
        // The parser names the policies `policy0`, `policy1` and so on, in the order of the text.
        policies.sort_by_key(|policy| ordinal(policy.id()));
        let (mut problems, count) = (Vec::new(), policies.len());
        for (index, policy) in policies.into_iter().enumerate() {
            let id = match policy.annotation(ID_ANNOTATION) {
                Some(id) => check_id(id).map(|()| id.to_owned()),
                None => Ok(format!("{}:{}", source.name, index + 1)),
            };
            let effect = policy.effect();
            let added = id.and_then(|id| {
                let known = Known {
                    place: self.known.len(),
                    effect,
                    id: id.as_str().into(),
                    origin: source.name.as_str().into(),
                };
                let id = PolicyId::new(&id);
                if let Some(other) = self.taken.insert(id.clone(), Arc::clone(&known.origin)) {
                    return Err(IdError::Taken { id, other });
                }
                if wanted(effect) {
                    let added = self.policies.add(policy.new_id(id.clone()));
                    added.map_err(|source| IdError::Refused {
                        id: id.clone(),
                        source: Box::new(source),
                    })?;
                    self.known.insert(id, known);
                }
                Ok(())
            });
            problems.extend(
                added
                    .err()
                    .map(|error| Problem::in_file(&source.name, chain(&error))),
            );
        }
        if problems.is_empty() {
            Ok(count)
        } else {
            Err(Problems(problems))
        }
    }

    /// Validates all policies. Cedar's warnings count as problems, too: for example, an operator
    /// would not notice a forbid policy that can never apply.
    fn validate(&self, sources: &[Source]) -> Vec<Problem> {
        let validator = Validator::new(VOCABULARY.schema.clone());
        let result = validator.validate(&self.policies, ValidationMode::Strict);
        let errors = result
            .validation_errors()
            .map(|error| (error.policy_id(), DetailedError::from(error)));
        let bad: HashSet<&PolicyId> = result
            .validation_errors()
            .map(cedar_policy::ValidationError::policy_id)
            .collect();
        let warnings = result
            .validation_warnings()
            .filter(|warning| !bad.contains(warning.policy_id()))
            .map(|warning| (warning.policy_id(), DetailedError::from(warning)));
        let problem = |(id, error): (&PolicyId, DetailedError)| {
            let origin = self.known.get(id).map(|known| &*known.origin);
            let source = sources
                .iter()
                .find(|source| Some(source.name.as_str()) == origin);
            match source {
                Some(source) => Problem::from_cedar(source, &error),
                None => Problem::of(error.message),
            }
        };
        let mut problems: Vec<Problem> = errors.chain(warnings).map(problem).collect();
        // Cedar reports a mistake once for each action of the policy, in no particular order.
        problems.sort();
        problems.dedup_by(|one, other| (&one.file, one.place) == (&other.file, other.place));
        problems
    }

    /// Assigns each policy to the actions and kinds of principals to which it can apply.
    fn slice(&mut self) -> Result<(), Error> {
        for action in Action::ALL {
            for kind in [Kind::User, Kind::Service] {
                self.slices.insert((action, kind), Slice::default());
            }
        }
        for policy in self.policies.policies() {
            let mut words = HashSet::new();
            let json = policy
                .to_json()
                .map_err(Error::on("write a policy as JSON"))?;
            collect_words(&json, &mut words);
            let cases: HashSet<(Action, Kind)> = policy
                .get_valid_request_envs(&VOCABULARY.schema)
                .filter_map(|case| VOCABULARY.case(&case))
                .collect();
            for case in cases {
                let slice = self.slices.entry(case).or_default();
                let added = slice.policies.add(policy.clone());
                added.map_err(Error::on(
                    "sort a policy by the principals, actions and resources of its scope",
                ))?;
                slice.words.extend(words.iter().cloned());
                slice.kept.admit(&json);
            }
        }
        Ok(())
    }

    /// Returns an error if a file whose policies are in force no longer exists, because the file
    /// may have been removed by accident.
    pub(super) fn check_none_is_gone(&self, sources: &[Source]) -> Result<(), Problems> {
        let there: HashSet<&str> = sources.iter().map(|source| source.name.as_str()).collect();
        let gone = self
            .files
            .iter()
            .filter(|(name, count)| *count > 0 && !there.contains(name.as_str()));
        let problems: Vec<Problem> = gone
            .map(|(name, count)| {
                let what = format!(
                    "the file is missing, but {count} of the policies in force come from this file; restore the file. \
                     To withdraw \
                     its policies, first replace the file with an empty file, or restart the broker"
                );
                Problem::in_file(name, what)
            })
            .collect();
        if problems.is_empty() {
            Ok(())
        } else {
            Err(Problems(problems))
        }
    }

    /// Returns all policies.
    pub(super) fn policies(&self) -> &PolicySet {
        &self.policies
    }

    /// Returns the principals that the operator's policies refer to by name, ordered by kind and name.
    pub(super) fn named_principals(&self) -> Result<Vec<NamedPrincipal>, Problems> {
        let mut all = Vec::new();
        for (id, known) in self.in_order() {
            let Some(policy) = self.policies.policy(id) else {
                continue;
            };
            if &*known.origin == SHIPPED_NAME {
                continue;
            }
            let mut named = Vec::new();
            let json = policy.to_json().map_err(|error| {
                Problem::in_file(
                    &known.origin,
                    format!("policy `{}`: {}", known.id, chain(&error)),
                )
            })?;
            collect_principals(&json, &mut named);
            all.extend(named.into_iter().map(|(kind, name)| NamedPrincipal {
                kind,
                name,
                policy: Arc::clone(&known.id),
                file: Arc::clone(&known.origin),
            }));
        }
        all.sort();
        all.dedup();
        Ok(all)
    }

    /// Returns the policies that can apply to an action by a kind of principal.
    pub(super) fn slice_of(&self, action: Action, kind: Kind) -> Option<&Slice> {
        self.slices.get(&(action, kind))
    }

    pub(super) fn known(&self, id: &PolicyId) -> Option<&Known> {
        self.known.get(id)
    }

    /// Returns all policies in the order in which they were loaded.
    pub(super) fn in_order(&self) -> Vec<(&PolicyId, &Known)> {
        let mut all: Vec<_> = self.known.iter().collect();
        all.sort_by_key(|(_, known)| known.place);
        all
    }

    pub(super) fn digest(&self) -> &[u8; 32] {
        &self.digest
    }

    pub(super) fn summary(&self) -> Summary {
        let forbids = self
            .known
            .values()
            .filter(|known| known.effect == Effect::Forbid)
            .count();
        Summary {
            permits: self.known.len() - forbids,
            forbids,
            files: self.files.len(),
        }
    }

    /// Updates the metrics with the numbers of permit policies and forbid policies.
    pub(super) fn report(&self) {
        let Summary {
            permits, forbids, ..
        } = self.summary();
        for (effect, count) in [("permit", permits), ("forbid", forbids)] {
            metrics::POLICIES
                .with([effect])
                .set(metrics::to_float(count));
        }
    }
}

/// Collects every word of a policy from its JSON form, in which escapes are resolved.
fn collect_words(value: &serde_json::Value, words: &mut HashSet<String>) {
    match value {
        serde_json::Value::String(text) => {
            words.insert(text.clone());
        }
        serde_json::Value::Array(values) => {
            for value in values {
                collect_words(value, words);
            }
        }
        serde_json::Value::Object(fields) => {
            for (name, value) in fields {
                words.insert(name.clone());
                collect_words(value, words);
            }
        }
        _ => {}
    }
}

/// Collects every user and service from the JSON form of a policy.
fn collect_principals(value: &serde_json::Value, named: &mut Vec<(Kind, String)>) {
    match value {
        serde_json::Value::Array(values) => {
            for value in values {
                collect_principals(value, named);
            }
        }
        serde_json::Value::Object(fields) => {
            let text = |name: &str| fields.get(name).and_then(serde_json::Value::as_str);
            let kind = match text("type") {
                Some("Keybroker::User") => Some(Kind::User),
                Some("Keybroker::Service") => Some(Kind::Service),
                _ => None,
            };
            if let (Some(kind), Some(id)) = (kind, text("id")) {
                named.push((kind, id.to_owned()));
            }
            for value in fields.values() {
                collect_principals(value, named);
            }
        }
        _ => {}
    }
}

fn ordinal(id: &PolicyId) -> usize {
    let id: &str = id.as_ref();
    id.trim_start_matches("policy")
        .parse()
        .unwrap_or(usize::MAX)
}

/// The reason why a policy cannot be added under its id.
#[derive(Debug, thiserror::Error)]
enum IdError {
    #[error(
        "@id({0:?}): an id must be 1 to {ID_BYTES_MAX} bytes of [A-Za-z0-9._-], because the audit log shows the id"
    )]
    Malformed(String),
    #[error("@id({0:?}): this id is reserved, because it has another meaning in the audit log")]
    Reserved(String),
    #[error("the policy id `{id}` is used twice; the other policy with this id is in {other}")]
    Taken { id: PolicyId, other: Arc<str> },
    #[error("policy `{id}` cannot be added")]
    Refused {
        id: PolicyId,
        source: Box<PolicySetError>,
    },
}

fn check_id(id: &str) -> Result<(), IdError> {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if !(1..=ID_BYTES_MAX).contains(&id.len()) || !id.chars().all(is_plain) {
        return Err(IdError::Malformed(id.to_owned()));
    }
    if RESERVED.contains(&id) {
        return Err(IdError::Reserved(id.to_owned()));
    }
    Ok(())
}
