//! The progress of a long job, on standard error when that is a terminal.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

use super::output::Output;

/// Between two looks at the clock; the speed and the rest of the time stay true while nothing moves.
const REDRAW: Duration = Duration::from_millis(250);

/// A bar of known length. It disappears when it is dropped.
#[derive(Debug)]
pub(super) struct Progress(ProgressBar);

impl Progress {
    /// Begins. Shows nothing with `-o json`, nor where standard error is no terminal.
    pub(super) fn new(output: Output, what: &'static str, total: u64) -> Self {
        if output.is_json() {
            return Self(ProgressBar::hidden());
        }
        let bar = ProgressBar::new(total).with_message(what);
        let style = "{msg} {wide_bar} {human_pos}/{human_len}, {per_sec}, {eta} left";
        bar.set_style(ProgressStyle::with_template(style).expect("the template is a constant"));
        bar.enable_steady_tick(REDRAW);
        Self(bar)
    }

    /// Adds one finished item.
    pub(super) fn step(&self) {
        self.advance(1);
    }

    /// Adds a number of finished items.
    pub(super) fn advance(&self, count: u64) {
        self.0.inc(count);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
