//! API clients: their documents, and when their secrets were last accepted.

use std::sync::Arc;

use keybroker_core::{
    call::{CallId, Timestamp},
    client_credential::DOCUMENT_BYTES_MAX,
    key::ClientId,
};
use keybroker_store::{ClientRow, Damage, Error, Position, Store};
use tokio::task::JoinSet;

use super::{Engine, KEY};

pub(crate) fn client_id(number: u8) -> ClientId {
    ClientId::from_bytes([number; 16])
}

/// A row whose document says which it is. What it is does not matter here.
pub(crate) fn client(number: u8, revision: u64) -> ClientRow {
    let at = |micros: u64| Timestamp::from_micros(i64::try_from(micros).unwrap());
    ClientRow {
        id: client_id(number),
        revision,
        document: format!("{{\"client\": {number}, \"revision\": {revision}}}\0\u{fc}").into(),
        mac: [number; 32],
        key: KEY,
        created: at(1_000),
        updated: at(1_000 + revision),
    }
}

pub(crate) async fn a_client_is_read_as_it_was_written(engine: &Engine) {
    let store = engine.open().await;
    assert!(store.client(client_id(1)).await.unwrap().is_none());
    let longest = ClientRow {
        document: vec![0xff; DOCUMENT_BYTES_MAX],
        ..client(1, 1)
    };
    let call = CallId::fresh();
    store.insert_client(&longest, call).await.unwrap();
    assert!(store.committed_by(call).await.unwrap());
    assert_eq!(store.client(client_id(1)).await.unwrap(), Some(longest));

    let (taken, changed, alone) = (CallId::fresh(), CallId::fresh(), client(1, 3));
    let again = store.insert_client(&client(1, 1), taken).await;
    assert!(matches!(again, Err(Error::Exists)), "{again:?}");
    assert!(!store.committed_by(taken).await.unwrap());
    let next = client(1, 2);
    store.update_client(&next, Some(changed)).await.unwrap();
    assert!(store.committed_by(changed).await.unwrap());
    assert_eq!(store.client(client_id(1)).await.unwrap(), Some(next));
    store.update_client(&alone, None).await.unwrap();
    assert_eq!(store.client(client_id(1)).await.unwrap(), Some(alone));

    // What is not the successor changes nothing and leaves no mark.
    for (number, revision) in [(1, 0), (1, 1), (1, 3), (1, 5), (2, 1), (2, 2)] {
        let refused = CallId::fresh();
        let result = store
            .update_client(&client(number, revision), Some(refused))
            .await;
        assert!(
            matches!(result, Err(Error::Conflict)),
            "{number} {revision}: {result:?}"
        );
        assert!(!store.committed_by(refused).await.unwrap());
    }
    assert_eq!(
        good_clients(&store, 10).await,
        [client(1, 3)],
        "nothing else was written"
    );
}

/// A hundred at once, each with its call: the calls that succeeded, and how many lost as they must.
async fn at_once(engine: &Engine, revision: u64) -> (Vec<u8>, usize) {
    let store = engine.open().await;
    let mut tasks = JoinSet::new();
    for number in 0..100 {
        let store = Arc::clone(&store);
        tasks.spawn(async move {
            let row = ClientRow {
                mac: [number; 32],
                ..client(7, revision)
            };
            let call = CallId::fresh();
            let result = match revision {
                1 => store.insert_client(&row, call).await,
                _ => store.update_client(&row, Some(call)).await,
            };
            (number, call, result)
        });
    }
    let (mut won, mut lost) = (Vec::new(), 0);
    for (number, call, result) in tasks.join_all().await {
        assert_eq!(store.committed_by(call).await.unwrap(), result.is_ok());
        match (result, revision) {
            (Ok(()), _) => won.push(number),
            (Err(Error::Exists), 1) | (Err(Error::Conflict), 2..) => lost += 1,
            (Err(error), _) => panic!("{error}"),
        }
    }
    (won, lost)
}

pub(crate) async fn of_concurrent_changes_of_a_client_one_wins(engine: &Engine) {
    let store = engine.open().await;
    for revision in 1..=3 {
        let (won, lost) = at_once(engine, revision).await;
        assert_eq!((won.len(), lost), (1, 99), "revision {revision}");
        let row = store.client(client_id(7)).await.unwrap().unwrap();
        assert_eq!((row.revision, row.mac), (revision, [won[0]; 32]));
    }
}

