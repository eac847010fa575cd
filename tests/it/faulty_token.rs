//! A token that misbehaves: it refuses, hesitates, is busy or lies. The real SoftHSM with faults on command before it.

use std::{
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
pub(crate) fn site(options: Options) -> (Arc<Site>, Faulty) {
    let site = Site::fresh(options);
    let faulty = put_before(&site);
    (Arc::new(site), faulty)
}

/// Configures the faulty module in front of the real one.
pub(crate) fn put_before(site: &Site) -> Faulty {
    let faulty = Faulty::in_folder(site.folder().join("faulty"), &softhsm::module());
    site.write_configuration(|text| name_module(text, &faulty));
    faulty
}

/// Like [`put_before`], but keeps everything else of a configuration.
pub(crate) fn behind_faults(site: &Site) -> Faulty {
    let faulty = Faulty::in_folder(site.folder().join("faulty"), &softhsm::module());
    site.edit_configuration(|text| name_module(text, &faulty));
    faulty
}

/// Names the faulty module in the text of a configuration that names the real one.
pub(crate) fn name_module(text: &mut String, faulty: &Faulty) {
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

/// All sessions hang inside the module when the front dies: the worker must not keep the token from the next one.
#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_hangs_does_not_outlive_its_front() {
    let (site, faulty) = site(Options::default());
    let mut broker = Broker::start_on(site);
    Caller::of(&broker, "enroller")
        .create("ada", MATERIAL)
        .await
        .unwrap();
    faulty.set(
        "C_Decrypt",
        &Fault {
            milliseconds: 120_000,
            ..Fault::always(code::LATE)
        },
    );
    let worker = until("a worker", || broker.workers().first().copied());
    for _ in 0..Options::default().sessions_per_worker {
        let releaser = Caller::of(&broker, "releaser");
        tokio::spawn(async move { releaser.unwrap("ada").await });
    }
    until("each session to hang", || {
        let begun = faulty.count("C_Decrypt begins") - faulty.count("C_Decrypt ends 0");
        (begun == Options::default().sessions_per_worker).then_some(())
    });
    broker.signal(Signal::KILL);
    broker.wait();
    until("its worker to end", || (!is_alive(worker)).then_some(()));
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
        (faulty.count("C_Login ends 0") == 2).then_some(())
    });
}

/// A busy token says so with a code that also means damage.
#[tokio::test(flavor = "multi_thread")]
async fn a_short_failure_is_not_answered_with_data_loss() {
    let (site, faulty) = site(Options::default());
    let broker = Broker::start_on(site);
    let enroller = Caller::of(&broker, "enroller");
    enroller.create("ada", MATERIAL).await.unwrap();
    let releaser = Caller::of(&broker, "releaser");
    for function in ["C_Verify", "C_Decrypt"] {
        for code in [code::FUNCTION_FAILED, code::GENERAL_ERROR] {
            faulty.set(function, &Fault::times(code, 1));
            let key = releaser.unwrap("ada").await.unwrap();
            assert_eq!(key.key_material, MATERIAL);
        }
    }
    let log = broker.site.log();
    assert!(!log.contains("record-damaged"), "{log}");
}

/// A session that the device has dropped is and the caller does not notice.
#[tokio::test(flavor = "multi_thread")]
async fn a_lost_session_is_replaced_unseen() {
    let (site, faulty) = site(Options::default());
    let broker = Broker::start_on(site);
    let enroller = Caller::of(&broker, "enroller");
    enroller.create("ada", MATERIAL).await.unwrap();
    let workers = broker.workers();
    for function in ["C_Verify", "C_Decrypt"] {
        faulty.set(function, &Fault::times(code::SESSION_HANDLE_INVALID, 1));
        let key = Caller::of(&broker, "releaser").unwrap("ada").await.unwrap();
        assert_eq!(key.key_material, MATERIAL);
    }
    assert_eq!(broker.workers(), workers);
}

/// Nothing in the database would be authentic.
#[test]
fn a_token_that_takes_any_mac_serves_nothing() {
    let (site, faulty) = site(Options::default());
    faulty.set("C_Verify", &Fault::always(code::NEVER_FAILS));
    let ended = site.serve_to_its_end();
    assert_eq!(ended.code, Some(6), "{ended:?}");
    assert!(ended.stderr.contains("accepts a wrong MAC"), "{ended:?}");
}

/// Its canary is its own: no other worker may answer it.
#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_stays_busy_is_replaced() {
    let (site, faulty) = site(Options {
        workers: 2,
        ..Options::default()
    });
    let broker = Broker::start_on(site);
    let sick = until("two workers", || {
        let workers = broker.workers();
        (workers.len() == 2).then(|| workers[0])
    });
    faulty.set(
        "C_DecryptInit",
        &Fault {
            pid: sick,
            ..Fault::always(code::DEVICE_MEMORY)
        },
    );
    until("the sick worker to be replaced", || {
        let workers = broker.workers();
        (workers.len() == 2 && !workers.contains(&sick)).then_some(())
    });
}

/// Log lines about a job carry the id of its call, so that they are found beside the audit entry of that call.
#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_changes_its_worker_is_logged_with_its_call() {
    let (site, faulty) = site(Options::default());
    let broker = Broker::start_as(site, |site| {
        let mut serve = site.serve();
        serve.env("KEYBROKER_LOG", "info,keybroker_hsm=debug");
        serve
    });
    let enroller = Caller::of(&broker, "enroller");
    enroller.create("ada", MATERIAL).await.unwrap();
    // Ids of the calls of which the log says this.
    let calls = |text: &str| -> Vec<String> {
        let log = broker.site.log();
        let lines = log.lines().filter(|line| line.contains(text));
        lines
            .filter_map(|line| {
                let line: serde_json::Value = serde_json::from_str(line).ok()?;
                Some(line["span"]["call_id"].as_str()?.to_owned())
            })
            .collect()
    };
    let before = calls("a token job was sent to a worker");
    assert!(!before.is_empty(), "{}", broker.site.log());
    let pid = until("the worker", || broker.workers().first().copied());
    let hang = Fault {
        milliseconds: 60_000,
        pid,
        ..Fault::always(code::LATE)
    };
    faulty.set("C_Verify", &hang);
    let releaser = Caller::of(&broker, "releaser");
    let call = tokio::spawn(async move { releaser.unwrap("ada").await });
    let id = until("the job at the worker", || {
        let sent = calls("a token job was sent to a worker");
        sent.get(before.len()).cloned()
    });
    send(pid, Signal::KILL);
    assert_eq!(call.await.unwrap().unwrap().key_material, MATERIAL);
    assert_eq!(
        calls("a job is repeated: its token worker was lost"),
        [id.as_str()]
    );
    let audited = broker.site.audit();
    let entry = audited.lines().find(|line| line.contains(&id));
    assert!(
        entry.is_some_and(|line| line.contains("unwrap")),
        "{id}: {audited}"
    );
}
