//! The tokens of a configuration: one `[token]` section, or several `[[token]]` sections.

use std::{collections::BTreeMap, fmt};

use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{
        MapAccess, SeqAccess, Visitor,
        value::{MapAccessDeserializer, SeqAccessDeserializer},
    },
};

use keybroker_core::key::KeyName;
use keybroker_hsm as hsm;

/// Maximum number of tokens. The record of PINs has space for this number of tokens.
pub const TOKENS_MAX: usize = 16;

/// The tokens of a configuration, in the order of the file.
#[derive(Clone, Debug)]
pub struct Tokens {
    entries: Vec<hsm::Settings>,
    /// Index of the token for commands that use one token.
    selected: usize,
    /// Whether the file uses `[token]` instead of `[[token]]`.
    is_one_table: bool,
}

/// The reason why no token could be selected.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SelectionError {
    /// The configuration has several tokens, but the command line does not select a token.
    #[error("the configuration has several tokens: pass `--token` with one of the names {0}")]
    NotChosen(String),
    /// No token has this name.
    #[error(
        "the configuration has no token with the name {name:?}; the configured names are {names}"
    )]
    Unknown {
        /// The name that was given on the command line.
        name: String,
        /// The names of the configured tokens.
        names: String,
    },
}

impl Tokens {
    /// All tokens, in the order of the file.
    pub fn all(&self) -> &[hsm::Settings] {
        &self.entries
    }

    /// Whether there is more than one token.
    pub fn are_several(&self) -> bool {
        self.entries.len() > 1
    }

    /// The token for commands that use one token: the selected token, or the first token.
    pub(super) fn selected(&self) -> &hsm::Settings {
        &self.entries[self.selected]
    }

    /// Selects the token with this name. If no name is given, selects the only token.
    pub(super) fn select(&mut self, name: Option<&str>) -> Result<(), SelectionError> {
        let Some(name) = name else {
            if self.are_several() {
                return Err(SelectionError::NotChosen(self.names()));
            }
            return Ok(());
        };
        let found = self.entries.iter().position(|entry| entry.name == name);
        self.selected = found.ok_or_else(|| SelectionError::Unknown {
            name: name.to_owned(),
            names: self.names(),
        })?;
        Ok(())
    }

    fn names(&self) -> String {
        let names: Vec<&str> = self.entries.iter().map(|one| one.name.as_str()).collect();
        names.join(", ")
    }

    /// The weights of principals that apply while their calls wait for a place in the front. If
    /// tokens have different weights for a principal, the highest weight applies.
    pub fn weights(&self) -> BTreeMap<String, u32> {
        let mut weights = BTreeMap::new();
        for (principal, weight) in self.entries.iter().flat_map(|token| &token.weights) {
            let highest: &mut u32 = weights.entry(principal.clone()).or_default();
            *highest = (*highest).max(*weight);
        }
        weights
    }

    /// The prefix of a message about a token: the name of the token if the configuration has
    /// several tokens, otherwise empty.
    pub(crate) fn prefix(&self, token: &hsm::Settings) -> String {
        if self.are_several() {
            format!("token {:?}: ", token.name)
        } else {
            String::new()
        }
    }

    /// The problems of each token. With several tokens, each problem begins with the name of its
    /// token.
    pub(super) fn problems_of_each(
        &self,
        problems_of: impl Fn(&hsm::Settings) -> Vec<String>,
    ) -> Vec<String> {
        let mut all = Vec::new();
        for token in &self.entries {
            let prefix = self.prefix(token);
            let found = problems_of(token).into_iter();
            all.extend(found.map(|problem| format!("{prefix}{problem}")));
        }
        all
    }

    /// The problems of the list of tokens: wrong names, too many tokens, and wrong copies.
    pub(super) fn problems_of_list(&self) -> Vec<String> {
        let mut problems = Vec::new();
        if self.entries.len() > TOKENS_MAX {
            problems.push(format!(
                "the configuration has {} [[token]] sections; the broker uses at most {TOKENS_MAX} tokens",
                self.entries.len()
            ));
        }
        for (number, token) in self.entries.iter().enumerate() {
            let name = &token.name;
            if KeyName::parse(name).is_err() {
                problems.push(format!(
                    "[[token]]: `name` is {name:?}; it must be 1 to 64 bytes of [a-z0-9._-]"
                ));
            }
            if self.entries[..number].iter().any(|one| one.name == *name) {
                problems.push(format!(
                    "two [[token]] sections have the name {name:?}; set a different `name` for each token"
                ));
            }
            problems.extend(self.problem_of_copy(token));
        }
        problems
    }

    fn problem_of_copy(&self, token: &hsm::Settings) -> Option<String> {
        let of = token.copy_of.as_ref()?;
        let prefix = self.prefix(token);
        let original = self.entries.iter().find(|one| one.name == *of);
        match original {
            _ if *of == token.name => Some(format!(
                "{prefix}[token]: `copy_of` is the name of the token itself"
            )),
            None => Some(format!(
                "{prefix}[token]: `copy_of` is {of:?}, which is not the name of a token"
            )),
            Some(original) if original.copy_of.is_some() => Some(format!(
                "{prefix}[token]: `copy_of` is {of:?}, which is itself a copy; write the name of the original token"
            )),
            Some(original)
                if original.module == token.module
                    && original.environment == token.environment
                    && original.initialize_string == token.initialize_string =>
            {
                Some(format!(
                    "{prefix}[token]: `copy_of` is {of:?}, which has the same module and the same [token.environment], so \
                     both would open the same token; give the copy a separate environment"
                ))
            }
            Some(_) => None,
        }
    }
}

