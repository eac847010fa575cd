//! `keybroker token report`: reports the operations that a token supports. Users can publish the
//! report, and compare a token with a published report.

use std::{
    fs,
    path::{Path, PathBuf},
};

use clap::Args;

use keybroker_audit::Entry;
use keybroker_hsm::admin::Admin;
use keybroker_worker_protocol::report::{
    Answer, FORMAT, Outcome, REMOVED, Report, SealedRelease, WORKS,
};

use crate::{
    cli::{
        Context, change,
        exit::{Exit, Failure},
        pin::{UserPin, log_in, serials},
    },
    output_file,
};

use super::registry;

#[derive(Args, Debug)]
pub(in crate::cli) struct Arguments {
    #[command(flatten)]
    pin: UserPin,
    /// Also test with keys that the command stores on the token and removes afterwards; the audit
    /// log records this test
    #[arg(long)]
    write: bool,
    /// Include the token's serial number in the report
    #[arg(long)]
    serial: bool,
    /// Also write the report to this file as a Markdown page
    #[arg(long, value_name = "FILE")]
    page: Option<PathBuf>,
    /// Compare the token with a published report in JSON; the command fails with exit code 12 if the token is worse
    /// than in the report
    #[arg(long, value_name = "FILE")]
    expect: Option<PathBuf>,
}

pub(super) fn run(arguments: &Arguments, context: &Context) -> Result<(), Failure> {
    let config = context.config_for_token()?;
    let expected = arguments.expect.as_deref().map(published).transpose()?;
    let pin = arguments.pin.get(config.token())?;
    // A report does not need a database. Without a database, only the settings select the token.
    let rows = registry(&config).unwrap_or_default();
    let serials = serials(&rows.rows);
    let admin = log_in(&config, &pin, arguments.write, &serials)?;
    // A second process logs in while the first process is logged in.
    let second = log_in(&config, &pin, false, &serials);
    let logins = logins_of_two_processes(second);
    let make = || Ok(admin.report(&pin, arguments.write, arguments.serial)?);
    let mut report = if arguments.write {
        change::audited(context, &config, "token.report", |_: &mut Entry| {}, make)?
    } else {
        make()?
    };
    report.sessions.splice(0..0, logins);
    warn_of_remains(context, &report);
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
            .note("the token is as good as in the published report, or better");
        return Ok(());
    }
    let what = format!(
        "the token is worse than in the published report:\n  {}",
        worse.join("\n  ")
    );
    Err(Failure::new(Exit::Verification, what))
}

/// Reports whether each process has a separate login. The second process must end before the first process logs out.
fn logins_of_two_processes(second: Result<Admin, Failure>) -> Vec<Answer> {
    let answer = |name: &str, result: &str| Answer {
        name: name.to_owned(),
        result: result.to_owned(),
    };
    let whose = |admin: &Admin| {
        if admin.is_login_of_another() {
            "the login of the first process (CKR_USER_ALREADY_LOGGED_IN)"
        } else {
            "a separate login"
        }
    };
    match second {
        Ok(admin) => vec![
            answer("a login by a second process", WORKS),
            answer("the login of the second process", whose(&admin)),
        ],
        Err(failure) => vec![answer("a login by a second process", &failure.to_string())],
    }
}

/// Prints a warning about keys that a report with `--write` generated and could not remove. The
/// warning goes to standard error, because standard output contains the report.
fn warn_of_remains(context: &Context, report: &Report) {
    let removed = report
        .token_objects
        .iter()
        .find(|answer| answer.name == REMOVED && answer.result != WORKS);
    if let Some(answer) = removed {
        context.output.note(&format!("warning: {}", answer.result));
    }
}

fn published(path: &Path) -> Result<Report, Failure> {
    let unusable =
        |what: String| Failure::new(Exit::Usage, format!("--expect {}: {what}", path.display()));
    let text = fs::read_to_string(path).map_err(|error| unusable(error.to_string()))?;
    let report: Report = serde_json::from_str(&text)
        .map_err(|error| unusable(format!("not a report of `keybroker token report`: {error}")))?;
    if report.format != FORMAT {
        return Err(unusable(format!(
            "the report has format {}, but this program supports format {FORMAT}",
            report.format
        )));
    }
    Ok(report)
}

