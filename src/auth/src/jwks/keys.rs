//! The current key set of an issuer. The key set is refreshed in the background. The key set is fetched once more if an
//! access token refers to a key that the set does not contain. While the provider is unavailable, the last key set is
//! used for a limited time.

use std::{
    sync::{Arc, Mutex as SyncMutex, PoisonError},
    time::{Duration, Instant},
};

use arc_swap::ArcSwapOption;
use tokio::sync::Mutex;
use tokio_util::sync::CancellationToken;

use crate::issuer::{KeySource, Settings};
use keybroker_core::{
    call::Timestamp,
    error::chain,
    metrics,
    trusted_file::{self, Purpose},
};

use super::{
    KeySet, SourceError, absent::Withdrawn, error::NoSet, fetch::Fetcher, limits::SET_BYTES_MAX,
};

/// The check of key files: other users may read a key file, but must not be able to change it. A
/// person who controls a key in a key file can sign access tokens for every user.
const KEYS: Purpose = Purpose::trust("other users could decide whose access tokens are accepted");

/// Time after which every copy of a key set is up to date. Before this time, caches and replicas between the provider
/// and the broker may serve an older key set.
const PUBLISHED_WITHIN: Duration = Duration::from_mins(5);

/// The intervals and time limits of a key set.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pace {
    /// Shortest time between two fetches that unknown keys cause, so that callers with invented key ids cannot cause
    /// load on the provider.
    pub(crate) refetch: Duration,
    /// Time between successful fetches.
    pub(crate) refresh: Duration,
    /// Time between the first failed attempt and the next attempt. The time doubles with each further failure.
    pub(crate) retry_first: Duration,
    /// Longest time between a failed attempt and the next attempt.
    pub(crate) retry_last: Duration,
    /// Time for which a key set is used after the broker fetched it.
    pub(crate) keep: Duration,
    /// Interval at which key files are read and metrics are updated.
    pub(crate) look: Duration,
    /// The largest age that a copy of the provider's key set can have when the broker fetches the
    /// copy.
    pub(crate) published_within: Duration,
}

impl Pace {
    pub(crate) fn of(settings: &Settings) -> Self {
        Self {
            refetch: Duration::from_mins(1),
            refresh: Duration::from_mins(settings.refresh_minutes.into()),
            retry_first: Duration::from_secs(1),
            retry_last: Duration::from_mins(1),
            keep: Duration::from_hours(settings.keep_hours.into()),
            look: Duration::from_secs(2),
            published_within: PUBLISHED_WITHIN,
        }
    }
}

/// The result of a search for a newer key set.
#[derive(Debug)]
pub(crate) enum Newer {
    /// A newer key set was fetched and is in use now.
    Set(Arc<KeySet>),
    /// The key file has not changed.
    Same,
    /// The provider has just answered with the key set that is already in use, but the answer may be an outdated copy.
    /// The broker may ask the provider again after this time.
    SameCopy(Duration),
    /// It is unknown whether the provider has a newer key set. The broker may ask the provider again after this time.
    Unknown(Duration),
}

/// The keys of one issuer.
#[derive(Debug)]
pub(crate) struct Keys {
    name: String,
    pace: Pace,
    source: Source,
    current: ArcSwapOption<Held>,
    taking: SyncMutex<()>,
    /// The start of the last fetch that an unknown key caused.
    refetched: Arc<Mutex<Option<Instant>>>,
    /// The error of the last attempt to fetch or read the key set. The error is kept so that refusals can show it, and
    /// so that a repeated error is logged only once.
    problem: SyncMutex<Option<String>>,
}

#[derive(Debug)]
struct Held {
    set: Arc<KeySet>,
    /// The start of the last fetch that returned this key set.
    begun: Timestamp,
    since: Instant,
    withdrawn: Withdrawn,
}

#[derive(Debug)]
enum Source {
    File(KeySource),
    Provider(Fetcher),
}

impl Keys {
    /// Creates the keys of an issuer. A key file is read immediately and must be valid. A provider
    /// may be unavailable when the broker starts.
    pub(crate) fn new(settings: &Settings, pace: Pace) -> Result<Self, SourceError> {
        let keys = Self {
            name: settings.name.clone(),
            pace,
            source: match settings.key_source() {
                file @ (KeySource::Set(_) | KeySource::Pem(_)) => Source::File(file),
                KeySource::Discovery(_) | KeySource::Url(_) => {
                    Source::Provider(Fetcher::new(settings)?)
                }
            },
            current: ArcSwapOption::empty(),
            taking: SyncMutex::default(),
            refetched: Arc::default(),
            problem: SyncMutex::default(),
        };
        if let Source::File(source) = &keys.source {
            keys.take(read(source)?, Timestamp::now());
        }
        Ok(keys)
    }

