//! The way to a database over the network: verified, or by explicit word not at all.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use keybroker_core::{call::Timestamp, key::RecordId};
use keybroker_store as store;
use keybroker_store::{Error, Settings, Tls, tables::Table};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
};

use super::{
    revision,
    servers::{Kind, Server, give},
    stamp, user,
};

/// What a client waits for its answer.
const DEADLINE: Duration = Duration::from_secs(5);
const NO_TLS: [&str; 0] = [];
/// In the environment of a process that a test starts of itself: the database.
const CHILD: &str = "KEYBROKER_TEST_STORE_SETTINGS";

/// An authority and, signed by it, a certificate for `localhost` and for nothing else.
fn write_certificates(folder: &Path) {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    let key = KeyPair::generate().unwrap();
    let leaf = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
    let leaf = leaf.signed_by(&key, &authority).unwrap();
    fs::write(folder.join("ca.pem"), authority.pem()).unwrap();
    fs::write(folder.join("server.pem"), leaf.pem()).unwrap();
    fs::write(folder.join("server.key"), key.serialize_pem()).unwrap();
    for (file, mode) in [
        ("ca.pem", 0o644),
        ("server.pem", 0o644),
        ("server.key", 0o600),
    ] {
        give(&folder.join(file), mode);
    }
}

fn tls_arguments(kind: Kind, folder: &Path) -> Vec<String> {
    write_certificates(folder);
    let file = |name: &str| folder.join(name).display().to_string();
    match kind {
        Kind::PostgreSql => vec![
            "-c".to_owned(),
            "ssl=on".to_owned(),
            "-c".to_owned(),
            format!("ssl_cert_file={}", file("server.pem")),
            "-c".to_owned(),
            format!("ssl_key_file={}", file("server.key")),
        ],
        Kind::MariaDb => vec![
            format!("--ssl-ca={}", file("ca.pem")),
            format!("--ssl-cert={}", file("server.pem")),
            format!("--ssl-key={}", file("server.key")),
        ],
    }
}

/// A copy of the authority in a folder that belongs to the user who runs the tests.
fn authority_for_client(server: &Server, folder: &Path) -> PathBuf {
    let copy = server.client_folder().join("ca.pem");
    fs::copy(folder.join("ca.pem"), &copy).unwrap();
    copy
}

async fn is_refused(settings: &Settings, words: &str) {
    let refused = store::status(settings).await.unwrap_err();
    let Error::Down(what) = &refused else {
        panic!("{refused:?}")
    };
    assert!(what.to_string().contains(words), "{what}");
    assert!(!what.to_string().contains("hunter2"), "{what}");
}

/// The user's sessions that the server says are encrypted, and all of them.
fn sessions(server: &Server) -> (String, String) {
    let count = |condition: &str| {
        let text = server.sql(
            "",
            &match server.kind {
                Kind::PostgreSql => format!(
                    "SELECT count(*) FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) \
                     WHERE usename = 'keybroker' {condition};"
                ),
                Kind::MariaDb => {
                    "SELECT count(*) FROM information_schema.processlist WHERE user = 'keybroker'"
                        .to_owned()
                }
            },
        );
        text.trim().to_owned()
    };
    (count("AND ssl"), count(""))
}

