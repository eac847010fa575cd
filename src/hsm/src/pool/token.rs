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
    rewrap::Rewrap,
    supervisor::token::{mac_job, rebind_job, to_mac, to_material, unwrap_job, verify_job},
};

use super::{Need, Pool};

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

impl Pool {
    /// Returns the algorithm for new envelopes under a key. Every token with the key must be able to decrypt the
    /// envelopes. Therefore the hash is SHA-1 if a token with the key supports only SHA-1, and otherwise SHA-256.
    fn algorithm_of(&self, key: WrappingKeyId) -> Option<Algorithm> {
        let of_tokens = self
            .members
            .iter()
            .filter_map(|member| member.supervisor.algorithm(key));
        of_tokens.max_by_key(|algorithm| *algorithm == Algorithm::RsaOaepSha1)
    }

    /// Returns the public key to which envelopes are moved, with the algorithm for new envelopes.
    fn target(&self, key: WrappingKeyId) -> Result<TokenKey, Error> {
        let found = self
            .members
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
        let algorithm = self.algorithm_of(key);
        let holder = self
            .members
            .iter()
            .find(|member| algorithm.is_some() && member.supervisor.algorithm(key) == algorithm)
            .ok_or_else(|| self.absent(key))?;
        let unsealed = holder.supervisor.encrypt(key, material)?;
        let message = unsealed.mac_message(&context);
        let mac = self.mac(key, &message, caller).await?;
        Ok(unsealed.seal(&context, mac))
    }

    async fn unwrap(
        &self,
        envelope: &Envelope,
        context: Context<'_>,
        caller: &Caller,
    ) -> Result<KeyMaterial, Error> {
        let need = Need {
            kind: Kind::new(envelope.wrapping_key(), Operation::Unwrap),
            algorithm: Some(envelope.algorithm()),
            second: None,
        };
        let job = || unwrap_job(envelope, &context);
        to_material(self.run(need, caller, job).await?)
    }

    async fn rebind(
        &self,
        envelope: &Envelope,
        old: Context<'_>,
        new: Context<'_>,
        caller: &Caller,
    ) -> Result<Envelope, Error> {
        let need = Need::integrity(envelope.wrapping_key());
        let unsealed = envelope.to_unsealed();
        let job = || rebind_job(envelope, &unsealed, &old, &new);
        let mac = to_mac(&self.run(need, caller, job).await?)?;
        Ok(unsealed.seal(&new, mac))
    }

    async fn mac(
        &self,
        key: WrappingKeyId,
        message: &MacMessage,
        caller: &Caller,
    ) -> Result<Mac, Error> {
        let job = || mac_job(key, message);
        to_mac(&self.run(Need::integrity(key), caller, job).await?)
    }

    async fn verify_mac(
        &self,
        key: WrappingKeyId,
        message: &MacMessage,
        mac: &Mac,
        caller: &Caller,
    ) -> Result<(), Error> {
        let job = || verify_job(key, message, mac);
        self.run(Need::integrity(key), caller, job).await.map(drop)
    }

    async fn rewrap(
        &self,
        envelope: &Envelope,
        context: Context<'_>,
        to: WrappingKeyId,
        caller: &Caller,
    ) -> Result<Envelope, Error> {
        let target = self.target(to)?;
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
        let mut members = self.members.iter();
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

    fn jobs_of_principals(&self) -> u64 {
        let members = self.members.iter();
        members
            .map(|member| member.supervisor.jobs_of_principals())
            .sum()
    }

    fn check_admission(&self, caller: &Caller, planned: Planned) -> Result<(), Error> {
        let mut refusal = None;
        for member in self
            .members
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
        let mut ready = self
            .members
            .iter()
            .filter(|member| member.supervisor.queue().has_links());
        let first = ready.next();
        first.is_some_and(|first| first.supervisor.is_saturated())
            && ready.all(|member| member.supervisor.is_saturated())
    }

    fn state(&self) -> TokenState {
        self.current_state()
    }

    /// A token that had no keys when the broker started stays unused until a restart.
    fn expect_keys(&self, keys: Vec<(String, Vec<ExpectedKey>)>) {
        for (token, keys) in keys {
            let mut members = self.members.iter();
            let member = members.find(|member| member.supervisor.name() == token);
            if let Some(member) = member.filter(|_| !keys.is_empty()) {
                member.supervisor.expect(keys);
            }
        }
    }
}
