//! Measures the cost of a decision. `docs/policy.md` contains the figures.

use std::{hint::black_box, time::Instant};

use super::*;

const TURNS: u32 = 20_000;

fn micros_per_decision(policy: &Policy, identity: &Identity) -> f64 {
    let mut micros = 0.0;
    unwrap_of_ada(identity, |case| {
        for _ in 0..TURNS / 10 {
            black_box(policy.evaluate(black_box(case)));
        }
        let started = Instant::now();
        for _ in 0..TURNS {
            black_box(policy.evaluate(black_box(case)));
        }
        micros = started.elapsed().as_secs_f64() * 1e6 / f64::from(TURNS);
        policy.evaluate(case)
    });
    micros
}

/// Prints the figures and compares them with a generous limit. In a development build only dependencies are optimised,
/// and the machine may be busy.
#[test]
#[ignore = "a measurement: cargo nextest run --profile long --run-ignored only -E 'test(policy::tests::cost)'"]
fn a_decision_costs_little() {
    let rules = r#"
        forbid (principal is Keybroker::User, action == Keybroker::Action::"user_key.unwrap", resource)
            unless { context.amr.contains("mfa") };
        forbid (principal, action == Keybroker::Action::"user_key.unwrap", resource)
            when { context has authAgeSeconds && context.authAgeSeconds > 3600 };
        forbid (principal, action in Keybroker::Action::"user_keys", resource)
            unless { context.peer.isInRange(ip("10.0.0.0/8")) };
        forbid (principal is Keybroker::Service, action in Keybroker::Action::"user_keys", resource)
            when { context.time.toTime() < duration("6h") };
    "#;
    let (_folder, with_rules) = with_files(&[("rules.cedar", rules)]).unwrap();
    let mut user = person("ada");
    user.claims.amr = ["pwd", "mfa"].map(str::to_owned).into();
    user.claims.authenticated = Some(NOON);
    for (what, identity) in [("service", service(&[Role::Release])), ("user", user)] {
        for (set, policy) in [
            ("shipped policies", &*shipped()),
            ("and four of an operator", &*with_rules),
        ] {
            let micros = micros_per_decision(policy, &identity);
            println!("an unwrap of a {what}, {set}: {micros:.1} us");
            assert!(micros < 500.0);
        }
    }
}
