//! Limits connections by the number of file descriptors. The store, the audit log and the token
//! also need descriptors, so unauthenticated peers must not be able to use all of them.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Number of descriptors that are reserved for the database, the audit log, the workers and the
/// probes.
const RESERVE: u64 = 128;

/// Raises the limit of file descriptors as far as the system permits, and returns the number of
/// connections that are then possible.
pub(super) fn connections(wanted: usize) -> usize {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        tracing::warn!(%error, "cannot raise the limit of file descriptors");
    }
    let Some(descriptors) = getrlimit(Resource::Nofile).current else {
        return wanted;
    };
    let room = usize::try_from(fitting(descriptors)).unwrap_or(usize::MAX);
    if room < wanted {
        tracing::warn!(
            wanted,
            possible = room,
            descriptors,
            "the limit of file descriptors allows fewer connections than `connections_max`: raise the limit \
             (LimitNOFILE=, ulimit -n)"
        );
    }
    wanted.min(room)
}

fn fitting(descriptors: u64) -> u64 {
    // If the number of descriptors is very low, connections may use a quarter of the descriptors.
    descriptors
        .saturating_sub(RESERVE)
        .max(descriptors / 4)
        .max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn some_are_always_kept() {
        assert_eq!(fitting(4_096), 4_096 - RESERVE);
        assert_eq!(fitting(160), 40);
        assert_eq!(fitting(2), 1);
        for descriptors in 64..10_000 {
            let kept = descriptors - fitting(descriptors);
            assert!(kept >= RESERVE.min(descriptors * 3 / 4), "{descriptors}");
        }
    }
}
