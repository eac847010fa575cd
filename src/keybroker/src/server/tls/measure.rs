//! Updates metrics and raises alerts about the expiry of certificates and revocation lists. The
//! broker calls this code periodically.

use std::{collections::BTreeMap, path::Path, sync::Arc};

use keybroker_core::metrics;

use super::{
    Tls, held, now,
    revocation::{Age, Life},
};

pub(super) const SECONDS_PER_HOUR: i64 = 3_600;

impl Tls {
    /// Updates the metrics of the listeners, and raises alerts about their revocation lists.
    /// Returns the problems of the lists for the broker's health; the text is empty if the lists
    /// have no problems.
    pub(in super::super) fn measure(listeners: &[Arc<Self>]) -> String {
        // Several listeners may use the same file of revocation lists.
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
                "a revocation list expires soon, and there is no newer list; after the list has expired, clients of its \
                 CA are refused"
            ),
            Age::Over => keybroker_core::alert!(
                ClientCrl, file = %shown,
                "a revocation list has expired; clients of its CA are refused until there is a newer list"
            ),
        }
        *reported = Some(age);
    }
}

/// The state of a file of revocation lists.
#[derive(Default)]
struct FileState {
    problems: usize,
    /// The earliest expiry of a list in the file, in seconds since 1970.
    until: Option<i64>,
}

impl FileState {
    /// Updates the metrics of the file, and returns the problems of the file.
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
        let mut wrong = Vec::new();
        if self.problems > 0 {
            let problems = self.problems;
            wrong.push(format!(
                "{problems} revocation lists are rejected or missing"
            ));
        }
        if self.until.is_some_and(|until| until < now) {
            wrong.push("a revocation list has expired".to_owned());
        }
        (!wrong.is_empty()).then(|| {
            format!(
                "client_crl_file {path}: {} (alert client-crl)",
                wrong.join(", ")
            )
        })
    }
}

pub(super) fn note_expiry(until: i64, path: &Path) {
    metrics::CERTIFICATE_EXPIRY
        .with([path.display().to_string()])
        .set(to_float(until));
}

/// Converts seconds since 1970 to the value of a metric.
fn to_float(seconds: i64) -> f64 {
    // The value is exact until the year 2106, because 32 bits are sufficient until then.
    f64::from(u32::try_from(seconds.max(0)).unwrap_or(u32::MAX))
}
