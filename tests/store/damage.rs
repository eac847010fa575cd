//! Rows that are not as they were written, and rows that must not change.

use std::sync::Arc;

use keybroker_core::{
    call::Timestamp,
    key::{RecordId, Revision, Tenant},
};
use keybroker_store::{Damage, DamagedRecord, Error, ListQuery, Position, SKIPPED_MAX, Store};
use tokio::task::JoinSet;

use super::{Engine, KEY, address, record_id, revision, scope, stamp, stamp_with, user};

/// What lets an administrator write anything.
fn without_constraints(engine: &Engine) -> &'static str {
    engine.pick(
        "PRAGMA foreign_keys = OFF; ",
        "ALTER TABLE records DROP CONSTRAINT records_record_id_length, DROP CONSTRAINT records_state_known, \
         DROP CONSTRAINT records_revision_positive; \
         ALTER TABLE revisions DROP CONSTRAINT revisions_record_fk; ",
        "SET foreign_key_checks = 0; SET check_constraint_checks = 0; ",
    )
}

pub(crate) async fn rows_that_do_not_decode_are_corrupt_by_name(engine: &Engine) {
    let x01 = engine.pick("x'01'", "'\\x01'", "x'01'");
    let undo = [
        ("records", "record_id", x01.to_owned()),
        ("records", "state", "'gone'".to_owned()),
        ("records", "revision", "-1".to_owned()),
        ("revisions", "wrapping_key_id", x01.to_owned()),
    ];
    let store = engine.open().await;
    for (number, (table, column, value)) in (0..).zip(undo) {
        let alice = user(&format!("alice-{column}"));
        store
            .create(revision(&alice, number, 1), stamp())
            .await
            .unwrap();
        let id = format!("{number:02x}").repeat(16);
        let id = engine.pick(format!("x'{id}'"), format!("'\\x{id}'"), format!("x'{id}'"));
        let constraints = if number == 0 || engine.pick(true, false, true) {
            without_constraints(engine)
        } else {
            ""
        };
        engine.sql(&format!(
            "{constraints}UPDATE {table} SET {column} = {value} WHERE record_id = {id}"
        ));
        match store.record(&alice).await {
            Err(Error::Corrupt(what)) => {
                assert!(what.to_string().contains(column), "{column}: {what}");
            }
            other => panic!("{column}: {other:?}"),
        }
        // The list names it and does not leave it out.
        let query = ListQuery {
            tenant: Tenant::default(),
            user: Some(alice.user.clone()),
            deleted: true,
            from: Position::default(),
            limit: 10,
        };
        let page = store.list(&query).await.unwrap();
        assert!(
            matches!(&page[..], [Err(damaged)] if damaged.detail.contains(column)),
            "{column}: {page:?}"
        );
    }
    let bob = user("bob");
    store.create(revision(&bob, 9, 1), stamp()).await.unwrap();
    engine.sql(&format!(
        "{}DELETE FROM revisions",
        engine.pick(without_constraints(engine), "", without_constraints(engine))
    ));
    assert!(
        matches!(store.record(&bob).await, Err(Error::Corrupt(what)) if what.to_string().contains("wrapping_key_id"))
    );
}

/// What a list says of a user: the good record's user, or what could be read of a damaged one.
type Seen = Result<String, (Option<String>, Damage)>;

/// All pages of the default tenant, each begun where the page before ended.
async fn all_pages(store: &Arc<dyn Store>, limit: u32, deleted: bool) -> Vec<Seen> {
    let mut query = ListQuery {
        tenant: Tenant::default(),
        user: None,
        deleted,
        from: Position::default(),
        limit,
    };
    let mut seen = Vec::new();
    // Far more pages than there are rows: a page that does not advance would never end.
    for _ in 0..100 {
        let page = store.list(&query).await.unwrap();
        if page.is_empty() {
            return seen;
        }
        for row in page {
            query.from.advance(match &row {
                Ok(info) => Some((info.address.user.clone(), info.address.name.clone())),
                Err(damaged) => damaged.key(),
            });
            seen.push(
                row.map(|info| info.address.user.to_string())
                    .map_err(|bad: DamagedRecord| {
                        (bad.user.map(|user| user.to_string()), bad.damage)
                    }),
            );
        }
    }
    panic!("the pages do not end: {seen:?}");
}