pub(crate) async fn pages_of_clients_are_ordered_and_complete(engine: &Engine) {
    let store = engine.open().await;
    assert!(good_clients(&store, 10).await.is_empty());
    let numbers = [0x41, 0, 0x61, 0xff, 0x80, 0x7f, 1];
    for number in numbers {
        store
            .insert_client(&client(number, 1), CallId::fresh())
            .await
            .unwrap();
    }
    let mut sorted = numbers;
    sorted.sort_unstable();
    for limit in [1, 3, 7, 1_000] {
        let (mut found, mut from) = (Vec::new(), Position::default());
        loop {
            let page = store.clients(&from, limit).await.unwrap();
            assert!(page.len() <= usize::try_from(limit).unwrap());
            let page: Vec<ClientRow> = page.into_iter().collect::<Result<_, _>>().unwrap();
            let Some(last) = page.last() else { break };
            from = Some(last.id).into();
            found.extend(page);
        }
        assert_eq!(found, sorted.map(|number| client(number, 1)), "{limit}");
    }
}

/// What is noted of a use touches no document, and its loss loses nothing else.
pub(crate) async fn uses_of_secrets_are_apart_from_the_documents(engine: &Engine) {
    let store = engine.open().await;
    store
        .insert_client(&client(1, 1), CallId::fresh())
        .await
        .unwrap();
    let look = || {
        engine.sql(engine.pick(
            "SELECT * FROM clients",
            "SELECT ctid, xmin, * FROM clients",
            "SELECT * FROM clients",
        ))
    };
    let before = look();
    let (one, two) = (client_id(1), client_id(2));
    let at = Timestamp::from_micros;
    assert!(store.client_uses(one).await.unwrap().is_empty());
    store.note_client_uses(&[]).await.unwrap();
    // More than one statement has room for, and one of them twice.
    let mut uses: Vec<_> = (1..=50)
        .rev()
        .map(|secret| (one, secret, at(100)))
        .collect();
    uses.extend([(two, u32::MAX, at(7)), (one, 3, at(300)), (one, 3, at(200))]);
    store.note_client_uses(&uses).await.unwrap();
    // A later one counts; an earlier one, of a broker that writes late, does not.
    store
        .note_client_uses(&[(one, 1, at(50)), (one, 2, at(150)), (one, 3, at(250))])
        .await
        .unwrap();
    let mut expected: Vec<_> = (1..=50).map(|secret| (secret, at(100))).collect();
    (expected[1].1, expected[2].1) = (at(150), at(300));
    assert_eq!(store.client_uses(one).await.unwrap(), expected);
    assert_eq!(store.client_uses(two).await.unwrap(), [(u32::MAX, at(7))]);

    // Of brokers that write at once the latest is what stays.
    let mut brokers = JoinSet::new();
    for broker in 1..=20 {
        let store = Arc::clone(&store);
        brokers.spawn(async move {
            let mut uses: Vec<_> = (1..=30)
                .map(|secret| (one, secret, at(1_000 + broker)))
                .collect();
            if broker % 2 == 0 {
                uses.reverse();
            }
            store.note_client_uses(&uses).await
        });
    }
    for result in brokers.join_all().await {
        result.unwrap();
    }
    let latest = store.client_uses(one).await.unwrap();
    assert!(latest[..30].iter().all(|(_, used)| *used == at(1_020)));
    for _ in 0..3 {
        store.client(one).await.unwrap().unwrap();
        good_clients(&store, 10).await;
    }
    assert_eq!(look(), before);

    engine.sql("DROP TABLE client_uses");
    store.note_client_uses(&uses).await.unwrap_err();
    store.client_uses(one).await.unwrap_err();
    assert_eq!(store.client(one).await.unwrap(), Some(client(1, 1)));
    store.update_client(&client(1, 2), None).await.unwrap();
}

