//! The worker monitor: runs self-tests on one worker, handles its answers, and decides when the worker is lost.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{process::Child, sync::oneshot};

use keybroker_core::call::{Deadline, abandoned::Abandoned};
use keybroker_worker_protocol::{
    Work,
    wire::{FailureClass, Reply, SelfTest, reply::Outcome, request},
};

use crate::{
    Caller, Error,
    job::{Answer, Job},
    link::{Link, reap},
    start::EXIT_TIMEOUT,
};

use super::{Supervisor, machine::Loss};

/// Interval of the self-test. The front detects a lost token within twice this time.
const SELF_TEST_INTERVAL: Duration = Duration::from_secs(1);
/// The time after which an unanswered self-test has failed.
const SELF_TEST_TIMEOUT: Duration = Duration::from_secs(2);
/// Number of consecutive failed self-tests after which a worker is replaced.
const SELF_TEST_FAILURES_MAX: u32 = 3;
/// The pause before a job is repeated because the token reported that it was busy.
const BACK_OFF: Duration = Duration::from_millis(5);
/// Number of times that a job is given to another worker after the process of its worker ended.
/// Therefore a job that crashes the module can crash at most this number of workers plus one.
/// Callers cannot construct a job that crashes the RSA operation, because the RSA key is used only
/// after the verification of the MAC.
const LOSSES_MAX_ENDED: u32 = 4;
/// Number of times that a job is given to another worker after its worker hung or lost its token. The limit is lower
/// than `LOSSES_MAX_ENDED`, because callers wait for seconds after a worker hung or lost its token.
const LOSSES_MAX_GIVEN_UP: u32 = 1;

impl Supervisor {
    /// Monitors the worker until it ends, is lost or is replaced, or until the broker stops. Afterwards, answers or
    /// repeats the worker's jobs and reaps the worker's process.
    pub(super) async fn monitor(self: Arc<Self>, link: Arc<Link>, child: Child) {
        let reading = link.read_replies(|job, reply| self.take(&link, job, reply));
        let ended = tokio::select! {
            cause = reading => Some((cause, LOSSES_MAX_ENDED)),
            cause = link.given_up() => Some((cause, LOSSES_MAX_GIVEN_UP)),
            () = self.run_self_tests(&link) => Some(("its self-test loop ended".to_owned(), LOSSES_MAX_GIVEN_UP)),
            () = link.keep_flushing() => Some(("the socket of the worker failed".to_owned(), LOSSES_MAX_ENDED)),
            () = link.finished() => None,
            () = self.stop.cancelled() => None,
        };
        let Some((cause, losses_max)) = ended else {
            self.queue.remove(link.generation());
            link.close();
            reap(child, EXIT_TIMEOUT).await;
            return;
        };
        self.dismiss(&link, Loss::Ended, &cause);
        tracing::warn!(token = %self.settings.name, pid = link.pid(), generation = link.generation(), %cause, "a token worker is replaced");
        self.measures.worker_restarts.increment(1);
        self.take_back(
            link.take_jobs(),
            losses_max,
            &format!("the worker was lost: {cause}"),
        );
        link.close();
        reap(child, Duration::ZERO).await;
    }

    fn take(self: &Arc<Self>, link: &Link, job: Job, reply: Reply) {
        let spent = Duration::from_nanos(reply.token_ns);
        let tells_duration = reply.outcome.as_ref().is_some_and(tells_duration);
        let result = match reply.outcome {
            Some(Outcome::Output(bytes)) => Ok(bytes.into()),
            Some(Outcome::Failure(failure)) => {
                let class = failure.class();
                let in_time = !job.caller.deadline().remaining().is_zero();
                // A self-test is not repeated, because another worker could answer it in place of the tested worker.
                if class == FailureClass::BackOff
                    && in_time
                    && !job.has_alternative
                    && !job.work.is_self_test()
                {
                    self.try_later(job);
                    return self.queue.dispatch();
                }
                if class == FailureClass::SessionLost && !job.retried {
                    self.repeat(Job {
                        retried: true,
                        losses: 0,
                        span: tracing::Span::current(),
                        ..job
                    });
                    return;
                }
                if class == FailureClass::TokenLost
                    && in_time
                    && job.losses < LOSSES_MAX_GIVEN_UP
                    && !job.has_alternative
                    && !job.work.is_self_test()
                {
                    // The token may still be available to another worker. If no worker can use the token, the job fails
                    // with the error that callers get in the current state of the token.
                    link.give_up(failure.detail);
                    self.repeat(Job {
                        losses: job.losses + 1,
                        ..job
                    });
                    return;
                }
                tracing::debug!(parent: &job.span, pid = link.pid(), ?class, detail = %failure.detail, "token job failed");
                Err(self.error_of(link, class, failure.detail))
            }
            Some(Outcome::Ready(_) | Outcome::Calling(_)) | None => {
                link.give_up("the worker sent an unexpected reply");
                Err(self.down("the worker sent an unexpected reply"))
            }
        };
        if link.note_objects(&job) {
            tracing::info!(
                token = %self.settings.name, pid = link.pid(), generation = link.generation(),
                "a token worker has made many session objects and is replaced"
            );
            link.outdate();
        }
        if !job.work.is_self_test() {
            self.measures.operation.record(spent);
        }
        if tells_duration {
            self.queue.served(&job);
        }
        job.answer(result, spent);
        self.queue.dispatch();
    }

