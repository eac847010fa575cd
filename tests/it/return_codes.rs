//! Every kind of return code from every function that a job calls: what the caller reads, and what becomes of the session and of
//! the worker. The code comes once, from the scriptable module in front of the real token.
//!
//! `KEYBROKER_TEST_RETURN_CODES=all` runs every code with every function; the suite makes do with a few of each kind.

use std::env;

use crate::{
    client::{Caller, eventually},
    faulty::{Fault, Faulty, code},
    faulty_token::site,
    process::{Broker, until},
    site::Options,
    wire::get,
};

const MATERIAL: &[u8] = b"material of this user";

/// Functions of a release and of a change: each is called at least once by the call that follows.
const RELEASE: [&str; 4] = ["C_VerifyInit", "C_Verify", "C_DecryptInit", "C_Decrypt"];
const CHANGE: [&str; 2] = ["C_SignInit", "C_Sign"];
/// Functions that a new session calls before its first job.
const SESSION: [&str; 3] = ["C_OpenSession", "C_FindObjectsInit", "C_FindObjects"];

/// What a code does to the call and to the worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Effect {
    /// The caller sees nothing; the worker stays.
    Unseen,
    /// The caller sees nothing, since the next worker does the job; the worker is replaced.
    Replaced,
    /// The token states that a MAC is wrong: the caller reads `RECORD_DAMAGED`, and the worker stays.
    Damaged,
}

/// Codes of a token that has no room now.
const NO_ROOM: [&str; 3] = ["CKR_HOST_MEMORY", "CKR_DEVICE_MEMORY", "CKR_SESSION_COUNT"];

/// Codes with which a token may refuse a read-only session: a read-write one is tried.
const REFUSES_READ_ONLY: [&str; 2] = ["CKR_FUNCTION_FAILED", "CKR_ARGUMENTS_BAD"];

/// Names of the standard, values, and the effect of one occurrence.
const CODES: [(&str, i64, Effect); 27] = [
    ("CKR_HOST_MEMORY", 0x02, Effect::Unseen),
    ("CKR_GENERAL_ERROR", 0x05, Effect::Unseen),
    ("CKR_FUNCTION_FAILED", 0x06, Effect::Unseen),
    ("CKR_ARGUMENTS_BAD", 0x07, Effect::Unseen),
    ("CKR_DATA_LEN_RANGE", 0x21, Effect::Unseen),
    ("CKR_DEVICE_ERROR", 0x30, Effect::Unseen),
    ("CKR_DEVICE_MEMORY", 0x31, Effect::Unseen),
    ("CKR_DEVICE_REMOVED", 0x32, Effect::Replaced),
    ("CKR_ENCRYPTED_DATA_INVALID", 0x40, Effect::Unseen),
    ("CKR_ENCRYPTED_DATA_LEN_RANGE", 0x41, Effect::Unseen),
    ("CKR_FUNCTION_CANCELED", 0x50, Effect::Unseen),
    ("CKR_KEY_HANDLE_INVALID", 0x60, Effect::Unseen),
    ("CKR_OBJECT_HANDLE_INVALID", 0x82, Effect::Unseen),
    ("CKR_OPERATION_ACTIVE", 0x90, Effect::Unseen),
    ("CKR_OPERATION_NOT_INITIALIZED", 0x91, Effect::Unseen),
    ("CKR_SESSION_CLOSED", 0xb0, Effect::Unseen),
    ("CKR_SESSION_COUNT", 0xb1, Effect::Unseen),
    ("CKR_SESSION_HANDLE_INVALID", 0xb3, Effect::Unseen),
    ("CKR_SIGNATURE_INVALID", 0xc0, Effect::Unseen),
    ("CKR_SIGNATURE_LEN_RANGE", 0xc1, Effect::Unseen),
    ("CKR_TOKEN_NOT_PRESENT", 0xe0, Effect::Replaced),
    ("CKR_TOKEN_NOT_RECOGNIZED", 0xe1, Effect::Replaced),
    ("CKR_USER_NOT_LOGGED_IN", 0x101, Effect::Unseen),
    ("CKR_RANDOM_NO_RNG", 0x121, Effect::Unseen),
    ("CKR_BUFFER_TOO_SMALL", 0x150, Effect::Unseen),
    ("CKR_CRYPTOKI_NOT_INITIALIZED", 0x190, Effect::Replaced),
    ("CKR_VENDOR_DEFINED", 0x8000_0001, Effect::Unseen),
];

struct Bench {
    broker: Broker,
    faulty: Faulty,
    releaser: Caller,
    enroller: Caller,
    users: usize,
}

