use std::{
    collections::HashMap,
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Instant,
};

use super::*;
use keybroker_core::{client_credential::Document, key::Tenant};

/// A directory in memory that counts its look-ups.
#[derive(Debug, Default)]
struct Known {
    clients: Mutex<HashMap<ClientId, ClientCredential>>,
    generation: AtomicU64,
    asked: AtomicU64,
    /// The delay of an answer, and whether the look-up then fails.
    slow: Mutex<Duration>,
    is_away: AtomicBool,
    used: Mutex<Vec<u32>>,
}

#[async_trait]
impl Directory for Known {
    async fn client(&self, id: ClientId) -> Result<Option<ClientCredential>, Error> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        let slow = *self.slow.lock().unwrap();
        tokio::time::sleep(slow).await;
        if self.is_away.load(Ordering::Relaxed) {
            return Err(Error::new(Reason::StoreDown, "unavailable").retry_after(slow));
        }
        Ok(self.clients.lock().unwrap().get(&id).cloned())
    }

    fn generation(&self) -> u64 {
        self.generation.load(Ordering::Relaxed)
    }

    fn note_use(&self, _: ClientId, secret: u32) {
        self.used.lock().unwrap().push(secret);
    }

    fn improve(&self, mut credential: ClientCredential, secret: u32, phc: String) {
        let secrets = &mut credential.document.secrets;
        secrets
            .iter_mut()
            .find(|it| it.number == secret)
            .unwrap()
            .phc = phc;
        self.clients
            .lock()
            .unwrap()
            .insert(credential.id, credential);
    }
}

const ID: &str = "00112233445566778899aabbccddeeff";

struct Setup {
    known: Arc<Known>,
    secrets: Secrets,
}

/// Parameters with which Argon2id takes almost no time. A configuration cannot contain such
/// parameters.
fn quick() -> Settings {
    Settings {
        argon2_memory_kib: 64,
        argon2_iterations: 2,
        ..Settings::default()
    }
}

fn setup(secrets: &[&str], edit: impl FnOnce(&mut Document)) -> Setup {
    let mut document = Document {
        label: "test".to_owned(),
        tenant: Tenant::default(),
        roles: BTreeSet::from([Role::Enrol]),
        users: None,
        key_names: None,
        created: Timestamp::now(),
        revoked: None,
        secrets: Vec::new(),
    };
    for secret in secrets {
        let phc = quick().hash(secret.as_bytes()).unwrap();
        document.add_secret(phc, Timestamp::now(), None);
    }
    edit(&mut document);
    let known = Arc::new(Known::default());
    let credential = ClientCredential {
        id: ClientId::from_hex(ID).unwrap(),
        revision: 1,
        document,
    };
    known
        .clients
        .lock()
        .unwrap()
        .insert(credential.id, credential);
    let directory: Arc<dyn Directory> = Arc::<Known>::clone(&known);
    Setup {
        secrets: Secrets::new(quick(), directory).unwrap(),
        known,
    }
}

impl Setup {
    async fn show(&self, id: &str, secret: &str) -> Result<Arc<Principal>, Error> {
        let secret = Zeroizing::new(secret.as_bytes().to_vec());
        self.secrets.verify(id, secret, || Ok(())).await
    }

    fn asked(&self) -> u64 {
        self.known.asked.load(Ordering::Relaxed)
    }
}

#[tokio::test]
async fn each_live_secret_is_its_client_and_remembered() {
    let setup = setup(&["old", "new"], |_| {});
    for secret in ["old", "new", "old", "new"] {
        let principal = setup.show(ID, secret).await.unwrap();
        assert_eq!(principal.name(), format!("client:{ID}"));
        assert!(principal.has(Role::Enrol) && principal.kind() == Kind::Service);
    }
    assert_eq!(setup.asked(), 2);
    assert_eq!(*setup.known.used.lock().unwrap(), [1, 2, 1, 2]);
    // After a change of any client, the client is looked up again.
    setup.known.generation.store(1, Ordering::Relaxed);
    setup.show(ID, "old").await.unwrap();
    assert_eq!(setup.asked(), 3);
}

