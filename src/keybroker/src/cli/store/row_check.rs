//! Checks single rows. The checks include every check of a row that the broker makes before the
//! release of a key.

use std::collections::HashSet;

use keybroker_core::{
    call::Timestamp,
    client_credential::Document,
    envelope::{Context, Envelope, Kind, Mac, mac::MacMessage},
    key::{ClientId, RecordId, Revision, WrappingKeyId, WrappingKeyState},
};
use keybroker_store as store;
use keybroker_store::{
    AccessRow, ApprovalRow, ClientRow, DeviceRow, MemberKeyRow, RegistryRow, RequestRecord,
    RequestScope, request_message,
    scan::{Found, FoundClient, FoundOther},
    tables::{Head, RevisionRow},
};

use crate::cli::{admins::Admins, exit::Failure};

/// A problem of a row. The names of the problems are stable, and `docs/store.md` explains each
/// problem.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Problem {
    RecordUnreadable,
    RevisionUnreadable,
    CurrentRevisionMissing,
    RevisionWithoutRecord,
    RevisionBeyondCurrent,
    EnvelopeUnreadable,
    EnvelopeOfAnotherKind,
    WrappingKeyDiffers,
    WrappingKeyUnknown,
    WrappingKeyDestroyed,
    WrappingKeyUnusable,
    MacRefused,
    ClientUnreadable,
    DocumentUnreadable,
    RequestUnreadable,
    ChangeUnreadable,
    LastUseUnreadable,
    ClientUseUnreadable,
    ApprovalUnreadable,
    MemberKeyUnreadable,
    OrganizationKeyMissing,
    DeviceUnreadable,
    AccessRequestUnreadable,
    IdentityMissing,
    KeyMissing,
}

impl Problem {
    /// The name of the problem in the output.
    pub(super) const fn as_str(self) -> &'static str {
        match self {
            Self::RecordUnreadable => "record-unreadable",
            Self::RevisionUnreadable => "revision-unreadable",
            Self::CurrentRevisionMissing => "current-revision-missing",
            Self::RevisionWithoutRecord => "revision-without-record",
            Self::RevisionBeyondCurrent => "revision-beyond-current",
            Self::EnvelopeUnreadable => "envelope-unreadable",
            Self::EnvelopeOfAnotherKind => "envelope-of-another-kind",
            Self::WrappingKeyDiffers => "wrapping-key-differs",
            Self::WrappingKeyUnknown => "wrapping-key-unknown",
            Self::WrappingKeyDestroyed => "wrapping-key-destroyed",
            Self::WrappingKeyUnusable => "wrapping-key-unusable",
            Self::MacRefused => "mac-refused",
            Self::ClientUnreadable => "client-unreadable",
            Self::DocumentUnreadable => "document-unreadable",
            Self::RequestUnreadable => "request-unreadable",
            Self::ChangeUnreadable => "change-unreadable",
            Self::LastUseUnreadable => "last-use-unreadable",
            Self::ClientUseUnreadable => "client-use-unreadable",
            Self::ApprovalUnreadable => "approval-unreadable",
            Self::MemberKeyUnreadable => "member-key-unreadable",
            Self::OrganizationKeyMissing => "organization-key-missing",
            Self::DeviceUnreadable => "device-unreadable",
            Self::AccessRequestUnreadable => "access-request-unreadable",
            Self::IdentityMissing => "identity-missing",
            Self::KeyMissing => "key-missing",
        }
    }
}

/// A row with a problem.
#[derive(Clone, Debug)]
pub(super) struct Finding {
    pub(super) problem: Problem,
    /// Details of the problem. The details contain no bytes of the row.
    pub(super) detail: String,
    pub(super) record: Option<RecordId>,
    pub(super) head: Option<Head>,
    pub(super) revision: Option<Revision>,
    pub(super) client: Option<ClientId>,
}

impl Finding {
    fn of_revision(
        problem: Problem,
        detail: impl Into<String>,
        head: Option<&Head>,
        row: &RevisionRow,
    ) -> Self {
        Self {
            problem,
            detail: detail.into(),
            record: Some(row.record),
            head: head.cloned(),
            revision: Some(row.revision),
            client: None,
        }
    }

    /// A finding about a row that belongs to neither a record nor an API client.
    pub(super) fn of_other(problem: Problem, detail: impl Into<String>) -> Self {
        Self {
            problem,
            detail: detail.into(),
            record: None,
            head: None,
            revision: None,
            client: None,
        }
    }

