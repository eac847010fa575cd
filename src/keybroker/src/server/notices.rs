//! Delivers the notices to members: signed messages to the receiver that the configuration names, in the background.
//!
//! Several notices are sent at the same time, so that one slow answer does not hold up the others. Therefore the receiver may get
//! notices in another order than they happened. A failed delivery is repeated a limited number of times, with growing pauses. During
//! a pause, other notices are sent: the number of attempts at the same time is limited ([`turns`]), and the queue limits the number of
//! notices whose delivery has not ended. A notice that waits is lost when the process ends: the database and the audit log have the
//! facts.
//!
//! Mitigation: M29 of `THREAT_MODEL.md`.

use std::{sync::Arc, time::Duration};

use reqwest::{Client, StatusCode, Url};
use tokio::{
    sync::mpsc,
    task::{JoinError, JoinSet},
    time::{self, Instant},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    config::notices::{FileError, Settings},
    https,
};
use keybroker_broker::{Notice, NoticeQueue, QueuedNotice};
use keybroker_core::{call::spread, error::root_cause, metrics};

use message::{Message, Signer};
use turns::{MemberTurns, Turns};

mod message;
#[cfg(test)]
mod tests;
mod turns;

/// Longest pause between two attempts, without the random part.
const PAUSE_MAX: Duration = Duration::from_mins(5);
/// Factor between two pauses.
const PAUSE_FACTOR: u32 = 4;
/// Divisor for the random part of a pause.
const SPREAD_DIVISOR: u32 = 2;
/// Time for the last attempts when the broker stops.
const STOP_TIMEOUT: Duration = Duration::from_secs(2);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// An error that prevents the delivery of notices.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    /// A file of the section cannot be used.
    #[error(transparent)]
    File(#[from] FileError),
    /// The HTTP client cannot be built.
    #[error("[notices]: the HTTP client cannot be built")]
    Client(#[source] reqwest::Error),
    /// The URL cannot be parsed.
    #[error("[notices]: `url` is not a URL")]
    Url,
}

/// The background task that delivers notices, if the configuration has the section.
#[derive(Debug, Default)]
pub(super) struct Notifier {
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl Notifier {
    /// Reads the files of the section, and starts the task. Returns the queue for the broker.
    pub(super) fn start(settings: Option<&Settings>) -> Result<(Self, Option<NoticeQueue>), Error> {
        let notifier = Self::default();
        let Some(settings) = settings else {
            return Ok((notifier, None));
        };
        let (queue, deliveries) = Deliveries::new(settings, notifier.stop.clone())?;
        notifier.tasks.spawn(deliveries.run());
        Ok((notifier, Some(queue)))
    }

    /// Ends the task after a last attempt for each waiting notice, for a limited time.
    pub(super) async fn stop(&self) {
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }
}

/// Delivers the notices from a queue.
#[derive(Debug)]
struct Deliveries {
    queue: mpsc::Receiver<QueuedNotice>,
    receiver: Arc<Receiver>,
    turns: Turns,
    stop: CancellationToken,
    /// Time for the last attempts after `stop`.
    stop_timeout: Duration,
}

/// The receiver of all notices.
#[derive(Debug)]
struct Receiver {
    client: Client,
    url: Url,
    signer: Signer,
    attempts_max: u32,
    first_pause: Duration,
}

/// The result of one attempt.
#[derive(Debug)]
enum Attempt {
    Delivered,
    /// A further attempt may succeed.
    Failed(String),
    /// The receiver refuses the notice.
    Refused(StatusCode),
}

impl Deliveries {
    fn new(settings: &Settings, stop: CancellationToken) -> Result<(NoticeQueue, Self), Error> {
        let timeout = Duration::from_millis(settings.timeout_ms);
        let mut builder = https::client(timeout).connect_timeout(CONNECT_TIMEOUT.min(timeout));
        if let Some(authorities) = settings.authorities()? {
            builder = builder.tls_certs_only(authorities);
        }
        let receiver = Receiver {
            client: builder.build().map_err(Error::Client)?,
            url: Url::parse(&settings.url).map_err(|_| Error::Url)?,
            signer: Signer::new(settings.secrets()?),
            attempts_max: settings.attempts_max,
            first_pause: Duration::from_millis(settings.retry_after_ms),
        };
        let (sender, queue) = NoticeQueue::new(settings.known_events(), settings.waiting_max);
        let deliveries = Self {
            queue,
            receiver: Arc::new(receiver),
            turns: Turns::default(),
            stop,
            stop_timeout: STOP_TIMEOUT,
        };
        Ok((sender, deliveries))
    }

    /// Delivers notices until `stop` is cancelled. Then each waiting notice gets one last attempt, for a limited time.
    async fn run(mut self) {
        let mut running = JoinSet::new();
        let mut last = None;
        let mut is_drained = false;
        while !(is_drained && running.is_empty()) {
            metrics::NOTICES_WAITING.set_count(self.queue.len() + running.len());
            tokio::select! {
                () = self.stop.cancelled(), if last.is_none() => {
                    self.queue.close();
                    last = Some(Instant::now() + self.stop_timeout);
                }
                () = until(last) => break,
                Some(ended) = running.join_next() => note_end(ended),
                queued = self.queue.recv(), if !is_drained => match queued {
                    Some((notice, places)) => {
                        let receiver = Arc::clone(&self.receiver);
                        let turns = self.turns.of(&notice);
                        let delivery = receiver.deliver(notice, turns, self.stop.clone());
                        running.spawn(async move {
                            delivery.await;
                            drop(places);
                        });
                    }
                    None => is_drained = true,
                },
            }
        }
        // Deliveries that have ended are not lost.
        while let Some(ended) = running.try_join_next() {
            note_end(ended);
        }
        let lost = self.queue.len() + running.len();
        if lost > 0 {
            let count = u64::try_from(lost).unwrap_or(u64::MAX);
            tracing::warn!(
                count,
                "notices were not delivered before the broker stopped"
            );
            metrics::NOTICES.with(["failed"]).increment(count);
        }
    }
}

/// Reports a delivery that ended with a panic.
fn note_end(ended: Result<(), JoinError>) {
    if let Err(error) = ended {
        tracing::error!(%error, "a delivery of a notice ended unexpectedly");
        metrics::NOTICES.with(["failed"]).increment(1);
    }
}

/// Waits until a time, or for ever.
async fn until(time: Option<Instant>) {
    match time {
        Some(time) => time::sleep_until(time).await,
        None => std::future::pending().await,
    }
}

impl Receiver {
    /// Delivers one notice. Each attempt waits for a turn.
    async fn deliver(self: Arc<Self>, notice: Notice, turns: MemberTurns, stop: CancellationToken) {
        let message = Message::new(&notice);
        let (event, call_id) = (notice.event.as_str(), notice.call);
        let mut pause = self.first_pause;
        for attempt in 1..=self.attempts_max {
            let turn = turns.take().await;
            // The memory of the request is needed only during the attempt, not during the pauses of all waiting notices.
            let result = Box::pin(self.send(&message)).await;
            drop(turn);
            let problem = match result {
                Attempt::Delivered => {
                    tracing::info!(id = message.id(), event, %call_id, attempt, "notice delivered");
                    metrics::NOTICES.with(["delivered"]).increment(1);
                    return;
                }
                Attempt::Failed(problem) => problem,
                Attempt::Refused(status) => {
                    let problem = format!("the receiver answered {status}");
                    return given_up(&message, event, attempt, &problem);
                }
            };
            if attempt == self.attempts_max || stop.is_cancelled() {
                return given_up(&message, event, attempt, &problem);
            }
            metrics::NOTICE_RETRIES.increment();
            tracing::debug!(
                id = message.id(),
                event,
                attempt,
                problem,
                "the notice is sent again"
            );
            tokio::select! {
                () = time::sleep(spread(pause, pause / SPREAD_DIVISOR)) => {}
                () = stop.cancelled() => {}
            }
            pause = (pause * PAUSE_FACTOR).min(PAUSE_MAX);
        }
    }

    /// Makes one attempt.
    async fn send(&self, message: &Message) -> Attempt {
        let mut request = self.client.post(self.url.clone());
        for (name, value) in self.signer.headers(message) {
            request = request.header(name, value);
        }
        // The answer's body is not read.
        let status = match request.body(message.body().to_owned()).send().await {
            Ok(answer) => answer.status(),
            Err(error) => return Attempt::Failed(root_cause(&error.without_url())),
        };
        let is_temporary = matches!(
            status,
            StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_EARLY | StatusCode::TOO_MANY_REQUESTS
        );
        if status.is_success() {
            Attempt::Delivered
        } else if status.is_client_error() && !is_temporary {
            Attempt::Refused(status)
        } else {
            Attempt::Failed(format!("the receiver answered {status}"))
        }
    }
}

fn given_up(message: &Message, event: &str, attempts: u32, problem: &str) {
    tracing::warn!(
        id = message.id(),
        event,
        attempts,
        problem,
        "notice not delivered"
    );
    metrics::NOTICES.with(["failed"]).increment(1);
}
