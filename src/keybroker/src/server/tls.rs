//! The TLS configuration of one listener. The TLS files are loaded, checked and replaced together.
//! If a file is invalid during a reload, the previous TLS configuration remains in use.
//!
//! Mitigation: M1 of `THREAT_MODEL.md`.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
use rustls::ServerConfig;
use tokio_util::sync::CancellationToken;

use keybroker_core::{call::Timestamp, error::chain, state::StateDirectory};

use super::{ClientCertificates, TlsSettings};

mod client_verifier;
mod contents;
mod error;
mod files;
mod measure;
mod revocation;
mod server_certificate;
#[cfg(test)]
mod tests;

pub use contents::Contents;
pub use error::Error;

use contents::log_contents;
use files::{Files, Follows, Found, Shown, Trust};
use revocation::{Age, Lists, Memory, MemoryError};
use server_certificate::Validity;

/// Interval at which unchanged files with a problem are evaluated again, because a revocation list
/// may have become valid.
const RETRY_AFTER: Duration = Duration::from_mins(1);

/// The TLS configuration for new connections, until the next change.
#[derive(Debug)]
pub(super) struct Accepting {
    pub(super) config: Arc<ServerConfig>,
    /// Cancelled when the CA certificates or the revocations for clients change, so that a revoked
    /// client loses its connection.
    pub(super) outdated: CancellationToken,
    /// SHA-256 of the files.
    files: [u8; 32],
    /// SHA-256 of the CA certificates for clients and of the revoked serial numbers.
    trust: [u8; 32],
    /// The revocation lists.
    lists: Option<Lists>,
    /// Last second of the server certificate's validity, in seconds since 1970.
    until: i64,
    contents: Contents,
}

impl Accepting {
    /// The log text about revocation lists that are not used.
    fn left_out(&self) -> Option<String> {
        self.lists.as_ref().and_then(Lists::left_out)
    }
}

/// The TLS configuration of a listener, which can be replaced while the listener serves.
#[derive(Debug)]
pub(super) struct Tls {
    settings: TlsSettings,
    clients: ClientCertificates,
    /// The offered application protocols (RFC 7301).
    protocols: Vec<Vec<u8>>,
    current: ArcSwap<Accepting>,
    /// The certificate chain and private key in use. If the new chain or key is invalid, a change
    /// of CA certificates or revocation lists is applied together with the chain and key that are
    /// already in use.
    shown: Mutex<Shown>,
    /// The error of the last reload, so that the same error is reported only once.
    refused: Mutex<Option<String>>,
    /// The last report about revocation lists that are not used.
    left_out: Mutex<Option<String>>,
    /// The last reported age of the revocation lists.
    age: Mutex<Option<Age>>,
    /// The error that prevented storing the accepted revocation lists.
    unstored: Mutex<Option<String>>,
    /// The newest accepted revocation lists, including the lists that were accepted before a restart.
    memory: Mutex<Memory>,
    evaluated: Mutex<Evaluated>,
}

/// The result of the last evaluation of the files.
#[derive(Debug)]
struct Evaluated {
    /// Digest of the files, or of the error that prevented reading them.
    digest: [u8; 32],
    /// The time of the next evaluation of unchanged files; `None` if the files have no problem.
    again_at: Option<Instant>,
}

/// The result of a check for changed files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Look {
    /// The files are unchanged. The files either have no problem or were evaluated recently.
    Unchanged,
    Evaluated,
}

