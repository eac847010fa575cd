//! The decision about a scheduled destruction, from the row of the schedule and the verified registry alone.

use std::time::Duration;

use keybroker_core::{call::Timestamp, key::WrappingKeyState};
use keybroker_store::{DestructionRow, RegistryRow};

use super::after;

/// The time between the mark in the registry and the removal from the tokens, in which every broker stops using the key.
pub(super) const NOTICE: Duration = Duration::from_secs(5);

/// What to do about a scheduled destruction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// The time has not come.
    Wait,
    /// The schedule is not valid, because the key was changed after it was made.
    Invalid(&'static str),
    /// The destruction is due, but the registry row of the key cannot be used at present.
    Blocked(String),
    /// The key must be marked as destroyed, if no row needs it.
    Mark,
    /// The key is marked as destroyed, and its objects must be removed.
    Remove,
}

/// Decides about a schedule. `key` is the registry row of the key, with the problem that prevents its use. The registry must have been
/// read after the schedule.
pub(super) fn verdict(
    schedule: &DestructionRow,
    key: Option<(&RegistryRow, Option<&str>)>,
    now: Timestamp,
) -> Verdict {
    let Some((row, problem)) = key else {
        return Verdict::Invalid("the key is not registered");
    };
    let is_marked = row.state == WrappingKeyState::Destroyed;
    if row.sequence > schedule.sequence && !is_marked {
        return Verdict::Invalid("the key was changed after its destruction was scheduled");
    }
    // After the mark, nothing is left to wait for but the notice. A later time was not written by a broker.
    if now < schedule.due && !(is_marked && after(now, NOTICE) < schedule.due) {
        return Verdict::Wait;
    }
    if let Some(problem) = problem {
        return Verdict::Blocked(problem.to_owned());
    }
    if is_marked {
        return Verdict::Remove;
    }
    if row.sequence < schedule.sequence {
        return Verdict::Blocked(
            "the registry row of the key is older than the schedule".to_owned(),
        );
    }
    if row.state.check_change(WrappingKeyState::Destroyed).is_err() {
        return Verdict::Invalid("the state of the key does not permit its destruction");
    }
    Verdict::Mark
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use keybroker_core::key::WrappingKeyId;

    use crate::testing;

    use super::*;

    const KEY: WrappingKeyId = WrappingKeyId::from_bytes([1; 16]);

    pub(in super::super) fn registered(state: WrappingKeyState, sequence: u64) -> RegistryRow {
        RegistryRow {
            token_serial: "serial".to_owned(),
            ..testing::registered(KEY, state, sequence)
        }
    }

    fn schedule(sequence: u64, due_us: i64) -> DestructionRow {
        DestructionRow {
            key: KEY,
            signer: WrappingKeyId::from_bytes([4; 16]),
            sequence,
            requested: Timestamp::from_micros(0),
            due: Timestamp::from_micros(due_us),
            requested_by: "URI:admin".to_owned(),
            mac: [5; 32],
        }
    }

    #[test]
    fn each_case_has_its_verdict() {
        use WrappingKeyState::{Active, Deactivated, Destroyed};
        let at = Timestamp::from_micros;
        let one = schedule(7, 100);
        let said = |state, sequence, problem, now| {
            verdict(&one, Some((&registered(state, sequence), problem)), at(now))
        };
        assert_eq!(said(Deactivated, 7, None, 99), Verdict::Wait);
        assert_eq!(said(Deactivated, 7, None, 100), Verdict::Mark);
        let missing = Some("missing");
        assert_eq!(said(Deactivated, 7, missing, 99), Verdict::Wait);
        assert_eq!(
            said(Deactivated, 7, missing, 100),
            Verdict::Blocked("missing".to_owned())
        );
        assert!(matches!(
            said(Deactivated, 6, None, 100),
            Verdict::Blocked(_)
        ));
        assert!(matches!(said(Deactivated, 8, None, 0), Verdict::Invalid(_)));
        assert!(matches!(said(Active, 7, None, 100), Verdict::Invalid(_)));
        assert_eq!(said(Destroyed, 8, None, 100), Verdict::Remove);
        assert_eq!(said(Destroyed, 8, None, 99), Verdict::Wait);
        // A person moved the time of the removal.
        let moved = schedule(7, 100_000_000);
        let marked = registered(Destroyed, 8);
        let said = verdict(&moved, Some((&marked, None)), at(99));
        assert_eq!(said, Verdict::Remove);
        assert!(matches!(verdict(&one, None, at(0)), Verdict::Invalid(_)));
    }

    /// A step of an administrator, of the clock, or of a person who can write to the database.
    #[derive(Clone, Debug)]
    enum Step {
        Schedule(i64),
        Cancel,
        Change(WrappingKeyState),
        Pass(i64),
        /// An earlier row of a schedule is put back.
        PutBack(usize),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (1..50_i64).prop_map(Step::Schedule),
            Just(Step::Cancel),
            proptest::sample::select(WrappingKeyState::ALL.as_slice()).prop_map(Step::Change),
            (1..30_i64).prop_map(Step::Pass),
            any::<usize>().prop_map(Step::PutBack),
        ]
    }

    proptest! {
        /// After any sequence of steps, a key is marked only if its schedule was not cancelled, its state did not change, and the
        /// complete waiting time has passed.
        #[test]
        fn a_key_is_only_destroyed_after_an_undisturbed_wait(steps in proptest::collection::vec(step(), 0..60)) {
            let mut row = registered(WrappingKeyState::Deactivated, 1);
            let mut stored: Option<DestructionRow> = None;
            let mut made: Vec<DestructionRow> = Vec::new();
            // The schedule as the administrators know it.
            let mut wanted: Option<i64> = None;
            let mut now = 0;
            for step in steps {
                match step {
                    Step::Schedule(wait) => {
                        let can = row.state.check_change(WrappingKeyState::Destroyed).is_ok();
                        if wanted.is_some() || !can {
                            continue;
                        }
                        row.sequence += 1;
                        let new = schedule(row.sequence, now + wait);
                        made.push(new.clone());
                        stored = Some(new);
                        wanted = Some(now + wait);
                    }
                    Step::Cancel if wanted.is_some() => {
                        row.sequence += 1;
                        stored = None;
                        wanted = None;
                    }
                    Step::Cancel => {}
                    Step::Change(to) => {
                        if to == WrappingKeyState::Destroyed || row.state.check_change(to).is_err() {
                            continue;
                        }
                        row.state = to;
                        row.sequence += 1;
                        wanted = None;
                    }
                    Step::Pass(time) => now += time,
                    Step::PutBack(index) if !made.is_empty() => stored = made.get(index % made.len()).cloned(),
                    Step::PutBack(_) => {}
                }
                let Some(found) = &stored else { continue };
                let said = verdict(found, Some((&row, None)), Timestamp::from_micros(now));
                if said == Verdict::Mark {
                    prop_assert!(wanted.is_some_and(|due| now >= due), "{found:?} {row:?}");
                    break;
                }
            }
        }
    }
}
