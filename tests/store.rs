//! The conformance suite of the store: every method and every guarantee, written against the trait. An engine joins by
//! adding a way to make an empty database to [`Engine`].

#![allow(
    clippy::unwrap_used,
    reason = "a test that meets a surprise stops there"
)]

#[path = "store/conformance.rs"]
mod conformance;
#[path = "store/sqlite.rs"]
mod sqlite;
#[path = "store/survival.rs"]
mod survival;

use std::sync::Arc;

use keybroker::{
    call::{CallId, RequestId, Timestamp},
    key::{KeyAddress, KeyName, RecordId, Revision, Tenant, UserId, WrappingKeyId},
    store::{self, NewRevision, RequestScope, RequestStamp, Settings, Stamp, Store},
};
use tempfile::TempDir;

/// An empty, migrated database of one engine.
struct Engine {
    folder: TempDir,
    settings: Settings,
}

impl Engine {
    async fn sqlite() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let settings = Settings {
            url: format!("sqlite:{}", folder.path().join("test.db").display()),
            migrate_at_start: false,
        };
        store::migrate(&settings, false).await.unwrap();
        Self { folder, settings }
    }

    async fn open(&self) -> Arc<dyn Store> {
        store::open(&self.settings).await.unwrap()
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
        }),
        ..stamp()
    }
}
