//! Decisions with their audit entries: an intent is durable before the server learns a decision, and an outcome follows.

use crate::cli::{change::local_entry, exit::Failure};
use keybroker_audit::{AuditLog, BitwardenRequest, Entry, EntryKind, Outcome};
use keybroker_core::{call::CallId, organization::Guid};

use super::{
    Organization,
    api::{Api, Approved, CallError},
    pending::Pending,
};

pub(super) const APPROVE: &str = "bitwarden.approve_device";
pub(super) const DENY: &str = "bitwarden.deny_device";

/// The request of a decision, and what the entry says about it.
#[derive(Clone, Debug)]
pub(super) struct Decided {
    pub(super) pending: Pending,
    /// SHA-256 of the member's wrapped key; absent for a denial.
    pub(super) digest: Option<[u8; 32]>,
    /// The policy that decided, or what a person accepted.
    pub(super) policy: Option<String>,
}

/// The entries of one decision.
struct Entries {
    action: &'static str,
    call: CallId,
    organization: Guid,
    decided: Decided,
}

impl Entries {
    async fn begin(
        log: &AuditLog,
        action: &'static str,
        organization: Guid,
        decided: Decided,
    ) -> Result<Self, Failure> {
        let entries = Self {
            action,
            call: CallId::fresh(),
            organization,
            decided,
        };
        log.append(entries.entry(EntryKind::Intent, Outcome::Ok))
            .await?;
        Ok(entries)
    }

    async fn end(&self, log: &AuditLog, outcome: Outcome) -> Result<(), Failure> {
        log.append(self.entry(EntryKind::Outcome, outcome)).await?;
        Ok(())
    }

    fn entry(&self, kind: EntryKind, outcome: Outcome) -> Entry {
        let pending = &self.decided.pending;
        let mut entry = local_entry(kind, self.action, outcome, self.call);
        entry.wrapping_key = Some(self.organization.key_id());
        entry.digest = self.decided.digest.map(hex::encode);
        entry.policy = self.decided.policy.clone().map(Into::into);
        entry.bitwarden = Some(Box::new(BitwardenRequest {
            organization: self.organization,
            member: pending.member,
            device: pending.device.clone(),
            request: pending.id,
            public_key: pending.recipient.fingerprint(),
        }));
        entry
    }
}

/// Approves requests for which the token has re-encrypted the user keys. The inner result is that of the call. After an outer error,
/// which is one of the audit log, the server may have accepted the approvals.
pub(super) async fn approve(
    api: &mut Api<'_>,
    log: &AuditLog,
    organization: Organization<'_>,
    ready: Vec<(Decided, Approved)>,
) -> Result<Result<(), CallError>, Failure> {
    let (decided, approved): (Vec<_>, Vec<_>) = ready.into_iter().unzip();
    let entries = begin(log, APPROVE, organization, decided).await?;
    let sent = api.approve(&approved).await;
    end(log, &entries, &sent).await?;
    Ok(sent)
}

/// Denies requests.
pub(super) async fn deny(
    api: &mut Api<'_>,
    log: &AuditLog,
    organization: Organization<'_>,
    denied: Vec<Decided>,
) -> Result<(), Failure> {
    let requests: Vec<Guid> = denied.iter().map(|one| one.pending.id).collect();
    let entries = begin(log, DENY, organization, denied).await?;
    let sent = api.deny(&requests).await;
    end(log, &entries, &sent).await?;
    sent.map_err(Failure::from)
}

async fn begin(
    log: &AuditLog,
    action: &'static str,
    organization: Organization<'_>,
    decided: Vec<Decided>,
) -> Result<Vec<Entries>, Failure> {
    let mut entries = Vec::new();
    for one in decided {
        entries.push(Entries::begin(log, action, organization.id, one).await?);
    }
    Ok(entries)
}

async fn end(
    log: &AuditLog,
    entries: &[Entries],
    sent: &Result<(), CallError>,
) -> Result<(), Failure> {
    let outcome = match sent {
        Ok(()) => Outcome::Ok,
        Err(error) if error.may_have_happened => Outcome::Unknown,
        Err(_) => Outcome::Failed,
    };
    for one in entries {
        one.end(log, outcome).await?;
    }
    Ok(())
}
