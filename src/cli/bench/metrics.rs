//! What the broker says of its own time, from `/metrics`: total, queue and token, as sums and counts of histograms.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

const TIMEOUT: Duration = Duration::from_secs(5);
const ANSWER_BYTES_MAX: u64 = 16 * 1024 * 1024;

/// Label of the calls that are measured.
const UNWRAP: &str = "action=\"user_key.unwrap\"";

/// Seconds and number of what a histogram has seen.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Spent {
    seconds: f64,
    count: f64,
}

impl Spent {
    fn mean_since(self, before: Self) -> Option<f64> {
        let count = self.count - before.count;
        (count > 0.0).then(|| (self.seconds - before.seconds) / count)
    }
}

/// The three histograms at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Times {
    total: Spent,
    queue: Spent,
    token: Spent,
}

impl Times {
    /// Asks the status listener. Nothing when it does not answer: the other figures do not need it.
    pub(super) fn read(status: SocketAddr) -> Option<Self> {
        let mut stream = TcpStream::connect_timeout(&status, TIMEOUT).ok()?;
        stream.set_read_timeout(Some(TIMEOUT)).ok()?;
        // HTTP/1.0, so that the connection ends with the answer, and the answer comes in one piece.
        stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").ok()?;
        let mut text = String::new();
        stream
            .take(ANSWER_BYTES_MAX)
            .read_to_string(&mut text)
            .ok()?;
        Some(Self::parse(&text))
    }

    fn parse(text: &str) -> Self {
        let mut times = Self::default();
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let Some((series, value)) = line.rsplit_once(' ') else {
                continue;
            };
            let name = series.split('{').next().unwrap_or_default();
            let spent = match name.rsplit_once('_').map(|(metric, _)| metric) {
                Some("keybroker_call_seconds") if series.contains(UNWRAP) => &mut times.total,
                Some("keybroker_token_queue_seconds") => &mut times.queue,
                Some("keybroker_token_seconds") => &mut times.token,
                _ => continue,
            };
            let value: f64 = value.parse().unwrap_or(0.0);
            if name.ends_with("_sum") {
                spent.seconds += value;
            } else if name.ends_with("_count") {
                spent.count += value;
            }
        }
        times
    }

    /// Mean time that an unwrap spent neither in the queue nor on the token.
    pub(super) fn added_mean_ms(self, before: Self) -> Option<f64> {
        let total = self.total.mean_since(before.total)?;
        let queue = self.queue.mean_since(before.queue)?;
        let token = self.token.mean_since(before.token)?;
        Some((total - queue - token) * 1_000.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: &str = "HTTP/1.0 200 OK\r\n\r\n# TYPE keybroker_call_seconds histogram\n\
        keybroker_call_seconds_bucket{action=\"user_key.unwrap\",le=\"0.1\"} 10\n\
        keybroker_call_seconds_sum{action=\"user_key.unwrap\"} 0.5\n\
        keybroker_call_seconds_count{action=\"user_key.unwrap\"} 10\n\
        keybroker_call_seconds_sum{action=\"user_key.get\"} 7\n\
        keybroker_call_seconds_count{action=\"user_key.get\"} 1\n\
        keybroker_token_queue_seconds_sum 0.1\n\
        keybroker_token_queue_seconds_count 10\n\
        keybroker_token_seconds_sum 0.36\n\
        keybroker_token_seconds_count 12\n";

    #[test]
    fn what_the_broker_adds_is_total_less_queue_less_token() {
        let added = Times::parse(PAGE).added_mean_ms(Times::default()).unwrap();
        assert!((added - 10.0).abs() < 1e-9, "{added}");
    }

    #[test]
    fn without_calls_there_is_no_figure() {
        let times = Times::parse(PAGE);
        assert_eq!(times.added_mean_ms(times), None);
    }
}
