//! `PgBouncer` in front of PostgreSQL: refused where it gives one session to several clients, and used where it does not.

use keybroker_store as store;
use keybroker_test_support::pooler::Pooler;

use super::{
    revision,
    servers::{Kind, Server},
    stamp, user,
};

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
                store::status(pooler.settings()).await.map(drop),
                store::open(pooler.settings()).await.map(drop),
                store::migrate(pooler.settings(), false).await.map(drop),
            ];
            for refused in refused {
                let refused = refused.unwrap_err().to_string();
                assert!(refused.contains("pool_mode = session"), "{refused}");
            }
        }
    }
    let pooler = Pooler::start(&server, &database, "session");
    store::status(pooler.settings()).await.unwrap();
    let store = store::open(pooler.settings()).await.unwrap();
    store
        .create(revision(&user("alice"), 1, 1), stamp())
        .await
        .unwrap();
    assert!(store.record(&user("alice")).await.unwrap().is_some());
    store.close().await;
}