    /// Returns the current key set, or an error if no key set is available or the key set is too
    /// old.
    pub(crate) fn current(&self) -> Result<Arc<KeySet>, NoSet> {
        let held = self.current.load();
        let problem = || {
            let problem = self.problem();
            problem.map_or_else(|| "not fetched yet".into(), Into::into)
        };
        let Some(held) = held.as_ref() else {
            return Err(NoSet::Unknown(problem()));
        };
        if matches!(self.source, Source::Provider(_)) && held.since.elapsed() > self.pace.keep {
            return Err(NoSet::Old(problem()));
        }
        Ok(Arc::clone(&held.set))
    }

    /// The error of the last attempt to refresh the set; `None` if the attempt succeeded.
    pub(crate) fn problem(&self) -> Option<String> {
        let problem = self.problem.lock().unwrap_or_else(PoisonError::into_inner);
        problem.clone()
    }

    /// Whether the broker can be sure that the provider has no key with this id. `issued_s` is the
    /// `iat` of the access token, in seconds since 1970.
    ///
    /// The key is absent only if the newest key set does not contain it. The newest set must not be
    /// an older copy from a cache. Therefore the newest set must have been fetched at least five
    /// minutes after a set last contained the key, or at least five minutes after the access token
    /// was issued. The result does not depend on key ids in the access tokens of other callers.
    /// Otherwise, a caller who guesses the id of a future key could cause the rejection of valid
    /// access tokens.
    pub(crate) fn is_absent(&self, kid: &str, issued_s: Option<i64>) -> bool {
        let held = self.current.load();
        let Some(held) = held.as_ref() else {
            return false;
        };
        if held.set.kids().any(|known| known == kid) {
            return false;
        }
        let margin = i64::try_from(self.pace.published_within.as_micros()).unwrap_or(i64::MAX);
        let is_up_to_date_at = |us: i64| us.saturating_add(margin) < held.begun.micros();
        let issued_us = issued_s.map(|issued| issued.saturating_mul(1_000_000));
        let seen = held.withdrawn.last_seen(kid);
        issued_us.is_some_and(is_up_to_date_at)
            || seen.is_some_and(|seen| is_up_to_date_at(seen.micros()))
    }

    /// Fetches the set again because `seen` does not contain a required key. Does not fetch if the
    /// last fetch for a missing key was less than `refetch` ago. Concurrent calls wait for the same
    /// fetch. If the keys come from a key file, the current set counts as the newest set, because
    /// key files are read every two seconds.
    pub(crate) async fn newer_than(self: &Arc<Self>, seen: &KeySet) -> Newer {
        let mut refetched = Arc::clone(&self.refetched).lock_owned().await;
        let newer = || {
            let current = self.current().ok()?;
            (current.digest() != seen.digest()).then_some(current)
        };
        if let Some(newer) = newer() {
            return Newer::Set(newer);
        }
        let since = refetched.map_or(Duration::MAX, |at| at.elapsed());
        let left = self.pace.refetch.saturating_sub(since);
        if !left.is_zero() {
            return match self.source {
                Source::File(_) => Newer::Same,
                Source::Provider(_) => Newer::Unknown(left),
            };
        }
        *refetched = Some(Instant::now());
        // The fetch runs in a separate task that holds the lock. If the caller that started the fetch disconnects, the
        // fetch must continue, because other callers wait for its result.
        let keys = Arc::clone(self);
        let fetch = tokio::spawn(async move {
            let is_read = keys.update().await;
            drop(refetched);
            is_read
        });
        let is_read = fetch.await.unwrap_or(false);
        match newer() {
            Some(newer) => Newer::Set(newer),
            None if !is_read => Newer::Unknown(self.pace.refetch),
            None => match self.source {
                Source::File(_) => Newer::Same,
                Source::Provider(_) => Newer::SameCopy(self.pace.refetch),
            },
        }
    }

