//! Simulates half a minute with more calls than the token can serve, and counts the accepted jobs that miss their
//! deadline.

use super::*;

const SESSIONS: usize = 4;
const SERVICE: Duration = Duration::from_millis(40);
const LASTS: Duration = Duration::from_secs(30);

/// Numbers of calls by result.
#[derive(Debug, Default)]
struct Outcome {
    /// Done within the deadline.
    in_time: u32,
    /// Accepted, but not done within the deadline.
    late: u32,
    /// Refused on arrival.
    refused: u32,
    /// Number of jobs that the sessions can do in the simulated time.
    capacity: u32,
}

/// A token under load.
struct Overload {
    backlogs: Backlogs<Item>,
    estimate: Estimate,
    /// The job that each session runs, with its start and its end.
    sessions: [Option<(Instant, Instant, Item)>; SESSIONS],
    now: Instant,
    /// State of a linear congruential generator (Knuth's MMIX). Because of this generator, the times of the jobs vary
    /// but are the same in each run.
    random: u64,
    outcome: Outcome,
}

impl Overload {
    fn new() -> Self {
        Self {
            backlogs: Backlogs::new(BTreeMap::new()),
            estimate: Estimate::first(SERVICE),
            sessions: [const { None }; SESSIONS],
            now: Instant::now(),
            random: 1,
            outcome: Outcome::default(),
        }
    }

    /// Between a half and one and a half of the mean.
    fn service(&mut self) -> Duration {
        self.random = self
            .random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        let part = u32::try_from(self.random >> 33).unwrap() % 1_000;
        SERVICE / 2 + SERVICE * part / 1_000
    }

    /// Calls of some principals at a multiple of the capacity.
    fn run(mut self, factor: u32, given: Duration, principals: u32) -> Outcome {
        let sessions = u32::try_from(SESSIONS).unwrap();
        let interval = SERVICE / sessions / factor;
        let end = self.now + LASTS;
        let (mut next_call, mut number) = (self.now, 0);
        while self.now < end {
            let ended =
                |session: &Option<(_, Instant, _)>| session.as_ref().map(|(_, end, _)| *end);
            let first = (0..SESSIONS)
                .filter_map(|at| Some((ended(&self.sessions[at])?, at)))
                .min();
            match first {
                Some((at, session)) if at <= next_call => {
                    self.now = at;
                    self.end(session);
                }
                _ => {
                    self.now = next_call;
                    next_call += interval;
                    number += 1;
                    self.arrive(&format!("p{}", number % principals), given);
                }
            }
            self.dispatch();
        }
        self.outcome.capacity =
            u32::try_from(LASTS.as_millis() / SERVICE.as_millis()).unwrap() * sessions;
        self.outcome
    }

    fn arrive(&mut self, principal: &str, given: Duration) {
        let busy = self.sessions.iter().flatten().count();
        let load = Load {
            sessions: u32::try_from(SESSIONS).unwrap(),
            busy: u32::try_from(busy).unwrap(),
        };
        let lane = lane(principal);
        let is_idle = busy < SESSIONS && self.backlogs.is_empty();
        if is_idle
            || self
                .backlogs
                .check_in_time(&lane, self.estimate, given, load)
                .is_ok()
        {
            let item = Item {
                name: principal.to_owned(),
                queued: self.now,
                deadline: self.now + given,
                is_abandoned: false,
            };
            self.backlogs.push(&lane, item, self.estimate.mean);
        } else {
            self.outcome.refused += 1;
        }
    }

    fn end(&mut self, session: usize) {
        let (begun, ended, item) = self.sessions[session].take().unwrap();
        self.estimate.add(ended - begun);
        if ended <= item.deadline {
            self.outcome.in_time += 1;
        } else {
            self.outcome.late += 1;
        }
    }

    fn dispatch(&mut self) {
        while let Some(session) = (0..SESSIONS).find(|at| self.sessions[*at].is_none()) {
            let Some(item) = self.backlogs.pop(self.estimate.mean, self.now) else {
                return;
            };
            let left = item.deadline.saturating_duration_since(self.now);
            let lane = lane(&item.name);
            if left.is_zero() || self.backlogs.is_too_late(left, self.estimate.mean) {
                self.backlogs.note(&lane, Served::Late);
                self.outcome.late += 1;
                continue;
            }
            self.backlogs.note(&lane, Served::InTime);
            let end = self.now + self.service();
            self.sessions[session] = Some((self.now, end, item));
        }
    }
}

/// A caller that is refused at its deadline has waited in vain. Of 100 refusals, at least 99 must come on arrival.
#[test]
fn accepted_jobs_are_in_time_and_the_token_is_never_idle() {
    for factor in [3, 10] {
        for given in [200, 1_000, 5_000].map(Duration::from_millis) {
            for principals in [1, 5] {
                let outcome = Overload::new().run(factor, given, principals);
                let case =
                    format!("{factor} times, {given:?}, {principals} principals: {outcome:?}");
                assert!(outcome.in_time * 100 >= outcome.capacity * 98, "{case}");
                assert!(outcome.late * 100 <= outcome.refused, "{case}");
            }
        }
    }
}
