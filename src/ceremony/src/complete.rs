//! What a complete transcript must have: every step of the plan in it, and everything that these steps make.
//!
//! Mitigation: M24 of `THREAT_MODEL.md`.

use std::collections::BTreeSet;

use aws_lc_rs::rsa::PublicEncryptingKey;

use crate::{
    plan::{self, Plan},
    script::{self, Action},
    transcript::{Attribute, Key, SigningKey, SoPin, Token, Transcript, base64},
};

/// Length of the modulus of a signing key, in bits.
pub const SIGNING_KEY_BITS: usize = 3_072;
/// The object of a wrapping key in the list of attributes.
pub const PRIVATE_KEY: &str = "RSA private key";
/// The object of a signing key in the list of attributes.
pub const SIGNING_KEY: &str = "signing key";
/// The attributes that keep a private key on the token.
const KEPT_ON_TOKEN: [&str; 2] = ["CKA_SENSITIVE", "CKA_EXTRACTABLE"];

/// What a transcript lacks to be a complete one of this plan, each as a sentence without a full stop.
pub fn problems(transcript: &Transcript, plan: &Plan) -> Vec<String> {
    let mut found = Vec::new();
    if transcript.title != plan.title.trim() {
        found.push("the title of the transcript is not that of the plan".to_owned());
    }
    if transcript.witnesses != plan.witnesses {
        found.push("the witnesses of the transcript are not those of the plan".to_owned());
    }
    found.extend(problems_of_steps(transcript, plan));
    if transcript.tokens.len() != plan.tokens.len() {
        found.push(format!(
            "the transcript has {} tokens, but the plan has {}",
            transcript.tokens.len(),
            plan.tokens.len()
        ));
    }
    for (token, planned) in transcript.tokens.iter().zip(&plan.tokens) {
        let problems = problems_of_token(token, planned, plan);
        found.extend(problems.map(|one| format!("token {}: {one}", token.name)));
    }
    if !are_different(public_keys(transcript)) {
        found.push("two keys of the transcript have the same public key".to_owned());
    }
    found
}

fn are_different<'a>(texts: impl Iterator<Item = &'a str>) -> bool {
    let mut seen = BTreeSet::new();
    texts.into_iter().all(|text| seen.insert(text))
}

fn public_keys(transcript: &Transcript) -> impl Iterator<Item = &str> {
    transcript.tokens.iter().flat_map(|token| {
        let keys = token.keys.iter().map(|key| key.public_key.as_str());
        keys.chain(
            token
                .signing_key
                .as_ref()
                .map(|key| key.public_key.as_str()),
        )
    })
}

/// The transcript has every step but the ones after its end.
fn problems_of_steps(transcript: &Transcript, plan: &Plan) -> Vec<String> {
    let expected: Vec<script::Step> = script::steps(plan)
        .into_iter()
        .filter(|step| !matches!(step.action, Action::Sign | Action::Register))
        .collect();
    let mut found = Vec::new();
    if transcript.steps.len() != expected.len() {
        found.push(format!(
            "the transcript has {} steps, but the plan has {}",
            transcript.steps.len(),
            expected.len()
        ));
    }
    for (step, planned) in transcript.steps.iter().zip(&expected) {
        if step.number != planned.number || step.what != planned.what {
            found.push(format!("step {} is not that of the plan", planned.number));
        }
        if step.result != "done" || step.ended.is_none() {
            found.push(format!(
                "step {} was not done: {}",
                step.number, step.result
            ));
        }
    }
    found
}

fn problems_of_token(
    token: &Token,
    planned: &plan::Token,
    plan: &Plan,
) -> impl Iterator<Item = String> {
    let mut found = Vec::new();
    if token.module != planned.module.display().to_string() {
        found.push("its module is not that of the plan".to_owned());
    }
    if token.initialised != planned.initialise {
        found.push(format!(
            "the plan says `initialise = {}`, but the transcript says {}",
            planned.initialise, token.initialised
        ));
    }
    let serial = token.identity.as_ref().map(|identity| &identity.serial);
    if planned.initialise && token.initialised_serial.as_ref() != serial {
        found.push("the token is not the one that was initialised".to_owned());
    }
    found.extend(problems_of_identity(token, planned));
    found.extend(problem_of_so_pin(token.so_pin.as_ref(), planned, plan));
    if token.keys.len() != planned.keys.len() {
        found.push(format!(
            "the transcript has {} wrapping keys, but the plan has {}",
            token.keys.len(),
            planned.keys.len()
        ));
    }
    for (key, planned) in token.keys.iter().zip(&planned.keys) {
        let problems = problems_of_key(key, planned);
        found.extend(
            problems
                .into_iter()
                .map(|one| format!("key {}: {one}", planned.name)),
        );
    }
    match &token.signing_key {
        None => found.push("there is no signing key".to_owned()),
        Some(key) => found.extend(problems_of_signing_key(key)),
    }
    found.into_iter()
}

