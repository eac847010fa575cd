//! The key set in use: kept fresh in the background, asked for once more when a token names a key that it does not have,
//! and kept for a stated time while the provider is down.

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

use super::{KeySet, SET_BYTES_MAX, SourceError, absent::Withdrawn, error::NoSet, fetch::Fetcher};

/// The key files of an issuer: the holder of a key in them can make tokens for every user.
const KEYS: Purpose = Purpose::trust("other users could decide whose tokens are accepted");

/// Time after which every copy of a key set that the broker can get is up to date. Caches and replicas between the provider and the
/// broker serve older sets until then.
const PUBLISHED_WITHIN: Duration = Duration::from_mins(5);

/// How often things happen.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pace {
    /// Least time between two fetches because of unknown keys: a caller that makes up key ids must not cause load on
    /// the provider.
    pub(crate) refetch: Duration,
    /// Time between fetches while all is well.
    pub(crate) refresh: Duration,
    /// Time after the first failure; doubled with each that follows.
    pub(crate) retry_first: Duration,
    /// Longest time after a failure.
    pub(crate) retry_last: Duration,
    /// How long a set is used after it was fetched.
    pub(crate) keep: Duration,
    /// Time between looks at a file, and between measurements.
    pub(crate) look: Duration,
    /// Age that a copy of the provider's key set can have when the broker fetches it.
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

/// Result of looking for a newer key set.
#[derive(Debug)]
pub(crate) enum Newer {
    /// Another set is in use now.
    Set(Arc<KeySet>),
    /// The key file has not changed.
    Same,
    /// The provider just answered with the same set, which may be an outdated copy. The broker may ask again after this time.
    SameCopy(Duration),
    /// It is not known whether the provider has a newer set. The broker may ask again after this time.
    Unknown(Duration),
}

/// The keys of one issuer.
#[derive(Debug)]
pub(crate) struct Keys {
    name: String,
    pace: Pace,
    source: Source,
    current: ArcSwapOption<Held>,
    /// When a fetch because of an unknown key last began.
    refetched: Arc<Mutex<Option<Instant>>>,
    /// What the last attempt failed with: for refusals, and so that it is reported once.
    problem: SyncMutex<Option<String>>,
}

#[derive(Debug)]
struct Held {
    set: Arc<KeySet>,
    /// When the fetch began that found it last.
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
    /// Files are read at once, and must be good; a provider may be down.
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
            refetched: Arc::default(),
            problem: SyncMutex::default(),
        };
        if let Source::File(source) = &keys.source {
            keys.take(read(source)?, Timestamp::now());
        }
        Ok(keys)
    }

    /// The set in use, if there is one and it is not too old.
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

    /// What the last attempt to renew it failed with; none when it went well.
    pub(crate) fn problem(&self) -> Option<String> {
        let problem = self.problem.lock().unwrap_or_else(PoisonError::into_inner);
        problem.clone()
    }

    /// Whether the provider is known not to have a key with this id. `issued_s` is the token's `iat`, in seconds since 1970.
    ///
    /// The newest set must lack the key, and must have been fetched so late that it cannot be an older copy from a cache: five minutes
    /// after the last set that had the key, or five minutes after the token was issued. Key ids that other callers named have no influence,
    /// because they would cause good tokens to be rejected once the provider begins to use such a key.
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

    /// Fetches once more because `seen` lacks a key, if that was not done a moment ago. Calls that want it at the same time
    /// wait for one fetch. The background task reads key files again every two seconds, so a key that they lack does not exist.
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
        // In a separate task, with the lock: a caller that disconnects must neither cancel the fetch that others wait
        // for nor cause them to be refused before it ends.
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

    /// Keeps the set fresh until `stop`.
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

    /// Reads or fetches the set once; whether that went well.
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
        let previous = self.current.load();
        let withdrawn = previous.as_ref().map_or_else(Withdrawn::default, |held| {
            held.withdrawn
                .after(held.set.kids(), held.begun, set.kids())
        });
        let previous = previous.as_ref().map(|held| &held.set);
        let set = match previous {
            // The same one, so that what was verified with it stays verified.
            Some(previous) if previous.digest() == set.digest() => Arc::clone(previous),
            _ => {
                tracing::info!(issuer = %self.name, keys = %set.names().join(", "), "key set taken over");
                self.report_refused(&set);
                Arc::new(set)
            }
        };
        let since = Instant::now();
        self.current.store(Some(Arc::new(Held {
            set,
            begun,
            since,
            withdrawn,
        })));
        let mut problem = self.problem.lock().unwrap_or_else(PoisonError::into_inner);
        if problem.take().is_some() {
            tracing::info!(issuer = %self.name, "the key set can be had again");
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
                "weak or malformed keys of the key set are refused; its other keys are in use"
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
                "key set not renewed; the last good one stays in use"
            );
        } else {
            keybroker_core::alert!(
                IssuerKeys, issuer = %self.name, error = %new,
                "no key set yet: its tokens are refused until there is one"
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