impl Bench {
    async fn start() -> Self {
        let (site, faulty) = site(Options {
            sessions_per_worker: 1,
            ..Options::default()
        });
        let broker = Broker::start_on(site);
        let enroller = Caller::of(&broker, "enroller");
        enroller.create("ada", MATERIAL).await.unwrap();
        Self {
            releaser: Caller::of(&broker, "releaser"),
            broker,
            faulty,
            enroller,
            users: 0,
        }
    }

    /// One call that uses the function. `None` when it succeeds, else its reason.
    async fn call(&mut self, is_change: bool) -> Option<String> {
        let result = if is_change {
            self.users += 1;
            let user = format!("user{}", self.users);
            self.enroller.create(&user, MATERIAL).await.map(drop)
        } else {
            let released = self.releaser.unwrap("ada").await;
            released.map(|key| assert_eq!(key.key_material, MATERIAL))
        };
        result.err().as_ref().map(crate::client::reason)
    }

    fn worker(&self) -> u32 {
        until("a worker", || self.broker.workers().first().copied())
    }

    fn restarts(&self) -> String {
        let metrics = get(self.broker.status, "/metrics");
        let line = metrics
            .lines()
            .find(|line| line.starts_with("keybroker_token_worker_restarts_total"));
        line.unwrap().to_owned()
    }

    /// Calls with the handle of an object that was no longer valid (`CKR_KEY_HANDLE_INVALID`).
    fn old_handles(&self) -> usize {
        ["C_VerifyInit", "C_DecryptInit", "C_SignInit"]
            .into_iter()
            .map(|function| self.faulty.count(&format!("{function} ends {}", 0x60)))
            .sum()
    }

    /// The code once from this function, and one call.
    async fn once(&mut self, function: &str, (name, code, effect): (&str, i64, Effect)) {
        let what = format!("{name} from {function}");
        let effect = match function {
            "C_Verify" if name.starts_with("CKR_SIGNATURE_") => Effect::Damaged,
            "C_OpenSession" if REFUSES_READ_ONLY.contains(&name) => Effect::Unseen,
            // A session that cannot be opened, or shows no keys, means that the token is gone, unless it only lacks room.
            _ if SESSION.contains(&function) && !NO_ROOM.contains(&name) => Effect::Replaced,
            _ => effect,
        };
        let (worker, restarts) = (self.worker(), self.restarts());
        if SESSION.contains(&function) {
            // The session is lost first, so that the next job opens another.
            self.faulty.set("C_VerifyInit", &Fault::times(0xb3, 1));
        }
        let returned = format!("{function} ends {code}");
        let before = self.faulty.count(&returned);
        self.faulty.set(function, &Fault::times(code, 1));
        // A self-test of the broker may meet the code instead of the call; it has the same effect on the worker.
        let seen = self.call(CHANGE.contains(&function)).await;
        until(&what, || {
            (self.faulty.count(&returned) > before).then_some(())
        });
        match effect {
            Effect::Unseen => {
                assert_eq!(seen, None, "{what}");
                assert_eq!(self.worker(), worker, "{what}: the worker was replaced");
                assert_eq!(self.restarts(), restarts, "{what}");
            }
            // Unless a self-test met it.
            Effect::Damaged => {
                let is_expected = seen.is_none() || seen.as_deref() == Some("RECORD_DAMAGED");
                assert!(is_expected, "{what}: {seen:?}");
                assert_eq!(self.restarts(), restarts, "{what}");
            }
            Effect::Replaced => {
                assert_eq!(seen, None, "{what}");
                until(&format!("{what}: another worker"), || {
                    let now = self.broker.workers();
                    (!now.contains(&worker) && !now.is_empty()).then_some(())
                });
                assert_ne!(self.restarts(), restarts, "{what}");
                let releaser = self.releaser.clone();
                eventually(|| releaser.unwrap("ada")).await;
            }
        }
        self.faulty.clear(function);
    }
}

