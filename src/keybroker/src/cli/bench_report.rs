//! `keybroker bench-report`: draws charts and writes tables from the JSON documents of `keybroker bench` and of long runs
//! with faults.

use std::{
    fs,
    path::{Path, PathBuf},
};

use clap::Args;
use serde_json::json;

use crate::output_file;

use super::{
    Context,
    bench::{
        document::{Document, ParseError},
        table,
    },
    exit::{Exit, Failure},
};

mod chart;
mod soak;
mod svg;

use chart::Named;
use soak::Soak;

#[derive(Args, Debug)]
pub(super) struct Arguments {
    /// JSON files that `keybroker bench --json` or `scripts/soak.sh` wrote
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Directory to write the charts and tables to
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

/// For each file `NAME.json`, writes the table `NAME.md` and the charts `NAME.svg` or `NAME-….svg`.
pub(super) fn run(arguments: &Arguments, context: &Context) -> Result<(), Failure> {
    let mut written = Vec::new();
    for file in &arguments.files {
        let usage = |what: String| Failure::new(Exit::Usage, format!("{}: {what}", file.display()));
        let text = fs::read_to_string(file).map_err(|error| usage(error.to_string()))?;
        let (charts, markdown) = read(&text).map_err(|error| {
            usage(error.to_string()).hint(
                "measure again with `keybroker bench --json FILE` or `scripts/soak.sh` of this release",
            )
        })?;
        let name = file.file_stem().and_then(|name| name.to_str());
        let name = name.ok_or_else(|| usage("the name of the file is not UTF-8".to_owned()))?;
        let table = format!("{name}.md");
        let charts = charts.into_iter().map(|chart| {
            let suffix = chart.suffix;
            (format!("{name}{suffix}.svg"), chart.svg.to_string())
        });
        let files = charts.chain([(table, markdown)]);
        for (name, text) in files {
            let path = arguments.out.join(name);
            write(&path, &text)?;
            written.push(path.display().to_string());
        }
    }
    context.output.list(
        written
            .into_iter()
            .map(|path| vec![("file", json!(path))])
            .collect(),
        "no files",
    )
}

/// The charts and the table of a document.
fn read(text: &str) -> Result<(Vec<Named>, String), ParseError> {
    if let Some(run) = Soak::parse(text) {
        let run = run.map_err(ParseError::Json)?;
        return Ok((run.charts(), run.markdown()));
    }
    let document = Document::parse(text)?;
    Ok((chart::charts(&document), table::markdown(&document)))
}

fn write(path: &Path, text: &str) -> Result<(), Failure> {
    output_file::replace(path, text).map_err(|error| {
        let what = format!("cannot write {}: {error}", path.display());
        Failure::new(Exit::Usage, what).hint("pass an existing directory with --out")
    })
}
