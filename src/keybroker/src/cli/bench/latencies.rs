//! A histogram of times.

use std::time::Duration;

use hdrhistogram::Histogram;

use super::document::real;

/// Longest time that the histogram can record, in microseconds: ten minutes.
const MICROS_MAX: u64 = 600_000_000;

/// A histogram of times with a precision of three significant digits.
#[derive(Clone, Debug)]
pub(super) struct Latencies(Histogram<u64>);

impl Latencies {
    pub(super) fn new() -> Self {
        let histogram = Histogram::new_with_bounds(1, MICROS_MAX, 3);
        Self(histogram.expect("the bounds are constants that the library accepts"))
    }

    /// Adds a time. Times above ten minutes count as ten minutes.
    pub(super) fn record(&mut self, time: Duration) {
        let micros = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        self.0.saturating_record(micros.max(1));
    }

    pub(super) fn add(&mut self, other: &Self) {
        self.0
            .add(&other.0)
            .expect("all histograms have the same bounds");
    }

    /// The number of recorded times.
    #[cfg(test)]
    pub(super) fn count(&self) -> u64 {
        self.0.len()
    }

    /// A quantile in milliseconds, or `None` if the histogram is empty.
    pub(super) fn quantile_ms(&self, quantile: f64) -> Option<f64> {
        (!self.0.is_empty()).then(|| real(self.0.value_at_quantile(quantile)) / 1_000.0)
    }

    /// The longest time in milliseconds, or `None` if the histogram is empty.
    pub(super) fn max_ms(&self) -> Option<f64> {
        self.quantile_ms(1.0)
    }
}
