//! A token that misbehaves: it refuses, hesitates, is busy or lies. The real SoftHSM with faults on command before it.

use std::{
    fs,
    sync::Arc,
    time::{Duration, Instant},
};

use rustix::process::Signal;

use crate::{
    client::Caller,
    faulty::{Fault, Faulty, VARIABLE, code},
    process::{Broker, is_alive, send, until},
    site::{Options, Site},
    softhsm,
};

const MATERIAL: &[u8] = b"material of this user";
/// Longer than a login takes, shorter than the broker waits for a worker.
const SLOW_LOGIN_MS: u32 = 1_500;

/// A site whose `serve` uses the faulty module; the commands have made its key with the real one.
fn site(options: Options) -> (Arc<Site>, Faulty) {
    let site = Site::fresh(options);
    let faulty = Faulty::before(&softhsm::module());
    site.write_configuration(|text| {
        let real = softhsm::module().display().to_string();
        *text = text
            .replace(&real, &faulty.module().display().to_string())
            .replace(
                "[token.environment]\n",
                &format!(
                    "[token.environment]\n{VARIABLE} = \"{}\"\n",
                    faulty.folder().display()
                ),
            );
    });
    (Arc::new(site), faulty)
}

fn slow_login() -> Fault {
    Fault {
        milliseconds: SLOW_LOGIN_MS,
        ..Fault::always(code::LATE)
    }
}

/// SIGKILL in the middle of SoftHSM's login can leave its token file empty: a stop waits for the login's end.
#[test]
fn a_stop_during_start_lets_the_login_end() {
    for signal in [Signal::TERM, Signal::INT] {
        let (site, faulty) = site(Options::default());
        faulty.set("C_Login", &slow_login());
        let mut child = site.spawn(site.serve());
        until("a login", || {
            (faulty.count("C_Login begins") > 0).then_some(())
        });
        let sent = Instant::now();
        send(child.id(), signal);
        let status = until("the broker to end", || child.try_wait().unwrap());
        assert!(status.success(), "{status}\n{}", site.log());
        assert!(
            sent.elapsed() < Duration::from_secs(5),
            "{:?}",
            sent.elapsed()
        );
        assert_eq!(faulty.count("C_Login ends 0"), 1, "the login was cut");
    }
}

/// The same while a worker that was lost is replaced.
#[test]
fn a_stop_during_a_replacement_lets_the_login_end() {
    let (site, faulty) = site(Options::default());
    let broker = Broker::start_on(site);
    faulty.set("C_Login", &slow_login());
    let lost = until("a worker", || broker.workers().first().copied());
    send(lost, Signal::KILL);
    until("the next login", || {
        (faulty.count("C_Login begins") > 1).then_some(())
    });
    let replacement = until("its process", || {
        broker.workers().into_iter().find(|pid| *pid != lost)
    });
    let (site, status) = broker.stop();
    assert!(status.success(), "{status}\n{}", site.log());
    assert!(!is_alive(replacement), "it outlived the broker");
    assert_eq!(faulty.count("C_Login ends 0"), 2, "the login was cut");
}

/// A token that allows one client, with `workers = 2`: the one worker serves.
#[tokio::test(flavor = "multi_thread")]
async fn one_worker_serves_when_the_next_does_not_start() {
    let (site, faulty) = site(Options {
        workers: 2,
        ..Options::default()
    });
    faulty.set(
        "C_Login",
        &Fault {
            skip: 1,
            ..Fault::always(code::SESSION_COUNT)
        },
    );
    let broker = Broker::start_on(site);
    Caller::of(&broker, "enroller")
        .create("ada", MATERIAL)
        .await
        .unwrap();
    let key = Caller::of(&broker, "releaser").unwrap("ada").await.unwrap();
    assert_eq!(key.key_material, MATERIAL);
    assert!(broker.site.log().contains("a token worker did not start"));
    // Once the token allows it, the second one comes without help.
    faulty.clear("C_Login");
    until("the second worker", || {
        (fs::read_to_string(faulty.folder().join("calls"))
            .unwrap()
            .matches("C_Login ends 0")
            .count()
            == 2)
            .then_some(())
    });
}
