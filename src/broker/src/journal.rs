//! The audit entries of the use cases, and the proof that an entry is on disk.
//!
//! Mitigation: M13 of `THREAT_MODEL.md`.

use keybroker_audit::{DeviceFacts, Entry, EntryKind, OpenIntent, Outcome, Persons};
use keybroker_core::{
    call::{Call, CallId, RequestId, Timestamp},
    client_credential::Document,
    error::{Error, Reason},
    key::{ApprovalId, ClientId, DeviceId, KeyName, RecordId, Revision, UserId, WrappingKeyId},
    principal::{Action, Principal},
};
use keybroker_hsm::leave;
use keybroker_policy::{KeyPermit, Release, Resource};
use keybroker_store::{AccessRow, PersonOfPrincipal};

use super::{
    Broker,
    digests::{hex_of, sha256},
    overload::is_overload,
};

/// The result of a decision whose own audit entry is durable. Only [`Broker::conclude`] creates this value, from a
/// result and the draft of its entry. Therefore each release needs its own audit entry.
#[derive(Debug)]
pub(super) struct Recorded<T>(T);

impl<T> Recorded<T> {
    pub(super) fn get(&self) -> &T {
        &self.0
    }

    pub(super) fn into_inner(self) -> T {
        self.0
    }
}

/// The action of the entries about the removal of objects from one token. The database does not know whether such a removal was done.
pub(super) const REMOVE_OBJECTS: &str = "wrapping_key.remove_objects";

/// An unfinished audit entry, with the facts about its decision that are known so far.
#[derive(Clone, Debug)]
pub(super) struct Draft(Entry);

impl Draft {
    pub(super) fn new(principal: &Principal, call: &Call, action: Action) -> Self {
        let mut entry = Entry::new(EntryKind::Decision, action.as_str(), Outcome::Ok);
        entry.principal = Some(principal.name().to_owned());
        entry.mapping = principal.mapping().map(str::to_owned);
        entry.tenant = Some(principal.tenant().clone());
        entry.call_id = Some(call.id);
        entry.peer = Some(call.peer.clone());
        Self(entry)
    }

    /// Begins the entry of a batch of rows that the broker itself moves. `digest` is the SHA-256 of the ids of the rows.
    pub(super) fn rewrapped(call: CallId, to: WrappingKeyId, count: usize, digest: String) -> Self {
        let mut entry = Entry::new(
            EntryKind::Decision,
            "wrapping_key.rewrap_batch",
            Outcome::Ok,
        );
        entry.call_id = Some(call);
        entry.wrapping_key = Some(to);
        let mut draft = Self(entry);
        draft.rows(count, digest);
        draft
    }

    /// Begins the entry of a change of a wrapping key that the broker itself makes.
    pub(super) fn of_broker(call: CallId, action: &'static str, key: WrappingKeyId) -> Self {
        let mut entry = Entry::new(EntryKind::Decision, action, Outcome::Ok);
        entry.call_id = Some(call);
        entry.wrapping_key = Some(key);
        Self(entry)
    }

    /// Begins the entry of the removal of a wrapping key's objects from one token.
    pub(super) fn of_removal(call: CallId, key: WrappingKeyId, token: &str) -> Self {
        let mut draft = Self::of_broker(call, REMOVE_OBJECTS, key);
        draft.0.token = Some(token.to_owned());
        draft
    }

    /// Sets the tokens on which a change registers a wrapping key.
    pub(super) fn tokens(&mut self, names: &[&str]) {
        if !names.is_empty() {
            self.0.token = Some(names.join(", "));
        }
    }

    /// Sets the number of objects that the entry records.
    pub(super) fn objects(&mut self, count: u64) {
        self.0.count = Some(count);
    }

    /// Sets the number of rows that the entry records, and the SHA-256 of their ids.
    pub(super) fn rows(&mut self, count: usize, digest: String) {
        self.0.count = u64::try_from(count).ok();
        self.0.digest = Some(digest);
    }

    /// Begins the entry of an action that a permit allows.
    pub(super) fn permitted(principal: &Principal, call: &Call, permit: &KeyPermit) -> Self {
        let mut draft = Self::new(principal, call, permit.action());
        draft.0.user = Some(permit.address().user.clone());
        draft.0.key_name = Some(permit.address().name.clone());
        draft.policy(permit.policy());
        draft.release(permit.release());
        draft
    }

