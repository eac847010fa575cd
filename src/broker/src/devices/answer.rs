//! The requesting device fetches the answer to its request for access, and confirms it.

use std::sync::Arc;

use subtle::ConstantTimeEq as _;

use keybroker_core::{
    call::{Call, Timestamp},
    device::{ACCESS_CODE_TRIES_MAX, AccessState},
    envelope::mac::MacMessage,
    error::{Error, Reason},
    key::{AccessRequestId, KeyUse, UserId},
    principal::{Action, Principal},
};
use keybroker_hsm as hsm;
use keybroker_store::{AccessRow, Answer, DeviceChange};

use crate::{
    Broker, Registry, caller,
    journal::{Draft, Recorded},
    within,
};

use super::{
    establish::{is_current, trusted_set},
    unknown, wrong_state,
};

/// The state of a request for access, with the answer if it was approved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AccessAnswer {
    /// The state at the time of the answer.
    pub state: AccessState,
    /// The user key, encrypted to the public key of the request.
    pub answer: Option<Answer>,
    /// When the request or its answer expires.
    pub expires: Timestamp,
}

impl Broker {
    /// Returns the state of a request of the principal, and the answer if the request was approved. The answer can be fetched again
    /// for five minutes, unless the user key was changed or removed, or the trust of a device was ended, after the approval.
    pub async fn fetch_access(
        self: &Arc<Self>,
        principal: &Principal,
        call: &Call,
        id: AccessRequestId,
        code: Vec<u8>,
    ) -> Result<AccessAnswer, Error> {
        let (broker, principal, call) = (Arc::clone(self), principal.clone(), call.clone());
        self.run_change(Action::FetchAccess, call.clone(), async move {
            let (row, draft) = broker.own_request(&principal, &call, id, &code).await?;
            let now = Timestamp::now();
            let view = AccessAnswer {
                state: row.state_at(now),
                answer: row.answer.clone(),
                expires: row.expires,
            };
            match view.state {
                AccessState::Pending => broker
                    .conclude(draft, Ok(view))
                    .await
                    .map(Recorded::into_inner),
                AccessState::Approved => {
                    let checked = broker.check_answer(&principal, &call, &row);
                    let guards = broker.or_record(&draft, Box::pin(checked).await).await?;
                    if row.fetched.is_some() {
                        let concluded = broker.conclude(draft, Ok(view)).await;
                        return concluded.map(Recorded::into_inner);
                    }
                    let fetched = AccessRow {
                        fetched: Some(now),
                        ..row.clone()
                    };
                    broker
                        .commit_access(&principal, &call, &draft, (&row, fetched), guards, now)
                        .await?;
                    Ok(view)
                }
                state => {
                    let what = format!("the request for access is {state}; make a new request");
                    broker
                        .or_record(&draft, Err(wrong_state("access_request_id", &what)))
                        .await
                }
            }
        })
        .await
    }

    /// Records that the requesting device has the user key. The answer is removed.
    pub async fn confirm_access(
        self: &Arc<Self>,
        principal: &Principal,
        call: &Call,
        id: AccessRequestId,
        code: Vec<u8>,
    ) -> Result<(), Error> {
        let (broker, principal, call) = (Arc::clone(self), principal.clone(), call.clone());
        self.run_change(Action::FetchAccess, call.clone(), async move {
            let (row, draft) = broker.own_request(&principal, &call, id, &code).await?;
            let now = Timestamp::now();
            let state = row.state_at(now);
            if state != AccessState::Approved || row.fetched.is_none() {
                let what = format!(
                    "the request for access is {state}; only a fetched answer can be confirmed: fetch the answer first, or make a new request"
                );
                let error = Err(wrong_state("access_request_id", &what));
                return broker.or_record(&draft, error).await;
            }
            let consumed = AccessRow {
                state: AccessState::Consumed,
                answer: None,
                closed: Some(now),
                ..row.clone()
            };
            let guards = DeviceChange::default();
            broker
                .commit_access(&principal, &call, &draft, (&row, consumed), guards, now)
                .await
        })
        .await
    }

    /// Checks that an answer opens the current user key, and that no trust of the member was ended after the approval. Returns the same
    /// requirements for the transaction of a change.
    async fn check_answer(
        &self,
        principal: &Principal,
        call: &Call,
        row: &AccessRow,
    ) -> Result<DeviceChange, Error> {
        let user = &row.device.address.user;
        let record = self.record_of(principal, call, user, &row.key_name).await?;
        let devices = self.verified_devices(principal, call, user).await?;
        if row.answer_revision != Some(record.revision) || !is_current(row, &devices) {
            let what = "the user key was replaced, or the trust of a device was ended, after the approval; make a new request for access";
            return Err(wrong_state("access_request_id", what));
        }
        Ok(DeviceChange {
            requires: Some((record.id, record.revision)),
            trusted: Some(trusted_set(principal, user, &devices)),
            ..DeviceChange::default()
        })
    }

