//! Implements the broker's [`Token`] for several tokens.

use async_trait::async_trait;

use keybroker_core::{
    envelope::{Algorithm, Context, Envelope, Mac, Unsealed, mac::MacMessage},
    key::WrappingKeyId,
    secret::KeyMaterial,
};

use crate::{
    Caller, Error, Planned, Token, TokenKey, TokenState,
    queue::Kind,
    rewrap::Rewrap,
    supervisor::token::{mac_job, rebind_job, to_mac, to_material, unwrap_job, verify_job},
};

use super::{Need, Pool};

impl Need {
    /// A job that uses only the integrity key.
    fn integrity(key: WrappingKeyId) -> Self {
        Self {
            kind: Kind::new(key, false),
            algorithm: None,
        }
    }

    /// A job that decrypts an envelope and encrypts again.
    fn rewrap(envelope: &Envelope) -> Self {
        Self {
            kind: Kind::rewrap(envelope.wrapping_key()),
            algorithm: Some(envelope.algorithm()),
        }
    }
}

impl Pool {
    /// The algorithm for new envelopes under a key. Every token that holds the key can decrypt such an envelope:
    /// SHA-1 if one of them supports no other hash, otherwise SHA-256.
    fn algorithm_of(&self, key: WrappingKeyId) -> Option<Algorithm> {
        let of_tokens = self
            .members
            .iter()
            .filter_map(|member| member.supervisor.algorithm(key));
        of_tokens.max_by_key(|algorithm| *algorithm == Algorithm::RsaOaepSha1)
    }

    /// A wrapping key with the algorithm for new envelopes.
    fn target(&self, key: WrappingKeyId) -> Option<TokenKey> {
        let algorithm = self.algorithm_of(key)?;
        let mut found = self
            .members
            .iter()
            .filter_map(|member| member.supervisor.token_key(key));
        found.find(|found| found.algorithm == algorithm)
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
            kind: Kind::new(envelope.wrapping_key(), true),
            algorithm: Some(envelope.algorithm()),
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
        let target = self.target(to).ok_or_else(|| self.absent(to))?;
        let need = Need::rewrap(envelope);
        // A token that holds both wrapping keys does everything in one job.
        for member in self.members.iter().filter(|member| {
            member.holds(need)
                && member.supervisor.algorithm(to) == Some(target.algorithm)
                && member.supervisor.queue().has_links()
        }) {
            match member
                .supervisor
                .rewrap(envelope, context, to, caller)
                .await
            {
                Err(Error::Down { .. } | Error::Untrusted(_) | Error::UnknownKey(_)) => {}
                answered => return answered,
            }
        }
        let unsealed = self
            .wrap_for_another(envelope, context, &target, caller)
            .await?;
        let message = unsealed.mac_message(&context);
        let mac = self.mac(to, &message, caller).await?;
        Ok(unsealed.seal(&context, mac))
    }

    async fn wrap_for_another(
        &self,
        envelope: &Envelope,
        context: Context<'_>,
        to: &TokenKey,
        caller: &Caller,
    ) -> Result<Unsealed, Error> {
        let rewrap = Rewrap {
            envelope,
            context,
            to,
        };
        let job = || rewrap.for_another();
        let output = self.run(Need::rewrap(envelope), caller, job).await?;
        rewrap.unsealed(&output)
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
        // Without a worker, nothing is known about the speed of the tokens.
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
}
