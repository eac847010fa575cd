//! The metrics of one token. The series are looked up once, because a look-up for each job would cost an allocation.

use std::time::Duration;

use keybroker_worker_protocol::Assurance;

use keybroker_core::metrics::{self, CounterHandle, GaugeHandle, HistogramHandle, to_float};

/// The metric series of one token, labelled with the token's configured name.
#[derive(Clone, Debug)]
pub(crate) struct Measures {
    token: String,
    pub(crate) operation: HistogramHandle,
    pub(crate) queue_wait: HistogramHandle,
    pub(crate) worker_restarts: CounterHandle,
    pub(crate) failovers: CounterHandle,
    serving: GaugeHandle,
    workers: GaugeHandle,
    queue_length: GaugeHandle,
    self_test_age: GaugeHandle,
    pin_latched: GaugeHandle,
}

impl Measures {
    pub(crate) fn of(token: &str) -> Self {
        let name = || [token.to_owned()];
        let measures = Self {
            token: token.to_owned(),
            operation: metrics::TOKEN_OPERATION.with(name()),
            queue_wait: metrics::TOKEN_QUEUE_WAIT.with(name()),
            worker_restarts: metrics::TOKEN_WORKER_RESTARTS.with(name()),
            failovers: metrics::TOKEN_FAILOVERS.with(name()),
            serving: metrics::TOKEN_SERVING.with(name()),
            workers: metrics::TOKEN_WORKERS.with(name()),
            queue_length: metrics::TOKEN_QUEUE_LENGTH.with(name()),
            self_test_age: metrics::TOKEN_SELF_TEST_AGE.with(name()),
            pin_latched: metrics::TOKEN_PIN_LATCHED.with(name()),
        };
        // The series starts at zero, so that a rate includes the first event.
        measures.worker_restarts.increment(0);
        measures.failovers.increment(0);
        measures
    }

    /// Publishes what is known about the protection of the token's keys.
    pub(crate) fn publish_assurance(&self, assurance: Assurance) {
        for word in Assurance::ALL {
            let value = f64::from(u8::from(word == assurance));
            let labels = [self.token.clone(), word.as_str().to_owned()];
            metrics::TOKEN_ASSURANCE.with(labels).set(value);
        }
    }

    /// Withdraws the state of a token that is not used any more. A comparison with the value NaN is false, so no alert rule reports the
    /// removed token as unavailable.
    pub(crate) fn retract(&self) {
        self.serving.set(f64::NAN);
        self.self_test_age.set(f64::NAN);
        for word in Assurance::ALL {
            let labels = [self.token.clone(), word.as_str().to_owned()];
            metrics::TOKEN_ASSURANCE.with(labels).set(0.0);
        }
        for gauge in [&self.workers, &self.queue_length, &self.pin_latched] {
            gauge.set(0.0);
        }
    }

    /// Publishes the current state of the token. `self_test_age` is absent until a self-test has passed.
    pub(crate) fn publish(&self, now: &Reading) {
        let flag = |is_set| f64::from(u8::from(is_set));
        self.workers.set(to_float(now.workers));
        self.queue_length.set(to_float(now.queue_length));
        self.serving.set(flag(now.is_serving));
        self.pin_latched.set(flag(now.is_pin_latched));
        if let Some(age) = now.self_test_age {
            self.self_test_age.set(age.as_secs_f64());
        }
    }
}

/// The values of the gauges of a token.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reading {
    pub(crate) workers: usize,
    pub(crate) queue_length: usize,
    pub(crate) is_serving: bool,
    pub(crate) is_pin_latched: bool,
    pub(crate) self_test_age: Option<Duration>,
}
