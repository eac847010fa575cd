//! Several tokens: each call goes to one that serves, and a token that fails costs no call.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use keybroker_proto::{GetTokenStateRequest, ListWrappingKeysRequest, TokenServing, TokenState};
use rustix::process::Signal;
use tokio::task::JoinSet;
use tonic::Request;

use crate::{
    client::{Caller, eventually, reason},
    faulty::{Faulty, VARIABLE},
    keys::{put_back, remove_objects},
    modules::{Maker, Stand},
    process::{Broker, send, until},
    site::{Options, Site},
    softhsm::{self, Token, write_private},
    wire::get,
};

mod destruction;
mod reload;
mod rotation;

const MATERIAL: &[u8] = b"material of this user";
const CALLERS: usize = 8;
/// The latency of one operation of a slow token, unless `KEYBROKER_TEST_LATENCY_MS` sets another one. The suite uses a long
/// latency, so that the tokens and not the processors are the limit on a machine that is busy.
const LATENCY_MS: u32 = 60;
/// How long a throughput is measured.
const MEASURED: Duration = Duration::from_secs(5);
/// Attempts to measure a throughput, because other load can slow down one of the two measurements.
const ATTEMPTS: usize = 3;

/// Two SoftHSM tokens in one configuration, each behind a separate scriptable module: `a`, and `b` with a copy of the directory of `a`.
struct Two {
    site: Arc<Site>,
    a: Faulty,
    b: Faulty,
    copy: PathBuf,
}

impl Two {
    /// The key is generated while there is one token, and then registered for the copy.
    fn fresh(options: Options) -> Self {
        let two = Self::unregistered(options);
        let id = two.key();
        two.site
            .expect_ok(&["--token", "b", "key", "register", &id]);
        two
    }

    fn unregistered(options: Options) -> Self {
        let site = Site::fresh(options);
        let copy = site.folder().join("copy");
        copy_token(&site.token, &copy);
        let [a, b] = ["a", "b"].map(|name| {
            Faulty::in_folder(
                site.folder().join(format!("module-{name}")),
                &softhsm::module(),
            )
        });
        let two = Self {
            site: Arc::new(site),
            a,
            b,
            copy,
        };
        two.configure("");
        two
    }

    /// Writes the configuration with both tokens. `of_b` are further lines for token `b`.
    fn configure(&self, of_b: &str) {
        self.site.write_configuration(|text| {
            let rest = text.find("[store]").unwrap();
            let settings = text[..rest].to_owned();
            let a = section(
                &settings,
                "name = \"a\"",
                &self.a,
                &self.site.token.configuration(),
            );
            let own = format!("name = \"b\"\ncopy_of = \"a\"\n{of_b}");
            let b = section(&settings, &own, &self.b, &self.copy.join("softhsm2.conf"));
            let pin = self.site.token.pin_file().display().to_string();
            let b = b.replace(&pin, &self.pin_file_of_b().display().to_string());
            *text = format!("{a}\n{b}\n{}", &text[rest..]);
        });
    }

    /// Writes the configuration with token `a` alone.
    fn configure_one(&self) {
        self.site.write_configuration(|text| {
            let rest = text.find("[store]").unwrap();
            let settings = text[..rest].to_owned();
            let a = section(
                &settings,
                "name = \"a\"",
                &self.a,
                &self.site.token.configuration(),
            );
            *text = format!("{a}\n{}", &text[rest..]);
        });
    }

    /// Puts another token with the same label and PIN in the place of the copy.
    fn replace_b(&self) {
        fs::remove_dir_all(self.copy.join("tokens")).unwrap();
        fs::create_dir(self.copy.join("tokens")).unwrap();
        let (pin, label) = (self.site.token.pin(), self.site.token.label());
        let initialised = Command::new("softhsm2-util")
            .env("SOFTHSM2_CONF", self.copy.join("softhsm2.conf"))
            .args(["--init-token", "--free", "--label", label])
            .args(["--pin", pin, "--so-pin", pin])
            .output()
            .unwrap();
        assert!(initialised.status.success(), "{initialised:?}");
    }