    /// Translates a failure into an error for the caller, and marks the worker as lost if the failure concerns the
    /// worker.
    fn error_of(&self, link: &Link, class: FailureClass, detail: String) -> Error {
        match class {
            FailureClass::MacRefused => Error::MacRefused,
            FailureClass::Damaged => Error::Damaged(detail),
            FailureClass::Recipient => Error::Recipient(detail),
            FailureClass::Deadline | FailureClass::RecipientDeadline => Error::Deadline,
            FailureClass::BackOff => self.down(&format!("the token is busy: {detail}")),
            FailureClass::Untrusted => {
                link.give_up(detail.clone());
                self.dismiss(link, Loss::Untrusted, &detail);
                Error::Untrusted(detail)
            }
            FailureClass::UnknownKey => Error::Untrusted(detail),
            FailureClass::Unspecified
            | FailureClass::SessionLost
            | FailureClass::TokenLost
            | FailureClass::KeyMissing
            | FailureClass::Login
            | FailureClass::Pin
            | FailureClass::Configuration => {
                link.give_up(detail.clone());
                self.down(&detail)
            }
        }
    }

    /// Queues a job again. If no worker is ready or expected, the job fails with the error that callers get in the
    /// current state of the token.
    fn repeat(&self, job: Job) {
        self.queue.push_again(job);
        self.answer_without_workers();
    }

    fn try_later(self: &Arc<Self>, job: Job) {
        let supervisor = Arc::clone(self);
        self.tasks.spawn(async move {
            tokio::time::sleep(BACK_OFF).await;
            supervisor.repeat(job);
        });
    }

    /// Runs a self-test every second. Self-tests bypass the queue, because a full queue does not mean that the token
    /// has failed.
    async fn run_self_tests(&self, link: &Link) {
        let mut failures = 0;
        loop {
            tokio::time::sleep(SELF_TEST_INTERVAL).await;
            if link.is_wedged() {
                link.give_up("a job is still in the PKCS#11 module long after its deadline");
                return std::future::pending().await;
            }
            let (done, answer) = oneshot::channel();
            link.assign(Job {
                work: Work::new(request::Job::SelfTest(SelfTest {})),
                caller: Caller::background(Deadline::after(SELF_TEST_TIMEOUT)),
                done,
                abandoned: Abandoned::default(),
                queued: Instant::now(),
                waited: Duration::ZERO,
                has_alternative: false,
                retried: true,
                losses: 0,
                span: tracing::Span::none(),
            });
            match tokio::time::timeout(SELF_TEST_TIMEOUT, answer).await {
                Ok(Ok(Answer { result: Ok(_), .. })) => {
                    failures = 0;
                    self.note_self_test();
                }
                // In most cases, `error_of` has already marked the worker as lost.
                Ok(Ok(Answer {
                    result: Err(error), ..
                })) => {
                    tracing::warn!(token = %self.settings.name, %error, pid = link.pid(), "self-test failed");
                    failures += 1;
                    if failures >= SELF_TEST_FAILURES_MAX {
                        link.give_up(format!(
                            "the worker's self-test failed {failures} times: {error}"
                        ));
                    }
                }
                Ok(Err(_)) => return std::future::pending().await,
                Err(_) => {
                    link.give_up("the worker did not answer a self-test in time");
                    return std::future::pending().await;
                }
            }
        }
    }
}

