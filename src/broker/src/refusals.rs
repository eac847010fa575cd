//! Counts refusals before authentication per network and minute. Therefore an unauthenticated caller with many
//! addresses cannot fill the audit log or the log.
//!
//! Counts are written to the audit log once a minute. In addition, the counts are stored in the state directory once a
//! second. Therefore a broker that is killed loses the counts of at most one second.
//!
//! Mitigation: M3 of `THREAT_MODEL.md`.

use std::{
    collections::HashMap,
    fmt,
    net::{IpAddr, SocketAddr},
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use futures_util::future::join_all;
use serde::{Deserialize, Serialize};

use crate::limits::{Network, shortened};
use keybroker_audit::{Entry, EntryKind, Outcome};
use keybroker_core::{
    call::CallId,
    error::{Error, Reason, chain},
    metrics,
    state::StateDirectory,
};

use super::Broker;

/// Largest number of networks that are counted separately within a minute. Networks beyond this number share one audit
/// entry for each reason. An audit entry has about 300 bytes, so an hour of refusals adds less than 5 MB to the audit
/// log.
const NETWORKS_MAX: usize = 256;
/// Name of the state file in the previous version of Keybroker, without the name of the instance.
const LEGACY_FACT: &str = "refusals";

type Counts = HashMap<(Option<Network>, Refused), u64>;

/// The reason for a refusal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Refused {
    reason: Reason,
    /// Cause of a failed handshake; `None` for a refused call.
    cause: Option<&'static str>,
}

#[derive(Debug)]
pub(super) struct Refusals {
    counts: Mutex<Counts>,
    /// Whether the counts changed since they were last stored.
    is_changed: AtomicBool,
    state: StateDirectory,
    /// Name of the state file. The name contains the broker instance, because two brokers may share the state
    /// directory.
    fact: String,
}

/// One count as it is stored in the state directory.
#[derive(Debug, Serialize, Deserialize)]
struct Kept {
    /// The network; `None` for the count that several networks share.
    network: Option<Network>,
    reason: String,
    /// The previous version of Keybroker stored no causes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    cause: Option<String>,
    count: u64,
}

impl Refusals {
    pub(super) fn new(state: StateDirectory, instance: &str) -> Self {
        Self {
            counts: Mutex::default(),
            is_changed: AtomicBool::new(false),
            state,
            fact: format!("refusals-{instance}"),
        }
    }

    fn counts(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, network: Option<Network>, refused: Refused, count: u64) {
        let mut counts = self.counts();
        let is_known = counts.len() < NETWORKS_MAX || counts.contains_key(&(network, refused));
        let key = (network.filter(|_| is_known), refused);
        let total = counts.entry(key).or_default();
        *total = total.saturating_add(count);
        drop(counts);
        self.is_changed.store(true, Ordering::Relaxed);
    }

    fn take(&self) -> Counts {
        std::mem::take(&mut self.counts())
    }

    /// Writes the counts to the state directory if they have changed.
    fn keep(&self) {
        if !self.is_changed.swap(false, Ordering::Relaxed) {
            return;
        }
        let kept: Vec<Kept> = self
            .counts()
            .iter()
            .map(|((network, refused), count)| Kept {
                network: *network,
                reason: refused.reason.as_str().to_owned(),
                cause: refused.cause.map(str::to_owned),
                count: *count,
            })
            .collect();
        if let Err(error) = self.state.write_json(&self.fact, &kept) {
            let error = chain(&error);
            tracing::warn!(
                %error,
                "cannot store the counted refusals in the state directory; the broker keeps the counts in memory until \
                 the next audit entry"
            );
        }
    }

    /// Loads the counts of a run that was killed. Also loads the file of the previous version of
    /// Keybroker, whose name does not contain the instance.
    fn take_over(&self) {
        for fact in [&self.fact, LEGACY_FACT] {
            match self.state.read_json::<Vec<Kept>>(fact) {
                Ok(Some(kept)) => self.add_all(&kept),
                Ok(None) => {}
                Err(error) => {
                    let error = chain(&error);
                    tracing::warn!(%error, "cannot read the refusals that the previous run counted");
                }
            }
        }
        // The counts are stored before the old file is removed. If the process is killed between storing and removal,
        // the refusals are counted twice, but no refusal is lost.
        self.keep();
        if let Err(error) = self.state.remove(LEGACY_FACT) {
            let error = chain(&error);
            tracing::warn!(
                %error,
                "cannot remove the file with the refusals that the previous version counted; the next start counts these \
                 refusals again"
            );
        }
    }

