//! `keybroker token report`: what a token does, to publish and to compare.

use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
};

use clap::Args;

use keybroker_worker_protocol::report::{Answer, FORMAT, Outcome, Report, WORKS};

use crate::{
    cli::{
        Context,
        exit::{Exit, Failure},
        pin::{UserPin, log_in},
    },
    output_file,
};

#[derive(Args, Debug)]
pub(in crate::cli) struct Arguments {
    #[command(flatten)]
    pin: UserPin,
    /// Also make keys that stay on the token, and remove them
    #[arg(long)]
    write: bool,
    /// Show the serial number instead of a digest of it
    #[arg(long)]
    serial: bool,
    /// Also write the report to this file, as a page of Markdown
    #[arg(long, value_name = "FILE")]
    page: Option<PathBuf>,
    /// Compare with a published report (JSON); ends with 12 if the token is worse
    #[arg(long, value_name = "FILE")]
    expect: Option<PathBuf>,
}

pub(super) fn run(arguments: &Arguments, context: &Context) -> Result<(), Failure> {
    let config = context.config_for_token()?;
    let expected = arguments.expect.as_deref().map(published).transpose()?;
    let pin = arguments.pin.get(&config.token)?;
    let admin = log_in(&config, &pin, arguments.write)?;
    // Another process, while this one is logged in.
    let second = log_in(&config, &pin, false);
    let second = Answer {
        name: "a login by a second process".to_owned(),
        result: second.map_or_else(|failure| failure.to_string(), |_| WORKS.to_owned()),
    };
    let mut report = admin.report(&pin, arguments.write, arguments.serial)?;
    report.sessions.insert(0, second);
    if let Some(path) = &arguments.page {
        output_file::replace(path, &page(&report)).map_err(|error| {
            let what = format!("cannot write {}: {error}", path.display());
            Failure::new(Exit::Usage, what)
        })?;
    }
    if context.output.is_json() {
        let value = serde_json::to_value(&report)
            .map_err(|error| Failure::new(Exit::Internal, error.to_string()))?;
        context.output.json(&value)?;
    } else {
        context.output.text(page(&report).trim_end())?;
    }
    let Some(expected) = expected else {
        return Ok(());
    };
    let worse = report.worse_than(&expected);
    if worse.is_empty() {
        context
            .output
            .note("the token is no worse than in the published report");
        return Ok(());
    }
    let what = format!(
        "the token is worse than in the published report:\n  {}",
        worse.join("\n  ")
    );
    Err(Failure::new(Exit::Verification, what))
}

fn published(path: &Path) -> Result<Report, Failure> {
    let unusable =
        |what: String| Failure::new(Exit::Usage, format!("--expect {}: {what}", path.display()));
    let text = fs::read_to_string(path).map_err(|error| unusable(error.to_string()))?;
    let report: Report = serde_json::from_str(&text)
        .map_err(|error| unusable(format!("not a report of `keybroker token report`: {error}")))?;
    if report.format != FORMAT {
        return Err(unusable(format!(
            "it has format {}, this program knows {FORMAT}",
            report.format
        )));
    }
    Ok(report)
}

