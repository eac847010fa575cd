//! The broker that is measured, its connected clients, and users that have keys.

use std::{sync::Arc, time::Duration};

use keybroker_client::{Client, Reason, RetryPolicy};
use keybroker_core::key::Purpose;
use tokio::task::JoinSet;

use crate::cli::{
    client::{
        connect::{self, Connection},
        refusal,
    },
    exit::Failure,
    progress::Progress,
};

use super::{Bench, internal, served::Served, users::Users};

/// Maximum number of TLS connections in scenarios where callers share connections. The value is far
/// below a listener's default limit of connections.
pub(super) const CONNECTIONS_MAX: u32 = 256;
/// Maximum number of concurrent enrolment calls, and of concurrent TLS handshakes.
const AT_ONCE: u32 = 16;

pub(super) struct Session {
    pub(super) broker: Served,
    /// Each client has its own connection.
    pub(super) clients: Vec<Client>,
    pub(super) users: Users,
    /// The deadline of calls for which the scenario sets no deadline.
    pub(super) deadline: Duration,
}

impl Session {
    /// Starts the broker and connects the clients. Enrols the users, unless `--seed` created their
    /// keys. The clients do not retry, so that every refusal is counted.
    pub(super) async fn open(bench: &Bench<'_>, connections: u32) -> Result<Self, Failure> {
        let broker = Served::start(bench, None).await?;
        Self::with(bench, broker, connections, RetryPolicy::never()).await
    }

    /// Like [`Session::open`], but for a broker that is already running.
    pub(super) async fn with(
        bench: &Bench<'_>,
        broker: Served,
        connections: u32,
        retry: RetryPolicy,
    ) -> Result<Self, Failure> {
        let connection = &bench.arguments.connection;
        let clients = connect_all(connection, &broker.endpoint, connections, retry).await?;
        let users = match bench.token.key.purpose {
            Purpose::Plain => bench.arguments.users(),
            Purpose::Sealed => bench.arguments.users().sealed()?,
        };
        // With `--seed`, the users already have keys.
        if bench.arguments.seed.is_none() {
            let output = bench.context.output;
            let progress = Progress::new(output, "enrolling users", users.count().into());
            enrol(&clients, &users, progress).await?;
        }
        Ok(Self {
            broker,
            clients,
            users,
            deadline: connection.timeout(),
        })
    }
}

/// Creates clients, each with its own connection.
pub(super) async fn connect_all(
    connection: &Connection,
    endpoint: &str,
    count: u32,
    retry: RetryPolicy,
) -> Result<Vec<Client>, Failure> {
    let first = connect::build(connection.client(endpoint)?.retry(retry))?;
    in_parallel(count, |_| {
        let (client, endpoint) = (first.with_separate_connection(), endpoint.to_owned());
        async move {
            connect::connect(&client, &endpoint).await?;
            Ok(client)
        }
    })
    .await
}

/// Runs a task for each number, with at most [`AT_ONCE`] tasks at the same time. The results are in
/// no particular order.
pub(super) async fn in_parallel<T, F>(
    count: u32,
    work: impl Fn(u32) -> F,
) -> Result<Vec<T>, Failure>
where
    T: Send + 'static,
    F: Future<Output = Result<T, Failure>> + Send + 'static,
{
    let (mut tasks, mut results) = (JoinSet::new(), Vec::new());
    for number in 0..count {
        if number >= AT_ONCE
            && let Some(done) = tasks.join_next().await
        {
            results.push(done.map_err(internal)??);
        }
        tasks.spawn(work(number));
    }
    while let Some(done) = tasks.join_next().await {
        results.push(done.map_err(internal)??);
    }
    Ok(results)
}

/// Creates the users' keys. Existing keys of an earlier run are kept.
async fn enrol(clients: &[Client], users: &Users, progress: Progress) -> Result<(), Failure> {
    let progress = Arc::new(progress);
    in_parallel(users.count(), |number| {
        let turn = usize::try_from(number).unwrap_or_default() % clients.len();
        let (client, user) = (clients[turn].clone(), users.user(number));
        let progress = Arc::clone(&progress);
        async move {
            match client.create_user_key(&user.key, &user.material).await {
                Err(error) if error.reason() != Some(Reason::KeyExists) => {
                    Err(refusal::failure(&error))
                }
                _ => {
                    progress.step();
                    Ok(())
                }
            }
        }
    })
    .await?;
    Ok(())
}
