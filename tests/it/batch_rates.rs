//! The call rate of batches, with the real broker.

use keybroker_proto::batch_unwrap_result::Result as BatchResult;

use crate::{
    client::{Caller, refused},
    process::Broker,
    site::Options,
};

/// Largest number of items in a batch.
const ITEMS: usize = 64;

/// Each item has its own audit entry, also an item that is malformed, so each item takes its part of the rate.
#[tokio::test(flavor = "multi_thread")]
async fn malformed_items_of_a_batch_count_as_calls() {
    let broker = Broker::start(Options {
        limits: "\n[rates]\nservice_calls_per_minute = 70".to_owned(),
        ..Options::default()
    });
    let releaser = Caller::of(&broker, "releaser");
    // An empty user is malformed.
    let malformed = [""; ITEMS];
    let answer = releaser.batch(&malformed).await.unwrap();
    assert_eq!(answer.results.len(), ITEMS);
    for one in answer.results {
        let Some(BatchResult::Error(error)) = one.result else {
            panic!("a malformed item was released");
        };
        assert_eq!(error.reason, "REQUEST");
    }
    // The rest of the rate is not enough for another batch.
    refused(releaser.batch(&malformed).await, "RATE");
    // A batch that is refused as a whole has one entry.
    let entries = broker.site.entries("user_key.unwrap");
    assert_eq!(entries.len(), ITEMS + 1, "{entries:?}");
    // Another principal has its own rate.
    let other = Caller::of(&broker, "other-releaser");
    other.batch(&malformed).await.unwrap();
}
