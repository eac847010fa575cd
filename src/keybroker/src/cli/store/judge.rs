//! What is wrong with a row, if anything: the same that a broker would find when somebody wants the key, and more.

use keybroker_core::{
    client_credential::Document,
    envelope::{Context, Envelope, Kind},
    key::{ClientId, RecordId, Revision, WrappingKeyId, WrappingKeyState},
};
use keybroker_pkcs11::admin::Verifier;
use keybroker_store::{
    ClientRow, RegistryRow,
    scan::{Found, FoundClient, FoundRow},
    tables::{Head, RevisionRow, Table},
};

use crate::cli::exit::Failure;

/// Class of a bad row. The names are stable: `docs/store.md` has what each means.
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
    MacRefused,
    ClientUnreadable,
    DocumentUnreadable,
    ClientDiffers,
    TimesDiffer,
    RequestUnreadable,
    NoteUnreadable,
    IdentityMissing,
}

impl Problem {
    /// As shown.
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
            Self::MacRefused => "mac-refused",
            Self::ClientUnreadable => "client-unreadable",
            Self::DocumentUnreadable => "document-unreadable",
            Self::ClientDiffers => "client-differs",
            Self::TimesDiffer => "times-differ",
            Self::RequestUnreadable => "request-unreadable",
            Self::NoteUnreadable => "note-unreadable",
            Self::IdentityMissing => "identity-missing",
        }
    }
}

/// A row that is not as it must be.
#[derive(Clone, Debug)]
pub(super) struct Finding {
    pub(super) problem: Problem,
    /// What the class does not say. Never bytes of a row.
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

    /// The revision is that of the document.
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

    /// Of a row that is of no record and no client; the detail names it.
    pub(super) fn of_row(problem: Problem, detail: String) -> Self {
        Self {
            problem,
            detail,
            record: None,
            head: None,
            revision: None,
            client: None,
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

    /// Whether it may be nothing but a change that was made while we looked.
    pub(super) fn may_be_a_change(&self) -> bool {
        matches!(
            self.problem,
            Problem::CurrentRevisionMissing
                | Problem::RevisionWithoutRecord
                | Problem::RevisionBeyondCurrent
        )
    }
}

/// Goes with a scan from its beginning to its end.
#[derive(Debug)]
pub(super) struct Judge<'a> {
    verifier: Verifier<'a>,
    registry: Vec<RegistryRow>,
    /// The record under way, until its current revision is seen.
    awaited: Option<Head>,
}

impl<'a> Judge<'a> {
    /// The verifier has the keys of the registry that are not destroyed.
    pub(super) fn new(verifier: Verifier<'a>, registry: Vec<RegistryRow>) -> Self {
        Self {
            verifier,
            registry,
            awaited: None,
        }
    }

    /// Whether the wrapping key that a row names is one that the registry did not have when it was read.
    pub(super) fn lacks(&self, key: Option<WrappingKeyId>) -> bool {
        key.is_some_and(|key| !self.registry.iter().any(|known| known.id == key))
    }

    /// Whether the registry is as it was when it was read.
    pub(super) fn knows(&self, registry: &[RegistryRow]) -> bool {
        self.registry == registry
    }

    /// Goes on with the registry as it is now.
    pub(super) fn renew(&mut self, verifier: Verifier<'a>, registry: Vec<RegistryRow>) {
        self.verifier = verifier;
        self.registry = registry;
    }

    /// What is wrong with what a scan found, and with the record that it has left.
    pub(super) fn judge(&mut self, found: &Found) -> Result<Vec<Finding>, Failure> {
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

    /// What is wrong with the last record.
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
            // Said once, for the record; without its address no MAC can be verified.
            Some(Err(_)) => return Ok(None),
            Some(Ok(head)) => head,
        };
        if row.revision == head.revision {
            self.awaited = None;
        }
        if row.revision > head.revision {
            let detail = format!("the current revision is {}", head.revision);
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
            let detail = format!("{key} in the envelope, {} beside it", row.wrapping_key);
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
        if self.verifier.verify(key, &message, envelope.mac())? {
            // No MAC covers the times, but some are written twice with one value.
            if row.revision == Revision::FIRST && row.created != head.created {
                let detail = "created_us of the record is not that of its first revision";
                return bad(Problem::TimesDiffer, detail.to_owned());
            }
            if row.revision == head.revision && head.deleted.is_some_and(|at| at != head.updated) {
                let detail = "updated_us of the deleted record is not its deleted_us";
                return bad(Problem::TimesDiffer, detail.to_owned());
            }
            return Ok(None);
        }
        bad(Problem::MacRefused, String::new())
    }

    /// What is wrong with an API client.
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
        let Some(document) = Document::from_bytes(&row.document) else {
            return bad(Problem::DocumentUnreadable, String::new());
        };
        if let Some(problem) = self.unusable(row.key) {
            return bad(problem, row.key.to_string());
        }
        if self
            .verifier
            .verify(row.key, &row.mac_message(), &row.mac)?
        {
            if row.created != document.created {
                let detail = "clients.created_us is not the time in the document";
                return bad(Problem::ClientDiffers, detail.to_owned());
            }
            return Ok(None);
        }
        bad(Problem::MacRefused, String::new())
    }

    /// What is wrong with a row of the other tables. A request id without a MAC is of an earlier release, and one under a destroyed
    /// key can be verified by no token: its retry is refused.
    pub(super) fn row(
        &mut self,
        found: &FoundRow,
        table: Table,
    ) -> Result<Option<Finding>, Failure> {
        let bad = |problem, what: &str| {
            let detail = format!("{}: {what}", found.place);
            Ok(Some(Finding::of_row(problem, detail)))
        };
        let (scope, record) = match &found.request {
            Err(error) if table == Table::Requests => {
                return bad(Problem::RequestUnreadable, &error.to_string());
            }
            Err(error) => return bad(Problem::NoteUnreadable, &error.to_string()),
            Ok(None) => return Ok(None),
            Ok(Some(request)) => (&request.0, &request.1),
        };
        let Some(mac) = &record.result_mac else {
            return Ok(None);
        };
        match self.unusable(record.key) {
            Some(Problem::WrappingKeyDestroyed) => return Ok(None),
            Some(problem) => return bad(problem, &record.key.to_string()),
            None => {}
        }
        let message = record.result_message(scope);
        if self.verifier.verify(record.key, &message, mac)? {
            return Ok(None);
        }
        bad(Problem::MacRefused, "the stored answer was altered")
    }

    /// Why no MAC of a wrapping key's binding key can be verified.
    fn unusable(&self, key: WrappingKeyId) -> Option<Problem> {
        match self.registry.iter().find(|known| known.id == key) {
            None => Some(Problem::WrappingKeyUnknown),
            Some(known) if known.state == WrappingKeyState::Destroyed => {
                Some(Problem::WrappingKeyDestroyed)
            }
            Some(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whoever reads the name of a problem finds what it means.
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
            Problem::MacRefused,
            Problem::ClientUnreadable,
            Problem::DocumentUnreadable,
            Problem::ClientDiffers,
            Problem::TimesDiffer,
            Problem::RequestUnreadable,
            Problem::NoteUnreadable,
            Problem::IdentityMissing,
        ];
        assert_eq!(documented, problems.map(Problem::as_str));
    }
}