    fn pin_file_of_b(&self) -> PathBuf {
        self.copy.join("pin")
    }

    /// The id of the wrapping key.
    fn key(&self) -> String {
        let listed = self.site.expect_ok(&["-o", "json", "key", "list"]);
        let keys: serde_json::Value = serde_json::from_str(&listed).unwrap();
        keys[0]["id"].as_str().unwrap().to_owned()
    }
}

/// The section of one token, from the section of a site's only token.
fn section(settings: &str, own: &str, faulty: &Faulty, conf: &Path) -> String {
    let real = softhsm::module().display().to_string();
    let text = settings
        .replace("[token]", &format!("[[token]]\n{own}"))
        .replace(&real, &faulty.module().display().to_string());
    let (head, _) = text.split_once("[token.environment]").unwrap();
    format!(
        "{head}[token.environment]\n{VARIABLE} = \"{}\"\nSOFTHSM2_CONF = \"{}\"\n",
        faulty.folder().display(),
        conf.display()
    )
}

/// Copies a SoftHSM token with its PIN file, and gives the copy a separate configuration.
fn copy_token(token: &Token, to: &Path) {
    fs::create_dir(to).unwrap();
    let copied = Command::new("cp")
        .arg("-a")
        .arg(token.directory())
        .arg(to.join("tokens"))
        .status();
    assert!(copied.unwrap().success());
    let text = fs::read_to_string(token.configuration()).unwrap();
    let text = text.replace(
        &token.directory().display().to_string(),
        &to.join("tokens").display().to_string(),
    );
    fs::write(to.join("softhsm2.conf"), text).unwrap();
    write_private(&to.join("pin"), &format!("{}\n", token.pin()));
}

async fn states(broker: &Broker) -> Vec<TokenState> {
    let mut control = Caller::of(broker, "admin").control;
    let state = control
        .get_token_state(Request::new(GetTokenStateRequest {}))
        .await;
    state.unwrap().into_inner().tokens
}

async fn state_of(broker: &Broker, name: &str) -> TokenState {
    let states = states(broker).await;
    states.into_iter().find(|token| token.name == name).unwrap()
}

