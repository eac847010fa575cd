//! The devices and the requests for access, as members and approvers see them.

use std::collections::BTreeSet;

use aws_lc_rs::digest;

use keybroker_core::{
    call::{Call, Timestamp},
    device::AccessState,
    envelope::Mac,
    error::{Error, Reason},
    fingerprint_phrase::{FINGERPRINT_PHRASE_WORDS, FingerprintPhrase},
    key::{AccessRequestId, UserId, WrappingKeyId},
    principal::{Action, Kind, Principal, Reach},
};
use keybroker_policy::Resource;
use keybroker_store::{
    ACCESS_REQUESTS_LISTED_MAX, AccessCursor, AccessQuery, AccessRow, DamagedAccess, DamagedDevice,
    DeviceRow, PendingOnly,
};

use crate::{
    Broker, caller,
    journal::{Draft, Recorded},
    observed, within,
};

/// A device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceView {
    /// The stored device.
    pub row: DeviceRow,
    /// Whether the token verified the row for this answer.
    pub is_verified: bool,
    /// Whether the row was altered in the database.
    pub is_altered: bool,
}

impl DeviceView {
    /// A row that this broker has just written or verified.
    pub(super) fn verified(row: DeviceRow) -> Self {
        Self {
            row,
            is_verified: true,
            is_altered: false,
        }
    }
}

/// The devices of a member.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceList {
    /// The devices in the order of their ids.
    pub devices: Vec<DeviceView>,
    /// Rows that cannot be read.
    pub damaged: Vec<DamagedDevice>,
}

/// The fingerprint phrase of a request for access.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PhraseView {
    /// The words. For an approver, two of them are hidden: the member says them, and the approver types them.
    pub words: [Option<&'static str>; FINGERPRINT_PHRASE_WORDS],
}

/// A request for access.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AccessView {
    /// The stored request.
    pub row: AccessRow,
    /// The state at the time of the answer.
    pub state: AccessState,
    /// The place from which the request came: the name of the network of its address, or empty.
    pub place: String,
    /// The phrase that the member and the approver compare.
    pub phrase: PhraseView,
    /// Whether the token verified the row for this answer.
    pub is_verified: bool,
    /// Whether the row was altered in the database.
    pub is_altered: bool,
}

impl AccessView {
    /// A row that this broker has just written or verified, for the member.
    pub(super) fn verified(row: AccessRow, place: String) -> Self {
        Self {
            state: row.state_at(Timestamp::now()),
            place,
            phrase: PhraseView {
                words: phrase(&row).words().map(Some),
            },
            row,
            is_verified: true,
            is_altered: false,
        }
    }

    /// The SHA-256 of the public key of the request.
    pub fn public_key_sha256(&self) -> [u8; 32] {
        let digest = digest::digest(&digest::SHA256, &self.row.public_key);
        let mut bytes = [0; 32];
        bytes.copy_from_slice(digest.as_ref());
        bytes
    }

    /// The request as a principal may see it.
    pub(super) fn for_principal(self, principal: &Principal) -> Self {
        match principal.kind() {
            Kind::User => self,
            Kind::Service => self.for_approver(),
        }
    }

    /// Hides the words that the approver must hear from the member.
    pub(super) fn for_approver(mut self) -> Self {
        for position in hidden_words(&self.row.code) {
            self.phrase.words[position] = None;
        }
        self
    }
}

/// The fingerprint phrase of the public key of a request. The further text is the user id of the member.
pub(super) fn phrase(row: &AccessRow) -> FingerprintPhrase {
    FingerprintPhrase::new(row.device.address.user.as_str(), &row.public_key)
}

/// The positions of the two words that an approver types. They depend on the MAC of the access code, which only the broker and readers of
/// the database know: a person who knew the positions could make a key whose phrase has the right words there, with about 2^26 attempts.
pub(super) fn hidden_words(code: &Mac) -> [usize; 2] {
    let [first, second, ..] = *code;
    let first = usize::from(first) % FINGERPRINT_PHRASE_WORDS;
    let step = 1 + usize::from(second) % (FINGERPRINT_PHRASE_WORDS - 1);
    let second = (first + step) % FINGERPRINT_PHRASE_WORDS;
    [first.min(second), first.max(second)]
}

/// Number of requests for access on a page, unless the caller wants another number.
const PAGE: u32 = 100;

/// Which requests for access are listed, and which page of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AccessPage {
    /// Also list the requests that were decided or have expired, and for an approver the own requests.
    pub all: bool,
    /// [`AccessList::next`] of the page before; `None` for the first page.
    pub after: Option<AccessCursor>,
    /// Number of requests, 1 to [`ACCESS_REQUESTS_LISTED_MAX`].
    pub limit: u32,
}

