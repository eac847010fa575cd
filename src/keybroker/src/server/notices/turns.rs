//! Limits how many notices are sent at the same time.
//!
//! An attempt to send a notice needs a turn. A notice that waits for its next attempt has none, so that notices that fail do not hold up
//! the others. One member can have only a part of the turns at the same time, so that an attempt for another member begins soon even if
//! the receiver answers slowly about one member.
//!
//! Mitigation: M29 of `THREAT_MODEL.md`.

use std::{collections::HashMap, sync::Arc};

use tokio::sync::{Semaphore, SemaphorePermit};

use keybroker_broker::Notice;
use keybroker_core::key::{Tenant, UserId};

/// Notices that are sent at the same time.
pub(super) const TURNS_MAX: usize = 16;
/// Notices of one member that are sent at the same time.
pub(super) const MEMBER_TURNS_MAX: usize = 4;

/// The turns of all members.
#[derive(Debug)]
pub(super) struct Turns {
    all: Arc<Semaphore>,
    of_members: HashMap<(Tenant, UserId), Arc<Semaphore>>,
}

impl Default for Turns {
    fn default() -> Self {
        Self {
            all: Arc::new(Semaphore::new(TURNS_MAX)),
            of_members: HashMap::new(),
        }
    }
}

impl Turns {
    /// The turns for the attempts of one notice.
    pub(super) fn of(&mut self, notice: &Notice) -> MemberTurns {
        if self.of_members.len() == self.of_members.capacity() {
            // Before the map grows, the members without a waiting notice are forgotten: each notice refers to the turns of its member.
            self.of_members
                .retain(|_, turns| Arc::strong_count(turns) > 1);
        }
        let member = (notice.tenant.clone(), notice.user.clone());
        let of_member = self
            .of_members
            .entry(member)
            .or_insert_with(|| Arc::new(Semaphore::new(MEMBER_TURNS_MAX)));
        MemberTurns {
            all: Arc::clone(&self.all),
            of_member: Arc::clone(of_member),
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
    pub(super) async fn take(&self) -> Option<[SemaphorePermit<'_>; 2]> {
        // The semaphores are never closed, so there is always a turn.
        let of_member = self.of_member.acquire().await.ok()?;
        let of_all = self.all.acquire().await.ok()?;
        Some([of_member, of_all])
    }
}
