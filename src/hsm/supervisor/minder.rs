//! Minds one worker from its start to its end.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{process::Child, sync::oneshot};

use crate::{
    call::Deadline,
    hsm::{
        Error, Serving,
        link::{Link, reap},
        queue::{Answer, Job},
        start::EXIT_TIMEOUT,
        wire::{Canary, FailureClass, Reply, reply::Outcome, request},
        work::Work,
    },
};

use super::Supervisor;

/// How often the canary is asked; a token that is gone is noticed within twice this time.
const CANARY_INTERVAL: Duration = Duration::from_secs(1);
/// A canary that is not back by then has failed.
const CANARY_TIMEOUT: Duration = Duration::from_secs(2);
/// A worker whose canary does not pass so many times in a row is replaced.
const CANARY_FAILURES_MAX: u32 = 3;
/// How long a token that said it is busy is left alone.
const BACK_OFF: Duration = Duration::from_millis(5);

impl Supervisor {
    /// Serves until the worker ends, is given up, or the broker stops; then answers what it held and reaps it.
    pub(super) async fn mind(self: Arc<Self>, link: Arc<Link>, child: Child) {
        let reading = link.read_replies(|job, reply| self.take(&link, job, reply));
        let cause = tokio::select! {
            cause = reading => Some(cause),
            cause = link.given_up() => Some(cause),
            () = self.ask_canaries(&link) => Some("its canary loop ended".to_owned()),
            () = link.keep_flushing() => Some("its socket failed".to_owned()),
            () = self.stop.cancelled() => None,
        };
        let Some(cause) = cause else {
            self.queue.remove(link.generation());
            link.close();
            return reap(child, EXIT_TIMEOUT).await;
        };
        self.dismiss(&link, &Serving::Down(cause.clone()));
        tracing::warn!(pid = link.pid(), generation = link.generation(), %cause, "a token worker is replaced");
        metrics::counter!("keybroker_token_worker_restarts_total").increment(1);
        // Not tried again on another worker: the job may be what killed this one.
        let error = Error::Down(format!("the worker was lost: {cause}"));
        for job in link.take_jobs() {
            job.answer(Err(error.clone()), Duration::ZERO);
        }
        link.close();
        reap(child, Duration::ZERO).await;
    }

    fn take(self: &Arc<Self>, link: &Link, job: Job, reply: Reply) {
        let spent = Duration::from_nanos(reply.token_ns);
        let result = match reply.outcome {
            Some(Outcome::Output(bytes)) => Ok(bytes.into()),
            Some(Outcome::Failure(failure)) => {
                let class = failure.class();
                let in_time = !job.deadline.remaining().is_zero();
                // Never a canary: another worker would answer for this one.
                if class == FailureClass::BackOff && in_time && !job.work.is_canary() {
                    self.try_later(job);
                    return self.queue.dispatch();
                }
                if class == FailureClass::SessionLost && !job.retried {
                    self.queue.push_again(Job {
                        retried: true,
                        ..job
                    });
                    return;
                }
                Err(self.error_of(link, class, failure.detail))
            }
            Some(Outcome::Ready(_)) | None => {
                link.give_up("a reply that answers nothing");
                Err(Error::Down("the worker answered nonsense".to_owned()))
            }
        };
        if !job.work.is_canary() {
            metrics::histogram!("keybroker_token_seconds").record(spent);
            self.queue.served(spent);
        }
        job.answer(result, spent);
        self.queue.dispatch();
    }

    /// What a failure means for the caller, and what it does to the worker.
    fn error_of(&self, link: &Link, class: FailureClass, detail: String) -> Error {
        match class {
            FailureClass::MacRefused => Error::MacRefused,
            FailureClass::Damaged => Error::Damaged(detail),
            FailureClass::Deadline => Error::Deadline,
            FailureClass::BackOff => Error::Down(format!("the token is busy: {detail}")),
            FailureClass::Untrusted | FailureClass::Pin => {
                link.give_up(detail.clone());
                self.dismiss(link, &Serving::Untrusted(detail.clone()));
                Error::Untrusted(detail)
            }
            FailureClass::UnknownKey => Error::Untrusted(detail),
            FailureClass::Unspecified
            | FailureClass::SessionLost
            | FailureClass::TokenLost
            | FailureClass::KeyMissing
            | FailureClass::Configuration => {
                link.give_up(detail.clone());
                Error::Down(detail)
            }
        }
    }

    fn try_later(self: &Arc<Self>, job: Job) {
        let supervisor = Arc::clone(self);
        self.tasks.spawn(async move {
            tokio::time::sleep(BACK_OFF).await;
            supervisor.queue.push_again(job);
        });
    }

    /// Asks for a canary each second, past the queue: a queue that is full says nothing of the token.
    async fn ask_canaries(&self, link: &Link) {
        let mut failures = 0;
        loop {
            tokio::time::sleep(CANARY_INTERVAL).await;
            if link.is_wedged() {
                link.give_up("a job is stuck in the module long past its deadline");
                return std::future::pending().await;
            }
            let (done, answer) = oneshot::channel();
            link.assign(Job {
                work: Work::new(request::Job::Canary(Canary {})),
                deadline: Deadline::after(CANARY_TIMEOUT),
                done,
                queued: Instant::now(),
                waited: Duration::ZERO,
                retried: true,
            });
            match tokio::time::timeout(CANARY_TIMEOUT, answer).await {
                Ok(Ok(Answer { result: Ok(_), .. })) => {
                    failures = 0;
                    self.note_canary();
                }
                // Most causes have ended the worker already, in `error_of`.
                Ok(Ok(Answer {
                    result: Err(error), ..
                })) => {
                    tracing::warn!(%error, pid = link.pid(), "canary");
                    failures += 1;
                    if failures >= CANARY_FAILURES_MAX {
                        link.give_up(format!("its canary did not pass {failures} times: {error}"));
                    }
                }
                Ok(Err(_)) => return std::future::pending().await,
                Err(_) => {
                    link.give_up("its canary did not come back in time");
                    return std::future::pending().await;
                }
            }
        }
    }
}
