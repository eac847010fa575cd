//! Retries that meet their first call under way: one change, and one answer for all.

use tokio::task::JoinSet;
use tonic::Status;

use keybroker_proto::UserKey;

use crate::{
    client::{Caller, reason},
    process::Broker,
    site::Options,
};

const AT_ONCE: u32 = 6;

async fn all<F>(call: impl Fn(u32) -> F) -> Vec<Result<UserKey, Status>>
where
    F: Future<Output = Result<UserKey, Status>> + Send + 'static,
{
    let mut calls = JoinSet::new();
    for number in 0..AT_ONCE {
        calls.spawn(call(number));
    }
    calls.join_all().await
}

#[tokio::test(flavor = "multi_thread")]
async fn retries_beside_their_first_call_get_its_answer() {
    let broker = Broker::start(Options::default());
    let enroller = Caller::of(&broker, "enroller");
    for round in 0..10_u32 {
        let user = format!("user-{round}");
        let create = |_| {
            let (enroller, user) = (enroller.clone(), user.clone());
            let id = format!("7d444840-9dc0-11d1-b245-5ffdce74{round:04}");
            async move {
                enroller
                    .create_with_id(&user, b"material of this user", &id)
                    .await
            }
        };
        let created = all(create).await;
        let first = created[0].as_ref().unwrap();
        for answer in &created {
            assert_eq!(answer.as_ref().unwrap(), first);
        }
        let replace = |_| {
            let (enroller, user) = (enroller.clone(), user.clone());
            let id = format!("7d444840-9dc0-11d1-b245-5ffdce75{round:04}");
            async move {
                enroller
                    .replace(&user, b"other material of theirs", 1, &id)
                    .await
            }
        };
        for answer in all(replace).await {
            let key = answer.unwrap();
            assert_eq!((key.revision, &key.record_id), (2, &first.record_id));
        }
    }
    let (site, _) = broker.stop();
    assert_eq!(
        site.sql("SELECT count(*), max(revision) FROM records")
            .trim(),
        "10|2"
    );
    site.expect_ok(&["audit", "verify"]);
}

/// With other content under the same id one wins, and the others are told what is wrong with theirs.
#[tokio::test(flavor = "multi_thread")]
async fn rivals_with_one_request_id_are_told_apart() {
    let broker = Broker::start(Options::default());
    let enroller = Caller::of(&broker, "enroller");
    for round in 0..5_u32 {
        let create = |number| {
            let enroller = enroller.clone();
            async move {
                let id = format!("7d444840-9dc0-11d1-b245-5ffdce76{round:04}");
                let material = format!("material of rival {number}");
                let user = format!("rivals-{round}");
                enroller
                    .create_with_id(&user, material.as_bytes(), &id)
                    .await
            }
        };
        let answers = all(create).await;
        assert_eq!(answers.iter().filter(|answer| answer.is_ok()).count(), 1);
        for status in answers.into_iter().filter_map(Result::err) {
            assert_eq!(reason(&status), "REQUEST_ID_REUSED");
        }
    }
}
