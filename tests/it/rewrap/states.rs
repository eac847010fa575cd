//! A change of the state of a key in the middle of a re-wrap.

use std::{collections::BTreeSet, time::Duration};

use crate::{
    client::{Caller, refused},
    process::{Broker, until},
};

use super::{
    admin_command, all_released, done, material, names, on_sqlite, start, status, two_keys,
};

const USERS: usize = 60;
/// Rows per second: slow enough for a change in the middle.
const RATE: u32 = 15;
/// No row may be moved in this time after a change.
const WATCHED: Duration = Duration::from_secs(3);

/// A re-wrap that has moved some rows and not all.
struct Halfway {
    broker: Broker,
    users: Vec<String>,
    source: String,
    target: String,
}

impl Halfway {
    async fn reached() -> Self {
        let users = names(USERS);
        let site = two_keys(on_sqlite(), &users).await;
        let broker = Broker::start_on(site);
        let keys = status(&broker).await;
        let source = hex::encode(&keys.uses[0].wrapping_key_id);
        let target = hex::encode(&keys.uses[1].wrapping_key_id);
        let halfway = Self {
            broker,
            users,
            source,
            target,
        };
        halfway.key("deactivate", &halfway.source);
        assert!(start(&halfway.broker, RATE).await.unwrap());
        until("the first moved rows", || {
            (halfway.moved().len() >= 5).then_some(())
        });
        halfway
    }

    fn key(&self, change: &str, id: &str) {
        let changed = admin_command(&self.broker, &["key", change], &[id]);
        assert_eq!(changed.code, Some(0), "{changed:#?}");
    }

    /// The users whose key is under the target.
    fn moved(&self) -> BTreeSet<String> {
        let listed = self.broker.site.sql(&format!(
            "SELECT r.user FROM records r JOIN revisions v ON v.record_id = r.record_id \
             WHERE lower(hex(v.wrapping_key_id)) = '{}'",
            self.target
        ));
        listed.lines().map(str::to_owned).collect()
    }

    /// Changes the state of a key, and returns the users whose rows were moved before. No row is moved afterwards.
    async fn change(&self, change: &str, id: &str) -> Vec<String> {
        self.key(change, id);
        let moved = self.moved();
        assert!(moved.len() < USERS, "the re-wrap had ended already");
        tokio::time::sleep(WATCHED).await;
        assert_eq!(self.moved(), moved, "rows were moved after `key {change}`");
        moved.into_iter().collect()
    }

    fn others(&self, moved: &[String]) -> Vec<String> {
        let others = self.users.iter().filter(|user| !moved.contains(user));
        others.cloned().collect()
    }
}

async fn all_refused(broker: &Broker, users: &[String]) {
    let releaser = Caller::of(broker, "releaser");
    for user in users {
        refused(releaser.unwrap(user).await, "KEY_STATE");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_suspended_target_stops_the_re_wrap_until_it_is_resumed() {
    let halfway = Halfway::reached().await;
    let moved = halfway.change("suspend", &halfway.target).await;
    let others = halfway.others(&moved);
    all_released(&halfway.broker, &others).await;
    all_refused(&halfway.broker, &moved[..1]).await;
    let rewrap = status(&halfway.broker).await.rewrap.unwrap();
    assert_eq!(rewrap.blocked_by, "KEY_STATE", "{rewrap:?}");

    halfway.key("resume", &halfway.target);
    all_released(&halfway.broker, &moved).await;
    let ended = done(&halfway.broker).await;
    assert_eq!((ended.failed, ended.left), (0, 0), "{ended:?}");
    assert_eq!(halfway.moved().len(), USERS);
    all_released(&halfway.broker, &halfway.users).await;
    halfway.broker.site.expect_ok(&["store", "check"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_compromised_source_keeps_the_rows_that_were_not_moved() {
    let halfway = Halfway::reached().await;
    let moved = halfway.change("compromise", &halfway.source).await;
    all_released(&halfway.broker, &moved).await;
    all_refused(&halfway.broker, &halfway.others(&moved)).await;
    let ended = done(&halfway.broker).await;
    assert_eq!(ended.failed, 0, "{ended:?}");
    assert_eq!(halfway.moved().len(), moved.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_compromised_target_gets_no_further_row() {
    let halfway = Halfway::reached().await;
    let moved = halfway.change("compromise", &halfway.target).await;
    all_refused(&halfway.broker, &moved[..1]).await;
    let others = halfway.others(&moved);
    all_released(&halfway.broker, &others).await;
    // The rows that were not moved go on to a further key, and those under the compromised key stay.
    let rotated = admin_command(
        &halfway.broker,
        &["key", "rotate"],
        &["--bits", "2048", "--single"],
    );
    assert_eq!(rotated.code, Some(0), "{rotated:#?}");
    done(&halfway.broker).await;
    assert_eq!(halfway.moved().len(), moved.len());
    all_released(&halfway.broker, &others).await;
    let released = Caller::of(&halfway.broker, "releaser")
        .unwrap(&others[0])
        .await;
    assert_eq!(released.unwrap().key_material, material(&others[0]));
}
