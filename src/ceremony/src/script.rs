//! The steps of a plan, in order. The rehearsal prints them for auditors, and the run does exactly these steps.

use crate::plan::{Key, Plan, Token};

/// What a step does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Checks that nothing exists yet that the ceremony would make.
    CheckNothingExists,
    /// Makes the security officer's PIN and shows the shares.
    SplitSoPin,
    /// Initialises the token and sets the user PIN.
    Initialise,
    /// Logs in and records what the token is.
    Identify,
    /// Generates the key that signs the transcript, and makes a trial signature.
    GenerateSigningKey,
    /// Generates a wrapping key with its integrity key, checks and tests them.
    GenerateKey,
    /// Signs the transcript with the key on each token.
    Sign,
    /// Registers the wrapping key. This step is not in the transcript, which is complete and signed before.
    Register,
}

/// A step of a ceremony.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// Number of the step, from 1.
    pub number: u64,
    /// What the step does.
    pub action: Action,
    /// Index of the token in the plan. `None` for a step that concerns all tokens.
    pub token: Option<usize>,
    /// Index of the key in the token's list of keys.
    pub key: Option<usize>,
    /// The people who act in this step.
    pub who: String,
    /// What happens, as a sentence.
    pub what: String,
    /// What is checked, each as a sentence.
    pub checks: Vec<String>,
}

/// The steps of a plan. `verify` compares their texts with the transcript, so that a change of a text needs another
/// [`crate::transcript::FORMAT`].
pub fn steps(plan: &Plan) -> Vec<Step> {
    let mut steps = Steps::default();
    steps.add(Step {
        who: OPERATOR.to_owned(),
        what: "Check that nothing exists yet that this ceremony would make.".to_owned(),
        checks: checks_before(plan),
        ..empty(Action::CheckNothingExists)
    });
    for (index, token) in plan.tokens.iter().enumerate() {
        for step in steps_of_token(plan, token) {
            steps.add(Step {
                token: Some(index),
                ..step
            });
        }
    }
    steps.add(Step {
        who: OPERATOR.to_owned(),
        what: "Sign the transcript with the signing key on each token.".to_owned(),
        checks: vec!["Each signature verifies with the public key in the transcript.".to_owned()],
        ..empty(Action::Sign)
    });
    for (index, token) in plan.tokens.iter().enumerate().filter(|_| plan.register) {
        for (key, planned) in token.keys.iter().enumerate() {
            steps.add(Step {
                token: Some(index),
                key: Some(key),
                ..step_of_registration(&planned.name)
            });
        }
    }
    steps.0
}

/// What the people do after the last step of the run.
pub fn afterwards(plan: &Plan, transcript: &str) -> Vec<String> {
    let sign = plan.custodians.iter().map(|custodian| {
        format!(
            "{} reads the page, compares the SHA-256 of the transcript, and signs: ssh-keygen -Y sign -n {} -f KEY \
             <{transcript} >{}.sig",
            custodian.name,
            crate::ssh::NAMESPACE,
            custodian.name
        )
    });
    let mut lines: Vec<String> = sign.collect();
    lines.push(format!(
        "The operator collects the signatures: keybroker ceremony sign {transcript} --signature NAME.sig"
    ));
    lines.push(format!(
        "An auditor verifies on another machine: keybroker ceremony verify {transcript} --allowed-signers FILE --quorum {}",
        plan.quorum
    ));
    lines
}

const OPERATOR: &str = "operator";

#[derive(Default)]
struct Steps(Vec<Step>);

impl Steps {
    fn add(&mut self, step: Step) {
        let number = u64::try_from(self.0.len())
            .unwrap_or(u64::MAX)
            .saturating_add(1);
        self.0.push(Step { number, ..step });
    }
}

fn empty(action: Action) -> Step {
    Step {
        number: 0,
        action,
        token: None,
        key: None,
        who: String::new(),
        what: String::new(),
        checks: Vec::new(),
    }
}

fn checks_before(plan: &Plan) -> Vec<String> {
    let mut checks = vec![
        "There is no transcript with this name.".to_owned(),
        "Module and selector of each token in the configuration are those of the plan.".to_owned(),
    ];
    for token in &plan.tokens {
        if token.initialise {
            checks.push(format!(
                "Token {}: the module shows a blank token, and no initialised token with {}.",
                token.name,
                token.selector()
            ));
        } else {
            checks.push(format!(
                "Token {}: the token has no key with an id of the plan, and no signing key of another ceremony.",
                token.name
            ));
        }
    }
    if plan.register {
        checks.push("The database has no registered wrapping key.".to_owned());
    }
    checks
}

