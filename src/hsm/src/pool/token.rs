//! Implements the broker's [`Token`] for several tokens.

use async_trait::async_trait;

use keybroker_core::{
    envelope::{Algorithm, Context, Envelope, Mac, mac::MacMessage},
    key::WrappingKeyId,
    secret::KeyMaterial,
};

use crate::{
    Caller, Error, ExpectedKey, Planned, Token, TokenKey, TokenState,
    queue::{Kind, Operation},
    release::{Recipient, Release, Sealed},
    rewrap::Rewrap,
    supervisor::token::{mac_job, rebind_job, to_mac, to_material, unwrap_job, verify_job},
};

use super::{Members, Need, Pool};

impl Need {
    /// Returns the requirements of a job that uses only the integrity key.
    fn integrity(key: WrappingKeyId) -> Self {
        Self {
            kind: Kind::new(key, Operation::Mac),
            algorithm: None,
            second: None,
        }
    }
}

impl Members {
    /// Returns the algorithm for new envelopes under a key. Every token with the key must be able to decrypt the
    /// envelopes. Therefore the hash is SHA-1 if a token with the key supports only SHA-1, and otherwise SHA-256.
    fn algorithm_of(&self, key: WrappingKeyId) -> Option<Algorithm> {
        let of_tokens = self
            .opened
            .iter()
            .filter_map(|member| member.supervisor.algorithm(key));
        of_tokens.max_by_key(|algorithm| *algorithm == Algorithm::RsaOaepSha1)
    }

    /// Returns a sealed wrapping key with the algorithm that every token with the key supports, and with the worst protection
    /// of these tokens.
    fn sealed_key(&self, key: WrappingKeyId) -> Result<TokenKey, Error> {
        let of_tokens = self
            .opened
            .iter()
            .filter_map(|member| member.supervisor.token_key(key));
        let sealing = of_tokens.filter_map(|found| found.sealing).max();
        Ok(TokenKey {
            sealing,
            ..self.target(key)?
        })
    }

    fn is_sealed(&self, key: WrappingKeyId) -> bool {
        let mut of_tokens = self
            .opened
            .iter()
            .filter_map(|member| member.supervisor.token_key(key));
        of_tokens.any(|found| found.sealing.is_some())
    }

    /// Returns the public key to which envelopes are moved, with the algorithm for new envelopes.
    fn target(&self, key: WrappingKeyId) -> Result<TokenKey, Error> {
        let found = self
            .opened
            .iter()
            .find_map(|member| member.supervisor.token_key(key));
        match (found, self.algorithm_of(key)) {
            (Some(found), Some(algorithm)) => Ok(TokenKey { algorithm, ..found }),
            _ => Err(self.absent(key)),
        }
    }
}

#[async_trait]
impl Token for Pool {
    async fn wrap(
        &self,
        key: WrappingKeyId,
        context: Context<'_>,
        material: &KeyMaterial,
        caller: &Caller,
    ) -> Result<Envelope, Error> {
        let members = self.members();
        if let Some(only) = members.only() {
            return only.wrap(key, context, material, caller).await;
        }
        let algorithm = members.algorithm_of(key);
        let holder = members
            .opened
            .iter()
            .find(|member| algorithm.is_some() && member.supervisor.algorithm(key) == algorithm)
            .ok_or_else(|| members.absent(key))?;
        let unsealed = holder.supervisor.encrypt(key, material)?;
        let message = unsealed.mac_message(&context);
        let mac = members.mac(key, &message, caller).await?;
        Ok(unsealed.seal(&context, mac))
    }

    async fn unwrap(
        &self,
        envelope: &Envelope,
        context: Context<'_>,
        caller: &Caller,
    ) -> Result<KeyMaterial, Error> {
        let members = self.members();
        if let Some(only) = members.only() {
            return only.unwrap(envelope, context, caller).await;
        }
        let need = Need {
            kind: Kind::new(envelope.wrapping_key(), Operation::Unwrap),
            algorithm: Some(envelope.algorithm()),
            second: None,
        };
        let job = || unwrap_job(envelope, &context);
        to_material(members.run(need, caller, job).await?)
    }

    async fn release(
        &self,
        envelope: &Envelope,
        context: Context<'_>,
        recipient: &Recipient,
        caller: &Caller,
    ) -> Result<Sealed, Error> {
        let members = self.members();
        if let Some(only) = members.only() {
            return only.release(envelope, context, recipient, caller).await;
        }
        let key = members.sealed_key(envelope.wrapping_key())?;
        let release = Release::new(envelope, context, recipient, &key)?;
        let need = Need {
            kind: Kind::new(envelope.wrapping_key(), Operation::Release),
            algorithm: Some(envelope.algorithm()),
            second: None,
        };
        let job = || release.job();
        release.sealed(members.run(need, caller, job).await?)
    }

