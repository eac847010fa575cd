//! One word about the protection of the keys of a token.

use serde::{Deserialize, Serialize};

/// What is known about the protection of the keys of a token. The word is a claim of the module or of an administrator, and not a
/// proof.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Assurance {
    /// The keys are in a hardware module under the control of the operator.
    Hardware,
    /// The keys are protected by software.
    Software,
    /// A service of another party protects the keys, for example the key management of a cloud.
    Service,
    /// Only organisational rules protect the keys.
    Policy,
}

impl Assurance {
    /// Every word.
    pub const ALL: [Self; 4] = [Self::Hardware, Self::Software, Self::Service, Self::Policy];

    /// Returns the word in the configuration.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Hardware => "hardware",
            Self::Software => "software",
            Self::Service => "service",
            Self::Policy => "policy",
        }
    }

    /// Returns the configured word or, if no word is configured, the word that the report of the module implies. `is_hardware` is
    /// true if the module reports a hardware slot. `is_outside` is true if access is controlled outside PKCS#11.
    pub(crate) fn of(configured: Option<Self>, is_hardware: bool, is_outside: bool) -> Self {
        configured.unwrap_or(match (is_hardware, is_outside) {
            (true, _) => Self::Hardware,
            (false, true) => Self::Service,
            (false, false) => Self::Software,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configured_word_takes_precedence_over_the_report_of_the_module() {
        for (is_hardware, is_outside, expected) in [
            (true, false, "hardware"),
            (true, true, "hardware"),
            (false, true, "service"),
            (false, false, "software"),
        ] {
            let found = Assurance::of(None, is_hardware, is_outside);
            assert_eq!(found.as_str(), expected);
            for word in Assurance::ALL {
                assert_eq!(Assurance::of(Some(word), is_hardware, is_outside), word);
            }
        }
        for word in Assurance::ALL {
            let text = format!("\"{}\"", word.as_str());
            assert_eq!(serde_json::from_str::<Assurance>(&text).unwrap(), word);
        }
        serde_json::from_str::<Assurance>("\"fips\"").unwrap_err();
    }
}