    /// A finding about an API client. The finding contains the revision of the API client's
    /// document.
    fn of_client(
        problem: Problem,
        detail: impl Into<String>,
        client: Option<ClientId>,
        row: Option<&ClientRow>,
    ) -> Self {
        Self {
            problem,
            detail: detail.into(),
            record: None,
            head: None,
            revision: row.and_then(|row| Revision::new(row.revision)),
            client,
        }
    }

    fn current_missing(head: Head) -> Self {
        Self {
            problem: Problem::CurrentRevisionMissing,
            detail: String::new(),
            record: Some(head.id),
            revision: Some(head.revision),
            head: Some(head),
            client: None,
        }
    }

    /// Whether a change during the scan may have caused the finding.
    pub(super) fn may_be_a_change(&self) -> bool {
        matches!(
            self.problem,
            Problem::CurrentRevisionMissing
                | Problem::RevisionWithoutRecord
                | Problem::RevisionBeyondCurrent
        )
    }
}

/// Checks the rows of one scan, in the order of the scan.
#[derive(Debug)]
pub(super) struct RowChecker<'a> {
    admins: &'a Admins,
    registry: Vec<RegistryRow>,
    /// The keys that are not on the tokens or must not be used.
    unusable: HashSet<WrappingKeyId>,
    /// The record that is being checked. `None` after the scan has reached the current revision of
    /// the record.
    awaited: Option<Head>,
}

impl<'a> RowChecker<'a> {
    /// `unusable` contains the registered keys whose rows cannot be verified.
    pub(super) fn new(
        admins: &'a Admins,
        registry: Vec<RegistryRow>,
        unusable: HashSet<WrappingKeyId>,
    ) -> Self {
        Self {
            admins,
            registry,
            unusable,
            awaited: None,
        }
    }

