//! The transcript as a page of plain text, to print and to read before signing.

use std::fmt::Write as _;

use crate::{
    plan::Plan,
    script::{self, Step},
    transcript::{Attribute, Key, Status, Token, Transcript},
};

/// Number of characters of a line on the page.
const COLUMNS: usize = 96;

/// The page of a transcript. `sha256` is that of the transcript, which custodians compare before they sign.
pub fn of_transcript(transcript: &Transcript, sha256: &str) -> String {
    let mut page = String::new();
    let mut line = |text: String| {
        page.push_str(&text);
        page.push('\n');
    };
    line(format!("KEY CEREMONY: {}", transcript.title));
    line(format!(
        "Status: {}",
        match transcript.status {
            Status::Complete => "complete",
            Status::Incomplete => "INCOMPLETE",
        }
    ));
    line(format!(
        "From {} to {} (UTC)",
        transcript.started, transcript.ended
    ));
    line(format!("SHA-256 of the transcript: {sha256}"));
    line(format!(
        "SHA-256 of the plan:       {}",
        transcript.plan.sha256
    ));
    line(format!(
        "Program: {} (SHA-256 {})",
        transcript.program, transcript.program_sha256
    ));
    line(format!("Run by: {}", transcript.operator));
    line(String::new());
    line(format!("CUSTODIANS ({} must sign)", transcript.quorum));
    for custodian in &transcript.custodians {
        line(format!(
            "  {:<16} {}",
            custodian.name, custodian.fingerprint
        ));
        line("  signature: ______________________________".to_owned());
    }
    for witness in &transcript.witnesses {
        line(format!(
            "  witness: {witness}    ______________________________"
        ));
    }
    for token in &transcript.tokens {
        line(String::new());
        line(of_token(token));
    }
    line(String::new());
    line("STEPS".to_owned());
    for step in &transcript.steps {
        line(wrapped(&format!("  {:>2}. ", step.number), &step.what));
        line(format!(
            "      {} to {}: {}",
            step.started,
            step.ended.as_deref().unwrap_or("-"),
            step.result
        ));
    }
    page
}

fn of_token(token: &Token) -> String {
    let mut lines = vec![
        format!("TOKEN {}", token.name),
        format!("  module: {}", token.module),
    ];
    if let Some(identity) = &token.identity {
        lines.push(format!("  module SHA-256: {}", identity.module_sha256));
        lines.push(format!("  library: {}", identity.library));
        lines.push(format!(
            "  label: {}, serial: {}",
            identity.label, identity.serial
        ));
        lines.push(format!(
            "  {}, {}, hardware {}, firmware {}",
            identity.manufacturer,
            identity.model,
            identity.hardware_version,
            identity.firmware_version
        ));
    }
    lines.push(format!(
        "  initialised in this ceremony: {}",
        if token.initialised { "yes" } else { "no" }
    ));
    if let Some(so_pin) = &token.so_pin {
        lines.push(format!(
            "  security officer's PIN: {} shares, any {} give the PIN",
            so_pin.shares.len(),
            so_pin.threshold
        ));
        for share in &so_pin.shares {
            lines.push(format!(
                "    share {} of {}: SHA-256 {}",
                share.number, share.custodian, share.sha256
            ));
        }
    }
    for key in &token.keys {
        lines.extend(of_key(key));
    }
    if let Some(key) = &token.signing_key {
        lines.push(format!("  SIGNING KEY {}", key.id));
        lines.push(format!("    public key SHA-256: {}", key.fingerprint));
        lines.extend(of_attributes(&key.attributes));
    }
    lines.join("\n")
}

fn of_key(key: &Key) -> Vec<String> {
    let mut lines = vec![
        format!("  WRAPPING KEY {} ({})", key.name, key.id),
        format!("    RSA with {} bits, {}", key.bits, key.algorithm),
        format!("    public key SHA-256: {}", key.fingerprint),
        format!("    integrity key: {}", key.integrity_key),
        format!("    self-test: {}", key.self_test),
    ];
    if !key.tests_not_run.is_empty() {
        lines.push(format!(
            "    negative tests that the token cannot run: {}",
            key.tests_not_run.join(", ")
        ));
    }
    lines.extend(of_attributes(&key.attributes));
    lines
}

