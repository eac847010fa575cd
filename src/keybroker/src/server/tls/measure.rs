//! Metrics and alerts that change because time goes on: when certificates and revocation lists end.

use std::{collections::BTreeMap, path::Path, sync::Arc};

use keybroker_core::metrics;

use super::{
    Tls, held, now,
    revocation::{Age, Life},
};

pub(super) const SECONDS_PER_HOUR: i64 = 3_600;

impl Tls {
    /// Sets the metrics of these listeners anew, because time goes on while they serve, and raises the alerts of their revocation lists.
    /// Returns what is wrong with the lists, for the health of the broker; empty if nothing is.
    pub(in super::super) fn measure(listeners: &[Arc<Self>]) -> String {
        // Several listeners may have one file of lists.
        let mut files: BTreeMap<&Path, FileState> = BTreeMap::new();
        for one in listeners {
            let current = one.current();
            note_expiry(current.until, &one.settings.certificate_file);
            if let (Some(lists), Some(path)) = (&current.lists, &one.settings.client_crl_file)
                && let Some(life) = lists.life()
            {
                one.note_age(life, path);
                let file = files.entry(path).or_default();
                file.problems = file.problems.max(lists.problem_count());
                file.until = file
                    .until
                    .map_or(Some(life.until), |at| Some(at.min(life.until)));
            }
        }
        let now = now();
        let problems: Vec<String> = files
            .iter()
            .filter_map(|(path, file)| file.measure(path, now))
            .collect();
        problems.join("; ")
    }

    fn note_age(&self, life: Life, path: &Path) {
        let now = now();
        let shown = path.display().to_string();
        let hours = (life.until - now).div_euclid(SECONDS_PER_HOUR);
        let age = life.age(now);
        let mut reported = held(&self.age);
        if *reported == Some(age) {
            return;
        }
        match age {
            Age::Good => {}
            Age::Late => keybroker_core::alert!(
                ClientCrl, file = %shown, hours_left = hours,
                "a revocation list ends soon, and there is no newer one; then no client certificate is accepted"
            ),
            Age::Over => keybroker_core::alert!(
                ClientCrl, file = %shown,
                "a revocation list has ended: its authority's clients are refused until there is a newer one"
            ),
        }
        *reported = Some(age);
    }
}

/// What is known of a file of revocation lists.
#[derive(Default)]
struct FileState {
    problems: usize,
    /// When its first list ends, in seconds since 1970.
    until: Option<i64>,
}

impl FileState {
    /// Sets its metrics, and says what is wrong.
    fn measure(&self, path: &Path, now: i64) -> Option<String> {
        let path = path.display().to_string();
        let problems = u32::try_from(self.problems).unwrap_or(u32::MAX);
        metrics::CLIENT_CRL_PROBLEMS
            .with([path.clone()])
            .set(f64::from(problems));
        if let Some(until) = self.until {
            metrics::CLIENT_CRL_EXPIRY
                .with([path.clone()])
                .set(to_float(until));
        }
        let has_ended = self.until.is_some_and(|until| until < now);
        match (self.problems, has_ended) {
            (0, false) => None,
            (0, true) => Some(format!(
                "client_crl_file {path}: a revocation list has ended"
            )),
            (problems, _) => Some(format!(
                "client_crl_file {path}: {problems} revocation lists refused or missing (alert client-crl)"
            )),
        }
    }
}

pub(super) fn note_expiry(until: i64, path: &Path) {
    metrics::CERTIFICATE_EXPIRY
        .with([path.display().to_string()])
        .set(to_float(until));
}

/// A time after 1970 as the value of a metric.
fn to_float(seconds: i64) -> f64 {
    // Exact until the year 2106.
    f64::from(u32::try_from(seconds.max(0)).unwrap_or(u32::MAX))
}
