//! Counts the different users whose keys one service released within the last hour.

use std::{
    collections::HashMap,
    hash::{BuildHasher as _, RandomState},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use moka::sync::Cache;

const WINDOW: Duration = Duration::from_hours(1);
/// Shortest time between two removals of outdated users from the counts. A removal examines every
/// user.
const FORGETTING_INTERVAL: Duration = Duration::from_secs(10);
/// Largest number of services that are counted separately. Services come from the configuration and from API clients,
/// so operators decide how many exist.
const SERVICES_MAX: u64 = 1_000;

/// Counts users by keyed hashes; each process has its own random key. If two users have the same hash, the count is too
/// small by one.
pub(super) struct Releases {
    users_max: usize,
    hasher: RandomState,
    services: Cache<String, Arc<Mutex<Seen>>>,
}

#[derive(Default)]
struct Seen {
    /// At most `users_max` hashes of users, each with the time of the user's last release.
    users: HashMap<u64, Instant>,
    said: Option<Instant>,
    forgot: Option<Instant>,
}

impl std::fmt::Debug for Releases {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Releases")
            .field("users_max", &self.users_max)
            .finish_non_exhaustive()
    }
}

impl Releases {
    pub(super) fn new(users_max: u32) -> Self {
        Self {
            users_max: usize::try_from(users_max).unwrap_or(usize::MAX),
            hasher: RandomState::new(),
            services: Cache::builder()
                .max_capacity(SERVICES_MAX)
                .time_to_idle(WINDOW)
                .build(),
        }
    }

    /// Returns `true` if the service exceeds the limit of users per hour and no alert about the service was raised
    /// within the last hour.
    pub(super) fn note(&self, service: &str, user: &str) -> bool {
        self.note_at(service, user, Instant::now())
    }

    fn note_at(&self, service: &str, user: &str, now: Instant) -> bool {
        let seen = self.services.get_with_by_ref(service, Arc::default);
        let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
        let user = self.hasher.hash_one(user);
        let is_known = seen.users.contains_key(&user);
        if !is_known && seen.users.len() >= self.users_max {
            let is_within = |span, at: &Instant| now.saturating_duration_since(*at) < span;
            if !seen
                .forgot
                .is_some_and(|at| is_within(FORGETTING_INTERVAL, &at))
            {
                seen.users.retain(|_, at| is_within(WINDOW, at));
                seen.forgot = Some(now);
            }
            if seen.users.len() >= self.users_max {
                let is_news = !seen.said.is_some_and(|at| is_within(WINDOW, &at));
                if is_news {
                    seen.said = Some(now);
                }
                return is_news;
            }
        }
        seen.users.insert(user, now);
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_user_too_many_is_said_once_an_hour() {
        let releases = Releases::new(3);
        let start = Instant::now();
        let minutes = |count: u64| start + Duration::from_mins(count);
        for user in ["a", "b", "c", "a", "b"] {
            assert!(!releases.note_at("service", user, start), "{user}");
        }
        assert!(releases.note_at("service", "d", minutes(1)));
        assert!(!releases.note_at("service", "e", minutes(2)));
        assert!(!releases.note_at("other", "d", minutes(2)));
        // A user whose key is released again counts only once.
        assert!(!releases.note_at("service", "c", minutes(30)));
        // The first two users have been removed by now, so two more users fit.
        assert!(!releases.note_at("service", "d", minutes(61)));
        assert!(!releases.note_at("service", "e", minutes(61)));
        assert!(releases.note_at("service", "f", minutes(62)));
        assert!(!releases.note_at("service", "f", minutes(63)));
    }
}
