//! Request ids: a retry of a mutation gets the answer of the first attempt. If a request id is used again with
//! different content, the mutation is refused.
//!
//! Mitigation: M12 of `THREAT_MODEL.md`.

use subtle::ConstantTimeEq as _;

use keybroker_core::{
    call::{Call, RequestId},
    envelope::mac::MacMessage,
    error::{Error, Reason},
    key::{KeyUse, Revision},
    principal::Principal,
};
use keybroker_hsm as hsm;
use keybroker_store::{RecordInfo, RequestRecord, RequestScope, RequestStamp, request_message};

use super::{Broker, UserKeyRef, caller, change::Change, registry::Registry, within};

impl Broker {
    /// Returns the request id with a MAC of the request's content. The token computes the MAC.
    pub(super) async fn request_stamp(
        &self,
        principal: &Principal,
        call: &Call,
        key: &UserKeyRef,
        change: &Change,
        id: RequestId,
    ) -> Result<RequestStamp, Error> {
        let integrity_key = self
            .ask_registry(call.deadline, Registry::integrity_key)
            .await?;
        let message = content(key, change);
        let mac = within(
            call,
            self.token
                .mac(integrity_key, &message, &caller(principal, call)),
        )
        .await?;
        Ok(RequestStamp {
            scope: RequestScope {
                tenant: principal.tenant().clone(),
                principal: principal.name().to_owned(),
                id,
            },
            content: mac,
            key: integrity_key,
            result: None,
        })
    }

    /// Adds the expected result of the mutation, and a MAC of this result, to the stamp of a request.
    pub(super) async fn with_result(
        &self,
        token: &hsm::Caller,
        call: &Call,
        stamp: RequestStamp,
        result: RecordInfo,
    ) -> Result<RequestStamp, Error> {
        let message = request_message(&stamp.scope, &stamp.content, &result);
        let mac = within(call, self.token.mac(stamp.key, &message, token)).await?;
        Ok(RequestStamp {
            result: Some((result, mac)),
            ..stamp
        })
    }

    /// Returns an error if the stored answer to a request id was altered. A row that was written before schema version
    /// 4 has no MAC and is accepted.
    async fn verify_result(
        &self,
        token: &hsm::Caller,
        scope: &RequestScope,
        earlier: &RequestRecord,
    ) -> Result<(), Error> {
        let Some(mac) = &earlier.result_mac else {
            return Ok(());
        };
        let altered = || {
            let what = "the stored answer to the request id was altered";
            Error::new(Reason::RecordDamaged, what)
        };
        if !self.registry()?.knows(earlier.key) {
            self.refresh_registry().await?;
            if !self.registry()?.knows(earlier.key) {
                return Err(altered());
            }
        }
        self.check_key(token.deadline(), earlier.key, KeyUse::VerifyMac)
            .await?;
        let message = request_message(scope, &earlier.content, &earlier.result);
        let job = self.token.verify_mac(earlier.key, &message, mac, token);
        match job.await {
            Ok(()) => Ok(()),
            Err(hsm::Error::MacRefused) => Err(altered()),
            Err(other) => Err(other.into()),
        }
    }

    /// Returns the answer to an earlier call with the same request id and content.
    pub(super) async fn earlier_result(
        &self,
        token: &hsm::Caller,
        call: &Call,
        stamp: &RequestStamp,
        key: &UserKeyRef,
        change: &Change,
    ) -> Result<Option<RecordInfo>, Error> {
        let Some(earlier) = within(call, self.store.request(&stamp.scope)).await? else {
            return Ok(None);
        };
        self.verify_result(token, &stamp.scope, &earlier).await?;
        let same = if earlier.key == stamp.key {
            bool::from(earlier.content.ct_eq(&stamp.content))
        } else {
            // The wrapping key was rotated after the first attempt, so only the earlier integrity key can verify the
            // MAC.
            let message = content(key, change);
            let job = self
                .token
                .verify_mac(earlier.key, &message, &earlier.content, token);
            match job.await {
                Ok(()) => true,
                Err(hsm::Error::MacRefused) => false,
                Err(other) => return Err(other.into()),
            }
        };
        if same && earlier.result_mac.is_none() {
            // A row without a MAC may come from an attacker who can write to the database.
            let detail = "an earlier version of the broker stored the answer to the request id without a MAC; read the record instead";
            Err(Error::new(Reason::Revision, detail))
        } else if same {
            Ok(Some(earlier.result))
        } else {
            let detail = "the request id was used before with other content";
            Err(Error::new(Reason::RequestIdReused, detail))
        }
    }
}

fn content(key: &UserKeyRef, change: &Change) -> MacMessage {
    let number = |revision: Option<Revision>| revision.map_or(0, Revision::get).to_be_bytes();
    let (material, expected, revision) = match change {
        Change::Create { material } => (Some(material), None, None),
        Change::Replace { material, expected } => (Some(material), Some(*expected), None),
        Change::Delete { expected } => (None, Some(*expected), None),
        Change::Undelete => (None, None, None),
        Change::Restore { revision, expected } => (None, Some(*expected), Some(*revision)),
    };
    MacMessage::request(&[
        change.action().as_str().as_bytes(),
        key.user.as_str().as_bytes(),
        key.name.as_str().as_bytes(),
        material.map_or(&[], |material| material.expose()),
        &number(expected),
        &number(revision),
    ])
}