    /// The tokens that verify the rows.
    pub(super) fn admins(&self) -> &'a Admins {
        self.admins
    }

    /// Returns true if a row's wrapping key was not in the registry when the registry was last
    /// read.
    pub(super) fn lacks(&self, key: Option<WrappingKeyId>) -> bool {
        key.is_some_and(|key| !self.registry.iter().any(|known| known.id == key))
    }

    /// Whether the registry is unchanged since the last read.
    pub(super) fn knows(&self, registry: &[RegistryRow]) -> bool {
        self.registry == registry
    }

    /// Replaces the registry with a newer registry.
    pub(super) fn renew(&mut self, registry: Vec<RegistryRow>, unusable: HashSet<WrappingKeyId>) {
        self.registry = registry;
        self.unusable = unusable;
    }

    /// Checks the next row of the scan, and the previous record if the row belongs to a new record.
    pub(super) fn check(&mut self, found: &Found) -> Result<Vec<Finding>, Failure> {
        let mut findings = Vec::new();
        if found.is_first {
            findings.extend(self.end());
            self.awaited = found.good_head().cloned();
            if let Some(Err(error)) = found.head.as_deref() {
                findings.push(Finding {
                    problem: Problem::RecordUnreadable,
                    detail: error.to_string(),
                    record: found.good_revision().map(|row| row.record),
                    head: None,
                    revision: None,
                    client: None,
                });
            }
        }
        match &found.revision {
            None => {}
            Some(Err(error)) => findings.push(Finding {
                problem: Problem::RevisionUnreadable,
                detail: error.to_string(),
                record: found.good_head().map(|head| head.id),
                head: found.good_head().cloned(),
                revision: None,
                client: None,
            }),
            Some(Ok(row)) => findings.extend(self.revision(found, row)?),
        }
        Ok(findings)
    }

    /// Checks the last record after the end of the scan.
    pub(super) fn end(&mut self) -> Option<Finding> {
        self.awaited.take().map(Finding::current_missing)
    }

    fn revision(&mut self, found: &Found, row: &RevisionRow) -> Result<Option<Finding>, Failure> {
        let bad = |problem, detail: String| {
            Ok(Some(Finding::of_revision(
                problem,
                detail,
                found.good_head(),
                row,
            )))
        };
        let head = match found.head.as_deref() {
            None => return bad(Problem::RevisionWithoutRecord, String::new()),
            // An unreadable record is reported only once. The address of the record is unknown, so
            // the MACs of its revisions cannot be verified.
            Some(Err(_)) => return Ok(None),
            Some(Ok(head)) => head,
        };
        if row.revision == head.revision {
            self.awaited = None;
        }
        if row.revision > head.revision {
            let detail = format!("the current revision of the record is {}", head.revision);
            return bad(Problem::RevisionBeyondCurrent, detail);
        }
        let envelope = match Envelope::parse(&row.envelope) {
            Ok(envelope) => envelope,
            Err(error) => return bad(Problem::EnvelopeUnreadable, error.to_string()),
        };
        if envelope.kind() != Kind::Record {
            return bad(Problem::EnvelopeOfAnotherKind, String::new());
        }
        let key = envelope.wrapping_key();
        if key != row.wrapping_key {
            let detail = format!("{key} in the envelope, {} in the column", row.wrapping_key);
            return bad(Problem::WrappingKeyDiffers, detail);
        }
        if let Some(problem) = self.unusable(key) {
            return bad(problem, key.to_string());
        }
        let context = Context::Record {
            address: &head.address,
            record_id: row.record,
            revision: row.revision,
        };
        let message = envelope.mac_message(&context);
        if self.admins.verify(key, &message, envelope.mac())? {
            return Ok(None);
        }
        bad(Problem::MacRefused, String::new())
    }

    /// Checks an API client.
    pub(super) fn client(&mut self, found: &FoundClient) -> Result<Option<Finding>, Failure> {
        let row = match &found.row {
            Ok(row) => row,
            Err(error) => {
                let (problem, detail) = (Problem::ClientUnreadable, error.to_string());
                return Ok(Some(Finding::of_client(problem, detail, found.id, None)));
            }
        };
        let bad = |problem, detail: String| {
            Ok(Some(Finding::of_client(
                problem,
                detail,
                found.id,
                Some(row),
            )))
        };
        if Document::from_bytes(&row.document).is_none() {
            return bad(Problem::DocumentUnreadable, String::new());
        }
        if let Some(problem) = self.unusable(row.key) {
            return bad(problem, row.key.to_string());
        }
        if self.admins.verify(row.key, &row.mac_message(), &row.mac)? {
            return Ok(None);
        }
        bad(Problem::MacRefused, String::new())
    }

    /// Checks a row that belongs to neither a record nor an API client.
    pub(super) fn other(&mut self, found: &FoundOther) -> Result<Option<Finding>, Failure> {
        let unreadable = |problem, result: &Result<(), store::Error>| {
            let error = result.as_ref().err();
            error.map(|error| Finding::of_other(problem, error.to_string()))
        };
        Ok(match found {
            FoundOther::Request(row) => match &**row {
                Ok((scope, record)) => self.request(scope, record)?,
                Err(error) => {
                    let problem = Problem::RequestUnreadable;
                    Some(Finding::of_other(problem, error.to_string()))
                }
            },
            FoundOther::Approval(row) => match &**row {
                Ok(row) => self.approval(row)?,
                Err(error) => {
                    let problem = Problem::ApprovalUnreadable;
                    Some(Finding::of_other(problem, error.to_string()))
                }
            },
            FoundOther::MemberKey(row) => match &**row {
                Ok(row) => self.member_key(row)?,
                Err(error) => {
                    let problem = Problem::MemberKeyUnreadable;
                    Some(Finding::of_other(problem, error.to_string()))
                }
            },
            FoundOther::Device(row) => match &**row {
                Ok(row) => self.device(row)?,
                Err(error) => {
                    let problem = Problem::DeviceUnreadable;
                    Some(Finding::of_other(problem, error.to_string()))
                }
            },
            FoundOther::AccessRequest(row) => match &**row {
                Ok(row) => self.access_request(row)?,
                Err(error) => {
                    let problem = Problem::AccessRequestUnreadable;
                    Some(Finding::of_other(problem, error.to_string()))
                }
            },
            FoundOther::Change(result) => unreadable(Problem::ChangeUnreadable, result),
            FoundOther::LastUse(result) => unreadable(Problem::LastUseUnreadable, result),
            FoundOther::ClientUse(result) => unreadable(Problem::ClientUseUnreadable, result),
        })
    }

    fn request(
        &mut self,
        scope: &RequestScope,
        record: &RequestRecord,
    ) -> Result<Option<Finding>, Failure> {
        let of = format!("request id {} of {}", scope.id, scope.principal);
        let bad = |problem| Ok(Some(Finding::of_other(problem, of.clone())));
        // Rows from releases with a schema older than version 4 have no MAC. Rows without a MAC
        // need no check, because the broker refuses a retry that refers to a row without a MAC.
        let Some(mac) = &record.result_mac else {
            return Ok(None);
        };
        if let Some(problem) = self.unusable(record.key) {
            return bad(problem);
        }
        let message = request_message(scope, &record.content, &record.result);
        if self.admins.verify(record.key, &message, mac)? {
            return Ok(None);
        }
        bad(Problem::MacRefused)
    }

    fn approval(&mut self, row: &ApprovalRow) -> Result<Option<Finding>, Failure> {
        let of = format!("request for approval {}", row.id);
        let is_open = row.state_at(Timestamp::now()).is_open();
        self.with_mac(of, row.signer, &row.mac_message(), &row.mac, is_open)
    }

    fn device(&mut self, row: &DeviceRow) -> Result<Option<Finding>, Failure> {
        let of = format!("device {} of {}", row.address.device, row.address.user);
        self.with_mac(of, row.signer, &row.mac_message(), &row.mac, true)
    }

    fn access_request(&mut self, row: &AccessRow) -> Result<Option<Finding>, Failure> {
        let of = format!("request for access {}", row.id);
        let is_open = row.state_at(Timestamp::now()).is_open();
        self.with_mac(of, row.signer, &row.mac_message(), &row.mac, is_open)
    }

    /// Checks the MAC of a row. Rows that are not open do not need their wrapping key, so they may outlive it.
    fn with_mac(
        &self,
        of: String,
        signer: WrappingKeyId,
        message: &MacMessage,
        mac: &Mac,
        is_open: bool,
    ) -> Result<Option<Finding>, Failure> {
        let problem = match self.unusable(signer) {
            None if self.admins.verify(signer, message, mac)? => return Ok(None),
            None => Problem::MacRefused,
            Some(Problem::WrappingKeyDestroyed | Problem::WrappingKeyUnusable) if !is_open => {
                return Ok(None);
            }
            Some(problem) => problem,
        };
        Ok(Some(Finding::of_other(problem, of)))
    }

    fn member_key(&mut self, row: &MemberKeyRow) -> Result<Option<Finding>, Failure> {
        let of = format!(
            "key of member {} of organisation {}",
            row.member, row.organization
        );
        let key = row.organization.key_id();
        let problem = match self
            .admins
            .verify_imported(key, &row.mac_message(), &row.mac)
        {
            Some(true) => return Ok(None),
            Some(false) => Problem::MacRefused,
            None => Problem::OrganizationKeyMissing,
        };
        Ok(Some(Finding::of_other(problem, of)))
    }

    /// The problem that prevents the verification of MACs under a wrapping key; `None` if MACs can
    /// be verified.
    fn unusable(&self, key: WrappingKeyId) -> Option<Problem> {
        match self.registry.iter().find(|known| known.id == key) {
            None => Some(Problem::WrappingKeyUnknown),
            Some(known) if known.state == WrappingKeyState::Destroyed => {
                Some(Problem::WrappingKeyDestroyed)
            }
            Some(_) if self.unusable.contains(&key) => Some(Problem::WrappingKeyUnusable),
            Some(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `docs/store.md` must explain every problem.
    #[test]
    fn the_documentation_has_every_problem() {
        let page = include_str!("../../../../../docs/store.md");
        let (_, section) = page.split_once("| Problem |").unwrap();
        let (table, _) = section.split_once("\n\n").unwrap();
        let documented: Vec<&str> = table
            .lines()
            .filter_map(|line| line.strip_prefix("| `")?.split('`').next())
            .collect();
        let problems = [
            Problem::RecordUnreadable,
            Problem::RevisionUnreadable,
            Problem::CurrentRevisionMissing,
            Problem::RevisionWithoutRecord,
            Problem::RevisionBeyondCurrent,
            Problem::EnvelopeUnreadable,
            Problem::EnvelopeOfAnotherKind,
            Problem::WrappingKeyDiffers,
            Problem::WrappingKeyUnknown,
            Problem::WrappingKeyDestroyed,
            Problem::WrappingKeyUnusable,
            Problem::MacRefused,
            Problem::ClientUnreadable,
            Problem::DocumentUnreadable,
            Problem::RequestUnreadable,
            Problem::ChangeUnreadable,
            Problem::LastUseUnreadable,
            Problem::ClientUseUnreadable,
            Problem::ApprovalUnreadable,
            Problem::MemberKeyUnreadable,
            Problem::OrganizationKeyMissing,
            Problem::DeviceUnreadable,
            Problem::AccessRequestUnreadable,
            Problem::IdentityMissing,
            Problem::KeyMissing,
        ];
        assert_eq!(documented, problems.map(Problem::as_str));
    }
}
