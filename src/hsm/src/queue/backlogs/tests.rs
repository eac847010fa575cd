//! Tests the order of jobs by simulating a token with one session job by job, on a clock of the test's own.

use super::*;

mod overload;

/// The cost of each job.
const COST: Duration = Duration::from_millis(10);

#[derive(Clone, Debug, PartialEq, Eq)]
struct Item {
    name: String,
    queued: Instant,
    deadline: Instant,
    is_abandoned: bool,
}

impl Waiting for Item {
    fn queued(&self) -> Instant {
        self.queued
    }

    fn deadline(&self) -> Instant {
        self.deadline
    }

    fn is_abandoned(&self) -> bool {
        self.is_abandoned
    }
}

fn lane(name: &str) -> Lane {
    Lane::Principal(name.into())
}

/// Backlogs with a simulated clock.
struct Token {
    backlogs: Backlogs<Item>,
    now: Instant,
}

impl Token {
    fn new(weights: &[(&str, u32)]) -> Self {
        let weights = weights
            .iter()
            .map(|(name, weight)| ((*name).to_owned(), *weight));
        Self {
            backlogs: Backlogs::new(weights.collect()),
            now: Instant::now(),
        }
    }

    fn item(&self, name: String, given: Duration) -> Item {
        Item {
            name,
            queued: self.now,
            deadline: self.now + given,
            is_abandoned: false,
        }
    }

    /// Adds this many numbered jobs of one principal.
    fn push(&mut self, principal: &str, count: usize) {
        for number in 0..count {
            let item = self.item(format!("{principal}{number}"), Duration::from_mins(1));
            self.backlogs.push(&lane(principal), item, COST);
        }
    }

    fn push_background(&mut self, count: usize) {
        for number in 0..count {
            let item = self.item(format!("background{number}"), Duration::from_mins(1));
            self.backlogs.push(&Lane::Background, item, COST);
        }
    }

    fn pop(&mut self) -> String {
        let item = self.backlogs.pop(COST, self.now).unwrap();
        self.now += COST;
        item.name
    }

    fn pop_many(&mut self, count: usize) -> Vec<String> {
        (0..count).map(|_| self.pop()).collect()
    }
}

#[test]
fn principals_take_turns_and_the_oldest_of_each_is_first() {
    let mut token = Token::new(&[]);
    token.push("a", 3);
    token.push("b", 2);
    token.push("c", 1);
    assert_eq!(token.pop_many(6), ["a0", "b0", "c0", "a1", "b1", "a2"]);
    assert!(token.backlogs.is_empty() && token.backlogs.pop(COST, token.now).is_none());
}

/// A new job is served after at most one job of another principal, no matter how many of them wait.
#[test]
fn a_thousand_jobs_of_another_principal_delay_a_job_by_one() {
    let mut token = Token::new(&[]);
    token.push("saturating", 1_000);
    for _ in 0..50 {
        token.push("polite", 1);
        let served = token.pop_many(2);
        assert!(served.contains(&"polite0".to_owned()), "{served:?}");
    }
}

#[test]
fn a_weight_is_a_larger_share() {
    let mut token = Token::new(&[("heavy", 3)]);
    token.push("light", 100);
    token.push("heavy", 100);
    let served = token.pop_many(80);
    let heavy = served
        .iter()
        .filter(|name| name.starts_with("heavy"))
        .count();
    assert_eq!(heavy, 60, "{served:?}");
}

/// Fairness is measured by cost: a principal whose jobs cost five times as much gets a fifth of the jobs.
#[test]
fn turns_are_counted_by_cost() {
    let mut token = Token::new(&[]);
    for number in 0..100 {
        for (name, cost) in [("cheap", COST), ("dear", COST * 5)] {
            let item = token.item(format!("{name}{number}"), Duration::from_mins(1));
            token.backlogs.push(&lane(name), item, cost);
        }
    }
    let served: Vec<String> = (0..60)
        .map(|_| token.backlogs.pop(COST * 5, token.now).unwrap().name)
        .collect();
    let dear = served
        .iter()
        .filter(|name| name.starts_with("dear"))
        .count();
    assert_eq!(dear, 10, "{served:?}");
}

/// A job whose estimate was far above the current cost is still served.
#[test]
fn a_job_that_costs_more_than_a_turn_is_served() {
    let mut token = Token::new(&[]);
    let item = token.item("dear".to_owned(), Duration::from_mins(1));
    token.backlogs.push(&lane("a"), item, COST * 1_000);
    token.push("b", 10);
    let served = token.pop_many(11);
    assert!(served[..3].contains(&"dear".to_owned()), "{served:?}");
}

#[test]
fn the_background_has_one_job_of_sixteen() {
    let mut token = Token::new(&[]);
    token.push("a", 200);
    token.push_background(20);
    let served = token.pop_many(160);
    let background = served
        .iter()
        .filter(|name| name.starts_with("background"))
        .count();
    assert_eq!(background, 10, "{served:?}");
}

#[test]
fn the_background_has_the_token_when_nothing_else_waits() {
    let mut token = Token::new(&[]);
    token.push_background(3);
    assert_eq!(
        token.pop_many(3),
        ["background0", "background1", "background2"]
    );
}

#[test]
fn a_job_that_is_repeated_is_the_next() {
    let mut token = Token::new(&[]);
    token.push("a", 2);
    token.push("b", 2);
    let lost = token.backlogs.pop(COST, token.now).unwrap();
    assert_eq!(lost.name, "a0");
    token.backlogs.push_again(&lane("a"), lost, COST);
    assert_eq!(token.pop_many(4), ["a0", "b0", "a1", "b1"]);
    // A principal that has no other job is included.
    token.push("b", 2);
    token.push("c", 1);
    let again = token.item("again".to_owned(), Duration::from_mins(1));
    token.backlogs.push_again(&lane("d"), again, COST);
    assert_eq!(token.pop(), "again");
}

