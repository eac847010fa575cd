//! What the workers that come and go do to the state.

use std::{os::unix::net::UnixStream as StdUnixStream, thread};

use tokio::net::UnixStream;

use super::*;

fn link(generation: u64) -> Arc<Link> {
    let (ours, _theirs) = StdUnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    Link::new(generation, 1, 1, UnixStream::from_std(ours).unwrap())
}

fn idle() -> Arc<Supervisor> {
    let settings = toml::from_str("module = \"/none.so\"").unwrap();
    Supervisor::idle(settings, Vec::new(), PathBuf::from("/none"))
}

/// One worker is lost while another comes: whoever is there, the state knows of.
#[tokio::test]
async fn a_worker_that_is_there_is_never_called_down() {
    let supervisor = idle();
    let links = [link(1), link(2)];
    thread::scope(|scope| {
        for link in &links {
            let supervisor = &supervisor;
            scope.spawn(move || {
                for _ in 0..5_000 {
                    supervisor.welcome(link);
                    assert_eq!(*supervisor.serving.borrow(), Serving::Up);
                    supervisor.dismiss(link, &Serving::Down("lost".to_owned()));
                }
            });
        }
    });
    assert_eq!(
        *supervisor.serving.borrow(),
        Serving::Down("lost".to_owned())
    );
}

/// What was said of a worker when it was let go is not said again in other words when it has ended.
#[tokio::test]
async fn the_first_cause_stays() {
    let supervisor = idle();
    let link = link(1);
    supervisor.welcome(&link);
    let wrong = Serving::Untrusted("a canary was answered wrongly".to_owned());
    supervisor.dismiss(&link, &wrong);
    supervisor.dismiss(&link, &Serving::Down("it ended".to_owned()));
    assert_eq!(*supervisor.serving.borrow(), wrong);
}

/// A worker that becomes ready while the broker stops opens nothing again.
#[tokio::test]
async fn a_stop_is_final() {
    let supervisor = idle();
    supervisor
        .drain_and_stop(Deadline::after(Duration::ZERO))
        .await;
    supervisor.welcome(&link(1));
    assert_eq!(
        *supervisor.serving.borrow(),
        Serving::Down(STOPPING.to_owned())
    );
}
