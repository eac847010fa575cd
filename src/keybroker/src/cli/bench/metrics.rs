//! Reads a histogram from `/metrics`: the time that the broker itself needs for an unwrap, without
//! the time in the queue and on the token.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

const TIMEOUT: Duration = Duration::from_secs(5);
const ANSWER_BYTES_MAX: u64 = 16 * 1024 * 1024;

const ADDED: &str = "keybroker_call_overhead_seconds";

/// The histogram at one point in time, or the difference between two points in time.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Added {
    seconds: f64,
    count: f64,
    /// For each bucket, the upper bound in seconds and the number of values up to this bound. The
    /// last bucket is left out, because it has no upper bound.
    buckets: Vec<(f64, f64)>,
}

impl Added {
    /// Reads the histogram from the status listener. Returns `None` if the listener does not
    /// answer; the other results do not need the histogram.
    pub(super) fn read(status: SocketAddr) -> Option<Self> {
        let mut stream = TcpStream::connect_timeout(&status, TIMEOUT).ok()?;
        stream.set_read_timeout(Some(TIMEOUT)).ok()?;
        // With HTTP/1.0, the server does not use chunked encoding, and closes the connection after
        // the answer.
        stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").ok()?;
        let mut text = String::new();
        stream
            .take(ANSWER_BYTES_MAX)
            .read_to_string(&mut text)
            .ok()?;
        Some(Self::parse(&text))
    }

    fn parse(text: &str) -> Self {
        let mut added = Self::default();
        for line in text.lines() {
            let Some((series, value)) = line
                .strip_prefix(ADDED)
                .and_then(|rest| rest.rsplit_once(' '))
            else {
                continue;
            };
            let value = value.parse().unwrap_or(0.0);
            let bound = series
                .strip_prefix("_bucket{le=\"")
                .and_then(|rest| rest.strip_suffix("\"}"))
                .and_then(|bound| bound.parse::<f64>().ok());
            match (series, bound) {
                ("_sum", _) => added.seconds = value,
                ("_count", _) => added.count = value,
                (_, Some(bound)) if bound.is_finite() => added.buckets.push((bound, value)),
                _ => {}
            }
        }
        added
    }

    pub(super) fn since(self, before: &Self) -> Self {
        let then = before.buckets.iter().map(|(_, count)| *count);
        // A histogram that was read before the first call has no buckets.
        let then = then.chain(std::iter::repeat(0.0));
        let buckets = self.buckets.into_iter().zip(then);
        Self {
            seconds: self.seconds - before.seconds,
            count: self.count - before.count,
            buckets: buckets
                .map(|((bound, now), then)| (bound, now - then))
                .collect(),
        }
    }

    /// The mean in milliseconds.
    pub(super) fn mean_ms(&self) -> Option<f64> {
        (self.count > 0.0).then(|| self.seconds / self.count * 1_000.0)
    }

    /// A quantile in milliseconds; interpolation assumes that values are spread evenly within a
    /// bucket. Returns `None` if the quantile is above the last bound.
    pub(super) fn quantile_ms(&self, quantile: f64) -> Option<f64> {
        let rank = quantile * self.count;
        let mut below = (0.0, 0.0);
        for &(bound, count) in &self.buckets {
            if count >= rank && count > below.1 {
                let part = (rank - below.1) / (count - below.1);
                return Some((below.0 + (bound - below.0) * part) * 1_000.0);
            }
            below = (bound, count);
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: &str = "HTTP/1.0 200 OK\r\n\r\n# TYPE keybroker_call_overhead_seconds histogram\n\
        keybroker_call_overhead_seconds_bucket{le=\"0.001\"} 50\n\
        keybroker_call_overhead_seconds_bucket{le=\"0.002\"} 90\n\
        keybroker_call_overhead_seconds_bucket{le=\"0.01\"} 98\n\
        keybroker_call_overhead_seconds_bucket{le=\"+Inf\"} 100\n\
        keybroker_call_overhead_seconds_sum 0.25\n\
        keybroker_call_overhead_seconds_count 100\n\
        keybroker_call_duration_seconds_sum{action=\"user_key.get\"} 7\n";

    fn close(figure: Option<f64>, expected: f64) -> bool {
        figure.is_some_and(|figure| (figure - expected).abs() < 1e-9)
    }

    #[test]
    fn quantiles_lie_inside_their_bucket() {
        let added = Added::parse(PAGE).since(&Added::default());
        assert!(close(added.mean_ms(), 2.5), "{added:?}");
        assert!(close(added.quantile_ms(0.5), 1.0), "{added:?}");
        assert!(close(added.quantile_ms(0.7), 1.5), "{added:?}");
        assert!(close(added.quantile_ms(0.98), 10.0), "{added:?}");
        assert_eq!(added.quantile_ms(0.99), None);
    }

    #[test]
    fn without_calls_there_is_no_figure() {
        let added = Added::parse(PAGE);
        let none = added.clone().since(&added);
        assert_eq!(none.mean_ms(), None);
        assert_eq!(none.quantile_ms(0.5), None);
    }
}