impl From<bool> for AccessPage {
    /// The first page of the pending requests or, with `true`, of all requests.
    fn from(all: bool) -> Self {
        Self {
            all,
            after: None,
            limit: PAGE,
        }
    }
}

/// One page of the requests for access.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AccessList {
    /// The requests, newest first.
    pub requests: Vec<AccessView>,
    /// Rows that cannot be read.
    pub damaged: Vec<DamagedAccess>,
    /// The last position of this page, if there may be another page.
    pub next: Option<AccessCursor>,
}

impl Broker {
    /// Returns the devices of a member. Without `user`, the member is the principal itself.
    pub async fn list_devices(
        &self,
        principal: &Principal,
        call: &Call,
        user: Option<&UserId>,
    ) -> Result<DeviceList, Error> {
        let action = Action::ListDevices;
        Box::pin(observed(action, call, async {
            let list = async {
                let (user, draft) = self
                    .begin_device_action(principal, call, action, user)
                    .await?;
                let listed = self.listed_devices(principal, call, &user).await;
                self.conclude(draft, listed).await.map(Recorded::into_inner)
            };
            let entered = self.enter(principal, call, action).await?;
            entered.run(Box::pin(list)).await
        }))
        .await
    }

    async fn listed_devices(
        &self,
        principal: &Principal,
        call: &Call,
        user: &UserId,
    ) -> Result<DeviceList, Error> {
        self.check_acknowledged()?;
        let found = within(call, self.store.devices(principal.tenant(), user)).await?;
        let mut list = DeviceList {
            devices: Vec::new(),
            damaged: Vec::new(),
        };
        let token = caller(principal, call);
        let mut failed = BTreeSet::new();
        for row in found {
            match row {
                Ok(row) => {
                    let verified = self.verify_device(&token, &row);
                    let (is_verified, is_altered) = listed(row.signer, &mut failed, verified).await;
                    list.devices.push(DeviceView {
                        row,
                        is_verified,
                        is_altered,
                    });
                }
                Err(damaged) => list.damaged.push(damaged),
            }
        }
        Ok(list)
    }

    /// Returns one page of requests for access: those of the principal, or for an approver those of the users whom the configuration
    /// names. Unless all are wanted, only pending requests are returned, and for an approver only those of other persons.
    pub async fn list_access_requests(
        &self,
        principal: &Principal,
        call: &Call,
        page: impl Into<AccessPage>,
    ) -> Result<AccessList, Error> {
        let listed = self.listed_requests(principal, call, page.into());
        self.read_requests(principal, call, listed).await
    }

    /// Returns the latest decisions about requests for access: those of the principal, or for an approver those of the users whom the
    /// configuration names.
    pub async fn list_access_decisions(
        &self,
        principal: &Principal,
        call: &Call,
        limit: u32,
    ) -> Result<AccessList, Error> {
        let listed = self.listed_decisions(principal, call, limit);
        self.read_requests(principal, call, listed).await
    }

    /// Returns one request for access: of the principal, or for an approver of a user whom the configuration names.
    pub async fn access_request(
        &self,
        principal: &Principal,
        call: &Call,
        id: AccessRequestId,
    ) -> Result<AccessView, Error> {
        let shown = async {
            let row = self.stored_request(principal, call, id).await?;
            self.shown_request(principal, call, row).await
        };
        self.read_requests(principal, call, shown).await
    }

    /// Reads requests for access, if the policy permits it, and records the outcome.
    async fn read_requests<T>(
        &self,
        principal: &Principal,
        call: &Call,
        read: impl Future<Output = Result<T, Error>> + Send,
    ) -> Result<T, Error> {
        let action = Action::ListAccess;
        Box::pin(observed(action, call, async {
            self.check_admission(&caller(principal, call), principal, call, action)
                .await?;
            let recorded = async {
                let draft = self.begin_list(principal, call).await?;
                let result = Box::pin(read).await;
                self.conclude(draft, result).await.map(Recorded::into_inner)
            };
            let entered = self.enter(principal, call, action).await?;
            entered.run(Box::pin(recorded)).await
        }))
        .await
    }

    /// Asks the policy whether a principal may see requests for access, and begins the audit entry.
    async fn begin_list(&self, principal: &Principal, call: &Call) -> Result<Draft, Error> {
        let action = Action::ListAccess;
        let resource = Resource::Devices {
            tenant: principal.tenant(),
            user: principal.subject(),
        };
        let permit = self.permit(principal, call, action, resource).await?;
        let mut draft = Draft::of(principal, call, action, resource);
        draft.policy(permit.policy());
        Ok(draft)
    }

    async fn shown_request(
        &self,
        principal: &Principal,
        call: &Call,
        row: AccessRow,
    ) -> Result<AccessView, Error> {
        if !covers(principal, &row) {
            return Err(super::unknown("access_request_id"));
        }
        let mut viewed = self.viewed(principal, call, [Ok(row)]).await;
        let view = viewed.requests.pop();
        view.ok_or_else(|| super::unknown("access_request_id"))
    }