    /// Keeps the key set up to date until `stop` is cancelled.
    pub(crate) async fn refresh(self: Arc<Self>, stop: CancellationToken) {
        let mut retry = self.pace.retry_first;
        let mut due = Instant::now();
        loop {
            if due <= Instant::now() {
                let pause = match (&self.source, self.update().await) {
                    (Source::File(_), _) => self.pace.look,
                    (Source::Provider(_), true) => {
                        retry = self.pace.retry_first;
                        self.pace.refresh
                    }
                    (Source::Provider(_), false) => {
                        let pause = retry;
                        retry = (retry * 2).min(self.pace.retry_last);
                        pause.min(self.pace.refresh)
                    }
                };
                due = Instant::now() + pause;
            }
            self.measure();
            let pause = due.saturating_duration_since(Instant::now());
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(pause.min(self.pace.look)) => {}
            }
        }
    }

    /// Reads or fetches the key set once. Returns whether that succeeded.
    async fn update(&self) -> bool {
        let begun = Timestamp::now();
        let outcome = match &self.source {
            Source::Provider(fetcher) => fetcher.fetch().await,
            Source::File(source) => {
                let source = source.clone();
                let reading = tokio::task::spawn_blocking(move || read(&source));
                reading
                    .await
                    .unwrap_or_else(|error| Err(SourceError::Task(error)))
            }
        };
        match outcome {
            Ok(set) => {
                self.take(set, begun);
                true
            }
            Err(error) => {
                self.report(&chain(&error));
                false
            }
        }
    }

    fn take(&self, set: KeySet, begun: Timestamp) {
        let _one_at_a_time = self.taking.lock().unwrap_or_else(PoisonError::into_inner);
        let previous = self.current.load();
        // The answer to an earlier fetch may arrive late and contain an older key set.
        if previous.as_ref().is_some_and(|held| held.begun > begun) {
            return;
        }
        let withdrawn = previous.as_ref().map_or_else(Withdrawn::default, |held| {
            held.withdrawn
                .after(held.set.kids(), held.begun, set.kids())
        });
        let previous = previous.as_ref().map(|held| &held.set);
        // If the key set has not changed, its object is kept, so that access tokens that were verified with the set stay verified.
        let unchanged = previous.filter(|previous| previous.digest() == set.digest());
        let is_new = unchanged.is_none();
        let set = unchanged.map_or_else(|| Arc::new(set), Arc::clone);
        self.current.store(Some(Arc::new(Held {
            set: Arc::clone(&set),
            begun,
            since: Instant::now(),
            withdrawn,
        })));
        if is_new {
            tracing::info!(issuer = %self.name, keys = %set.names().join(", "), "key set taken over");
            self.report_refused(&set);
        }
        let mut problem = self.problem.lock().unwrap_or_else(PoisonError::into_inner);
        if problem.take().is_some() {
            tracing::info!(issuer = %self.name, "the issuer's key set is available again");
        }
    }

    fn report_refused(&self, set: &KeySet) {
        let (refused, count) = (set.refused(), set.refused_count());
        let count = u32::try_from(count).unwrap_or(u32::MAX);
        metrics::ISSUER_REFUSED_KEYS
            .with([self.name.clone()])
            .set(f64::from(count));
        if !refused.is_empty() {
            keybroker_core::alert!(
                IssuerKeys, issuer = %self.name, ?refused, count,
                "the issuer's key set has weak or malformed keys, which are refused; the other keys of the set are in use"
            );
        }
    }

    fn report(&self, new: &str) {
        let new = super::brief(new);
        metrics::ISSUER_FETCH_FAILURES
            .with([self.name.clone()])
            .increment(1);
        let mut problem = self.problem.lock().unwrap_or_else(PoisonError::into_inner);
        if problem.as_ref() == Some(&new) {
            return;
        }
        if self.current.load().is_some() {
            keybroker_core::alert!(
                IssuerKeys, issuer = %self.name, error = %new,
                "the issuer's key set was not renewed; the last valid key set stays in use"
            );
        } else {
            keybroker_core::alert!(
                IssuerKeys, issuer = %self.name, error = %new,
                "the broker has no key set of the issuer yet; the issuer's access tokens are refused until the broker \
                 has a key set"
            );
        }
        *problem = Some(new);
    }

    fn measure(&self) {
        if let (Source::Provider(_), Some(held)) = (&self.source, self.current.load().as_ref()) {
            metrics::ISSUER_KEYS_AGE
                .with([self.name.clone()])
                .set(held.since.elapsed().as_secs_f64());
        }
    }
}

fn read(source: &KeySource) -> Result<KeySet, SourceError> {
    let (KeySource::Set(path) | KeySource::Pem(path)) = source else {
        return Err(SourceError::OtherSource);
    };
    let limit = u64::try_from(SET_BYTES_MAX).unwrap_or(u64::MAX);
    let bytes = trusted_file::read(path, limit, KEYS)
        .map_err(|error| SourceError::File(Box::new(error)))?;
    let set = match source {
        KeySource::Pem(_) => KeySet::parse_pem(&bytes),
        _ => KeySet::parse_jwks(&bytes),
    };
    set.map_err(|source| SourceError::Set {
        place: path.display().to_string(),
        source,
    })
}