    fn add_all(&self, kept: &[Kept]) {
        for one in kept {
            if let Some(reason) = Reason::parse(&one.reason) {
                let mut known = metrics::HANDSHAKE_CAUSES.into_iter();
                let cause = known.find(|known| one.cause.as_deref() == Some(*known));
                self.add(one.network, Refused { reason, cause }, one.count);
            }
        }
    }
}

impl Broker {
    /// Counts a refused call of an unauthenticated caller.
    pub fn note_refusal(&self, peer: IpAddr, reason: Reason) {
        self.count_refusal(
            peer,
            Refused {
                reason,
                cause: None,
            },
        );
    }

    /// Counts a connection that was refused in its handshake, and logs it if the limits for log lines allow.
    pub fn refuse_connection(
        &self,
        peer: SocketAddr,
        reason: Reason,
        cause: &'static str,
        error: impl fmt::Display,
    ) {
        let refused = Refused {
            reason,
            cause: Some(cause),
        };
        self.count_refusal(peer.ip(), refused);
        if self.limits.may_log(peer.ip()) {
            let error = shortened(&error.to_string());
            tracing::warn!(%peer, cause, error, "connection refused");
        }
    }

    fn count_refusal(&self, peer: IpAddr, refused: Refused) {
        metrics::REFUSALS
            .with([refused.reason.as_str()])
            .increment(1);
        self.refusals.add(Some(Network::of(peer)), refused, 1);
    }

    /// Counts a refused call of an unauthenticated caller, and logs it if the limits for log lines allow.
    pub fn refuse_unauthenticated(
        &self,
        peer: impl fmt::Display,
        at: IpAddr,
        error: &Error,
        id: CallId,
    ) {
        self.note_refusal(at, error.reason());
        if self.limits.may_log(at) {
            let error = shortened(&error.to_string());
            tracing::info!(call_id = %id, peer = %peer, error, "call refused");
        }
    }

    /// Stores the counts of the current minute in the state directory.
    pub(super) async fn keep_refusals(self: &std::sync::Arc<Self>) {
        if !self.refusals.is_changed.load(Ordering::Relaxed) {
            return;
        }
        let broker = std::sync::Arc::clone(self);
        let kept = tokio::task::spawn_blocking(move || broker.refusals.keep()).await;
        debug_assert!(kept.is_ok());
    }

    /// Loads the counts of a run that was killed.
    pub(super) fn take_over_refusals(&self) {
        self.refusals.take_over();
    }

