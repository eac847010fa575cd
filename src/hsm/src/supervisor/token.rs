//! Implements the broker's [`Token`] for the supervisor.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use async_trait::async_trait;
use tokio::sync::oneshot;
use tracing::Span;

use crate::{
    Caller, Error, Serving, Token, TokenState,
    caller::Lane,
    job::{Job, Output},
    queue::{self, Planned},
    release::{Recipient, Release, Sealed},
    rewrap::{self, Rewrap},
};
use keybroker_core::{
    call::{abandoned::Abandoned, outside_time},
    envelope::{Context, Envelope, Mac, Unsealed, mac::MacMessage},
    key::WrappingKeyId,
    secret::KeyMaterial,
};
use keybroker_worker_protocol::{
    ExpectedKey, Work,
    wire::{self, request},
};

use super::Supervisor;

impl Supervisor {
    /// Runs a job on any worker. Returns at the deadline at the latest, even if the worker hangs. If another token can
    /// do the job, the job fails as soon as this token has no worker for it.
    pub(crate) async fn run_job(
        &self,
        work: request::Job,
        caller: &Caller,
        has_alternative: bool,
    ) -> Result<Output, Error> {
        // `Work` is created first, because it overwrites the key material in the job when this function returns or
        // fails.
        let work = Work::new(work);
        self.check_serving()?;
        // The call no longer needs its place in the front, because its job now waits in the queue
        // of the token.
        queue::leave();
        let (done, answer) = oneshot::channel();
        self.queue.push(Job {
            work,
            caller: caller.clone(),
            done,
            abandoned: match caller.lane() {
                // Later calls also use the result, not only the call that caused the work.
                Lane::Background => Abandoned::default(),
                Lane::Principal(_) => Abandoned::current(),
            },
            queued: Instant::now(),
            waited: Duration::ZERO,
            has_alternative,
            retried: false,
            losses: 0,
            span: Span::current(),
        })?;
        // The state of the token may have changed after the check and before the job was added to the queue.
        self.answer_without_workers();
        if has_alternative {
            self.pass_on_without_workers();
        }
        match tokio::time::timeout_at(caller.deadline().instant().into(), answer).await {
            Ok(Ok(answer)) => {
                queue::note_answered();
                outside_time::note(answer.outside);
                answer.result
            }
            Ok(Err(_)) => Err(self.down("the job was dropped")),
            Err(_) => Err(Error::Deadline),
        }
    }

    /// Returns an error while the token is unavailable or must not be used.
    fn check_serving(&self) -> Result<(), Error> {
        let serving = self.serving.borrow().clone();
        match serving {
            Serving::Up => Ok(()),
            other => self.decider().refusal(&other).map_or(Ok(()), Err),
        }
    }

    /// Answers the waiting jobs if no worker is ready or expected. Otherwise, the jobs would wait until their
    /// deadlines.
    pub(super) fn answer_without_workers(&self) {
        if !self.queue.has_links()
            && let Err(error) = self.check_serving()
        {
            self.queue.fail_all(&error);
        }
    }

    /// Answers the waiting jobs that another token can do if no worker is ready.
    fn pass_on_without_workers(&self) {
        if !self.queue.has_links() {
            self.queue
                .fail_with_alternative(&self.down("no worker is ready"));
        }
    }

    async fn make_mac(
        &self,
        key: WrappingKeyId,
        message: &MacMessage,
        caller: &Caller,
    ) -> Result<Mac, Error> {
        self.check_key(key)?;
        to_mac(&self.run_job(mac_job(key, message), caller, false).await?)
    }

    /// Encrypts key material with the public key of a wrapping key, in software.
    pub(crate) fn encrypt(
        &self,
        key: WrappingKeyId,
        material: &KeyMaterial,
    ) -> Result<Unsealed, Error> {
        let found = Arc::clone(&self.found.load());
        let public = found.wrap.get(&key).ok_or(Error::UnknownKey(key))?;
        let wrapped = public
            .wrap(material.expose())
            .map_err(|error| Error::Untrusted(error.to_string()))?;
        Unsealed::new(public.algorithm(), key, wrapped)
            .map_err(|error| Error::Untrusted(error.to_string()))
    }
}

/// Returns the job that computes a MAC.
pub(crate) fn mac_job(key: WrappingKeyId, message: &MacMessage) -> request::Job {
    request::Job::Mac(wire::Mac {
        key_id: key.as_bytes().to_vec(),
        message: message.as_bytes().to_vec(),
    })
}

/// Returns the job that verifies a MAC.
pub(crate) fn verify_job(key: WrappingKeyId, message: &MacMessage, mac: &Mac) -> request::Job {
    request::Job::VerifyMac(wire::VerifyMac {
        key_id: key.as_bytes().to_vec(),
        message: message.as_bytes().to_vec(),
        mac: mac.to_vec(),
    })
}

