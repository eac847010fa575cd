//! A session of an administrator or of the service: server, token and database, and the checks of each request.

use std::{
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use serde_json::json;

use crate::{
    cli::{
        block_on,
        exit::{Exit, Failure},
        output::Field,
        pin::log_in,
    },
    config::Config,
};
use keybroker_core::{call::Timestamp, organization::Guid};
use keybroker_hsm::admin::{Admin, AdminError, DeviceRelease};
use keybroker_store as store;
use keybroker_store::{StoreLock, tables::Tables};
use keybroker_worker_protocol::PinSource;

use super::{
    Organization,
    api::{Api, Approved},
    key::WrappedKey,
    pending::{Pending, Unreadable},
    pins::{KeyState, MemberKey, Pins},
    refusal::Refusal,
};

/// Longest wait for an embedded database that another command uses.
const LOCK_WAIT: Duration = Duration::from_secs(5);
const LOCK_PAUSE: Duration = Duration::from_millis(50);
/// The hint after this wait.
const IN_USE: &str = "if `bitwarden approvals run` uses this database, try again after its pass over the requests; if a broker uses it, \
                      configure a separate database for these commands";

/// A token that has the organisation's key, after its checks.
pub(super) fn open_token(
    config: &Config,
    pin: &PinSource,
    organization: Organization<'_>,
) -> Result<Admin, Failure> {
    let admin = log_in(config, pin, false, &[])?;
    let key = admin.check_organization_key(organization.id.key_id())?;
    if key.fingerprint != organization.fingerprint {
        let what = format!(
            "the key of organisation {} on the token has the public key {}, but `public_key_sha256` is {}",
            organization.id, key.fingerprint, organization.fingerprint
        );
        return Err(Failure::new(Exit::Untrusted, what).hint(
            "compare both values with the SHA-256 of the organisation's public key; after the organisation changed its key pair, \
             remove the key from the token and import the new key",
        ));
    }
    Ok(admin)
}

/// Opens the database, calls `work`, and closes the database. Meanwhile, no other process can use an embedded database, so `work` must not
/// wait for a person.
pub(super) fn with_store<T>(
    config: &Config,
    work: impl AsyncFnOnce(&Arc<dyn Tables>) -> Result<T, Failure>,
) -> Result<T, Failure> {
    let _lock = lock(config)?;
    block_on(async {
        let store = store::open_tables(&config.store).await?;
        let done = work(&store).await;
        store.close().await;
        done
    })?
}

/// Locks an embedded database. Another command of this kind usually needs the lock only for a moment. A pass of
/// `approvals run` may take much longer.
fn lock(config: &Config) -> Result<StoreLock, Failure> {
    let until = Instant::now() + LOCK_WAIT;
    loop {
        match store::lock(&config.store) {
            Err(store::Error::InUse(_)) if Instant::now() < until => thread::sleep(LOCK_PAUSE),
            Err(error @ store::Error::InUse(_)) => return Err(Failure::from(error).hint(IN_USE)),
            locked => return Ok(locked?),
        }
    }
}

/// A request with the member's wrapped key and what the pins say about it.
#[derive(Clone, Debug)]
pub(super) struct Reviewed {
    pub(super) pending: Pending,
    /// The key and its state, or the reason why the request cannot be approved.
    pub(super) key: Result<(WrappedKey, KeyState), Refusal>,
}

/// Fetches the member's wrapped key, and compares it with the pins.
pub(super) async fn review(
    api: &mut Api<'_>,
    pins: Pins<'_>,
    pending: Pending,
) -> Result<Reviewed, Failure> {
    if pending.is_expired(Timestamp::now()) {
        let key = Err(Refusal::Expired);
        return Ok(Reviewed { pending, key });
    }
    let wrapped = match api.details(pending.organization_user).await {
        Ok(None) => Err(Refusal::NoMember),
        Ok(Some(details)) => details.wrapped_key().map_err(Refusal::from),
        // The answer about one member must not hold up the requests of the others.
        Err(error) if error.others_may_succeed => Err(Refusal::Server {
            status: error.status,
            failure: error.failure,
        }),
        Err(error) => return Err(error.into()),
    };
    let key = match wrapped {
        Ok(key) => {
            let state = pins
                .state_and_pin(&MemberKey::new(&pending, key.digest))
                .await?;
            state.map(|state| (key, state)).ok_or(Refusal::NewKeys)
        }
        Err(why) => Err(why),
    };
    Ok(Reviewed { pending, key })
}

impl Reviewed {
    /// The request as a person sees it. `phrase` is shown unless the person must type it.
    pub(super) fn fields(&self) -> Vec<Field> {
        let pending = &self.pending;
        let (digest, state, problem) = match &self.key {
            Ok((key, state)) => {
                let problem = (!state.is_for_policy()).then(|| state.to_string());
                (Some(hex::encode(key.digest)), Some(state.name()), problem)
            }
            Err(why) => (None, None, Some(why.to_string())),
        };
        vec![
            ("request", json!(pending.id.to_string())),
            ("email", json!(pending.email)),
            ("phrase", json!(pending.phrase().to_string())),
            ("device_type", json!(pending.device_type)),
            ("device", json!(pending.device)),
            (
                "address",
                json!(pending.address.map(|address| address.to_string())),
            ),
            ("country", json!(pending.country)),
            ("created", json!(pending.created.to_string())),
            ("expires", json!(pending.expires().to_string())),
            ("member", json!(pending.member.to_string())),
            ("key_state", json!(state)),
            ("key_sha256", json!(digest)),
            ("problem", json!(problem)),
        ]
    }

    /// Whether this review has the same parts as an earlier one, for which a person typed the phrase. The earlier review pinned a key that
    /// was seen for the first time, so the key is known now.
    pub(super) fn is_same_as(&self, earlier: &Self) -> bool {
        let parts = |reviewed: &Self| {
            let pending = &reviewed.pending;
            let key = reviewed.key.as_ref().ok().map(|(key, _)| key.digest);
            (
                [pending.id, pending.member, pending.organization_user],
                pending.email.clone(),
                pending.public_key.clone(),
                key,
            )
        };
        let is_same_state = match (&self.key, &earlier.key) {
            (Ok((_, now)), Ok((_, before))) => {
                now == before || (now.is_for_policy() && before.is_for_policy())
            }
            (now, before) => now.is_err() && before.is_err(),
        };
        is_same_state && parts(self) == parts(earlier)
    }

    /// Lets the token re-encrypt the member's key for the device. The inner error is the reason why this key is not released; the outer
    /// error is a failure of the token.
    pub(super) fn release(
        &self,
        admin: &Admin,
        organization: Organization<'_>,
        key: &WrappedKey,
    ) -> Result<Result<Approved, Refusal>, AdminError> {
        let id = organization.id.key_id();
        let recipient = &self.pending.public_key;
        let released =
            admin.release_to_device(id, organization.fingerprint, &key.ciphertext, recipient)?;
        Ok(match released {
            DeviceRelease::Released(ciphertext) => Ok(Approved {
                request: self.pending.id,
                ciphertext,
            }),
            DeviceRelease::Refused(why) => Err(Refusal::Token(why)),
        })
    }
}

impl Unreadable {
    /// The same fields as those of a request, with the problem.
    pub(super) fn fields(&self) -> Vec<Field> {
        let id = self.id.map(|id| json!(id.to_string()));
        let unknown = [
            "email",
            "phrase",
            "device_type",
            "device",
            "address",
            "country",
            "created",
            "expires",
            "member",
            "key_state",
            "key_sha256",
        ];
        let mut fields = vec![("request", json!(id))];
        fields.extend(unknown.map(|name| (name, json!(null))));
        fields.push(("problem", json!(self.reason())));
        fields
    }
}

/// The pending requests with these ids, in their order. A request that is not pending is an error.
pub(super) fn chosen(pending: &[Pending], wanted: &[Guid]) -> Result<Vec<Pending>, Failure> {
    let find = |id: &Guid| {
        let found = pending.iter().find(|one| one.id == *id).cloned();
        found.ok_or_else(|| {
            let what = format!(
                "request {id} is not pending: it was decided or has expired, or the server sent it in a form that is not accepted"
            );
            Failure::new(Exit::Refused, what)
                .hint("`keybroker bitwarden approvals list` shows the pending requests")
        })
    };
    wanted.iter().map(find).collect()
}