impl Tls {
    /// Loads the files. Every problem prevents the start, except that some invalid revocation lists
    /// are ignored. An invalid list is ignored if its CA is not configured, or if another list of
    /// this CA is in the file or was accepted before. Without a state directory, this function only
    /// checks the configuration, and every invalid list is an error.
    pub(super) fn load(
        settings: TlsSettings,
        clients: ClientCertificates,
        protocols: Vec<Vec<u8>>,
        state: Option<&StateDirectory>,
    ) -> Result<Self, Error> {
        let files = Files::read(&settings, clients)?;
        let mut memory = match (state, &settings.client_crl_file) {
            (Some(state), Some(file)) => Memory::open(state.clone(), file)?,
            _ => Memory::default(),
        };
        let mut follows = Follows {
            memory: &mut memory,
            in_use: None,
        };
        let mut accepting = files.build(
            &settings,
            clients,
            &protocols,
            Validity::Checked,
            &mut follows,
        )?;
        if state.is_none()
            && let Some(problem) = accepting.lists.as_mut().and_then(Lists::take_problem)
        {
            return Err(Error::lists(settings.client_crl_file.as_deref(), problem));
        }
        if let Some(lists) = &accepting.lists {
            memory.accept(lists);
        }
        log_contents("TLS files read", &settings, accepting.contents);
        let evaluated = Evaluated {
            digest: accepting.files,
            again_at: accepting.left_out().map(|_| Instant::now() + RETRY_AFTER),
        };
        let tls = Self {
            shown: Mutex::new(files.shown),
            settings,
            clients,
            protocols,
            current: ArcSwap::from_pointee(accepting),
            refused: Mutex::default(),
            left_out: Mutex::default(),
            age: Mutex::default(),
            unstored: Mutex::default(),
            memory: Mutex::new(memory),
            evaluated: Mutex::new(evaluated),
        };
        tls.report_left_out();
        Ok(tls)
    }

    /// Stores the accepted revocation lists for the next start.
    pub(super) fn remember_lists(&self) -> Result<(), MemoryError> {
        held(&self.memory).store(now())
    }

    pub(super) fn current(&self) -> Arc<Accepting> {
        self.current.load_full()
    }

    /// The numbers of certificates and lists in the files.
    pub(super) fn contents(&self) -> Contents {
        self.current().contents
    }

    /// Trust domains whose SPIFFE ids the broker accepts. If this set is empty, the broker accepts
    /// every trust domain.
    pub(super) fn trust_domains(&self) -> &BTreeSet<String> {
        &self.settings.trust_domains
    }

    /// Applies changed files. After a change of CA certificates or revocations, all open
    /// connections receive GOAWAY, and clients that are still trusted can reconnect. Other changes
    /// do not affect open connections. Files with a problem are evaluated again once a minute.
    pub(super) fn reload(&self) {
        self.reload_at(Instant::now());
    }

    fn reload_at(&self, now: Instant) -> Look {
        let found = Found::read(&self.settings, self.clients);
        let digest = found.digest();
        {
            let last = held(&self.evaluated);
            if last.digest == digest && last.again_at.is_none_or(|at| now < at) {
                return Look::Unchanged;
            }
        }
        let outcome = self.try_reload(found);
        self.report_left_out();
        let is_good = [
            self.report_reload(outcome),
            self.store_accepted(),
            self.current().left_out().is_none(),
        ];
        let is_bad = is_good.contains(&false);
        let again_at = is_bad.then(|| now + RETRY_AFTER);
        *held(&self.evaluated) = Evaluated { digest, again_at };
        Look::Evaluated
    }

    fn report_reload(&self, outcome: Result<bool, Error>) -> bool {
        let mut refused = held(&self.refused);
        match outcome {
            Ok(changed) => {
                *refused = None;
                if changed {
                    log_contents("TLS files reloaded", &self.settings, self.contents());
                }
                true
            }
            Err(error) => {
                let error = chain(&error);
                if refused.as_ref() != Some(&error) {
                    keybroker_core::alert!(TlsReload, %error, "TLS files rejected; the previous files stay in use");
                    *refused = Some(error);
                }
                false
            }
        }
    }