fn problems_of_identity(token: &Token, planned: &plan::Token) -> Vec<String> {
    let Some(identity) = &token.identity else {
        return vec!["the transcript does not say what the token is".to_owned()];
    };
    let mut found = Vec::new();
    if !is_sha256(&identity.module_sha256) {
        found.push("the SHA-256 of its module is missing".to_owned());
    }
    for (name, planned, actual) in [
        ("label", &planned.label, &identity.label),
        ("serial number", &planned.serial, &identity.serial),
    ] {
        if planned.as_ref().is_some_and(|planned| planned != actual) {
            found.push(format!(
                "its {name} is {actual:?}, but the plan has another one"
            ));
        }
    }
    found
}

/// The threshold, the number of characters and the custodian of each share are those of the plan.
fn problem_of_so_pin(so_pin: Option<&SoPin>, planned: &plan::Token, plan: &Plan) -> Option<String> {
    let so_pin = match (so_pin, planned.initialise) {
        (None, false) => return None,
        (Some(_), false) => return Some("the plan does not split a PIN".to_owned()),
        (None, true) => return Some("there are no shares of the PIN".to_owned()),
        (Some(so_pin), true) => so_pin,
    };
    let is_number = |value: u64, planned: usize| u64::try_from(planned) == Ok(value);
    if !is_number(
        so_pin.threshold,
        planned.so_pin_threshold.unwrap_or_default(),
    ) {
        return Some("the threshold of the shares is not that of the plan".to_owned());
    }
    if !is_number(so_pin.characters, planned.so_pin_characters()) {
        return Some("the length of the PIN is not that of the plan".to_owned());
    }
    let custodians = plan.custodians.iter().map(|one| one.name.as_str());
    let are_theirs = so_pin
        .shares
        .iter()
        .map(|one| one.custodian.as_str())
        .eq(custodians);
    let are_numbered = so_pin
        .shares
        .iter()
        .zip(1..)
        .all(|(one, number)| one.number == number);
    if !are_theirs || !are_numbered {
        return Some("the shares are not one for each custodian of the plan".to_owned());
    }
    let are_digests = so_pin.shares.iter().all(|one| is_sha256(&one.sha256))
        && are_different(so_pin.shares.iter().map(|one| one.sha256.as_str()));
    (!are_digests).then(|| "the digests of the shares are not different SHA-256".to_owned())
}

fn problems_of_key(key: &Key, planned: &plan::Key) -> Vec<String> {
    let mut found = Vec::new();
    if key.name != planned.name {
        found.push(format!("the transcript has key {} instead", key.name));
    }
    if planned.id.as_ref().is_some_and(|id| *id != key.id) {
        found.push("its id is not that of the plan".to_owned());
    }
    let bits = bits_of(&key.public_key);
    if key.bits != u64::from(planned.bits) || bits != usize::try_from(planned.bits).ok() {
        found.push(format!(
            "its length is not {} bits as in the plan",
            planned.bits
        ));
    }
    let is_planned = match &planned.algorithm {
        Some(planned) => key.algorithm == *planned,
        None => plan::ALGORITHMS.contains(&key.algorithm.as_str()),
    };
    if !is_planned {
        found.push(format!(
            "its algorithm {} is not that of the plan",
            key.algorithm
        ));
    }
    if !["token", "worker"].contains(&key.integrity_key.as_str()) {
        found.push("the place of its integrity key is not known".to_owned());
    }
    if key.self_test != "passed" {
        found.push(format!("its self-test did not pass: {}", key.self_test));
    }
    found.extend(problem_of_attributes(&key.attributes, PRIVATE_KEY));
    found
}

fn problems_of_signing_key(key: &SigningKey) -> Vec<String> {
    let mut found = Vec::new();
    if bits_of(&key.public_key) != Some(SIGNING_KEY_BITS) {
        found.push(format!(
            "its signing key is not RSA with {SIGNING_KEY_BITS} bits"
        ));
    }
    let problem = problem_of_attributes(&key.attributes, SIGNING_KEY);
    found.extend(problem.map(|one| format!("signing key: {one}")));
    found
}

/// Every attribute passes, and the ones that keep the key on the token were read back.
fn problem_of_attributes(attributes: &[Attribute], object: &str) -> Option<String> {
    if let Some(wrong) = attributes.iter().find(|one| !one.passes) {
        return Some(format!("an attribute does not pass: {}", wrong.finding));
    }
    let was_read = |name: &&str| {
        let of_object = attributes.iter().filter(|one| one.object == object);
        of_object.into_iter().any(|one| one.finding.contains(*name))
    };
    let missing = KEPT_ON_TOKEN.iter().find(|name| !was_read(name))?;
    Some(format!("the attribute {missing} was not read back"))
}

fn bits_of(public_key: &str) -> Option<usize> {
    let der = base64(public_key)?;
    Some(PublicEncryptingKey::from_der(&der).ok()?.key_size_bits())
}

fn is_sha256(text: &str) -> bool {
    text.len() == 64
        && text
            .bytes()
            .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}