/// A record for each user, at its second revision.
async fn fill(store: &dyn Store, users: [&str; 8]) {
    for (number, name) in (0..).zip(users) {
        let created = store.create(revision(&user(name), number, 1), stamp());
        created.await.unwrap();
        let replaced = store.supersede(revision(&user(name), number, 2), stamp());
        replaced.await.unwrap();
    }
}

/// Damaged records of several kinds, first, last and in the middle: each page goes on, names them, and loses no other record.
pub(crate) async fn damaged_records_do_not_end_a_page(engine: &Engine) {
    let store = engine.open().await;
    fill(&*store, ["a", "b", "c", "d", "e", "f", "g", "h"]).await;
    engine.sql(without_constraints(engine));
    let column = engine.pick("user", "\"user\"", "user");
    let x01 = engine.pick("x'01'", "'\\x01'", "x'01'");
    // Not a user: no UTF-8 where the engine stores that, else a control character.
    let no_user = engine.pick("CAST(x'63ff' AS TEXT)", "'c' || chr(1)", "x'63ff'");
    let foreign_keys = engine.pick(
        "PRAGMA foreign_keys = OFF; ",
        "",
        "SET foreign_key_checks = 0; ",
    );
    let unchecked = engine.pick(
        "PRAGMA ignore_check_constraints = ON; ",
        "",
        "SET check_constraint_checks = 0; ",
    );
    let damage = |name: &str, what: &str| {
        engine.sql(&format!(
            "{foreign_keys}{unchecked}UPDATE records SET {what} WHERE {column} = '{name}'"
        ));
    };
    // The first and the last of all; one without a key between two good ones; one that was set back.
    damage("a", "state = 'gone'");
    damage("c", &format!("{column} = {no_user}"));
    damage("e", "revision = 1");
    damage("f", "key_name = 'NOT A KEY NAME'");
    damage("h", &format!("record_id = {x01}"));
    let bad = |name: &str, damage| Err((Some(name.to_owned()), damage));
    let mut expected: Vec<Seen> = vec![
        bad("a", Damage::Unreadable),
        Ok("b".to_owned()),
        Err((None, Damage::Unreadable)),
        Ok("d".to_owned()),
        bad("e", Damage::SetBack),
        bad("f", Damage::Unreadable),
        Ok("g".to_owned()),
        bad("h", Damage::Unreadable),
    ];
    for limit in [1, 2, 3, 1_000] {
        for deleted in [true, false] {
            assert_eq!(all_pages(&store, limit, deleted).await, expected, "{limit}");
        }
    }
    // Only that user's: the damaged one is there, too.
    let query = ListQuery {
        tenant: Tenant::default(),
        user: Some(user("f").user),
        deleted: false,
        from: Position::default(),
        limit: 1,
    };
    let page = store.list(&query).await.unwrap();
    assert!(
        matches!(&page[..], [Err(row)] if row.name.is_none()),
        "{page:?}"
    );

    // All of them, and none has a readable place in the order.
    for name in ["a", "b", "d", "e", "f", "g", "h"] {
        let value = no_user
            .replace("63", &hex::encode(name))
            .replace("'c'", &format!("'{name}'"));
        damage(name, &format!("{column} = {value}"));
    }
    expected.fill(Err((None, Damage::Unreadable)));
    for limit in [1, 3, 8, 1_000] {
        assert_eq!(all_pages(&store, limit, true).await, expected, "{limit}");
    }
    a_position_of_no_page_is_refused(&*store).await;
}

/// It must not make the database skip rows without end.
async fn a_position_of_no_page_is_refused(store: &dyn Store) {
    let query = ListQuery {
        tenant: Tenant::default(),
        user: None,
        deleted: false,
        from: Position {
            after: None,
            skip: SKIPPED_MAX + 1,
        },
        limit: 1,
    };
    assert!(matches!(store.list(&query).await, Err(Error::Corrupt(_))));
}