    /// Writes one audit entry for each network, reason and cause. Counts that cannot be written are kept for the next
    /// attempt. All entries are appended concurrently, so that a hanging disk causes only one wait in total and not one
    /// wait for each entry.
    pub(super) async fn flush_refusals(self: &std::sync::Arc<Self>) {
        let counted = self.refusals.take();
        if !counted.is_empty() {
            self.refusals.is_changed.store(true, Ordering::Relaxed);
        }
        join_all(
            counted
                .into_iter()
                .map(async |((network, refused), count)| {
                    let mut entry =
                        Entry::new(EntryKind::Decision, "connection.refused", Outcome::Denied);
                    entry.reason = Some(refused.reason);
                    entry.cause = refused.cause.map(Into::into);
                    entry.peer =
                        Some(network.map_or_else(|| "others".to_owned(), |one| one.to_string()));
                    entry.count = Some(count);
                    if self.audit.append(entry).await.is_err() {
                        self.refusals.add(network, refused, count);
                    }
                }),
        )
        .await;
        // Stores the remaining counts immediately, because the next run would otherwise count refusals that are already
        // in the audit log.
        self.keep_refusals().await;
        let suppressed = self.limits.take_suppressed();
        if suppressed > 0 {
            tracing::info!(
                lines = suppressed,
                "log lines about unauthenticated callers were suppressed in the last minute"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CREDENTIAL: Refused = Refused {
        reason: Reason::Credential,
        cause: None,
    };
    const EXPIRED: Refused = Refused {
        reason: Reason::Credential,
        cause: Some("expired"),
    };

    fn refusals(folder: &tempfile::TempDir) -> Refusals {
        Refusals::new(StateDirectory::below(folder.path()), "serve")
    }

    #[test]
    fn networks_beyond_the_maximum_share_one_count() {
        let folder = tempfile::tempdir().unwrap();
        let refusals = refusals(&folder);
        for number in 0..2_000_u32 {
            let peer = IpAddr::from((number << 8).to_be_bytes());
            refusals.add(Some(Network::of(peer)), CREDENTIAL, 1);
            refusals.add(Some(Network::of(peer)), CREDENTIAL, 1);
        }
        let counts = refusals.take();
        assert_eq!(counts.len(), NETWORKS_MAX + 1);
        assert_eq!(counts.values().sum::<u64>(), 4_000);
        assert_eq!(counts[&(None, CREDENTIAL)], 2 * (2_000 - 256));
        assert!(refusals.take().is_empty());
    }

    /// The 1,300 addresses of one IPv6 network, and all addresses of one IPv4 network, share one count for each
    /// network.
    #[test]
    fn the_addresses_of_one_network_share_one_count() {
        let folder = tempfile::tempdir().unwrap();
        let refusals = refusals(&folder);
        for host in 0..=255_u8 {
            refusals.add(
                Some(Network::of(IpAddr::from([192, 0, 2, host]))),
                CREDENTIAL,
                1,
            );
        }
        for host in 0..1_300_u128 {
            let address = IpAddr::from((0x2001_0db8_u128 << 96 | host).to_be_bytes());
            refusals.add(Some(Network::of(address)), CREDENTIAL, 1);
        }
        let counts = refusals.take();
        let mut shown: Vec<String> = counts
            .iter()
            .map(|((network, _), count)| format!("{} {count}", network.unwrap()))
            .collect();
        shown.sort();
        assert_eq!(shown, ["192.0.2.0/24 256", "2001:db8::/64 1300"]);
    }

    /// A broker that is killed writes no entry. The next run loads the counts that the broker stored at most a second
    /// earlier.
    #[test]
    fn what_a_killed_broker_had_counted_is_taken_over() {
        let folder = tempfile::tempdir().unwrap();
        let peer = Network::of(IpAddr::from([192, 0, 2, 1]));
        let killed = refusals(&folder);
        killed.add(Some(peer), CREDENTIAL, 5);
        killed.add(None, EXPIRED, 7);
        killed.keep();
        drop(killed);
        let next = refusals(&folder);
        next.take_over();
        let counts = next.take();
        assert_eq!(counts[&(Some(peer), CREDENTIAL)], 5);
        assert_eq!(counts[&(None, EXPIRED)], 7);
        // The audit log now contains the loaded counts, so the next start must not load them again.
        next.is_changed.store(true, Ordering::Relaxed);
        next.keep();
        let third = refusals(&folder);
        third.take_over();
        assert!(third.take().is_empty());
    }

    /// Two brokers that share an audit directory do not overwrite or take over each other's counts.
    #[test]
    fn two_instances_of_one_directory_keep_their_own_counts() {
        let folder = tempfile::tempdir().unwrap();
        let state = StateDirectory::below(folder.path());
        let one = Refusals::new(state.clone(), "one");
        let two = Refusals::new(state.clone(), "two");
        one.add(None, CREDENTIAL, 1);
        two.add(None, CREDENTIAL, 2);
        one.keep();
        two.keep();
        for (instance, count) in [("one", 1), ("two", 2)] {
            let next = Refusals::new(state.clone(), instance);
            next.take_over();
            assert_eq!(next.take()[&(None, CREDENTIAL)], count);
        }
    }

    /// The previous version of Keybroker wrote `refusals` without an instance.
    #[test]
    fn counts_of_the_release_before_are_taken_over_once() {
        let folder = tempfile::tempdir().unwrap();
        let state = StateDirectory::below(folder.path());
        let kept = br#"[{"network":null,"reason":"CREDENTIAL","count":3}]"#;
        state.write("refusals", kept).unwrap();
        let first = refusals(&folder);
        first.take_over();
        assert_eq!(first.take()[&(None, CREDENTIAL)], 3);
        let other = Refusals::new(state, "other");
        other.take_over();
        assert!(other.take().is_empty());
    }
}