    /// Commits a change of one request, with what it requires. `now` is the time of the change in the row.
    pub(super) async fn commit_access(
        &self,
        principal: &Principal,
        call: &Call,
        draft: &Draft,
        (before, row): (&AccessRow, AccessRow),
        guards: DeviceChange,
        now: Timestamp,
    ) -> Result<(), Error> {
        let token = caller(principal, call);
        let changed = self.changed_access(&token, row, Some(before)).await;
        let change = DeviceChange {
            request: Some(self.or_record(draft, changed).await?),
            ..guards
        };
        self.commit_devices(call, draft, &change, now)
            .await
            .map(drop)
    }

    /// Reads a request that the principal itself made, and checks its access code.
    async fn own_request(
        &self,
        principal: &Principal,
        call: &Call,
        id: AccessRequestId,
        code: &[u8],
    ) -> Result<(AccessRow, Draft), Error> {
        let begun = self.begin_device_action(principal, call, Action::FetchAccess, None);
        let (user, mut draft) = begun.await?;
        let found = self.requested_by(principal, call, &user, id).await;
        let row = self.or_record(&draft, found).await?;
        draft.access_request(&row, self.policy.place_of(&row.peer));
        if !row.state_at(Timestamp::now()).is_open() {
            // The state is final, so the code needs no check and no count.
            return Ok((row, draft));
        }
        let is_right = self
            .or_record(&draft, self.is_right(principal, call, &row, code).await)
            .await?;
        if is_right {
            return Ok((row, draft));
        }
        self.count_wrong_code(principal, call, &draft, &row).await?;
        let what = format!(
            "the access code is wrong; use the code of this request. After {ACCESS_CODE_TRIES_MAX} wrong codes, the request is over"
        );
        let error = Err(Error::new(Reason::AccessCode, what));
        self.or_record(&draft, error).await
    }

    /// Reads a request of this principal. The tries of other principals do not count, so a request of another principal is not found,
    /// also if it is of the same member.
    async fn requested_by(
        &self,
        principal: &Principal,
        call: &Call,
        user: &UserId,
        id: AccessRequestId,
    ) -> Result<AccessRow, Error> {
        self.check_acknowledged()?;
        let row = within(call, self.store.access_request(id)).await?;
        let row = row.filter(|row| {
            let address = &row.device.address;
            address.tenant == *principal.tenant()
                && address.user == *user
                && row.requested_by == principal.name()
        });
        let row = row.ok_or_else(|| unknown("access_request_id"))?;
        self.verify_access(&caller(principal, call), &row).await?;
        Ok(row)
    }

    /// Compares the access code in constant time.
    async fn is_right(
        &self,
        principal: &Principal,
        call: &Call,
        row: &AccessRow,
        code: &[u8],
    ) -> Result<bool, Error> {
        let token = caller(principal, call);
        let message = MacMessage::access_code(row.id, code);
        let present = self
            .ask_registry(call.deadline, Registry::integrity_key)
            .await?;
        if present == row.code_key {
            let mac = self.token.mac(present, &message, &token).await?;
            return Ok(mac.ct_eq(&row.code).into());
        }
        // The wrapping key was rotated, so only the earlier integrity key can verify the MAC.
        self.check_key(call.deadline, row.code_key, KeyUse::VerifyMac)
            .await?;
        let job = self
            .token
            .verify_mac(row.code_key, &message, &row.code, &token);
        match job.await {
            Ok(()) => Ok(true),
            Err(hsm::Error::MacRefused) => Ok(false),
            Err(other) => Err(other.into()),
        }
    }

    /// Counts a wrong access code. After too many, the request is over.
    async fn count_wrong_code(
        &self,
        principal: &Principal,
        call: &Call,
        draft: &Draft,
        row: &AccessRow,
    ) -> Result<(), Error> {
        let now = Timestamp::now();
        let tries = row.tries.saturating_add(1);
        let mut counted = AccessRow {
            tries,
            ..row.clone()
        };
        if tries >= ACCESS_CODE_TRIES_MAX {
            counted.state = match row.state {
                AccessState::Approved => AccessState::Revoked,
                _ => AccessState::Denied,
            };
            counted.answer = None;
            counted.closed = Some(now);
        }
        self.count_wrong_guess(
            principal,
            call,
            draft,
            (row, counted),
            "access_request.wrong_code",
            now,
        )
        .await
    }

    /// Stores the count of a wrong guess. The call fails, but the count must be stored. The count is therefore a separate change with a
    /// separate call id.
    pub(super) async fn count_wrong_guess(
        &self,
        principal: &Principal,
        call: &Call,
        draft: &Draft,
        rows: (&AccessRow, AccessRow),
        action: &'static str,
        now: Timestamp,
    ) -> Result<(), Error> {
        let own = Call::start(call.peer.clone(), call.deadline);
        let draft = draft.of_wrong_guess(action, own.id);
        self.commit_access(principal, &own, &draft, rows, DeviceChange::default(), now)
            .await
    }
}