#[tokio::test]
async fn all_that_is_wrong_is_refused_alike() {
    let setup = setup(&["revoked", "expired", "good"], |document| {
        let past = Timestamp::from_micros(1);
        document.secrets[0].revoked = Some(past);
        document.secrets[1].expires = Some(past);
    });
    let unknown = ID.replace('0', "1");
    let mut seen = BTreeSet::new();
    let mut logged = BTreeSet::new();
    for (id, secret) in [
        (ID, "wrong"),
        (ID, ""),
        (ID, "revoked"),
        (ID, "expired"),
        (unknown.as_str(), "good"),
        ("no id at all", "good"),
        ("", ""),
    ] {
        let error = setup.show(id, secret).await.unwrap_err();
        assert_eq!(error.reason(), Reason::Credential, "{id} {secret}");
        // The parts of the error that the caller can see.
        seen.insert((
            error.reason(),
            error.violations().len(),
            error.retry_delay(),
            error.is_renewable(),
        ));
        logged.insert(error.detail().to_owned());
    }
    assert_eq!(seen.len(), 1, "{seen:?}");
    // The log distinguishes the causes.
    assert_eq!(logged.len(), 2, "{logged:?}");
    setup.show(ID, "good").await.unwrap();
}

#[tokio::test]
async fn a_revoked_client_has_no_secret() {
    let setup = setup(&["good"], |document| {
        document.revoked = Some(Timestamp::now());
    });
    setup.show(ID, "good").await.unwrap_err();
}