    fn store_accepted(&self) -> bool {
        let error = self.remember_lists().err().map(|error| chain(&error));
        let mut unstored = held(&self.unstored);
        if *unstored != error
            && let Some(error) = &error
        {
            // The newer revocation list is in use, but after a restart, the broker could accept an
            // older list again.
            keybroker_core::alert!(
                ClientCrl, %error,
                "cannot store the accepted revocation lists; after a restart, older lists would be accepted"
            );
        }
        *unstored = error;
        unstored.is_none()
    }

    /// Reports the revocation lists that are not used, unless the last report was the same.
    fn report_left_out(&self) {
        let left_out = self.current().left_out();
        let mut said = held(&self.left_out);
        if *said == left_out {
            return;
        }
        if let (Some(error), Some(path)) = (&left_out, &self.settings.client_crl_file) {
            let file = path.display().to_string();
            keybroker_core::alert!(
                ClientCrl, %file, %error,
                "revocation lists rejected; the lists that were accepted before stay in use"
            );
        }
        *said = left_out;
    }

    /// Forgets earlier reports, so that a requested reload evaluates and reports all problems again.
    pub(super) fn report_again(&self) {
        for said in [&self.refused, &self.left_out, &self.unstored] {
            *held(said) = None;
        }
        let mut evaluated = held(&self.evaluated);
        if evaluated.again_at.is_some() {
            evaluated.again_at = Some(Instant::now());
        }
    }

    fn try_reload(&self, found: Found) -> Result<bool, Error> {
        // An invalid server certificate must not prevent the revocation of a client certificate.
        let trust = found.trust?;
        let refused = match found.shown {
            Err(error) => (error, trust),
            Ok(shown) => {
                let files = Files { shown, trust };
                match self.try_reload_all(&files) {
                    Ok(changed) => return Ok(changed),
                    Err(error) => (error, files.trust),
                }
            }
        };
        let (error, trust) = refused;
        self.try_reload_trust(trust)?;
        Err(error)
    }

    fn try_reload_all(&self, files: &Files) -> Result<bool, Error> {
        let current = self.current();
        let next = self.build(files, Validity::Checked)?;
        // Even if the files are unchanged, a revocation list may have become valid or may have expired.
        if next.files == current.files
            && next.trust == current.trust
            && next.left_out() == current.left_out()
        {
            return Ok(false);
        }
        *held(&self.shown) = files.shown.clone();
        self.take_over(next);
        Ok(true)
    }

    /// Applies changed CA certificates and revocation lists together with the chain and key in use.
    fn try_reload_trust(&self, trust: Trust) -> Result<(), Error> {
        let shown = held(&self.shown).clone();
        let next = self.build(&Files { shown, trust }, Validity::Unchecked)?;
        if next.trust != self.current().trust {
            self.take_over(next);
            tracing::warn!(
                "the client CAs and revocation lists were applied without the other TLS files"
            );
        }
        Ok(())
    }

    fn build(&self, files: &Files, validity: Validity) -> Result<Accepting, Error> {
        let mut memory = held(&self.memory);
        let current = self.current();
        let mut follows = Follows {
            memory: &mut memory,
            in_use: current.lists.as_ref(),
        };
        files.build(
            &self.settings,
            self.clients,
            &self.protocols,
            validity,
            &mut follows,
        )
    }

    fn take_over(&self, mut next: Accepting) {
        let current = self.current();
        let trust_changed = next.trust != current.trust;
        if !trust_changed {
            // The open connections wait for the current signal, so the new configuration must keep
            // this signal for the next change.
            next.outdated = current.outdated.clone();
        }
        if let Some(lists) = &next.lists {
            held(&self.memory).accept(lists);
        }
        self.current.store(Arc::new(next));
        if trust_changed {
            current.outdated.cancel();
        }
    }
}

fn held<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn now() -> i64 {
    Timestamp::now().micros() / 1_000_000
}

fn to_array(bytes: &[u8]) -> [u8; 32] {
    bytes.try_into().expect("SHA-256 gives 32 bytes")
}
