//! One semaphore for each member, for limits on the notices of one member.

use std::{collections::HashMap, sync::Arc};

use tokio::sync::Semaphore;

use keybroker_core::key::{Tenant, UserId};

use super::Notice;

/// A semaphore for each member with a notice that waits or is being delivered.
#[derive(Debug)]
pub struct MemberSemaphores {
    pub(super) of_members: HashMap<(Tenant, UserId), Arc<Semaphore>>,
    permits: usize,
}

impl MemberSemaphores {
    /// The semaphore of each member gets this number of permits.
    pub fn new(permits: usize) -> Self {
        Self {
            of_members: HashMap::new(),
            permits,
        }
    }

    /// The semaphore of the member of a notice. The member is remembered while a permit or a copy of the reference exists.
    pub fn of(&mut self, notice: &Notice) -> &Arc<Semaphore> {
        let members = &mut self.of_members;
        if members.len() == members.capacity() {
            // Before the map grows, the members whose semaphore nobody else refers to are forgotten.
            members.retain(|_, semaphore| Arc::strong_count(semaphore) > 1);
        }
        let member = (notice.tenant.clone(), notice.user.clone());
        let new = || Arc::new(Semaphore::new(self.permits));
        members.entry(member).or_insert_with(new)
    }
}
