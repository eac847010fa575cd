//! Tokens that exist only in memory.

use std::sync::{
    Mutex, PoisonError,
    atomic::{AtomicUsize, Ordering},
};

use aws_lc_rs::digest::{SHA256, digest};

use super::*;

/// Several tokens, each with one key, or one late token with all keys. A token that is down still has the keys that its workers
/// found.
#[derive(Debug)]
pub(super) struct Tokens {
    /// Whether a wrap ends only after its deadline, and each MAC is zero.
    are_late: bool,
    keys: Mutex<Vec<WrappingKeyId>>,
    down: Mutex<Vec<WrappingKeyId>>,
    /// A lock that a test holds to stop verifications.
    verifying: tokio::sync::Mutex<()>,
    /// The number of verifications that began.
    verifications: AtomicUsize,
}

impl Tokens {
    pub(super) fn with(keys: &[WrappingKeyId]) -> Arc<Self> {
        Self::new(keys, false)
    }

    /// One token that completes each wrap only after the deadline of the wrap.
    pub(super) fn late(keys: &[WrappingKeyId]) -> Arc<Self> {
        Self::new(keys, true)
    }

    fn new(keys: &[WrappingKeyId], are_late: bool) -> Arc<Self> {
        Arc::new(Self {
            are_late,
            keys: Mutex::new(keys.to_vec()),
            down: Mutex::default(),
            verifying: tokio::sync::Mutex::default(),
            verifications: AtomicUsize::default(),
        })
    }

    /// Runs `change` while the next verification waits.
    pub(super) async fn during_verification(&self, change: impl Future<Output = ()>) {
        let before = self.verifications.load(Ordering::SeqCst);
        let _stopped = self.verifying.lock().await;
        while self.verifications.load(Ordering::SeqCst) == before {
            tokio::task::yield_now().await;
        }
        change.await;
    }

    pub(super) fn shows(&self, keys: &[WrappingKeyId]) {
        *self.keys.lock().unwrap_or_else(PoisonError::into_inner) = keys.to_vec();
    }

    pub(super) fn are_down(&self, keys: &[WrappingKeyId]) {
        *self.down.lock().unwrap_or_else(PoisonError::into_inner) = keys.to_vec();
    }

    fn mac_of(&self, key: WrappingKeyId, message: &MacMessage) -> Mac {
        if self.are_late {
            [0; 32]
        } else {
            mac_by(key, message)
        }
    }

    fn check(&self, key: WrappingKeyId) -> Result<(), hsm::Error> {
        if self.down.lock().unwrap().contains(&key) {
            return Err(hsm::Error::Down {
                cause: "the token does not answer".to_owned(),
                retry_after: Duration::from_secs(1),
            });
        }
        if self.keys.lock().unwrap().contains(&key) {
            Ok(())
        } else {
            Err(hsm::Error::UnknownKey(key))
        }
    }
}

/// The MAC by the integrity key of a key of these tokens.
pub(super) fn mac_by(key: WrappingKeyId, message: &MacMessage) -> Mac {
    let content = [key.as_bytes().as_slice(), message.as_bytes()].concat();
    digest(&SHA256, &content).as_ref().try_into().unwrap()
}

#[async_trait]
impl Token for Tokens {
    async fn wrap(
        &self,
        key: WrappingKeyId,
        context: Context<'_>,
        _material: &KeyMaterial,
        caller: &Caller,
    ) -> Result<Envelope, hsm::Error> {
        self.check(key)?;
        if self.are_late {
            // A sleep on the runtime's clock would let the deadline fire first.
            thread::sleep(caller.deadline().remaining() + Duration::from_millis(1));
        }
        let unsealed = Unsealed::new(Algorithm::RsaOaepSha256, key, vec![1; 256]).unwrap();
        let mac = self.mac_of(key, &unsealed.mac_message(&context));
        Ok(unsealed.seal(&context, mac))
    }

    async fn unwrap(
        &self,
        _envelope: &Envelope,
        _context: Context<'_>,
        _caller: &Caller,
    ) -> Result<KeyMaterial, hsm::Error> {
        Err(hsm::Error::Deadline)
    }

    async fn release(
        &self,
        _envelope: &Envelope,
        _context: Context<'_>,
        _recipient: &Recipient,
        _caller: &Caller,
    ) -> Result<hsm::Sealed, hsm::Error> {
        Err(hsm::Error::Recipient("a weak key".to_owned()))
    }

    async fn rebind(
        &self,
        _envelope: &Envelope,
        _old: Context<'_>,
        _new: Context<'_>,
        _caller: &Caller,
    ) -> Result<Envelope, hsm::Error> {
        Err(hsm::Error::Deadline)
    }

    async fn mac(
        &self,
        key: WrappingKeyId,
        message: &MacMessage,
        _caller: &Caller,
    ) -> Result<Mac, hsm::Error> {
        self.check(key)?;
        Ok(self.mac_of(key, message))
    }

    async fn verify_mac(
        &self,
        key: WrappingKeyId,
        message: &MacMessage,
        mac: &Mac,
        _caller: &Caller,
    ) -> Result<(), hsm::Error> {
        self.verifications.fetch_add(1, Ordering::SeqCst);
        let _turn = self.verifying.lock().await;
        self.check(key)?;
        if *mac == self.mac_of(key, message) {
            Ok(())
        } else {
            Err(hsm::Error::MacRefused)
        }
    }

    async fn rewrap(
        &self,
        _envelope: &Envelope,
        _context: Context<'_>,
        _to: WrappingKeyId,
        _caller: &Caller,
    ) -> Result<Envelope, hsm::Error> {
        Err(hsm::Error::Deadline)
    }

    fn jobs_of_principals(&self) -> u64 {
        0
    }

    fn check_admission(&self, _caller: &Caller, _planned: hsm::Planned) -> Result<(), hsm::Error> {
        Ok(())
    }

    fn is_saturated(&self) -> bool {
        false
    }

    fn state(&self) -> TokenState {
        let shown = self.keys.lock().unwrap().clone();
        if self.are_late {
            return state_of(Serving::Up, &shown, Vec::new());
        }
        let down = self.down.lock().unwrap().clone();
        let tokens: Vec<TokenState> = shown
            .iter()
            .map(|key| {
                let serving = if down.contains(key) {
                    Serving::Down("the token does not answer".to_owned())
                } else {
                    Serving::Up
                };
                state_of(serving, &[*key], Vec::new())
            })
            .collect();
        state_of(Serving::Up, &shown, tokens)
    }

    fn expect_keys(&self, _keys: Vec<(String, Vec<hsm::ExpectedKey>)>) {}
}
