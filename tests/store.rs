//! The conformance suite of the store: every method and every guarantee, written against the trait. An engine joins by
//! adding a way to make an empty database to [`Engine`].
//!
//! PostgreSQL and MariaDB are real servers of the tests' own. To start one takes seconds, so the parts of the suite share
//! one, with a database each.

#![allow(
    clippy::unwrap_used,
    reason = "a test that meets a surprise stops there"
)]
#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "what a failed test leaves behind, and how long the parts took"
)]

#[path = "store/approvals.rs"]
mod approvals;
#[path = "store/clients.rs"]
mod clients;
#[path = "store/conformance.rs"]
mod conformance;
#[path = "store/connections.rs"]
mod connections;
#[path = "store/contention.rs"]
mod contention;
#[path = "store/copy.rs"]
mod copy;
#[path = "store/damage.rs"]
mod damage;
#[path = "store/devices.rs"]
mod devices;
#[path = "store/durability.rs"]
mod durability;
#[path = "store/filling.rs"]
mod filling;
#[path = "store/identity.rs"]
mod identity;
#[path = "store/member_keys.rs"]
mod member_keys;
#[path = "store/network.rs"]
mod network;
#[path = "store/outage.rs"]
mod outage;
#[path = "store/pooler.rs"]
mod pooler;
#[path = "store/purge.rs"]
mod purge;
#[path = "store/rewrap.rs"]
mod rewrap;
#[path = "store/schema.rs"]
mod schema;
#[path = "store/sockets.rs"]
mod sockets;
#[path = "store/sqlite.rs"]
mod sqlite;
#[path = "store/suite.rs"]
mod suite;
#[path = "store/survival.rs"]
mod survival;

use std::{process::Command, sync::Arc};

use keybroker_core::{
    call::{CallId, RequestId, Timestamp},
    key::{KeyAddress, KeyName, RecordId, Revision, Tenant, UserId, WrappingKeyId},
};
use keybroker_store as store;
use keybroker_store::{
    NewRevision, RequestScope, RequestStamp, Settings, Stamp, Store, tables::Tables,
};
use keybroker_test_support::servers;
use tempfile::TempDir;

use servers::{Kind, Server};

/// A database of one engine.
struct Engine {
    place: Place,
    settings: Settings,
}

enum Place {
    /// The folder of the file.
    Sqlite(TempDir),
    Server(Arc<Server>, String),
}

impl Engine {
    /// An empty database without a schema.
    fn bare_sqlite() -> Self {
        let folder = tempfile::tempdir().unwrap();
        Self {
            settings: Settings::new(format!(
                "sqlite:{}",
                folder.path().join("test.db").display()
            )),
            place: Place::Sqlite(folder),
        }
    }

    async fn sqlite() -> Self {
        Self::bare_sqlite().migrated().await
    }

    fn bare_on(server: &Arc<Server>) -> Self {
        let database = server.database();
        Self {
            settings: Settings {
                // A hundred calls at once wait for each other on a machine that does other things, too.
                acquire_timeout_ms: 20_000,
                statement_timeout_ms: 20_000,
                lock_timeout_ms: 10_000,
                ..server.settings(&database)
            },
            place: Place::Server(Arc::clone(server), database),
        }
    }

    async fn on(server: &Arc<Server>) -> Self {
        Self::bare_on(server).migrated().await
    }

    async fn migrated(self) -> Self {
        store::migrate(&self.settings, false).await.unwrap();
        self
    }

    async fn tables(&self) -> Arc<dyn Tables> {
        store::open_tables(&self.settings).await.unwrap()
    }

    async fn open(&self) -> Arc<dyn Store> {
        store::open(&self.settings).await.unwrap()
    }

    fn kind(&self) -> Option<Kind> {
        match &self.place {
            Place::Sqlite(_) => None,
            Place::Server(server, _) => Some(server.kind),
        }
    }

    /// One text for each engine.
    fn pick<T>(&self, sqlite: T, postgres: T, mysql: T) -> T {
        match self.kind() {
            None => sqlite,
            Some(Kind::PostgreSql) => postgres,
            Some(Kind::MariaDb) => mysql,
        }
    }

    /// Runs SQL with another program than ours: what an administrator, an attacker or a fault does. On SQLite with the CHECKs
    /// off.
    fn sql(&self, statements: &str) -> String {
        match &self.place {
            Place::Sqlite(folder) => {
                let text = format!("PRAGMA ignore_check_constraints = ON; {statements}");
                let file = folder.path().join("test.db");
                let mut command = Command::new("sqlite3");
                let output = command
                    .args(["-cmd", ".timeout 10000"])
                    .arg(file)
                    .arg(text)
                    .output();
                let output = output.expect("sqlite3 is not installed; run scripts/install.sh");
                assert!(output.status.success(), "{statements}: {output:?}");
                String::from_utf8_lossy(&output.stdout).into_owned()
            }
            Place::Server(server, database) => server.sql(database, statements),
        }
    }
}

/// Waits for something that happens soon, and not at once.
fn eventually(mut happened: impl FnMut() -> bool) {
    let begun = std::time::Instant::now();
    while !happened() {
        assert!(begun.elapsed().as_secs() < 30, "it did not happen");
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
}

const KEY: WrappingKeyId = WrappingKeyId::from_bytes([9; 16]);

fn address(tenant: &str, user: &str, name: &str) -> KeyAddress {
    KeyAddress {
        tenant: Tenant::parse(tenant).unwrap(),
        user: UserId::parse(user).unwrap(),
        name: KeyName::parse(name).unwrap(),
    }
}

fn user(name: &str) -> KeyAddress {
    address("default", name, "vault")
}

/// A revision whose envelope says which it is.
fn revision(address: &KeyAddress, record: u8, number: u64) -> NewRevision {
    NewRevision {
        address: address.clone(),
        record: record_id(record),
        revision: Revision::new(number).unwrap(),
        envelope: format!("{} {number}", address.user).into_bytes(),
        wrapping_key: KEY,
    }
}

fn record_id(number: u8) -> RecordId {
    RecordId::from_bytes([number; 16])
}

fn stamp() -> Stamp {
    Stamp {
        call: CallId::fresh(),
        at: Timestamp::now(),
        request: None,
    }
}

fn scope(principal: &str, id: &str) -> RequestScope {
    RequestScope {
        tenant: Tenant::default(),
        principal: principal.to_owned(),
        id: RequestId::parse(id).unwrap().unwrap(),
    }
}

fn stamp_with(scope: RequestScope) -> Stamp {
    Stamp {
        request: Some(RequestStamp {
            scope,
            content: [5; 32],
            key: KEY,
            result: None,
        }),
        ..stamp()
    }
}
