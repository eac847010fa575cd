//! Brokers on database servers: one whose database goes away and comes back, and two that share one.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use keybroker_audit::{AuditLog, Entry, EntryKind, Outcome};
use keybroker_core::call::CallId;
use keybroker_proto::{UnwrapUserKeyResponse, UserKey};
use keybroker_test_support::pooler::Pooler;
use rustix::process::Signal;
use sqlx::{AssertSqlSafe, Connection as _, PgConnection, postgres::PgConnectOptions};
use tonic::{Code, Status};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};
use tonic_types::StatusExt as _;

use crate::{
    client::{Caller, channel, reason},
    process::{Broker, until},
    servers::{Kind, Server, section},
    site::{Options, Site},
    wire::get,
};

const MATERIAL: &[u8] = b"material of this user";
/// A second, and what a busy machine adds.
const KNOWN_WITHIN: Duration = Duration::from_millis(1_300);
/// What calls wait for a database that has just become unavailable: it may be restarted.
const WAITED_OUT: Duration = Duration::from_millis(2_500);
const BACK_WITHIN: Duration = Duration::from_secs(2);

/// How long the database is away. `KEYBROKER_TEST_OUTAGE_SECONDS=30` is what is promised to be survived.
fn outage() -> Duration {
    let seconds = std::env::var("KEYBROKER_TEST_OUTAGE_SECONDS").ok();
    Duration::from_secs(seconds.map_or(6, |text| text.parse().unwrap()))
}

fn options_on(server: &Server) -> Options {
    let settings = server.settings(&server.database());
    Options {
        store: Some(section(&settings)),
        ..Options::default()
    }
}

async fn serving(broker: &Broker, service: &str) -> ServingStatus {
    let mut health = HealthClient::new(channel(&broker.site.pki, Some("unknown"), broker.grpc));
    let request = HealthCheckRequest {
        service: service.to_owned(),
    };
    health.check(request).await.unwrap().into_inner().status()
}

const USER_KEYS: &str = "keybroker.v1.UserKeyService";
const CONTROL: &str = "keybroker.v1.ControlService";

fn assert_store_down<T: std::fmt::Debug>(result: Result<T, Status>) {
    let status = result.unwrap_err();
    assert_eq!(
        (status.code(), reason(&status).as_str()),
        (Code::Unavailable, "STORE_DOWN")
    );
    let retry = status
        .get_details_retry_info()
        .and_then(|info| info.retry_delay);
    assert!(
        retry.is_some_and(|delay| delay > Duration::ZERO),
        "{status:?}"
    );
}

