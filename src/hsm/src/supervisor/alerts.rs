//! Limits the log lines of repeated alerts. The first alert is logged immediately. Further alerts of the same kind
//! within an interval are logged in one line with their number.

use std::time::Duration;

use keybroker_core::alert::Alert;

/// Interval at which a repeated alert is logged.
const INTERVAL: Duration = Duration::from_mins(1);

/// A line to log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Line {
    pub(super) alert: Alert,
    /// The latest cause.
    pub(super) cause: String,
    /// Number of times that the alert was raised since its last line.
    pub(super) count: u64,
}

#[derive(Debug)]
struct Held {
    alert: Alert,
    until: Duration,
    count: u64,
    cause: String,
}

/// The alerts that were logged within the last interval, at most one of each kind.
#[derive(Debug, Default)]
pub(super) struct Alerts(Vec<Held>);

impl Alerts {
    /// Returns the line to log now, or `None` if the last line of this alert is less than an interval old.
    pub(super) fn raise(&mut self, now: Duration, alert: Alert, cause: String) -> Option<Line> {
        if let Some(held) = self.0.iter_mut().find(|held| held.alert == alert) {
            held.count += 1;
            held.cause = cause;
            return None;
        }
        self.0.push(Held {
            alert,
            until: now + INTERVAL,
            count: 0,
            cause: String::new(),
        });
        Some(Line {
            alert,
            cause,
            count: 1,
        })
    }

    /// Returns the log lines for intervals that have ended. If the alert was raised again during an
    /// interval, another interval begins.
    pub(super) fn due(&mut self, now: Duration) -> Vec<Line> {
        let mut lines = Vec::new();
        self.0.retain_mut(|held| {
            if now < held.until {
                return true;
            }
            if held.count == 0 {
                return false;
            }
            lines.push(Line {
                alert: held.alert,
                cause: std::mem::take(&mut held.cause),
                count: std::mem::take(&mut held.count),
            });
            held.until = now + INTERVAL;
            true
        });
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_alert_that_repeats_is_one_line_an_interval() {
        let mut alerts = Alerts::default();
        let second = Duration::from_secs(1);
        let mut logged = Vec::new();
        for turn in 0..100 {
            let now = second * turn;
            logged.extend(alerts.due(now));
            if turn < 80 {
                logged.extend(alerts.raise(now, Alert::TokenDown, format!("cause {turn}")));
            }
        }
        logged.extend(alerts.due(second * 200));
        let counts: Vec<_> = logged.iter().map(|line| line.count).collect();
        assert_eq!(counts, [1, 59, 20]);
        assert_eq!(logged[1].cause, "cause 59");
        // After a quiet interval, the next alert is logged immediately.
        assert!(alerts.due(second * 300).is_empty());
        let next = alerts.raise(second * 301, Alert::TokenDown, "again".to_owned());
        assert_eq!(next.map(|line| line.count), Some(1));
    }

    #[test]
    fn one_kind_does_not_hide_another() {
        let mut alerts = Alerts::default();
        for alert in [Alert::TokenDown, Alert::TokenUntrusted, Alert::PinLatched] {
            let line = alerts.raise(Duration::ZERO, alert, String::new());
            assert!(line.is_some(), "{alert:?}");
        }
    }
}
