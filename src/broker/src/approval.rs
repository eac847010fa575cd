//! Approvals by a second person: some changes of administrators need the approval of another person.
//!
//! A *person* is a name in the configuration with the principals that belong to this person, so that one person with two
//! credentials cannot approve their own request. The first call for such a change stores a request for approval and is refused with
//! `APPROVAL_NEEDED`. After another person has approved the request, the same call makes the change, once.
//!
//! The broker finds the request by a digest of the exact change and of the requesting person. The digest also covers a number that
//! the change itself increases: the number of the key's registry row, or the number of the new secret. An API client that is
//! created with an approval gets the id of the request. Therefore an approval that was used and is put back into the database
//! permits no second change.
//!
//! Mitigation: M25 of `THREAT_MODEL.md`.

use std::{collections::BTreeSet, time::Duration};

use aws_lc_rs::rand;

use keybroker_core::{
    call::{Deadline, Timestamp},
    error::{Error, Reason},
    key::{ApprovalId, ClientId, ID_BYTES, KeyUse},
    principal::{Action, Principal},
};
use keybroker_hsm as hsm;
use keybroker_store::{ApprovalRow, PersonOfPrincipal};

use super::{Broker, journal::Draft};

mod change;
mod decision;
mod gate;
mod list;

pub(super) use change::{Asked, Lifetime};
pub use decision::{Decided, Removal, Verdict};
pub use list::{ApprovalList, ApprovalView};

/// Time limit for a MAC job of the token.
const MAC_TIMEOUT: Duration = Duration::from_secs(5);
/// Highest number of open requests of one person, so that an administrator cannot fill the list of open requests.
const OPEN_MAX: u64 = 20;
/// Highest number of requests of one person that have not expired, so that an administrator cannot fill the database with requests
/// that are rejected at once.
const UNEXPIRED_MAX: u64 = 200;
/// In the audit log: the name of the rule that decided, in place of a policy.
const RULE: &str = "two-persons";

/// A person who can request and approve changes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Person {
    /// The name of the person.
    pub name: String,
    /// The names of the principals that belong to this person, as in the audit log.
    pub principals: BTreeSet<String>,
}

/// Which changes need an approval, and who the persons are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApprovalRules {
    /// The actions that need an approval.
    pub actions: BTreeSet<Action>,
    /// How long a request can be approved and used.
    pub expire_after: Duration,
    /// The persons. If there is none, no change needs an approval.
    pub persons: Vec<Person>,
    /// How long a request stays in the database after it expired.
    pub kept: Duration,
}

impl ApprovalRules {
    /// The actions that can need an approval.
    pub const ACTIONS: [Action; 4] = [
        Action::DestroyKey,
        Action::DestroyKeyNow,
        Action::LoseKey,
        Action::CreateClient,
    ];

    fn are_on(&self) -> bool {
        !self.persons.is_empty()
    }

    fn cover(&self, action: Action) -> bool {
        self.are_on() && self.actions.contains(&action)
    }

    /// The person to whom a principal belongs.
    fn person(&self, principal: &str) -> Option<&Person> {
        let mut persons = self.persons.iter();
        persons.find(|person| person.principals.contains(principal))
    }

    /// The name of the person to whom a principal belongs.
    fn person_of(&self, principal: &str) -> Option<&str> {
        self.person(principal).map(|person| person.name.as_str())
    }

    /// Whether a principal still belongs to the person to whom it belonged before.
    fn is_still(&self, known: &PersonOfPrincipal) -> bool {
        self.person_of(&known.principal) == Some(&known.person)
    }

    /// The persons who can approve a request of this person, for a message.
    fn approvers(&self, requester: &str) -> String {
        let others = self.persons.iter().map(|person| person.name.as_str());
        let others: Vec<&str> = others.filter(|name| *name != requester).collect();
        others.join(" or ")
    }
}

/// The reason why a row does not count as authentic.
#[derive(Debug)]
enum Unverified {
    /// No broker wrote the row as it is now.
    Altered(Error),
    /// The state of the signer forbids its use. It is not known whether a broker wrote the row.
    KeyState(Error),
    /// The row cannot be verified now, for example because the token is not available.
    NotNow(Error),
}

impl From<Error> for Unverified {
    fn from(error: Error) -> Self {
        Self::NotNow(error)
    }
}

impl From<Unverified> for Error {
    fn from(unverified: Unverified) -> Self {
        match unverified {
            Unverified::Altered(error)
            | Unverified::KeyState(error)
            | Unverified::NotNow(error) => error,
        }
    }
}

/// The approvals of one broker.
#[derive(Debug)]
pub(super) struct Approvals {
    rules: ApprovalRules,
    /// A lock that is held while a request is looked up and stored, so that one broker does not store two requests for one change.
    turn: tokio::sync::Mutex<()>,
}

impl Approvals {
    pub(super) fn new(rules: ApprovalRules) -> Self {
        Self {
            rules,
            turn: tokio::sync::Mutex::default(),
        }
    }
}

impl Broker {
    /// Returns the person to whom the principal belongs, and records it in the audit entry. A principal that belongs to no person
    /// is refused.
    fn person_of(
        &self,
        principal: &Principal,
        draft: &mut Draft,
    ) -> Result<PersonOfPrincipal, Error> {
        let name = principal.name();
        let Some(person) = self.approvals.rules.person_of(name) else {
            draft.policy(RULE);
            return Err(refused(&format!(
                "the principal {name:?} belongs to no [[approvals.person]] in the configuration of the broker, so it can neither \
                 request nor decide about a change that needs the approval of a second person"
            )));
        };
        draft.person(person);
        Ok(PersonOfPrincipal {
            person: person.to_owned(),
            principal: name.to_owned(),
        })
    }