async fn tls_is_verified(kind: Kind) {
    let mut server = Server::start_with(kind, |folder| tls_arguments(kind, folder));
    let database = server.database();
    let ca = Some(authority_for_client(&server, server.folder()));
    let named = |host: &str| Settings {
        ca_file: ca.clone(),
        ..server.network_settings(host, &database)
    };
    let good = named("localhost");
    store::migrate(&good, false).await.unwrap();
    if kind == Kind::MariaDb {
        // The server itself refuses whoever comes without TLS.
        server.sql(
            "",
            "ALTER USER keybroker@'127.0.0.1', keybroker@localhost REQUIRE SSL",
        );
    }
    let store = store::open(&good).await.unwrap();
    store
        .create(revision(&user("alice"), 1, 1), stamp())
        .await
        .unwrap();
    let (encrypted, all) = sessions(&server);
    assert_eq!(encrypted, all);
    assert_ne!(all, "0");
    store.close().await;

    // Not for that name; loopback is no exception.
    is_refused(&named("127.0.0.1"), "ca_file").await;
    // Not by a known authority.
    let unknown = Settings {
        ca_file: None,
        ..good.clone()
    };
    is_refused(&unknown, "ca_file").await;
    let other = tempfile::tempdir().unwrap();
    write_certificates(other.path());
    let other = Settings {
        ca_file: Some(authority_for_client(&server, other.path())),
        ..good.clone()
    };
    is_refused(&other, "certificate").await;

    let ca_file = authority_for_client(&server, server.folder());
    let wrong = server.client_folder().join("wrong");
    fs::write(&wrong, "hunter2-but-wrong").unwrap();
    fs::set_permissions(&wrong, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    let wrong = Settings {
        password_file: Some(wrong),
        ..good.clone()
    };
    is_refused(&wrong, "password_file").await;

    // A server that has no TLS, or behind somebody who says so.
    server.stop();
    server.run_with(NO_TLS.map(str::to_owned).to_vec());
    let good = Settings {
        ca_file: Some(ca_file),
        ..server.network_settings("localhost", &database)
    };
    is_refused(&good, "store.tls = \"plaintext\"").await;
    let plain = Settings {
        tls: Tls::Plaintext,
        ca_file: None,
        ..good
    };
    let store: Arc<dyn store::Store> = store::open(&plain).await.unwrap();
    assert!(store.record(&user("alice")).await.unwrap().is_some());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tls_to_postgresql_is_verified() {
    tls_is_verified(Kind::PostgreSql).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tls_to_mariadb_is_verified() {
    tls_is_verified(Kind::MariaDb).await;
}

/// Runs a test of this file in a separate process, with a database and with variables.
fn in_environment(test: &str, settings: &Settings, variables: &[(&str, &str)]) -> Output {
    Command::new(env::current_exe().unwrap())
        .args([&format!("network::{test}"), "--exact", "--nocapture"])
        .env(CHILD, serde_json::to_string(settings).unwrap())
        .envs(variables.iter().copied())
        .output()
        .unwrap()
}

/// The database, in the process that is to use it.
fn in_child() -> Option<Settings> {
    let settings = env::var(CHILD).ok()?;
    Some(serde_json::from_str(&settings).unwrap())
}

/// The environment of the process leads no connection elsewhere, and switches nothing off.
#[test]
fn the_drivers_variables_do_not_count() {
    const VARIABLES: [(&str, &str); 5] = [
        ("PGHOST", "elsewhere.example.org"),
        ("PGPORT", "1"),
        ("PGUSER", "somebody"),
        ("PGDATABASE", "other"),
        ("PGSSLMODE", "disable"),
    ];
    if let Some(settings) = in_child() {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        runtime.block_on(store::migrate(&settings, false)).unwrap();
        return;
    }
    let server = Server::start(Kind::PostgreSql);
    let settings = server.settings(&server.database());
    let child = in_environment("the_drivers_variables_do_not_count", &settings, &VARIABLES);
    assert!(
        child.status.success(),
        "{}",
        String::from_utf8_lossy(&child.stderr)
    );
}

/// Nothing can undo them: other authorities, a certificate of ours, settings of the session.
#[test]
fn variables_that_would_count_are_refused() {
    if let Some(settings) = in_child() {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let refused = runtime.block_on(store::status(&settings)).unwrap_err();
        println!("refused: {refused}; {}", settings.file_problems().join(" "));
        return;
    }
    // Nobody listens: it does not come so far.
    let settings = Settings::new("postgres://me@127.0.0.1:1/keys");
    for name in ["PGSSLROOTCERT", "PGSSLCERT", "PGSSLKEY", "PGOPTIONS"] {
        let child = in_environment(
            "variables_that_would_count_are_refused",
            &settings,
            &[(name, "/etc/hostname")],
        );
        let said = String::from_utf8_lossy(&child.stdout);
        assert!(child.status.success(), "{said}");
        let complaint = format!("environment variable {name} is set");
        assert_eq!(said.matches(&complaint).count(), 2, "{name}: {said}");
    }
}

/// Hands everything on to a port, later: a server in another zone.
async fn distant_proxy(port: u16, delay: Duration) -> u16 {
    proxy(port, delay, Arc::default()).await
}

/// A proxy that stops forwarding on the connections that are open when `lost` is raised, and says so to neither side.
async fn proxy(port: u16, delay: Duration, lost: Arc<AtomicU32>) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let near = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            let server = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
            let (client, server) = (client.into_split(), server.into_split());
            tokio::spawn(hand_on(client.0, server.1, delay, Arc::clone(&lost)));
            tokio::spawn(hand_on(
                server.0,
                client.1,
                Duration::ZERO,
                Arc::clone(&lost),
            ));
        }
    });
    near
}