/// Whether the time of a job tells how long later jobs of its kind take. The estimate of this time is the same for all
/// callers, so a caller must not be able to raise it.
///
/// The worker repeats a job that the token refuses, so the time of a refused job is many times that of other jobs. A job
/// that ran out of time shows that the token is slow, unless the worker repeated it because the token refused the public
/// key of a recipient, which the caller chooses.
fn tells_duration(outcome: &Outcome) -> bool {
    match outcome {
        Outcome::Output(_) => true,
        Outcome::Failure(failure) => failure.class() == FailureClass::Deadline,
        Outcome::Ready(_) | Outcome::Calling(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use keybroker_core::{envelope::Algorithm, key::WrappingKeyId};
    use keybroker_worker_protocol::wire::{Failure, Release, Unwrap};

    use super::*;
    use crate::{
        queue::{Kind, Offer, Operation},
        supervisor::testing,
    };

    const KEY: WrappingKeyId = WrappingKeyId::from_bytes([7; 16]);
    /// Time for which each job occupied its session.
    const OCCUPIED: Duration = Duration::from_millis(500);

    fn caller() -> Caller {
        Caller::principal("ada", Deadline::after(Duration::from_mins(1)))
    }

    fn job(work: request::Job) -> Job {
        let (done, _answer) = oneshot::channel();
        Job {
            work: Work::new(work),
            caller: caller(),
            done,
            abandoned: Abandoned::default(),
            queued: Instant::now().checked_sub(OCCUPIED).unwrap(),
            waited: Duration::ZERO,
            has_alternative: false,
            retried: true,
            losses: LOSSES_MAX_GIVEN_UP,
            span: tracing::Span::none(),
        }
    }

    fn unwrap() -> Unwrap {
        Unwrap {
            key_id: KEY.as_bytes().to_vec(),
            ..Unwrap::default()
        }
    }

    fn release() -> request::Job {
        request::Job::Release(Release {
            envelope: Some(unwrap()),
            ..Release::default()
        })
    }

    fn failure(class: FailureClass) -> Outcome {
        Outcome::Failure(Failure {
            class: class.into(),
            detail: String::new(),
        })
    }

    /// The expected time of a job of this kind, after a job ended with this outcome.
    fn expected_after(work: request::Job, outcome: Outcome, operation: Operation) -> Duration {
        let supervisor = testing::idle("one", &[KEY]);
        let link = supervisor.worker_for_test(1, 1, Algorithm::RsaOaepSha256);
        let reply = Reply {
            outcome: Some(outcome),
            ..Reply::default()
        };
        supervisor.take(&link, job(work), reply);
        let offer = supervisor.queue.offer(Kind::new(KEY, operation), &caller());
        match offer {
            Offer::InTime(expected) => expected,
            other => panic!("{other:?}"),
        }
    }

    /// Callers can send jobs that fail. The time of these jobs must not refuse the jobs of others.
    #[tokio::test]
    async fn only_jobs_that_tell_the_duration_are_measured() {
        for (work, outcome, operation, is_measured) in [
            (
                release(),
                Outcome::Output(vec![1]),
                Operation::Release,
                true,
            ),
            (
                release(),
                failure(FailureClass::Recipient),
                Operation::Release,
                false,
            ),
            (
                release(),
                failure(FailureClass::RecipientDeadline),
                Operation::Release,
                false,
            ),
            (
                release(),
                failure(FailureClass::Deadline),
                Operation::Release,
                true,
            ),
            (
                request::Job::Unwrap(unwrap()),
                failure(FailureClass::Damaged),
                Operation::Unwrap,
                false,
            ),
            (
                request::Job::Unwrap(unwrap()),
                failure(FailureClass::MacRefused),
                Operation::Unwrap,
                false,
            ),
            (
                request::Job::Unwrap(unwrap()),
                failure(FailureClass::Deadline),
                Operation::Unwrap,
                true,
            ),
        ] {
            let what = format!("{outcome:?}");
            let expected = expected_after(work, outcome, operation);
            assert_eq!(expected >= OCCUPIED, is_measured, "{what}: {expected:?}");
        }
    }
}
