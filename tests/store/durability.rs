//! A database that may lose what it acknowledges is refused, unless the configuration names the setting.

use std::sync::Arc;

use keybroker_store as store;
use keybroker_store::{Error, Settings};

use super::{
    Engine,
    servers::{Kind, Server},
    stamp, user,
};

async fn open(engine: &Engine, accepted: &[&str]) -> Result<Arc<dyn store::Store>, Error> {
    let settings = Settings {
        accept_weaker_durability: accepted.iter().map(|name| (*name).to_owned()).collect(),
        ..engine.settings.clone()
    };
    store::open(&settings).await
}

/// Refused as long as one of the names is missing, with each in the message; accepted with all of them.
async fn is_refused_unless_named(engine: &Engine, names: &[&str]) {
    for left_out in names {
        let accepted: Vec<_> = names
            .iter()
            .copied()
            .filter(|name| name != left_out)
            .collect();
        let refused = open(engine, &accepted).await.unwrap_err();
        let Error::Durability(what) = &refused else {
            panic!("{refused:?}")
        };
        assert!(what.contains(&format!("{left_out} is ")), "{what}");
        assert!(
            what.contains(&format!("accept_weaker_durability = [{left_out:?}]")),
            "{what}"
        );
    }
    let store = open(engine, names).await.unwrap();
    store
        .create(super::revision(&user(names[0]), 1, 1), stamp())
        .await
        .unwrap();
    store.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn weak_settings_of_postgresql_are_refused_by_name() {
    let server = Arc::new(Server::start(Kind::PostgreSql));
    let set = |name: &str, value: &str| {
        server.sql("", &format!("ALTER SYSTEM SET {name} = {value};"));
        server.sql("", "SELECT pg_reload_conf();");
        super::eventually(|| server.sql("", &format!("SHOW {name};")).trim() == value);
    };
    for name in ["fsync", "full_page_writes", "synchronous_commit"] {
        let engine = Engine::on(&server).await;
        open(&engine, &[]).await.unwrap().close().await;
        set(name, "off");
        is_refused_unless_named(&engine, &[name]).await;
        set(name, "on");
    }
    // The weaker words are as good as `on` while there is no standby to wait for.
    let engine = Engine::on(&server).await;
    set("synchronous_commit", "local");
    open(&engine, &[]).await.unwrap().close().await;
    set("synchronous_commit", "on");

    // Each new connection is asked again: a failover can lead to another server.
    let store = Settings {
        acquire_timeout_ms: 500,
        ..engine.settings.clone()
    };
    let store = store::open(&store).await.unwrap();
    store
        .create(super::revision(&user("before"), 1, 1), stamp())
        .await
        .unwrap();
    set("fsync", "off");
    server.sql(
        "",
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'keybroker';",
    );
    let after = super::revision(&user("after"), 2, 1);
    let mut refused = store.create(after.clone(), stamp()).await;
    for _ in 0..3 {
        assert!(matches!(refused, Err(Error::Down(_))), "{refused:?}");
        refused = store.create(after.clone(), stamp()).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn weak_settings_of_mariadb_are_refused_by_name() {
    let arguments = [
        "--log-bin=binlog",
        "--sync-binlog=0",
        "--skip-innodb-doublewrite",
    ];
    let server = Server::start_with(Kind::MariaDb, |_| arguments.map(str::to_owned).to_vec());
    let server = Arc::new(server);
    let engine = Engine::on(&server).await;
    is_refused_unless_named(&engine, &["sync_binlog", "innodb_doublewrite"]).await;
    let engine = Engine::on(&server).await;
    server.sql(
        "",
        "SET GLOBAL sync_binlog = 1; SET GLOBAL innodb_flush_log_at_trx_commit = 2",
    );
    is_refused_unless_named(
        &engine,
        &["innodb_doublewrite", "innodb_flush_log_at_trx_commit"],
    )
    .await;
}
