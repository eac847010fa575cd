//! Shows the progress of a long operation on standard error, if standard error is a terminal.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

use super::output::Output;

/// Interval between two updates of the bar. Each update recalculates the speed and the remaining
/// time, even if no item was finished.
const REDRAW: Duration = Duration::from_millis(250);

/// A progress bar for a known number of items. Dropping the value removes the bar from the
/// terminal.
#[derive(Debug)]
pub(super) struct Progress(ProgressBar);

impl Progress {
    /// Shows a progress bar, except with `-o json` or if standard error is not a terminal.
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