#[tokio::test]
async fn a_secret_that_expires_while_it_is_remembered_is_refused() {
    // This time is long enough for the first check on a busy machine.
    let soon = Timestamp::from_micros(Timestamp::now().micros() + 3_000_000);
    let setup = setup(&["good"], |document| {
        document.secrets[0].expires = Some(soon);
    });
    setup.show(ID, "good").await.unwrap();
    while Timestamp::now() <= soon {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    setup.show(ID, "good").await.unwrap_err();
}

#[tokio::test]
async fn without_a_budget_only_what_was_good_counts() {
    let setup = setup(&["good", "other"], |_| {});
    setup.show(ID, "good").await.unwrap();
    let spent = || Err::<(), _>(Error::new(Reason::FailureBudget, "spent"));
    let show = |secret: &str| Zeroizing::new(secret.as_bytes().to_vec());
    setup.secrets.verify(ID, show("good"), spent).await.unwrap();
    // A change of any client does not lock this client out, but causes another look-up.
    setup.known.generation.store(1, Ordering::Relaxed);
    setup.secrets.verify(ID, show("good"), spent).await.unwrap();
    assert_eq!(setup.asked(), 2);
    let asked = setup.asked();
    for secret in ["other", "wrong"] {
        let refused = setup.secrets.verify(ID, show(secret), spent).await;
        assert_eq!(refused.unwrap_err().reason(), Reason::FailureBudget);
    }
    assert_eq!(setup.asked(), asked);
}

/// Wrong secrets from many addresses take all turns. A client that was accepted before needs no
/// turn.
#[tokio::test]
async fn a_client_that_was_accepted_stays_accepted_while_wrong_secrets_take_every_turn() {
    let setup = setup(&["good"], |_| {});
    setup.show(ID, "good").await.unwrap();
    let turns = &setup.secrets.turns;
    let mut taken = Vec::new();
    while turns.free() > 0 {
        taken.push(turns.wait(Lane::Unknown, TURN_WAIT_MAX).await.unwrap());
    }
    let other = ClientId::from_hex(&"ab".repeat(16)).unwrap();
    let waiting = [Lane::Unknown, Lane::Known(other)].map(|lane| turns.wait(lane, TURN_WAIT_MAX));
    let waiting = futures_util::future::join_all(waiting);
    let places: Vec<_> =
        std::iter::from_fn(|| turns.place(ClientId::from_hex(ID).unwrap())).collect();
    let lookups: Vec<_> = std::iter::from_fn(|| turns.lookup()).collect();
    let accepted = async {
        for generation in 1..=100 {
            // The state after the minute in which the secret is accepted without a look-up.
            setup.known.generation.store(generation, Ordering::Relaxed);
            let spent = || Err::<(), _>(Error::new(Reason::FailureBudget, "spent"));
            let secret = Zeroizing::new(b"good".to_vec());
            setup.secrets.verify(ID, secret, spent).await.unwrap();
        }
        let refused = setup.show(ID, "wrong").await.unwrap_err();
        assert_eq!(refused.reason(), Reason::Rate);
        assert_eq!(refused.retry_delay(), Some(RETRY));
        drop((places, lookups));
    };
    let (ended, ()) = tokio::join!(waiting, accepted);
    assert!(ended.iter().all(Option::is_none), "a turn was free");
    assert_eq!(
        setup.asked(),
        1 + 100,
        "looked up each time, and not for the wrong one"
    );
}

/// A proof applies to only one stored hash. A different hash of the secret with the same number
/// needs an ordinary trial.
#[tokio::test]
async fn a_secret_that_was_accepted_is_refused_once_its_stored_hash_is_another() {
    let setup = setup(&["good"], |_| {});
    setup.show(ID, "good").await.unwrap();
    let other = quick().hash(b"other").unwrap();
    let replace = |credential: &mut ClientCredential| credential.document.secrets[0].phc = other;
    let id = ClientId::from_hex(ID).unwrap();
    setup
        .known
        .clients
        .lock()
        .unwrap()
        .get_mut(&id)
        .map(replace)
        .unwrap();
    setup.known.generation.store(1, Ordering::Relaxed);
    let refused = setup.show(ID, "good").await.unwrap_err();
    assert_eq!(refused.reason(), Reason::Credential);
    setup.show(ID, "other").await.unwrap();
}

/// A broker that has just started has accepted no secret yet. The first call of a client waits for
/// only one trial, and not for the trials of other clients.
#[tokio::test]
async fn after_a_start_a_client_is_accepted_before_secrets_of_unknown_ids() {
    let setup = setup(&["good"], |_| {});
    let turns = &setup.secrets.turns;
    let mut taken = Vec::new();
    while turns.free() > 0 {
        taken.push(turns.wait(Lane::Unknown, TURN_WAIT_MAX).await.unwrap());
    }
    let ids: Vec<String> = (1..=40).map(|number| format!("{number:032x}")).collect();
    let unknown = ids.iter().map(|id| setup.show(id, "wrong"));
    let unknown = futures_util::future::join_all(unknown);
    let contact = setup.show(ID, "good");
    // Another test covers the order of the lanes.
    let free = async {
        while turns.waiting_by_lane() != [0, 1, ids.len()] {
            tokio::task::yield_now().await;
        }
        drop(taken);
    };
    let (_, accepted, ()) = tokio::join!(unknown, contact, free);
    accepted.unwrap();
}

/// An expired or revoked secret is treated like any other wrong secret.
#[tokio::test]
async fn a_secret_that_was_good_is_tried_once_without_a_budget() {
    let setup = setup(&["good"], |_| {});
    setup.show(ID, "good").await.unwrap();
    let id = ClientId::from_hex(ID).unwrap();
    let revoke = |credential: &mut ClientCredential| {
        credential.document.revoked = Some(Timestamp::now());
    };
    setup
        .known
        .clients
        .lock()
        .unwrap()
        .get_mut(&id)
        .map(revoke)
        .unwrap();
    setup.known.generation.store(1, Ordering::Relaxed);
    for expected in [Reason::Credential, Reason::FailureBudget] {
        let spent: Result<(), _> = Err(Error::new(Reason::FailureBudget, "spent"));
        let secret = Zeroizing::new(b"good".to_vec());
        let refused = setup.secrets.verify(ID, secret, || spent).await;
        assert_eq!(refused.unwrap_err().reason(), expected);
    }
    assert_eq!(setup.asked(), 2);
}

#[tokio::test]
async fn a_directory_that_is_down_takes_no_turn_and_is_not_the_callers_fault() {
    let setup = setup(&["good"], |_| {});
    setup.show(ID, "good").await.unwrap();
    setup.known.generation.store(1, Ordering::Relaxed);
    let slow = Duration::from_millis(500);
    *setup.known.slow.lock().unwrap() = slow;
    setup.known.is_away.store(true, Ordering::Relaxed);
    // More trials than turns, each for a different client.
    let ids: Vec<String> = (0..64).map(|number| format!("{number:032x}")).collect();
    let asking = ids.iter().map(|id| setup.show(id, "good"));
    let looking = async {
        tokio::time::sleep(slow / 5).await;
        assert_eq!(setup.asked(), 1 + 64);
        setup.secrets.turns.free()
    };
    let (refused, free) = tokio::join!(futures_util::future::join_all(asking), looking);
    assert!(free > 0);
    for refused in refused {
        let error = refused.unwrap_err();
        assert_eq!(error.reason(), Reason::StoreDown);
        assert_eq!(error.retry_delay(), Some(slow));
    }
    // The broker still remembers which secrets were accepted.
    setup.known.is_away.store(false, Ordering::Relaxed);
    let spent: Result<(), _> = Err(Error::new(Reason::FailureBudget, "spent"));
    let secret = Zeroizing::new(b"good".to_vec());
    setup.secrets.verify(ID, secret, || spent).await.unwrap();
}

#[tokio::test]
async fn the_same_secret_is_asked_about_once_at_a_time() {
    let setup = setup(&["good"], |_| {});
    *setup.known.slow.lock().unwrap() = Duration::from_millis(50);
    let at_once = |secret| (0..20).map(move |_| secret);
    let good = at_once("good").map(|secret| setup.show(ID, secret));
    let good = futures_util::future::join_all(good).await;
    assert!(good.iter().all(Result::is_ok));
    assert_eq!(setup.asked(), 1);
    assert_eq!(setup.known.used.lock().unwrap().len(), 20);
    let wrong = at_once("wrong").map(|secret| setup.show(ID, secret));
    let wrong = futures_util::future::join_all(wrong).await;
    assert!(wrong.iter().all(Result::is_err));
    assert_eq!(setup.asked(), 2);
    // A refusal is not remembered.
    setup.show(ID, "wrong").await.unwrap_err();
    assert_eq!(setup.asked(), 3);
    // If a caller disconnects, the other waiting callers continue its trial.
    setup.known.generation.store(1, Ordering::Relaxed);
    let hasty = tokio::time::timeout(Duration::from_millis(10), setup.show(ID, "good"));
    let (hasty, patient) = tokio::join!(hasty, setup.show(ID, "good"));
    assert!(hasty.is_err() && patient.is_ok());
}

#[tokio::test]
async fn a_weak_hash_is_replaced_at_the_next_login() {
    let mut setup = setup(&["good"], |_| {});
    setup.secrets.settings.argon2_iterations = 3;
    setup.show(ID, "good").await.unwrap();
    let better = setup.known.clients.lock().unwrap()[&ClientId::from_hex(ID).unwrap()].clone();
    let phc = &better.document.secrets[0].phc;
    assert!(phc.starts_with("$argon2id$v=19$m=64,t=3,p=1$"), "{phc}");
    setup.known.generation.store(1, Ordering::Relaxed);
    setup.show(ID, "good").await.unwrap();
}

/// Every id costs two hashes. The times are compared with each other, with a wide margin.
#[tokio::test]
async fn an_unknown_id_costs_as_much_as_a_known_one() {
    let mut setup = setup(&["good"], |_| {});
    let costly = Settings::default();
    setup.secrets = Secrets::new(costly.clone(), Arc::<Known>::clone(&setup.known)).unwrap();
    let phc = costly.hash(b"good").unwrap();
    setup
        .known
        .clients
        .lock()
        .unwrap()
        .values_mut()
        .next()
        .unwrap()
        .document
        .secrets[0]
        .phc = phc;
    let mut spent = [Duration::ZERO; 2];
    for number in 0..5 {
        for (spent, id) in spent.iter_mut().zip([ID, "unknown"]) {
            let begun = Instant::now();
            setup
                .show(id, &format!("wrong {number}"))
                .await
                .unwrap_err();
            *spent += begun.elapsed();
        }
    }
    let ratio = spent[0].as_secs_f64() / spent[1].as_secs_f64();
    assert!((0.4..2.5).contains(&ratio), "{spent:?}");
}

#[test]
fn parameters_below_the_floor_are_refused() {
    let with = |memory, iterations, parallelism| Settings {
        argon2_memory_kib: memory,
        argon2_iterations: iterations,
        argon2_parallelism: parallelism,
        ..Settings::default()
    };
    for good in [
        (19_456, 2, 1),
        (47_104, 1, 1),
        (7_168, 5, 1),
        (65_536, 3, 4),
    ] {
        assert_eq!(with(good.0, good.1, good.2).problem(), None, "{good:?}");
    }
    for bad in [
        (19_455, 2, 1),
        (19_456, 1, 1),
        (7_167, 16, 1),
        (19_456, 2, 0),
        (2_000_000, 2, 1),
    ] {
        assert!(with(bad.0, bad.1, bad.2).problem().is_some(), "{bad:?}");
    }
}