async fn hand_on(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    delay: Duration,
    lost: Arc<AtomicU32>,
) {
    let begun = lost.load(Ordering::SeqCst);
    let mut bytes = vec![0; 65_536];
    while let Ok(count @ 1..) = from.read(&mut bytes).await {
        if lost.load(Ordering::SeqCst) != begun {
            std::future::pending::<()>().await;
        }
        tokio::time::sleep(delay).await;
        if to.write_all(&bytes[..count]).await.is_err() {
            return;
        }
    }
}

/// Settings that use a proxy instead of the server.
fn through(settings: &Settings, near: u16) -> Settings {
    let (start, rest) = settings.url.as_str().split_once("127.0.0.1:").unwrap();
    let (_, end) = rest.split_once('/').unwrap();
    Settings {
        url: format!("{start}127.0.0.1:{near}/{end}").into(),
        ..settings.clone()
    }
}

fn port_of(settings: &Settings) -> u16 {
    let (_, rest) = settings.url.as_str().split_once("127.0.0.1:").unwrap();
    rest.split_once('/').unwrap().0.parse().unwrap()
}

/// A firewall that forgets its connections: they are open at both ends, and nothing passes. No call may wait for one after
/// another.
async fn connections_lost_in_silence_cost_no_read(kind: Kind) {
    const CONNECTIONS: usize = 10;
    let server = Server::start(kind);
    let database = server.database();
    let here = Settings {
        tls: Tls::Plaintext,
        ..server.network_settings("127.0.0.1", &database)
    };
    store::migrate(&here, false).await.unwrap();
    let lost = Arc::new(AtomicU32::new(0));
    let near = proxy(port_of(&here), Duration::from_millis(20), Arc::clone(&lost)).await;
    let store = store::open(&through(&here, near)).await.unwrap();
    store
        .create(revision(&user("alice"), 1, 1), stamp())
        .await
        .unwrap();
    for _ in 0..3 {
        let reads = (0..CONNECTIONS).map(|_| {
            let store = Arc::clone(&store);
            async move { store.record(&user("alice")).await }
        });
        for read in futures_util::future::join_all(reads).await {
            assert!(read.unwrap().is_some());
        }
        // Longer than a connection may be unused before it is tested.
        tokio::time::sleep(Duration::from_millis(1_100)).await;
        lost.fetch_add(1, Ordering::SeqCst);
        let read = tokio::time::timeout(DEADLINE, store.record(&user("alice"))).await;
        assert!(read.expect("a read in time").unwrap().is_some());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_to_postgresql_that_are_lost_in_silence_cost_no_read() {
    connections_lost_in_silence_cost_no_read(Kind::PostgreSql).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_to_mariadb_that_are_lost_in_silence_cost_no_read() {
    connections_lost_in_silence_cost_no_read(Kind::MariaDb).await;
}

/// What is written every few seconds must be written in time there, too.
async fn last_uses_are_written_over_a_slow_network(kind: Kind) {
    let server = Server::start(kind);
    let database = server.database();
    let here = Settings {
        tls: Tls::Plaintext,
        ..server.network_settings("127.0.0.1", &database)
    };
    store::migrate(&here, false).await.unwrap();
    let near = distant_proxy(port_of(&here), Duration::from_millis(30)).await;
    let there = through(&here, near);
    let store = store::open_tables(&there).await.unwrap();
    // As many as the broker writes at once, and a portion that is not full.
    let at = Timestamp::now();
    let uses: Vec<_> = (0..499_u128)
        .map(|number| (RecordId::from_bytes(number.to_be_bytes()), at))
        .collect();
    store.note_uses(&uses).await.unwrap();
    assert_eq!(store.count(Table::LastUses).await.unwrap(), 499);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn last_uses_reach_a_postgresql_over_a_slow_network() {
    last_uses_are_written_over_a_slow_network(Kind::PostgreSql).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn last_uses_reach_a_mariadb_over_a_slow_network() {
    last_uses_are_written_over_a_slow_network(Kind::MariaDb).await;
}
