//! `PgBouncer` in front of PostgreSQL: refused where it gives one session to several clients, and used where it does not.

use std::{
    fs,
    net::TcpListener,
    os::unix::net::UnixStream,
    process::{Child, Stdio},
};

use keybroker_store as store;
use keybroker_store::Settings;

use super::{
    eventually, revision,
    servers::{Kind, Server, give, unprivileged},
    stamp, user,
};

/// A running `PgBouncer`.
struct Pooler {
    child: Child,
    settings: Settings,
}

impl Pooler {
    fn start(server: &Server, database: &str, mode: &str) -> Self {
        let folder = server.folder().join(mode);
        fs::create_dir(&folder).unwrap();
        let port = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        let socket = server.socket();
        let server_port = socket.extension().unwrap().to_str().unwrap();
        let configuration = folder.join("pgbouncer.ini");
        fs::write(
            &configuration,
            format!(
                "[databases]\n\
                 * = host={server_folder} port={server_port} user=admin\n\
                 [pgbouncer]\n\
                 listen_port = {port}\n\
                 unix_socket_dir = {folder}\n\
                 auth_type = any\n\
                 pool_mode = {mode}\n",
                server_folder = server.folder().display(),
                folder = folder.display(),
            ),
        )
        .unwrap();
        give(&configuration, 0o600);
        give(&folder, 0o755);
        let child = unprivileged("pgbouncer", "KILL")
            .arg("--quiet")
            .arg(&configuration)
            .stdin(Stdio::null())
            .spawn()
            .expect("pgbouncer is not installed; run scripts/install.sh");
        let socket = folder.join(format!(".s.PGSQL.{port}"));
        eventually(|| UnixStream::connect(&socket).is_ok());
        let url = format!("postgres://admin@/{database}?socket={}", socket.display());
        Self {
            child,
            settings: Settings::new(url),
        }
    }
}

impl Drop for Pooler {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pooler_that_shares_sessions_is_refused_and_one_that_does_not_is_used() {
    let server = Server::start(Kind::PostgreSql);
    let database = server.database();
    store::migrate(&server.settings(&database), false)
        .await
        .unwrap();
    for mode in ["transaction", "statement"] {
        let pooler = Pooler::start(&server, &database, mode);
        // Also when the pooler has sessions in which something was prepared already.
        for _ in 0..3 {
            let refused = [
                store::status(&pooler.settings).await.map(drop),
                store::open(&pooler.settings).await.map(drop),
                store::migrate(&pooler.settings, false).await.map(drop),
            ];
            for refused in refused {
                let refused = refused.unwrap_err().to_string();
                assert!(refused.contains("pool_mode = session"), "{refused}");
            }
        }
    }
    let pooler = Pooler::start(&server, &database, "session");
    store::status(&pooler.settings).await.unwrap();
    let store = store::open(&pooler.settings).await.unwrap();
    store
        .create(revision(&user("alice"), 1, 1), stamp())
        .await
        .unwrap();
    assert!(store.record(&user("alice")).await.unwrap().is_some());
    store.close().await;
}
