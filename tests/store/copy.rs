//! Databases copied from one engine to another.

use std::{process::Command, sync::Arc};

use keybroker_core::{
    call::{CallId, Timestamp},
    key::{Fingerprint, ObjectIds, Purpose, Revision, WrappingKeyState},
};
use keybroker_store::{
    DeviceChange, RegistryRow,
    copy::{Copy, CopyError, Lacking, Walked},
    tables::{Table, Tables},
};

use super::{
    Engine, KEY, address,
    clients::{client, client_id, good_clients},
    devices::{access, added, device, make},
    record_id, revision, scope, stamp, stamp_with, user,
};

const ONE: &str = "7d444840-9dc0-11d1-b245-5ffdce74fad2";
/// More than two pages.
const MANY: u64 = 1_200;

/// A database with something of everything in it.
async fn source() -> Engine {
    let engine = Engine::sqlite().await;
    engine.sql(&format!(
        "BEGIN; WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {MANY})
         INSERT INTO records SELECT CAST(printf('%016d', i) AS BLOB), 'default', 'user-' || i, 'vault', \
         'active', 1, i, i, NULL FROM n;
         INSERT INTO revisions SELECT record_id, 1, randomblob(300), zeroblob(16), created_us FROM records; COMMIT"
    ));
    let store = engine.tables().await;
    let longest = address(&"t".repeat(64), &"\u{fc}".repeat(127), &"k".repeat(64));
    for (at, id) in [
        (&user("alice"), 1),
        (&user("Z\u{eb} \"x\" \\ '"), 0xff),
        (&longest, 3),
    ] {
        let with_id = stamp_with(scope(&format!("principal-{id}"), ONE));
        store.create(revision(at, id, 1), with_id).await.unwrap();
        store.supersede(revision(at, id, 2), stamp()).await.unwrap();
    }
    store
        .delete(record_id(1), Revision::new(2).unwrap(), stamp())
        .await
        .unwrap();
    let row = RegistryRow {
        id: KEY,
        fingerprint: Fingerprint([0xfe; 32]),
        objects: ObjectIds::from_slices(&[1, 0, 255], &[7; 255]).unwrap(),
        purpose: Purpose::Plain,
        state: WrappingKeyState::Deactivated,
        token_serial: "0123 \u{fc}".to_owned(),
        sequence: 7,
        registered: Timestamp::now(),
        backup_confirmed: None,
        mac: [0; 32],
    };
    store.register(&row).await.unwrap();
    store
        .note_uses(&[(record_id(1), Timestamp::now())])
        .await
        .unwrap();
    for number in [1, 0xff] {
        store
            .insert_client(&client(number, 1), CallId::fresh())
            .await
            .unwrap();
    }
    store.update_client(&client(1, 2), None).await.unwrap();
    let uses = [1, 2, u32::MAX].map(|secret| (client_id(1), secret, Timestamp::now()));
    store.note_client_uses(&uses).await.unwrap();
    let change = DeviceChange {
        devices: vec![added(device("alice", 1)), added(device("bob", 0xff))],
        request: Some(added(access("alice", 1))),
        ..DeviceChange::default()
    };
    make(&*store, &change).await.unwrap();
    store.close().await;
    engine
}

/// Every value of every row, as SQL.
fn dump(engine: &Engine) -> Vec<String> {
    let output = Command::new("sqlite3")
        .arg(engine.file())
        .arg(".dump")
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    let lines = text
        .lines()
        // The identity and the audit logs are of no table that is copied row by row.
        .filter(|line| {
            line.starts_with("INSERT")
                && !["_sqlx", "store_identity", "audit_logs"]
                    .iter()
                    .any(|table| line.contains(table))
        });
    let mut lines: Vec<String> = lines.map(str::to_owned).collect();
    lines.sort();
    lines
}

async fn between(from: &Engine, to: &Engine) -> Copy {
    Copy {
        from: from.tables().await,
        to: to.tables().await,
        added: Arc::default(),
    }
}

async fn walk(copy: &Copy, lacking: Lacking) -> Result<Walked, CopyError> {
    let mut all = Walked::default();
    for table in Table::ALL {
        let walked = copy.walk(table, lacking, || {}).await?;
        all.rows += walked.rows;
        all.lacking += walked.lacking;
    }
    Ok(all)
}

/// From SQLite to this engine and on to another SQLite.
pub(crate) async fn a_copy_there_and_back_is_the_same(engine: &Engine) {
    let (first, last) = (source().await, Engine::sqlite().await);
    let there = between(&first, engine).await;
    assert!(there.is_target_empty().await.unwrap());
    let added = walk(&there, Lacking::Add).await.unwrap();
    assert_eq!(
        (added.lacking, added.rows),
        (added.rows, 2 * (MANY + 3) + 3 + 9 + 3 + 1 + 1 + 2 + 3 + 4)
    );
    assert!(!there.is_target_empty().await.unwrap());
    let equal = walk(&there, Lacking::Refuse).await.unwrap();
    assert_eq!((equal.rows, equal.lacking), (added.rows, 0));
    let back = between(engine, &last).await;
    walk(&back, Lacking::Add).await.unwrap();
    walk(&back, Lacking::Refuse).await.unwrap();
    let copies = dump(&last);
    assert_eq!(u64::try_from(copies.len()).unwrap(), added.rows);
    assert_eq!(copies, dump(&first));
    // And it works as a store: the record that was deleted comes back.
    let store = engine.open().await;
    assert_eq!(
        good_clients(&store, 10).await,
        [client(1, 2), client(0xff, 1)]
    );
    assert_eq!(store.client_uses(client_id(1)).await.unwrap().len(), 3);
    store.undelete(record_id(1), stamp()).await.unwrap();
    let alice = store.record(&user("alice")).await.unwrap().unwrap();
    assert_eq!(alice.envelope, b"alice 2");
}

