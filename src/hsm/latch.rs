//! One login per PIN: after a refusal nothing is tried until the PIN file is another one.
//!
//! Mitigation: M15 of `THREAT_MODEL.md`.

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    sync::{Mutex, PoisonError},
};

use super::{Settings, pin};

/// What changes when a PIN file is rewritten or replaced. The front never reads the PIN itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct PinVersion(Option<(u64, u64, u64, i64, i64, i64, i64)>);

impl PinVersion {
    pub(super) fn of(settings: &Settings) -> Self {
        let file = settings.pin_file.as_deref().and_then(|path| {
            let meta = fs::metadata(pin::resolve(path).ok()?).ok()?;
            Some((
                meta.dev(),
                meta.ino(),
                meta.size(),
                meta.mtime(),
                meta.mtime_nsec(),
                meta.ctime(),
                meta.ctime_nsec(),
            ))
        });
        Self(file)
    }
}

/// Closed by a refusal, opened by another PIN file.
#[derive(Debug, Default)]
pub(super) struct PinLatch(Mutex<Option<PinVersion>>);

impl PinLatch {
    /// Closes the latch for the PIN file as it was before the attempt.
    pub(super) fn set(&self, refused: PinVersion) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(refused);
    }

    /// Whether a login may be tried with the PIN file as it is now.
    pub(super) fn may_try(&self, settings: &Settings) -> bool {
        let mut refused = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if refused.as_ref() == Some(&PinVersion::of(settings)) {
            return false;
        }
        *refused = None;
        true
    }
}
