//! Collects problems of files that the broker reads again while it serves.

use std::sync::Arc;

use arc_swap::ArcSwap;

use keybroker_broker::{Broker, Health};

/// The current problems of the files that the broker reads again, for the broker's health. A text
/// is empty if there are no problems.
#[derive(Debug, Default)]
pub(super) struct FileProblems {
    tls: ArcSwap<String>,
    configuration: ArcSwap<String>,
}

impl FileProblems {
    pub(super) fn set_of_tls(&self, problems: String) {
        set(&self.tls, problems);
    }

    pub(super) fn set_of_configuration(&self, problems: String) {
        set(&self.configuration, problems);
    }

    /// Returns the health of the broker. The detail text includes the problems of files.
    pub(super) fn health(&self, broker: &Broker) -> Health {
        let mut health = broker.health();
        for problems in [self.tls.load(), self.configuration.load()] {
            if problems.is_empty() {
                continue;
            }
            if !health.detail.is_empty() {
                health.detail.push_str("; ");
            }
            health.detail.push_str(&problems);
        }
        health
    }
}

fn set(text: &ArcSwap<String>, problems: String) {
    if **text.load() != problems {
        text.store(Arc::new(problems));
    }
}