fn chosen(function: &str) -> Vec<(&'static str, i64, Effect)> {
    let all = env::var("KEYBROKER_TEST_RETURN_CODES").is_ok_and(|codes| codes == "all");
    let codes = CODES.into_iter().enumerate();
    // Other codes for each function, so that the suite meets every code.
    let offset = function.len();
    codes
        .filter(|(at, _)| all || (at + offset).is_multiple_of(9))
        .map(|(_, code)| code)
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn each_return_code_of_a_job_has_its_effect() {
    let mut bench = Bench::start().await;
    let mut met = 0;
    for function in RELEASE.into_iter().chain(CHANGE).chain(SESSION) {
        for code in chosen(function) {
            bench.once(function, code).await;
            met += 1;
        }
    }
    println!("{met} return codes, each from one function");
    let log = bench.broker.site.log();
    assert!(!log.contains("pin-latched"), "{log}");
}

/// A token may call a wrong MAC by a code that says nothing. A row that was changed is answered as such all the same, and the token is
/// not blamed.
#[tokio::test(flavor = "multi_thread")]
async fn a_changed_row_is_named_whatever_the_token_calls_it() {
    let mut bench = Bench::start().await;
    bench.enroller.create("bob", MATERIAL).await.unwrap();
    let record =
        |user: &str| format!("record_id = (SELECT record_id FROM records WHERE user = '{user}')");
    let [ada, bob] = ["ada", "bob"].map(record);
    let changed = format!(
        "UPDATE revisions SET envelope = (SELECT envelope FROM revisions WHERE {bob}) WHERE {ada}"
    );
    bench.broker.site.sql(&changed);
    let (worker, restarts) = (bench.worker(), bench.restarts());
    for code in [
        code::FUNCTION_FAILED,
        code::GENERAL_ERROR,
        code::DEVICE_ERROR,
        code::VENDOR_DEFINED,
    ] {
        bench
            .faulty
            .set("C_Verify", &Fault::always(code::instead(code)));
        let seen = bench.call(false).await;
        assert_eq!(seen.as_deref(), Some("RECORD_DAMAGED"), "{code:#x}");
        bench.faulty.clear("C_Verify");
    }
    assert_eq!((bench.worker(), bench.restarts()), (worker, restarts));
    let key = bench.releaser.unwrap("bob").await.unwrap();
    assert_eq!(key.key_material, MATERIAL);
}

/// A module that gives every object another handle, again and again, as after a re-initialisation of the device: the broker
/// finds the keys again and serves the right ones.
///
/// `KEYBROKER_TEST_HANDLE_CALLS=1000` makes so many calls of each kind; the suite makes 30.
#[tokio::test(flavor = "multi_thread")]
async fn object_handles_that_change_cost_no_call() {
    let calls = env::var("KEYBROKER_TEST_HANDLE_CALLS").map_or(30, |text| text.parse().unwrap());
    let mut bench = Bench::start().await;
    bench.faulty.behave(
        "[[rule]]\nname = \"handles\"\nfunction = [\"C_VerifyInit\", \"C_DecryptInit\", \"C_SignInit\"]\n\
         on = { every = 5 }\ndo = { new_handles = true }\n",
    );
    for _ in 0..calls {
        assert_eq!(bench.call(false).await, None);
        assert_eq!(bench.call(true).await, None);
    }
    let refused = bench.old_handles();
    println!(
        "{} calls: {refused} old handles were used and refused, and none of them meant another object",
        2 * calls
    );
    assert!(
        refused > calls / 5,
        "{refused} calls with a handle that was no longer valid"
    );
}

/// A device that is reset in the middle of a call: sessions and login end, and every object has another handle afterwards. The job
/// goes on in the next worker, and no handle from before the reset is used again.
///
/// `KEYBROKER_TEST_RESETS=100` resets it so many times; the suite does so three times.
#[tokio::test(flavor = "multi_thread")]
async fn a_reset_device_is_asked_for_its_keys_again() {
    let resets = env::var("KEYBROKER_TEST_RESETS").map_or(3, |text| text.parse().unwrap());
    let mut bench = Bench::start().await;
    for reset in 0..resets {
        let worker = bench.worker();
        bench.faulty.behave(&format!(
            "[[rule]]\nname = \"reset {reset}\"\nfunction = [\"C_Verify\", \"C_Sign\"]\non = {{ call = 1 }}\n\
             do = {{ new_handles = true, close_sessions = true }}\n"
        ));
        assert_eq!(bench.call(reset % 2 == 1).await, None, "reset {reset}");
        until("another worker", || {
            let now = bench.broker.workers();
            (!now.contains(&worker) && !now.is_empty()).then_some(())
        });
        assert_eq!(bench.call(false).await, None, "after reset {reset}");
    }
    println!(
        "{resets} resets: no call failed, {} handles from before a reset were used",
        bench.old_handles()
    );
    assert_eq!(bench.old_handles(), 0);
    let log = bench.broker.site.log();
    for alert in ["record-damaged", "token-untrusted"] {
        assert!(!log.contains(alert), "{alert}: {log}");
    }
}