    /// Whether two principals are the same, or belong to the same person of the configuration.
    pub(super) fn is_same_person(&self, one: &str, other: &str) -> bool {
        let person = |name| self.approvals.rules.person_of(name);
        one == other || person(one).is_some_and(|known| person(other) == Some(known))
    }

    /// The principals that belong to the person of a principal, or this principal alone.
    pub(super) fn principals_of_person<'a>(&'a self, principal: &'a str) -> Vec<&'a str> {
        self.approvals.rules.person(principal).map_or_else(
            || vec![principal],
            |person| person.principals.iter().map(String::as_str).collect(),
        )
    }

    /// The name of the person of a principal, or the name of the principal.
    pub(super) fn person_named<'a>(&'a self, principal: &'a str) -> &'a str {
        let person = self.approvals.rules.person_of(principal);
        person.unwrap_or(principal)
    }

    /// Checks that the principal may make a secret of an API client: only the person to whom the API client belongs may, because the
    /// holder of the secret can approve changes as this person.
    pub(super) fn check_owner(
        &self,
        principal: &Principal,
        client: ClientId,
        draft: &mut Draft,
    ) -> Result<(), Error> {
        let rules = &self.approvals.rules;
        let Some(owner) = rules.person_of(&format!("client:{client}")) else {
            return Ok(());
        };
        if rules.person_of(principal.name()) == Some(owner) {
            return Ok(());
        }
        draft.policy(RULE);
        Err(refused(&format!(
            "API client {client} belongs to {owner} in the configuration of the broker, so only {owner} can make a further secret of \
             it: the holder of the secret can approve changes as {owner}"
        )))
    }

    /// Checks that a broker wrote the row. Without this check, a person who can write to the database could approve a request.
    async fn verify_approval(&self, row: &ApprovalRow) -> Result<(), Unverified> {
        let altered = |cause: &str| Err(Unverified::Altered(damaged(row.id, cause)));
        let deadline = Deadline::after(MAC_TIMEOUT);
        if !self.registry()?.knows(row.signer) {
            self.refresh_registry().await?;
        }
        if !self.registry()?.knows(row.signer) {
            // The registry was just read, and brokers remove no rows from it.
            return altered(&format!(
                "its wrapping key {} is not registered",
                row.signer
            ));
        }
        let checked = self.check_key(deadline, row.signer, KeyUse::VerifyMac);
        checked.await.map_err(|error| match error.reason() {
            Reason::KeyState => Unverified::KeyState(error),
            _ => Unverified::NotNow(error),
        })?;
        let caller = hsm::Caller::background(deadline);
        let message = row.mac_message();
        let verified = self
            .token
            .verify_mac(row.signer, &message, &row.mac, &caller);
        let digest = change::digest_of(&row.action, &row.requested_by.person, &row.document);
        match verified.await {
            Ok(()) if digest == row.digest => Ok(()),
            Ok(()) => altered("its digest is that of another change"),
            Err(hsm::Error::MacRefused) => altered("its MAC does not verify"),
            Err(other) => Err(Unverified::NotNow(other.into())),
        }
    }

    /// Returns the row with a MAC by the integrity key that is in use.
    async fn with_approval_mac(&self, row: ApprovalRow) -> Result<ApprovalRow, Error> {
        let deadline = Deadline::after(MAC_TIMEOUT);
        let signer = self
            .ask_registry(deadline, super::Registry::integrity_key)
            .await?;
        let mut row = ApprovalRow { signer, ..row };
        let caller = hsm::Caller::background(deadline);
        row.mac = self.token.mac(signer, &row.mac_message(), &caller).await?;
        Ok(row)
    }

    /// Removes the requests for approval that expired long ago.
    pub(super) async fn forget_approvals(&self) {
        let kept = i64::try_from(self.approvals.rules.kept.as_micros()).unwrap_or(i64::MAX);
        let before = Timestamp::now().micros().saturating_sub(kept);
        match self
            .store
            .forget_approvals(Timestamp::from_micros(before))
            .await
        {
            Ok(count) => tracing::debug!(count, "deleted old requests for approval"),
            Err(error) => {
                tracing::warn!(%error, "cannot delete old requests for approval; the broker tries again later");
            }
        }
    }
}

/// A new id of a request for approval.
pub(super) fn fresh_id() -> Result<ApprovalId, Error> {
    let mut bytes = [0; ID_BYTES];
    rand::fill(&mut bytes).map_err(|_| Error::new(Reason::Bug, "no random bytes"))?;
    Ok(ApprovalId::from_bytes(bytes))
}

/// The error for a principal that may not request or decide.
fn refused(what: &str) -> Error {
    Error::new(Reason::Policy, what).explained("principal", what)
}

/// The error for a request whose state forbids the operation.
fn wrong_state(what: &str) -> Error {
    Error::new(Reason::ApprovalState, what).explained("id", what)
}

/// The error for a row that no broker wrote.
fn damaged(id: ApprovalId, cause: &str) -> Error {
    let what = format!(
        "the request for approval {id} was altered in the database: {cause}. Find out who can write to the database, then remove the \
         request with `keybroker approval reject {id}`"
    );
    Error::new(Reason::RecordDamaged, what.clone()).explained("id", &what)
}
