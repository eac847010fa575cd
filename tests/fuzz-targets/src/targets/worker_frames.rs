//! Frames between front and worker. The first byte of an input is the length of the pieces in which the rest arrives.

use std::fmt::Debug;

use prost::Message;

use keybroker_worker_protocol::{
    frame::{Inbox, Outbox},
    wire::{Mac, Reply, Request, Unwrap, VerifyMac, reply::Outcome, request::Job},
};

pub(crate) const WORDS: &[&str] = &[
    "\0\0\0\0",
    "\0\0\0\x01",
    "\0\x01\0\0",
    "\0\0\x01",
    "\x08",
    "\x10",
    "\x0a",
    "\x12",
];

/// Reads a stream as requests and as replies.
///
/// # Panics
/// If the messages depend on the pieces in which they arrive, or one does not survive being written and read again.
pub fn worker_frames(input: &[u8]) -> bool {
    let Some((step, stream)) = input.split_first() else {
        return false;
    };
    let step = usize::from(*step).max(1);
    let requests = read::<Request>(stream, step);
    assert_eq!(requests, read::<Request>(stream, usize::MAX));
    let replies = read::<Reply>(stream, step);
    assert_eq!(replies, read::<Reply>(stream, usize::MAX));
    requests.1 || replies.1
}

/// The messages, and whether the stream ended well.
fn read<M: Message + Default + PartialEq + Debug>(stream: &[u8], step: usize) -> (Vec<M>, bool) {
    let (mut inbox, mut again) = (Inbox::default(), Inbox::default());
    let mut messages = Vec::new();
    let mut rest = stream;
    loop {
        match inbox.take::<M>() {
            Ok(Some(message)) => {
                let mut outbox = Outbox::default();
                outbox.push(&message);
                again.room()[..outbox.rest().len()].copy_from_slice(outbox.rest());
                again.received(outbox.rest().len());
                assert_eq!(again.take::<M>().unwrap().as_ref(), Some(&message));
                messages.push(message);
                continue;
            }
            Ok(None) => {}
            Err(_) => return (messages, false),
        }
        if rest.is_empty() {
            return (messages, true);
        }
        let room = inbox.room();
        assert!(!room.is_empty(), "there is room for what is missing");
        let count = step.min(room.len()).min(rest.len());
        room[..count].copy_from_slice(&rest[..count]);
        inbox.received(count);
        rest = &rest[count..];
    }
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let jobs = [
        Job::Mac(Mac {
            key_id: vec![1; 16],
            message: vec![2; 40],
        }),
        Job::VerifyMac(VerifyMac {
            key_id: vec![1; 16],
            message: vec![2; 40],
            mac: vec![3; 32],
        }),
        Job::Unwrap(Unwrap {
            key_id: vec![1; 16],
            message: vec![2; 40],
            mac: vec![3; 32],
            ..Unwrap::default()
        }),
    ];
    let mut requests = Outbox::default();
    for (id, job) in (1..).zip(jobs) {
        requests.push(&Request {
            id,
            deadline_ns: 9,
            job: Some(job),
        });
    }
    let mut replies = Outbox::default();
    for (id, outcome) in (1..).zip([
        Outcome::Output(vec![5; 32]),
        Outcome::Calling("C_Sign".to_owned()),
    ]) {
        replies.push(&Reply {
            id,
            outcome: Some(outcome),
            ..Reply::default()
        });
    }
    [requests, replies]
        .map(|outbox| [&[7], outbox.rest()].concat())
        .to_vec()
}