pub(crate) async fn clients_that_do_not_decode_are_corrupt_by_name(engine: &Engine) {
    let store = engine.open().await;
    engine.sql(engine.pick(
        "",
        "ALTER TABLE clients DROP CONSTRAINT clients_client_id_length, \
         DROP CONSTRAINT clients_revision_positive, DROP CONSTRAINT clients_document_length",
        "ALTER TABLE clients DROP CONSTRAINT clients_client_id_length; \
         ALTER TABLE clients DROP CONSTRAINT clients_revision_positive; \
         ALTER TABLE clients MODIFY document MEDIUMBLOB NOT NULL",
    ));
    let x01 = engine.pick("x'01'", "'\\x01'", "x'01'");
    let too_long = engine.pick(
        "zeroblob(32769)",
        "decode(repeat('00', 32769), 'hex')",
        "repeat(x'00', 32769)",
    );
    for (column, value) in [
        ("revision", "0"),
        ("revision", "-1"),
        ("document", too_long),
        ("mac", x01),
        ("key_id", x01),
        ("client_id", x01),
    ] {
        store
            .insert_client(&client(1, 1), CallId::fresh())
            .await
            .unwrap();
        engine.sql(&format!("UPDATE clients SET {column} = {value}"));
        let page = store.clients(&Position::default(), 10).await.unwrap();
        let [Err(damaged)] = &page[..] else {
            panic!("{column}: {page:?}");
        };
        let id = (column != "client_id").then(|| client_id(1));
        assert_eq!((damaged.id, damaged.damage), (id, Damage::Unreadable));
        let detail = format!("the database contains damaged data: clients.{column}");
        assert_eq!(damaged.detail, detail);
        // A lookup does not find a row whose id was cut.
        if let Some(id) = id {
            match store.client(id).await {
                Err(Error::Corrupt(what)) => assert!(
                    what.to_string().starts_with(&format!("clients.{column}")),
                    "{what}"
                ),
                other => panic!("{column}: {other:?}"),
            }
        }
        engine.sql("DELETE FROM clients");
    }
    let at = Timestamp::from_micros(7);
    store
        .note_client_uses(&[(client_id(1), 1, at), (client_id(1), 2, at)])
        .await
        .unwrap();
    engine.sql("UPDATE client_uses SET secret_number = -1 WHERE secret_number = 1");
    let uses = store.client_uses(client_id(1)).await.unwrap();
    assert_eq!(uses, [(2, at)], "one damaged note must not hide the others");
}

/// Pages over clients of which some have an id that is none: every page advances, and the good ones are all there.
pub(crate) async fn damaged_clients_do_not_end_a_page(engine: &Engine) {
    const CLIENTS: u8 = 6;
    let store = engine.open().await;
    for number in 1..=CLIENTS {
        store
            .insert_client(&client(number, 1), CallId::fresh())
            .await
            .unwrap();
    }
    engine.sql(engine.pick(
        "",
        "ALTER TABLE clients DROP CONSTRAINT clients_client_id_length",
        "ALTER TABLE clients DROP CONSTRAINT clients_client_id_length",
    ));
    let bytes = |hex: &str| {
        engine.pick(
            format!("x'{hex}'"),
            format!("'\\x{hex}'"),
            format!("x'{hex}'"),
        )
    };
    // The first, two in the middle, the last, and in the end all of them.
    let damaged: [&[u8]; 4] = [&[1], &[3, 4], &[6], &[2, 5]];
    let mut gone: Vec<u8> = Vec::new();
    for numbers in damaged {
        for number in numbers {
            engine.sql(&format!(
                "UPDATE clients SET client_id = {} WHERE client_id = {}",
                bytes(&format!("{number:02x}")),
                bytes(&format!("{number:02x}").repeat(16)),
            ));
        }
        gone.extend(numbers);
        let expected: Vec<_> = (1..=CLIENTS)
            .map(|number| (!gone.contains(&number)).then(|| client_id(number)))
            .collect();
        for limit in [1, 2, 6, 1_000] {
            let (mut found, mut from) = (Vec::new(), Position::default());
            for _ in 0..20 {
                let page = store.clients(&from, limit).await.unwrap();
                if page.is_empty() {
                    break;
                }
                for row in page {
                    let id = row.as_ref().map_or_else(|bad| bad.id, |row| Some(row.id));
                    from.advance(id);
                    found.push(id);
                }
            }
            assert_eq!(found, expected, "{limit}");
        }
    }
}

/// A page without damaged rows.
pub(crate) async fn good_clients(store: &Arc<dyn Store>, limit: u32) -> Vec<ClientRow> {
    let page = store.clients(&Position::default(), limit).await.unwrap();
    page.into_iter().collect::<Result<_, _>>().unwrap()
}
