//! Limits how many notices are sent at the same time.
//!
//! An attempt to send a notice needs a turn. A notice that waits for its next attempt has none, so that notices that fail do not hold up
//! the others. One member can have only a part of the turns at the same time, so that an attempt for another member begins soon even if
//! the receiver answers slowly about one member.
//!
//! Mitigation: M29 of `THREAT_MODEL.md`.

use std::sync::Arc;

use tokio::sync::{Semaphore, SemaphorePermit};

use keybroker_broker::{MemberSemaphores, Notice};

/// Notices that are sent at the same time.
pub(super) const TURNS_MAX: usize = 16;
/// Notices of one member that are sent at the same time.
pub(super) const MEMBER_TURNS_MAX: usize = 4;

/// The turns of all members.
#[derive(Debug)]
pub(super) struct Turns {
    all: Arc<Semaphore>,
    of_members: MemberSemaphores,
}

impl Default for Turns {
    fn default() -> Self {
        Self {
            all: Arc::new(Semaphore::new(TURNS_MAX)),
            of_members: MemberSemaphores::new(MEMBER_TURNS_MAX),
        }
    }
}

impl Turns {
    /// The turns for the attempts of one notice.
    pub(super) fn of(&mut self, notice: &Notice) -> MemberTurns {
        MemberTurns {
            all: Arc::clone(&self.all),
            of_member: Arc::clone(self.of_members.of(notice)),
        }
    }
}

/// The turns of one member.
#[derive(Debug)]
pub(super) struct MemberTurns {
    all: Arc<Semaphore>,
    of_member: Arc<Semaphore>,
}

impl MemberTurns {
    /// Waits for a turn, which lasts until the value is dropped.
    pub(super) async fn take(&self) -> [SemaphorePermit<'_>; 2] {
        const NEVER_CLOSED: &str = "the semaphores are never closed";
        [
            self.of_member.acquire().await.expect(NEVER_CLOSED),
            self.all.acquire().await.expect(NEVER_CLOSED),
        ]
    }
}