    async fn listed_requests(
        &self,
        principal: &Principal,
        call: &Call,
        page: AccessPage,
    ) -> Result<AccessList, Error> {
        if !(1..=ACCESS_REQUESTS_LISTED_MAX).contains(&page.limit) {
            let what = format!("at most {ACCESS_REQUESTS_LISTED_MAX}");
            return Err(Error::violation("page_size", what));
        }
        self.check_acknowledged()?;
        let now = Timestamp::now();
        let is_member = principal.kind() == Kind::User;
        let except = if is_member { "" } else { principal.name() };
        let pending = PendingOnly {
            now,
            except: except.to_owned(),
        };
        let query = AccessQuery {
            tenant: principal.tenant().clone(),
            users: visible_users(principal),
            pending: (!page.all).then_some(pending),
            after: page.after,
            limit: page.limit,
        };
        let found = within(call, self.store.access_requests(&query)).await?;
        let is_full = u32::try_from(found.len()).is_ok_and(|count| count >= page.limit);
        let next = found.last().map(|(cursor, _)| *cursor).filter(|_| is_full);
        let is_wanted = |row: &AccessRow| {
            page.all || is_member || !self.is_same_person(principal.name(), &row.requested_by)
        };
        let rows = found.into_iter().map(|(_, row)| row);
        let rows = rows.filter(|row| row.as_ref().map_or(true, &is_wanted));
        let list = self.viewed(principal, call, rows).await;
        Ok(AccessList { next, ..list })
    }

    async fn listed_decisions(
        &self,
        principal: &Principal,
        call: &Call,
        limit: u32,
    ) -> Result<AccessList, Error> {
        self.check_acknowledged()?;
        let users = visible_users(principal);
        let found = self
            .store
            .access_decisions(principal.tenant(), &users, limit);
        let found = within(call, found).await?;
        Ok(self.viewed(principal, call, found).await)
    }

    /// The requests as a principal may see them, each verified by the token.
    async fn viewed(
        &self,
        principal: &Principal,
        call: &Call,
        rows: impl IntoIterator<Item = Result<AccessRow, DamagedAccess>>,
    ) -> AccessList {
        let mut list = AccessList {
            requests: Vec::new(),
            damaged: Vec::new(),
            next: None,
        };
        let token = caller(principal, call);
        let mut failed = BTreeSet::new();
        for row in rows {
            let row = match row {
                Ok(row) => row,
                Err(damaged) => {
                    list.damaged.push(damaged);
                    continue;
                }
            };
            let verified = self.verify_access(&token, &row);
            let (is_verified, is_altered) = listed(row.signer, &mut failed, verified).await;
            let view = AccessView {
                is_verified,
                is_altered,
                ..self.access_view(row)
            };
            list.requests.push(view.for_principal(principal));
        }
        list
    }
}

/// The users whose requests a principal may see. A member sees the own requests.
fn visible_users(principal: &Principal) -> Reach<UserId> {
    match principal.subject() {
        Some(user) => Reach::Only([user.clone()].into()),
        None => principal.identity().users.clone(),
    }
}

/// Whether a principal may see a request. A member sees the own requests, and an approver those of the users whom the
/// configuration names.
fn covers(principal: &Principal, row: &AccessRow) -> bool {
    principal.kind() == Kind::User
        || principal
            .identity()
            .users
            .contains(&row.device.address.user)
}

/// Whether a listed row was verified, and whether it was altered. `failed` are the signers that the token could not use for this
/// list: the token is not asked again for each of their rows.
async fn listed(
    signer: WrappingKeyId,
    failed: &mut BTreeSet<WrappingKeyId>,
    verified: impl Future<Output = Result<(), Error>>,
) -> (bool, bool) {
    if failed.contains(&signer) {
        return (false, false);
    }
    match verified.await {
        Ok(()) => (true, false),
        Err(error) if error.reason() == Reason::RecordDamaged => (false, true),
        Err(error) => {
            failed.insert(signer);
            tracing::info!(%error, "the token did not verify all rows of a list of devices or requests");
            (false, false)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use keybroker_core::envelope::MAC_BYTES;

    use super::*;

    #[test]
    fn two_different_words_are_hidden() {
        let mut pairs = BTreeSet::new();
        for first in 0..=255 {
            for second in 0..=255 {
                let mut code = [0; MAC_BYTES];
                (code[0], code[1]) = (first, second);
                let [one, two] = hidden_words(&code);
                assert!(one < two && two < 5);
                pairs.insert([one, two]);
            }
        }
        assert_eq!(pairs.len(), 10);
    }
}
