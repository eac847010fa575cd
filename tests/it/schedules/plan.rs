//! The schedules themselves: which faults a seed selects, and when they happen.

use std::fmt;

use crate::faulty::{Fault, code};

/// Functions that a release, a change or a new session calls.
const FUNCTIONS: [&str; 10] = [
    "C_VerifyInit",
    "C_Verify",
    "C_DecryptInit",
    "C_Decrypt",
    "C_SignInit",
    "C_Sign",
    "C_OpenSession",
    "C_FindObjectsInit",
    "C_FindObjects",
    "C_Login",
];
/// None of them says that the PIN or a MAC is wrong: those are not faults, and the broker believes them.
const CODES: [i64; 12] = [
    code::HOST_MEMORY,
    code::GENERAL_ERROR,
    code::FUNCTION_FAILED,
    code::DEVICE_ERROR,
    code::DEVICE_MEMORY,
    code::DEVICE_REMOVED,
    code::FUNCTION_CANCELED,
    code::SESSION_CLOSED,
    code::SESSION_COUNT,
    code::SESSION_HANDLE_INVALID,
    code::TOKEN_NOT_PRESENT,
    code::VENDOR_DEFINED,
];
/// The generator `SplitMix64` (Steele, Lea and Flood, 2014): the schedule of a seed is the same in every release.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    pub(crate) fn one_of<T: Copy>(&mut self, values: &[T]) -> T {
        let at = self.below(u64::try_from(values.len()).unwrap());
        values[usize::try_from(at).unwrap()]
    }

    fn number(&mut self, limit: u64) -> u32 {
        u32::try_from(self.below(limit)).unwrap()
    }
}

/// What happens at one moment of a schedule.
#[derive(Clone, Debug)]
pub(super) enum Event {
    /// Calls of one function fail, are late, or crash their process.
    Function(&'static str, Fault),
    /// Every session is closed, the login ends or the handles change, at the next call of a function.
    Action(&'static str, &'static str),
    /// The token is not there for so many milliseconds.
    Absent(u64),
    /// One worker is killed.
    Kill,
}

/// The events of a seed, each with its moment in milliseconds.
pub(super) struct Schedule {
    pub(super) seed: u64,
    pub(super) events: Vec<(u64, Event)>,
}

impl fmt::Debug for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "KEYBROKER_TEST_SCHEDULE_SEED={} KEYBROKER_TEST_SCHEDULES=1",
            self.seed
        )?;
        for (at, event) in &self.events {
            writeln!(f, "  after {at} ms: {event:?}")?;
        }
        Ok(())
    }
}

impl Schedule {
    pub(super) fn of(seed: u64) -> Self {
        let mut random = Random(seed);
        let count = 2 + random.below(4);
        let mut events: Vec<(u64, Event)> = (0..count)
            .map(|_| (random.below(500), Self::event(&mut random)))
            .collect();
        events.sort_by_key(|(at, _)| *at);
        Self { seed, events }
    }

    fn event(random: &mut Random) -> Event {
        let function = random.one_of(&FUNCTIONS);
        let fault = |code, random: &mut Random| Fault {
            skip: random.number(4),
            times: Some(1 + random.number(4)),
            ..Fault::always(code)
        };
        match random.below(12) {
            0..=3 => {
                let code = random.one_of(&CODES);
                Event::Function(function, fault(code, random))
            }
            // The function did its work, and says that it failed.
            4 => {
                let code = code::after(random.one_of(&CODES));
                Event::Function(function, fault(code, random))
            }
            5 | 6 => {
                let milliseconds = 20 + random.number(2_000);
                let late = fault(code::LATE, random);
                Event::Function(
                    function,
                    Fault {
                        milliseconds,
                        ..late
                    },
                )
            }
            7 => Event::Function(
                function,
                Fault {
                    times: Some(1),
                    ..fault(code::CRASH, random)
                },
            ),
            8 | 9 => {
                let action = random.one_of(&["close_sessions", "logout", "new_handles"]);
                Event::Action(function, action)
            }
            10 => Event::Absent(50 + random.below(500)),
            _ => Event::Kill,
        }
    }
}

/// A seed repeats its schedule, and another one has another.
#[test]
fn a_schedule_is_repeated_by_its_seed() {
    let text = |seed| format!("{:?}", Schedule::of(seed).events);
    assert_eq!(text(7), text(7));
    assert_ne!(text(7), text(8));
    let many: Vec<String> = (0..200).map(text).collect();
    for part in [
        "Kill",
        "Absent",
        "logout",
        "new_handles",
        "close_sessions",
        "C_Login",
        "C_FindObjects",
    ] {
        assert!(
            many.iter().any(|schedule| schedule.contains(part)),
            "{part}"
        );
    }
}
