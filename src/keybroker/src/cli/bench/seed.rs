//! Fills a database with records, bypassing the broker. The broker can release the keys, because
//! they are wrapped and their rows have row MACs. Each transaction writes hundreds of rows, because
//! a million transactions with one row each would take hours.

use std::{
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    thread,
};

use tokio::runtime::Handle;

use crate::{
    cli::{
        Context, block_on, change,
        client::connect::Connection,
        exit::{Exit, Failure},
        progress::Progress,
    },
    config::Config,
    places::Registry,
};
use keybroker_audit::Entry;
use keybroker_auth::Authenticator;
use keybroker_client::UserKeyRef;
use keybroker_core::{
    call::Timestamp,
    envelope,
    error::chain,
    key::{ID_BYTES, KeyAddress, RecordId, Revision, Tenant},
    principal::Principal,
};
use keybroker_hsm::admin::Wrapper;
use keybroker_store as store;
use keybroker_store::{NewRevision, Store, tally::Tally};

use super::{bare, users::Users};

/// Records per transaction. A transaction of this size ends long before the timeout of a statement.
const BATCH: u32 = 500;

/// The principal that the client certificate of a connection identifies.
pub(super) fn principal(
    connection: &Connection,
    config: &Config,
) -> Result<Arc<Principal>, Failure> {
    let known = Authenticator::new(&config.principals)
        .map_err(|error| Failure::new(Exit::Configuration, chain(&error)))?;
    Ok(known.certificate(Some(&connection.certificate()?))?)
}

/// The tenant of the principal that the benchmark's client certificate identifies. The broker looks
/// for the records in this tenant.
pub(super) fn tenant(connection: &Connection, config: &Config) -> Result<Tenant, Failure> {
    Ok(principal(connection, config)?.tenant().clone())
}

/// Creates a record for every user without a record.
pub(super) fn seed(
    context: &Context,
    config: &Config,
    tenant: Tenant,
    users: Users,
) -> Result<(), Failure> {
    let _lock = store::lock(&config.store)?;
    let progress = Progress::new(context.output, "writing records", users.count().into());
    let added = Arc::new(Tally::default());
    change::audited(
        context,
        config,
        "bench.seed",
        |entry: &mut Entry| entry.count = added.rows_if_begun(),
        || {
            block_on(async {
                let store = store::open(&config.store).await?;
                let seed = Seed {
                    store: Arc::clone(&store),
                    tenant,
                    users,
                    next: AtomicU32::new(0),
                    progress,
                    added: Arc::clone(&added),
                };
                let written = seed.run(config).await;
                store.close().await;
                written
            })?
        },
    )
}

struct Seed {
    store: Arc<dyn Store>,
    tenant: Tenant,
    users: Users,
    /// The number of the first user that is not assigned to a thread yet.
    next: AtomicU32,
    progress: Progress,
    added: Arc<Tally>,
}

impl Seed {
    async fn run(self, config: &Config) -> Result<(), Failure> {
        let key = bare::active(&Registry::read(&*self.store).await?, config.token())?;
        let wrappers: Vec<Wrapper> = (0..super::processors())
            .map(|_| Ok(bare::open(config, &key)?.into_wrapper(key.clone())?))
            .collect::<Result<_, Failure>>()?;
        let (runtime, seed) = (Handle::current(), Arc::new(self));
        let threads: Vec<_> = wrappers
            .into_iter()
            .map(|wrapper| {
                let (runtime, seed) = (runtime.clone(), Arc::clone(&seed));
                thread::spawn(move || {
                    let worked = seed.work(&wrapper, &runtime);
                    // After a failure of this thread, the other threads stop after their current
                    // batch.
                    seed.next.store(seed.users.count(), Ordering::Relaxed);
                    worked
                })
            })
            .collect();
        // Joins every thread even after a failure, because all threads must end before the token is
        // closed.
        let ended: Vec<_> = threads
            .into_iter()
            .map(|thread| thread.join().expect("the threads of the seed do not panic"))
            .collect();
        ended.into_iter().collect()
    }

    /// Writes batches until no batch is left or a batch fails.
    fn work(&self, wrapper: &Wrapper, runtime: &Handle) -> Result<(), Failure> {
        loop {
            let first = self.next.fetch_add(BATCH, Ordering::Relaxed);
            let end = first.saturating_add(BATCH).min(self.users.count());
            if first >= end {
                return Ok(());
            }
            runtime.block_on(self.batch(wrapper, first..end))?;
            self.progress.advance((end - first).into());
        }
    }

    /// Writes one batch. Each batch is written in one transaction, so if the last record of a batch
    /// exists, all records of this batch exist. Earlier runs that enrolled users through the broker
    /// may have left records of single users.
    async fn batch(&self, wrapper: &Wrapper, numbers: Range<u32>) -> Result<(), Failure> {
        if self.is_there(numbers.end - 1).await? {
            return Ok(());
        }
        let records = |numbers: &mut dyn Iterator<Item = u32>| -> Result<Vec<_>, Failure> {
            numbers.map(|number| self.record(wrapper, number)).collect()
        };
        let all = records(&mut numbers.clone())?;
        match self.create(all).await {
            Err(store::Error::Exists) => {}
            written => return Ok(written?),
        }
        let mut missing = Vec::new();
        for number in numbers {
            if !self.is_there(number).await? {
                missing.push(number);
            }
        }
        let missing = records(&mut missing.into_iter())?;
        Ok(self.create(missing).await?)
    }

    async fn create(&self, records: Vec<NewRevision>) -> Result<(), store::Error> {
        let count = records.len();
        self.added.begin();
        self.store.create_many(records, Timestamp::now()).await?;
        self.added.add(count);
        Ok(())
    }

    async fn is_there(&self, number: u32) -> Result<bool, Failure> {
        let address = self.address(self.users.user(number).key);
        Ok(self.store.record(&address).await?.is_some())
    }

    fn address(&self, key: UserKeyRef) -> KeyAddress {
        KeyAddress {
            tenant: self.tenant.clone(),
            user: key.user,
            name: key.key_name,
        }
    }

    fn record(&self, wrapper: &Wrapper, number: u32) -> Result<NewRevision, Failure> {
        let user = self.users.user(number);
        let address = self.address(user.key);
        let mut id = [0; ID_BYTES];
        aws_lc_rs::rand::fill(&mut id)
            .map_err(|_| Failure::new(Exit::Internal, "the random generator failed"))?;
        let (record, revision) = (RecordId::from_bytes(id), Revision::FIRST);
        let context = envelope::Context::Record {
            address: &address,
            record_id: record,
            revision,
        };
        let envelope = wrapper.wrap(&context, &user.material)?;
        Ok(NewRevision {
            wrapping_key: envelope.wrapping_key(),
            envelope: envelope.to_bytes(),
            address,
            record,
            revision,
        })
    }
}