/// Creates a list with one token, for tests and for commands that change a configuration.
impl From<hsm::Settings> for Tokens {
    fn from(token: hsm::Settings) -> Self {
        Self {
            entries: vec![token],
            selected: 0,
            is_one_table: true,
        }
    }
}

impl Serialize for Tokens {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if self.is_one_table {
            self.selected().serialize(serializer)
        } else {
            self.entries.serialize(serializer)
        }
    }
}

impl<'de> Deserialize<'de> for Tokens {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(OneOrSeveral)
    }
}

struct OneOrSeveral;

impl<'de> Visitor<'de> for OneOrSeveral {
    type Value = Tokens;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[token], or [[token]] for each of several tokens")
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Tokens, A::Error> {
        hsm::Settings::deserialize(MapAccessDeserializer::new(map)).map(Tokens::from)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<Tokens, A::Error> {
        let entries = Vec::<hsm::Settings>::deserialize(SeqAccessDeserializer::new(list))?;
        if entries.is_empty() {
            return Err(serde::de::Error::invalid_length(0, &self));
        }
        Ok(Tokens {
            entries,
            selected: 0,
            is_one_table: false,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Serialize, Deserialize)]
    struct Document {
        token: Tokens,
    }

    fn parse(text: &str) -> Tokens {
        toml::from_str::<Document>(text).unwrap().token
    }

    const TWO: &str = r#"
[[token]]
name = "a"
module = "/a.so"
label = "one"
[token.environment]
SOFTHSM2_CONF = "/a.conf"

[[token]]
name = "b"
module = "/a.so"
label = "one"
priority = 50
copy_of = "a"
[token.environment]
SOFTHSM2_CONF = "/b.conf"
"#;

    #[test]
    fn one_table_is_one_token_and_a_list_is_several() {
        let one = parse("[token]\nmodule = \"/a.so\"\nlabel = \"one\"\n");
        assert_eq!(
            (one.all().len(), one.selected().name.as_str()),
            (1, "default")
        );
        assert_eq!(one.selected().priority, 100);
        let two = parse(TWO);
        let names: Vec<_> = two
            .all()
            .iter()
            .map(|one| (one.name.as_str(), one.priority))
            .collect();
        assert_eq!(names, [("a", 100), ("b", 50)]);
        assert_eq!(two.all()[1].environment["SOFTHSM2_CONF"], "/b.conf");
        assert_eq!(two.problems_of_list(), Vec::<String>::new());
        // Serialisation keeps `[token]` or `[[token]]`, as in the file.
        for text in [TWO, "[token]\nmodule = \"/a.so\"\n"] {
            let document: Document = toml::from_str(text).unwrap();
            let written = toml::to_string(&document).unwrap();
            assert_eq!(
                written.contains("[[token]]"),
                text.contains("[[token]]"),
                "{written}"
            );
            toml::from_str::<Document>(&written).unwrap();
        }
    }

    #[test]
    fn one_of_several_tokens_must_be_selected() {
        let mut two = parse(TWO);
        assert_eq!(
            two.select(None),
            Err(SelectionError::NotChosen("a, b".to_owned()))
        );
        two.select(Some("b")).unwrap();
        assert_eq!(two.selected().name, "b");
        let unknown = two.select(Some("c")).unwrap_err().to_string();
        assert!(
            unknown.contains("\"c\"") && unknown.contains("a, b"),
            "{unknown}"
        );
        let mut one = parse("[token]\nmodule = \"/a.so\"\n");
        one.select(None).unwrap();
        one.select(Some("default")).unwrap();
        one.select(Some("a")).unwrap_err();
    }

    #[test]
    fn each_mistake_in_the_list_is_reported() {
        for (from, to, expected) in [
            (
                "name = \"b\"",
                "name = \"a\"",
                "two [[token]] sections have the name \"a\"",
            ),
            ("name = \"b\"", "name = \"B\"", "[a-z0-9._-]"),
            ("copy_of = \"a\"", "copy_of = \"b\"", "the token itself"),
            (
                "copy_of = \"a\"",
                "copy_of = \"c\"",
                "not the name of a token",
            ),
            ("/b.conf", "/a.conf", "a separate environment"),
            (
                "label = \"one\"\n[token",
                "label = \"one\"\ncopy_of = \"b\"\n[token",
                "itself a copy",
            ),
        ] {
            let text = TWO.replacen(from, to, 1);
            assert_ne!(text, TWO);
            let problems = parse(&text).problems_of_list().join("\n");
            assert!(problems.contains(expected), "{to}: {problems}");
        }
        let entry = |number| format!("[[token]]\nname = \"t{number}\"\nmodule = \"/a.so\"\n");
        let many = (0..=TOKENS_MAX).map(entry).collect::<Vec<_>>().concat();
        let problems = parse(&many).problems_of_list().join("\n");
        assert!(problems.contains("at most 16"), "{problems}");
    }
}
