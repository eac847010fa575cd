//! One login per PIN: after a refusal nothing is tried until the PIN file is another one.
//!
//! Mitigation: M15 of `THREAT_MODEL.md`.

use std::{
    fs::{self, Metadata},
    os::unix::fs::MetadataExt as _,
    sync::{Mutex, PoisonError},
};

use super::{Settings, pin};

/// What changes when a PIN file is rewritten or replaced; empty for a file that is not there. The front never reads the
/// PIN itself: the worker that did says which file it was.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct PinVersion(String);

impl PinVersion {
    /// Of the file as it is now.
    fn of(settings: &Settings) -> Self {
        let path = settings.pin_file.as_deref();
        path.and_then(|path| fs::metadata(pin::resolve(path).ok()?).ok())
            .map_or_else(Self::default, |meta| Self::from_metadata(&meta))
    }

    pub(super) fn from_metadata(meta: &Metadata) -> Self {
        Self(format!(
            "{}:{}:{}:{}.{:09}:{}.{:09}",
            meta.dev(),
            meta.ino(),
            meta.size(),
            meta.mtime(),
            meta.mtime_nsec(),
            meta.ctime(),
            meta.ctime_nsec(),
        ))
    }

    pub(super) fn from_wire(text: String) -> Self {
        Self(text)
    }

    pub(super) fn into_wire(self) -> String {
        self.0
    }
}

/// Closed by a refusal, opened by another PIN file.
#[derive(Debug, Default)]
pub(super) struct PinLatch(Mutex<Option<PinVersion>>);

impl PinLatch {
    /// Closes the latch for the PIN file that was refused.
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

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn write(path: &std::path::Path, text: &str) {
        fs::write(path, text).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
    }

    fn settings(pin_file: &std::path::Path) -> Settings {
        toml::from_str(&format!(
            "module = \"/none.so\"\npin_file = {:?}\n",
            pin_file.display().to_string()
        ))
        .unwrap()
    }

    /// The file is replaced after the front looked and before the worker reads: what was refused is the new one.
    #[test]
    fn the_file_that_was_read_is_the_one_that_is_latched() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pin");
        let settings = settings(&path);
        let latch = PinLatch::default();
        write(&path, "1234");
        assert!(latch.may_try(&settings));
        write(&folder.path().join("next"), "5678");
        fs::rename(folder.path().join("next"), &path).unwrap();
        let (pin, read) = pin::read(&path);
        assert!(pin.is_ok());
        latch.set(PinVersion::from_wire(read.into_wire()));
        assert!(
            !latch.may_try(&settings),
            "the PIN that was refused is tried again"
        );
        write(&folder.path().join("next"), "9012");
        fs::rename(folder.path().join("next"), &path).unwrap();
        assert!(latch.may_try(&settings));
    }

    #[test]
    fn a_missing_file_is_latched_until_it_is_there() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pin");
        let settings = settings(&path);
        let latch = PinLatch::default();
        let (pin, read) = pin::read(&path);
        assert!(pin.is_err());
        latch.set(read);
        assert!(!latch.may_try(&settings));
        write(&path, "1234");
        assert!(latch.may_try(&settings));
    }
}
