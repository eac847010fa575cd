//! Runs each fuzz target with inputs that are made from good ones by random changes.
//!
//! `KEYBROKER_TEST_FUZZ_SECONDS` is how long each target runs (10 s), `KEYBROKER_TEST_FUZZ_SEED` repeats a run. A failure prints the
//! shortest input that was found for it.

#![allow(
    clippy::unwrap_used,
    reason = "a test that meets a surprise stops there"
)]
#![allow(
    clippy::print_stdout,
    reason = "the seed of a run is part of its result"
)]

use std::{
    cell::Cell,
    env,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    time::{Duration, Instant},
};

use keybroker_fuzz_targets::{TARGETS, Target, for_each_target};
use proptest::{
    collection::vec,
    prelude::*,
    sample::Index,
    test_runner::{Config, RngAlgorithm, TestError, TestRng, TestRunner},
};
use rustix::time::{ClockId, clock_gettime};

const SECONDS: u64 = 10;
/// Inputs between two looks at the clock.
const ROUND: u32 = 64;
/// Processor time that one input may take. The longest ones have some ten kilobytes, and take milliseconds in a debug build.
const INPUT_TIME_MAX: Duration = Duration::from_secs(2);
/// Of so many inputs, some are accepted and some are not.
const ENOUGH: u64 = 1_000;
const INPUT_BYTES_MAX: usize = 64 * 1024;
/// The seed of every run in CI, so that a change and not chance makes a run fail there.
const CI_SEED: u64 = 20_261_129;

/// One change of an input.
#[derive(Clone, Debug)]
enum Change {
    /// Some bits of one byte.
    Flip(Index, u8),
    /// Bytes are put between others.
    Insert(Index, Vec<u8>),
    /// So does a word of the target.
    Word(Index, Index),
    /// A part is taken out.
    Remove(Index, usize),
    /// A part is there several times.
    Repeat(Index, usize, usize),
    /// The end is missing.
    Cut(Index),
    /// It goes on with a part of another good input.
    Splice(Index, Index, Index),
}

fn change() -> impl Strategy<Value = Change> {
    let index = any::<Index>;
    prop_oneof![
        4 => (index(), 1_u8..).prop_map(|(at, bits)| Change::Flip(at, bits)),
        2 => (index(), vec(any::<u8>(), 1..8)).prop_map(|(at, bytes)| Change::Insert(at, bytes)),
        4 => (index(), index()).prop_map(|(at, word)| Change::Word(at, word)),
        3 => (index(), 1_usize..40).prop_map(|(at, length)| Change::Remove(at, length)),
        1 => (index(), 1_usize..200, 2_usize..70).prop_map(|(at, length, times)| Change::Repeat(at, length, times)),
        1 => index().prop_map(Change::Cut),
        1 => (index(), index(), index()).prop_map(|(at, seed, from)| Change::Splice(at, seed, from)),
    ]
}

fn apply(change: &Change, input: &mut Vec<u8>, seeds: &[Vec<u8>], words: &[&str]) {
    let ends = input.len() + 1;
    match change {
        Change::Flip(at, bits) if !input.is_empty() => {
            let at = at.index(input.len());
            input[at] ^= bits;
        }
        Change::Flip(..) => {}
        Change::Insert(at, bytes) => {
            drop(input.splice(insertion(*at, ends), bytes.iter().copied()));
        }
        Change::Word(at, word) => {
            let word = words[word.index(words.len())].bytes();
            drop(input.splice(insertion(*at, ends), word));
        }
        Change::Remove(at, length) => {
            let from = at.index(ends);
            let to = input.len().min(from + length);
            drop(input.drain(from..to));
        }
        Change::Repeat(at, length, times) => {
            let from = at.index(ends);
            let to = input.len().min(from + length);
            let part = input[from..to].repeat(*times);
            drop(input.splice(from..to, part));
        }
        Change::Cut(at) => input.truncate(at.index(ends)),
        Change::Splice(at, seed, from) => {
            let other = &seeds[seed.index(seeds.len())];
            input.truncate(at.index(ends));
            input.extend(&other[from.index(other.len() + 1)..]);
        }
    }
    input.truncate(INPUT_BYTES_MAX);
}

fn insertion(at: Index, ends: usize) -> std::ops::Range<usize> {
    let at = at.index(ends);
    at..at
}

fn number(variable: &str) -> Option<u64> {
    let text = env::var(variable).ok()?;
    Some(
        text.parse()
            .unwrap_or_else(|_| panic!("{variable} is not a number: {text}")),
    )
}

