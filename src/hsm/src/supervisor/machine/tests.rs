//! Tests the table of the machine, and sequences of events after which the service must recover without a person.

use std::fmt::Write as _;

use super::*;

const SECOND: Duration = Duration::from_secs(1);
/// A time long after the machine's first moment.
const NOW: Duration = Duration::from_secs(1_000);

fn text() -> String {
    "cause".to_owned()
}

/// A machine for two workers that has reached a state by the events of a real broker.
fn machine(state: &str) -> Machine {
    let mut machine = Machine::new(2);
    let early = NOW.saturating_sub(100 * SECOND);
    machine.on(early, Event::Tick);
    let ready = |machine: &mut Machine| drop(machine.on(early, Event::Ready));
    let not_ready =
        |machine: &mut Machine, why| drop(machine.on(early, Event::NotReady(why, text())));
    match state {
        "starting" => {}
        "up" => ready(&mut machine),
        "up, latched" => {
            ready(&mut machine);
            not_ready(&mut machine, NotReady::Pin);
        }
        "due" => {
            ready(&mut machine);
            not_ready(&mut machine, NotReady::Unavailable);
            machine.on(NOW, Event::Lost(Loss::Ended, text()));
            return machine;
        }
        "down" => not_ready(&mut machine, NotReady::Unavailable),
        "untrusted" => not_ready(&mut machine, NotReady::Untrusted),
        "latched" => not_ready(&mut machine, NotReady::Pin),
        other => panic!("{other}"),
    }
    machine.on(NOW, Event::Tick);
    machine
}

const STATES: [&str; 7] = [
    "starting",
    "up",
    "up, latched",
    "due",
    "down",
    "untrusted",
    "latched",
];

fn state(machine: &Machine) -> &'static str {
    match (&machine.phase, machine.latched.is_some()) {
        (Phase::Starting, _) => "starting",
        (Phase::Up, false) => "up",
        (Phase::Up, true) => "up, latched",
        (Phase::Due { .. }, _) => "due",
        (Phase::Down(_), _) => "down",
        (Phase::Untrusted(_), false) => "untrusted",
        (Phase::Untrusted(_), true) => "latched",
        (Phase::Stopped, _) => "stopped",
    }
}