/// Lookups under way at the same time share connections. Each gets its own record: beside one that is damaged, beside
/// some that are not there, and beside callers that leave.
pub(crate) async fn lookups_at_once_each_get_their_own(engine: &Engine) {
    const USERS: u8 = 60;
    const DAMAGED: u8 = 7;
    let store = engine.open().await;
    for number in 0..USERS {
        let at = user(&format!("user-{number}"));
        let new = revision(&at, number, 1);
        store.create(new, stamp()).await.unwrap();
    }
    engine.sql(&format!(
        "{}UPDATE records SET state = 'gone' WHERE {} = 'user-{DAMAGED}'",
        without_constraints(engine),
        engine.pick("user", "\"user\"", "user")
    ));
    for round in 0..20_u8 {
        let mut lookups = JoinSet::new();
        // Each third one is not there, and some of the callers leave.
        for number in 0..USERS + USERS / 2 {
            let store = Arc::clone(&store);
            let lookup = lookups.spawn(async move {
                let at = user(&format!("user-{number}"));
                (number, store.record(&at).await)
            });
            if number % 10 == round % 10 {
                lookup.abort();
            }
        }
        let mut answers = 0;
        while let Some(answer) = lookups.join_next().await {
            let Ok((number, found)) = answer else {
                continue;
            };
            answers += 1;
            match found {
                Err(Error::Corrupt(what)) => assert_eq!(number, DAMAGED, "{what}"),
                Ok(None) => assert!(number >= USERS, "{number}"),
                Ok(Some(record)) => assert_eq!(record.info.id, record_id(number)),
                Err(error) => panic!("{number}: {error}"),
            }
        }
        assert!(answers >= u32::from(USERS), "{answers}");
    }
}

/// Somebody set a record back to an earlier revision: what the next change would write is there already. To be told to try
/// again would be no help.
pub(crate) async fn a_record_that_was_set_back_is_damaged(engine: &Engine) {
    let store = engine.open().await;
    let alice = user("alice");
    store.create(revision(&alice, 1, 1), stamp()).await.unwrap();
    store
        .supersede(revision(&alice, 1, 2), stamp())
        .await
        .unwrap();
    engine.sql("UPDATE records SET revision = 1");
    // What its row names was valid once, and must not be released again.
    match store.record(&alice).await {
        Err(Error::Corrupt(what)) => {
            assert!(
                what.to_string().contains("newest stored revision is 2"),
                "{what}"
            );
        }
        other => panic!("{other:?}"),
    }
    match store.supersede(revision(&alice, 1, 2), stamp()).await {
        Err(Error::Corrupt(what)) => {
            assert!(what.to_string().contains("to repair the record"), "{what}");
        }
        other => panic!("{other:?}"),
    }
    assert!(matches!(
        store.delete(record_id(1), Revision::FIRST, stamp()).await,
        Err(Error::Corrupt(_))
    ));
    // Nothing of it was done.
    let written = engine.sql("SELECT revision FROM records");
    assert_eq!(written.trim(), "1");
    store.ping().await.unwrap();
    // Repaired as the message says.
    engine.sql("UPDATE records SET revision = 2");
    assert!(store.record(&alice).await.unwrap().is_some());
    store
        .supersede(revision(&alice, 1, 3), stamp())
        .await
        .unwrap();
}

/// What is in it is for the envelope's own parser to say.
pub(crate) async fn a_truncated_envelope_is_handed_on_as_it_is(engine: &Engine) {
    let store = engine.open().await;
    store
        .create(revision(&user("alice"), 1, 1), stamp())
        .await
        .unwrap();
    let x01 = engine.pick("x'01'", "'\\x01'", "x'01'");
    engine.sql(&format!("UPDATE revisions SET envelope = {x01}"));
    assert_eq!(
        store
            .record(&user("alice"))
            .await
            .unwrap()
            .unwrap()
            .envelope,
        [1]
    );
}