fn generator(seed: u64, target: &str, round: u64) -> TestRng {
    let mut bytes = [0; 32];
    for (at, part) in bytes.chunks_mut(8).enumerate() {
        let mut hasher = DefaultHasher::new();
        (seed, target, round, at).hash(&mut hasher);
        part.copy_from_slice(&hasher.finish().to_be_bytes());
    }
    TestRng::from_seed(RngAlgorithm::ChaCha, &bytes)
}

fn processor_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(
        time.tv_sec.try_into().unwrap(),
        time.tv_nsec.try_into().unwrap(),
    )
}

fn run(name: &str) {
    let target = TARGETS.iter().find(|target| target.name == name).unwrap();
    let seconds = number("KEYBROKER_TEST_FUZZ_SECONDS").unwrap_or(SECONDS);
    let seed = number("KEYBROKER_TEST_FUZZ_SEED").unwrap_or_else(rand_seed);
    println!("{name}: KEYBROKER_TEST_FUZZ_SEED={seed}");
    let seeds = (target.seeds)();
    for good in &seeds {
        let shown = String::from_utf8_lossy(good);
        assert!((target.run)(good), "a good input is refused: {shown}");
    }
    let (inputs, accepted) = (Cell::new(0_u64), Cell::new(0_u64));
    let until = Instant::now() + Duration::from_secs(seconds);
    let mut round = 0;
    while Instant::now() < until {
        let config = Config {
            cases: ROUND,
            failure_persistence: None,
            ..Config::default()
        };
        let mut runner = TestRunner::new_with_rng(config, generator(seed, name, round));
        let result = runner.run(
            &(any::<Index>(), vec(change(), 0..6), vec(any::<u8>(), 0..4)),
            |(good, changes, prefix)| {
                let input = input(target, &seeds, good, &changes, &prefix);
                let begun = processor_time();
                let is_accepted = (target.run)(&input);
                let taken = processor_time().saturating_sub(begun);
                prop_assert!(taken <= INPUT_TIME_MAX, "an input took {taken:?}");
                inputs.set(inputs.get() + 1);
                accepted.set(accepted.get() + u64::from(is_accepted));
                Ok(())
            },
        );
        if let Err(TestError::Fail(reason, (good, changes, prefix))) = result {
            let input = input(target, &seeds, good, &changes, &prefix);
            panic!(
                "{name}, seed {seed}: {reason}\ninput: {input:?}\nas text: {}",
                String::from_utf8_lossy(&input)
            );
        }
        result.unwrap();
        round += 1;
    }
    let (inputs, accepted) = (inputs.get(), accepted.get());
    println!("{name}: {inputs} inputs, of which {accepted} were accepted");
    // A busy machine may leave time for a few inputs only.
    assert!(
        inputs < ENOUGH || (1..inputs).contains(&accepted),
        "inputs of both kinds"
    );
}

fn input(
    target: &Target,
    seeds: &[Vec<u8>],
    good: Index,
    changes: &[Change],
    prefix: &[u8],
) -> Vec<u8> {
    // One input in some is random from the beginning.
    let mut input = if prefix.len() == 3 {
        prefix.to_vec()
    } else {
        seeds[good.index(seeds.len())].clone()
    };
    for change in changes {
        apply(change, &mut input, seeds, target.words);
    }
    input
}

/// The seed of a run for which none is chosen: always another one, except in CI.
fn rand_seed() -> u64 {
    if env::var("CI").is_ok_and(|value| value == "true") {
        return CI_SEED;
    }
    let mut hasher = DefaultHasher::new();
    (std::time::SystemTime::now(), std::process::id()).hash(&mut hasher);
    hasher.finish()
}

macro_rules! tests {
    ($($name:ident),* $(,)?) => {
        $(#[test]
        fn $name() {
            run(stringify!($name));
        })*

        #[test]
        fn every_target_has_a_test_and_a_program() {
            let tested = [$(stringify!($name)),*];
            let names: Vec<&str> = TARGETS.iter().map(|target| target.name).collect();
            assert_eq!(names, tested);
            let programs = concat!(env!("CARGO_MANIFEST_DIR"), "/../fuzz/fuzz_targets");
            let mut programs: Vec<String> = std::fs::read_dir(programs)
                .unwrap()
                .map(|entry| entry.unwrap().file_name().to_string_lossy().replace(".rs", ""))
                .collect();
            programs.sort();
            assert_eq!(programs, tested);
        }
    };
}

for_each_target!(tests);
