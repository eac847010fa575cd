//! Tests the effects on callers when workers start and are lost.

use std::thread;

use tokio::sync::oneshot;

use keybroker_core::call::abandoned::Abandoned;
use keybroker_worker_protocol::{
    Work,
    wire::{SelfTest, VerifyMac, request},
};

use super::*;

fn link(generation: u64) -> Arc<Link> {
    testing::link(generation, 1)
}

fn idle() -> Arc<Supervisor> {
    let settings = toml::from_str("module = \"/none.so\"").unwrap();
    let state = StateDirectory::below(std::path::Path::new("/none"));
    Supervisor::idle(settings, Vec::new(), PathBuf::from("/none"), state)
}

fn serving(supervisor: &Supervisor) -> Serving {
    supervisor.serving.borrow().clone()
}

fn job(work: request::Job) -> (Job, oneshot::Receiver<crate::job::Answer>) {
    let (done, answer) = oneshot::channel();
    let job = Job {
        work: Work::new(work),
        caller: crate::Caller::background(Deadline::after(Duration::from_mins(1))),
        done,
        abandoned: Abandoned::default(),
        queued: Instant::now(),
        waited: Duration::ZERO,
        has_alternative: false,
        retried: false,
        losses: 0,
        span: tracing::Span::none(),
    };
    (job, answer)
}

/// One worker is lost while another worker becomes ready. The token is never reported as unavailable while a worker is
/// ready.
#[tokio::test]
async fn a_worker_that_is_there_is_never_called_down() {
    let supervisor = idle();
    let links = [link(1), link(2)];
    thread::scope(|scope| {
        for link in &links {
            let supervisor = &supervisor;
            scope.spawn(move || {
                for _ in 0..5_000 {
                    supervisor.admit(link);
                    assert_eq!(serving(supervisor), Serving::Up);
                    supervisor.dismiss(link, Loss::Untrusted, "wrong answer");
                }
            });
        }
    });
    assert_eq!(
        serving(&supervisor),
        Serving::Untrusted("wrong answer".to_owned())
    );
}

#[tokio::test]
async fn the_first_cause_stays() {
    let supervisor = idle();
    let link = link(1);
    supervisor.admit(&link);
    supervisor.dismiss(&link, Loss::Untrusted, "a self-test was answered wrongly");
    supervisor.dismiss(&link, Loss::Ended, "it ended");
    assert_eq!(
        serving(&supervisor),
        Serving::Untrusted("a self-test was answered wrongly".to_owned())
    );
}

/// A worker that becomes ready while the broker stops changes nothing.
#[tokio::test]
async fn a_stop_is_final() {
    let supervisor = idle();
    supervisor
        .drain_and_stop(Deadline::after(Duration::ZERO))
        .await;
    supervisor.admit(&link(1));
    assert_eq!(serving(&supervisor), Serving::Down(STOPPING.to_owned()));
}

/// A job is given to the next worker only a limited number of times, because the job may crash the workers.
#[tokio::test]
async fn a_job_outlasts_two_lost_workers_and_no_more() {
    let supervisor = idle();
    let (first, mut answer) = job(request::Job::VerifyMac(VerifyMac::default()));
    supervisor.admit(&link(0));
    let mut jobs = vec![first];
    for generation in 1..=2 {
        let next = link(generation);
        supervisor.take_back(std::mem::take(&mut jobs), 2, "it ended");
        supervisor.admit(&next);
        supervisor.queue.dispatch();
        for link in supervisor.queue.links() {
            jobs.extend(link.take_jobs());
        }
        assert_eq!(jobs.len(), 1, "the job was not passed on");
        assert!(answer.try_recv().is_err(), "it was answered");
    }
    supervisor.take_back(jobs, 2, "it ended");
    let result = answer.await.unwrap().result;
    assert!(matches!(result, Err(Error::Down { .. })), "{result:?}");
}

/// A self-test is not given to another worker, because it tests the worker that was lost.
#[tokio::test]
async fn a_self_test_is_not_passed_on() {
    let supervisor = idle();
    supervisor.admit(&link(1));
    let (self_test, answer) = job(request::Job::SelfTest(SelfTest {}));
    supervisor.take_back(vec![self_test], 2, "it ended");
    assert!(answer.await.unwrap().result.is_err());
}
