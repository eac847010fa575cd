//! Collects problems of files that the broker reads again while it serves.

use std::sync::Arc;

use arc_swap::ArcSwap;

use keybroker_broker::{Broker, Health};

/// The current problems of the files that the broker reads again, for the broker's health. The text
/// is empty if there are no problems.
#[derive(Debug, Default)]
pub(super) struct FileProblems(ArcSwap<String>);

impl FileProblems {
    pub(super) fn set(&self, problems: String) {
        if **self.0.load() != problems {
            self.0.store(Arc::new(problems));
        }
    }

    /// Returns the health of the broker. The detail text includes the problems of files.
    pub(super) fn health(&self, broker: &Broker) -> Health {
        let mut health = broker.health();
        let problems = self.0.load();
        if !problems.is_empty() {
            if !health.detail.is_empty() {
                health.detail.push_str("; ");
            }
            health.detail.push_str(&problems);
        }
        health
    }
}