/// Returns the job that verifies the MAC of an envelope and decrypts the envelope.
pub(crate) fn unwrap_job(envelope: &Envelope, context: &Context<'_>) -> request::Job {
    request::Job::Unwrap(rewrap::unwrap(envelope, context))
}

/// Returns the job that verifies the MAC of an envelope and computes a MAC for a new context.
pub(crate) fn rebind_job(
    envelope: &Envelope,
    unsealed: &Unsealed,
    old: &Context<'_>,
    new: &Context<'_>,
) -> request::Job {
    request::Job::Rebind(wire::Rebind {
        key_id: envelope.wrapping_key().as_bytes().to_vec(),
        message: envelope.mac_message(old).as_bytes().to_vec(),
        mac: envelope.mac().to_vec(),
        new_message: unsealed.mac_message(new).as_bytes().to_vec(),
    })
}

/// Returns the key material in the result of an unwrap.
pub(crate) fn to_material(mut output: Output) -> Result<KeyMaterial, Error> {
    KeyMaterial::new(std::mem::take(&mut *output))
        .map_err(|error| Error::Damaged(error.to_string()))
}

/// Returns the MAC in the result of a job.
pub(crate) fn to_mac(output: &Output) -> Result<Mac, Error> {
    output.as_slice().try_into().map_err(|_| {
        Error::Untrusted("the token returned a MAC that does not have 32 bytes".to_owned())
    })
}

#[async_trait]
impl Token for Supervisor {
    async fn wrap(
        &self,
        key: WrappingKeyId,
        context: Context<'_>,
        material: &KeyMaterial,
        caller: &Caller,
    ) -> Result<Envelope, Error> {
        self.check_key(key)?;
        let unsealed = self.encrypt(key, material)?;
        let message = unsealed.mac_message(&context);
        let mac = self.make_mac(key, &message, caller).await?;
        Ok(unsealed.seal(&context, mac))
    }

    async fn unwrap(
        &self,
        envelope: &Envelope,
        context: Context<'_>,
        caller: &Caller,
    ) -> Result<KeyMaterial, Error> {
        self.check_key(envelope.wrapping_key())?;
        let work = unwrap_job(envelope, &context);
        to_material(self.run_job(work, caller, false).await?)
    }

    async fn release(
        &self,
        envelope: &Envelope,
        context: Context<'_>,
        recipient: &Recipient,
        caller: &Caller,
    ) -> Result<Sealed, Error> {
        self.check_key(envelope.wrapping_key())?;
        let found = Arc::clone(&self.found.load());
        let key = rewrap::key(&found.keys, envelope.wrapping_key())?;
        let release = Release::new(envelope, context, recipient, key)?;
        let output = self.run_job(release.job(), caller, false).await?;
        release.sealed(output)
    }

    async fn rebind(
        &self,
        envelope: &Envelope,
        old: Context<'_>,
        new: Context<'_>,
        caller: &Caller,
    ) -> Result<Envelope, Error> {
        self.check_key(envelope.wrapping_key())?;
        let unsealed = envelope.to_unsealed();
        let work = rebind_job(envelope, &unsealed, &old, &new);
        let mac = to_mac(&self.run_job(work, caller, false).await?)?;
        Ok(unsealed.seal(&new, mac))
    }

    async fn mac(
        &self,
        key: WrappingKeyId,
        message: &MacMessage,
        caller: &Caller,
    ) -> Result<Mac, Error> {
        self.make_mac(key, message, caller).await
    }

    async fn verify_mac(
        &self,
        key: WrappingKeyId,
        message: &MacMessage,
        mac: &Mac,
        caller: &Caller,
    ) -> Result<(), Error> {
        self.check_key(key)?;
        let work = verify_job(key, message, mac);
        self.run_job(work, caller, false).await.map(drop)
    }

    async fn rewrap(
        &self,
        envelope: &Envelope,
        context: Context<'_>,
        to: WrappingKeyId,
        caller: &Caller,
    ) -> Result<Envelope, Error> {
        let found = Arc::clone(&self.found.load());
        let rewrap = Rewrap {
            envelope,
            context,
            to: rewrap::key(&found.keys, to)?,
        };
        let job = rewrap.on_one_token()?;
        let output = self.run_job(job, caller, false).await?;
        rewrap.moved(&output)
    }

    fn jobs_of_principals(&self) -> u64 {
        self.queue.jobs_of_principals()
    }

    fn check_admission(&self, caller: &Caller, planned: Planned) -> Result<(), Error> {
        self.queue.check_admission(caller, planned)
    }

    fn is_saturated(&self) -> bool {
        self.queue.len() > 0
    }

    fn state(&self) -> TokenState {
        self.current_state()
    }

    fn expect_keys(&self, keys: Vec<(String, Vec<ExpectedKey>)>) {
        let own = keys.into_iter().find(|(token, _)| token == self.name());
        if let Some((_, keys)) = own {
            self.expect(keys);
        }
    }
}