pub(crate) async fn a_copy_goes_on_where_it_was_cut_short(engine: &Engine) {
    let first = source().await;
    let copy = between(&first, engine).await;
    // Some of the records, from the middle as well as from the beginning, and nothing else.
    let mut page = copy.from.page(Table::Records, None, 0).await.unwrap();
    let next = copy
        .from
        .page(Table::Records, page.last(), 0)
        .await
        .unwrap();
    page.truncate(70);
    page.extend(next.into_iter().skip(30));
    let there = u64::try_from(page.len()).unwrap();
    copy.to.insert(Table::Records, &page).await.unwrap();

    let before = walk(&copy, Lacking::Ignore).await.unwrap();
    assert_eq!(before.rows - before.lacking, there);
    let refused = walk(&copy, Lacking::Refuse).await.unwrap_err();
    assert!(matches!(refused, CopyError::Missing(_)), "{refused}");
    let added = walk(&copy, Lacking::Add).await.unwrap();
    assert_eq!(added, before);
    assert_eq!(walk(&copy, Lacking::Add).await.unwrap().lacking, 0);
    walk(&copy, Lacking::Refuse).await.unwrap();
}

pub(crate) async fn a_target_with_anything_else_is_refused(engine: &Engine) {
    let first = source().await;
    let copy = between(&first, engine).await;
    // The same name, for another record.
    let to: Arc<dyn Tables> = Arc::clone(&copy.to);
    to.create(revision(&user("alice"), 9, 1), stamp())
        .await
        .unwrap();
    for lacking in [Lacking::Ignore, Lacking::Add, Lacking::Refuse] {
        let refused = copy.walk(Table::Records, lacking, || {}).await.unwrap_err();
        let is_known = matches!(&refused, CopyError::Extra(what) if what.starts_with("records"))
            || (lacking == Lacking::Refuse && matches!(refused, CopyError::Missing(_)));
        assert!(is_known, "{lacking:?}: {refused}");
    }
    assert_eq!(
        to.record(&user("alice")).await.unwrap().unwrap().info.id,
        record_id(9)
    );
}

/// As when a broker still writes to the database that is copied.
pub(crate) async fn a_change_during_a_copy_is_found(engine: &Engine) {
    let other = Engine::sqlite().await;
    let copy = between(engine, &other).await;
    let from: Arc<dyn Tables> = Arc::clone(&copy.from);
    let alice = user("alice");
    from.create(revision(&alice, 1, 1), stamp()).await.unwrap();
    walk(&copy, Lacking::Add).await.unwrap();
    from.supersede(revision(&alice, 1, 2), stamp())
        .await
        .unwrap();
    let refused = walk(&copy, Lacking::Refuse).await.unwrap_err();
    assert!(
        matches!(&refused, CopyError::Differs(what) if *what == format!("records {}", record_id(1))),
        "{refused}"
    );
    let again = walk(&copy, Lacking::Add).await.unwrap_err();
    assert!(matches!(again, CopyError::Differs(_)), "{again}");
}

/// As when it still writes while both are compared: the record was compared before.
pub(crate) async fn a_change_during_the_comparison_is_found(engine: &Engine) {
    let other = Engine::sqlite().await;
    let copy = between(engine, &other).await;
    let from: Arc<dyn Tables> = Arc::clone(&copy.from);
    let alice = user("alice");
    from.create(revision(&alice, 1, 1), stamp()).await.unwrap();
    walk(&copy, Lacking::Add).await.unwrap();
    walk(&copy, Lacking::Refuse).await.unwrap();
    copy.look_again().await.unwrap();
    from.supersede(revision(&alice, 1, 2), stamp())
        .await
        .unwrap();
    let refused = copy.look_again().await.unwrap_err();
    assert!(
        matches!(&refused, CopyError::Missing(what) if what.starts_with("changes")),
        "{refused}"
    );
}

/// A client may be changed without a mark.
pub(crate) async fn a_client_that_changes_during_the_comparison_is_found(engine: &Engine) {
    let other = Engine::sqlite().await;
    let copy = between(engine, &other).await;
    let from: Arc<dyn Tables> = Arc::clone(&copy.from);
    from.insert_client(&client(1, 1), CallId::fresh())
        .await
        .unwrap();
    walk(&copy, Lacking::Add).await.unwrap();
    walk(&copy, Lacking::Refuse).await.unwrap();
    copy.look_again().await.unwrap();
    from.update_client(&client(1, 2), None).await.unwrap();
    let refused = copy.look_again().await.unwrap_err();
    assert!(
        matches!(&refused, CopyError::Differs(what) if *what == format!("clients {}", client_id(1))),
        "{refused}"
    );
}