/// Waits until a token has all its workers.
async fn until_whole(broker: &Broker, name: &str, workers: usize) {
    let deadline = Instant::now() + Duration::from_mins(1);
    loop {
        let state = state_of(broker, name).await;
        if state.serving() == TokenServing::Up && state.workers.len() == workers {
            return;
        }
        assert!(
            Instant::now() < deadline,
            "token {name} did not return: {state:?}"
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Waits until both tokens have their worker. Returns a caller that enrols and one that releases.
async fn callers_when_ready(broker: &Broker) -> (Caller, Caller) {
    for name in ["a", "b"] {
        until_whole(broker, name, 1).await;
    }
    (
        Caller::of(broker, "enroller"),
        Caller::of(broker, "releaser"),
    )
}

/// Waits until a token does not serve.
async fn until_unusable(broker: &Broker, name: &str) {
    let deadline = Instant::now() + Duration::from_mins(1);
    while state_of(broker, name).await.serving() == TokenServing::Up {
        assert!(Instant::now() < deadline, "token {name} still serves");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn kill_workers(broker: &Broker, name: &str) {
    for worker in state_of(broker, name).await.workers {
        send(worker.pid, Signal::KILL);
    }
}

/// Callers that release one key after another, without a second try.
struct Load {
    stop: Arc<AtomicBool>,
    /// Number of calls that have ended.
    ended: Arc<AtomicUsize>,
    callers: JoinSet<(usize, usize, Duration)>,
}

impl Load {
    fn start(broker: &Broker, callers: usize) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let ended = Arc::new(AtomicUsize::new(0));
        let mut set = JoinSet::new();
        for _ in 0..callers {
            let (releaser, stop) = (Caller::of(broker, "releaser"), Arc::clone(&stop));
            let ended = Arc::clone(&ended);
            set.spawn(async move {
                let (mut calls, mut failed, mut slowest) = (0, 0, Duration::ZERO);
                while !stop.load(Ordering::Relaxed) {
                    let began = Instant::now();
                    match releaser.unwrap("ada").await {
                        Ok(key) => assert_eq!(key.key_material, MATERIAL),
                        Err(status) => {
                            eprintln!("{status:?}");
                            failed += 1;
                        }
                    }
                    calls += 1;
                    ended.fetch_add(1, Ordering::Relaxed);
                    slowest = slowest.max(began.elapsed());
                }
                (calls, failed, slowest)
            });
        }
        Self {
            stop,
            ended,
            callers: set,
        }
    }

    /// Returns how many calls were made, how many of them failed, and how long the slowest took.
    async fn end(mut self) -> (usize, usize, Duration) {
        self.stop.store(true, Ordering::Relaxed);
        let (mut calls, mut failed, mut slowest) = (0, 0, Duration::ZERO);
        while let Some(seen) = self.callers.join_next().await {
            let (some, failures, took) = seen.unwrap();
            calls += some;
            failed += failures;
            slowest = slowest.max(took);
        }
        (calls, failed, slowest)
    }
}

fn rounds(default: usize) -> usize {
    env::var("KEYBROKER_TEST_TOKEN_ROUNDS").map_or(default, |text| text.parse().unwrap())
}

/// A database of one token serves with a second token after one command. Without the command, the copy is not used.
#[tokio::test(flavor = "multi_thread")]
async fn a_second_token_is_used_after_it_is_registered() {
    let two = Two::unregistered(Options::default());
    let id = two.key();
    let unnamed = two.site.run(&["token", "check"]);
    assert_eq!(unnamed.code, Some(2), "{unnamed:#?}");
    assert!(unnamed.stderr.contains("a, b"), "{unnamed:#?}");
    let unknown = two.site.run(&["--token", "c", "token", "check"]);
    assert!(unknown.stderr.contains("\"c\""), "{unknown:#?}");

    let broker = Broker::start_on(Arc::clone(&two.site));
    Caller::of(&broker, "enroller")
        .create("ada", MATERIAL)
        .await
        .unwrap();
    assert_eq!(states(&broker).await.len(), 1);
    assert!(
        two.site
            .log()
            .contains("no wrapping key is registered for this token")
    );
    broker.stop();

    two.site
        .expect_ok(&["--token", "b", "key", "register", &id]);
    let again = two.site.run(&["--token", "b", "key", "register", &id]);
    assert_eq!(again.code, Some(6), "{again:#?}");
    assert!(
        again.stderr.contains("already registered for token b"),
        "{again:#?}"
    );
    let listed = two.site.expect_ok(&["-o", "json", "key", "list"]);
    let keys: serde_json::Value = serde_json::from_str(&listed).unwrap();
    assert!(
        keys[0]["tokens"].as_str().unwrap().ends_with(", b"),
        "{listed}"
    );
    for name in ["a", "b"] {
        two.site.expect_ok(&["--token", name, "token", "check"]);
    }
    // The backups of the tokens are confirmed one by one.
    two.site
        .expect_ok(&["--token", "b", "token", "backup-confirmed"]);
    let check = two.site.run(&["--token", "a", "token", "check"]);
    assert!(
        check.stderr.contains("no backup is confirmed"),
        "{check:#?}"
    );
    let check = two.site.run(&["--token", "b", "token", "check"]);
    assert!(
        !check.stderr.contains("no backup is confirmed"),
        "{check:#?}"
    );
    two.site.expect_ok(&["store", "check"]);

    let broker = Broker::start_on(Arc::clone(&two.site));
    let states = states(&broker).await;
    let names: Vec<&str> = states.iter().map(|token| token.name.as_str()).collect();
    assert_eq!(names, ["a", "b"]);
    let load = Load::start(&broker, CALLERS);
    tokio::time::sleep(Duration::from_secs(1)).await;
    let (calls, failed, _) = load.end().await;
    assert!(calls > 0 && failed == 0, "{failed} of {calls}");
    for faulty in [&two.a, &two.b] {
        assert!(
            faulty.count("C_Decrypt ends 0") > calls / 8,
            "a token does little of the work"
        );
    }
}

/// While there are calls, one of two tokens is killed, hangs, is locked or gets another PIN. No call fails, and the token is used
/// again without a restart.
///
/// `KEYBROKER_TEST_TOKEN_ROUNDS=100` makes 100 rounds; the suite makes four, one of each kind.
#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_fails_costs_no_call() {
    let two = Two::fresh(Options::default());
    let broker = Broker::start_on(Arc::clone(&two.site));
    Caller::of(&broker, "enroller")
        .create("ada", MATERIAL)
        .await
        .unwrap();
    for name in ["a", "b"] {
        until_whole(&broker, name, 1).await;
    }
    let mut all = 0;
    for round in 0..rounds(4) {
        let load = Load::start(&broker, CALLERS);
        tokio::time::sleep(Duration::from_millis(300)).await;
        match round % 4 {
            0 => kill_workers(&broker, "b").await,
            1 => {
                two.b.behave("[[rule]]\nname = \"hang\"\nfunction = [\"C_Decrypt\", \"C_Verify\"]\ndo = { hang = true }\n");
                tokio::time::sleep(Duration::from_secs(4)).await;
                two.b.behave("");
            }
            2 => {
                two.b
                    .behave("[token]\nset_flags = [\"CKF_USER_PIN_LOCKED\"]\n");
                kill_workers(&broker, "b").await;
                until_unusable(&broker, "b").await;
                two.b.behave("");
            }
            _ => {
                write_private(&two.pin_file_of_b(), "not-the-pin\n");
                kill_workers(&broker, "b").await;
                until_unusable(&broker, "b").await;
                write_private(&two.pin_file_of_b(), &format!("{}\n", two.site.token.pin()));
            }
        }
        until_whole(&broker, "b", 1).await;
        tokio::time::sleep(Duration::from_millis(300)).await;
        let before = two.b.count("C_Decrypt ends 0");
        let deadline = Instant::now() + Duration::from_secs(30);
        while two.b.count("C_Decrypt ends 0") < before + 10 {
            assert!(Instant::now() < deadline, "the token is not used again");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let (calls, failed, slowest) = load.end().await;
        println!("round {round}: {failed} of {calls} calls failed, the slowest took {slowest:?}");
        assert_eq!(failed, 0, "round {round}: {failed} of {calls} calls failed");
        all += calls;
    }
    assert!(all > 0);
    let (site, status) = broker.stop();
    assert!(status.success(), "{status}");
    assert_eq!(site.log().matches("\"alert\":\"bug\"").count(), 0);
}

/// A token of lower priority does nothing while the other one is fast enough, and everything while it is gone.
#[tokio::test(flavor = "multi_thread")]
async fn a_token_of_lower_priority_is_used_only_when_it_is_needed() {
    let two = Two::fresh(Options::default());
    two.configure("priority = 50");
    let broker = Broker::start_on(Arc::clone(&two.site));
    Caller::of(&broker, "enroller")
        .create("ada", MATERIAL)
        .await
        .unwrap();
    until_whole(&broker, "b", 1).await;
    let releaser = Caller::of(&broker, "releaser");
    let done = || two.b.count("C_DecryptInit ends 0");
    for _ in 0..20 {
        releaser.unwrap("ada").await.unwrap();
    }
    let workers = state_of(&broker, "a").await.workers;
    // The self-tests of both tokens decrypt about once a second.
    let before = done();
    two.a.behave("[[rule]]\nname = \"gone\"\nfunction = \"C_Login\"\ndo = { return = \"CKR_DEVICE_ERROR\" }\n");
    for worker in workers {
        send(worker.pid, Signal::KILL);
    }
    for _ in 0..50 {
        releaser.unwrap("ada").await.unwrap();
    }
    assert!(done() >= before + 50, "{} and {before}", done());
    let ready = ready(&broker);
    assert!(
        ready.contains("ready, but") && ready.contains("token a"),
        "{ready}"
    );
    two.a.behave("");
    until_whole(&broker, "a", 1).await;
    until("a health without a problem", || {
        ready_now(&broker).ends_with("ready\n").then_some(())
    });
}

fn ready(broker: &Broker) -> String {
    until("a health that names the token", || {
        let text = ready_now(broker);
        text.contains("token").then_some(text)
    })
}

fn ready_now(broker: &Broker) -> String {
    get(broker.status, "/readyz")
}

/// Where the tokens are the limit, two tokens do nearly twice the work of one. A measurement, so it is not part of the test suite:
/// on a busy machine, the processors are the limit.
///
/// `KEYBROKER_TEST_LATENCY_MS=20` measures tokens with a latency of 20 ms, on a machine that does nothing else.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "a measurement; docs/several-tokens.md has the command"]
async fn two_slow_tokens_do_the_work_of_two() {
    let latency_ms =
        env::var("KEYBROKER_TEST_LATENCY_MS").map_or(LATENCY_MS, |text| text.parse().unwrap());
    let two = Two::fresh(Options::default());
    let latency = format!("[limits]\nlatency_ms = {latency_ms}\n");
    for faulty in [&two.a, &two.b] {
        faulty.behave(&latency);
    }
    let mut seen = Vec::new();
    for attempt in 0..ATTEMPTS {
        two.configure_one();
        let one = throughput(&two, attempt == 0).await;
        two.configure("");
        let both = throughput(&two, false).await;
        println!("one token: {one} calls, two tokens: {both} calls within {MEASURED:?}");
        if both * 10 >= one * 18 {
            return;
        }
        seen.push((one, both));
    }
    panic!("two tokens never did 1.8 times the work of one: {seen:?}");
}

/// How many calls end within [`MEASURED`].
async fn throughput(two: &Two, is_first: bool) -> usize {
    let broker = Broker::start_on(Arc::clone(&two.site));
    if is_first {
        let enroller = Caller::of(&broker, "enroller");
        enroller.create("ada", MATERIAL).await.unwrap();
    }
    let load = Load::start(&broker, 2 * CALLERS);
    // The estimates are made meanwhile.
    tokio::time::sleep(Duration::from_secs(1)).await;
    let before = load.ended.load(Ordering::Relaxed);
    tokio::time::sleep(MEASURED).await;
    let calls = load.ended.load(Ordering::Relaxed) - before;
    let (_, failed, _) = load.end().await;
    assert_eq!(failed, 0);
    broker.stop();
    calls
}

/// A broker starts although one of its tokens is absent, says so, and uses the token when it is there.
#[tokio::test(flavor = "multi_thread")]
async fn a_broker_starts_with_one_of_two_tokens() {
    let two = Two::fresh(Options::default());
    two.b.behave("[token]\nabsent = true\n");
    let broker = Broker::start_on(Arc::clone(&two.site));
    Caller::of(&broker, "enroller")
        .create("ada", MATERIAL)
        .await
        .unwrap();
    let releaser = Caller::of(&broker, "releaser");
    assert_eq!(releaser.unwrap("ada").await.unwrap().key_material, MATERIAL);
    let text = ready(&broker);
    assert!(text.contains("token b"), "{text}");
    let log = two.site.log();
    let alert = log
        .lines()
        .find(|line| line.contains("\"alert\":\"token-down\""))
        .unwrap();
    assert!(alert.contains("\"token\":\"b\""), "{alert}");
    two.b.behave("");
    until_whole(&broker, "b", 1).await;
}

/// A token whose objects are not those of the registered key is refused by name, and the other token serves.
#[tokio::test(flavor = "multi_thread")]
async fn a_token_with_another_key_under_the_same_id_is_refused() {
    let two = Two::fresh(Options::default());
    let id = two.key();
    let made = two.site.expect_ok(&[
        "-o", "json", "--token", "b", "key", "generate", "--bits", "2048",
    ]);
    let made: serde_json::Value = serde_json::from_str(&made).unwrap();
    let other = made["id"].as_str().unwrap().to_owned();
    // The second key leaves the registry, so that only token `b` has to do with it.
    two.site.sql(&format!(
        "DELETE FROM wrapping_keys WHERE key_id = x'{other}'; DELETE FROM wrapping_key_places WHERE key_id = x'{other}'"
    ));
    for (column, cause) in [
        ("private_cka_id", "another key under the same CKA_ID"),
        (
            "integrity_cka_id",
            "another integrity key under the same CKA_ID",
        ),
    ] {
        let set = |value: &str| {
            two.site.sql(&format!(
                "UPDATE wrapping_key_places SET {column} = {value} WHERE key_id = x'{id}' AND token = 'b'"
            ));
        };
        set(&format!("x'{other}'"));
        let broker = Broker::start_on(Arc::clone(&two.site));
        let enroller = Caller::of(&broker, "enroller");
        enroller.create(column, MATERIAL).await.unwrap();
        let releaser = Caller::of(&broker, "releaser");
        assert_eq!(
            releaser.unwrap(column).await.unwrap().key_material,
            MATERIAL
        );
        let state = state_of(&broker, "b").await;
        assert_eq!(state.serving(), TokenServing::Untrusted, "{state:?}");
        assert!(state.detail.contains(cause), "{state:?}");
        let check = two.site.run(&["--token", "b", "token", "check"]);
        assert_eq!(check.code, Some(6), "{check:#?}");
        broker.stop();
        set("x''");
    }
}

/// A token that was swapped for another one with the same label and PIN is refused, and the other token serves.
#[tokio::test(flavor = "multi_thread")]
async fn a_swapped_token_is_refused_while_the_other_serves() {
    let two = Two::fresh(Options::default());
    two.replace_b();
    let logins = || two.b.count("C_Login begins");
    let before = logins();
    let broker = Broker::start_on(Arc::clone(&two.site));
    Caller::of(&broker, "enroller")
        .create("ada", MATERIAL)
        .await
        .unwrap();
    let state = state_of(&broker, "b").await;
    assert_ne!(state.serving(), TokenServing::Up);
    assert!(state.detail.contains("serial number"), "{state:?}");
    assert_eq!(logins(), before, "the other token was given the PIN");
    broker.stop();
    // Also if it is the only one that is left.
    two.a.behave("[token]\nabsent = true\n");
    let refused = two.site.serve_to_its_end();
    assert_eq!(refused.code, Some(4), "{refused:#?}");
    assert!(refused.stderr.contains("token b"), "{refused:#?}");
}

/// Each token has a key that the other one has not. A key whose token is absent is unavailable, and the other key serves.
#[tokio::test(flavor = "multi_thread")]
async fn each_key_is_used_on_its_own_token() {
    let two = Two::unregistered(Options::default());
    two.replace_b();
    let broker = Broker::start_on(Arc::clone(&two.site));
    let enroller = Caller::of(&broker, "enroller");
    enroller.create("first", MATERIAL).await.unwrap();
    broker.stop();
    two.site
        .expect_ok(&["--token", "b", "key", "generate", "--bits", "2048"]);
    let broker = Broker::start_on(Arc::clone(&two.site));
    let (enroller, releaser) = callers_when_ready(&broker).await;
    enroller.create("second", MATERIAL).await.unwrap();
    for user in ["first", "second"] {
        assert_eq!(releaser.unwrap(user).await.unwrap().key_material, MATERIAL);
    }
    two.site.expect_ok(&["store", "check"]);
    // The token of the first key is lost.
    two.a.behave("[token]\nabsent = true\n");
    kill_workers(&broker, "a").await;
    until_unusable(&broker, "a").await;
    let status = releaser.unwrap("first").await.unwrap_err();
    assert_eq!(reason(&status), "TOKEN_DOWN", "{status:?}");
    assert_eq!(
        releaser.unwrap("second").await.unwrap().key_material,
        MATERIAL
    );
    let text = ready(&broker);
    assert!(
        text.contains("not ready") && text.contains("no available token has wrapping key"),
        "{text}"
    );
    // A start without this token serves the other key, too.
    broker.stop();
    let broker = Broker::start_on(Arc::clone(&two.site));
    let releaser = Caller::of(&broker, "releaser");
    assert_eq!(
        releaser.unwrap("second").await.unwrap().key_material,
        MATERIAL
    );
    let status = releaser.unwrap("first").await.unwrap_err();
    assert_eq!(reason(&status), "TOKEN_DOWN", "{status:?}");
    two.a.behave("");
    let key = eventually(|| releaser.unwrap("first")).await;
    assert_eq!(key.key_material, MATERIAL);
}

/// A key disappears from the token on which it was registered, and returns. The other token serves meanwhile, and the first
/// token gets calls again without a restart.
#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_returns_to_its_token_is_used_again() {
    let two = Two::fresh(Options::default());
    let id = two.key();
    let broker = Broker::start_on(Arc::clone(&two.site));
    let (enroller, releaser) = callers_when_ready(&broker).await;
    enroller.create("ada", MATERIAL).await.unwrap();
    let objects = remove_objects(&two.site, &id);
    kill_workers(&broker, "a").await;
    until_keys(&broker, "a", 0).await;
    assert_eq!(releaser.unwrap("ada").await.unwrap().key_material, MATERIAL);
    put_back(&objects);
    until_keys(&broker, "a", 1).await;
    assert_eq!(releaser.unwrap("ada").await.unwrap().key_material, MATERIAL);
}

/// Waits until the workers of a token show this number of keys.
async fn until_keys(broker: &Broker, name: &str, count: usize) {
    let deadline = Instant::now() + Duration::from_mins(1);
    loop {
        let state = state_of(broker, name).await;
        if state.serving() == TokenServing::Up && state.wrapping_key_ids.len() == count {
            return;
        }
        assert!(Instant::now() < deadline, "token {name}: {state:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// The permission to log in again is given to one token, so the command asks for its name.
#[test]
fn a_login_is_permitted_again_for_one_token() {
    let two = Two::fresh(Options::default());
    let refused = two.site.run(&["token", "retry-pin"]);
    assert_eq!(refused.code, Some(2), "{refused:#?}");
    assert!(refused.stderr.contains("pass `--token`"), "{refused:#?}");
    two.site
        .expect_ok(&["--token", "b", "token", "retry-pin", "--force"]);
    let record = two.site.audit_directory().join("state/pins.json");
    let record = fs::read_to_string(&record).unwrap_or_else(|error| panic!("{record:?}: {error}"));
    assert!(
        record.contains("\"final_try_allowed_for\":[\"b\"]"),
        "{record}"
    );
}

/// Tokens of different vendors beside each other: SoftHSM decrypts with SHA-1 only, Kryoptic with SHA-256.
#[tokio::test(flavor = "multi_thread")]
async fn tokens_of_two_vendors_serve_beside_each_other() {
    let stand = Stand::new(Maker::Kryoptic);
    let site = Arc::clone(&stand.site);
    stand.configure_beside_softhsm();
    site.expect_ok(&["--token", "soft", "key", "generate", "--bits", "2048"]);
    let broker = Broker::start_on(Arc::clone(&site));
    Caller::of(&broker, "enroller")
        .create("first", MATERIAL)
        .await
        .unwrap();
    let (site, _) = broker.stop();
    site.expect_ok(&["--token", "kryoptic", "key", "generate", "--bits", "2048"]);
    let broker = Broker::start_on(Arc::clone(&site));
    Caller::of(&broker, "enroller")
        .create("second", MATERIAL)
        .await
        .unwrap();
    let mut control = Caller::of(&broker, "admin").control;
    let keys = control
        .list_wrapping_keys(ListWrappingKeysRequest {})
        .await
        .unwrap();
    let algorithms: Vec<String> = keys
        .into_inner()
        .wrapping_keys
        .into_iter()
        .map(|key| key.algorithm)
        .collect();
    assert_eq!(algorithms, ["RSA-OAEP-SHA-1", "RSA-OAEP-SHA-256"]);
    let releaser = Caller::of(&broker, "releaser");
    for user in ["first", "second"] {
        assert_eq!(releaser.unwrap(user).await.unwrap().key_material, MATERIAL);
    }
    let listed = site.expect_ok(&["-o", "json", "key", "list"]);
    assert!(
        listed.contains("\"soft\"") && listed.contains("\"kryoptic\""),
        "{listed}"
    );
    broker.stop();
    site.expect_ok(&["store", "check"]);
    site.expect_ok(&["config", "check"]);
}
