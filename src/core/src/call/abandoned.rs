//! Whether the caller of a call still waits for its answer. A call runs in a separate task, which does not end with the
//! connection. Therefore the code of the call must check the flag.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

tokio::task_local! {
    static CURRENT: Abandoned;
}

/// A flag that is set when no caller waits for the answer of a call any more.
#[derive(Clone, Debug, Default)]
pub struct Abandoned(Arc<AtomicBool>);

impl Abandoned {
    /// Returns the flag of the call for which the current task works. Outside a call, the flag is
    /// never set.
    pub fn current() -> Self {
        CURRENT.try_with(Self::clone).unwrap_or_default()
    }

    /// Whether the caller has disconnected or cancelled the call, or its deadline has passed.
    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// Runs the work of a call. The work can read the flag with [`Abandoned::current`].
    pub async fn scope<T>(self, work: impl Future<Output = T>) -> T {
        CURRENT.scope(self, work).await
    }
}

/// A guard that sets a flag when it is dropped. The future that waits for the answer owns the guard.
#[derive(Debug)]
pub struct StopsWaiting(pub Abandoned);

impl Drop for StopsWaiting {
    fn drop(&mut self) {
        self.0.0.store(true, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_call_sees_its_own_flag_only() {
        let (one, other) = (Abandoned::default(), Abandoned::default());
        drop(StopsWaiting(one.clone()));
        let seen = |flag: Abandoned| flag.scope(async { Abandoned::current().is_set() });
        assert!(seen(one).await);
        assert!(!seen(other).await);
        assert!(!Abandoned::current().is_set());
    }
}