    async fn rebind(
        &self,
        envelope: &Envelope,
        old: Context<'_>,
        new: Context<'_>,
        caller: &Caller,
    ) -> Result<Envelope, Error> {
        let members = self.members();
        if let Some(only) = members.only() {
            return only.rebind(envelope, old, new, caller).await;
        }
        let need = Need::integrity(envelope.wrapping_key());
        let unsealed = envelope.to_unsealed();
        let job = || rebind_job(envelope, &unsealed, &old, &new);
        let mac = to_mac(&members.run(need, caller, job).await?)?;
        Ok(unsealed.seal(&new, mac))
    }

    async fn mac(
        &self,
        key: WrappingKeyId,
        message: &MacMessage,
        caller: &Caller,
    ) -> Result<Mac, Error> {
        let members = self.members();
        match members.only() {
            Some(only) => only.mac(key, message, caller).await,
            None => members.mac(key, message, caller).await,
        }
    }

    async fn verify_mac(
        &self,
        key: WrappingKeyId,
        message: &MacMessage,
        mac: &Mac,
        caller: &Caller,
    ) -> Result<(), Error> {
        let members = self.members();
        if let Some(only) = members.only() {
            return only.verify_mac(key, message, mac, caller).await;
        }
        let job = || verify_job(key, message, mac);
        let done = members.run(Need::integrity(key), caller, job).await;
        done.map(drop)
    }

    async fn rewrap(
        &self,
        envelope: &Envelope,
        context: Context<'_>,
        to: WrappingKeyId,
        caller: &Caller,
    ) -> Result<Envelope, Error> {
        let members = self.members();
        match members.only() {
            Some(only) => only.rewrap(envelope, context, to, caller).await,
            None => members.rewrap(envelope, context, to, caller).await,
        }
    }

    fn jobs_of_principals(&self) -> u64 {
        let members = self.members();
        members
            .supervisors()
            .map(|supervisor| supervisor.jobs_of_principals())
            .sum()
    }

    fn check_admission(&self, caller: &Caller, planned: Planned) -> Result<(), Error> {
        let members = self.members();
        if let Some(only) = members.only() {
            return only.check_admission(caller, planned);
        }
        let mut refusal = None;
        for member in members
            .opened
            .iter()
            .filter(|member| member.supervisor.queue().has_links())
        {
            match member.supervisor.check_admission(caller, planned) {
                Ok(()) => return Ok(()),
                Err(error) => refusal = refusal.or(Some(error)),
            }
        }
        // Without a worker, the speed of the tokens is unknown.
        refusal.map_or(Ok(()), Err)
    }

    fn is_saturated(&self) -> bool {
        let members = self.members();
        if let Some(only) = members.only() {
            return only.is_saturated();
        }
        let mut ready = members
            .opened
            .iter()
            .filter(|member| member.supervisor.queue().has_links());
        let first = ready.next();
        first.is_some_and(|first| first.supervisor.is_saturated())
            && ready.all(|member| member.supervisor.is_saturated())
    }

    fn state(&self) -> TokenState {
        self.members().current_state()
    }

    fn expect_keys(&self, keys: Vec<(String, Vec<ExpectedKey>)>) {
        for (token, keys) in keys {
            self.expect_on(&token, keys);
        }
    }
}

impl Members {
    async fn mac(
        &self,
        key: WrappingKeyId,
        message: &MacMessage,
        caller: &Caller,
    ) -> Result<Mac, Error> {
        let job = || mac_job(key, message);
        to_mac(&self.run(Need::integrity(key), caller, job).await?)
    }

    async fn rewrap(
        &self,
        envelope: &Envelope,
        context: Context<'_>,
        to: WrappingKeyId,
        caller: &Caller,
    ) -> Result<Envelope, Error> {
        let target = self.target(to)?;
        // The broker plans no such re-wrap. The worker of another token would not know the purpose of the target.
        if target.sealing.is_none() && self.is_sealed(envelope.wrapping_key()) {
            let what = "user keys are not moved from a sealed to a plain wrapping key";
            return Err(Error::Untrusted(what.to_owned()));
        }
        let rewrap = Rewrap {
            envelope,
            context,
            to: &target,
        };
        let need = Need {
            kind: Kind::new(envelope.wrapping_key(), Operation::Rewrap),
            algorithm: Some(envelope.algorithm()),
            second: Some(to),
        };
        let mut members = self.opened.iter();
        if members.any(|member| member.holds(need) && member.supervisor.is_serving()) {
            let job = rewrap.on_one_token()?;
            let output = self.run(need, caller, || job.clone()).await?;
            return rewrap.moved(&output);
        }
        // No token has both wrapping keys. The first token encrypts for the new key, and the second
        // token makes the MAC.
        let need = Need {
            second: None,
            ..need
        };
        let output = self.run(need, caller, || rewrap.for_another()).await?;
        let unsealed = rewrap.unsealed(&output)?;
        let message = unsealed.mac_message(&rewrap.context);
        let mac = self.mac(to, &message, caller).await?;
        Ok(unsealed.seal(&rewrap.context, mac))
    }
}