fn of_attributes(attributes: &[Attribute]) -> Vec<String> {
    let line = |one: &Attribute| {
        let result = if one.passes { "ok  " } else { "FAIL" };
        format!("    {result} {}: {}", one.object, one.finding)
    };
    attributes.iter().map(line).collect()
}

/// The script of a plan for auditors.
pub fn of_script(plan: &Plan, transcript: &str) -> String {
    let mut page = format!(
        "SCRIPT OF THE KEY CEREMONY: {}\nSHA-256 of the plan: {}\n",
        plan.title.trim(),
        plan.sha256
    );
    let names: Vec<&str> = plan
        .custodians
        .iter()
        .map(|one| one.name.as_str())
        .collect();
    // Writing to a string cannot fail.
    let _written = writeln!(
        page,
        "Custodians: {} ({} must sign)\n",
        names.join(", "),
        plan.quorum
    );
    for step in script::steps(plan) {
        page.push_str(&of_step(&step));
    }
    page.push_str("Afterwards:\n");
    for line in script::afterwards(plan, transcript) {
        let _written = writeln!(page, "  - {line}");
    }
    page
}

fn of_step(step: &Step) -> String {
    let mut lines = vec![wrapped(&format!("[ ] {}. ", step.number), &step.what)];
    lines.push(wrapped("      Who: ", &step.who));
    lines.extend(
        step.checks
            .iter()
            .map(|check| wrapped("      Check: ", check)),
    );
    lines.join("\n") + "\n"
}

/// Breaks a text into lines that fit on a page. `lead` stands before the first line; the others are indented like it.
fn wrapped(lead: &str, text: &str) -> String {
    let width = lead.chars().count();
    let mut page = lead.to_owned();
    let mut column = width;
    for (index, word) in text.split(' ').enumerate() {
        let length = word.chars().count();
        if index > 0 && column + 1 + length > COLUMNS {
            page.push('\n');
            page.extend(std::iter::repeat_n(' ', width));
            column = width;
        } else if index > 0 {
            page.push(' ');
            column += 1;
        }
        page.push_str(word);
        column += length;
    }
    page
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{plan::tests::text, transcript::tests::begun};

    #[test]
    fn the_page_has_what_a_custodian_compares() {
        let transcript = begun(&text());
        let page = of_transcript(&transcript, "abcd");
        for expected in [
            "INCOMPLETE",
            "abcd",
            &transcript.plan.sha256,
            "ada",
            "SHA256:",
            "Grace Example",
            "TOKEN default",
        ] {
            assert!(page.contains(expected), "{expected}: {page}");
        }
    }

    #[test]
    fn long_texts_are_broken_between_words() {
        let text = "word ".repeat(40);
        let page = wrapped("  1. ", text.trim());
        assert!(page.lines().all(|line| line.len() <= COLUMNS), "{page}");
        assert!(
            page.lines()
                .skip(1)
                .all(|line| line.starts_with("     word")),
            "{page}"
        );
        assert_eq!(page.matches("word").count(), 40);
        let long = "x".repeat(200);
        assert_eq!(wrapped("", &long), long);
    }

    #[test]
    fn the_script_has_every_step() {
        let plan = Plan::parse(&text()).unwrap();
        let page = of_script(&plan, "t.json");
        assert!(
            page.lines()
                .filter(|line| !line.starts_with("  - "))
                .all(|line| line.len() <= COLUMNS)
        );
        let flat = page.split_whitespace().collect::<Vec<_>>().join(" ");
        for step in script::steps(&plan) {
            let text = format!("[ ] {}. {}", step.number, step.what);
            assert!(flat.contains(&text), "{page}");
        }
        assert!(
            page.contains("Who: ada, bob") && page.contains("ceremony verify t.json"),
            "{page}"
        );
    }
}