/// The report as a page of Markdown.
fn page(report: &Report) -> String {
    let identity = &report.identity;
    let verdict = &report.verdict;
    let mut page = format!("# {} {}\n\n", identity.manufacturer, identity.model);
    // Writing to a string does not fail.
    let mut line = |text: String| {
        let _written = writeln!(page, "{text}");
    };
    line(format!(
        "Made by `keybroker token report` {}. Verdict: **{}**.",
        report.keybroker,
        verdict.result.as_str()
    ));
    line(String::new());
    let heading = match verdict.result {
        Outcome::Works => "",
        Outcome::WorksWithExceptions => "What each exception accepts:",
        Outcome::Refused => "Why it cannot be used:",
    };
    if !heading.is_empty() {
        line(heading.to_owned() + "\n");
        for reason in &verdict.reasons {
            line(format!("- {reason}"));
        }
        line(String::new());
    }
    if !verdict.settings.is_empty() {
        line(format!(
            "```toml\n[token]\n{}\n```\n",
            verdict.settings.join("\n")
        ));
    }
    line("## Identity\n".to_owned());
    line(table(&["", ""], identity_rows(report)));
    for (heading, answers) in [
        ("Sessions and login", &report.sessions),
        ("What must work", &report.positive),
        ("Keys that stay on the token", &report.token_objects),
        ("Answers to wrong input", &report.errors),
    ] {
        if !answers.is_empty() {
            let rows = answers
                .iter()
                .map(|answer| vec![answer.name.clone(), answer.result.clone()]);
            line(format!("## {heading}\n"));
            line(table(&["Tried", "Result"], rows));
        }
    }
    line("## What must not work\n".to_owned());
    line(table(
        &[
            "Test",
            "What the token would do",
            "Result",
            "Code",
            "Session usable afterwards",
        ],
        report.negative.iter().map(|test| {
            vec![
                format!("`{}`", test.name),
                test.meaning.clone(),
                test.result.clone(),
                test.code.clone().unwrap_or_default(),
                yes(test.session_is_usable),
            ]
        }),
    ));
    line("## Attributes of the templates\n".to_owned());
    line(table(
        &[
            "Object",
            "Attribute",
            "In a template",
            "Read",
            "Read by a length query",
        ],
        report.templates.iter().map(|row| {
            vec![
                row.object.clone(),
                format!("`{}`", row.attribute),
                row.in_template.clone(),
                row.read.clone(),
                row.length_query.clone(),
            ]
        }),
    ));
    line("## Rates\n".to_owned());
    line(
        match report.token_cpu_is_local {
            Some(true) => "The token's work takes CPU time of this machine.\n",
            Some(false) => "The token's work takes no CPU time of the process that uses it.\n",
            None => "It was not measured where the token works.\n",
        }
        .to_owned(),
    );
    line(table(
        &["Measured", "Value"],
        report
            .rates
            .iter()
            .map(|rate| vec![rate.name.clone(), rate.value.to_string()]),
    ));
    page
}

fn identity_rows(report: &Report) -> Vec<Vec<String>> {
    let identity = &report.identity;
    let serial = match (&identity.serial, &identity.serial_sha256) {
        (Some(serial), _) => serial.clone(),
        (None, Some(digest)) => format!("SHA-256 {digest}…"),
        (None, None) => "none".to_owned(),
    };
    let limit = |limit: Option<u64>| match limit {
        None => "not said".to_owned(),
        Some(0) => "no limit".to_owned(),
        Some(limit) => limit.to_string(),
    };
    let [shortest, longest] = identity.pin_bytes;
    let [sessions, writing] = identity.sessions_max;
    [
        ("Module", identity.module.clone()),
        (
            "Module file",
            format!(
                "{} bytes, SHA-256 {}",
                identity.module_bytes, identity.module_sha256
            ),
        ),
        ("Library", identity.library.clone()),
        ("PKCS#11 version", identity.cryptoki_version.clone()),
        ("Manufacturer", identity.manufacturer.clone()),
        ("Model", identity.model.clone()),
        (
            "Hardware, firmware",
            format!(
                "{}, {}",
                identity.hardware_version, identity.firmware_version
            ),
        ),
        ("Serial number", serial),
        (
            "Another token has the same label",
            yes(identity.label_is_shared),
        ),
        ("Texts padded with NUL", yes(identity.padded_with_nul)),
        ("Clock", identity.clock.clone()),
        ("Flags", identity.flags.clone()),
        ("PIN", format!("{shortest} to {longest} bytes")),
        (
            "Sessions, read-write sessions",
            format!("{}, {}", limit(sessions), limit(writing)),
        ),
    ]
    .into_iter()
    .map(|(name, value)| vec![name.to_owned(), value])
    .collect()
}

fn yes(is_so: bool) -> String {
    if is_so { "yes" } else { "no" }.to_owned()
}

fn table(headings: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let row = |cells: Vec<String>| {
        let cells: Vec<String> = cells
            .into_iter()
            .map(|cell| cell.replace('|', "\\|").replace('\n', " "))
            .collect();
        format!("| {} |\n", cells.join(" | "))
    };
    let mut table = row(headings.iter().map(|&heading| heading.to_owned()).collect());
    table += &format!("|{}\n", "---|".repeat(headings.len()));
    for cells in rows {
        table += &row(cells);
    }
    table
}