pub(crate) async fn reads_change_nothing(engine: &Engine) {
    const ONE: &str = "7d444840-9dc0-11d1-b245-5ffdce74fad2";
    let store = engine.open().await;
    let mine = scope("me", ONE);
    let written = stamp_with(mine.clone());
    store
        .create(revision(&user("alice"), 1, 1), written.clone())
        .await
        .unwrap();
    store
        .supersede(revision(&user("alice"), 1, 2), stamp())
        .await
        .unwrap();
    // With what changes when a row is written again, even with what it was.
    let look = || {
        engine.sql(engine.pick(
            "SELECT * FROM records; SELECT * FROM revisions; SELECT * FROM changes; SELECT * FROM requests; \
             PRAGMA data_version",
            "SELECT ctid, xmin, * FROM records; SELECT ctid, xmin, * FROM revisions; \
             SELECT ctid, xmin, * FROM changes; SELECT ctid, xmin, * FROM requests",
            "SELECT * FROM records; SELECT * FROM revisions; SELECT * FROM changes; SELECT * FROM requests; \
             SHOW GLOBAL STATUS LIKE 'Innodb_rows_updated'; SHOW GLOBAL STATUS LIKE 'Innodb_rows_deleted'",
        ))
    };
    let before = look();
    for _ in 0..10 {
        store.record(&user("alice")).await.unwrap();
        store.record(&user("nobody")).await.unwrap();
        store.revision(record_id(1), Revision::FIRST).await.unwrap();
        store.request(&mine).await.unwrap();
        store.registry().await.unwrap();
        assert!(store.committed_by(written.call).await.unwrap());
        let query = ListQuery {
            tenant: Tenant::default(),
            user: None,
            deleted: true,
            from: Position::default(),
            limit: 10,
        };
        store.list(&query).await.unwrap();
        store.ping().await.unwrap();
    }
    assert_eq!(look(), before);
}

/// What is noted of a release touches no row of a record, and its loss loses nothing else.
pub(crate) async fn last_uses_are_apart_from_the_records(engine: &Engine) {
    let store = engine.open().await;
    // More than one statement asks for, and more than one transaction's worth for nobody.
    let ids: Vec<RecordId> = (0..120).map(record_id).collect();
    store
        .create(revision(&user("alice"), 1, 1), stamp())
        .await
        .unwrap();
    let look = || {
        engine.sql(engine.pick(
            "SELECT * FROM records; SELECT * FROM revisions",
            "SELECT ctid, xmin, * FROM records; SELECT ctid, xmin, * FROM revisions",
            "SELECT * FROM records; SELECT * FROM revisions",
        ))
    };
    let before = look();
    let at = |micros: i64| Timestamp::from_micros(micros);
    let uses: Vec<_> = ids.iter().map(|id| (*id, at(100))).collect();
    store.note_uses(&uses).await.unwrap();
    // A later one counts; an earlier one, of a broker that writes late, does not.
    store
        .note_uses(&[(ids[0], at(50)), (ids[1], at(150))])
        .await
        .unwrap();
    assert!(store.last_uses(&[]).await.unwrap().is_empty());
    let mut asked = ids.clone();
    asked.push(record_id(200));
    let known = store.last_uses(&asked).await.unwrap();
    assert_eq!(
        (
            known.len(),
            known[&ids[0]],
            known[&ids[1]],
            known[&ids[119]]
        ),
        (120, at(100), at(150), at(100))
    );
    assert_eq!(look(), before);

    engine.sql("DROP TABLE last_uses");
    store.note_uses(&uses).await.unwrap_err();
    store.last_uses(&ids).await.unwrap_err();
    assert!(store.record(&user("alice")).await.unwrap().is_some());
    store
        .supersede(revision(&user("alice"), 1, 2), stamp())
        .await
        .unwrap();
}

/// The longest that the vocabulary lets through is stored whole, on engines that give their columns a length, too.
pub(crate) async fn the_longest_values_fit(engine: &Engine) {
    let store = engine.open().await;
    let at = address(&"t".repeat(64), &"\u{fc}".repeat(127), &"k".repeat(64));
    let mut new = revision(&at, 1, 1);
    new.envelope = vec![0xff; keybroker_core::envelope::ENVELOPE_BYTES_MAX];
    let mut scope = scope(&"p".repeat(2_048), "7d444840-9dc0-11d1-b245-5ffdce74fad2");
    scope.tenant = at.tenant.clone();
    let created = store
        .create(new.clone(), stamp_with(scope.clone()))
        .await
        .unwrap();
    let record = store.record(&at).await.unwrap().unwrap();
    assert_eq!((&record.info, &record.envelope), (&created, &new.envelope));
    assert_eq!(created.wrapping_key, KEY);
    let request = store.request(&scope).await.unwrap().unwrap();
    assert_eq!(request.result, created);
}
