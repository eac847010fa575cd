//! The functions of the control plane: wrapping keys, token state and audit log. No function of this module can release
//! a user key.

use keybroker_core::{
    call::{Call, Timestamp},
    envelope::Algorithm,
    error::{Error, Reason},
    key::{Fingerprint, Purpose, Sealing, WrappingKeyId, WrappingKeyState},
    principal::{Action, Principal},
};
use keybroker_hsm::{Assurance, TokenState, admin::KeyAdmin};
use keybroker_policy::Resource;
use keybroker_store::RegistryRow;

use super::{
    Broker, TaskFailed,
    journal::Draft,
    observed,
    registry::{Registry, token_key},
};

/// One registered wrapping key, with the public key and the algorithm that the token reports.
#[derive(Clone, Debug)]
pub struct WrappingKeyView {
    /// The id of the wrapping key.
    pub id: WrappingKeyId,
    /// The fingerprint of the public key.
    pub fingerprint: Fingerprint,
    /// The purpose for which the key may be used.
    pub purpose: Purpose,
    /// The state of the key (NIST SP 800-57 part 1).
    pub state: WrappingKeyState,
    /// Time of the key's registration.
    pub registered: Timestamp,
    /// Whether a backup of the key's token is confirmed.
    pub backup_confirmed: bool,
    /// When the key is destroyed. The value is `None` if no destruction is scheduled.
    pub destroyed_at: Option<Timestamp>,
    /// The problem that prevents the use of the key in every state; `None` for a key without a
    /// problem.
    pub problem: Option<String>,
    /// Names of the configured tokens whose workers found the key.
    pub tokens: Vec<String>,
    /// What protects the keys of each of these tokens; `unknown` for a token that no worker has examined.
    pub assurances: Vec<String>,
    /// Names of the other configured tokens; empty for a destroyed key.
    pub missing_tokens: Vec<String>,
    /// The protection of a sealed wrapping key, on the token that protects it worst. `None` for a plain wrapping key, and if
    /// no token shows the key.
    pub sealing: Option<Sealing>,
    /// The public key on the token; `None` for a destroyed key, and until the first worker is ready.
    pub on_token: Option<KeyOnToken>,
}

/// The public properties of a wrapping key, read from the token.
#[derive(Clone, Debug)]
pub struct KeyOnToken {
    /// Modulus length in bits.
    pub modulus_bits: u32,
    /// The algorithm with which the key wraps.
    pub algorithm: Algorithm,
    /// DER SubjectPublicKeyInfo.
    pub spki: Vec<u8>,
}

impl Broker {
    /// Returns all registered wrapping keys, ordered by their sequence number.
    pub async fn wrapping_keys(
        &self,
        principal: &Principal,
        call: &Call,
    ) -> Result<Vec<WrappingKeyView>, Error> {
        self.read(principal, call, Action::ReadWrappingKeys, || {
            self.registry().map(|registry| self.views(&registry))
        })
        .await
    }

    /// Returns one registered wrapping key.
    pub async fn wrapping_key(
        &self,
        principal: &Principal,
        call: &Call,
        id: WrappingKeyId,
    ) -> Result<WrappingKeyView, Error> {
        self.read(principal, call, Action::ReadWrappingKeys, || {
            self.views(&*self.registry()?)
                .into_iter()
                .find(|view| view.id == id)
                .ok_or_else(|| Error::new(Reason::KeyNotFound, format!("wrapping key {id}")))
        })
        .await
    }

    /// Returns the state of the token and its workers.
    pub async fn token_state(
        &self,
        principal: &Principal,
        call: &Call,
    ) -> Result<TokenState, Error> {
        self.read(principal, call, Action::ReadToken, || {
            Ok(self.token.state())
        })
        .await
    }

    /// Returns the last entries of this instance's audit log, oldest first.
    pub async fn audit_tail(
        &self,
        principal: &Principal,
        call: &Call,
        limit: usize,
    ) -> Result<Vec<String>, Error> {
        let audit = self.audit.clone();
        self.read_async(principal, call, Action::ReadAudit, async move {
            // Reading a file blocks the thread, so the files must not be read on an async thread.
            match tokio::task::spawn_blocking(move || audit.tail(limit)).await {
                Ok(entries) => entries.map_err(Error::from),
                Err(source) => Err(TaskFailed::of("reading the audit log", source)),
            }
        })
        .await
    }

    async fn read<T>(
        &self,
        principal: &Principal,
        call: &Call,
        action: Action,
        look: impl FnOnce() -> Result<T, Error>,
    ) -> Result<T, Error> {
        self.read_async(principal, call, action, async { look() })
            .await
    }

    pub(super) async fn read_async<T>(
        &self,
        principal: &Principal,
        call: &Call,
        action: Action,
        look: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        let reading = observed(action, call, async {
            let permit = self
                .permit(principal, call, action, Resource::Broker)
                .await?;
            let mut draft = Draft::new(principal, call, action);
            draft.policy(permit.policy());
            let found = look.await;
            Ok(self.conclude(draft, found).await?.into_inner())
        });
        // The future contains an audit entry, and otherwise every caller would contain the future.
        Box::pin(reading).await
    }

    fn views(&self, registry: &Registry) -> Vec<WrappingKeyView> {
        let state = self.token.state();
        let configured = self.configured.all();
        let view = |found: (&RegistryRow, Option<&str>)| WrappingKeyView {
            destroyed_at: self.scheduled.due(found.0),
            ..view(found, &state, &configured)
        };
        registry.rows().map(view).collect()
    }
}

/// Describes a row of the registry, the reason why its key cannot be used, and the tokens that have the key.
pub(super) fn view(
    (row, problem): (&RegistryRow, Option<&str>),
    state: &TokenState,
    configured: &[KeyAdmin],
) -> WrappingKeyView {
    let each = if state.tokens.is_empty() {
        std::slice::from_ref(state)
    } else {
        &state.tokens
    };
    let with = each
        .iter()
        .filter(|token| token_key(&token.keys, row.id).is_some());
    let assurance = |token: &TokenState| token.assurance.map_or("unknown", Assurance::as_str);
    let (tokens, assurances): (Vec<_>, Vec<_>) = with
        .map(|token| (token.name.clone(), assurance(token).to_owned()))
        .unzip();
    let shown = each
        .iter()
        .filter_map(|token| token_key(&token.keys, row.id));
    let sealing = shown.filter_map(|key| key.sealing).max();
    let is_destroyed = row.state == WrappingKeyState::Destroyed;
    let others = configured.iter().map(KeyAdmin::name);
    let missing_tokens = others
        .filter(|name| !is_destroyed && !tokens.iter().any(|token| token == name))
        .map(str::to_owned)
        .collect();
    WrappingKeyView {
        id: row.id,
        fingerprint: row.fingerprint,
        purpose: row.purpose,
        state: row.state,
        registered: row.registered,
        backup_confirmed: row.backup_confirmed.is_some(),
        destroyed_at: None,
        tokens,
        assurances,
        missing_tokens,
        sealing,
        problem: problem.map(str::to_owned),
        on_token: token_key(&state.keys, row.id).map(|key| KeyOnToken {
            modulus_bits: key.modulus_bits,
            algorithm: key.algorithm,
            spki: key.spki.clone(),
        }),
    }
}