/// Formats the report as a Markdown page.
fn page(report: &Report) -> String {
    let mut parts = introduction(report);
    parts.push("## Identity".to_owned());
    parts.push(table(&["", ""], identity_rows(report)));
    for (heading, answers) in [
        ("Sessions and login", &report.sessions),
        ("Operations with the keys", &report.positive),
        ("Keys that stay on the token", &report.token_objects),
        ("Answers to wrong input", &report.errors),
    ] {
        if !answers.is_empty() {
            parts.push(format!("## {heading}"));
            parts.push(answer_table("Tried", answers));
        }
    }
    parts.push("## Forbidden operations".to_owned());
    parts.push(negative_table(report));
    parts.extend(report.sealed.iter().flat_map(sealed_release));
    parts.push("## Attributes of the templates".to_owned());
    parts.push(attribute_table(report));
    parts.push("## Rates".to_owned());
    let place = match report.token_cpu_is_local {
        Some(true) => "The token's operations use CPU time of the machine that wrote this page.",
        Some(false) => {
            "The token's operations use no CPU time of the process that wrote this page."
        }
        None => "The CPU time of the token's operations was not measured.",
    };
    parts.push(format!(
        "The rates were measured once; other load on the machine changes them. {place}"
    ));
    let rates = report.rates.iter();
    parts.push(table(
        &["Measured", "Value"],
        rates.map(|rate| vec![rate.name.clone(), rate.value.to_string()]),
    ));
    parts.join("\n\n") + "\n"
}

fn introduction(report: &Report) -> Vec<String> {
    let (identity, verdict) = (&report.identity, &report.verdict);
    let mut parts = vec![
        format!("# {} {}", identity.manufacturer, identity.model),
        format!(
            "`keybroker token report` {} wrote this page. Verdict: **{}**.",
            report.keybroker,
            verdict.result.as_str()
        ),
    ];
    let heading = match verdict.result {
        Outcome::Works => None,
        Outcome::WorksWithExceptions => Some("Risks of the permitted exceptions:"),
        Outcome::Refused => Some("Reasons why the broker cannot use this token:"),
    };
    if let Some(heading) = heading {
        parts.push(heading.to_owned());
        parts.push(format!("- {}", verdict.reasons.join("\n- ")));
    }
    if !verdict.settings.is_empty() {
        parts.push(format!(
            "```toml\n[token]\n{}\n```",
            verdict.settings.join("\n")
        ));
    }
    parts
}

fn answer_table(heading: &str, answers: &[Answer]) -> String {
    let rows = answers
        .iter()
        .map(|answer| vec![answer.name.clone(), answer.result.clone()]);
    table(&[heading, "Result"], rows)
}

fn sealed_release(sealed: &SealedRelease) -> Vec<String> {
    let reason = sealed
        .reason
        .as_ref()
        .map_or_else(String::new, |reason| format!(" Reason: {reason}."));
    let mut parts = vec![
        "## Sealed release".to_owned(),
        format!("Sealed release: **{}**.{reason}", sealed.result.as_str()),
        answer_table("Tried", &sealed.positive),
    ];
    if !sealed.forbidden.is_empty() {
        parts.push(answer_table("Forbidden behaviour", &sealed.forbidden));
    }
    parts
}

fn negative_table(report: &Report) -> String {
    let rows = report.negative.iter().map(|test| {
        vec![
            format!("`{}`", test.name),
            test.meaning.clone(),
            test.result.clone(),
            test.code.clone().unwrap_or_default(),
            yes(test.session_is_usable),
        ]
    });
    let headings = [
        "Test",
        "Forbidden behaviour",
        "Result",
        "Code",
        "Session usable afterwards",
    ];
    table(&headings, rows)
}

fn attribute_table(report: &Report) -> String {
    let rows = report.templates.iter().map(|row| {
        vec![
            row.object.clone(),
            format!("`{}`", row.attribute),
            row.in_template.clone(),
            row.read.clone(),
            row.length_query.clone(),
        ]
    });
    let headings = [
        "Object",
        "Attribute",
        "In a template",
        "Read",
        "Result of a length query",
    ];
    table(&headings, rows)
}

fn identity_rows(report: &Report) -> Vec<Vec<String>> {
    let identity = &report.identity;
    let serial = match (&identity.serial, identity.has_serial) {
        (Some(serial), _) => serial.clone(),
        (None, true) => "not shown".to_owned(),
        (None, false) => "none".to_owned(),
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
        format!("| {} |", cells.join(" | "))
    };
    let mut lines = vec![
        row(headings.iter().map(|&heading| heading.to_owned()).collect()),
        format!("|{}", "---|".repeat(headings.len())),
    ];
    lines.extend(rows.into_iter().map(row));
    lines.join("\n")
}