/// When the oldest job of a queue is always late, the newest comes first, so that some jobs are in time. An oldest job
/// that has waited for half of its remaining time still comes first.
#[test]
fn a_standing_queue_is_served_from_the_newest_end() {
    let given = Duration::from_secs(4);
    let mut token = Token::new(&[]);
    let push = |token: &mut Token, name: String| {
        let item = token.item(name, given);
        token.backlogs.push(&lane("a"), item, COST);
    };
    for number in 0..100 {
        push(&mut token, format!("old{number}"));
    }
    // The oldest job is late, but not yet for the whole interval.
    token.now += Duration::from_millis(1_050);
    for number in 0..10 {
        push(&mut token, "new".to_owned());
        assert_eq!(token.pop(), format!("old{number}"));
    }
    assert_eq!(token.pop_many(3), ["new", "new", "new"]);
    // From 1.34 s on, the oldest job has waited for half of its remaining time.
    token.now += Duration::from_millis(200);
    assert_eq!(token.pop_many(2), ["old10", "old11"]);
}

/// A queue that was short once within the interval is not late for the whole interval.
#[test]
fn a_queue_that_recovers_is_served_in_order() {
    let mut token = Token::new(&[]);
    let push = |token: &mut Token, name: &str, given: u64| {
        let item = token.item(name.to_owned(), Duration::from_secs(given));
        token.backlogs.push(&lane("a"), item, COST);
    };
    for name in ["one", "two", "three"] {
        push(&mut token, name, 4);
    }
    token.now += Duration::from_millis(1_100);
    assert_eq!(token.pop(), "one");
    token.now += STANDING_INTERVAL;
    token.backlogs.take_all();
    for name in ["four", "five"] {
        push(&mut token, name, 4);
    }
    assert_eq!(token.pop_many(2), ["four", "five"]);
}

#[test]
fn the_work_before_a_job_is_what_the_turns_make_of_it() {
    let mut token = Token::new(&[("heavy", 4)]);
    let before = |token: &Token, name: &str| token.backlogs.work_before(&lane(name), COST);
    assert_eq!(before(&token, "a"), Duration::ZERO);
    token.push("a", 100);
    // A principal's own jobs come first, and only one job of another principal comes before each of them.
    assert_eq!(before(&token, "a"), COST * 100);
    assert_eq!(before(&token, "b"), COST);
    token.push("b", 2);
    assert_eq!(before(&token, "b"), COST * 5);
    assert_eq!(before(&token, "a"), COST * 102);
    // The jobs of the three other principals delay a principal with a weight of four less.
    assert_eq!(before(&token, "heavy"), COST / 4 * 2);
}

/// Only a principal whose jobs come too late gets a longer expected wait.
#[test]
fn a_late_job_raises_the_expected_wait_of_its_principal() {
    let mut token = Token::new(&[]);
    token.push("late", 1);
    token.push("other", 1);
    for _ in 0..30 {
        token.backlogs.note(&lane("late"), Served::Late);
    }
    token.backlogs.note(&lane("other"), Served::InTime);
    let least = COST + COST * CAUTION_MIN / 1_000;
    assert_eq!(token.backlogs.cautious(&lane("late"), COST), least + COST);
    for _ in 0..CAUTION_MAX {
        token.backlogs.note(&lane("late"), Served::InTime);
    }
    for name in ["late", "other", "unknown"] {
        assert_eq!(token.backlogs.cautious(&lane(name), COST), least);
    }
}

#[test]
fn a_full_queue_loses_the_newest_job_of_the_principal_that_fills_it() {
    let mut token = Token::new(&[("heavy", 100)]);
    token.push("a", 5);
    token.push("b", 2);
    let evicted = token.backlogs.evict_for(&lane("b"), COST).unwrap();
    assert_eq!(evicted.name, "a4");
    assert!(token.backlogs.evict_for(&lane("a"), COST).is_none());
    // A higher weight entitles a principal to a longer queue.
    token.push("heavy", 50);
    let evicted = token.backlogs.evict_for(&lane("c"), COST).unwrap();
    assert_eq!(evicted.name, "a3");
    assert_eq!(token.backlogs.len(), 55);
    token.backlogs.take_all();
    // One job of each principal is fair, whichever arrived first.
    token.push("a", 1);
    assert!(token.backlogs.evict_for(&lane("b"), COST / 10).is_none());
}

#[test]
fn jobs_that_nobody_waits_for_are_found() {
    let mut token = Token::new(&[]);
    token.push("a", 1);
    let abandoned = Item {
        is_abandoned: true,
        ..token.item("abandoned".to_owned(), Duration::from_mins(1))
    };
    token.backlogs.push(&lane("a"), abandoned, COST);
    let due = token.item("due".to_owned(), Duration::ZERO);
    token.backlogs.push(&lane("b"), due, COST);
    let mut useless = token.backlogs.take_useless(token.now);
    useless.sort_by(|one, other| one.name.cmp(&other.name));
    assert_eq!(
        useless
            .iter()
            .map(|item| item.name.as_str())
            .collect::<Vec<_>>(),
        ["abandoned", "due"]
    );
    assert_eq!((token.backlogs.len(), token.backlogs.work()), (1, COST));
    assert_eq!(token.pop(), "a0");
    assert!(token.backlogs.is_empty());
}