fn events() -> [(&'static str, Event); 9] {
    [
        ("worker ready", Event::Ready),
        ("start: crashed", Event::NotReady(NotReady::Crashed, text())),
        ("start: token busy", Event::NotReady(NotReady::Busy, text())),
        (
            "start: token unavailable",
            Event::NotReady(NotReady::Unavailable, text()),
        ),
        (
            "start: login failed",
            Event::NotReady(NotReady::Login, text()),
        ),
        ("start: PIN", Event::NotReady(NotReady::Pin, text())),
        (
            "start: untrusted",
            Event::NotReady(NotReady::Untrusted, text()),
        ),
        ("last worker lost", Event::Lost(Loss::Ended, text())),
        (
            "last worker untrusted",
            Event::Lost(Loss::Untrusted, text()),
        ),
    ]
}

/// The next state, and the time until the next start. `-` marks an event that cannot happen in this state.
fn cell(from: &str, event: Event) -> String {
    let mut machine = machine(from);
    let is_loss = matches!(event, Event::Lost(..));
    if is_loss && machine.ready == 0 {
        return "-".to_owned();
    }
    if is_loss {
        machine.starting = None;
    }
    machine.on(NOW, event);
    let next = state(&machine);
    if machine.starting.is_some() {
        return format!("{next}, start");
    }
    if machine.is_full() {
        return next.to_owned();
    }
    format!(
        "{next}, {} ms",
        machine.next_start.saturating_sub(NOW).as_millis()
    )
}

fn table() -> String {
    let mut table = "| Event |".to_owned();
    for state in STATES {
        write!(table, " {state} |").unwrap();
    }
    table += "\n|---|";
    table += &"---|".repeat(STATES.len());
    for (name, event) in events() {
        write!(table, "\n| {name} |").unwrap();
        for from in STATES {
            write!(table, " {} |", cell(from, event.clone())).unwrap();
        }
    }
    table
}

#[test]
fn the_documentation_has_the_table() {
    let text = include_str!("../../../../../ARCHITECTURE.md");
    let table = table();
    assert!(text.contains(&table), "ARCHITECTURE.md must have:\n{table}");
}

/// A simulated broker with a token; the test decides how each start ends.
struct Run {
    machine: Machine,
    now: Duration,
    starts: Vec<Duration>,
    serving: Option<Serving>,
    alerts: Vec<Alert>,
    retired: Vec<Duration>,
}

impl Run {
    fn new() -> Self {
        Self {
            machine: Machine::new(2),
            now: Duration::ZERO,
            starts: Vec::new(),
            serving: None,
            alerts: Vec::new(),
            retired: Vec::new(),
        }
    }

    fn take(&mut self, event: Event) {
        for action in self.machine.on(self.now, event) {
            match action {
                Action::Start => self.starts.push(self.now),
                Action::Serve(serving) => self.serving = Some(serving),
                Action::Alert(alert, _) => self.alerts.push(alert),
                Action::Retire => self.retired.push(self.now),
            }
        }
    }

    /// Lets `time` pass, with a tick every 50 ms. Each start takes no time and ends with `outcome`.
    fn pass(&mut self, time: Duration, outcome: impl Fn() -> Event) {
        let until = self.now + time;
        while self.now < until {
            self.now += Duration::from_millis(50);
            self.take(Event::Tick);
            while self.machine.starting.is_some() {
                self.take(outcome());
            }
        }
    }

    fn up() -> Self {
        let mut run = Self::new();
        run.pass(SECOND, || Event::Ready);
        assert_eq!(run.serving, Some(Serving::Up));
        run
    }

    fn lose_all(&mut self) {
        while self.machine.ready > 0 {
            self.take(Event::Lost(Loss::Ended, text()));
        }
        self.machine.starting = None;
    }
}

/// Whatever the cause and duration of an outage, the service returns within five seconds of its end.
#[test]
fn every_outage_ends_within_five_seconds_of_its_cause() {
    for why in [
        NotReady::Crashed,
        NotReady::Busy,
        NotReady::Unavailable,
        NotReady::Login,
        NotReady::Pin,
        NotReady::Untrusted,
    ] {
        for outage in [3, 60, 240] {
            let mut run = Run::up();
            run.lose_all();
            run.pass(outage * SECOND, || Event::NotReady(why, text()));
            let ended = run.now;
            run.pass(5 * SECOND, || Event::Ready);
            assert_eq!(run.machine.phase, Phase::Up, "{why:?} {outage}");
            let back = *run.starts.iter().find(|start| **start >= ended).unwrap();
            assert!(back <= ended + 3 * SECOND, "{why:?} {outage}: {back:?}");
            assert!(run.machine.is_full(), "{why:?} {outage}");
            assert_eq!(run.machine.latched(), None);
        }
    }
}

#[test]
fn logins_that_fail_are_spaced() {
    let mut run = Run::up();
    run.lose_all();
    let before = run.starts.len();
    run.pass(60 * SECOND, || Event::NotReady(NotReady::Login, text()));
    let logins = run.starts.len() - before;
    assert!((15..=25).contains(&logins), "{logins} in a minute");
    let before = run.starts.len();
    run.pass(3_600 * SECOND, || Event::NotReady(NotReady::Login, text()));
    let logins = run.starts.len() - before;
    assert!(logins < 360, "{logins} in an hour");
}

/// Workers are killed one after another as soon as they are ready. No caller is told that the token is unavailable.
#[test]
fn workers_killed_as_they_come_are_no_outage() {
    let mut run = Run::up();
    for _ in 0..50 {
        run.lose_all();
        assert!(run.machine.due().is_some());
        run.pass(SECOND / 2, || Event::Ready);
        assert!(run.machine.is_full());
    }
    assert_eq!(run.serving, Some(Serving::Up));
    assert_eq!(run.alerts, []);
}

#[test]
fn callers_wait_five_seconds_and_no_longer() {
    let mut run = Run::up();
    run.lose_all();
    run.pass(4 * SECOND, || Event::NotReady(NotReady::Crashed, text()));
    assert_eq!(run.serving, Some(Serving::Up));
    run.pass(2 * SECOND, || Event::NotReady(NotReady::Crashed, text()));
    assert_eq!(run.serving, Some(Serving::Down(text())));
    assert_eq!(run.alerts, [Alert::TokenDown]);
}

/// The first failed start after a loss shows that the token is unavailable, so no caller waits for it.
#[test]
fn callers_do_not_wait_for_a_token_that_is_known_to_be_down() {
    let mut run = Run::up();
    run.lose_all();
    run.pass(SECOND / 5, || {
        Event::NotReady(NotReady::Unavailable, text())
    });
    assert_eq!(run.serving, Some(Serving::Down(text())));
}

/// The first worker that finds the latch reports it. The latch becomes the reason when the last other worker is lost.
#[test]
fn a_latched_pin_is_one_state_with_one_reason() {
    let mut run = Run::up();
    run.take(Event::Lost(Loss::Ended, text()));
    run.machine.starting = None;
    run.pass(5 * SECOND, || {
        Event::NotReady(NotReady::Pin, "rejected".to_owned())
    });
    assert_eq!(run.serving, Some(Serving::Up));
    assert_eq!(run.machine.latched(), Some("rejected"));
    run.take(Event::Lost(Loss::Ended, "killed".to_owned()));
    let untrusted = Serving::Untrusted("rejected".to_owned());
    assert_eq!(run.serving, Some(untrusted.clone()));
    // A crash says nothing about the PIN.
    run.machine.starting = Some(run.now);
    run.take(Event::NotReady(NotReady::Crashed, text()));
    assert_eq!(run.serving, Some(untrusted));
    assert!(run.alerts.iter().all(|alert| *alert == Alert::PinLatched));
}

#[test]
fn a_worker_that_dies_at_once_is_no_loop() {
    let mut run = Run::up();
    let before = run.starts.len();
    for _ in 0..100 {
        run.lose_all();
        run.pass(Duration::from_millis(50), || Event::Ready);
    }
    let starts = run.starts.len() - before;
    assert!(starts <= 120, "{starts} starts in five seconds");
}

#[test]
fn a_stop_is_final() {
    let mut run = Run::up();
    run.take(Event::Stop);
    let starts = run.starts.len();
    run.take(Event::Lost(Loss::Ended, text()));
    run.pass(10 * SECOND, || Event::Ready);
    assert_eq!(run.starts.len(), starts);
}

/// The delay that callers are given is the wait for the next start plus the duration of a start.
#[test]
fn the_expected_wait_follows_the_next_start() {
    let mut run = Run::up();
    run.lose_all();
    run.pass(10 * SECOND, || Event::NotReady(NotReady::Login, text()));
    let wait = run.machine.expected_wait(run.now);
    let next = run.machine.next_start.saturating_sub(run.now);
    assert!(
        wait >= next && wait <= LOGIN_MAX + SECOND,
        "{wait:?} {next:?}"
    );
}

/// Workers that must be replaced are retired one after another, each after its replacement is ready.
#[test]
fn outdated_workers_are_replaced_one_after_another() {
    let mut run = Run::up();
    let before = run.starts.len();
    run.machine.set_outdated(2);
    run.take(Event::Tick);
    assert_eq!(run.starts.len(), before + 1);
    assert_eq!(run.retired.len(), 0, "retired before its replacement");
    run.take(Event::Ready);
    assert_eq!((run.retired.len(), run.machine.ready), (1, 2));
    run.take(Event::Ready);
    assert_eq!((run.retired.len(), run.machine.ready), (2, 2));
    run.pass(SECOND, || Event::Ready);
    assert_eq!(run.starts.len(), before + 2, "a worker more than wanted");
    assert_eq!(run.serving, Some(Serving::Up));
}

/// If the replacement of a worker does not start, the old worker continues to serve, and another attempt follows.
#[test]
fn a_replacement_that_does_not_start_costs_nothing() {
    let mut run = Run::up();
    run.machine.set_outdated(1);
    run.pass(10 * SECOND, || {
        Event::NotReady(NotReady::Unavailable, text())
    });
    assert_eq!((run.retired.len(), run.machine.ready), (0, 2));
    assert_eq!(run.serving, Some(Serving::Up));
    assert_eq!(run.alerts, []);
    run.pass(2 * SECOND, || Event::Ready);
    assert_eq!((run.retired.len(), run.machine.ready), (1, 2));
}

/// A worker that is lost during a replacement is replaced as well.
#[test]
fn a_loss_during_a_replacement_leaves_no_gap() {
    let mut run = Run::up();
    run.machine.set_outdated(2);
    run.take(Event::Tick);
    run.take(Event::Lost(Loss::Ended, text()));
    run.machine.set_outdated(1);
    run.pass(2 * SECOND, || Event::Ready);
    assert_eq!((run.machine.ready, run.retired.len()), (2, 1));
    assert!(run.machine.is_full());
}