    /// Begins the entry of an action on a resource for which no permit exists.
    pub(super) fn of(
        principal: &Principal,
        call: &Call,
        action: Action,
        resource: Resource<'_>,
    ) -> Self {
        let mut draft = Self::new(principal, call, action);
        match resource {
            Resource::UserKey { user, name, .. } => {
                draft.0.user = Some(user.clone());
                draft.0.key_name = Some(name.clone());
            }
            Resource::UserKeys { user, .. } | Resource::Devices { user, .. } => {
                draft.user(user.cloned());
            }
            Resource::AccessRequest { user, .. } => draft.user(Some(user.clone())),
            Resource::Broker => {}
        }
        draft
    }

    /// The principal of the entry and the address of its call; empty if the broker itself acts.
    pub(super) fn caller(&self) -> (&str, &str) {
        let Entry {
            principal, peer, ..
        } = &self.0;
        let text = Option::<String>::as_deref;
        (text(principal).unwrap_or(""), text(peer).unwrap_or(""))
    }

    /// Whether the entry is about this action.
    pub(super) fn is_of(&self, action: Action) -> bool {
        self.0.action == action.as_str()
    }

    pub(super) fn call(&self) -> CallId {
        self.0.call_id.expect("a draft is of a call")
    }

    /// Sets the recipient of a sealed release.
    pub(super) fn release(&mut self, release: Release) {
        self.0.recipient = match release {
            Release::Plain => None,
            Release::Sealed(recipient) => Some(recipient),
        };
    }

    pub(super) fn policy(&mut self, policy: &str) {
        self.0.policy = Some(policy.to_owned().into());
    }

    pub(super) fn user(&mut self, user: Option<UserId>) {
        self.0.user = user;
    }

    pub(super) fn request(&mut self, request: Option<RequestId>) {
        self.0.request_id = request;
    }

    pub(super) fn record(&mut self, record: RecordId, revision: Revision) {
        self.0.record_id = Some(record);
        self.0.revision = Some(revision);
    }

    pub(super) fn client(&mut self, client: ClientId) {
        self.0.client = Some(client);
    }

    pub(super) fn grant(&mut self, document: &Document) {
        self.0.grant = Some(document.summary());
    }

    fn persons(&mut self) -> &mut Persons {
        self.0.persons.get_or_insert_default()
    }

    /// Sets the request for approval.
    pub(super) fn approval(&mut self, approval: ApprovalId) {
        self.persons().approval = Some(approval);
    }

    /// The request for approval, if the entry has one.
    pub(super) fn known_approval(&self) -> Option<ApprovalId> {
        self.0.persons.as_ref()?.approval
    }

    /// Sets the person to whom the principal of the entry belongs.
    pub(super) fn person(&mut self, person: &str) {
        self.persons().person = Some(person.to_owned());
    }

    /// Sets the digest of the change that needs an approval.
    pub(super) fn change_digest(&mut self, digest: &[u8; 32]) {
        self.0.digest = Some(hex_of(digest));
    }

    /// Sets the exact cause.
    pub(super) fn cause(&mut self, cause: &'static str) {
        self.0.cause = Some(cause.into());
    }

    pub(super) fn requested_by(&mut self, by: &PersonOfPrincipal) {
        self.persons().requested_by = Some((by.principal.clone(), by.person.clone()));
    }

    pub(super) fn approved_by(&mut self, by: &PersonOfPrincipal) {
        self.persons().approved_by = Some((by.principal.clone(), by.person.clone()));
    }

    /// Begins the entry about the stored request for approval, with the facts of the entry of the requested change.
    pub(super) fn of_request(&self) -> Self {
        let mut entry = self.0.clone();
        entry.action = "approval.request".into();
        Self(entry)
    }

    fn device_facts(&mut self) -> &mut DeviceFacts {
        self.0.device.get_or_insert_default()
    }

    /// Sets the device that the action concerns.
    pub(super) fn device(&mut self, device: DeviceId) {
        self.device_facts().device = Some(device);
    }

    /// Sets the request for access, with its device, its principal, its place and the fingerprint of its public key.
    pub(super) fn access_request(&mut self, row: &AccessRow, place: &str) {
        let facts = self.device_facts();
        facts.device = Some(row.device.address.device);
        facts.request = Some(row.id);
        facts.asked_by = Some(row.requested_by.clone());
        facts.place = (!place.is_empty()).then(|| place.to_owned());
        facts.public_key = Some(sha256(&row.public_key));
        self.0.key_name = Some(row.key_name.clone());
    }

