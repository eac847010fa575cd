//! Supervisors for unit tests, without processes: the test acts as the workers.

use std::{collections::HashMap, os::unix::net::UnixStream as StdUnixStream};

use tokio::net::UnixStream;

use keybroker_core::{
    envelope::Algorithm,
    key::{Fingerprint, ObjectIds, Purpose, WrappingKeyId},
};
use keybroker_worker_protocol::{
    TokenInfo,
    oaep::{self, WrapKey},
};

use super::*;
use crate::TokenKey;

/// Returns the front's end of a worker without a process. The worker's jobs stay in the link until the test takes them.
pub(crate) fn link(generation: u64, sessions: usize) -> Arc<Link> {
    link_with(generation, sessions, Arc::default())
}

/// Returns the front's end of a worker that found these keys.
fn link_with(generation: u64, sessions: usize, found: Arc<Found>) -> Arc<Link> {
    let (ours, theirs) = StdUnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    // The worker's end of the socket stays open.
    Box::leak(Box::new(theirs));
    let stream = UnixStream::from_std(ours).unwrap();
    Link::new(generation, 1, sessions, stream, found)
}

/// Returns a supervisor that starts no worker, for a token that must contain these keys.
pub(crate) fn idle(name: &str, keys: &[WrappingKeyId]) -> Arc<Supervisor> {
    let settings = toml::from_str(&format!("name = \"{name}\"\nmodule = \"/none.so\"")).unwrap();
    let state = StateDirectory::below(std::path::Path::new("/none"));
    let expected = keys.iter().map(|id| ExpectedKey {
        id: *id,
        objects: ObjectIds::default(),
        token_serial: name.to_owned(),
        fingerprint: Fingerprint([0; 32]),
        purpose: Purpose::Plain,
        may_be_elsewhere: false,
        proofs: Vec::new(),
    });
    Supervisor::idle(settings, expected.collect(), PathBuf::from("/none"), state)
}

impl Supervisor {
    /// Adds a ready worker with this number of sessions. The worker found all expected keys with this algorithm.
    pub(crate) fn worker_for_test(
        &self,
        generation: u64,
        sessions: usize,
        algorithm: Algorithm,
    ) -> Arc<Link> {
        let (spki, _) = oaep::spki(&[0xff; 256], &[1, 0, 1]).unwrap();
        let mut wrap = HashMap::new();
        let mut keys = Vec::new();
        for expected in self.expected().iter() {
            let key = WrapKey::new(&spki, algorithm).unwrap();
            wrap.insert(expected.id, Arc::new(key));
            keys.push(TokenKey {
                id: expected.id,
                fingerprint: expected.fingerprint,
                spki: spki.clone(),
                modulus_bits: 2_048,
                algorithm,
                sealing: None,
            });
        }
        let found = Arc::new(Found {
            info: TokenInfo {
                label: self.settings.name.clone(),
                serial: self.settings.name.clone(),
                model: String::new(),
                is_hardware: false,
            },
            keys: keys.into(),
            unusable: Arc::new([]),
            wrap,
        });
        let link = link_with(generation, sessions, found);
        self.admit(&link);
        link
    }

    /// Simulates the end of the time in which a lost worker must be replaced.
    pub(crate) fn stop_serving_for_test(&self) {
        self.serving
            .send_replace(Serving::Down("no worker".to_owned()));
    }

    /// Simulates the loss of a worker and its jobs.
    pub(crate) fn lose_for_test(&self, link: &Link) {
        self.dismiss(link, Loss::Ended, "it ended");
        self.take_back(link.take_jobs(), 4, "it ended");
    }

    /// Answers a job as if a worker had done it within this time.
    pub(crate) fn served_for_test(&self, job: Job, result: Result<crate::job::Output, Error>) {
        self.queue.served(&job);
        job.answer(result, Duration::ZERO);
        self.queue.dispatch();
    }
}