fn steps_of_token(plan: &Plan, token: &Token) -> Vec<Step> {
    let mut steps = Vec::new();
    if let (true, Some(threshold)) = (token.initialise, token.so_pin_threshold) {
        let names: Vec<&str> = plan
            .custodians
            .iter()
            .map(|one| one.name.as_str())
            .collect();
        let count = names.len();
        steps.push(Step {
            who: names.join(", "),
            what: format!(
                "Make the security officer's PIN of token {} with {} random characters, split it into {count} shares of which \
                 any {threshold} give the PIN, and show each custodian one share.",
                token.name,
                token.so_pin_characters()
            ),
            checks: vec![
                "Only the custodian sees the screen, and writes the share down.".to_owned(),
                "The screen is cleared between two custodians.".to_owned(),
                "The transcript has the digest of each share, and not the share.".to_owned(),
            ],
            ..empty(Action::SplitSoPin)
        });
        steps.push(Step {
            who: OPERATOR.to_owned(),
            what: format!(
                "Initialise token {} with {}, with the PIN that was split, and set its user PIN.",
                token.name,
                token.selector()
            ),
            checks: vec!["The token has the label, and a serial number.".to_owned()],
            ..empty(Action::Initialise)
        });
    }
    steps.push(Step {
        who: OPERATOR.to_owned(),
        what: format!("Log in to token {} and record what it is.", token.name),
        checks: vec![
            "The transcript has the SHA-256 of the module, the serial number, and the versions of hardware and firmware."
                .to_owned(),
        ],
        ..empty(Action::Identify)
    });
    steps.push(Step {
        who: OPERATOR.to_owned(),
        what: format!(
            "Generate the signing key of this ceremony on token {}: RSA with 3072 bits, which can only sign.",
            token.name
        ),
        checks: vec![
            "Every attribute is read back: the key cannot leave the token.".to_owned(),
            "A trial signature verifies.".to_owned(),
        ],
        ..empty(Action::GenerateSigningKey)
    });
    for (index, key) in token.keys.iter().enumerate() {
        steps.push(Step {
            key: Some(index),
            ..step_of_key(token, key)
        });
    }
    steps
}

fn step_of_registration(key: &str) -> Step {
    Step {
        who: OPERATOR.to_owned(),
        what: format!("Register wrapping key {key} in the database."),
        checks: vec![
            "`keybroker key list` shows the id and the fingerprint of the transcript.".to_owned(),
        ],
        ..empty(Action::Register)
    }
}

fn step_of_key(token: &Token, key: &Key) -> Step {
    let id = key
        .id
        .as_deref()
        .map_or_else(|| "a random id".to_owned(), |id| format!("the id {id}"));
    let mut checks = vec![
        "Every attribute of both keys is read back and has the required value.".to_owned(),
        "The self-test unwraps a known value, and the token refuses the uses that must fail."
            .to_owned(),
    ];
    checks.extend(
        key.algorithm
            .as_ref()
            .map(|name| format!("The algorithm is {name}.")),
    );
    Step {
        who: OPERATOR.to_owned(),
        what: format!(
            "Generate wrapping key {} on token {}: RSA with {} bits and {id}, and its integrity key.",
            key.name, token.name, key.bits
        ),
        checks,
        ..empty(Action::GenerateKey)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::tests::text;

    fn actions(text: &str) -> Vec<Action> {
        let plan = Plan::parse(text).unwrap();
        steps(&plan).iter().map(|step| step.action).collect()
    }

    #[test]
    fn a_new_token_gets_its_pin_before_it_is_initialised() {
        let expected = [
            Action::CheckNothingExists,
            Action::SplitSoPin,
            Action::Initialise,
            Action::Identify,
            Action::GenerateSigningKey,
            Action::GenerateKey,
            Action::Sign,
            Action::Register,
        ];
        assert_eq!(actions(&text()), expected);
    }

    #[test]
    fn an_initialised_token_keeps_its_pins() {
        let text = text().replace("initialise = true\nso_pin_threshold = 2", "");
        let expected = [
            Action::CheckNothingExists,
            Action::Identify,
            Action::GenerateSigningKey,
            Action::GenerateKey,
            Action::Sign,
        ];
        let text = text.replace("quorum = 2", "quorum = 2\nregister = false");
        assert_eq!(actions(&text), expected);
    }

    #[test]
    fn steps_are_numbered_and_say_who_does_what() {
        let plan = Plan::parse(&text()).unwrap();
        for (index, step) in steps(&plan).iter().enumerate() {
            assert_eq!(step.number, u64::try_from(index).unwrap() + 1);
            assert!(!step.who.is_empty() && step.what.ends_with('.') && !step.checks.is_empty());
        }
        let after = afterwards(&plan, "t.json");
        assert!(
            after[0].contains("ssh-keygen -Y sign -n keybroker-ceremony"),
            "{after:?}"
        );
        assert!(after.last().unwrap().contains("--quorum 2"), "{after:?}");
    }
}
