//! The rows that may be moved from a compromised wrapping key.
//!
//! A person who knows the private half of a compromised key can also make rows that verify. So only those rows are moved that the broker
//! made itself, or that were in the database before the compromise: a command lists the digests of their envelopes, from verified audit
//! logs and from backups. The list is in the state directory, which only the broker's user can write.
//!
//! Mitigation: M22 of `THREAT_MODEL.md`.

use std::collections::BTreeSet;

use aws_lc_rs::digest;

use keybroker_core::{
    key::WrappingKeyId,
    state::{self, StateDirectory},
};

/// SHA-256 of an envelope.
pub type EnvelopeDigest = [u8; digest::SHA256_OUTPUT_LEN];

/// Largest list, in bytes: two million rows.
const LIST_BYTES_MAX: u64 = 64 << 20;

/// The digests of the envelopes that may be moved from one wrapping key.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Listed(BTreeSet<EnvelopeDigest>);

/// The name of the state file of a wrapping key.
fn fact_of(key: WrappingKeyId) -> String {
    format!("listed-{key}")
}

impl Listed {
    /// The list of these digests.
    pub fn new(digests: impl IntoIterator<Item = EnvelopeDigest>) -> Self {
        Self(digests.into_iter().collect())
    }

    /// The digest of an envelope.
    pub fn digest_of(envelope: &[u8]) -> EnvelopeDigest {
        let digest = digest::digest(&digest::SHA256, envelope);
        let mut bytes = EnvelopeDigest::default();
        bytes.copy_from_slice(digest.as_ref());
        bytes
    }

    /// The number of listed rows.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether no row is listed.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether an envelope is listed.
    pub(super) fn has(&self, envelope: &[u8]) -> bool {
        self.0.contains(&Self::digest_of(envelope))
    }

    /// Stores the list of a wrapping key, and replaces an earlier list.
    pub fn write(&self, state: &StateDirectory, key: WrappingKeyId) -> Result<(), state::Error> {
        let bytes = self.0.iter().flatten().copied().collect::<Vec<u8>>();
        state.write_up_to(&fact_of(key), &bytes, LIST_BYTES_MAX)
    }

    /// Reads the list of a wrapping key. Returns `None` if there is no list.
    pub(super) fn read(
        state: &StateDirectory,
        key: WrappingKeyId,
    ) -> Result<Option<Self>, state::Error> {
        let found = state.read_up_to(&fact_of(key), LIST_BYTES_MAX)?;
        // An incomplete digest at the end lists no row.
        let digests = |bytes: Vec<u8>| {
            let chunks = bytes.chunks_exact(digest::SHA256_OUTPUT_LEN);
            Self::new(chunks.filter_map(|chunk| chunk.try_into().ok()))
        };
        Ok(found.map(digests))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stored_list_has_the_listed_envelopes_and_no_other() {
        let folder = tempfile::tempdir().unwrap();
        let state = StateDirectory::below(folder.path());
        let key = WrappingKeyId::from_bytes([1; 16]);
        assert_eq!(Listed::read(&state, key).unwrap(), None);
        let listed = Listed::new([b"one".as_slice(), b"two", b"one"].map(Listed::digest_of));
        assert_eq!(listed.len(), 2);
        listed.write(&state, key).unwrap();
        let read = Listed::read(&state, key).unwrap().unwrap();
        assert_eq!(read, listed);
        assert!(read.has(b"one") && read.has(b"two") && !read.has(b"three"));
        let other = WrappingKeyId::from_bytes([2; 16]);
        assert_eq!(Listed::read(&state, other).unwrap(), None);
    }
}
