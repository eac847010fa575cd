//! Refusals before authentication, counted per peer and minute: a stranger leaves one audit entry a minute, however often
//! they knock, and cannot fill the disk.
//!
//! Mitigation: M3 of `THREAT_MODEL.md`.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Mutex, PoisonError},
};

use futures_util::future::join_all;

use crate::{
    audit::{Entry, EntryKind, Outcome},
    error::Reason,
};

use super::Broker;

/// Peers counted apart in one minute; those beyond share one entry.
const PEERS_MAX: usize = 1_024;

#[derive(Debug, Default)]
pub(super) struct Refusals(Mutex<HashMap<(Option<IpAddr>, Reason), u64>>);

impl Refusals {
    fn add(&self, peer: Option<IpAddr>, reason: Reason, count: u64) {
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let known = counts.len() < PEERS_MAX || counts.contains_key(&(peer, reason));
        let key = (peer.filter(|_| known), reason);
        let total = counts.entry(key).or_default();
        *total = total.saturating_add(count);
    }

    fn take(&self) -> HashMap<(Option<IpAddr>, Reason), u64> {
        std::mem::take(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Broker {
    /// Counts a refusal of somebody who is not authenticated.
    pub fn note_refusal(&self, peer: IpAddr, reason: Reason) {
        metrics::counter!("keybroker_refusals_total", "reason" => reason.as_str()).increment(1);
        self.refusals.add(Some(peer), reason, 1);
    }

    /// Writes one entry per peer and reason. What cannot be written is counted on. All are asked for at once, so that a disk
    /// that hangs costs one wait and not one for each.
    pub(super) async fn flush_refusals(&self) {
        let counted = self.refusals.take().into_iter();
        join_all(counted.map(async |((peer, reason), count)| {
            let mut entry = Entry::new(EntryKind::Decision, "connection.refused", Outcome::Denied);
            entry.reason = Some(reason);
            entry.peer = Some(peer.map_or_else(|| "others".to_owned(), |peer| peer.to_string()));
            entry.count = Some(count);
            if self.audit.append(entry).await.is_err() {
                self.refusals.add(peer, reason, count);
            }
        }))
        .await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peers_beyond_the_maximum_share_one_count() {
        let refusals = Refusals::default();
        for number in 0..2_000_u32 {
            let peer = IpAddr::from(number.to_be_bytes());
            refusals.add(Some(peer), Reason::Credential, 1);
            refusals.add(Some(peer), Reason::Credential, 1);
        }
        let counts = refusals.take();
        assert_eq!(counts.len(), PEERS_MAX + 1);
        assert_eq!(counts.values().sum::<u64>(), 4_000);
        assert_eq!(counts[&(None, Reason::Credential)], 2 * (2_000 - 1_024));
        assert!(refusals.take().is_empty());
    }
}