    /// Begins the entry about the count of a wrong guess, such as an access code.
    pub(super) fn of_wrong_guess(&self, action: &'static str, call: CallId) -> Self {
        let mut entry = self.0.clone();
        entry.action = action.into();
        entry.call_id = Some(call);
        Self(entry)
    }

    /// Sets the name of the user key.
    pub(super) fn key_name(&mut self, name: &KeyName) {
        self.0.key_name = Some(name.clone());
    }

    pub(super) fn wrapping_key(&mut self, key: WrappingKeyId) {
        self.0.wrapping_key = Some(key);
    }

    /// Sets the SHA-256 of a stored envelope. If the wrapping key is compromised later, the digest tells a row that the broker made
    /// from a row that the holder of the key made.
    pub(super) fn envelope(&mut self, envelope: &[u8]) {
        self.0.digest = Some(sha256(envelope));
    }

    /// Removes the digest of an envelope that was not stored.
    pub(super) fn no_envelope(&mut self) {
        self.0.digest = None;
    }

    pub(super) fn kind(&self, kind: EntryKind) -> Self {
        let mut entry = self.0.clone();
        entry.kind = kind;
        Self(entry)
    }
}

impl Broker {
    /// Makes the intent of a mutation durable. If the audit log is too slow, the caller is refused, but the intent may
    /// still be written. If the intent was written, `maintain` records its outcome later.
    pub(super) async fn record_intent(
        &self,
        draft: &Draft,
        at: Timestamp,
    ) -> Result<OpenIntent, Error> {
        let Draft(entry) = draft.kind(EntryKind::Intent);
        let call = entry.call_id.expect("a draft is of a call");
        let intent = OpenIntent {
            call,
            at,
            intent: entry.clone(),
        };
        match self.audit.append(entry).await {
            Ok(_) => Ok(intent),
            Err(error) => {
                if error.may_appear() {
                    self.resolve_later(intent);
                }
                Err(error.into())
            }
        }
    }

    /// Makes the entry of an alert durable. The alert concerns a principal, and in some cases a record.
    pub(super) async fn record_alert(
        &self,
        principal: &Principal,
        call: &Call,
        action: &'static str,
        record: Option<(RecordId, Revision)>,
    ) -> Result<(), Error> {
        let mut entry = Entry::new(EntryKind::Decision, action, Outcome::Ok);
        (entry.record_id, entry.revision) = record.unzip();
        entry.principal = Some(principal.name().to_owned());
        entry.mapping = principal.mapping().map(str::to_owned);
        entry.tenant = Some(principal.tenant().clone());
        entry.call_id = Some(call.id);
        entry.peer = Some(call.peer.clone());
        self.audit.append(entry).await?;
        Ok(())
    }

    /// Makes the entry of a refusal or failure durable. Refusals because of overload are only counted, and the counts
    /// are recorded once a second.
    pub(super) async fn record_failure(
        &self,
        mut draft: Draft,
        error: &Error,
    ) -> Result<(), Error> {
        // A refused call gives back its place, because it only has to wait for the disk.
        leave();
        let Draft(entry) = &mut draft;
        if entry.kind == EntryKind::Decision && is_overload(error) {
            let principal = entry.principal.take().zip(entry.tenant.take());
            self.overload.note(principal, &entry.action, error);
            return Ok(());
        }
        if error.reason() == Reason::EnvelopeRejected
            && let Some(principal) = &draft.0.principal
            && self.limits.fail_principal(principal).is_err()
        {
            tracing::warn!(
                principal,
                "too many envelopes of one principal were rejected; the broker refuses this principal's calls for a \
                 limited time"
            );
        }
        draft.0.outcome = if error.reason() == Reason::Policy {
            Outcome::Denied
        } else {
            Outcome::Failed
        };
        draft.0.reason = Some(error.reason());
        self.audit.append(draft.0).await?;
        Ok(())
    }

    /// Records the result of a decision and returns it. If the audit entry cannot be written,
    /// returns the error of the audit log instead of the result, because every answer needs an
    /// audit entry.
    pub(super) async fn conclude<T>(
        &self,
        draft: Draft,
        result: Result<T, Error>,
    ) -> Result<Recorded<T>, Error> {
        match result {
            Ok(value) => {
                // While calls wait for the token, the processor time of a sync is better spent on the token.
                if draft.0.kind == EntryKind::Decision && self.token.is_saturated() {
                    self.audit.append_unhurried(draft.0).await?;
                } else {
                    self.audit.append(draft.0).await?;
                }
                Ok(Recorded(value))
            }
            Err(error) => {
                self.record_failure(draft, &error).await?;
                Err(error)
            }
        }
    }
}