async fn an_outage_is_survived(kind: Kind) {
    let mut server = Server::start(kind);
    let broker = Broker::start(options_on(&server));
    let (enroller, releaser) = (
        Caller::of(&broker, "enroller"),
        Caller::of(&broker, "releaser"),
    );
    enroller.create("ada", MATERIAL).await.unwrap();
    assert_eq!(releaser.unwrap("ada").await.unwrap().key_material, MATERIAL);
    assert_eq!(serving(&broker, USER_KEYS).await, ServingStatus::Serving);

    server.stop();
    let stopped = Instant::now();
    let mut said_so = None;
    while stopped.elapsed() < outage() {
        let asked = Instant::now();
        let (one, other) = tokio::join!(releaser.unwrap("ada"), enroller.create("bob", MATERIAL));
        assert_store_down(one);
        assert_store_down(other);
        let is_new = asked - stopped < WAITED_OUT;
        let limit = if is_new {
            WAITED_OUT + KNOWN_WITHIN
        } else {
            KNOWN_WITHIN
        };
        assert!(asked.elapsed() < limit, "{:?}", asked.elapsed());
        if serving(&broker, USER_KEYS).await == ServingStatus::NotServing {
            said_so.get_or_insert(stopped.elapsed());
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(said_so.is_some(), "health did not say so");
    // What needs no database is served.
    assert_eq!(serving(&broker, CONTROL).await, ServingStatus::Serving);

    server.run();
    let back = Instant::now();
    while serving(&broker, USER_KEYS).await != ServingStatus::Serving
        || releaser.unwrap("ada").await.is_err()
    {
        assert!(back.elapsed() < BACK_WITHIN, "{:?}", back.elapsed());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(releaser.unwrap("ada").await.unwrap().key_material, MATERIAL);
    enroller.create("carl", MATERIAL).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_outage_of_postgresql_is_answered_and_survived() {
    an_outage_is_survived(Kind::PostgreSql).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_outage_of_mariadb_is_answered_and_survived() {
    an_outage_is_survived(Kind::MariaDb).await;
}

/// A database that takes connections and answers nothing keeps no broker from ending.
#[tokio::test(flavor = "multi_thread")]
async fn a_stop_waits_for_no_database_that_hangs() {
    let server = Server::start(Kind::PostgreSql);
    let mut options = options_on(&server);
    options.limits = "drain_timeout_ms = 2000".to_owned();
    let broker = Broker::start(options);
    let enroller = Caller::of(&broker, "enroller");
    enroller.create("ada", MATERIAL).await.unwrap();
    server.signal_all(Signal::STOP);
    let under_way = tokio::spawn(async move { enroller.create("bob", MATERIAL).await });
    let started = Instant::now();
    let stopped = tokio::task::spawn_blocking(move || broker.stop()).await;
    let (site, status) = stopped.unwrap();
    // What the drain, the mutations, the workers and the connections to the database may take, one after the other.
    assert!(
        started.elapsed() < Duration::from_secs(18),
        "{:?}",
        started.elapsed()
    );
    assert!(status.success(), "{status}");
    assert!(under_way.await.unwrap().is_err());
    server.signal_all(Signal::CONT);
    // Whether the change was made is found out by the next start.
    let again = Broker::start_on(site);
    Caller::of(&again, "releaser").unwrap("ada").await.unwrap();
    until("the open intents to be closed", || {
        let audit = again.site.audit();
        let count = |kind: &str| audit.lines().filter(|line| line.contains(kind)).count();
        (count("\"kind\":\"intent\"")
            == count("\"kind\":\"outcome\"") + count("\"kind\":\"recovered\""))
        .then_some(())
    });
}

#[test]
fn a_database_that_may_lose_writes_is_not_served_from() {
    let server = Server::start(Kind::PostgreSql);
    let site = Site::fresh(options_on(&server));
    server.sql("", "ALTER SYSTEM SET fsync = off;");
    server.sql("", "SELECT pg_reload_conf();");
    until("the setting", || {
        server
            .sql("", "SHOW fsync;")
            .starts_with("off")
            .then_some(())
    });
    let refused = site.serve_to_its_end();
    assert_eq!(refused.code, Some(7), "{refused:#?}");
    assert!(
        refused
            .stderr
            .contains("accept_weaker_durability = [\"fsync\"]"),
        "{refused:#?}"
    );
    site.write_configuration(|text| {
        *text = text.replacen(
            "[store]\n",
            "[store]\naccept_weaker_durability = [\"fsync\"]\n",
            1,
        );
    });
    drop(Broker::start_on(Arc::new(site)));
}

#[test]
fn commands_work_on_a_database_server_beside_a_running_broker() {
    let server = Server::start(Kind::MariaDb);
    let site = Arc::new(Site::without_keys(options_on(&server)));
    let before = site.expect_ok(&["-o", "json", "store", "status"]);
    assert!(before.contains("\"ready\": false"), "{before}");
    let dry = site.expect_ok(&["store", "migrate", "--dry-run"]);
    assert!(dry.contains("0001 initial"), "{dry}");
    site.expect_ok(&["store", "migrate"]);
    site.expect_ok(&["key", "generate", "--bits", "2048"]);
    let broker = Broker::start_on(Arc::clone(&site));
    site.expect_ok(&["store", "migrate"]);
    let after = site.expect_ok(&["-o", "json", "store", "status"]);
    assert!(after.contains("\"ready\": true"), "{after}");
    assert!(site.expect_ok(&["key", "list"]).contains("active"));
    drop(broker);
}

/// One site, two brokers: they share token, database and certificates, and have an audit log each.
pub(crate) fn start_instance(site: &Arc<Site>, name: &str) -> Broker {
    site.write_configuration(|text| {
        *text = text.replacen("[audit]\n", &format!("[audit]\ninstance = \"{name}\"\n"), 1);
    });
    Broker::start_on(Arc::clone(site))
}

pub(crate) fn unique() -> String {
    uuid::Uuid::new_v4().to_string()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_is_tried_again_at_another_broker_gets_the_first_answer() {
    let server = Server::start(Kind::PostgreSql);
    let site = Arc::new(Site::fresh(options_on(&server)));
    let (one, two) = (start_instance(&site, "one"), start_instance(&site, "two"));
    let (at_one, at_two) = (Caller::of(&one, "enroller"), Caller::of(&two, "enroller"));
    // Both at once, as when a client gave up waiting for the first: the answers are the same, whichever was quicker.
    for number in 0..25 {
        let (user, id) = (format!("user-{number}"), unique());
        let (left, right) = tokio::join!(
            at_one.create_with_id(&user, MATERIAL, &id),
            at_two.create_with_id(&user, MATERIAL, &id)
        );
        assert_eq!(left.unwrap(), right.unwrap());
        let id = unique();
        let (left, right) = tokio::join!(
            at_one.replace(&user, MATERIAL, 1, &id),
            at_two.replace(&user, MATERIAL, 1, &id)
        );
        let (left, right): (UserKey, UserKey) = (left.unwrap(), right.unwrap());
        assert_eq!(left, right);
        assert_eq!(left.revision, 2);
    }
    // The same id with other content is still refused.
    let id = unique();
    at_one.create_with_id("ada", MATERIAL, &id).await.unwrap();
    let other = at_two
        .create_with_id("ada", b"something else", &id)
        .await
        .unwrap_err();
    assert_eq!(reason(&other), "REQUEST_ID_REUSED");
    let released: UnwrapUserKeyResponse = Caller::of(&two, "releaser").unwrap("ada").await.unwrap();
    assert_eq!(released.key_material, MATERIAL);
}

/// A command beside a running broker changes the registry; the broker follows it, but not to what does not verify.
#[tokio::test(flavor = "multi_thread")]
async fn a_broker_follows_the_registry_and_no_forgery() {
    let server = Server::start(Kind::PostgreSql);
    let database = server.database();
    let settings = server.settings(&database);
    let site = Arc::new(Site::fresh(Options {
        store: Some(section(&settings)),
        ..Options::default()
    }));
    let (one, two) = (start_instance(&site, "one"), start_instance(&site, "two"));
    let releaser = Caller::of(&one, "releaser");
    Caller::of(&one, "enroller")
        .create("ada", MATERIAL)
        .await
        .unwrap();
    site.expect_ok(&["token", "backup-confirmed"]);
    until("the brokers to follow", || {
        (site
            .log()
            .matches("the registry of wrapping keys changed")
            .count()
            == 2)
            .then_some(())
    });
    // A key that a command registers while they run is used without a restart, and its records are released meanwhile.
    let generated = site.expect_ok(&["-o", "json", "key", "generate", "--bits", "2048"]);
    let generated: serde_json::Value = serde_json::from_str(&generated).unwrap();
    let is_new = |key: &UserKey| hex::encode(&key.wrapping_key_id) == generated["id"];
    let enroller = Caller::of(&two, "enroller");
    let began = Instant::now();
    while !is_new(&enroller.create(&unique(), MATERIAL).await.unwrap()) {
        assert!(
            began.elapsed() < Duration::from_secs(10),
            "the key is not used"
        );
    }
    println!("a registered key is used after {:?}", began.elapsed());
    enroller.create("bob", MATERIAL).await.unwrap();
    assert_eq!(releaser.unwrap("bob").await.unwrap().key_material, MATERIAL);
    assert_eq!(
        Caller::of(&two, "releaser")
            .unwrap("bob")
            .await
            .unwrap()
            .key_material,
        MATERIAL
    );

    for (forgeries, state) in (1..).zip(["compromised", "destroyed"]) {
        server.sql(
            &database,
            &format!("UPDATE wrapping_keys SET state = '{state}', sequence = sequence + 10;"),
        );
        until("the alert of both brokers", || {
            (site
                .log()
                .matches("rows of the wrapping-key registry failed verification")
                .count()
                == 2 * forgeries)
                .then_some(())
        });
        assert_eq!(releaser.unwrap("ada").await.unwrap().key_material, MATERIAL);
        // Put back as it was, everything is well again.
        server.sql(
            &database,
            "UPDATE wrapping_keys SET state = 'active', sequence = sequence - 10;",
        );
        for broker in [&one, &two] {
            until("the end of the alert", || {
                get(broker.status, "/metrics")
                    .contains("keybroker_registry_altered 0")
                    .then_some(())
            });
        }
    }
}

/// The machine of another broker is gone, its transaction is not: of the intents of this one the rest is known.
#[tokio::test(flavor = "multi_thread")]
async fn an_intent_that_is_still_held_keeps_no_other_open() {
    let server = Server::start(Kind::PostgreSql);
    let database = server.database();
    let site = Arc::new(Site::fresh(Options {
        store: Some(section(&server.settings(&database))),
        ..Options::default()
    }));
    // What a crash leaves, to be looked at in any order.
    let held = CallId::fresh();
    let others = [(); 9].map(|()| CallId::fresh());
    let (log, _) = AuditLog::open(&site.audit_directory().join("serve"), 1 << 20).unwrap();
    for call in [&[held], &others[..]].concat() {
        let mut intent = Entry::new(EntryKind::Intent, "user_key.create", Outcome::Ok);
        intent.call_id = Some(call);
        log.append(intent).await.unwrap();
    }
    log.close();
    let socket = server.socket();
    let port = socket.extension().unwrap().to_str().unwrap();
    let options = PgConnectOptions::new_without_pgpass()
        .username("admin")
        .database(&database)
        .port(port.parse().unwrap())
        .socket(server.folder());
    let mut holder = PgConnection::connect_with(&options).await.unwrap();
    let mark = hex::encode(held.as_bytes());
    let hold = format!(
        "BEGIN; INSERT INTO changes (call_id, record_id, changed_us) VALUES ('\\x{mark}', '\\x{mark}', 1)"
    );
    sqlx::raw_sql(AssertSqlSafe(hold))
        .execute(&mut holder)
        .await
        .unwrap();

    let broker = Broker::start_on(site);
    let recovered = |call: CallId| {
        let audit = broker.site.audit();
        let mut lines = audit.lines();
        lines
            .any(|line| line.contains("\"kind\":\"recovered\"") && line.contains(&call.to_string()))
    };
    until("the others", || {
        others.iter().all(|call| recovered(*call)).then_some(())
    });
    assert!(!recovered(held));
    sqlx::raw_sql("ROLLBACK")
        .execute(&mut holder)
        .await
        .unwrap();
    until("the one that was held", || recovered(held).then_some(()));
}

/// A pooler that gives one session to several clients is found before `serve` meets it; a database that is not there yet is no
/// mistake of the configuration.
#[test]
fn config_check_examines_the_database_server() {
    let server = Server::start(Kind::PostgreSql);
    let database = server.database();
    let site = Site::without_keys(Options {
        store: Some(section(&server.settings(&database))),
        ..Options::default()
    });
    let check = || site.run(&["config", "check"]);
    let use_database = |settings: &keybroker_store::Settings| {
        site.write_configuration(|text| {
            let mut lines: Vec<_> = text.lines().map(str::to_owned).collect();
            let url = lines
                .iter_mut()
                .find(|line| line.starts_with("url = \"postgres"));
            *url.expect("a database") = format!("url = \"{}\"", settings.url.as_str());
            *text = lines.join("\n");
        });
    };
    for mode in ["transaction", "statement"] {
        let pooler = Pooler::start(&server, &database, mode);
        use_database(pooler.settings());
        let finished = check();
        assert_eq!(finished.code, Some(3), "{finished:#?}");
        assert!(
            finished.stderr.contains("pool_mode = session"),
            "{finished:#?}"
        );
    }
    let pooler = Pooler::start(&server, &database, "session");
    use_database(pooler.settings());
    let finished = check();
    assert_eq!(finished.code, Some(0), "{finished:#?}");
    assert!(
        finished.stderr.contains("the database is reachable"),
        "{finished:#?}"
    );
    drop(pooler);
    let finished = check();
    assert_eq!(finished.code, Some(0), "{finished:#?}");
    assert!(
        finished.stderr.contains("the database was not examined"),
        "{finished:#?}"
    );
}
